"""The staleness rule, in its two forms: by age, and by the moment of the last sign."""

from __future__ import annotations

import random
import unittest

from staleness import Freshness, age_ms, ages_ms


class Rule(unittest.TestCase):
    """An engine is live up to the threshold, by whole milliseconds, however it is asked."""

    def test_both_forms_of_the_rule_are_one(self) -> None:
        rng = random.Random(1)
        for _ in range(20_000):
            stale_ms = rng.choice((1, 20, 2000, 3_600_000))
            freshness = Freshness(stale_ms, 3 * stale_ms)
            now = rng.choice((0.1, 1000.0, 1e6)) + rng.random()
            heard_at = now - (stale_ms + rng.choice((-1, 0, 1, rng.random(), 2 * rng.random()))) / 1000
            live = freshness.is_live(age_ms(now, heard_at))
            self.assertIs(heard_at > freshness.live_since(now), live, (stale_ms, now, heard_at))

    def test_live_then_stale_then_expired(self) -> None:
        freshness = Freshness(2000, 6000)
        self.assertEqual([freshness.is_live(age) for age in (0, 2000, 2001, 6001)], [True, True, False, False])
        self.assertEqual([freshness.is_expired(age) for age in (0, 2001, 6000, 6001)], [False, False, False, True])

    def test_ages_are_whole_and_never_below_0(self) -> None:
        self.assertEqual(ages_ms(10.0, 9.75, 9.5), (250, 500))
        self.assertEqual(ages_ms(10.0, 10.5, 11.0), (0, 0), "heard from after the reader looked at the clock")
        self.assertEqual(ages_ms(10.0, 9.0, 9.5), (1000, 1000))


if __name__ == "__main__":
    unittest.main()
