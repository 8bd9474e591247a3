"""The gateway's clock notices that the whole process was paused."""

from __future__ import annotations

import threading
import unittest

from pause_meter import MAX_PAUSES, PAUSED_AFTER_S, PauseMeter
from tests.harness import FakeClock


class Pauses(unittest.TestCase):
    """What counts for a thread's silence is the time in which the process was running."""

    def setUp(self) -> None:
        self.clock = FakeClock()
        self.meter = PauseMeter(self.clock)

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
            barrier.wait()
            self.meter()

        threads = [threading.Thread(target=ask) for _ in range(8)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        self.assertEqual(self.meter.running_s_since(then), 0)

    def test_memory_is_bounded(self) -> None:
        for _ in range(MAX_PAUSES * 2):
            self.clock.move(60)
            self.meter()
        self.assertEqual(len(self.meter._pauses), MAX_PAUSES)


if __name__ == "__main__":
    unittest.main()
