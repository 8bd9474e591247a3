"""How far the listener has come, and how soon it goes on: coalescing, watermark and read barrier.

Theory of operation
-------------------
Datagrams wait in the sockets until the listener takes them. It works in steps: poll the sockets, receive and apply
batch after batch, until the sockets are empty (or for a bounded number of batches). Three questions follow from that.

*How soon does the next step begin?* (`Pacing`.) A wake-up costs as much as twenty datagrams. So datagrams that come
faster than COALESCE_ABOVE_PER_S are left to wait until about COALESCE_TARGET have arrived, for a few milliseconds at
most. A lone datagram is taken at once. Measured: 1,000 engines x 5/s, evenly spread, need a fifth of the CPU that one
wake-up each needs. HTTP answers do not notice (they use the barrier), nor does a page, which is told ten times a
second; impatient readers of /watch and those of this process would, hence LOW_LATENCY_DELAY_S for them.

*What must have been heard by now?* (`Watermark`.) Everything that had arrived when a step began has been taken when it
ends with empty sockets: the watermark is then the beginning of that step. An engine is removed for a silence up to the
watermark only, never for a time in which its datagrams may have waited. If the sockets are never empty, the watermark
follows from counting: receive buffers are first in, first out, and once more datagrams have been taken than they can
hold, everything that waited when the counting began has been taken.

*When may a reader be answered?* (`ReadBarrier`.) A reader must be shown all that had arrived before it asked. It asks
with a ticket, one higher than the last. The listener notes before each poll which ticket was asked for last; if that
step ends with empty sockets, this ticket and all before are complete. Most of the time there is nothing to wait for: if
the sockets are empty and no datagram is between a socket and the store, the reader goes on at once. For that it polls
first and reads `_in_flight` second: the listener sets it before the first datagram leaves the socket, so that one of
the two shows it for as long as it is on its way.
"""

from __future__ import annotations

import select
import socket
import time
from collections.abc import Callable, Iterable

from wake_up import WakeUp

COALESCE_ABOVE_PER_S = 1000
COALESCE_TARGET = 100
MAX_DELAY_S = 0.020
LOW_LATENCY_DELAY_S = 0.002
MIN_DELAY_S = 0.001  # at 100,000/s delays of 0.2 ms cost a third of all the CPU
RATE_WINDOW_S = 0.02


def coalescing_delay_s(rate: float, longest_s: float, room: float) -> float:
    """How long to let datagrams wait that come at `rate` a second, so that no more than `room` wait in the socket.

    0 if they are not worth waiting for.
    """
    if rate < COALESCE_ABOVE_PER_S:
        return 0.0
    delay_s = min(longest_s, max(MIN_DELAY_S, COALESCE_TARGET / rate), room / rate)
    return delay_s if delay_s >= MIN_DELAY_S else 0.0


class Pacing:
    """Measures how fast datagrams come, and says how long to wait between two steps. For the listener's thread."""

    def __init__(self, room: float, now: float, has_impatient_readers: Callable[[], bool]) -> None:
        """`room`: datagrams that may wait in a socket without fear that its buffer runs over.

        `has_impatient_readers`: whether anybody reads the store without the barrier.
        """
        self._room = room
        self._has_impatient_readers = has_impatient_readers
        self._taken = 0
        self._since = now
        self._delay_s = 0.0

    def delay_s(self, taken: int, now: float) -> float:
        """How long to wait after a step that took so many."""
        self._taken += taken
        elapsed = now - self._since
        if elapsed >= RATE_WINDOW_S:
            longest_s = LOW_LATENCY_DELAY_S if self._has_impatient_readers() else MAX_DELAY_S
            self._delay_s = coalescing_delay_s(self._taken / elapsed, longest_s, self._room)
            self._taken, self._since = 0, now
        return self._delay_s


class Watermark:
    """The moment (monotonic, s) up to which everything that had arrived has been taken. For the listener's thread."""

    def __init__(self, max_buffered: int, now: float, *readers: Callable[[float], None]) -> None:
        """`max_buffered`: the most datagrams that the receive buffers can hold; `readers` are told when it moves."""
        self._max_buffered = max_buffered
        self._readers = readers
        self._counted = 0  # datagrams taken since `_counted_from`
        self._counted_from = now
        self.at = now

    def advance(self, began_at: float, taken: int, *, emptied: bool) -> None:
        """A step has ended that began then, took so many, and left the sockets empty or not."""
        self._counted += taken
        if emptied:
            self.at = began_at
        elif self._counted > self._max_buffered:
            self.at = self._counted_from
        else:
            return
        self._counted = 0
        self._counted_from = began_at
        for reader in self._readers:
            reader(self.at)


class ReadBarrier:
    """Has a reader wait until everything is taken that had arrived when it asked. For one reader and one listener."""

    def __init__(self, sockets: Iterable[socket.socket], listener: WakeUp) -> None:
        """`listener` is set when a reader waits for it."""
        self._listener = listener
        self._reader = WakeUp()
        self._sockets = select.poll()  # the reader's own, because a poll object cannot be shared between threads
        for sock in sockets:
            self._sockets.register(sock, select.POLLIN)
        self._requested = 0  # the last ticket; written by the reader
        self._completed = 0  # the last ticket that is complete; written by the listener
        self._in_flight = False  # whether datagrams may have left a socket and not reached the store; the listener's
        self._is_closed = False

    def wait(self, timeout_s: float) -> None:
        """Return once everything that has arrived by now is taken, or after `timeout_s`."""
        if self._is_closed or self._nothing_waits():
            return
        self._requested += 1
        self._listener.set()
        # Once more: a listener that did not see the request in time may wait for the next datagram by now.
        if self._nothing_waits():
            return
        give_up_at = time.monotonic() + timeout_s
        while self._completed < self._requested and (left_s := give_up_at - time.monotonic()) > 0:
            self._reader.wait(left_s)  # it may have been set for an earlier ticket

    def _nothing_waits(self) -> bool:
        return not self._sockets.poll(0) and not self._in_flight

    # -- for the listener ----------------------------------------------------------------------------------------------

    @property
    def is_requested(self) -> bool:
        """Whether a reader waits."""
        return self._completed != self._requested

    def ticket(self) -> int:
        """The last ticket; to be read before the sockets are polled."""
        return self._requested

    def begin(self) -> None:
        """Datagrams leave the sockets from now on."""
        self._in_flight = True

    def end(self, ticket: int, *, emptied: bool) -> None:
        """All that have left the sockets have reached the store; if the sockets are empty, `ticket` is complete."""
        self._in_flight = False
        if emptied and ticket != self._completed:
            self._completed = ticket
            self._reader.set()

    def close(self) -> None:
        """The listener is told to stop, and nobody waits for it any more; from any thread."""
        self._is_closed = True

    def close_descriptors(self) -> None:
        """Let go of what it woke its reader with."""
        self._reader.close()
