"""What becomes of a valid datagram, and the life of an engine (the contract's section 2), by a clock moved by hand."""

from __future__ import annotations

import threading
import unittest
from typing import Any
from unittest import mock

from config import read_config
from engine_view import EngineView
from state_store import Batch, StateStore
from table_room import MAX_HISTORY_BYTES
from tests.harness import CAPTURED, DEADLINE_S, PLACEHOLDERS, FakeClock, batch, datagram, parse_datagram

STALE_MS = 2000
EXPIRE_MS = 6000
WALL_S = 1_755_532_567.5


class StoreCase(unittest.TestCase):
    canonical = False  # at the end of this file every test runs again, with canonical datagrams

    def setUp(self) -> None:
        self.clock = FakeClock()
        self.store = self.make_store()

    def make_store(self, *, max_engines: int = 1000, history: int = 100) -> StateStore:
        return StateStore(STALE_MS, EXPIRE_MS, max_engines, history, clock=self.clock)

    def batch(self, *datagrams: bytes) -> Batch:
        """Valid datagrams that arrive now, matched as canonical ones, or parsed."""
        return batch(self.clock(), WALL_S + self.clock(), *datagrams, canonical=self.canonical)

    def send(self, store: StateStore | None = None, **changes: Any) -> str:
        """Take one datagram now; returns its outcome."""
        (outcome,) = (store or self.store).apply(self.batch(datagram(**changes)))
        return outcome

    def beat(self, **changes: Any) -> str:
        return self.send(**{**PLACEHOLDERS, **changes})

    def view(self, engine_id: str = "test") -> EngineView:
        view = self.store.view(engine_id)
        assert view is not None, f"{engine_id} is not known"
        return view

    def sweep(self) -> int:
        """Sweep, with everything taken that had arrived by now."""
        self.store.advance_watermark(self.clock())
        return self.store.sweep()


class Accepted(StoreCase):
    """A state that is newer than or as new as what is held replaces it."""

    def test_the_newest_state_is_shown(self) -> None:
        self.assertEqual(self.send(timestamp_ms=1000, pending_tokens_total=1), "accepted")
        self.assertEqual(self.send(timestamp_ms=1200, pending_tokens_total=2), "accepted")
        self.assertEqual(self.view().state.pending_tokens_total, 2)

    def test_a_clock_that_stands_still_silences_nobody(self) -> None:
        for pending in range(5):
            self.assertEqual(self.send(timestamp_ms=1000, pending_tokens_total=pending), "accepted")
        self.assertEqual(self.view().state.pending_tokens_total, 4)

    def test_a_clock_of_1970_is_live(self) -> None:
        self.send(timestamp_ms=1234567890)
        self.assertEqual(self.view().status, "live")

    def test_what_is_shown_is_the_state_s_receipt_and_source(self) -> None:
        self.send(timestamp_ms=1000)
        view = self.view()
        self.assertEqual(view.received_ms, int((WALL_S + 1000) * 1000))
        self.assertEqual(view.clock_offset_ms, view.received_ms - 1000)
        self.assertEqual(view.source, "10.0.0.1:5000")
        self.assertFalse(view.heartbeat)


