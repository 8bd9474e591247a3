"""Where the state log's lines go: a file of its own (locked, rotated, followed), or a standard stream.

A file is locked with `flock` for as long as it is written, so that two gateways never write to one log. Others wait for
that lock while it changes hands, hence these rules:

- Whoever gets the lock looks whether the path still leads to the file that is now locked. If not, the file was rotated
  away meanwhile: close it, and begin again with the new one.
- A rotation makes the new file under another name, locks it, gives the old file its number as a second name, and only
  then renames the new file to the log's name. At no moment is there a file of that name that nobody has locked.
- The lock is never given up by itself: it ends when the last descriptor of the file is closed. A forked child closes
  its copy, and the parent still has the lock.

A standard stream belongs to somebody else: it is written through a copy of its descriptor, and nothing of it is
changed. Its flags are shared with other processes, so that it is not made non-blocking. Instead each write is one that
cannot block: at most PIPE_BUF bytes, after a poll that found room. A write of that size is never torn either, so that
whole lines stay whole if the daemon's own log goes to the same pipe. Of a terminal a poll does not say how much room it
has, so that it gets a non-blocking descriptor of its own, if this user may open it.
"""

from __future__ import annotations

import contextlib
import errno
import logging
import os
import re
import select
import socket
import stat
import sys
import time
from collections.abc import Callable, Sequence
from typing import Protocol

try:
    import fcntl
except ImportError:  # not a Unix
    fcntl = None  # type: ignore[assignment]

logger = logging.getLogger("elrar.log")

ROTATE_RETRY_S = 60.0
LOCK_RETRY_S = 0.05
WRITE_BYTES = 1024 * 1024  # at most in one system call, so that a slow disk is seen to move
_STANDARD_STREAMS = {"/dev/stdout": 1, "/dev/stderr": 2, "/dev/fd/1": 1, "/dev/fd/2": 2}
_DESCRIPTOR_OF_PROCESS = re.compile("/proc/(self|thread-self|[0-9]+)/fd/([12])")
_NO_PLACES = ("/dev/fd/", "/proc/")  # names that are no places in a folder
_NO_LOCKS = {errno.ENOLCK, errno.ENOSYS, errno.EINVAL, errno.ENOTSUP, errno.EOPNOTSUPP}
_MAX_LINKS = 16  # symbolic links that are followed to see whether they end at a standard stream
_NEW = ".new"  # what a rotation calls the next file until it is locked


class LogInUse(OSError):
    """The log file is locked by another process that writes to it."""


class LogTarget(Protocol):
    """Where lines go. For the log's writer thread; `close` in a forked child too. All raise OSError."""

    max_write_bytes: int  # in one write
    rotations: int
    errors: int  # rotations that failed

    @property
    def name(self) -> str:
        """What it is called in messages: a path."""

    def open(self, lock_timeout_s: float) -> None:
        """Open it; waits for another process's lock for so long, and then raises LogInUse."""

    def follow(self, *, reopen: bool) -> bool:
        """Open the file anew if it was moved, removed or replaced, or if `reopen`; returns whether it is another."""

    def room(self) -> int | None:
        """Bytes until the file has to be rotated, or None if it never is."""

    def rotate(self) -> bool:
        """Go on with an empty file; False if it is empty, or if that failed, which is logged."""

    def write(self, pieces: Sequence[memoryview | bytes]) -> int:
        """Write at most `max_write_bytes`; returns how much was written. BlockingIOError if nobody reads the pipe."""

    def wait_for_room(self, timeout_s: float) -> bool:
        """Wait until a reader has made room; False after `timeout_s`."""

    def take_back(self, size: int) -> bool:
        """Cut the last `size` bytes off again; False if that cannot be done."""

    def close(self) -> None:
        """Close the descriptor and do nothing else; twice is harmless."""


def make_log_target(path: str, max_bytes: int, backups: int, *, clock: Callable[[], float]) -> LogTarget:
    """The target for a LOG_FILE, not open yet."""
    fd = standard_stream(path)
    return StandardStream(fd) if fd is not None else LogFile(path, max_bytes, backups, clock=clock)


