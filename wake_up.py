"""Waiting for a while, or until another thread says that it is over.

Not threading.Event: where the C library has no sem_clockwait (glibc before 2.30), its timeouts go by the wall clock,
and on a host whose clock is set an hour back every thread of the gateway would be asleep for an hour.
"""

from __future__ import annotations

import contextlib
import os
import select


class WakeUp:
    """One thread waits; any other may end that, even before it begins. Its descriptors are closed with it."""

    _descriptors: tuple[int, ...] = ()

    def __init__(self) -> None:
        self._descriptors = self._reader, self._writer = os.pipe()
        for descriptor in self._descriptors:
            os.set_blocking(descriptor, False)
        self._poll = select.poll()
        self._poll.register(self._reader, select.POLLIN)

    def __del__(self) -> None:
        for descriptor in self._descriptors:
            os.close(descriptor)

    def fileno(self) -> int:
        """What is readable once it has been rung, for one who waits for other things too, and then calls `take`."""
        return self._reader

    def take(self) -> None:
        """Take the rings that there are, so that they end no further waiting."""
        with contextlib.suppress(BlockingIOError):
            os.read(self._reader, 4096)

    def wait(self, timeout_s: float) -> bool:
        """Wait for so long, in whole milliseconds and at least one; returns whether `ring` ended it."""
        rung = bool(self._poll.poll(max(1, timeout_s * 1000)))
        if rung:
            self.take()
        return rung

    def ring(self) -> None:
        """End the waiting, or the next one where nobody waits; from any thread, and from a signal handler."""
        with contextlib.suppress(BlockingIOError):  # it has been rung so often that the pipe is full
            os.write(self._writer, b"x")
