"""The state log: one JSON object a line, written in batches by a thread of its own.

The listener appends to a bounded buffer and never waits for the disk. This is the one place where the disk may fail:
lines wait while it does, those that find no room are dropped and counted, and it is tried again.
"""

from __future__ import annotations

import contextlib
import errno
import itertools
import json
import logging
import os
import select
import stat
import threading
import time
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from daemon_log import OncePerMinute
from wake_up import WakeUp

logger = logging.getLogger("elrar.log")

BUFFER_BYTES = 32 * 1024 * 1024  # 20 s of 5,000 states/s
FLUSH_INTERVAL_S = 0.03  # what a `kill -9` can lose; ten times as often takes no measurable CPU
FLUSH_BYTES = 256 * 1024  # or as soon as so much waits, for as long as it is in the processor's cache
PIPE_PATIENCE_S = 0.5  # for the reader of a pipe to make room, before it counts as trouble
RETRY_INTERVAL_S = 1.0
ROTATE_RETRY_S = 60.0
NEVER_ROTATED = ("/dev/stdout", "/dev/stderr", "/dev/fd/", "/proc/")  # names that are no places in a folder
WRITE_BYTES = 1024 * 1024  # at most in one system call, so that a slow disk is seen to move
WRITE_PIECES = 1000  # the same; systems take 1024
_OVERHEAD = 160  # bytes of memory of what is appended at once, besides its text


@dataclass(frozen=True)
class LogCounters:
    """What became of the states that were to be logged, and of the file."""

    written: int = 0  # states
    dropped: int = 0  # states that found no room in the buffer, or that were given up at stop
    errors: int = 0  # attempts to write or open that failed
    rotations: int = 0


@dataclass(slots=True)
class _Lines:
    """Whole lines on their way to the file; `offset` is how far they are written."""

    data: bytes
    states: int  # how many lines; 0 for the one line of an event
    offset: int = 0

    @property
    def memory(self) -> int:
        """Bytes of memory that they take while they wait."""
        return len(self.data) + _OVERHEAD if self.states else 0  # an event's one line is not in the account


