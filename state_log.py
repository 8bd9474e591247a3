"""The state log: one JSON object a line, written in batches by a thread of its own.

The listener appends to a bounded buffer and never waits for the disk. This is the one place where the disk may fail:
lines wait while it does, those that find no room are dropped and counted, and it is tried again. What is a file's own
(its lock, its rotation, being moved) is in log_file.
"""

from __future__ import annotations

import itertools
import json
import logging
import threading
import time
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from fleet_events import LOG_RECOVERED, LOG_TROUBLE, FleetEvents
from log_file import make_log_target
from log_throttle import LogThrottle
from wake_up import WakeUp

logger = logging.getLogger("elrar.log")

BUFFER_BYTES = 32 * 1024 * 1024  # 20 s of 5,000 states/s
FLUSH_INTERVAL_S = 0.03  # what a `kill -9` can lose; ten times as often takes no measurable CPU
FLUSH_BYTES = 256 * 1024  # or as soon as so much waits, for as long as it is in the processor's cache
PIPE_TIMEOUT_S = 0.5  # for the reader of a pipe to make room, before it counts as trouble
RETRY_INTERVAL_S = 1.0
LOCK_TIMEOUT_S = 2.0  # for a gateway that is just stopping to let go of the log
MAX_PIECES_PER_WRITE = 1000  # systems take 1024
_OVERHEAD = 160  # bytes of memory of what is appended at once, besides its text


@dataclass(frozen=True)
class LogCounters:
    """What became of the states that were to be logged, and of the file."""

    written: int = 0  # states
    dropped: int = 0  # states that found no room in the buffer, or that were given up at stop
    errors: int = 0  # attempts to write, open or rotate that failed
    rotations: int = 0


@dataclass(slots=True)
class Lines:
    """Whole lines on their way to the file; `offset` is how far they are written."""

    data: bytes
    states: int  # how many lines; 0 for the one line of an event
    offset: int = 0

    @property
    def memory(self) -> int:
        """Bytes of memory that they take while they wait."""
        return len(self.data) + _OVERHEAD if self.states else 0  # an event's one line is not in the account

    @property
    def begun(self) -> int:
        """How many bytes of an unfinished line are written."""
        return self.offset - (self.data.rfind(b"\n", 0, self.offset) + 1)

    def back_to_line_start(self) -> None:
        """Have an unfinished line written again from its beginning."""
        self.offset -= self.begun


class LineBuffer:
    """Lines between the threads that append and the one that writes; bounded, and never waited for."""

    def __init__(self, max_bytes: int) -> None:
        self._max_bytes = max_bytes
        self._lock = threading.Lock()  # guards all below; held for a few additions and a swap of lists
        self._waiting: list[Lines] = []
        self._waiting_bytes = 0
        self._bytes = 0  # of memory, appended and not yet written
        self._states = 0  # appended and not yet written
        self.dropped = 0  # states; reading it needs no lock
        self._closed = False

    def append(self, lines: Lines) -> bool:
        """Have them wait, or drop and count them; returns whether it is time to write. From any thread."""
        with self._lock:
            if self._closed or self._bytes + lines.memory > self._max_bytes:
                self.dropped += lines.states
                return False
            self._bytes += lines.memory
            self._states += lines.states
            self._waiting.append(lines)
            due = self._waiting_bytes < FLUSH_BYTES <= self._waiting_bytes + len(lines.data)
            self._waiting_bytes += len(lines.data)
        return due

    def remove_waiting(self) -> list[Lines]:
        """All that waits, for the writer, who says when it is written."""
        with self._lock:
            waiting, self._waiting = self._waiting, []
            self._waiting_bytes = 0
        return waiting

    def note_written(self, memory: int, states: int) -> None:
        """So many bytes of memory are free again, so many states are in the file."""
        with self._lock:
            self._bytes -= memory
            self._states -= states

    def close(self) -> int:
        """Count as dropped what is not written, and from now on what is appended; returns how many states."""
        with self._lock:
            given_up, self._states = self._states, 0
            self.dropped += given_up
            self._closed = True
        return given_up


