"""The listener: takes datagrams from the socket, parses them, and hands them to the store and to the state log.

Unicast and broadcast differ in what is bound only: see `listen_address` in sockets.py.
"""

from __future__ import annotations

import ipaddress
import logging
import select
import socket
import struct
import sys
import threading
import time
from collections.abc import Callable, Sequence
from itertools import compress
from typing import cast

from config import PREFIX, Network
from daemon_log import OncePerMinute
from engine_state import (
    FIELDS_JSON,
    FieldTexts,
    InvalidDatagram,
    match_all_canonical,
    parse_datagram,
    quote_json,
    unquote_json,
)
from sockets import SocketLost, bind_anew, format_address, granted_receive_buffer
from state_log import StateLog
from state_store import ACCEPTED, DUPLICATE, REJECTED_CAPACITY, Batch, StateStore
from udp_receiver import BATCH_DATAGRAMS, make_receiver, unpack_address
from wake_up import WakeUp

logger = logging.getLogger("elrar.listener")

BATCHES_A_STEP = 16  # at most, before it is looked at whether to stop
WAIT_MS = 200  # a silent socket is looked at this often, which shows that the listener moves
STOP_DRAIN_S = 1.0  # at stop, what waits in the socket is taken for at most this long
# A wake-up costs twenty times what taking a datagram does, so that states that come one by one are left to gather:
# about GATHERED of them, and only where they come faster than RAPID_PER_S; a lone datagram is taken at once. Over HTTP
# nobody sees that, because an answer has intake catch up; readers of /watch and those in this process do, and for them
# it is PROMPT_NAP_S at most. 1,000 engines x 5/s, evenly spread, take a fifth of the CPU so.
RAPID_PER_S = 1000
GATHERED = 100
LONGEST_NAP_S = 0.020
PROMPT_NAP_S = 0.002
SHORTEST_NAP_S = 0.001  # at 100,000/s naps of 0.2 ms cost a third of all the CPU
RATE_WINDOW_S = 0.02
CACHED_SOURCES = 16384
MEND_TIMEOUT_S = 1.0  # for a socket that gives nothing but errors to be good again
MEND_INTERVAL_S = 0.02
SMALLEST_CHARGE = 512  # bytes of receive buffer that the kernel charges for the smallest datagram, at least
LARGEST_CHARGE = 17_408  # the same for the largest that is taken

_REFUSED = b""  # what stands for the source of a sender that is not in ALLOWED_SOURCES

_SO_MEMINFO = 55  # Linux; not in the socket module
_MEMINFO_DROPS = 8  # index of the u32 that counts what was dropped


def is_allowed(host: str, allowed: Sequence[Network]) -> bool:
    """Whether `host`, as unpack_address gives it, is in one of the networks."""
    address = ipaddress.ip_address(host.partition("%")[0])
    return any(address in network for network in allowed)


def gathering_nap_s(rate: float, longest_s: float, room: float) -> float:
    """How long to let datagrams gather that come at `rate` a second, so that no more than `room` wait in the socket.

    0 where they are not worth waiting for.
    """
    if rate < RAPID_PER_S:
        return 0.0
    nap_s = min(longest_s, max(SHORTEST_NAP_S, GATHERED / rate), room / rate)
    return nap_s if nap_s >= SHORTEST_NAP_S else 0.0


class _Sources(dict[bytes, bytes]):
    """Of each socket address its source, `<ip>:<port>` as JSON text, or _REFUSED where it is not in `allowed`."""

    def __init__(self, allowed: Sequence[Network]) -> None:
        super().__init__()
        self._allowed = allowed

    def __missing__(self, address: bytes) -> bytes:
        if len(self) >= CACHED_SOURCES:
            self.clear()
        host, port = unpack_address(address)
        allowed = not self._allowed or is_allowed(host, self._allowed)
        source = self[address] = quote_json(format_address(host, port)).encode() if allowed else _REFUSED
        return source