class Duplicates(StoreCase):
    """The same eight fields again are counted as heard, and change nothing."""

    def test_three_copies_are_one_state_and_two_duplicates(self) -> None:
        self.assertEqual([self.send() for _ in range(3)], ["accepted", "duplicate", "duplicate"])
        self.assertEqual(
            [self.beat(timestamp_ms=1234567891) for _ in range(3)], ["heartbeat", "duplicate", "duplicate"]
        )
        counters = self.store.counters()
        self.assertEqual((counters["accepted"], counters["heartbeats"], counters["duplicates"]), (1, 1, 4))
        self.assertEqual((counters["valid_states"], counters["total_received"]), (6, 6))

    def test_three_copies_of_a_late_datagram_are_one_late_and_two_duplicates(self) -> None:
        self.send(timestamp_ms=2000)
        self.assertEqual([self.send(timestamp_ms=1000) for _ in range(3)], ["out_of_order", "duplicate", "duplicate"])

    def test_one_field_that_differs_is_no_duplicate(self) -> None:
        self.send()
        for change in (
            {"latency_pred_ms": 1.0},
            {"scheduling_mode": "balanced"},
            {"pending_tokens_total": 11},
            {"kv_cache_free_blocks": 99},
            {"kv_cache_total_blocks": 999},
            {"engine_capacity": 1.0},
        ):
            with self.subTest(change):
                self.assertEqual(self.send(**change), "accepted")

    def test_a_duplicate_keeps_the_engine_alive_but_not_its_state_fresh(self) -> None:
        self.send()
        self.clock.move(1.9)
        self.assertEqual(self.send(), "duplicate")
        self.clock.move(1.9)
        view = self.view()
        self.assertEqual((view.status, view.age_ms, view.state_age_ms), ("live", 1900, 3800))

    def test_the_same_state_from_a_stale_engine_is_news(self) -> None:
        self.send()
        self.clock.move(2.1)
        self.assertEqual(self.send(), "accepted")


class OrderAndRestarts(StoreCase):
    """What comes late is not shown; a clock that jumps is an engine that restarted, and is believed."""

    def test_a_late_datagram_changes_nothing_but_is_heard(self) -> None:
        self.send(timestamp_ms=10_000, pending_tokens_total=1)
        self.clock.move(1.0)
        self.assertEqual(self.send(timestamp_ms=9_999, pending_tokens_total=2), "out_of_order")
        view = self.view()
        self.assertEqual((view.state.pending_tokens_total, view.age_ms, view.state_age_ms), (1, 0, 1000))

    def test_up_to_the_threshold_is_late_and_more_is_a_restart(self) -> None:
        self.send(timestamp_ms=10_000)
        self.assertEqual(self.send(timestamp_ms=8_000), "out_of_order")
        self.assertEqual(self.send(timestamp_ms=7_999), "accepted")
        self.assertEqual(self.view().state.timestamp_ms, 7_999)

    def test_after_a_restart_order_is_judged_by_the_new_clock(self) -> None:
        self.send(timestamp_ms=3_600_000)
        self.assertEqual(self.send(timestamp_ms=1_000), "accepted")
        self.assertEqual(self.send(timestamp_ms=1_200), "accepted")
        self.assertEqual(self.send(timestamp_ms=1_100), "out_of_order")

    def test_one_bad_timestamp_far_ahead_silences_nobody(self) -> None:
        self.send(timestamp_ms=10_000)
        self.assertEqual(self.send(timestamp_ms=2**53), "accepted")
        for timestamp in (10_200, 10_400, 10_600):
            self.assertEqual(self.send(timestamp_ms=timestamp), "accepted")

    def test_an_hour_back_and_an_hour_forward_are_believed(self) -> None:
        for timestamp in (7_200_000, 3_600_000, 10_800_000, 10_800_200):
            self.assertEqual(self.send(timestamp_ms=timestamp), "accepted")

    def test_a_stale_engine_may_come_back_with_any_clock(self) -> None:
        self.send(timestamp_ms=10_000)
        self.clock.move(2.1)
        self.assertEqual(self.send(timestamp_ms=9_999), "accepted")
        self.assertEqual(self.send(timestamp_ms=10_000), "accepted")

    def test_reordered_states_end_on_the_newest(self) -> None:
        outcomes = [self.send(timestamp_ms=timestamp) for timestamp in (1000, 1400, 1200, 1600)]
        self.assertEqual(outcomes, ["accepted", "accepted", "out_of_order", "accepted"])
        self.assertEqual(self.view().state.timestamp_ms, 1600)

    def test_a_heartbeat_may_come_late_too(self) -> None:
        self.send(timestamp_ms=10_000)
        self.assertEqual(self.beat(timestamp_ms=9_900), "out_of_order")
        self.assertEqual(self.store.counters()["heartbeats"], 0)


