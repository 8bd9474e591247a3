"""The gateway's clock notices that the whole process was paused."""

from __future__ import annotations

import threading
import unittest
from unittest import mock

from pause_meter import CATCH_UP_S, MAX_PAUSES, PAUSED_AFTER_S, SETTLE_S, PauseMeter
from tests.harness import DEADLINE_S, FakeClock


class Pauses(unittest.TestCase):
    """What counts for a thread's silence is the time in which the process was running."""

    def setUp(self) -> None:
        self.clock = FakeClock()
        self.meter = PauseMeter(self.clock)
        self.meter.start()
        patched = mock.patch("pause_meter.logger")
        patched.start()
        self.addCleanup(patched.stop)

    def run_for(self, seconds: int) -> None:
        for _ in range(seconds):
            self.clock.move(1.0)
            self.meter()

    def test_it_is_a_clock(self) -> None:
        self.clock.move(0.25)
        self.assertEqual(self.meter(), self.clock.now)

    def test_while_somebody_asks_all_time_counts(self) -> None:
        then = self.meter()
        self.run_for(30)
        self.assertEqual(self.meter.running_s_since(then), 30)

    def test_a_pause_does_not_count(self) -> None:
        then = self.meter()
        self.run_for(3)
        self.clock.move(60)
        self.assertEqual(self.meter.running_s_since(then), 3)
        self.run_for(4)
        self.clock.move(PAUSED_AFTER_S + 1)
        self.assertEqual(self.meter.running_s_since(then), 7)
        self.assertEqual(self.meter.running_s_since(self.meter()), 0)

    def test_only_pauses_since_then_are_subtracted(self) -> None:
        self.clock.move(60)
        then = self.meter()
        self.run_for(5)
        self.assertEqual(self.meter.running_s_since(then), 5)

    def test_a_moment_without_a_question_is_no_pause(self) -> None:
        then = self.meter()
        self.clock.move(PAUSED_AFTER_S)
        self.assertEqual(self.meter.running_s_since(then), PAUSED_AFTER_S)

    def test_a_thread_that_lags_behind_makes_no_second_pause_of_one(self) -> None:
        then = self.meter()
        self.clock.move(60)
        self.meter()
        self.meter._asked_at = then  # what it had read before the pause
        self.assertEqual(self.meter.running_s_since(then), 0)

    def test_all_threads_at_once_see_one_pause(self) -> None:
        then = self.meter()
        self.clock.move(60)
        barrier = threading.Barrier(8)

        def ask() -> None:
            barrier.wait(DEADLINE_S)
            self.meter()

        threads = [threading.Thread(target=ask, daemon=True) for _ in range(8)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join(DEADLINE_S)
        self.assertEqual(self.meter.running_s_since(then), 0)

    def test_before_the_start_and_after_the_stop(self) -> None:
        """Waiting for a locked log at the start is no pause, and neither is a look at the counters long afterwards."""
        meter = PauseMeter(self.clock)
        self.clock.move(60)
        meter.start()
        meter()
        meter.stop()
        self.clock.move(60)
        meter()
        self.assertEqual(meter.held_up_s, 0.0)

    def test_memory_is_bounded(self) -> None:
        for _ in range(MAX_PAUSES * 2):
            self.clock.move(60)
            self.meter()
        self.assertEqual(len(self.meter._pauses), MAX_PAUSES)


class Judging(unittest.TestCase):
    """Nobody is called stale for a time in which the gateway did not listen."""

    def setUp(self) -> None:
        self.clock = FakeClock()
        self.meter = PauseMeter(self.clock)
        self.meter.start()

    def pause(self, seconds: float) -> float:
        """A pause that a thread notices afterwards; returns its beginning."""
        began_at = self.clock.now
        self.clock.move(seconds)
        self.meter()
        return began_at

    def run_for(self, seconds: float) -> None:
        for _ in range(10):
            self.clock.move(seconds / 10)
            self.meter()

    def judged_at(self) -> float:
        return self.meter.judged_at(self.meter())

    def test_without_a_pause_the_present_counts(self) -> None:
        for _ in range(30):
            self.run_for(1.0)
            self.assertEqual(self.judged_at(), self.clock.now)
            self.meter.note_taken(self.clock.now)
        self.assertEqual(self.meter.held_up_s, 0.0)

    def test_the_first_to_ask_after_it_is_told_its_beginning(self) -> None:
        before = self.clock.now
        self.clock.move(10)
        with self.assertLogs("elrar.pause", "WARNING") as logged:
            self.assertEqual(self.judged_at(), before)
        self.assertIn("held up", logged.output[0])
        self.assertIn("seconds=10.0", logged.output[0])

    def test_until_what_waited_is_taken_and_half_a_second_more(self) -> None:
        with self.assertLogs("elrar.pause"):
            before = self.pause(10)
        for _ in range(5):
            self.run_for(1.0)
            self.assertEqual(self.judged_at(), before)
        self.meter.note_taken(before)  # a step that had begun before the pause
        self.run_for(1.0)
        self.assertEqual(self.judged_at(), before)
        self.meter.note_taken(self.clock.now)
        self.run_for(SETTLE_S - 0.01)
        self.assertEqual(self.judged_at(), before)
        self.run_for(0.02)
        self.assertEqual(self.judged_at(), self.clock.now)
        self.meter.note_taken(self.clock.now)
        self.assertEqual(self.judged_at(), self.clock.now)

    def test_it_catches_up_until_what_waited_is_taken(self) -> None:
        """Or for a second at most: readers do not wait for a gateway that never does."""
        self.assertFalse(self.meter.is_catching_up(self.meter()))
        with self.assertLogs("elrar.pause"):
            before = self.pause(10)
        self.meter.note_taken(before)
        self.assertTrue(self.meter.is_catching_up(self.meter()))
        self.run_for(0.01)
        self.meter.note_taken(self.clock.now)
        self.assertFalse(self.meter.is_catching_up(self.meter()))
        self.run_for(1.0)
        self.pause(10)
        self.run_for(CATCH_UP_S - 0.01)
        self.assertTrue(self.meter.is_catching_up(self.meter()))
        self.run_for(0.02)
        self.assertFalse(self.meter.is_catching_up(self.meter()))

    def test_pause_while_settling(self) -> None:
        """A pause before the last one has settled goes on from it."""
        with self.assertLogs("elrar.pause"):
            before = self.pause(10)
            self.meter.note_taken(self.clock.now)
            self.run_for(SETTLE_S / 2)
            self.pause(3)
        self.assertEqual(self.judged_at(), before)

    def test_pause_after_settling(self) -> None:
        """A pause after the last one has settled begins anew."""
        with self.assertLogs("elrar.pause"):
            self.pause(10)
            self.meter.note_taken(self.clock.now)
            self.run_for(SETTLE_S + 0.01)
            before = self.pause(3)
        self.assertEqual(self.judged_at(), before)

    def test_what_is_counted(self) -> None:
        with self.assertLogs("elrar.pause"):
            for seconds in (10, 5):
                self.pause(seconds)
                self.run_for(1.0)
        self.assertEqual(round(self.meter.held_up_s, 3), 15.0)


if __name__ == "__main__":
    unittest.main()