def standard_stream(path: str) -> int | None:
    """1 or 2 if a LOG_FILE means standard output or standard error, also through symbolic links; else None."""
    if path == "-":
        return 1
    ours = ("self", "thread-self", str(os.getpid()))
    for _ in range(_MAX_LINKS):
        path = os.path.normpath(path).replace("//", "/")
        if path in _STANDARD_STREAMS:
            return _STANDARD_STREAMS[path]
        match = _DESCRIPTOR_OF_PROCESS.fullmatch(path)
        if match and match[1] in ours:
            return int(match[2])
        try:
            path = os.path.join(os.path.dirname(path), os.readlink(path))
        except OSError:
            return None
    return None


class LogFile:
    """A file (or a FIFO) at a path: locked, rotated by size, and followed when it is moved. See LogTarget."""

    max_write_bytes = WRITE_BYTES

    def __init__(self, path: str, max_bytes: int, backups: int, *, clock: Callable[[], float] = time.monotonic) -> None:
        self.name = path
        self._max_bytes = max_bytes
        self._backups = backups
        self._clock = clock
        self._fd = -1
        self._is_regular = False
        self._no_locks_logged = False
        self._removal_failed = False
        self._rotate_at = clock()  # not before
        self.rotations = 0
        self.errors = 0

    def open(self, lock_timeout_s: float) -> None:
        """See LogTarget."""
        give_up_at = time.monotonic() + lock_timeout_s
        while True:
            try:
                self._open()
                break
            except LogInUse:
                if time.monotonic() >= give_up_at:
                    raise
                time.sleep(LOCK_RETRY_S)
        if self._rotates():
            self._undo_rotation(self._real_path())  # that a crash ended half-way
            self._remove_surplus()

    def follow(self, *, reopen: bool) -> bool:
        """See LogTarget."""
        if self._fd >= 0 and not reopen and _is_same_file(self.name, self._fd):
            return False
        return self._open()

    def room(self) -> int | None:
        """See LogTarget."""
        if not self._rotates():
            return None
        return max(0, self._max_bytes - os.fstat(self._fd).st_size)

    def rotate(self) -> bool:
        """See LogTarget."""
        if self._clock() < self._rotate_at or not os.fstat(self._fd).st_size:
            return False
        try:
            self._rotate()
        except OSError as error:
            self.errors += 1
            self._rotate_at = self._clock() + ROTATE_RETRY_S
            logger.error("cannot rotate the state log, it goes on growing file=%s error=%s", self.name, error)
            return False
        return True

    def write(self, pieces: Sequence[memoryview | bytes]) -> int:
        """See LogTarget."""
        return os.writev(self._fd, pieces)

    def wait_for_room(self, timeout_s: float) -> bool:
        """See LogTarget."""
        return _wait_for_room(self._fd, timeout_s)

    def take_back(self, size: int) -> bool:
        """See LogTarget."""
        try:
            os.ftruncate(self._fd, os.fstat(self._fd).st_size - size)
        except OSError:
            return False  # a FIFO
        return True

    def close(self) -> None:
        """See LogTarget."""
        if self._fd >= 0:
            os.close(self._fd)
            self._fd = -1

    def _rotates(self) -> bool:
        return bool(self._max_bytes) and self._is_regular and not self.name.startswith(_NO_PLACES)

    def _real_path(self) -> str:
        return os.path.realpath(self.name)  # a symbolic link stays, and what it leads to is rotated where it is

    def _open(self) -> bool:
        """Open the file and lock it; False if the one that is open is still the one that the path leads to."""
        folder = os.path.dirname(self.name)
        if folder:
            os.makedirs(folder, exist_ok=True)
        fd, is_regular = _open_for_append(self.name)
        try:
            if self._fd >= 0 and os.path.sameopenfile(fd, self._fd):
                os.close(fd)
                return False
            if is_regular:
                self._lock(fd)
                if not _is_same_file(self.name, fd):
                    raise LogInUse(errno.EAGAIN, "another process is rotating it", self.name)
                _close_off_torn_line(fd)
        except OSError:
            os.close(fd)
            raise
        self._replace(fd, is_regular)
        return True

    def _replace(self, fd: int, is_regular: bool) -> None:
        self.close()
        self._fd = fd
        self._is_regular = is_regular

    def _lock(self, fd: int) -> None:
        if fcntl is None:
            return
        try:
            fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise LogInUse(errno.EAGAIN, "another process has locked it, perhaps another gateway", self.name) from None
        except OSError as error:
            if error.errno not in _NO_LOCKS:
                raise
            if not self._no_locks_logged:
                self._no_locks_logged = True
                logger.warning(
                    "this file system has no locks: a second gateway that writes to the same state log would not be"
                    " noticed file=%s error=%s",
                    self.name,
                    error,
                )

    def _rotate(self) -> None:
        if not _is_same_file(self.name, self._fd):
            self._open()  # somebody else moved it just now
            return
        path = self._real_path()
        new = path + _NEW
        with contextlib.suppress(FileNotFoundError):
            os.unlink(new)
        fd = os.open(new, os.O_RDWR | os.O_APPEND | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o644)
        try:
            self._lock(fd)
            for number in sorted(_rotated_files(path), reverse=True):
                if number < self._backups:
                    with contextlib.suppress(FileNotFoundError):
                        os.replace(f"{path}.{number}", f"{path}.{number + 1}")
            if self._backups:
                _name_too(path, f"{path}.1")
            os.replace(new, path)
        except BaseException:
            os.close(fd)
            self._undo_rotation(path)
            raise
        self._replace(fd, is_regular=True)
        self.rotations += 1
        self._remove_surplus()

    def _undo_rotation(self, path: str) -> None:
        """Remove the next file that never came to be the log, and the second name of the one that still is."""
        with contextlib.suppress(OSError):
            os.unlink(path + _NEW)
        with contextlib.suppress(OSError):
            if _is_same_file(f"{path}.1", self._fd):
                os.unlink(f"{path}.1")

    def _remove_surplus(self) -> None:
        """Remove the rotated files that are more than LOG_BACKUPS, which was larger once."""
        path = self._real_path()
        try:
            for number in _rotated_files(path):
                if number > self._backups and not _is_folder(f"{path}.{number}"):
                    with contextlib.suppress(FileNotFoundError):
                        os.unlink(f"{path}.{number}")
        except OSError as error:
            if not self._removal_failed:
                logger.error(
                    "cannot remove rotated files of the state log beyond LOG_BACKUPS=%d: remove them by hand, or let"
                    " this user write to the folder error=%s",
                    self._backups,
                    error,
                )
            self._removal_failed = True
        else:
            self._removal_failed = False


