"""What becomes of datagrams with `boot`, `seq`, `phase` and further fields (the contract's sections 1 and 2)."""

from __future__ import annotations

import json
import random
import unittest
from typing import Any
from unittest import mock

from engine_agent import DatagramWriter, Load
from engine_state import NOTHING_FURTHER, match_labelled, parse
from engine_view import EngineView
from known_engine import KnownEngine
from state_entry import entry
from state_store import StateStore
from tests.harness import PLACEHOLDERS, FakeClock, batch, datagram, match_canonical

STALE_MS, EXPIRE_MS = 2000, 6000
WALL_S = 1_755_532_567.5
AGENT = {
    "boot": "a1b2c3d4e5f60718",
    "seq": 1,
    "phase": "serving",
    "model": "tiny",
    "num_requests_running": 1,
    "num_requests_waiting": 0,
    "engine": "vllm 0.33.0",
    "agent": "1.0.0",
}


def agent(**changes: Any) -> bytes:
    """A datagram as `engine_agent.py` writes it; a change of None leaves the name out."""
    said = {**AGENT, **changes}
    return datagram(**{name: value for name, value in said.items() if value is not None})


class NumberedCase(unittest.TestCase):
    """What the cases share: a store by a clock moved by hand, and datagrams as agents send them."""

    canonical = False  # each case is run again with datagrams that are matched instead of parsed

    def setUp(self) -> None:
        self.clock = FakeClock()
        self.store = self.make_store()

    def make_store(self, **changes: Any) -> StateStore:
        settings = {"max_engines": 1000, "history": 100, **changes}
        return StateStore(STALE_MS, EXPIRE_MS, settings.pop("max_engines"), settings.pop("history"), clock=self.clock,
                          **settings)  # fmt: skip

    def take(self, one: bytes, *, source: str = "10.0.0.1:5000") -> str:
        (outcome,) = self.store.apply(
            batch(self.clock(), WALL_S + self.clock(), one, canonical=self.canonical, source=source)
        )
        return outcome

    def send(self, **changes: Any) -> str:
        """An agent's datagram; `timestamp_ms` is the clock's if it is not given."""
        return self.take(agent(**{"timestamp_ms": int(self.clock() * 1000), **changes}))

    def beat(self, **changes: Any) -> str:
        return self.send(**{"phase": "starting", **PLACEHOLDERS, **changes})

    def plain(self, *, source: str = "10.0.0.1:5000", **changes: Any) -> str:
        """A datagram of the first edition."""
        return self.take(datagram(**{"timestamp_ms": int(self.clock() * 1000), **changes}), source=source)

    def view(self, engine_id: str = "test") -> EngineView:
        view = self.store.view(engine_id)
        assert view is not None, f"{engine_id} is not known"
        return view

    def count(self, name: str) -> Any:
        return self.store.counters()[name]

    def pending(self) -> int:
        return self.view().state.pending_tokens_total


class Order(NumberedCase):
    """With `boot` and `seq` order does not lean on clocks."""

    def test_the_number_says_what_is_newer_whatever_the_timestamp(self) -> None:
        self.assertEqual(self.send(seq=1, timestamp_ms=10_000, pending_tokens_total=1), "accepted")
        self.assertEqual(self.send(seq=2, timestamp_ms=9_000, pending_tokens_total=2), "accepted")
        self.assertEqual(self.send(seq=3, timestamp_ms=1, pending_tokens_total=3), "accepted")
        self.assertEqual(self.pending(), 3)
        self.assertEqual(self.view().restarts, 0)

    def test_the_same_number_again_is_a_duplicate_whatever_it_says(self) -> None:
        self.send(seq=1, pending_tokens_total=1)
        self.clock.move(1.0)
        self.assertEqual(self.send(seq=1, pending_tokens_total=2), "duplicate")
        self.assertEqual((self.pending(), self.view().age_ms, self.view().state_age_ms), (1, 0, 1000))

    def test_equal_states_with_new_numbers_are_no_duplicates(self) -> None:
        self.assertEqual([self.send(seq=seq, timestamp_ms=5) for seq in (1, 2, 3)], ["accepted"] * 3)

    def test_a_lower_number_is_out_of_order_and_heard(self) -> None:
        self.send(seq=1)
        self.send(seq=5, pending_tokens_total=5)
        self.clock.move(1.0)
        self.assertEqual(self.send(seq=3, pending_tokens_total=3, timestamp_ms=2**50), "out_of_order")
        self.assertEqual((self.pending(), self.view().age_ms), (5, 0))

    def test_a_number_lower_by_more_than_1000_began_again(self) -> None:
        self.send(seq=2**53, pending_tokens_total=1)
        self.assertEqual(self.send(seq=7, pending_tokens_total=2), "accepted")
        self.assertEqual(self.send(seq=8, pending_tokens_total=3), "accepted")
        self.assertEqual((self.pending(), self.view().lost, self.view().restarts), (3, 0, 0))

    def test_one_of_the_two_alone_is_as_if_neither_were_there(self) -> None:
        for missing in ("boot", "seq"):
            self.send(engine_id=missing, timestamp_ms=10_000, **{missing: None})
            self.assertEqual(self.send(engine_id=missing, timestamp_ms=9_000, **{missing: None}), "out_of_order")
            self.assertIsNone(self.view(missing).lost)


