"""The fleet in one look: counts by status, and the sums of the load of usable engines."""

from __future__ import annotations

import json
import random
import sys
import unittest
from collections import Counter
from typing import Any
from unittest import mock

from state_store import StateStore
from tests.harness import FakeClock, batch, datagram, heartbeat

SUMMED = {
    "pending_tokens_total": None,
    "kv_cache_free_blocks": -1,
    "kv_cache_total_blocks": -1,
    "engine_capacity": 0,
}  # and what stands for unknown


def plain(store: StateStore) -> dict[str, Any]:
    """The same by looking at one engine after the other."""
    views = store.views()
    usable = [view.state for view in views if view.usable]
    statuses = Counter(view.status for view in views)
    sums = {}
    for name, unknown in SUMMED.items():
        values = [value for state in usable if (value := getattr(state, name)) != unknown]
        sums[name] = {"sum": min(sum(values), sys.float_info.max), "engines": len(values)}
    return {
        **{status: statuses[status] for status in ("live", "unavailable", "stale")},
        "usable": len(usable),
        "sums": sums,
        "scheduling_modes": Counter(state.scheduling_mode for state in usable),
        "phases": Counter(view.phase or "serving" for view in views if view.status != "stale"),
    }


def random_datagram(choice: random.Random) -> bytes:
    """Of any of 40 engines: a load, a heartbeat, one of several senders', a farewell."""
    sender = choice.choice(({}, {"boot": choice.choice(("aa", "bb")), "seq": choice.randrange(1, 2000)}))
    phase = choice.choice(({}, {}, {"phase": "serving"}, {"phase": choice.choice(("draining", "sleeping", "gone"))}))
    if choice.random() < 0.2:
        return heartbeat(engine_id=f"e{choice.randrange(40)}", timestamp_ms=choice.randrange(10**6), **sender, **phase)
    return datagram(
        engine_id=f"e{choice.randrange(40)}",
        timestamp_ms=choice.randrange(10**6),
        scheduling_mode=choice.choice(("balanced", "latency_optimized", "a mode \u00e4")),
        pending_tokens_total=choice.choice((0, 17, 2**53)),
        kv_cache_free_blocks=choice.choice((-1, 0, 99)),
        kv_cache_total_blocks=choice.choice((-1, 1000)),
        engine_capacity=choice.choice((0, 0.0, 7, 0.1, 59768.2749641796, 1e-9, 1.7e308)),
        **sender,
        **phase,
    )


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

    def test_it_is_what_looking_at_each_engine_gives_whatever_became_of_them(self) -> None:
        for seed in range(30):
            choice = random.Random(seed)
            self.setUp()
            for step in range(60):
                self.push(*(random_datagram(choice) for _ in range(choice.choice((0, 1, 3, 30)))))
                self.clock.move(choice.choice((0.0, 0.01, 0.3, 2.0, 2.001)))
                if choice.random() < 0.2:
                    self.store.advance_watermark(self.clock())
                    self.store.sweep()
                with self.subTest(seed=seed, step=step):
                    fleet = self.store.fleet()
                    self.assertEqual(json.dumps(fleet), json.dumps({**fleet, **plain(self.store)}))
                    self.assertEqual(fleet.keys(), plain(self.store).keys())
                    self.assertEqual(self.store.fleet_of(*self.store.snapshot()), fleet)

    def test_what_could_not_be_read_is_read_by_the_next_who_asks(self) -> None:
        self.push(datagram(engine_id="a"), datagram(engine_id="b"))
        self.store.fleet()
        self.push(datagram(engine_id="b", timestamp_ms=10**13, pending_tokens_total=1), datagram(engine_id="c"))
        with mock.patch("fleet_summary.decode_columns", side_effect=MemoryError), self.assertRaises(MemoryError):
            self.store.fleet()
        self.assertEqual(self.store.fleet(), plain(self.store))


if __name__ == "__main__":
    unittest.main()