class StateLog:
    """A JSONL file that is rotated by size, followed when it is moved, and retried when it cannot be written.

    `append` may be called from any thread and never waits for the disk; `reopen` even from a signal handler. `open`
    comes first, then `run` has a thread, then `stop` and `close`. `step` belongs to that thread.
    """

    def __init__(
        self,
        path: str,
        max_bytes: int,
        backups: int,
        *,
        buffer_bytes: int = BUFFER_BYTES,
        clock: Callable[[], float] = time.monotonic,
        wall_clock: Callable[[], float] = time.time,
    ) -> None:
        self._path = path
        self._max_bytes = max_bytes
        self._backups = backups
        self._buffer_bytes = buffer_bytes
        self._clock = clock
        self._wall_clock = wall_clock
        # Guards the six below: appended to by the listener, swapped out whole by the writer.
        self._lock = threading.Lock()
        self._waiting: list[_Lines] = []
        self._waiting_bytes = 0
        self._buffered_bytes = 0  # appended and not yet written, `_unwritten` included
        self._appended = 0  # states
        self._dropped = 0
        self._closed = False
        self._stopping = False
        self._turn = WakeUp()  # the writer's
        self._reopen_asked = False
        # All below is the writer's own.
        self._fd = -1
        self._unwritten: deque[_Lines] = deque()
        self._written = 0
        self._errors = 0
        self._rotations = 0
        self._failing = False
        self._said_failing = False
        self._trouble = OncePerMinute(clock)
        self._retry_at = self._rotate_at = clock()  # not before
        self.moved_at = clock()  # monotonic

    @property
    def path(self) -> str:
        """The path as it was set."""
        return self._path

    def open(self, event: str, message: str, **fields: object) -> None:
        """Open the file and write its first line; raises OSError where that cannot be done."""
        self._open_file()
        try:
            self._unwritten.append(self._event(event, message, fields))
            self._write_unwritten()
        except BaseException:
            self._unfinished_line_back_out()
            self._close_file()
            raise

    def append(self, received_s: float, states: Sequence[bytes], sources: Sequence[bytes]) -> None:
        """Buffer the lines of states that were received at `received_s` (s since the epoch).

        Each is the JSON object of a state, and its source as JSON text. A usual datagram is in its line as it was sent,
        which takes a tenth of writing it anew.
        """
        if not states:
            return
        begin = b'{"timestamp": %b, "state": ' % repr(received_s).encode()
        pieces = [b"}\n" + begin, b"", b', "source": ', b""] * len(states)
        pieces[0] = begin
        pieces[1::4] = states
        pieces[3::4] = sources
        pieces.append(b"}\n")
        self._buffer(_Lines(b"".join(pieces), len(states)))

    def _buffer(self, lines: _Lines) -> None:
        with self._lock:
            if self._closed or self._buffered_bytes + lines.memory > self._buffer_bytes:
                self._dropped += lines.states
                return
            self._buffered_bytes += lines.memory
            self._appended += lines.states
            self._waiting.append(lines)
            due = self._waiting_bytes < FLUSH_BYTES <= self._waiting_bytes + len(lines.data)
            self._waiting_bytes += len(lines.data)
        if due:
            self._turn.ring()

    def _event(self, event: str, message: str, fields: dict[str, object]) -> _Lines:
        document = {"timestamp": self._wall_clock(), "event": event, "message": message, **fields}
        return _Lines(json.dumps(document, ensure_ascii=False).encode("utf-8", "replace") + b"\n", 0)

    def reopen(self) -> None:
        """Have the file opened anew at the next step, as after SIGHUP."""
        self._reopen_asked = True

    def counters(self) -> LogCounters:
        """The counters; each is true, but they are not of one moment."""
        return LogCounters(self._written, self._dropped, self._errors, self._rotations)

    def run(self) -> None:
        """Write what waits, every FLUSH_INTERVAL_S or FLUSH_BYTES, until `stop` is called; then once more."""
        while not self._stopping:
            self.step()
            self._turn.wait(FLUSH_INTERVAL_S)
        self._retry_at = self._clock()
        self.step()

    def stop(self) -> None:
        """Make `run` write what waits and return; from any thread, twice is harmless."""
        self._stopping = True
        self._turn.ring()

    def close(self, event: str, message: str, **fields: object) -> int:
        """Write the last line and close the file; returns how many states had to be given up.

        Only after `run` has returned.
        """
        given_up = self.give_up()
        if not given_up:
            self._unwritten.append(self._event(event, message, {**fields, "log_written": self._written}))
            try:
                self._write_unwritten()
            except OSError as error:
                self._unfinished_line_back_out()
                logger.error("the last line of the state log was not written error=%s", error)
        self._close_file()
        return given_up

    def give_up(self) -> int:
        """Count all that is not written yet as dropped; returns how many states. From any thread, at stop."""
        with self._lock:
            given_up = self._appended - self._written
            self._dropped += given_up
            self._closed = True  # what is appended from now on is dropped, and counted so
        return given_up

    def abandon(self) -> None:
        """Close the file and nothing else, in a forked child."""
        self._close_file()

    def step(self) -> None:
        """One round: see whether the file is still there, and write all that waits."""
        self.moved_at = self._clock()
        self._take_waiting()
        if self._clock() < self._retry_at:
            return
        try:
            self._follow_file()
            self._write_unwritten()
        except OSError as error:
            self._failed(error)
        else:
            self._failing = False
            if self._said_failing:
                self._said_failing = False
                logger.warning("writing the state log again file=%s dropped=%d", self._path, self._dropped)

    def _failed(self, error: OSError) -> None:
        self._errors += 1
        self._retry_at = self._clock() + RETRY_INTERVAL_S
        self._unfinished_line_back_out()
        if not self._failing:
            self._failing = True
            if self._trouble.add():
                self._trouble.example(str(error))
        said = None if self._said_failing else self._trouble.due()
        if said is not None:
            self._said_failing = True
            logger.error(
                "cannot write the state log, states are still taken file=%s %s; lines wait in a buffer of %d MiB, what"
                " does not fit is dropped and counted; it is tried again every second",
                self._path,
                said,
                self._buffer_bytes >> 20,
            )

    def _take_waiting(self) -> None:
        with self._lock:
            waiting, self._waiting = self._waiting, []
            self._waiting_bytes = 0
        self._unwritten.extend(waiting)

    def _write_unwritten(self) -> None:
        while self._unwritten:
            pieces = self._next_pieces()  # which may rotate, and so change the descriptor
            try:
                wrote = os.writev(self._fd, pieces)
            except BlockingIOError:  # a pipe is full
                if not select.select([], [self._fd], [], 0 if self._stopping else PIPE_PATIENCE_S)[1]:
                    raise
                continue
            self._note_written(wrote)
            self.moved_at = self._clock()

    def _next_pieces(self) -> list[memoryview | bytes]:
        """What is written next, in one system call: up to WRITE_BYTES, and not more than has room in the file."""
        first = self._unwritten[0]
        end = min(len(first.data), first.offset + WRITE_BYTES)
        room = WRITE_BYTES
        if self._rotates():
            end = self._end_in_this_file(first, end)
            room = min(room, self._max_bytes - os.fstat(self._fd).st_size)
        pieces: list[memoryview | bytes] = [memoryview(first.data)[first.offset : end]]
        room -= end - first.offset
        if end == len(first.data):
            for lines in itertools.islice(self._unwritten, 1, WRITE_PIECES):
                room -= len(lines.data)
                if room < 0:
                    break
                pieces.append(lines.data)
        return pieces

    def _note_written(self, wrote: int) -> None:
        """Go on after so many bytes, counting the states whose lines are whole in the file by now."""
        finished = 0
        while wrote:
            lines = self._unwritten[0]
            begun, size = lines.offset, len(lines.data)
            lines.offset = min(size, begun + wrote)
            wrote -= lines.offset - begun
            if lines.offset - begun == size:
                self._written += lines.states  # counting its lines takes a tenth of a microsecond each
            elif lines.states:
                self._written += lines.data.count(b"\n", begun, lines.offset)
            if lines.offset == size:
                self._unwritten.popleft()
                finished += lines.memory
        with self._lock:
            self._buffered_bytes -= finished

    def _rotates(self) -> bool:
        return (
            bool(self._max_bytes)
            and stat.S_ISREG(os.fstat(self._fd).st_mode)
            and not self._path.startswith(NEVER_ROTATED)
        )

    def _end_in_this_file(self, lines: _Lines, end: int) -> int:
        """Rotate where not even one more line has room in the file; returns up to where there is room."""
        if lines.offset and lines.data[lines.offset - 1] != 0x0A:
            return lines.data.index(b"\n", lines.offset) + 1  # the rest of a line that was begun here
        room = self._max_bytes - os.fstat(self._fd).st_size
        if len(lines.data) - lines.offset <= room or end - lines.offset <= room:
            return end
        last_line_end = lines.data.rfind(b"\n", lines.offset, lines.offset + max(0, room)) + 1
        if last_line_end > lines.offset:
            return last_line_end
        if self._clock() < self._rotate_at:
            return end  # it could not be rotated: better a file that is too large than lines that are lost
        if room < self._max_bytes:
            self._rotate()
            return self._end_in_this_file(lines, end)
        return lines.data.index(b"\n", lines.offset) + 1  # a line that is larger than a file may be

    def _rotate(self) -> None:
        path = os.path.realpath(self._path)  # a symbolic link stays, and what it leads to is rotated where it is
        try:
            for number in range(self._backups - 1, 0, -1):
                with contextlib.suppress(FileNotFoundError):
                    os.replace(f"{path}.{number}", f"{path}.{number + 1}")
            if self._backups:
                os.replace(path, f"{path}.1")
            else:
                os.unlink(path)
            self._open_file()
        except OSError as error:
            self._errors += 1
            self._rotate_at = self._clock() + ROTATE_RETRY_S
            logger.error("cannot rotate the state log, it goes on growing file=%s error=%s", self._path, error)
        else:
            self._rotations += 1

    def _follow_file(self) -> None:
        """Open the file anew where it was moved, removed or replaced, or where that was asked for."""
        if self._fd >= 0 and not self._reopen_asked:
            try:
                there, ours = os.stat(self._path), os.fstat(self._fd)
            except (FileNotFoundError, NotADirectoryError):
                pass
            else:
                if (there.st_dev, there.st_ino) == (ours.st_dev, ours.st_ino):
                    return
        self._open_file()
        self._reopen_asked = False
        if self._unwritten:
            self._to_line_start(self._unwritten[0])

    def _open_file(self) -> None:
        folder = os.path.dirname(self._path)
        if folder:
            os.makedirs(folder, exist_ok=True)
        fd = _open_for_append(self._path)
        self._close_file()
        self._fd = fd

    def _close_file(self) -> None:
        if self._fd >= 0:
            os.close(self._fd)
            self._fd = -1

    def _unfinished_line_back_out(self) -> None:
        """Take the beginning of a line that could not be finished back out of the file, so that every line is whole."""
        if not self._unwritten or self._fd < 0:
            return
        lines = self._unwritten[0]
        begun = lines.offset - (lines.data.rfind(b"\n", 0, lines.offset) + 1)
        if not begun:
            return
        try:
            os.ftruncate(self._fd, os.fstat(self._fd).st_size - begun)
        except OSError:
            return  # a pipe: the rest of the line follows when it can
        self._to_line_start(lines)

    def _to_line_start(self, lines: _Lines) -> None:
        lines.offset = lines.data.rfind(b"\n", 0, lines.offset) + 1


def _open_for_append(path: str) -> int:
    """Open a log file, close off a last line that a crash tore, and return its descriptor; raises OSError."""
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
    try:
        if regular:
            _close_off_torn_line(fd)
    except OSError:
        os.close(fd)
        raise
    return fd


def _close_off_torn_line(fd: int) -> None:
    size = os.fstat(fd).st_size
    try:
        torn = size > 0 and os.pread(fd, 1, size - 1) != b"\n"
    except OSError as error:
        if error.errno != errno.EBADF:  # opened for writing only: nobody can tell
            raise
        return
    if torn:
        os.write(fd, b"\n")
