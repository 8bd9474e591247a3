"""The daemon's own log: whole lines, and never in the way of whoever logs."""

from __future__ import annotations

import logging
import os
import threading
import unittest
from unittest import mock

from daemon_log import MAX_QUEUED_LINES, DaemonLog, _write_to_stderr
from tests.harness import DEADLINE_S, wait_until

real_write = os.write


class OwnLog(unittest.TestCase):
    """Lines reach standard error whole and in order, or are counted as dropped."""

    def setUp(self) -> None:
        self.written = bytearray()
        self.may_write = threading.Event()
        self.may_write.set()
        self.most = 1 << 20
        patched = mock.patch("daemon_log.os.write", self.write)
        patched.start()
        self.addCleanup(patched.stop)
        root = logging.getLogger()
        level, handlers = root.level, root.handlers[:]
        self.log = DaemonLog("INFO")

        def put_back() -> None:
            self.may_write.set()
            self.log.close()
            root.setLevel(level)
            root.handlers[:] = handlers

        self.addCleanup(put_back)
        self.logger = logging.getLogger("elrar.test")

    def write(self, fd: int, data: bytes) -> int:
        """In the place of os.write."""
        self.assertEqual(fd, 2)
        self.may_write.wait(DEADLINE_S)
        self.written += data[: self.most]
        return min(len(data), self.most)

    def test_form_of_a_line(self) -> None:
        self.logger.warning("it rained place=%r", "a\nb")
        self.log.close()
        line = r"^\d{4}-\d\d-\d\dT\d\d:\d\d:\d\d\.\d{3}Z WARNING elrar\.test: it rained place='a\\nb'\n$"
        self.assertRegex(self.written.decode(), line)

    def test_long_line_is_whole_though_the_pipe_takes_pieces(self) -> None:
        self.most = 100
        self.logger.info("x" * 5000)
        self.logger.info("y")
        self.log.close()
        self.assertEqual([line[-1:] for line in self.written.splitlines()], [b"x", b"y"])
        self.assertIn(b"x" * 5000 + b"\n", self.written)

    def test_stuck_stderr_stops_nobody_and_drops_are_counted(self) -> None:
        self.may_write.clear()
        for _ in range(MAX_QUEUED_LINES + 11):
            self.logger.info("a line")
        self.assertIn(self.log.dropped, (10, 11))  # the writer may have one in its hand
        self.may_write.set()
        wait_until("the rest to be written", lambda: self.written.count(b"\n") >= MAX_QUEUED_LINES)

    def test_pipe_that_others_made_non_blocking(self) -> None:
        """A line waits for room, and is neither lost nor torn."""
        reader, writer = os.pipe()
        self.addCleanup(os.close, reader)
        self.addCleanup(os.close, writer)
        os.set_blocking(writer, False)
        line = b"x" * 200_000 + b"\n"
        written = bytearray()

        def write(_fd: int, data: bytes) -> int:
            return real_write(writer, data)

        def wait(_timeout: object = None) -> list[object]:
            written.extend(os.read(reader, 1 << 20))
            return []

        with mock.patch("daemon_log.os.write", write), mock.patch("daemon_log.select.poll") as poll:
            poll.return_value.poll = wait
            _write_to_stderr(line)
        self.assertEqual(bytes(written) + os.read(reader, 1 << 20), line)

    def test_closed_stderr_is_counted(self) -> None:
        with mock.patch("daemon_log.os.write", side_effect=OSError):
            self.logger.info("a line")
            self.log.close()
        self.assertEqual(self.log.dropped, 1)

    def test_what_cannot_be_encoded_is_escaped(self) -> None:
        self.logger.info("\ud800")
        self.log.close()
        self.assertIn(rb"\ud800", self.written)


if __name__ == "__main__":
    unittest.main()