class Restarts(NumberedCase):
    """A boot never seen before is a restart, and what came of an earlier one is not taken for it."""

    def test_a_new_boot_is_accepted_and_counted(self) -> None:
        self.send(seq=900, boot="aa", pending_tokens_total=1)
        self.assertEqual(self.send(seq=1, boot="bb", timestamp_ms=1, pending_tokens_total=2), "accepted")
        self.assertEqual((self.pending(), self.view().restarts, self.count("restarts")), (2, 1, 1))
        self.assertEqual(self.view().lost, 0)

    def test_without_boot_a_timestamp_lower_by_more_than_the_threshold_is_one(self) -> None:
        self.plain(timestamp_ms=10_000)
        self.plain(timestamp_ms=8_000, pending_tokens_total=1)
        self.assertEqual(self.view().restarts, 0)
        self.plain(timestamp_ms=7_999)
        self.assertEqual((self.view().restarts, self.count("restarts")), (1, 1))

    def test_an_earlier_boot_is_out_of_order_while_the_current_one_is_heard(self) -> None:
        self.send(seq=1, boot="aa")
        self.send(seq=1, boot="bb", pending_tokens_total=2)
        for seq in (1, 2, 10_000):
            self.assertEqual(self.send(seq=seq, boot="aa", pending_tokens_total=1), "out_of_order")
        self.assertEqual(self.pending(), 2)

    def test_stragglers_do_not_keep_the_current_boot_in_its_place(self) -> None:
        self.send(seq=1, boot="aa")
        self.send(seq=1, boot="bb")
        for seq in range(2, 12):
            self.clock.move(0.2)
            self.assertEqual(self.send(seq=seq, boot="aa"), "out_of_order")
        self.clock.move(0.2)
        self.assertEqual(self.send(seq=12, boot="aa", pending_tokens_total=7), "accepted")
        self.assertEqual((self.pending(), self.view().restarts), (7, 1), "it was seen before")

    def test_a_heartbeat_of_a_new_boot_replaces_the_old_life_s_load(self) -> None:
        self.send(seq=1, boot="aa", pending_tokens_total=5000)
        self.clock.move(0.1)
        self.assertEqual(self.beat(seq=2, boot="aa"), "heartbeat")
        self.assertTrue(self.view().load_known)
        self.assertEqual(self.beat(seq=1, boot="bb"), "heartbeat")
        self.assertFalse(self.view().load_known)
        self.assertEqual(self.pending(), 0)

    def test_after_a_restart_a_late_load_of_the_new_life_is_shown(self) -> None:
        self.send(seq=50, boot="aa", pending_tokens_total=1)
        self.beat(seq=2, boot="bb")
        self.assertEqual(self.send(seq=1, boot="bb", pending_tokens_total=2), "accepted")
        self.assertEqual(self.pending(), 2)


class Lost(NumberedCase):
    """Gaps in `seq` are what was lost on the way; what comes late is taken off again, once."""

    def test_gaps_are_counted_by_engine_and_in_all(self) -> None:
        for seq in (10, 11, 15):
            self.send(seq=seq)
        for seq in (1, 4):
            self.send(seq=seq, engine_id="other")
        self.assertEqual((self.view().lost, self.view("other").lost), (3, 2))
        self.assertEqual((self.count("lost_states"), self.count("sequence_gap_states")), (5, 5))

    def test_a_late_one_that_was_not_taken_is_taken_off_and_a_repeated_one_is_not(self) -> None:
        for seq in (1, 4):
            self.send(seq=seq)
        self.assertEqual(
            [self.send(seq=3), self.send(seq=3), self.send(seq=1)], ["out_of_order", "duplicate", "duplicate"]
        )
        self.assertEqual((self.view().lost, self.count("lost_states"), self.count("late_states")), (1, 1, 1))

    def test_only_the_last_64_are_remembered(self) -> None:
        for seq in (1, 3, 2 + 64):
            self.send(seq=seq)
        before = self.view().lost
        self.assertEqual(self.send(seq=2), "out_of_order")
        self.assertEqual(self.view().lost, before)
        self.send(seq=4)
        self.assertEqual(self.view().lost, (before or 0) - 1)

    def test_gaps_above_1000_are_not_counted(self) -> None:
        self.send(seq=1)
        self.send(seq=1 + 1 + 1001)
        self.assertEqual(self.view().lost, 0)
        self.send(seq=1 + 1 + 1001 + 1 + 1000)
        self.assertEqual(self.view().lost, 1000)

    def test_a_farewell_that_was_lost_shows_in_the_next_one(self) -> None:
        self.send(seq=1)
        self.send(seq=4, phase="gone")
        self.send(seq=6, phase="gone")
        self.assertEqual(self.count("lost_states"), 3)
        self.assertEqual(self.send(seq=5, phase="gone"), "out_of_order")
        self.assertEqual((self.count("lost_states"), self.count("late_states")), (2, 1))
        self.assertEqual(self.send(seq=2**40, phase="gone"), "farewell")
        self.assertEqual(self.send(seq=8), "accepted", "a number that is nonsense silences nobody")
        self.assertEqual(self.count("lost_states"), 2)

    def test_it_is_unknown_without_numbers(self) -> None:
        self.plain()
        self.assertIsNone(self.view().lost)