class StandardStream:
    """Standard output or standard error, whatever it is: a pipe, a socket, a terminal, a file. See LogTarget."""

    rotations = 0
    errors = 0

    def __init__(self, number: int) -> None:
        self.name = "/dev/stdout" if number == 1 else "/dev/stderr"
        self.max_write_bytes = select.PIPE_BUF
        self._number = number
        self._fd = -1
        self._is_regular = False
        self._socket: socket.socket | None = None

    def open(self, lock_timeout_s: float) -> None:
        """See LogTarget; there is no lock."""
        if {1: sys.__stdout__, 2: sys.__stderr__}.get(self._number, sys) is None:
            # The number is /dev/null's by now, or something else's, and all that is written would be lost uncounted.
            raise OSError(errno.EBADF, "it was closed when this process was started", self.name)
        self._fd = os.dup(self._number)
        if os.isatty(self._fd):
            with contextlib.suppress(OSError):
                own = os.open(f"/dev/fd/{self._fd}", os.O_WRONLY | os.O_NONBLOCK | os.O_NOCTTY | os.O_CLOEXEC)
                os.close(self._fd)
                self._fd = own
        mode = os.fstat(self._fd).st_mode
        if stat.S_ISREG(mode):
            self._is_regular = True
            self.max_write_bytes = WRITE_BYTES
        elif stat.S_ISSOCK(mode):
            self._socket = socket.socket(fileno=self._fd)

    def follow(self, *, reopen: bool) -> bool:
        """See LogTarget: there is nothing to follow."""
        return False

    def room(self) -> int | None:
        """See LogTarget: it is never rotated."""
        return None

    def rotate(self) -> bool:
        """See LogTarget: it is never rotated."""
        return False

    def write(self, pieces: Sequence[memoryview | bytes]) -> int:
        """See LogTarget."""
        if self._socket is not None:
            return self._socket.sendmsg(pieces, (), socket.MSG_DONTWAIT)
        if not self._is_regular and not _wait_for_room(self._fd, 0):
            raise BlockingIOError(errno.EAGAIN, "its reader does not read", self.name)
        return os.writev(self._fd, pieces)

    def wait_for_room(self, timeout_s: float) -> bool:
        """See LogTarget."""
        return _wait_for_room(self._fd, timeout_s)

    def take_back(self, size: int) -> bool:
        """See LogTarget: others may have written behind it."""
        return False

    def close(self) -> None:
        """See LogTarget."""
        fd, self._fd = self._fd, -1
        if self._socket is not None:
            self._socket.close()
        elif fd >= 0:
            os.close(fd)


