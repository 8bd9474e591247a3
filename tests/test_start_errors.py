"""Why the gateway cannot start: each text says what, why, and what to do."""

from __future__ import annotations

import errno
import os
import unittest

from log_file import LogInUse
from start_errors import cannot_have, cannot_listen, cannot_log


def system_error(number: int) -> OSError:
    return OSError(number, os.strerror(number))


class Remedies(unittest.TestCase):
    """The limit to raise, the command that shows who it is, the variable to set."""

    def assert_says(self, text: str, *words: str) -> None:
        for word in words:
            self.assertIn(word, text)

    def test_what_the_system_has_no_more_of(self) -> None:
        self.assert_says(cannot_have(RuntimeError("can't start new thread")), "ulimit -u", "TasksMax=", "pids")
        self.assert_says(cannot_have(MemoryError()), "out of memory", "ulimit -v", "MAX_ENGINES")
        for number, words in (
            (errno.ENOMEM, ("ulimit -v", "MemoryMax=")),
            (errno.EMFILE, ("ulimit -n", "LimitNOFILE=")),
            (errno.ENFILE, ("fs.file-max",)),
        ):
            error = system_error(number)
            for text in (cannot_have(error), cannot_listen("UDP", "0.0.0.0", 9999, error), cannot_log("/x", error)):
                self.assert_says(text, os.strerror(number), *words)

    def test_a_port(self) -> None:
        for protocol, flag, variable in (("UDP", "-lunp", "UDP_PORT"), ("TCP", "-ltnp", "HTTP_PORT")):
            text = cannot_listen(protocol, "::1", 9999, system_error(errno.EADDRINUSE))
            self.assert_says(text, f"{protocol} [::1]:9999", flag, f"VLLM_STATE_GATEWAY_{variable}", "GET /engines")
        self.assert_says(cannot_listen("UDP", "10.9.8.7", 1, system_error(errno.EADDRNOTAVAIL)), "ip addr", "0.0.0.0")
        self.assert_says(cannot_listen("TCP", "0.0.0.0", 80, system_error(errno.EACCES)), "1024", "HTTP_PORT")
        self.assert_says(cannot_listen("UDP", "0.0.0.0", 9999, system_error(errno.EIO)), "BIND_ADDRESS", "UDP_PORT")

    def test_a_log(self) -> None:
        self.assert_says(cannot_log("/x/s", system_error(errno.EACCES)), "/x/s", "LOG_FILE", "ENABLE_LOG=false")
        self.assert_says(cannot_log("/x/s", LogInUse(errno.EAGAIN, "locked", "/x/s")), "fuser -v /x/s", "LOG_FILE")
        self.assert_says(cannot_log("/x/f", system_error(errno.ENXIO)), "a FIFO that nobody reads")
        self.assert_says(cannot_log("s", system_error(errno.ENOENT)), "the working folder is gone")


if __name__ == "__main__":
    unittest.main()
