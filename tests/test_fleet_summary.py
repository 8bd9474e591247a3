"""The fleet in one look: counts by status, and the sums of the load of usable engines."""

from __future__ import annotations

import json
import unittest

from state_store import StateStore
from tests.harness import FakeClock, batch, datagram, heartbeat


class Summary(unittest.TestCase):
    def setUp(self) -> None:
        self.clock = FakeClock()
        self.store = StateStore(2000, 6000, 100, 3, clock=self.clock)

    def push(self, *datagrams: bytes) -> None:
        self.store.apply(batch(self.clock(), 1.0, *datagrams))

    def test_no_engine_is_no_error(self) -> None:
        self.assertEqual(
            self.store.fleet(),
            {
                "live": 0, "unavailable": 0, "stale": 0, "usable": 0,
                "sums": {
                    name: {"sum": 0, "engines": 0}
                    for name in (
                        "pending_tokens_total", "kv_cache_free_blocks", "kv_cache_total_blocks", "engine_capacity",
                    )
                },
                "scheduling_modes": {}, "phases": {},
            },
        )  # fmt: skip

    def test_the_unknown_is_left_out_and_counted_as_such(self) -> None:
        self.push(datagram(engine_id="old", pending_tokens_total=1_000_000))
        self.clock.move(3)
        self.push(
            datagram(engine_id="a", pending_tokens_total=10, engine_capacity=1000.5, scheduling_mode="balanced"),
            datagram(engine_id="b", pending_tokens_total=5, engine_capacity=0, kv_cache_free_blocks=-1),
            heartbeat(engine_id="c"),
        )
        fleet = self.store.fleet()
        self.assertEqual((fleet["live"], fleet["stale"], fleet["usable"], fleet["unavailable"]), (3, 1, 2, 0))
        self.assertEqual(fleet["sums"]["pending_tokens_total"], {"sum": 15, "engines": 2})
        self.assertEqual(fleet["sums"]["engine_capacity"], {"sum": 1000.5, "engines": 1})
        self.assertEqual(fleet["sums"]["kv_cache_free_blocks"], {"sum": 100, "engines": 1})
        self.assertEqual(fleet["scheduling_modes"], {"balanced": 1, "latency_optimized": 1})

    def test_the_largest_capacities_there_are_add_up_to_json(self) -> None:
        self.push(*(datagram(engine_id=name, engine_capacity=1.7e308) for name in "ab"))
        json.dumps(self.store.fleet(), allow_nan=False)


if __name__ == "__main__":
    unittest.main()