class LossyPath(unittest.TestCase):
    """What a path with 1 % of loss swallows, and what of it shows: by agents' own datagrams, through lives and deaths.

    Not seen are the numbers before the first of a boot that arrives, and those behind the last one: a few hundredths of
    a datagram a life, which is nothing beside what a life of hours loses.
    """

    LOST, LATE = 0.01, 0.01

    def lives(self, chance: random.Random, states: int, lives: int) -> tuple[int, int]:
        """Send lives of so many states each through the path; returns how many were lost, and what was counted."""
        clock = FakeClock()
        store = StateStore(STALE_MS, EXPIRE_MS, 100, 3, clock=clock)
        lost = 0
        load = Load(10.0, "balanced", 1, 50, 100, 1000.0, 1, 0)
        writers = [DatagramWriter(f"engine-{number}", model="m") for number in range(10)]
        late: list[bytes] = []
        for _ in range(lives):
            for number in range(states + 3):
                clock.move(0.2)
                phase = "serving" if number < states else "gone"
                arrived = [*late]
                late.clear()
                for writer in writers:
                    one = writer.write(phase, int(clock() * 1000), load)
                    way = chance.random()
                    if way < self.LOST:
                        lost += 1
                    else:  # what is late comes behind the engine's next
                        (late if way > 1 - self.LATE and phase != "gone" else arrived).append(one)
                store.apply(batch(clock(), WALL_S + clock(), *arrived[::-1]))
            for place, writer in enumerate(writers):
                if place % 2:
                    writer.new_life()  # the others go on with the life that said farewell
            clock.move(7.0)
            store.advance_watermark(clock())
            store.sweep()
        return lost, store.counters()["lost_states"]

    def test_what_is_counted_is_within_two_percent_of_what_was_lost(self) -> None:
        for states, lives in ((5000, 2), (1000, 8)):
            with self.subTest(states=states, lives=lives):
                lost, counted = self.lives(random.Random(14), states, lives)
                self.assertGreater(lost, 700)
                self.assertLessEqual(abs(counted - lost), 0.02 * lost, (lost, counted))

    def test_what_is_not_seen_is_no_more_than_the_ends_of_lives(self) -> None:
        """Short lives, hundreds of them: nothing is counted that was not lost, and each end hides 0.03 at most."""
        lost, counted = self.lives(random.Random(14), 50, 60)
        self.assertGreater(lost, 250)
        self.assertLessEqual(counted, lost)
        self.assertLessEqual(lost - counted, 10 * 60 * 0.03)


class LateLoad(NumberedCase):
    """A load state that only heartbeats overtook is newer load than what is shown."""

    def test_it_is_shown_while_phase_and_further_fields_stay_the_newest_s(self) -> None:
        self.send(seq=1, pending_tokens_total=1)
        self.beat(seq=3, phase="draining", model="newest")
        self.clock.move(0.5)
        self.assertEqual(self.send(seq=2, pending_tokens_total=2, model="late"), "accepted")
        view = self.view()
        self.assertEqual(
            (self.pending(), view.state_age_ms, view.phase, view.extra["model"]), (2, 0, "draining", "newest")
        )
        self.assertEqual(view.lost, 0)

    def test_one_that_a_load_state_overtook_is_not(self) -> None:
        self.send(seq=1)
        self.send(seq=3, pending_tokens_total=3)
        self.beat(seq=4)
        self.assertEqual(self.send(seq=2, pending_tokens_total=2), "out_of_order")
        self.assertEqual(self.pending(), 3)