class Trouble:
    """A log that cannot be written: tried again every second, and logged once until it works again."""

    def __init__(self, name: str, buffer_bytes: int, events: FleetEvents, clock: Callable[[], float]) -> None:
        self._name = name
        self._events = events
        self._clock = clock
        self._retry_at = clock()
        self._is_failing = False
        self._is_logged = False
        self._notice = LogThrottle(
            logger,
            logging.ERROR,
            f"cannot write the state log, states are still taken: lines wait in a buffer of {buffer_bytes >> 20} MiB,"
            f" what does not fit is dropped and counted, and it is tried again every second; file={name}",
            clock=clock,
        )

    def may_try(self) -> bool:
        """Whether it is time to try."""
        return self._clock() >= self._retry_at

    def try_at_once(self) -> None:
        """Do not wait for the next second."""
        self._retry_at = self._clock()

    def began_and_was_logged(self) -> None:
        """The first try has failed, and the caller has logged it."""
        self._retry_at = self._clock() + RETRY_INTERVAL_S
        self._is_failing = self._is_logged = True
        self._events.record(LOG_TROUBLE, message="cannot open the state log")

    def failed(self, error: OSError) -> None:
        """A try has failed."""
        self._retry_at = self._clock() + RETRY_INTERVAL_S
        if not self._is_failing:
            self._is_failing = True
            self._notice.record("%s", error)
            self._events.record(LOG_TROUBLE, message=f"cannot write the state log: {error}")
        if not self._is_logged:
            self._is_logged = self._notice.flush()

    def worked(self, dropped: int) -> None:
        """A try has worked; so many states were dropped since the start."""
        if self._is_failing:
            self._is_failing = False
            self._events.record(
                LOG_RECOVERED, message=f"writing the state log again, dropped since the start: {dropped}"
            )
        if self._is_logged:
            self._is_logged = False
            logger.warning("writing the state log again file=%s dropped=%d", self._name, dropped)