class LateLoad(StoreCase):
    """A load state that only heartbeats overtook on the way is newer load than what is shown, and is shown."""

    def pending(self) -> int:
        return self.view().state.pending_tokens_total

    def test_a_push_and_a_heartbeat_that_swapped_places(self) -> None:
        self.send(timestamp_ms=10_000, pending_tokens_total=1)
        self.clock.move(0.2)
        self.assertEqual(self.beat(timestamp_ms=10_201), "heartbeat")
        self.assertEqual(self.send(timestamp_ms=10_200, pending_tokens_total=2), "accepted")
        self.assertEqual((self.pending(), self.view().state_age_ms), (2, 0))
        self.assertEqual([past.pending_tokens_total for past, _ in self.store.history("test") or []], [1, 2])

    def test_several_pushes_behind_one_heartbeat_are_in_order_among_themselves(self) -> None:
        self.send(timestamp_ms=10_000, pending_tokens_total=1)
        self.beat(timestamp_ms=10_900)
        outcomes = [self.send(timestamp_ms=stamp, pending_tokens_total=stamp) for stamp in (10_400, 10_200, 10_600)]
        self.assertEqual(outcomes, ["accepted", "out_of_order", "accepted"])
        self.assertEqual(self.pending(), 10_600)

    def test_the_same_again_is_a_duplicate(self) -> None:
        self.beat(timestamp_ms=10_001)
        self.assertEqual([self.send(timestamp_ms=10_000) for _ in range(3)], ["accepted", "duplicate", "duplicate"])

    def test_a_load_that_is_no_newer_than_the_one_shown_stays_late(self) -> None:
        self.send(timestamp_ms=10_000, pending_tokens_total=1)
        self.beat(timestamp_ms=10_500)
        for stamp in (10_000, 9_999, 8_600):
            self.assertEqual(self.send(timestamp_ms=stamp, pending_tokens_total=2), "out_of_order")
        self.assertEqual(self.pending(), 1)

    def test_a_load_state_that_a_load_state_overtook_stays_late(self) -> None:
        self.send(timestamp_ms=10_500)
        self.beat(timestamp_ms=10_600)
        self.assertEqual(self.send(timestamp_ms=10_400), "out_of_order")

    def test_order_among_heartbeats_is_as_before(self) -> None:
        self.send(timestamp_ms=10_000)
        self.beat(timestamp_ms=10_500)
        self.send(timestamp_ms=10_400)
        self.assertEqual(self.beat(timestamp_ms=10_450), "out_of_order")
        self.assertEqual(self.beat(timestamp_ms=10_550), "heartbeat")

    def test_after_heartbeats_only_the_first_load_is_shown_though_it_is_late(self) -> None:
        self.beat(timestamp_ms=10_000)
        self.assertEqual(self.send(timestamp_ms=9_999), "accepted")
        self.assertFalse(self.view().heartbeat)

    def test_what_was_shown_before_a_restart_or_a_silence_does_not_count(self) -> None:
        for silence_s in (0.0, 2.1):
            with self.subTest(silence_s=silence_s):
                engine_id = f"after {silence_s}"
                self.send(engine_id=engine_id, timestamp_ms=3_600_000)
                self.clock.move(silence_s)
                self.beat(engine_id=engine_id, timestamp_ms=1_001)
                self.assertEqual(self.send(engine_id=engine_id, timestamp_ms=1_000), "accepted")
                self.assertEqual(self.view(engine_id).state.timestamp_ms, 1_000)

    def test_behind_by_more_than_the_threshold_is_a_restart_as_ever(self) -> None:
        self.send(timestamp_ms=10_000)
        self.beat(timestamp_ms=13_000)
        self.assertEqual(self.send(timestamp_ms=10_999), "accepted")
        self.assertEqual(self.send(timestamp_ms=10_998), "out_of_order")