class NothingNew(NumberedCase):
    """What says nothing new of the load brings its phase and further fields, and no new age of the load."""

    def test_the_last_load_again_with_another_phase(self) -> None:
        self.send(seq=1, timestamp_ms=5000, pending_tokens_total=7)
        past = len(self.store.history("test") or [])
        self.clock.move(1.5)
        self.assertEqual(self.send(seq=2, timestamp_ms=5000, pending_tokens_total=7, phase="stuck"), "accepted")
        view = self.view()
        self.assertEqual((view.status, view.phase, view.age_ms, view.state_age_ms), ("unavailable", "stuck", 0, 1500))
        self.assertEqual(view.received_ms, int((WALL_S + 1000) * 1000))
        self.assertEqual(len(self.store.history("test") or []), past)

    def test_another_load_at_the_same_time_is_new(self) -> None:
        self.send(seq=1, timestamp_ms=5000, pending_tokens_total=7)
        self.clock.move(1.5)
        self.send(seq=2, timestamp_ms=5000, pending_tokens_total=8)
        self.assertEqual((self.pending(), self.view().state_age_ms), (8, 0))

    def test_a_heartbeat_that_leaves_the_load_brings_phase_and_further_fields(self) -> None:
        self.send(seq=1, pending_tokens_total=7)
        self.clock.move(0.5)
        self.assertEqual(self.beat(seq=2, phase="sleeping", model="other"), "heartbeat")
        view = self.view()
        self.assertEqual(
            (view.phase, view.extra["model"], self.pending(), view.state_age_ms), ("sleeping", "other", 7, 500)
        )

    def test_without_boot_phase_and_further_fields_tell_a_state_from_a_duplicate(self) -> None:
        plain = {"boot": None, "seq": None, "timestamp_ms": 5000}
        self.assertEqual(self.send(**plain), "accepted")
        self.assertEqual(self.send(**plain), "duplicate")
        self.assertEqual(self.send(**plain, phase="draining"), "accepted")
        self.assertEqual(self.send(**plain, phase="draining", model="other"), "accepted")
        self.assertEqual(self.send(**plain, phase="draining", model="other"), "duplicate")

    def test_phase_and_further_fields_are_gone_with_the_next_that_has_none(self) -> None:
        self.send(boot=None, seq=None, phase="draining")
        self.assertEqual(self.view().status, "unavailable")
        self.clock.move(0.1)
        self.assertEqual(self.plain(), "accepted")
        self.assertEqual((self.view().status, self.view().phase, self.view().extra), ("live", None, {}))


class Heartbeats(NumberedCase):
    """Placeholders are a heartbeat, but for a proven idle state of an engine whose KV cache is unknown."""

    def test_serving_numbered_and_with_requests_running_it_is_a_real_state(self) -> None:
        self.assertEqual(self.send(seq=1, **PLACEHOLDERS), "accepted")
        self.assertTrue(self.view().load_known)
        self.assertTrue(self.view().usable)

    def test_without_any_of_the_three_it_is_a_heartbeat(self) -> None:
        for change in ({"phase": "starting"}, {"phase": None}, {"seq": None}, {"num_requests_running": None}):
            with self.subTest(change):
                one = {"seq": 1, **PLACEHOLDERS, **change, "engine_id": json.dumps(change)}
                self.assertEqual(self.send(**one), "heartbeat")
                self.assertFalse(self.view(json.dumps(change)).load_known)

    def test_a_text_that_looks_like_the_name_is_not_it(self) -> None:
        said = {"num_requests_running": None, "model": ', "num_requests_running": 1'}
        self.assertEqual(self.send(seq=1, **PLACEHOLDERS, **said), "heartbeat")


