"""Waiting for a while, or until another thread says that it is over.

Not threading.Event: if the C library has no sem_clockwait (glibc before 2.30), its timeouts go by the wall clock,
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
        """What is readable once it is set, for one who waits for other things too, and then calls `clear`."""
        return self._reader

    def clear(self) -> None:
        """Forget that it was set, so that the next `wait` waits."""
        with contextlib.suppress(BlockingIOError):
            os.read(self._reader, 4096)

    def wait(self, timeout_s: float) -> bool:
        """Wait until it is set, and clear it; False after `timeout_s`, in whole milliseconds and at least one."""
        is_set = bool(self._poll.poll(max(1, timeout_s * 1000)))
        if is_set:
            self.clear()
        return is_set

    def set(self) -> None:
        """End the waiting, or the next one if nobody waits; from any thread, and from a signal handler."""
        with contextlib.suppress(BlockingIOError):  # it has been set so often that the pipe is full
            os.write(self._writer, b"x")