class HeartbeatRule(StoreCase):
    """A busy engine never looks idle because its agent's heartbeat arrived; an idle one is never missing."""

    def test_a_busy_engine_never_shows_a_heartbeat(self) -> None:
        """Pushes every 200 ms, heartbeats every 2000 ms, a look every 10 ms, for 60 s."""
        looks = idle = 0
        for ms in range(0, 60_000, 10):
            if ms % 200 == 0:
                self.send(timestamp_ms=ms, pending_tokens_total=5000)
            if ms % 2000 == 50:
                self.assertEqual(self.beat(timestamp_ms=ms), "heartbeat")
            looks += 1
            idle += self.view().heartbeat or self.view().state.pending_tokens_total == 0
            self.clock.move(0.010)
        self.assertEqual((looks, idle), (6000, 0))
        self.assertEqual(self.store.counters()["heartbeats"], 30)

    def test_a_heartbeat_is_heard_while_the_load_state_stays(self) -> None:
        self.send(timestamp_ms=1000)
        self.clock.move(1.5)
        self.beat(timestamp_ms=2500)
        view = self.view()
        self.assertEqual((view.heartbeat, view.age_ms, view.state_age_ms), (False, 0, 1500))

    def test_up_to_the_threshold_the_load_state_stays_and_then_the_heartbeat_shows(self) -> None:
        self.send(timestamp_ms=1000)
        self.clock.move(1.0)
        self.beat(timestamp_ms=2000)
        self.clock.move(1.0)
        self.beat(timestamp_ms=3000)
        self.assertFalse(self.view().heartbeat)
        self.clock.move(0.1)
        self.beat(timestamp_ms=3100)
        self.assertTrue(self.view().heartbeat)
        self.assertEqual(self.view().state_age_ms, 0)

    def test_the_first_thing_heard_may_be_a_heartbeat_and_the_next_replaces_it(self) -> None:
        self.beat(timestamp_ms=1000)
        self.assertTrue(self.view().heartbeat)
        self.clock.move(0.5)
        self.beat(timestamp_ms=1500)
        self.assertEqual((self.view().state.timestamp_ms, self.view().state_age_ms), (1500, 0))

    def test_a_load_state_replaces_a_heartbeat_at_once(self) -> None:
        self.beat(timestamp_ms=1000)
        self.assertEqual(self.send(timestamp_ms=1000), "accepted")
        self.assertFalse(self.view().heartbeat)

    def test_an_engine_that_only_sends_heartbeats_is_never_missing(self) -> None:
        for beat in range(100):
            self.beat(timestamp_ms=beat * 2000)
            for _ in range(20):
                self.clock.move(0.1)
                self.sweep()
                self.assertEqual(len(self.store.views()), 1)
        self.assertEqual(self.store.counters()["expired_engines"], 0)

    def test_a_heartbeat_from_an_engine_whose_clock_went_back_is_order_s_new_start(self) -> None:
        self.send(timestamp_ms=3_600_000)
        self.beat(timestamp_ms=1000)
        self.assertEqual(self.send(timestamp_ms=1100), "accepted")


class Capacity(StoreCase):
    """MAX_ENGINES bounds the table; those that are known keep their place."""

    def test_a_flood_of_names_leaves_the_known_engines_alone(self) -> None:
        self.store = self.make_store(max_engines=3)
        for engine_id in ("a", "b", "c"):
            self.send(engine_id=engine_id)
        outcomes = {self.send(engine_id=f"invented-{n}") for n in range(1000)}
        self.assertEqual(outcomes, {"rejected_capacity"})
        self.assertEqual(self.send(engine_id="b", timestamp_ms=1234567999), "accepted")
        self.assertEqual([view.state.engine_id for view in self.store.views()], ["a", "b", "c"])
        self.assertEqual(self.store.counters()["rejected_capacity"], 1000)

    def test_a_place_is_free_again_once_an_engine_is_removed(self) -> None:
        self.store = self.make_store(max_engines=1)
        self.send(engine_id="a")
        self.clock.move(6.1)
        self.assertEqual(self.send(engine_id="b"), "rejected_capacity")
        self.sweep()
        self.assertEqual(self.send(engine_id="b"), "accepted")