class Unavailable(NumberedCase):
    """An engine that says that it is not serving is there, and not to be sent requests."""

    def test_every_phase_but_serving(self) -> None:
        phases = ("starting", "draining", "sleeping", "stuck", "on_fire")
        for seq, phase in enumerate(phases, 1):
            self.send(seq=seq, phase=phase)
            view = self.view()
            self.assertEqual(
                (view.status, view.usable, view.load_known, view.phase), ("unavailable", False, True, phase)
            )
            self.assertEqual(self.store.counts(), (0, 1))
        self.send(seq=9, phase="serving")
        self.assertEqual((self.view().status, self.view().usable, self.store.counts()), ("live", True, (1, 1)))
        self.clock.move(2.1)
        self.assertEqual((self.view().status, self.store.counts()), ("stale", (0, 1)))

    def test_the_fleet_is_counted_by_status_and_summed_over_usable_engines(self) -> None:
        self.send(seq=1, engine_id="old")
        self.clock.move(2.5)
        self.send(seq=1, engine_id="a", pending_tokens_total=5, kv_cache_free_blocks=-1, engine_capacity=0.0)
        self.plain(engine_id="b", pending_tokens_total=7, kv_cache_free_blocks=3, engine_capacity=2.5)
        self.send(seq=1, engine_id="c", phase="draining", pending_tokens_total=100)
        self.plain(engine_id="d", **PLACEHOLDERS)
        fleet = self.store.fleet()
        self.assertEqual({name: fleet[name] for name in ("live", "unavailable", "stale", "usable")},
                         {"live": 3, "unavailable": 1, "stale": 1, "usable": 2})  # fmt: skip
        self.assertEqual(fleet["sums"]["pending_tokens_total"], {"sum": 12, "engines": 2})
        self.assertEqual(fleet["sums"]["kv_cache_free_blocks"], {"sum": 3, "engines": 1})
        self.assertEqual(fleet["sums"]["kv_cache_total_blocks"], {"sum": 2000, "engines": 2})
        self.assertEqual(fleet["sums"]["engine_capacity"], {"sum": 2.5, "engines": 1})
        self.assertEqual(fleet["phases"], {"serving": 3, "draining": 1})
        self.assertEqual(fleet["scheduling_modes"], {"latency_optimized": 2})

    def test_the_fleet_of_nobody(self) -> None:
        fleet = self.store.fleet()
        self.assertEqual((fleet["live"], fleet["phases"], fleet["scheduling_modes"]), (0, {}, {}))
        self.assertEqual(fleet["sums"]["engine_capacity"], {"sum": 0, "engines": 0})


