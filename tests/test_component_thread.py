"""Components and their threads: started together, stopped in order, and ended together if one dies."""

from __future__ import annotations

import errno
import threading
import unittest

from component_thread import ThreadGroup
from pause_meter import PauseMeter
from sockets import SocketLost
from tests.harness import DEADLINE_S, FakeClock, wait_until


class Loop:
    """A component whose loop waits until it is told to stop, or dies of an error."""

    def __init__(self, dies_of: BaseException | None = None) -> None:
        self.last_progress_at = 1000.0
        self.stops = 0
        self._dies_of = dies_of
        self._told = threading.Event()

    def run(self) -> None:
        if self._dies_of is not None:
            raise self._dies_of
        self._told.wait(DEADLINE_S)

    def stop(self) -> None:
        self.stops += 1
        self._told.set()

    def close(self) -> None:
        pass

    def close_descriptors(self) -> None:
        pass


class Threads(unittest.TestCase):
    """What a group of threads promises to the gateway that has them."""

    def setUp(self) -> None:
        self.dead: list[str] = []
        self.ended: list[tuple[object, bool]] = []
        self.group = ThreadGroup(self.dead.append)

    def add(self, *components: Loop) -> None:
        for number, component in enumerate(components):
            self.group.add(f"part-{number}", component, stuck_after_s=10.0, stop_timeout_s=DEADLINE_S)

    def stop(self) -> None:
        self.group.stop(lambda: None, lambda component, ended: self.ended.append((component, ended)))

    def test_they_are_stopped_in_the_order_in_which_they_were_added(self) -> None:
        first, second = Loop(), Loop()
        self.add(first, second)
        self.group.start()
        self.assertTrue(self.group.is_running)
        self.stop()
        self.stop()
        self.assertEqual(self.ended, [(first, True), (second, True)])
        self.assertEqual((first.stops, second.stops, self.dead), (1, 1, []))
        self.assertFalse(self.group.is_running)

    def test_one_that_dies_is_told_with_its_traceback(self) -> None:
        self.add(Loop(), Loop(dies_of=ValueError("of this")))
        self.addCleanup(self.stop)
        with self.assertLogs("elrar.gateway", "CRITICAL") as said:
            self.group.start()
            wait_until("its end", lambda: self.dead)
        self.assertEqual((self.dead, self.group.died_of), (["part-1"], "part-1"))
        self.assertIn("ValueError: of this", said.output[0])
        self.assertFalse(self.group.is_running)

    def test_what_the_system_did_is_told_in_a_sentence(self) -> None:
        """A traceback would say nothing of a socket that was destroyed, or of memory that is used up."""
        lost = SocketLost("UDP", ("127.0.0.1", 9999), OSError(errno.EADDRINUSE, "Address already in use"))
        for error, words in (
            (lost, "has destroyed the socket"),
            (MemoryError(), "no more memory"),
            (OSError(errno.ENOMEM, "Cannot allocate memory"), "no more memory"),
            (RuntimeError("can't allocate lock"), "no more memory"),
        ):
            with self.subTest(words, error=error):
                self.setUp()
                self.add(Loop(dies_of=error))
                with self.assertLogs("elrar.gateway", "CRITICAL") as said:
                    self.group.start()
                    wait_until("its end", lambda: self.dead)
                self.stop()
                self.assertIn(words, said.output[0])
                self.assertNotIn("Traceback", said.output[0])

    def test_one_that_makes_no_progress_shows(self) -> None:
        clock = FakeClock()
        component = Loop()
        self.add(component)
        self.group.start()
        self.addCleanup(self.stop)
        meter = PauseMeter(clock)
        self.assertEqual(self.group.progress(meter), {"part-0": True})
        clock.move(10.5)
        self.assertEqual(self.group.progress(meter), {"part-0": False})
        component.last_progress_at = clock()
        self.assertEqual(self.group.progress(meter), {"part-0": True})


if __name__ == "__main__":
    unittest.main()
