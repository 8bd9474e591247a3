"""Waiting for a while, or until another thread says that it is over.

Not threading.Event: if the C library has no sem_clockwait (glibc before 2.30), its timeouts go by the wall clock,
and on a host whose clock is set an hour back every thread of the gateway would be asleep for an hour.
"""

from __future__ import annotations

import contextlib
import os
import select


class _Pipe:
    """Two descriptors, which are closed when nobody uses them any more."""

    _descriptors: tuple[int, ...] = ()

    def __init__(self) -> None:
        self._descriptors = self.reader, self.writer = os.pipe()
        for descriptor in self._descriptors:
            os.set_blocking(descriptor, False)
        self.poll = select.poll()
        self.poll.register(self.reader, select.POLLIN)

    def __del__(self) -> None:
        for descriptor in self._descriptors:
            os.close(descriptor)


class WakeUp:
    """One thread waits; any other may end that, even before it begins."""

    def __init__(self) -> None:
        self._pipe: _Pipe | None = _Pipe()

    def fileno(self) -> int:
        """What is readable once it is set, for one who waits for other things too, and then calls `clear`."""
        assert self._pipe is not None
        return self._pipe.reader

    def clear(self) -> None:
        """Forget that it was set, so that the next `wait` waits."""
        pipe = self._pipe
        if pipe is not None:
            with contextlib.suppress(BlockingIOError):
                os.read(pipe.reader, 4096)

    def wait(self, timeout_s: float) -> bool:
        """Wait until it is set, and clear it; False after `timeout_s`, in whole milliseconds and at least one."""
        pipe = self._pipe
        is_set = pipe is not None and bool(pipe.poll.poll(max(1, timeout_s * 1000)))
        if is_set:
            self.clear()
        return is_set

    def set(self) -> None:
        """End the waiting, or the next one if nobody waits; from any thread, and from a signal handler."""
        pipe = self._pipe
        if pipe is not None:
            with contextlib.suppress(BlockingIOError):  # it has been set so often that the pipe is full
                os.write(pipe.writer, b"x")

    def close(self) -> None:
        """Nobody waits any more; from any thread, twice is harmless.

        Whoever is using the pipe at this moment keeps it open for so long, so that no number of a descriptor is used
        that belongs to something else by then.
        """
        self._pipe = None