class Farewell(NumberedCase):
    """`gone` removes an engine at once, and what comes late behind it revives nobody."""

    def farewell(self, **changes: Any) -> str:
        return self.send(phase="gone", **changes)

    def test_the_engine_and_its_history_are_gone_at_once(self) -> None:
        self.send(seq=1)
        self.assertEqual(self.farewell(seq=2), "farewell")
        self.assertIsNone(self.store.view("test"))
        self.assertIsNone(self.store.history("test"))
        self.assertEqual(self.store._history_bytes, 0)
        self.assertEqual(
            (self.count("farewells"), self.count("expired_engines"), self.count("valid_states")), (1, 0, 2)
        )

    def test_three_of_them_are_counted_and_nothing_more(self) -> None:
        self.send(seq=1)
        self.assertEqual([self.farewell(seq=seq) for seq in (2, 3, 4)], ["farewell"] * 3)
        self.assertEqual(self.farewell(engine_id="nobody", seq=1), "farewell")
        self.assertEqual((self.store.counts(), len(self.store._farewells)), ((0, 0), 1))

    def test_a_subscriber_is_told_of_the_removal(self) -> None:
        self.send(seq=1)
        self.store.collect_changes()
        self.send(seq=2)
        self.farewell(seq=3)
        changes = self.store.collect_changes()
        assert changes is not None
        heard, removed = changes
        self.assertEqual((heard, [row[0] for row in removed]), ([], ["test"]))
        self.assertEqual(removed[0][2][4][0], b'"gone"')

    def test_what_is_late_of_a_life_changes_nothing_of_the_next(self) -> None:
        """An engine says farewell three times; its successor may be heard before the last of them."""
        self.send(boot="old", seq=1)
        self.farewell(boot="old", seq=4)
        self.assertEqual(self.send(boot="new", seq=0, pending_tokens_total=7), "accepted")
        for seq in (5, 6, 3):
            self.assertEqual(self.farewell(boot="old", seq=seq), "out_of_order")
        for seq in (2, 9):
            self.assertEqual(self.send(boot="old", seq=seq, pending_tokens_total=1), "out_of_order")
        view = self.store.view("test")
        assert view is not None
        self.assertEqual((view.state.pending_tokens_total, view.restarts, self.count("farewells")), (7, 0, 1))
        self.clock.move(2.1)  # the successor is silent: the earlier one is heard again
        self.assertEqual(self.send(boot="old", seq=7), "accepted")

    def test_boots_before_a_farewell_are_late_too(self) -> None:
        for boot in ("first", "second"):
            self.send(boot=boot, seq=1)
        self.farewell(boot="second", seq=2)
        self.send(boot="third", seq=0)
        for boot in ("first", "second"):
            self.assertEqual(self.farewell(boot=boot, seq=9), "out_of_order")
        self.farewell(boot="third", seq=1)
        self.assertEqual(self.send(boot="third", seq=2), "accepted")  # the same life, once more
        self.assertEqual(self.farewell(boot="second", seq=10), "out_of_order")

    def test_a_late_datagram_of_its_boot_revives_nothing_until_the_expiry(self) -> None:
        self.send(seq=1)
        self.farewell(seq=5)
        self.assertEqual(self.send(seq=4, timestamp_ms=2**50), "out_of_order")
        self.clock.move(6.0)
        self.assertEqual(self.send(seq=4), "out_of_order")
        self.clock.move(0.1)
        self.assertEqual(self.send(seq=4), "accepted")

    def test_the_next_number_and_a_new_boot_are_life(self) -> None:
        for change in ({"seq": 6}, {"seq": 1, "boot": "bb"}):
            self.send(seq=1, boot="aa")
            self.farewell(seq=5, boot="aa")
            self.assertEqual(self.send(**{"boot": "aa", **change}), "accepted")
            self.farewell(**{"boot": "aa", **change, "seq": 7})

    def test_without_boot_the_timestamp_tells(self) -> None:
        plain = {"boot": None, "seq": None}
        for stamp, outcome in (
            (10_000, "out_of_order"),
            (8_000, "out_of_order"),
            (7_999, "accepted"),
            (10_001, "accepted"),
        ):
            self.setUp()
            self.send(**plain, timestamp_ms=9_900)
            self.assertEqual(self.farewell(**plain, timestamp_ms=10_000), "farewell")
            self.assertEqual(self.farewell(**plain, timestamp_ms=10_000), "farewell", "a copy of it")
            self.assertEqual(self.plain(timestamp_ms=stamp), outcome, stamp)

    def test_one_of_an_earlier_boot_is_out_of_order(self) -> None:
        self.send(seq=1, boot="aa")
        self.send(seq=1, boot="bb")
        self.assertEqual(self.farewell(seq=2, boot="aa"), "out_of_order")
        self.assertEqual(self.view().status, "live")
        self.assertEqual(self.farewell(seq=2, boot="bb"), "farewell")
        self.assertEqual(self.send(seq=3, boot="aa"), "out_of_order", "while the current one was heard just now")

    def test_a_late_one_is_out_of_order(self) -> None:
        self.send(seq=1)
        self.send(seq=3)
        self.assertEqual(self.farewell(seq=2), "out_of_order")
        self.assertEqual(self.view().phase, "serving")

    def test_it_is_taken_where_every_place_is(self) -> None:
        self.store = self.make_store(max_engines=1)
        self.send(seq=1)
        self.assertEqual(self.send(seq=1, engine_id="other"), "rejected_capacity")
        self.assertEqual(self.farewell(seq=2), "farewell")
        self.assertEqual(self.send(seq=1, engine_id="other"), "accepted")

    def test_no_more_than_max_engines_are_remembered(self) -> None:
        self.store = self.make_store(max_engines=3)
        for number in range(10):
            self.send(seq=1, engine_id=f"e{number}")
            self.farewell(seq=5, engine_id=f"e{number}")
        self.assertEqual(len(self.store._farewells), 3)
        self.assertEqual(self.send(seq=4, engine_id="e9"), "out_of_order")
        self.clock.move(6.1)
        self.store.advance_watermark(self.clock())
        self.store.sweep()
        self.assertEqual(len(self.store._farewells), 0)


