"""Whether the table has room for one engine more: by MAX_ENGINES, and by the process' limit of memory (`ulimit -v`).

A Python that has no memory left may spin for ever while it makes the very exception that says so, deaf and with the
interpreter's lock held. So the table stops growing before that: the engines that are known go on, new ones are
rejected, and the answers about them still find the memory that they take.
"""

from __future__ import annotations

import contextlib
import os
from collections.abc import Callable

try:
    import ctypes
except ImportError:  # a Python that was built without it
    ctypes = None  # type: ignore[assignment]

try:
    import resource
except ImportError:  # no POSIX system
    resource = None  # type: ignore[assignment]

MAX_HISTORY_BYTES = 128 * 1024 * 1024  # of all engines: enough for 10,000 usual ones with 100 states each
RESERVE_BYTES = 16 * 1024 * 1024  # for what does not grow with the table
ANSWERS = 2  # answers about the whole table take so many times what the table takes
_M_ARENA_MAX = -8  # of glibc's malloc.h
CHECK_EVERY = 256  # engines; asking the system takes about ten microseconds


def limit_bytes() -> int | None:
    """The limit of this process' address space; None if there is none."""
    if resource is None:
        return None
    limit = resource.getrlimit(resource.RLIMIT_AS)[0]
    return None if limit == resource.RLIM_INFINITY else limit


def share_one_arena() -> None:
    """With a limit, have all threads allocate from one place: glibc reserves 64 MB of address space for each further
    one, of which the table would have nothing. To be called before there are threads.
    """
    if limit_bytes() is not None:
        with contextlib.suppress(OSError, AttributeError, TypeError):  # no glibc, or no ctypes
            ctypes.CDLL(None).mallopt(_M_ARENA_MAX, 1)


if ctypes is not None:

    class _MallocInfo(ctypes.Structure):
        """glibc's `struct mallinfo2`."""

        _fields_ = tuple((name, ctypes.c_size_t) for name in (
            "arena", "ordblks", "smblks", "hblks", "hblkhd", "usmblks", "fsmblks", "uordblks", "fordblks", "keepcost",
        ))  # fmt: skip


def _find_mallinfo() -> Callable[[], _MallocInfo] | None:
    try:
        mallinfo = ctypes.CDLL(None).mallinfo2
    except (OSError, AttributeError, TypeError):  # no glibc, or one before 2.33, or no ctypes
        return None
    mallinfo.restype = _MallocInfo
    return mallinfo


_mallinfo = _find_mallinfo()


def _used_bytes() -> int:
    """The process' address space, without what its heap has free: a log that waited for its disk leaves megabytes."""
    with open("/proc/self/statm", "rb") as file:
        size = int(file.read().split()[0]) * os.sysconf("SC_PAGE_SIZE")
    return size if _mallinfo is None else size - int(_mallinfo().fordblks)


class TableRoom:
    """Asked before an engine is added. Not locked: it belongs to the store, and is used under its lock."""

    def __init__(
        self,
        max_engines: int,
        *,
        limit_bytes: Callable[[], int | None] = limit_bytes,
        used_bytes: Callable[[], int] = _used_bytes,
    ) -> None:
        """`limit_bytes` is the limit of the process' address space, None if there is none; `used_bytes` what it has,
        and raises OSError if the system does not say it.
        """
        self.max_history_bytes = MAX_HISTORY_BYTES  # less once the first engine came, if memory is short
        self._max_engines = max_engines
        self._limit_bytes = limit_bytes()
        self._used_bytes = used_bytes
        self._full_at_bytes: int | None = None  # from here on there is no room; None until the first engine
        self._has_memory = True
        self._unchecked = 0  # questions until the system is asked again
        self._most_engines = 0  # that ever had room

    def for_one_more(self, engines: int) -> bool:
        """Whether an engine may be added to so many."""
        if engines >= self._max_engines:
            return False
        # What engines leave when they are removed is used again, but is seldom given back to the system.
        if self._limit_bytes is None or engines < self._most_engines:
            return True
        if self._unchecked:
            self._unchecked -= 1
        else:
            self._unchecked = CHECK_EVERY - 1
            self._has_memory = self._look(self._limit_bytes)
        if self._has_memory:
            self._most_engines = engines + 1
        return self._has_memory

    def _look(self, limit_bytes: int) -> bool:
        try:
            used = self._used_bytes()
        except (OSError, ValueError):
            return True  # nobody can say
        if self._full_at_bytes is None:
            free = max(0, limit_bytes - used)
            room = max((free - RESERVE_BYTES) // (1 + ANSWERS), free // 4)  # a quarter if that is little
            self._full_at_bytes = used + room
            self.max_history_bytes = min(MAX_HISTORY_BYTES, room // 2)
        return used < self._full_at_bytes
