"""The last 1,000 events: bounded in number and bytes, merged where there are many, and told where they happen."""

from __future__ import annotations

import itertools
import json
import signal
import time
import tracemalloc
import unittest
from pathlib import Path
from typing import Any

import fleet_events
from fleet_events import (
    APPEARED,
    CAME_BACK,
    EVENT_KINDS,
    KERNEL_DROPS,
    MAX_ALONE,
    MAX_EVENTS,
    REMOVED,
    WENT_STALE,
    EventNotes,
    FleetEvents,
)
from fleet_samples import MAX_SAMPLES, FleetSamples
from state_store import StateStore
from tests.harness import FakeClock, batch, daemon, datagram, wait_until


class Ring(unittest.TestCase):
    """What is kept, and what is given up."""

    def setUp(self) -> None:
        self.clock = FakeClock()
        self.events = FleetEvents(clock=self.clock, wall_clock=self.clock)

    def test_an_event_has_its_time_and_its_words(self) -> None:
        self.events.record(KERNEL_DROPS, message="12 datagrams")
        self.clock.move(2)
        self.events.record(APPEARED, "a", "engine appeared", time_ms=1_001_500)
        self.assertEqual(
            self.events.documents(),
            [
                {
                    "time_ms": 1_000_000,
                    "event": "kernel_drops",
                    "engine_id": None,
                    "message": "12 datagrams",
                    "count": 1,
                },
                {"time_ms": 1_001_500, "event": "appeared", "engine_id": "a", "message": "engine appeared", "count": 1},
            ],
        )
        self.assertEqual(len(self.events.documents(1_001_500)), 1)
        self.assertEqual(self.events.documents(1_001_501), [])

    def test_the_first_ten_of_a_second_stand_alone_and_the_rest_are_one(self) -> None:
        for number in range(812):
            self.events.record(WENT_STALE, f"e{number}")
        self.events.record(CAME_BACK, "other")
        told = self.events.documents()
        self.assertEqual([event["count"] for event in told], [1] * MAX_ALONE + [812 - MAX_ALONE, 1])
        self.assertEqual(told[MAX_ALONE]["engine_id"], f"e{MAX_ALONE}", "named after its first")
        self.clock.move(1.0)
        self.events.record(WENT_STALE, "later")
        self.assertEqual(self.events.documents()[-1]["count"], 1)

    def test_several_at_once_count_as_many(self) -> None:
        self.events.record(WENT_STALE, "a", count=5)
        self.events.record(WENT_STALE, "b", count=7)
        (event,) = self.events.documents()
        self.assertEqual((event["engine_id"], event["count"]), ("a", 12))

    def test_a_flood_that_lasts_pushes_out_only_its_own_kind(self) -> None:
        self.events.record(REMOVED, "precious")
        for number in range(40 * MAX_EVENTS):
            self.events.record(APPEARED, f"e{number}")
            self.clock.move(0.01)
        told = self.events.documents()
        self.assertEqual(len(told), MAX_EVENTS)
        self.assertEqual(told[0]["engine_id"], "precious")
        self.assertGreater(told[-1]["time_ms"], told[1]["time_ms"])

    def test_every_event_is_counted_once(self) -> None:
        for number in range(300):
            self.events.record(WENT_STALE, f"e{number}")
            self.clock.move(0.02)
        self.assertEqual(sum(event["count"] for event in self.events.documents()), 300)

    def test_two_mib_hold_all_events_and_samples_whatever_engines_are_called(self) -> None:
        stats: dict[str, Any] = {
            "counters": {f"a_counter_of_some_name_{number}": 2**53 - number for number in range(40)},
            "fleet": {"scheduling_modes": {}, "phases": {}},
        }
        tracemalloc.start()
        self.addCleanup(tracemalloc.stop)
        events = FleetEvents(clock=self.clock, wall_clock=self.clock)
        samples = FleetSamples(lambda: stats, clock=self.clock, wall_clock=self.clock)
        kinds = itertools.cycle(EVENT_KINDS)
        for number in range(2 * MAX_EVENTS):
            events.record(next(kinds), f"{number:06}" + "\U0001f600" * 250, "\U0001f600" * 10_000)
            self.clock.move(0.1)
        for number in range(MAX_SAMPLES + 10):
            names = {f"{number}-{other}-" + chr(0x4E00 + 7 * number + other) * 50: other for other in range(300)}
            stats["fleet"] = {"scheduling_modes": names, "phases": names}
            stats |= {f"counter_{other}": number**3 * other % 10_000_019 for other in range(60)}
            self.clock.move(10)
            self.assertTrue(samples.take_due())
        names.clear()
        stats.clear()
        kept, _ = tracemalloc.get_traced_memory()
        self.assertEqual(len(events.documents()), MAX_EVENTS)
        self.assertEqual(len(json.loads(samples.json_text())), MAX_SAMPLES)
        self.assertLess(kept, 2 << 20)