class Conflicts(NumberedCase):
    """One engine_id with several senders is said, and nothing else changes."""

    def assert_conflict(self, expected: bool) -> None:
        self.assertIs(self.view().conflict, expected)
        self.assertEqual(self.count("conflicting_ids"), int(expected))
        self.assertIs(entry(self.view())["conflict"], expected)

    def test_two_sources_in_turn_without_boot(self) -> None:
        for number, source in enumerate(("a:1", "b:1", "a:1", "b:1")):
            self.assert_conflict(False) if number else None
            self.clock.move(0.1)
            self.plain(source=source, pending_tokens_total=number)
        self.assert_conflict(True)
        self.assertTrue(self.view().usable)
        self.clock.move(1.9)
        self.plain(source="b:1")
        self.assert_conflict(True)
        self.clock.move(0.2)
        self.assert_conflict(False)

    def test_it_goes_on_with_each_change_and_one_line_names_the_id_and_two_sources(self) -> None:
        for number in range(20):
            self.clock.move(0.5)
            self.plain(source=f"host{number % 2}:1")
        self.assert_conflict(True)
        with self.assertLogs("elrar.store", "WARNING") as logged:
            self.store.sweep()
            self.store.sweep()
        self.assertEqual(len(logged.records), 1)
        self.assertRegex(logged.output[0], "'test' from host[01]:1 and host[01]:1")

    def test_an_engine_that_moved_once_is_no_conflict(self) -> None:
        for source in ("a:1", "a:1", "b:1", "b:1", "a:1"):
            self.clock.move(0.1)
            self.plain(source=source)
        self.assert_conflict(False)

    def test_changes_further_apart_than_the_threshold_are_none(self) -> None:
        for number in range(8):
            self.clock.move(2.1)
            self.plain(source=f"host{number % 2}:1")
        self.assert_conflict(False)

    def test_copies_over_another_way_are_none(self) -> None:
        for number in range(10):
            self.clock.move(0.2)
            for source in ("192.168.0.5:4000", "127.0.0.1:4000", "[::1]:4000"):
                self.plain(source=source, timestamp_ms=number)
        self.assert_conflict(False)

    def test_addresses_of_one_sender_are_one(self) -> None:
        self.store = self.make_store(is_one_sender=lambda one, other: one[-5:] == other[-5:])
        for number in range(10):
            self.clock.move(0.2)
            self.plain(source=("192.168.0.5:4000", "127.0.0.1:4000")[number % 2])
        self.assert_conflict(False)
        for number in range(4):
            self.clock.move(0.2)
            self.plain(source=("192.168.0.5:4000", "127.0.0.1:4001")[number % 2])
        self.assert_conflict(True)

    def test_two_boots_in_turn_whatever_their_sources(self) -> None:
        outcomes = []
        for seq in range(1, 4):
            for boot in ("aa", "bb"):
                self.clock.move(0.1)
                outcomes.append(self.send(seq=seq, boot=boot, pending_tokens_total=seq))
        self.assertEqual(outcomes, ["accepted"] * 2 + ["out_of_order", "accepted"] * 2)
        self.assert_conflict(True)
        self.assertEqual(self.view().restarts, 1)

    def test_one_boot_from_many_sources_is_none(self) -> None:
        for seq in range(1, 10):
            self.take(agent(seq=seq, timestamp_ms=seq), source=f"10.0.0.{seq % 2}:1")
        self.assert_conflict(False)

    def test_the_gauge_forgets_who_is_removed(self) -> None:
        for number in range(4):
            self.plain(source=f"host{number % 2}:1", timestamp_ms=number)
        self.assertEqual(self.count("conflicting_ids"), 1)
        self.send(boot=None, seq=None, phase="gone", timestamp_ms=9)
        self.assertEqual(self.count("conflicting_ids"), 0)