class Life(StoreCase):
    """Live up to the threshold, stale until the expiry, then removed: by the gateway's own clock alone."""

    def test_live_then_stale_then_removed(self) -> None:
        self.send()
        for seconds, status in ((2.0, "live"), (0.001, "stale"), (3.999, "stale")):
            self.clock.move(seconds)
            self.assertEqual(self.sweep(), 0)
            self.assertEqual(self.view().status, status)
        self.clock.move(0.001)
        self.assertEqual(self.sweep(), 1)
        self.assertIsNone(self.store.view("test"))
        self.assertEqual(self.store.counters()["expired_engines"], 1)

    def test_staleness_is_judged_without_the_reaper(self) -> None:
        self.send()
        self.clock.move(2.001)
        self.assertEqual(self.store.counts(), (0, 1))
        self.clock.move(3600)
        self.assertEqual(self.view().status, "stale")

    def test_all_engines_that_fall_silent_are_removed_without_any_further_datagram(self) -> None:
        for number in range(50):
            self.send(engine_id=f"e{number}")
        self.clock.move(6.001)
        self.assertEqual(self.sweep(), 50)
        self.assertEqual(self.store.counts(), (0, 0))

    def test_what_waits_in_the_socket_is_taken_before_anything_is_removed(self) -> None:
        """The gateway is paused for longer than the expiry, and the reaper wakes up before the listener."""
        self.send(timestamp_ms=1000)
        self.store.advance_watermark(self.clock())
        self.clock.move(10)
        self.assertEqual(self.store.sweep(), 0)
        self.send(timestamp_ms=11_000)
        self.store.advance_watermark(self.clock())
        self.assertEqual(self.store.sweep(), 0)
        self.assertEqual(self.view().status, "live")

    def test_an_engine_that_comes_back_is_live_at_once(self) -> None:
        self.send(timestamp_ms=1000)
        self.clock.move(5)
        self.sweep()
        self.send(timestamp_ms=6000)
        self.assertEqual(self.view().status, "live")

    def test_changes_are_logged_and_not_one_line_each(self) -> None:
        for number in range(500):
            self.send(engine_id=f"e{number}")
        with self.assertLogs("elrar.store", "INFO") as logged:
            self.sweep()
            self.clock.move(3)
            self.sweep()
            self.clock.move(4)
            self.sweep()
        said = [record.getMessage() for record in logged.records]
        self.assertEqual(len(said), 3, said)
        self.assertRegex(said[0], "engine appeared count=500, such as 'e0'")
        self.assertRegex(said[1], "engine went stale count=500")
        self.assertRegex(said[2], "engine removed count=500")