class StateLog:
    """Writes states and events as JSONL, to a file or a standard stream.

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
        events: FleetEvents | None = None,
        clock: Callable[[], float] = time.monotonic,
        wall_clock: Callable[[], float] = time.time,
    ) -> None:
        self._target = make_log_target(path, max_bytes, backups, clock=clock)
        self._buffer = LineBuffer(buffer_bytes)
        self._clock = clock
        self._wall_clock = wall_clock
        self._stopping = False
        self._wakeup = WakeUp()
        self._reopen_asked = False
        # All below is the writer's own.
        self._unwritten: deque[Lines] = deque()
        self._written = 0
        self._errors = 0
        self._trouble = Trouble(
            self._target.name, buffer_bytes, FleetEvents(clock=clock) if events is None else events, clock
        )
        self.last_progress_at = clock()  # monotonic

    @property
    def path(self) -> str:
        """Where it is: the path as it was set, or /dev/stdout, or /dev/stderr."""
        return self._target.name

    def open(self, event: str, message: str, *, lock_timeout_s: float = LOCK_TIMEOUT_S, **fields: object) -> None:
        """Open the file and write its first line; raises OSError if that cannot be done.

        LogInUse if another process has had the file locked for `lock_timeout_s`.
        """
        self._target.open(lock_timeout_s)
        try:
            self._unwritten.append(self._event(event, message, fields))
            self._write_unwritten()
        except BaseException:
            self._take_unfinished_line_back()
            self._target.close()
            raise

    def open_later(self, event: str, message: str, **fields: object) -> None:
        """Leave it to `run` to open the file and write the first line, after `open` failed; it tries every second."""
        if not self._unwritten:
            self._unwritten.append(self._event(event, message, fields))
        self._trouble.began_and_was_logged()

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
        if self._buffer.append(Lines(b"".join(pieces), len(states))):
            self._wakeup.set()

    def _event(self, event: str, message: str, fields: dict[str, object]) -> Lines:
        document = {"timestamp": self._wall_clock(), "event": event, "message": message, **fields}
        return Lines(json.dumps(document, ensure_ascii=False).encode("utf-8", "replace") + b"\n", 0)

    def reopen(self) -> None:
        """Have the file opened anew at the next step, as after SIGHUP."""
        self._reopen_asked = True

    def counters(self) -> LogCounters:
        """The counters; each is true, but they are not of one moment."""
        target = self._target
        return LogCounters(self._written, self._buffer.dropped, self._errors + target.errors, target.rotations)

    def run(self) -> None:
        """Write what waits, every FLUSH_INTERVAL_S or FLUSH_BYTES, until `stop` is called; then once more."""
        while not self._stopping:
            self.step()
            self._wakeup.wait(FLUSH_INTERVAL_S)
        self._trouble.try_at_once()
        self.step()

    def stop(self) -> None:
        """Make `run` write what waits and return; from any thread, twice is harmless."""
        self._stopping = True
        self._wakeup.set()

    def end(self, event: str, message: str, **fields: object) -> int:
        """Write the last line and close the file; returns how many states had to be given up.

        Only after `run` has returned.
        """
        given_up = self._buffer.close()
        if not given_up:
            self._unwritten.append(self._event(event, message, {**fields, "log_written": self._written}))
            try:
                self._write_unwritten()
            except OSError as error:
                self._take_unfinished_line_back()
                logger.error("the last line of the state log was not written error=%s", error)
        self.close()
        return given_up

    def give_up(self) -> int:
        """Count all that is not written yet as dropped; returns how many states. From any thread, at stop."""
        return self._buffer.close()

    def close(self) -> None:
        """Close the file, with no last line; only after `run` has returned."""
        self.close_descriptors()

    def close_descriptors(self) -> None:
        """Close the file and do nothing else: its lock stays with the process that this one was forked from."""
        self._target.close()
        self._wakeup.close()

    def step(self) -> None:
        """One round: see whether the file is still there, and write all that waits."""
        self.last_progress_at = self._clock()
        self._unwritten.extend(self._buffer.remove_waiting())
        if not self._trouble.may_try():
            return
        try:
            if self._target.follow(reopen=self._reopen_asked) and self._unwritten:
                self._unwritten[0].back_to_line_start()
            self._reopen_asked = False
            self._write_unwritten()
        except OSError as error:
            self._errors += 1
            self._take_unfinished_line_back()
            self._trouble.failed(error)
        else:
            self._trouble.worked(self._buffer.dropped)

    def _write_unwritten(self) -> None:
        while self._unwritten:
            pieces = self._next_pieces()
            try:
                wrote = self._target.write(pieces)
            except BlockingIOError:  # a pipe is full
                if not self._target.wait_for_room(PIPE_TIMEOUT_S):
                    raise
                continue
            self._note_written(wrote)
            self.last_progress_at = self._clock()

    def _next_pieces(self) -> list[memoryview | bytes]:
        """What is written next, in one system call: whole lines if they fit, and not more than has room in the file."""
        first = self._unwritten[0]
        data, start = first.data, first.offset
        line_bytes = data.index(b"\n", start) + 1 - start
        most = self._target.max_write_bytes
        if first.begun:  # the rest of a line goes where its beginning is
            return [memoryview(data)[start : start + min(most, line_bytes)]]
        room = self._target.room()
        if room is not None:
            if room < line_bytes and self._target.rotate():
                room = self._target.room() or 0
            # A line for which there is no room is written all the same: it is larger than a file may be, or the file
            # could not be rotated, and a file that is too large is better than a line that is lost.
            most = min(most, max(room, line_bytes))
        end = min(len(data), start + most)
        if end < len(data):
            end = data.rfind(b"\n", start, end) + 1 or end
        pieces: list[memoryview | bytes] = [memoryview(data)[start:end]]
        if end == len(data):
            most -= end - start
            for lines in itertools.islice(self._unwritten, 1, MAX_PIECES_PER_WRITE):
                most -= len(lines.data)
                if most < 0:
                    break
                pieces.append(lines.data)
        return pieces

    def _note_written(self, wrote: int) -> None:
        """Go on after so many bytes, counting the states whose lines are whole in the file by now."""
        freed = states = 0
        while wrote:
            lines = self._unwritten[0]
            before, size = lines.offset, len(lines.data)
            lines.offset = min(size, before + wrote)
            wrote -= lines.offset - before
            if lines.offset - before == size:
                states += lines.states  # counting its lines takes a tenth of a microsecond each
            elif lines.states:
                states += lines.data.count(b"\n", before, lines.offset)
            if lines.offset == size:
                self._unwritten.popleft()
                freed += lines.memory
        self._written += states
        self._buffer.note_written(freed, states)

    def _take_unfinished_line_back(self) -> None:
        """Take the beginning of a line that could not be finished back out of the file, so that every line is whole."""
        if self._unwritten:
            first = self._unwritten[0]
            if first.begun and self._target.take_back(first.begun):
                first.back_to_line_start()
