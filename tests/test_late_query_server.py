"""A query server whose port was taken at the start: tried again and again, and then as any other."""

from __future__ import annotations

import threading
import unittest
from unittest import mock

from late_query_server import LateQueryServer
from query_server import counters_document
from tests.harness import DEADLINE_S


class Server:
    """What is made once the port is free."""

    last_progress_at = 77.0

    def __init__(self) -> None:
        self.calls: list[str] = []
        self.stopped = threading.Event()

    def run(self) -> None:
        self.calls.append("run")
        self.stopped.wait(DEADLINE_S)

    def stop(self) -> None:
        self.calls.append("stop")
        self.stopped.set()

    def refuse_new(self) -> None:
        self.calls.append("refuse_new")

    def close(self) -> None:
        self.calls.append("close")

    def close_descriptors(self) -> None:
        self.calls.append("close_descriptors")

    def counters(self) -> dict[str, int]:
        return {"requests": 5}


class Late(unittest.TestCase):
    """Until the port is free there is a thread that makes progress, and counters that are zero."""

    def setUp(self) -> None:
        self.server = Server()
        self.made = threading.Event()
        self.tries = 0
        retry = mock.patch("late_query_server.RETRY_S", 0.001)
        retry.start()
        self.addCleanup(retry.stop)

    def late(self, free_at: int) -> LateQueryServer:
        """One whose port is free at that try."""

        def bind() -> list[mock.Mock]:
            self.tries += 1
            if self.tries < free_at:
                raise OSError
            return [mock.Mock(getsockname=lambda: ("127.0.0.1", 9999))]

        def make(_: object) -> Server:
            self.made.set()
            return self.server

        return LateQueryServer(bind, make, clock=lambda: 5.0)  # type: ignore[arg-type]

    def test_as_soon_as_the_port_is_free(self) -> None:
        late = self.late(free_at=3)
        self.assertEqual((late.counters(), late.last_progress_at), (counters_document(), 5.0))
        thread = threading.Thread(target=late.run, daemon=True)
        with self.assertLogs("elrar.http", "WARNING"):
            thread.start()
            self.assertTrue(self.made.wait(DEADLINE_S))
            late.stop()
            thread.join(DEADLINE_S)
        self.assertEqual((self.tries, late.counters(), late.last_progress_at), (3, {"requests": 5}, 77.0))
        late.refuse_new()
        late.close()
        late.close_descriptors()
        self.assertEqual(self.server.calls[-3:], ["refuse_new", "close", "close_descriptors"])
        self.assertIn("run", self.server.calls)

    def test_an_end_before(self) -> None:
        late = self.late(free_at=10**9)
        late.stop()
        late.run()
        for end in (late.refuse_new, late.close, late.close_descriptors):
            end()
        self.assertEqual((self.tries, self.server.calls), (0, []))


if __name__ == "__main__":
    unittest.main()
