"""A sample every ten seconds for two hours: counters of /stats and the fleet."""

from __future__ import annotations

import json
import unittest
from typing import Any

from fleet_samples import MAX_NAMES, MAX_SAMPLES, SAMPLE_INTERVAL_S, FleetSamples
from tests.harness import FakeClock, daemon, datagram


class Samples(unittest.TestCase):
    """When they are taken, and what is in them."""

    def setUp(self) -> None:
        self.clock = FakeClock()
        self.stats: dict[str, Any] = {"total_received": 1, "version": "1", "log": {"written": 2, "file": "x"}}
        self.samples = FleetSamples(lambda: self.stats, clock=self.clock, wall_clock=self.clock)

    def kept(self, since_ms: int = 0) -> Any:
        return json.loads(self.samples.json_text(since_ms))

    def test_one_comes_every_ten_seconds_however_often_it_is_asked(self) -> None:
        for _ in range(1000):
            self.samples.take_due()
            self.clock.move(0.1)
        self.assertEqual([one["time_ms"] // 10_000 for one in self.kept()], list(range(100, 110)))

    def test_after_a_pause_nothing_is_made_up(self) -> None:
        self.samples.take_due()
        self.clock.move(100)
        self.assertTrue(self.samples.take_due())
        self.assertFalse(self.samples.take_due())
        self.assertEqual([one["time_ms"] for one in self.kept()], [1_000_000, 1_100_000])

    def test_a_sample_has_the_numbers_and_nothing_else(self) -> None:
        self.samples.take_due()
        self.assertEqual(self.kept(), [{"time_ms": 1_000_000, "total_received": 1, "log": {"written": 2}}])

    def test_two_hours_are_kept(self) -> None:
        for number in range(MAX_SAMPLES + 5):
            self.stats["total_received"] = number
            self.samples.take_due()
            self.clock.move(SAMPLE_INTERVAL_S)
        kept = self.kept()
        self.assertEqual((len(kept), kept[0]["total_received"]), (MAX_SAMPLES, 5))
        self.assertEqual(self.kept(kept[-2]["time_ms"]), kept[-2:])
        self.assertEqual(self.kept(10**15), [])

    def test_of_many_modes_the_most_frequent_are_kept(self) -> None:
        modes = {f"{number:03}-" + chr(0x4E00 + 31 * number) * 30: number for number in range(200)}
        self.stats["fleet"] = {"live": 3, "scheduling_modes": modes, "phases": {}}
        self.samples.take_due()
        (sample,) = self.kept()
        self.assertEqual(sample["fleet"]["live"], 3)
        self.assertEqual(sorted(sample["fleet"]["scheduling_modes"].values()), list(range(200 - MAX_NAMES, 200)))


class InTheDaemon(unittest.TestCase):
    def test_the_first_one_is_there_from_the_start_with_the_counters_of_stats(self) -> None:
        with daemon(BIND_ADDRESS="127.0.0.1", STALE_THRESHOLD=60_000) as running:
            (sample,) = running.ask("/samples").json
            running.send(datagram(engine_id="a"))
            stats = running.wait_received(1)
            self.assertEqual(sample["total_received"], 0)
            self.assertEqual(set(sample["fleet"]), set(stats["fleet"]))
            for name in (
                "valid_states",
                "invalid_states",
                "invalid_reasons",
                "kernel_dropped",
                "log",
                "expired_engines",
            ):
                self.assertIn(name, sample)
            self.assertNotIn("version", sample)


if __name__ == "__main__":
    unittest.main()