class Notes(unittest.TestCase):
    """What the store notes for later costs no more in a flood."""

    def test_the_first_are_kept_and_the_others_counted(self) -> None:
        notes = EventNotes()
        for number in range(1000):
            notes.note(APPEARED, f"e{number}", number)
        notes.note(CAME_BACK, "x")
        taken = notes.take()
        self.assertEqual(len(taken), MAX_ALONE + 2)
        self.assertEqual(taken[0], (APPEARED, "e0", 0, 1, ""))
        self.assertEqual(taken[MAX_ALONE], (APPEARED, f"e{MAX_ALONE}", MAX_ALONE, 1000 - MAX_ALONE, ""))
        self.assertEqual(taken[-1], (CAME_BACK, "x", None, 1, ""))
        self.assertEqual(notes.take(), [])


class Lives(unittest.TestCase):
    """The store tells each event in an engine's life once."""

    def test_a_life_is_told_in_order_and_once(self) -> None:
        clock = FakeClock()
        events = FleetEvents(clock=clock, wall_clock=clock)
        store = StateStore(2000, 6000, 100, 3, events=events, clock=clock)

        def pass_time(seconds: float) -> None:
            clock.move(seconds)
            store.advance_watermark(clock())
            for _ in range(2):
                store.sweep()

        def push() -> None:
            store.apply(batch(clock(), 1.0, datagram(engine_id="a", timestamp_ms=int(clock() * 1000))))

        push()
        pass_time(0.1)
        push()
        pass_time(2.5)
        push()
        pass_time(0.1)
        pass_time(7.0)
        told = [(event["event"], event["engine_id"]) for event in events.documents()]
        self.assertEqual(told, [("appeared", "a"), ("stale", "a"), ("live", "a"), ("removed", "a")])

    def test_a_conflict_is_told_once_with_both_sources_however_long_it_lasts(self) -> None:
        clock = FakeClock()
        events = FleetEvents(clock=clock, wall_clock=clock)
        store = StateStore(2000, 6000, 100, 3, events=events, clock=clock)

        def conflicts() -> list[str]:
            return [event["message"] for event in events.documents() if event["event"] == "conflict"]

        def push_in_turn(times: int) -> None:
            for number in range(times):
                clock.move(0.2)
                one = datagram(engine_id="a", timestamp_ms=int(clock() * 1000), pending_tokens_total=number)
                store.apply(batch(clock(), 1.0, one, source=f"10.0.0.{number % 2 + 1}:5000"))
                store.sweep()

        push_in_turn(50)
        (told,) = conflicts()
        self.assertRegex(told, r"^from 10\.0\.0\.[12]:5000 and 10\.0\.0\.[12]:5000: several senders use one engine_id")
        self.assertTrue("10.0.0.1:" in told and "10.0.0.2:" in told, told)
        clock.move(2.5)  # nothing for longer than the threshold: it is over
        push_in_turn(50)
        self.assertEqual(len(conflicts()), 2)


class InTheDaemon(unittest.TestCase):
    """/events tells what happened to engines, to the log and to the gateway."""

    def test_it_tells_of_engines_and_of_the_start(self) -> None:
        with daemon(BIND_ADDRESS="127.0.0.1", STALE_THRESHOLD=200, EXPIRE_AFTER=1000) as running:
            running.send(datagram(engine_id="a"))

            def kinds() -> list[str]:
                return [event["event"] for event in running.ask("/events").json]

            wait_until("the removal", lambda: "removed" in kinds())
            self.assertEqual(kinds(), ["gateway_started", "appeared", "stale", "removed"])
            started = running.ask("/events").json[0]
            self.assertIn("network mode: unicast", started["message"])
            self.assertEqual(running.ask(f"/events?since={started['time_ms']}").json[0], started)

    def test_it_tells_of_a_log_that_fails_and_of_one_that_works_again(self) -> None:
        with daemon(BIND_ADDRESS="127.0.0.1", STALE_THRESHOLD=60_000, LOG_FILE="folder/log.jsonl") as running:
            folder = Path(running.stats()["log"]["file"]).parent
            away = folder.with_name("away")
            folder.rename(away)
            folder.write_text("no folder any more")

            def told(kind: str) -> bool:
                running.send(datagram(engine_id="a", timestamp_ms=next(numbers)))
                return kind in [event["event"] for event in running.ask("/events").json]

            numbers = itertools.count(1)
            wait_until("the trouble", lambda: told("log_trouble"))
            folder.unlink()
            away.rename(folder)
            wait_until("its end", lambda: told("log_recovered"))

    def test_it_tells_of_its_own_pause(self) -> None:
        with daemon(BIND_ADDRESS="127.0.0.1", STALE_THRESHOLD=60_000) as running:
            running.signal(signal.SIGSTOP)
            stopped_at = time.monotonic()
            wait_until("more than a second", lambda: time.monotonic() - stopped_at > 1.6)
            running.signal(signal.SIGCONT)
            wait_until("the event", lambda: "paused" in [event["event"] for event in running.ask("/events").json])

    def test_every_kind_has_a_name_that_is_a_word(self) -> None:
        for kind in fleet_events.EVENT_KINDS:
            self.assertRegex(kind, "^[a-z_]+$")


if __name__ == "__main__":
    unittest.main()
