"""The daemon's own log, on stderr: never in the way of the work, and never a line for each datagram.

`DaemonLog` is for the daemon alone; a router that has the gateway in its process keeps its own logging.
"""

from __future__ import annotations

import logging
import os
import queue
import select
import threading
import time

MAX_QUEUED_LINES = 1000


class _QueueingHandler(logging.Handler):
    """Hands finished lines to a bounded queue; a line that finds no room is dropped and counted."""

    def __init__(self) -> None:
        super().__init__()
        self.lines: queue.Queue[bytes | None] = queue.Queue(MAX_QUEUED_LINES)
        self.dropped = 0  # counted by whoever logs and by the writer: one may be missed, none is invented

    def emit(self, record: logging.LogRecord) -> None:
        try:
            line = self.format(record).encode("utf-8", "backslashreplace") + b"\n"
            self.lines.put_nowait(line)
        except (queue.Full, MemoryError):
            self.dropped += 1
        except Exception:
            self.handleError(record)


def _write_to_stderr(line: bytes) -> None:
    """Write all of it, and wait for as long as that takes; raises OSError."""
    while line:
        try:
            line = line[os.write(2, line) :]
        except BlockingIOError:  # somebody who has the same pipe has made it non-blocking
            room = select.poll()
            room.register(2, select.POLLOUT)
            room.poll()


class DaemonLog:
    """Writes the lines of the process's loggers to stderr in a thread of its own.

    A pipe that nobody reads would otherwise stop the thread that logs, intake among them.
    """

    def __init__(self, level: str) -> None:
        self._handler = _QueueingHandler()
        line = "%(asctime)s.%(msecs)03dZ %(levelname)s %(name)s: %(message)s"
        formatter = logging.Formatter(line, "%Y-%m-%dT%H:%M:%S")
        formatter.converter = time.gmtime
        self._handler.setFormatter(formatter)
        root = logging.getLogger()
        root.setLevel(level)
        root.addHandler(self._handler)
        self._thread = threading.Thread(target=self._run, name="daemon-log", daemon=True)
        self._thread.start()

    @property
    def dropped(self) -> int:
        """Lines that were not written because stderr took none; reading it needs no lock."""
        return self._handler.dropped

    def _run(self) -> None:
        while True:
            line = self._handler.lines.get()
            if line is None:
                return
            try:
                # Not sys.stderr: a thread that is stuck in its buffer's lock makes the interpreter abort at exit.
                _write_to_stderr(line)
            except OSError:
                self._handler.dropped += 1

    def close(self, timeout_s: float = 1.0) -> None:
        """Write what waits, for at most `timeout_s`; lines after that are lost."""
        try:
            self._handler.lines.put(None, timeout=timeout_s)
        except queue.Full:
            return
        self._thread.join(timeout_s)