class FurtherFields(unittest.TestCase):
    """Further fields are kept and handed on if they are small and simple, and are never a reason to reject."""

    def extra(self, **said: Any) -> tuple[dict[str, Any], bool]:
        parsed = parse(datagram(**said))
        texts = parsed.texts()
        return json.loads(b"{%b}" % (texts[-1] or b"")[2:]), parsed.passed_over

    def test_what_is_kept(self) -> None:
        said = {"model": "ünï 引擎", "a": 1.5, "b": True, "c": None, "d": -3, "e_1": "", "z" * 64: 0, "text": "x" * 256}
        self.assertEqual(self.extra(**said), (said, False))

    def test_what_is_passed_over(self) -> None:
        passed_over: tuple[dict[str, Any], ...] = (
                     {"Upper": 1}, {"1st": 1}, {"a-b": 1}, {"z" * 65: 1}, {"": 1}, {"a": []}, {"a": {}},
                     {"a": "x" * 257}, {"a": "\n"}, {"a": 2**53 + 1}, {"boot": 1, "seq": 1}, {"boot": "", "seq": 1},
            {"boot": "a" * 65},
                     {"boot": "a", "seq": -1}, {"boot": "a", "seq": True}, {"seq": 1}, {"phase": "Gone"}, {"phase": ""},
                     {"phase": None}, {"phase": "a" * 33}, {"sig": 1},
        )  # fmt: skip
        for said in passed_over:
            with self.subTest(said):
                parsed = parse(datagram(**said))
                self.assertEqual((parsed.further, parsed.passed_over), (NOTHING_FURTHER, True))
        self.assertEqual(parse(datagram(sig="k:1")).passed_over, False)
        self.assertEqual(self.extra(a=[], b=1), ({"b": 1}, True))
        infinite = parse(datagram(a="@").replace(b'"@"', b"1e999"))
        self.assertEqual((infinite.further, infinite.passed_over), (NOTHING_FURTHER, True))

    def test_at_most_16_of_them(self) -> None:
        extra, passed_over = self.extra(**{f"f{number}": number for number in range(20)})
        self.assertEqual((list(extra), passed_over), ([f"f{number}" for number in range(16)], True))

    def test_at_most_1024_bytes_as_json_and_a_later_one_may_still_fit(self) -> None:
        said = {name: name * 250 for name in "abcd"}
        size = len(json.dumps({name: said[name] for name in "abc"}))
        room = 1024 - size - len(', "e": ""')
        extra, passed_over = self.extra(**said, e="é" * (room // 2) + "x" * (room % 2), f=1)
        self.assertEqual((list(extra), passed_over), (["a", "b", "c", "e"], True))
        self.assertEqual(len(json.dumps(extra, ensure_ascii=False).encode()), 1024)

    def test_only_the_first_64_names_are_looked_at(self) -> None:
        odd = {f"Odd{number}": 1 for number in range(64)}
        self.assertEqual(self.extra(**odd, fine=1), ({}, True))
        odd.popitem()
        self.assertEqual(self.extra(**odd, fine=1), ({"fine": 1}, True))

    def test_an_agent_s_own_datagrams_are_canonical(self) -> None:
        for changes in ({}, {"phase": "gone"}, {"role": None}, {"num_requests_waiting": 10**8}):
            self.assertIsNotNone(match_canonical(agent(**changes)), changes)
        role = {**AGENT, "seq": 7}
        engine, name = role.pop("engine"), role.pop("agent")
        for between in ({"dp_rank": 3}, {"role": "prefill"}, {"dp_rank": 0, "role": "both"}):
            self.assertIsNotNone(match_canonical(datagram(**role, **between, engine=engine, agent=name)), between)
        self.assertIsNotNone(match_canonical(datagram(**{**AGENT, "model": None, "num_requests_running": None})))

    def test_labels_behind_an_agent_s_datagram_are_read_fast(self) -> None:
        """And what is read fast is what the parser reads; names that are taken, or there twice, are the parser's."""
        chance = random.Random(14)
        names = ["zone", "pool", "team", "a", "x" * 64, "z9_"]
        names += ["engine_id", "boot", "seq", "phase", "sig", "model", "role", "dp_rank", "agent", "engine_capacity"]
        names += ["num_requests_running", "pending_tokens_total", "Zone", "9a", "x" * 65]
        values = ["", "eu-1a", "a b", "x" * 256, "x" * 257, "\u00e4", 'a"b', "\\", "\x7f", "~", 7, None, True, [1]]
        good = [value for value in values[:4] if isinstance(value, str)]
        fast = 0
        for _ in range(5000):
            usual = chance.random() < 0.7
            labels = [
                (chance.choice(names[:6] if usual else names), chance.choice(good if usual else values))
                for _ in range(chance.randrange(1, 10))
            ]
            text = "".join(f", {json.dumps(name)}: {json.dumps(value)}" for name, value in labels)
            one = agent()[:-1] + text.encode() + b"}"
            matched = match_labelled(one)
            if matched is not None:
                fast += 1
                parsed = parse(one)
                self.assertEqual((matched, parsed.passed_over), (parsed.texts(), False), one)
            elif usual and len(dict(labels)) == len(labels) <= 8 and len(text) < 800:
                self.fail(f"is not read fast: {one!r}")
        self.assertGreater(fast, 500)
        for one in (agent(), datagram(), b"", agent(zone="eu") + b" ", agent(zone="eu")[1:]):
            self.assertIsNone(match_labelled(one))


class CanonicalOrder(Order):
    """The same with canonical datagrams."""

    canonical = True


class CanonicalRestarts(Restarts):
    """The same with canonical datagrams."""

    canonical = True


class CanonicalLost(Lost):
    """The same with canonical datagrams."""

    canonical = True


class CanonicalLateLoad(LateLoad):
    """The same with canonical datagrams."""

    canonical = True


class CanonicalNothingNew(NothingNew):
    """The same with canonical datagrams."""

    canonical = True


class CanonicalHeartbeats(Heartbeats):
    """The same with canonical datagrams."""

    canonical = True


class CanonicalFarewell(Farewell):
    """The same with canonical datagrams."""

    canonical = True


class CanonicalConflicts(Conflicts):
    """The same with canonical datagrams."""

    canonical = True


class BothWays(NumberedCase):
    """The short way of the usual datagram and the long one of any leave the same behind."""

    def test_the_table_is_the_same(self) -> None:
        views = []
        for short in (True, False):
            self.setUp()
            advance = KnownEngine.advance if short else lambda *_: None
            with mock.patch("known_engine.KnownEngine.advance", advance):
                for number in range(1, 400):
                    self.clock.move(0.05)
                    seq = number + (number % 7 == 0) - 2 * (number % 11 == 0)
                    if number % 20 == 0:
                        self.beat(seq=max(1, seq))
                    else:
                        self.send(seq=max(1, seq), boot="aa" if number < 200 else "bb", pending_tokens_total=number)
            views.append((entry(self.view()), self.store.counters(), self.store.history("test")))
        self.assertEqual(*views)


if __name__ == "__main__":
    unittest.main()