class History(StoreCase):
    """The latest states that the table showed, oldest first, each with its receipt."""

    def test_the_latest_are_kept_oldest_first(self) -> None:
        self.store = self.make_store(history=3)
        for number in range(1, 8):
            self.send(timestamp_ms=1000 * number, pending_tokens_total=number, latency_pred_ms=number / 7)
            past = self.store.history("test")
            assert past is not None
            expected = range(max(1, number - 2), number + 1)
            self.assertEqual([state.pending_tokens_total for state, _ in past], list(expected))
            self.assertEqual([state.latency_pred_ms for state, _ in past], [n / 7 for n in expected])
            self.assertEqual(past[-1].received_ms, self.view().received_ms)
            self.clock.move(1.0)

    def test_what_is_accounted_for_is_what_is_held(self) -> None:
        self.store = self.make_store(history=5)
        for number in range(60):
            self.send(engine_id=f"e{number % 3}", timestamp_ms=10**number if number < 15 else 10**14 + number)
            histories = [engine.history for engine in self.store._engines.values()]
            self.assertEqual(self.store._history_bytes, sum(history.nbytes for history in histories))
            records = [record for history in histories for record in history.records()]
            self.assertLessEqual(len(records), 3 * (5 + 2 * 7), "more than is needed by two incomplete joins")
            self.assertLessEqual(len(self.store.history("e0") or []), 5)

    def test_every_length_of_it_is_kept_exactly(self) -> None:
        for history in (1, 2, 7, 8, 9, 16, 17, 100):
            self.store = self.make_store(history=history)
            for number in range(1, 3 * history + 20):
                self.send(timestamp_ms=1000 * number)
                past = [state.timestamp_ms // 1000 for state, _ in self.store.history("test") or []]
                self.assertEqual(past, list(range(max(1, number - history + 1), number + 1)), history)

    def test_it_is_exact_and_whole(self) -> None:
        for number in range(20):
            self.send(timestamp_ms=2**53 - 20 + number, kv_cache_free_blocks=2**53, scheduling_mode=f"mode {number}")
            past = self.store.history("test")
            assert past is not None
            self.assertEqual(past[-1].state, self.view().state)

    def test_late_and_repeated_states_and_hidden_heartbeats_are_not_in_it(self) -> None:
        self.send(timestamp_ms=1000)
        self.send(timestamp_ms=1000)
        self.send(timestamp_ms=900)
        self.beat(timestamp_ms=1100)
        self.assertEqual([state.timestamp_ms for state, _ in self.store.history("test") or []], [1000])

    def test_none_is_kept_where_none_is_wanted(self) -> None:
        self.store = self.make_store(history=0)
        self.send()
        self.assertEqual(self.store.history("test"), [])

    def test_all_histories_together_are_bounded_and_the_newest_state_is_always_kept(self) -> None:
        with mock.patch("table_room.MAX_HISTORY_BYTES", 10_000):
            self.store = self.make_store()
            for number in range(1000):
                self.send(engine_id=f"e{number % 50}", timestamp_ms=number, scheduling_mode="m" * 64)
                past = self.store.history(f"e{number % 50}") or []
                self.assertEqual(past[-1].state.timestamp_ms, number)
        kept = [len(self.store.history(f"e{number}") or []) for number in range(50)]
        self.assertEqual(min(kept), 1)
        self.assertLess(sum(kept), 150)

    def test_by_default_every_engine_has_room_for_all_of_it(self) -> None:
        default = read_config({})
        self.store = self.make_store(history=default.history)
        largest = 0
        for number in range(2 * default.history):
            self.send(
                timestamp_ms=1_755_532_567_495 + number,
                latency_pred_ms=21.253122228102537,
                scheduling_mode="throughput_optimized",
                pending_tokens_total=50_000,
                kv_cache_free_blocks=10_000,
                kv_cache_total_blocks=10_000,
                engine_capacity=59768.2749641796,
            )
            largest = max(largest, self.store._history_bytes)
        self.assertLess(largest * default.max_engines, MAX_HISTORY_BYTES)

    def test_what_a_removed_engine_had_is_free_again(self) -> None:
        for number in range(300):
            self.send(engine_id=f"e{number % 3}", timestamp_ms=number)
        self.assertGreater(self.store._history_bytes, 0)
        self.store.collect_changes()  # somebody watches, and is told of them later
        self.clock.move(7)
        self.sweep()
        self.assertEqual(self.store._history_bytes, 0)
        self.assertEqual([engine.history.records() for engine in self.store._feed.removed], [[], [], []])

    def test_an_unknown_engine_has_none(self) -> None:
        self.assertIsNone(self.store.history("nobody"))


class Counters(StoreCase):
    """Every datagram is counted once, and the sum is right at every moment that a reader can see."""

    def test_the_counters_add_up_at_every_moment_under_load(self) -> None:
        some = self.batch(*(datagram(engine_id=f"e{n % 7}", timestamp_ms=n) for n in range(50)))
        some.rejected_source, some.invalid = 1, ["not_json", "too_large"]
        done = threading.Event()
        wrong: list[object] = []

        def look() -> None:
            while not done.is_set():
                counters = self.store.counters()
                total = (
                    counters["valid_states"]
                    + counters["invalid_states"]
                    + counters["rejected_capacity"]
                    + counters["rejected_source"]
                )
                if total != counters["total_received"] or counters["total_received"] % 53:
                    wrong.append(counters)
                for view in self.store.views():
                    if view.age_ms > view.state_age_ms:
                        wrong.append(view)

        readers = [threading.Thread(target=look, daemon=True) for _ in range(2)]
        for reader in readers:
            reader.start()
        for _ in range(1000):
            self.store.apply(some)
        done.set()
        for reader in readers:
            reader.join(DEADLINE_S)
        self.assertEqual(wrong, [])
        self.assertEqual(self.store.counters()["total_received"], 53_000)
        self.assertEqual(self.store.counters()["invalid_reasons"]["too_large"], 1000)

    def test_a_copy_does_not_change(self) -> None:
        before = self.store.counters()
        self.store.apply(Batch(self.clock(), WALL_S, invalid=["not_json"]))
        self.assertEqual((before["total_received"], before["invalid_reasons"]["not_json"]), (0, 0))

    @unittest.skipUnless(CAPTURED.exists(), "the captured states are not on this machine")
    def test_a_real_engine_s_minute_is_all_accepted(self) -> None:
        import json

        for line in CAPTURED.read_text().splitlines():
            self.assertEqual(self.send(**json.loads(line)["state"]), "accepted")
            self.clock.move(0.2)
        self.assertEqual(self.store.counters()["accepted"], 295)


class Names(StoreCase):
    """An engine is found by exactly its name."""

    def test_a_name_is_no_other_one(self) -> None:
        names = ("a?", "a\\", 'a"b', "引擎", "😀", "a\\u0041")
        for name in names:
            self.send(engine_id=name)
        for name in names:
            self.assertEqual(self.view(name).state.engine_id, name)
            self.assertEqual(len(self.store.history(name) or []), 1)
        for name in ("a\ud800", "a", "aA", '"a?"', "", "\\ud83d\\ude00"):
            self.assertIsNone(self.store.view(name), name)
            self.assertIsNone(self.store.history(name), name)
            self.assertEqual(self.store.snapshot_of([name])[1], [])


class Mixed(StoreCase):
    """A canonical datagram and a parsed one are the same state."""

    canonical = True

    def test_the_same_state_written_in_another_way_is_a_duplicate(self) -> None:
        self.assertEqual(self.send(latency_pred_ms=100.0), "accepted")
        for one in (
            datagram().replace(b" ", b""),
            datagram().replace(b"100.0", b"100.00"),
            datagram().replace(b"100.0", b"1e2"),
            datagram(),
        ):
            with self.subTest(one):
                self.assertEqual(self.store.apply(self.batch(one)), ["duplicate"])

    def test_what_a_reader_sees_is_the_parsed_state(self) -> None:
        self.send(latency_pred_ms=16.11793779048644)
        self.assertEqual(self.view().state, parse_datagram(datagram(latency_pred_ms=16.11793779048644)))


class AcceptedOfCanonicalDatagrams(Accepted):
    canonical = True


class DuplicatesOfCanonicalDatagrams(Duplicates):
    canonical = True


class OrderAndRestartsOfCanonicalDatagrams(OrderAndRestarts):
    canonical = True


class LateLoadOfCanonicalDatagrams(LateLoad):
    canonical = True


class HeartbeatRuleOfCanonicalDatagrams(HeartbeatRule):
    canonical = True


class CapacityOfCanonicalDatagrams(Capacity):
    canonical = True


class LifeOfCanonicalDatagrams(Life):
    canonical = True


class HistoryOfCanonicalDatagrams(History):
    canonical = True


class CountersOfCanonicalDatagrams(Counters):
    canonical = True


class NamesOfCanonicalDatagrams(Names):
    canonical = True


if __name__ == "__main__":
    unittest.main()