class UdpListener:
    """Takes datagrams until it is stopped; the gateway gives it its thread.

    `run` and `step` belong to that thread, everything else may be called from any.
    """

    def __init__(
        self,
        sockets: Sequence[socket.socket],
        store: StateStore,
        log: StateLog | None,
        *,
        allowed_sources: Sequence[Network] = (),
        prompt: bool = False,
        clock: Callable[[], float] = time.monotonic,
        wall_clock: Callable[[], float] = time.time,
    ) -> None:
        """`prompt`: the store is read without `catch_up`, so that datagrams must not gather for long."""
        self._sockets = {sock.fileno(): sock for sock in sockets}
        self._bound = {sock.fileno(): sock.getsockname() for sock in sockets}
        self._failing_since: float | None = None  # monotonic; since when receiving has met nothing but errors
        self._store = store
        self._log = log
        self._receivers = {sock.fileno(): make_receiver(sock) for sock in sockets}
        self._sources = _Sources(tuple(allowed_sources))
        self._prompt = prompt
        self._clock = clock
        self._wall_clock = wall_clock
        self._stopping = False
        self._turn = WakeUp()  # to stop, and to catch up
        self._poll = select.poll()
        self._poll.register(self._turn, select.POLLIN)
        for sock in sockets:
            self._poll.register(sock, select.POLLIN)
        # What a full receive buffer can hold at most: after so many datagrams, all that waited before has been taken.
        granted = [granted_receive_buffer(sock) * 2 for sock in sockets]
        self._buffered_at_most = 1 + sum(granted) // SMALLEST_CHARGE
        self._room = min(granted) / 4 / LARGEST_CHARGE  # datagrams that may gather: a quarter of what certainly fits
        self._taken_without_pause = 0
        self._pause_ended_at = clock()
        self._taking = False  # whether there may be datagrams that have left the socket and are not in the store yet
        # When `catch_up` was asked for last and the same once all that had arrived by then is taken, each replaced as a
        # whole by one thread; what ends its waiting; and a poll of its own, because two threads cannot wait on one.
        self._question = self._answered = (float("-inf"),)
        self._caught_up = WakeUp()
        self._arrived = select.poll()
        for sock in sockets:
            self._arrived.register(sock, select.POLLIN)
        self._notices = {
            "rejected invalid datagrams": OncePerMinute(clock),
            f"rejected datagrams whose source is not in {PREFIX}ALLOWED_SOURCES": OncePerMinute(clock),
            f"rejected datagrams of new engines, as many as {PREFIX}MAX_ENGINES being known": OncePerMinute(clock),
            "the kernel dropped datagrams, its receive buffer being full: give the gateway a core of its own, or raise"
            f" {PREFIX}RECEIVE_BUFFER and net.core.rmem_max;": OncePerMinute(clock),
            "receiving met errors, and goes on;": OncePerMinute(clock),
        }
        self._invalid, self._source, self._capacity, self._by_kernel, self._by_error = self._notices.values()
        self._say_at = clock()
        self._drops_noted = 0
        self._drops_lock = threading.Lock()  # guards the two below, which any reader of the counter moves on
        self._drops_seen = dict.fromkeys(self._sockets, 0)
        self._drops = 0
        self.moved_at = clock()  # monotonic; written by the listener's thread only

    def run(self) -> None:
        """Take datagrams until `stop` is called, and then what waits in the socket."""
        nap_s, counted, counted_from = 0.0, 0, self._clock()
        while not self._stopping:
            taken = self.step(WAIT_MS if self._answered is self._question else 0)
            counted += taken
            now = self._clock()
            if now - counted_from >= RATE_WINDOW_S:
                longest_s = PROMPT_NAP_S if self._prompt or self._store.has_subscriber else LONGEST_NAP_S
                nap_s = gathering_nap_s(counted / (now - counted_from), longest_s, self._room)
                counted, counted_from = 0, now
            # More than a batch is a socket that has been filling up meanwhile.
            if nap_s and taken < BATCH_DATAGRAMS and self._answered is self._question:
                self._turn.wait(nap_s)
        deadline = self._clock() + STOP_DRAIN_S
        while self.step(0) and self._clock() < deadline:
            pass
        self._say()

    def step(self, wait_ms: int) -> int:
        """Wait for datagrams, for `wait_ms` at most, and take what waits then; returns how many it was.

        It takes batch after batch without waiting in between: a wait gives the interpreter's lock away, and beside a
        CPU-bound thread that costs 5 ms.
        """
        looked_at = self.moved_at = self._clock()
        taken = 0
        emptied, failed = True, False
        ready = self._poll.poll(wait_ms)
        self._taking = True
        for fd, _ in ready:
            receiver = self._receivers.get(fd)
            if receiver is None:
                self._turn.take()
                continue
            for _ in range(BATCHES_A_STEP):
                self.moved_at = self._clock()
                try:
                    datagrams, addresses = receiver.receive()
                except OSError as error:
                    emptied, failed = False, True
                    self._mend(fd, error)
                    break
                if datagrams:
                    taken += len(datagrams)
                    self._take(datagrams, addresses)
                if len(datagrams) < BATCH_DATAGRAMS:
                    break
            else:
                emptied = False
        self._taking = False
        if not failed:
            self._failing_since = None
        self._say_how_far(emptied, looked_at, taken)
        question = self._question
        if question is not self._answered and emptied and looked_at >= question[0]:
            self._answered = question
            self._caught_up.ring()
        if looked_at >= self._say_at:
            self._say()
        return taken

    def _mend(self, fd: int, error: OSError) -> None:
        """Go on after an error of receiving; raises SocketLost if it lasts for MEND_TIMEOUT_S.

        A socket that was destroyed (`ss -K`) has told so by an error, and may have lost its port. Any other is left as
        it is, for what waits in it.
        """
        now = time.monotonic()
        if self._failing_since is None:
            self._failing_since = now
        sock, name = self._sockets[fd], self._bound[fd]
        try:
            if sock.getsockname() != name:
                self.kernel_dropped()
                with self._drops_lock:
                    bind_anew(sock, name)
                    self._drops_seen[fd] = 0
        except OSError as failed:
            error = failed
        if now - self._failing_since > MEND_TIMEOUT_S:
            raise SocketLost("UDP", name, error) from error
        if self._by_error.add():
            self._by_error.example(f"UDP {format_address(*name[:2])}: {error.strerror}")
        self._turn.wait(MEND_INTERVAL_S)

    def catch_up(self, patience_s: float) -> None:
        """Have all taken that has arrived by now, and wait for that, for so long at most; for one other thread.

        Once it is told to stop, nobody waits for it any more.
        """
        if self._has_taken_all() or self._stopping:
            return
        self._question = question = (self._clock(),)
        self._turn.ring()
        # Once more, because a listener that did not see the question yet may have gone to wait for what comes next.
        if self._has_taken_all():
            return
        give_up_at = time.monotonic() + patience_s
        while self._answered is not question and (left_s := give_up_at - time.monotonic()) > 0:
            self._caught_up.wait(left_s)  # it may have been rung for an earlier question

    def _has_taken_all(self) -> bool:
        # In this order: what has left the socket is being taken from before it leaves it.
        return not self._arrived.poll(0) and not self._taking

    def _say_how_far(self, all_taken: bool, looked_at: float, taken: int) -> None:
        self._taken_without_pause += taken
        if all_taken:
            self._store.advance_watermark(looked_at)
        elif self._taken_without_pause > self._buffered_at_most:
            self._store.advance_watermark(self._pause_ended_at)
        else:
            return
        self._taken_without_pause = 0
        self._pause_ended_at = looked_at

    def _take(self, datagrams: list[bytes], addresses: Sequence[bytes]) -> None:
        batch = Batch(self._clock(), self._wall_clock())
        known = self._sources
        sources = [known[address] for address in addresses]
        if _REFUSED in sources:
            datagrams, sources = self._without_refused(batch, datagrams, addresses)
        matched = match_all_canonical(datagrams)
        if None in matched:
            batch.states, texts, batch.sources = self._parse(batch, matched, datagrams, sources)
        else:
            batch.states, texts, batch.sources = cast("list[FieldTexts]", matched), datagrams, sources
        outcomes = self._store.apply(batch)
        if self._log is not None:
            logged_sources = batch.sources
            if outcomes.count(ACCEPTED) < len(outcomes):
                kept = [outcome is not DUPLICATE and outcome is not REJECTED_CAPACITY for outcome in outcomes]
                texts, logged_sources = list(compress(texts, kept)), list(compress(batch.sources, kept))
            self._log.append(batch.received_s, texts, logged_sources)
        self._note(batch, outcomes)

    def _without_refused(
        self, batch: Batch, datagrams: list[bytes], addresses: Sequence[bytes]
    ) -> tuple[list[bytes], list[bytes]]:
        """The datagrams whose senders are in ALLOWED_SOURCES, and their sources; the others are counted."""
        taken, sources = [], []
        debug = logger.isEnabledFor(logging.DEBUG)
        for datagram, address in zip(datagrams, addresses, strict=True):
            source = self._sources[address]
            if source is not _REFUSED:
                taken.append(datagram)
                sources.append(source)
                continue
            batch.rejected_source += 1
            if self._source.add():
                self._source.example(format_address(*unpack_address(address)))
            if debug:
                logger.debug("datagram rejected_source source=%s", format_address(*unpack_address(address)))
        return taken, sources

    def _parse(
        self, batch: Batch, matched: Sequence[FieldTexts | None], datagrams: list[bytes], sources: list[bytes]
    ) -> tuple[list[FieldTexts], list[bytes], list[bytes]]:
        """Parse what is not canonical; returns the valid states, each as its log line has it too, and their sources."""
        states, texts, valid_sources = [], [], []
        debug = logger.isEnabledFor(logging.DEBUG)
        for canonical, datagram, source in zip(matched, datagrams, sources, strict=True):
            fields, text = canonical, datagram
            if fields is None:
                try:
                    fields = parse_datagram(datagram).texts()
                except InvalidDatagram as error:
                    batch.invalid.append(error.reason)
                    if self._invalid.add():
                        self._invalid.example(f"{error} bytes={len(datagram)} source={unquote_json(source)}")
                    if debug:
                        logger.debug("datagram invalid reason=%s source=%s", error, unquote_json(source))
                    continue
                text = b"{%b}" % (FIELDS_JSON % fields)
            states.append(fields)
            texts.append(text)
            valid_sources.append(source)
        return states, texts, valid_sources

    def _note(self, batch: Batch, outcomes: list[str]) -> None:
        if REJECTED_CAPACITY in outcomes:
            for number, outcome in enumerate(outcomes):
                if outcome is REJECTED_CAPACITY and self._capacity.add():
                    self._capacity.example(_who(batch, number))
        if logger.isEnabledFor(logging.DEBUG):
            for number, outcome in enumerate(outcomes):
                logger.debug("datagram %s %s", outcome, _who(batch, number))

    def _say(self) -> None:
        """Say what there is to say of rejected datagrams; once a second, so that no count stays unsaid."""
        self._say_at = self._clock() + 1.0
        dropped = self.kernel_dropped() or 0
        if dropped > self._drops_noted:
            self._by_kernel.add(dropped - self._drops_noted)
            self._drops_noted = dropped
        for what, notice in self._notices.items():
            said = notice.due()
            if said is not None:
                logger.warning("%s %s", what, said)

    def kernel_dropped(self) -> int | None:
        """Datagrams that the kernel dropped for want of buffer, by the sockets' own account; None where it has none."""
        if sys.platform != "linux":
            return None
        with self._drops_lock:
            for fd, sock in self._sockets.items():
                try:
                    meminfo = sock.getsockopt(socket.SOL_SOCKET, _SO_MEMINFO, 36)
                except OSError:
                    continue  # closed: what was counted last stays
                drops = struct.unpack("=9I", meminfo)[_MEMINFO_DROPS]
                self._drops += (drops - self._drops_seen[fd]) & 0xFFFFFFFF  # a u32 that wraps around
                self._drops_seen[fd] = drops
            return self._drops

    def stop(self) -> None:
        """Make `run` take what waits and return; from any thread, twice is harmless."""
        self._stopping = True
        self._turn.ring()

    def close(self) -> None:
        """Close the sockets; only after `run` has returned."""
        self.kernel_dropped()
        self.abandon()

    def abandon(self) -> None:
        """Close the descriptors and nothing else, in a forked child."""
        for sock in self._sockets.values():
            sock.close()


def _who(batch: Batch, number: int) -> str:
    """The engine and the source of a state of a batch."""
    return f"engine_id={unquote_json(batch.states[number][0])!r} source={unquote_json(batch.sources[number])}"
