"""Log lines at most once a minute, with how many were not shown."""

from __future__ import annotations

import logging
import unittest

from log_throttle import MAX_EXAMPLES, PERIOD_S, LogThrottle
from tests.harness import FakeClock


class Throttle(unittest.TestCase):
    """One kind of trouble writes one line a minute, and no occurrence stays unsaid."""

    def setUp(self) -> None:
        self.clock = FakeClock()
        self.throttle = LogThrottle(logging.getLogger("elrar.test"), logging.WARNING, "it rained", clock=self.clock)

    def test_nothing_recorded_is_nothing_said(self) -> None:
        self.assertIsNone(self.throttle.take_due())
        with self.assertNoLogs("elrar.test"):
            self.assertFalse(self.throttle.flush())

    def test_first_at_once_then_one_a_minute_with_the_count(self) -> None:
        with self.assertLogs("elrar.test", "WARNING") as logged:
            for _ in range(200):
                self.throttle.record()
                self.throttle.flush()
            self.clock.move(PERIOD_S)
            self.assertTrue(self.throttle.flush())
        self.assertEqual(
            [record.getMessage() for record in logged.records], ["it rained count=1", "it rained count=199"]
        )

    def test_first_examples_are_shown(self) -> None:
        for number in range(10):
            self.throttle.record("on %s", number)
        self.throttle.record("never shown", count=5)
        examples = "; ".join(f"on {number}" for number in range(MAX_EXAMPLES))
        self.assertEqual(self.throttle.take_due(), f"it rained count=15, such as {examples}")

    def test_bytes_are_json_texts(self) -> None:
        self.throttle.record("id=%r from=%s", b'"a\\u00e9"', b'"10.0.0.1:5"')
        self.assertEqual(self.throttle.take_due(), "it rained count=1, such as id='aé' from=10.0.0.1:5")

    def test_an_example_without_arguments_is_taken_as_it_is(self) -> None:
        self.throttle.record("100 %")
        self.assertEqual(self.throttle.take_due(), "it rained count=1, such as 100 %")


if __name__ == "__main__":
    unittest.main()