def _wait_for_room(fd: int, timeout_s: float) -> bool:
    poll = select.poll()  # not select.select, which takes no descriptor above 1023
    poll.register(fd, select.POLLOUT)
    return bool(poll.poll(timeout_s * 1000))


def _is_same_file(path: str, fd: int) -> bool:
    try:
        there, ours = os.stat(path), os.fstat(fd)
    except (FileNotFoundError, NotADirectoryError):
        return False
    return (there.st_dev, there.st_ino) == (ours.st_dev, ours.st_ino)


def _rotated_files(path: str) -> list[int]:
    """The numbers of the files that the log at `path` was rotated to."""
    folder, name = os.path.split(path)
    rotated = re.compile(re.escape(name) + r"\.([1-9][0-9]{0,3})")
    return [int(match[1]) for match in map(rotated.fullmatch, os.listdir(folder)) if match]


def _is_folder(path: str) -> bool:
    return os.path.isdir(path) and not os.path.islink(path)


def _name_too(path: str, name: str) -> None:
    """Give a file another name that it has besides, or instead if the file system (or its owner) allows no links."""
    with contextlib.suppress(FileNotFoundError):
        os.unlink(name)
    try:
        os.link(path, name)
    except OSError:
        os.replace(path, name)


def _open_for_append(path: str) -> tuple[int, bool]:
    """Open a log file; returns its descriptor and whether it is a regular file; raises OSError."""
    flags = os.O_APPEND | os.O_CREAT | os.O_CLOEXEC | os.O_NONBLOCK  # nobody reads a FIFO: an error, no waiting
    try:
        regular = stat.S_ISREG(os.stat(path).st_mode)
    except FileNotFoundError:
        regular = True
    try:
        fd = os.open(path, flags | (os.O_RDWR if regular else os.O_WRONLY), 0o644)
    except PermissionError:
        if not regular:
            raise
        fd = os.open(path, flags | os.O_WRONLY, 0o644)  # may be written but not read
    return fd, stat.S_ISREG(os.fstat(fd).st_mode)


def _close_off_torn_line(fd: int) -> None:
    """End a last line that a crash tore, so that it spoils no other."""
    size = os.fstat(fd).st_size
    try:
        torn = size > 0 and os.pread(fd, 1, size - 1) != b"\n"
    except OSError as error:
        if error.errno != errno.EBADF:  # opened for writing only: nobody can tell
            raise
        return
    if torn:
        os.write(fd, b"\n")
