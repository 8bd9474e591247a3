"""/watch: a snapshot, then each change as it happens; first by a clock moved by hand, then on real sockets."""

from __future__ import annotations

import contextlib
import http.client
import itertools
import json
import random
import socket
import sys
import time
import unittest
from collections.abc import Callable, Iterator
from types import FrameType
from typing import Any, NamedTuple
from unittest import mock

from http_message import QueryError
from state_query import Query
from state_store import CHANGES_KEPT_S, StateStore
from state_watch import (
    COMMENT_INTERVAL_S,
    MAX_EVENTS_PER_READ,
    MAX_READERS,
    MAX_REMOVED,
    MAX_SHARED_AGE_S,
    Watch,
    WatchReader,
)
from tests.event_stream import EventStream, StreamEvent
from tests.harness import DEADLINE_S, Daemon, FakeClock, ask, batch, daemon, datagram, heartbeat, wait_until
from tests.test_state_query import AnyGateway

MAX_LINE_BYTES = 16_000  # of the stream; the contract says 16 kB


class Event(NamedTuple):
    """One server-sent event of ours."""

    number: int
    kind: str
    data: Any
    instance: str

    @property
    def engine_id(self) -> str:
        return str(self.data["engine_id"])

    @property
    def id(self) -> str:
        return f"{self.number}-{self.instance}"


def ours(event: StreamEvent) -> Event:
    number, _, instance = event.last_event_id.partition("-")
    return Event(int(number), event.kind, json.loads(event.data), instance)


def parse(stream: bytes) -> list[Event]:
    """Every event of a stream, which ends with a whole one and has no empty blocks."""
    parser = EventStream(MAX_LINE_BYTES)
    events = parser.feed(stream)
    assert parser.is_between_events and not parser.empty_blocks, stream[-200:]
    return [ours(event) for event in events]


class Table:
    """A reader's table, kept by the events alone, as docs/http.md tells a router to."""

    def __init__(self) -> None:
        self.entries: dict[str, Any] = {}
        self.number, self.id = 0, ""

    def apply(self, event: Event) -> None:
        assert event.number > self.number, "numbers only grow"
        self.number, self.id = event.number, event.id
        if event.kind == "snapshot":
            self.entries = dict(event.data["engines"])
        elif event.kind == "removed":
            self.entries.pop(event.engine_id, None)  # it may have come and gone while this reader was slow
        else:
            self.entries[event.engine_id] = event.data


def lines_run(function: Callable[[], object]) -> int:
    """How many lines of state_watch.py a call runs: what it costs, on any machine."""
    count = 0

    def trace(frame: FrameType, event: str, _: object) -> Any:
        nonlocal count
        if not frame.f_code.co_filename.endswith("state_watch.py"):
            return None
        count += event == "line"
        return trace

    before = sys.gettrace()
    sys.settrace(trace)
    try:
        function()
    finally:
        sys.settrace(before)
    return count


class WatchCase(unittest.TestCase):
    max_engines = 1000

    def setUp(self) -> None:
        self.clock = FakeClock()
        self.store = StateStore(2000, 6000, self.max_engines, 3, clock=self.clock)
        self.store.advance_watermark(self.clock())
        self.is_catching_up = False
        self.watch = Watch(
            self.store,
            instance="0123456789abcdef",
            is_catching_up=lambda now: self.is_catching_up,
            clock=self.clock,
            wall_clock=lambda: 1_795_000_000.0,
        )
        self.gateway = AnyGateway()
        self.query = Query(self.store, self.gateway, self.watch)
        self.sent = 0

    def push(self, *engine_ids: str, **changes: Any) -> None:
        """A state from each of the engines, none like the one before."""
        datagrams = []
        for engine_id in engine_ids:
            self.sent += 1
            datagrams.append(datagram(**{"engine_id": engine_id, "timestamp_ms": 10**12 + self.sent, **changes}))
        self.store.apply(batch(self.clock(), 1_795_000_000.5, *datagrams))

    def move(self, seconds: float) -> None:
        self.clock.move(seconds)
        self.store.advance_watermark(self.clock())
        self.store.sweep()

    def open(self, target: str = "/watch", last_event_id: str = "") -> WatchReader:
        reader = self.query.answer(target, last_event_id)
        assert isinstance(reader, WatchReader)
        return reader

    def read(self, reader: WatchReader, seconds: float = 0.1) -> list[Event]:
        """What comes within so much time, in which it is asked every half second at least."""
        stream = b""
        for _ in range(int(seconds / 0.5)):
            self.move(0.5)
            stream += reader.read()
        self.move(seconds % 0.5)
        return parse(stream + reader.read())

    def watching(self, target: str = "/watch") -> WatchReader:
        """A reader that has had its snapshot."""
        reader = self.open(target)
        (event,) = parse(reader.read())
        self.assertEqual(event.kind, "snapshot")
        return reader

    def kinds(self, events: list[Event]) -> list[tuple[str, str]]:
        return [(event.kind, event.engine_id) for event in events]


class Order(WatchCase):
    """First everything, then each change, each with the entry as /engines shows it."""

    def test_it_begins_with_the_document_of_engines(self) -> None:
        self.push("a", "b")
        (event,) = parse(self.open().read())
        self.assertEqual(event.kind, "snapshot")
        answer = self.query.answer("/engines")
        self.assertEqual(event.data, json.loads(answer.body))  # type: ignore[union-attr]
        self.assertEqual(list(event.data["engines"]), ["a", "b"])

    def test_a_life_is_told_in_order(self) -> None:
        reader = self.watching()
        self.push("a")
        told = self.read(reader)
        told += self.read(reader, 1.8)  # 1.9 s old
        told += self.read(reader, 0.2)  # 2.1 s
        self.push("a")
        told += self.read(reader)
        told += self.read(reader, 2.0)
        told += self.read(reader, 4.0)
        kinds = [kind for kind, _ in self.kinds(told)]
        self.assertEqual(kinds, ["state", "stale", "live", "stale", "removed"])
        self.assertEqual([event.data["status"] for event in told], ["live", "stale", "live", "stale", "stale"])
        numbers = [event.number for event in told]
        self.assertEqual(numbers, sorted(set(numbers)))

    def test_an_event_has_the_entry_as_it_is_when_it_is_sent(self) -> None:
        reader = self.watching()
        self.push("a", pending_tokens_total=7)
        self.move(0.75)
        (event,) = parse(reader.read())
        shown = self.query.answer("/engines/a")
        self.assertEqual(event.data, json.loads(shown.body))  # type: ignore[union-attr]
        self.assertEqual(event.data["age_ms"], 750)

    def test_what_waited_during_a_pause_is_told_only_as_of_its_end(self) -> None:
        """Each of the states that waited in the socket looks new when it is taken; only the last one is."""
        reader = self.watching()
        self.is_catching_up = True
        for pending in range(3):
            self.push("a", pending_tokens_total=pending)
            self.assertEqual(self.read(reader, 0.01), [])
        self.is_catching_up = False
        (event,) = self.read(reader, 0.01)
        self.assertEqual(event.data["pending_tokens_total"], 2)

    def test_a_heartbeat_that_leaves_the_load_as_it_is_is_told_for_its_age(self) -> None:
        reader = self.watching()
        self.push("a")
        self.read(reader, 1.0)
        self.store.apply(batch(self.clock(), 1.0, heartbeat(engine_id="a", timestamp_ms=2 * 10**12)))
        (event,) = self.read(reader, 0.5)
        self.assertEqual((event.kind, event.data["age_ms"], event.data["state_age_ms"]), ("state", 500, 1500))
        self.assertFalse(event.data["heartbeat"])

    def test_nothing_new_is_nothing_sent_and_after_a_while_a_comment(self) -> None:
        reader = self.watching()
        self.assertEqual(reader.read(), b"")
        self.move(COMMENT_INTERVAL_S - 1)
        self.assertEqual(reader.read(), b"")
        self.move(1)
        comment = reader.read()
        self.assertRegex(comment, rb"^:[^\n]*\n$", "without an empty line, which some libraries take for an event")
        self.assertEqual(reader.read(), b"")

    def test_one_that_is_removed_and_comes_back_is_there_at_the_end(self) -> None:
        reader = self.watching()
        self.push("a")
        self.read(reader)
        self.move(7.0)
        self.push("a")
        told = self.kinds(self.read(reader))
        self.assertEqual(told[-1], ("state", "a"))

    def test_after_a_pause_of_the_gateway_nobody_is_called_stale_before_its_datagrams_are_taken(self) -> None:
        reader = self.watching()
        self.push("a", "b")
        self.read(reader)
        before = self.clock.now
        with mock.patch.object(self.store.freshness, "judged_at", lambda now: min(now, before)):
            self.clock.move(3.0)  # stopped, continued: the reader's turn comes before intake's
            self.assertEqual(self.kinds(self.read(reader, 0.0)), [])
            self.push("a")  # waited in the socket
            self.assertEqual(self.kinds(self.read(reader, 0.003)), [("state", "a")])
        told = [event for _ in range(50) for event in self.kinds(self.read(reader, 0.003))]
        self.assertEqual(told, [("stale", "b")])

    def test_the_first_event_and_no_other_says_when_to_come_back(self) -> None:
        """In its own block: a block that is nothing but `retry:` is an event without data to some libraries."""
        self.push("a")
        reader = self.open()
        self.assertTrue(reader.read().startswith(b"retry: 1000\nid: "))
        self.push("a")
        self.move(0.1)
        text = reader.read()
        self.assertTrue(text.startswith(b"id: "))
        back = self.open(last_event_id=parse(text)[-1].id)
        self.assertEqual(back.read(), b"")
        self.push("a")
        self.move(0.1)
        self.assertTrue(back.read().startswith(b"retry: 1000\nid: "))

    def test_a_snapshot_has_a_line_for_each_engine(self) -> None:
        """So that a reader with a bound on lines reads a fleet of any size, and the lines are the one document."""
        names = [f"http://172.17.0.{number}:8000" for number in range(200)]
        self.push(*names)
        text = self.open().read()
        lines = [line for line in text.split(b"\n") if line.startswith(b"data: ")]
        self.assertEqual(len(lines), 1 + len(names) + 1)
        for name, line in zip(names, lines[1:], strict=False):
            self.assertEqual(line.count(b'"engine_id"'), 1)
            self.assertIn(name.encode(), line)
        (event,) = parse(text)
        self.assertEqual(list(event.data["engines"]), names)
        answer = self.query.answer("/engines")
        self.assertEqual(event.data, json.loads(answer.body))  # type: ignore[union-attr]
        self.assertEqual(answer.body.count(b"\n"), 1)  # type: ignore[union-attr]

    def test_no_line_is_longer_than_16_kb_whatever_engines_are_called(self) -> None:
        for character in "x", '"', "\\", "\u00e9", "\u5f15", "\U0001f600":
            with self.subTest(character):
                self.push(character * 256, scheduling_mode=character * 64, latency_pred_ms=1.7976931348623157e308)
                reader = self.open()
                (event,) = parse(reader.read())  # which has the bound
                self.assertIn(character * 256, event.data["engines"])
                self.push(character * 256)
                self.assertEqual(self.kinds(self.read(reader)), [("state", character * 256)])

    def test_a_hostile_name_breaks_no_line(self) -> None:
        reader = self.watching()
        name = "'\"\\<script>\u00e9 data: x 引擎 😀"
        self.push(name)
        (event,) = self.read(reader)
        self.assertEqual(event.engine_id, name)

    def test_numbers_grow_over_a_restart_of_the_gateway(self) -> None:
        numbers = []
        for wall_s in (1e9, 1e9 + 0.1):
            restarted = Watch(self.store, instance="x", wall_clock=lambda wall_s=wall_s: wall_s)  # type: ignore[misc]
            reader = restarted.open(lambda: b"{}\n", (), 0, "")
            assert reader is not None
            numbers.append(parse(reader.read())[0].number)
        self.assertLess(*numbers)
        self.assertLess(numbers[-1], 2**53)


class Resuming(WatchCase):
    """A reader that comes back gets what it missed, or a snapshot where that is not known."""

    def test_it_gets_the_newest_of_each_engine_that_changed(self) -> None:
        reader = self.watching()
        self.push("a", "b", "c")
        last = self.read(reader)[-1].id
        reader.close()
        self.push("b")
        self.push("b", "d", pending_tokens_total=99)
        told = self.read(self.open(last_event_id=last))
        self.assertEqual(self.kinds(told), [("state", "b"), ("state", "d")])
        self.assertEqual(told[0].data["pending_tokens_total"], 99)
        self.assertGreater(told[0].number, int(last.partition("-")[0]))

    def test_it_learns_who_went_stale_and_who_is_gone(self) -> None:
        reader = self.watching()
        self.push("a", "b")
        last = self.read(reader)[-1].id
        reader.close()
        self.move(3.0)
        self.push("b")
        self.move(3.5)
        told = self.kinds(self.read(self.open(last_event_id=last)))
        self.assertEqual(sorted(told), [("removed", "a"), ("stale", "b")])

    def test_much_that_was_missed_comes_a_part_at_a_time(self) -> None:
        reader = self.watching()
        self.push("a")
        last = self.read(reader)[-1].id
        reader.close()
        self.push(*(f"e{number}" for number in range(900)))
        back = self.open(last_event_id=last)
        told = []
        while more := self.read(back, 0.01):
            self.assertLessEqual(len(more), MAX_EVENTS_PER_READ)
            told += more
        self.assertEqual([event.engine_id for event in told], [f"e{number}" for number in range(900)])

    def test_it_gets_nothing_twice(self) -> None:
        reader = self.watching()
        self.push("a")
        last = self.read(reader)[-1].id
        self.assertEqual(self.read(self.open(last_event_id=last)), [])

    def test_what_is_no_number_of_ours_gets_a_snapshot(self) -> None:
        reader = self.watching()
        self.push("a")
        last = self.read(reader)[-1]
        far, before, ours = last.number + 1000, last.number - 10**6, last.instance
        others = ("", "0", "-1", "abc", "9" * 30, "9" * 16_000, "１２", last.id + "0", f"{last.number}", f"-{ours}")
        for other in (*others, f"{far}-{ours}", f"{before}-{ours}", f"{'9' * 30}-{ours}", f"１２-{ours}"):
            with self.subTest(other[:40]):
                (event,) = parse(self.open(last_event_id=other).read())
                self.assertEqual(event.kind, "snapshot")

    def test_an_id_of_another_gateway_that_was_started_at_the_same_time_gets_a_snapshot(self) -> None:
        """Its numbers are in the same range: both began with the time of the day."""
        other = Watch(self.store, instance="fedcba9876543210", clock=self.clock, wall_clock=lambda: 1_795_000_000.0)
        reader = self.watching()
        self.push("a", "b", "c")
        told = self.read(reader)
        there = other.open(lambda: b'{"engines": {}}\n', (), 0, told[1].id)
        assert there is not None
        (event,) = parse(there.read())
        self.assertEqual((event.kind, event.instance), ("snapshot", "fedcba9876543210"))

    def test_after_a_minute_in_which_nobody_watched_it_is_a_snapshot(self) -> None:
        reader = self.watching()
        self.push("a")
        last = self.read(reader)[-1].id
        reader.close()
        self.move(CHANGES_KEPT_S + 1)
        self.push("b")
        (event,) = self.read(self.open(last_event_id=last))
        self.assertEqual((event.kind, list(event.data["engines"])), ("snapshot", ["b"]))

    def test_with_states_held_back_it_is_a_snapshot(self) -> None:
        reader = self.watching("/watch?min_interval_ms=1000")
        self.push("a")
        last = self.read(reader)[-1].id
        (event,) = parse(self.open("/watch?min_interval_ms=1000", last).read())
        self.assertEqual(event.kind, "snapshot")

    def test_one_removed_twice_in_a_row_is_told_as_the_later(self) -> None:
        reader = self.watching()
        self.push("a", "b")
        self.read(reader)
        self.move(7.0)
        self.read(reader)
        self.push("a")
        self.move(7.0)  # gone again, with no look in between
        self.read(reader)
        self.assertEqual(list(self.watch._removed), ["b", "a"])

    def test_a_snapshot_has_a_number_of_its_own(self) -> None:
        reader = self.watching("/watch?min_interval_ms=1000")
        self.push("a")
        last = self.read(reader)[-1]
        (event,) = parse(self.open("/watch?min_interval_ms=1000", last.id).read())
        self.assertGreater(event.number, last.number)

    def test_what_is_kept_of_the_removed_is_bounded(self) -> None:
        (snapshot,) = parse((reader := self.open()).read())
        last = snapshot.id
        for turn in range(MAX_REMOVED // 1000 + 2):
            self.push(*(f"{turn}-{number}" for number in range(1000)))
            self.read(reader, 7.0)
        self.assertLessEqual(len(self.watch._removed), MAX_REMOVED)
        (event,) = parse(self.open(last_event_id=last).read())
        self.assertEqual(event.kind, "snapshot")


class SlowReaders(WatchCase):
    """What waits for a reader is at most one event an engine, the newest."""

    def test_the_newest_takes_the_place_of_the_older(self) -> None:
        reader, quick = self.watching(), self.watching()
        for pending in range(50):
            self.push("a", "b", pending_tokens_total=pending)
            self.read(quick)
        told = self.read(reader)
        self.assertEqual(self.kinds(told), [("state", "a"), ("state", "b")])
        self.assertEqual({event.data["pending_tokens_total"] for event in told}, {49})
        self.assertEqual(self.watch.merged_events, 98)

    def test_what_came_between_two_looks_counts_as_merged_too(self) -> None:
        everything, one = self.watching(), self.watching("/watch?engine_id=a")
        for _ in range(5):
            self.push("a", "b")
        self.assertEqual(self.kinds(self.read(everything)), [("state", "a"), ("state", "b")])
        self.assertEqual(self.kinds(self.read(one)), [("state", "a")])
        self.assertEqual(self.watch.merged_events, 4 + 4 + 4)

    def test_numbers_grow_all_the_same(self) -> None:
        reader, quick = self.watching(), self.watching()
        names = [f"e{number}" for number in range(700)]
        random.Random(4).shuffle(names)
        self.push(*names)
        self.read(quick)
        self.push(*names[:300])
        self.read(quick)
        told: list[Event] = []
        while more := self.read(reader, 0.01):
            self.assertLessEqual(len(more), MAX_EVENTS_PER_READ)
            told += more
        self.assertEqual(sorted(event.engine_id for event in told), sorted(names))
        numbers = [event.number for event in told]
        self.assertEqual(numbers, sorted(numbers))

    def test_ages_are_those_of_the_sending(self) -> None:
        reader, quick = self.watching(), self.watching()
        self.push("a")
        self.read(quick)
        (event,) = self.read(reader, 0.4)
        self.assertEqual(event.data["age_ms"], 500)

    def test_the_same_text_is_given_to_readers_of_one_turn_only(self) -> None:
        first, second, third = self.watching(), self.watching(), self.watching()
        self.push("a")
        self.move(0.1)
        self.assertEqual(first.read(), second.read())
        self.clock.move(MAX_SHARED_AGE_S * 1.5)
        (event,) = parse(third.read())
        self.assertEqual(event.data["age_ms"], 115)


class Narrowed(WatchCase):
    """What a reader asks for, and nothing else."""

    def test_engine_id_narrows_the_snapshot_and_the_events(self) -> None:
        self.push("a", "b&c", "d")
        reader = self.open("/watch?engine_id=a&engine_id=b%26c")
        (event,) = parse(reader.read())
        self.assertEqual((list(event.data["engines"]), event.data["total_engines"]), (["a", "b&c"], 3))
        self.push("a", "b&c", "d", "e")
        self.assertEqual(self.kinds(self.read(reader)), [("state", "a"), ("state", "b&c")])

    def test_min_interval_ms_bounds_how_often_an_engine_is_repeated(self) -> None:
        reader = self.watching("/watch?min_interval_ms=1000")
        told: list[tuple[float, Event]] = []
        for turn in range(200):
            self.push("a", pending_tokens_total=turn)
            if turn == 42:
                self.push("b")
            told += [(self.clock(), event) for event in self.read(reader, 0.05)]
        times = [at for at, event in told if event.engine_id == "a"]
        self.assertTrue(all(later - earlier >= 0.999 for earlier, later in itertools.pairwise(times)))
        self.assertGreaterEqual(len(times), 9)
        self.assertEqual(self.kinds([event for _, event in told]).count(("state", "b")), 1)
        numbers = [event.number for _, event in told]
        self.assertEqual(numbers, sorted(set(numbers)))

    def test_who_sets_it_is_told_in_bundles(self) -> None:
        """A fifth of it apart, 100 ms at most, so that a page costs few wake-ups; what waits already, at once."""
        for interval_ms, pause_s in ((0, 0.0), (50, 0.01), (500, 0.1), (3600000, 0.1)):
            with self.subTest(interval_ms):
                reader = self.open(f"/watch?min_interval_ms={interval_ms}")
                self.assertEqual(reader.pause_s, 0.0)
                reader.read()
                self.assertAlmostEqual(reader.pause_s, pause_s)
                names = [f"e{number}" for number in range(MAX_EVENTS_PER_READ + 1)]
                self.push(*names)
                self.move(0.1)
                reader.read()
                if interval_ms:
                    self.assertEqual(reader.pause_s, 0.0)
                reader.read()
                self.assertAlmostEqual(reader.pause_s, pause_s)
                reader.close()

    def test_datagrams_wait_for_others_if_nobody_wants_them_at_once(self) -> None:
        """Of the readers one is enough to have them taken within 2 ms."""
        reader = self.watching("/watch?min_interval_ms=500")
        self.move(1.0)
        self.read(reader)
        self.assertFalse(self.store.has_impatient_subscriber)
        impatient = self.watching()
        self.read(impatient)
        self.assertTrue(self.store.has_impatient_subscriber)
        impatient.close()
        self.read(reader, 1.5)
        self.assertFalse(self.store.has_impatient_subscriber)

    def test_the_last_state_comes_even_if_nothing_follows(self) -> None:
        reader = self.watching("/watch?min_interval_ms=1000")
        self.push("a", pending_tokens_total=1)
        self.read(reader)
        self.push("a", pending_tokens_total=2)
        self.assertEqual(self.read(reader), [])
        (event,) = self.read(reader, 1.0)
        self.assertEqual(event.data["pending_tokens_total"], 2)

    def test_who_went_stale_is_told_at_once(self) -> None:
        reader = self.watching("/watch?min_interval_ms=60000")
        self.push("a")
        self.read(reader)
        self.assertEqual(self.kinds(self.read(reader, 2.0)), [("stale", "a")])
        self.assertEqual(self.kinds(self.read(reader, 4.0)), [("removed", "a")])

    def test_who_came_back_is_told_at_once_even_if_it_pushes_again_before(self) -> None:
        reader, quick = self.watching("/watch?min_interval_ms=60000"), self.watching()
        self.push("a")
        self.read(reader)
        self.assertEqual(self.kinds(self.read(reader, 2.5)), [("stale", "a")])
        for _ in range(2):
            self.push("a")
            self.read(quick, 0.001)
        self.assertEqual(self.kinds(self.read(reader)), [("live", "a")])
        self.move(7.0)
        self.read(quick)  # it is removed, and back before this reader was told
        self.push("a")
        self.read(quick, 0.001)
        (event,) = self.read(reader)
        self.assertEqual((event.kind, event.data["status"]), ("state", "live"))

    def test_who_comes_back_but_takes_no_requests_is_not_called_live(self) -> None:
        reader = self.watching()
        self.push("a")
        self.read(reader)
        self.read(reader, 2.5)
        self.push("a", phase="sleeping")
        (event,) = self.read(reader)
        self.assertEqual((event.kind, event.data["status"]), ("state", "unavailable"))

    def test_much_that_is_due_at_once_comes_a_part_at_a_time(self) -> None:
        reader = self.watching("/watch?min_interval_ms=1000")
        names = [f"e{number}" for number in range(900)]
        for _ in range(2):
            self.push(*names)
            told = []
            while more := self.read(reader, 0.001):
                self.assertLessEqual(len(more), MAX_EVENTS_PER_READ)
                told += [event.engine_id for event in more]
            self.assertEqual(told, names)
            self.move(1.0)

    def test_what_is_held_back_is_not_gone_through_again_and_again(self) -> None:
        """However many engines wait for their interval to end, a reader costs the same until one's time has come."""
        lines = []
        for count in (100, 900):
            reader = self.watching("/watch?min_interval_ms=3600000")
            names = [f"{count}-{number}" for number in range(count)]
            for _ in range(2):
                self.push(*names)
                self.move(0.1)
                while reader.read():
                    self.move(0.001)
            self.move(0.1)
            lines.append(lines_run(reader.read))
            reader.close()
        self.assertEqual(lines[0], lines[1])

    def test_an_empty_engine_id_is_refused(self) -> None:
        for query in ("engine_id=", "engine_id=a&engine_id="):
            with self.subTest(query), self.assertRaises(QueryError) as refused:
                self.query.answer(f"/watch?{query}")
            self.assertEqual(refused.exception.status, 400)

    def test_what_is_no_interval_is_refused(self) -> None:
        for interval in ("", "-1", "x", "1.5", "3600001", "99999999999", "１"):
            with self.subTest(interval), self.assertRaises(QueryError) as refused:
                self.query.answer(f"/watch?min_interval_ms={interval}")
            self.assertEqual(refused.exception.status, 400)

    def test_a_reader_too_many_is_refused_and_counted_until_one_leaves(self) -> None:
        readers = [self.open() for _ in range(MAX_READERS)]
        self.assertEqual(self.watch.readers, MAX_READERS)
        with self.assertRaises(QueryError) as refused:
            self.open()
        self.assertEqual((refused.exception.status, self.watch.rejected_readers), (503, 1))
        readers[0].close()
        readers[0].close()
        self.open()

    def test_there_are_none_while_it_is_stopping(self) -> None:
        self.gateway.ready = False
        with self.assertRaises(QueryError) as refused:
            self.open()
        self.assertEqual(refused.exception.status, 503)


class Tables(WatchCase):
    """Whatever happens, a table kept by the events is the one that /engines shows."""

    max_engines = 30

    def test_a_thousand_random_turns(self) -> None:
        chance = random.Random(6)
        names = [f"e{number}" for number in range(40)]
        readers = [(self.open(), Table()) for _ in range(4)]
        for _ in range(1000):
            self.push(*chance.sample(names, chance.randrange(4)))
            self.move(chance.choice((0.0, 0.001, 0.1, 0.1, 0.1, 0.5, 3.0)))
            for number, (reader, table) in enumerate(readers):
                if number and chance.random() < 0.7:
                    continue  # all but the first are slow
                if number > 1 and chance.random() < 0.05:
                    reader.close()  # and some lose their connection
                    readers[number] = (self.open(last_event_id=table.id), table)
                for event in parse(readers[number][0].read()):
                    table.apply(event)
        self.move(0.1)
        shown = json.loads(self.query.answer("/engines").body)["engines"]  # type: ignore[union-attr]
        self.assertTrue(shown)
        for reader, table in readers:
            while text := reader.read():
                for event in parse(text):
                    table.apply(event)
                self.clock.move(0.003)
            seen = {name: {**entry, "age_ms": 0, "state_age_ms": 0} for name, entry in table.entries.items()}
            self.assertEqual(seen, {name: {**entry, "age_ms": 0, "state_age_ms": 0} for name, entry in shown.items()})


class Stream:
    """A real reader of /watch."""

    def __init__(self, port: int, target: str = "/watch", last_event_id: str = "", *, small: bool = False) -> None:
        self.sock = socket.socket()
        if small:
            self.sock.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
        self.sock.settimeout(DEADLINE_S)
        self.sock.connect(("127.0.0.1", port))
        resume = f"Last-Event-ID: {last_event_id}\r\n" if last_event_id else ""
        self.sock.sendall(f"GET {target} HTTP/1.1\r\nHost: x\r\n{resume}\r\n".encode())
        self.response = http.client.HTTPResponse(self.sock)
        self.response.begin()
        self.parser = EventStream(MAX_LINE_BYTES)
        self.last = 0

    def events(self) -> Iterator[Event]:
        """Events as they come, until the stream ends; fails where none has come for longer than DEADLINE_S."""
        deadline = time.monotonic() + DEADLINE_S
        while line := self.response.readline():
            for event in map(ours, self.parser.feed(line)):
                assert event.number > self.last, "numbers only grow"
                self.last = event.number
                yield event
                deadline = time.monotonic() + DEADLINE_S
            if time.monotonic() > deadline:  # comments keep coming
                raise AssertionError(f"waited {DEADLINE_S:.0f} s for an event in vain")

    def wait_for(self, kind: str, engine_id: str) -> Event:
        """The next event of that kind and engine."""
        for event in self.events():
            if event.kind == kind and event.engine_id == engine_id:
                return event
        raise AssertionError(f"the stream ended before {kind} {engine_id}")

    def close(self) -> None:
        self.response.close()
        self.sock.close()


class RealSockets(unittest.TestCase):
    """The daemon, and readers as they are in life."""

    def watching(self, running: Daemon, target: str = "/watch", last_event_id: str = "", **how: bool) -> Stream:
        stream = Stream(running.http_port, target, last_event_id, **how)
        self.addCleanup(stream.close)
        self.assertEqual(stream.response.status, 200)
        if not last_event_id:  # what is sent from here on is an event, and not in the snapshot already
            self.assertEqual(next(stream.events()).kind, "snapshot")
        return stream

    def test_a_fleet_is_followed_through_silence_and_return(self) -> None:
        with daemon(BIND_ADDRESS="127.0.0.1", STALE_THRESHOLD=200, EXPIRE_AFTER=2500) as running:
            stream = self.watching(running)
            self.assertEqual(stream.response.getheader("content-type"), "text/event-stream")
            running.send(datagram(engine_id="a", timestamp_ms=1))
            self.assertEqual(stream.wait_for("state", "a").data["status"], "live")
            self.assertEqual(stream.wait_for("stale", "a").data["status"], "stale")
            running.send(datagram(engine_id="a", timestamp_ms=2))
            self.assertEqual(stream.wait_for("live", "a").data["timestamp_ms"], 2)
            self.assertEqual(stream.wait_for("removed", "a").data["timestamp_ms"], 2)
            stats = running.stats()["watch"]
            self.assertEqual((stats["readers"], stats["events"] >= 5), (1, True))
            self.assertIn(b"\nelrar_state_gateway_watch_readers 1\n", ask(running.http_port, "/metrics").body)

    def test_one_that_comes_back_goes_on_where_it_was(self) -> None:
        with daemon(BIND_ADDRESS="127.0.0.1", STALE_THRESHOLD=60_000) as running:
            stream = self.watching(running)
            running.send(datagram(engine_id="a", timestamp_ms=1))
            last = stream.wait_for("state", "a").id
            stream.close()
            wait_until("the reader to be forgotten", lambda: running.stats()["watch"]["readers"] == 0)
            running.send(datagram(engine_id="b", timestamp_ms=1))
            running.wait_received(2)
            self.assertEqual(next(self.watching(running, last_event_id=last).events()).engine_id, "b")

    def test_after_a_restart_of_the_gateway_a_snapshot_comes(self) -> None:
        with daemon(BIND_ADDRESS="127.0.0.1") as running:
            stream = self.watching(running)
            running.send(datagram(engine_id="a"))
            before = stream.wait_for("state", "a")
        with daemon(BIND_ADDRESS="127.0.0.1") as running:
            event = next(self.watching(running, last_event_id=before.id).events())
            self.assertEqual((event.kind, event.data.get("engines")), ("snapshot", {}))
            self.assertGreater(event.number, before.number)

    def test_a_reader_that_does_not_read_harms_nobody(self) -> None:
        """5 MB that it does not take; the others, and intake, go on."""
        with daemon(BIND_ADDRESS="127.0.0.1", STALE_THRESHOLD=60_000, ENABLE_LOG="false") as running:
            names = [f"engine-{number:04}-{'x' * 200}" for number in range(1000)]
            stuck, quick = self.watching(running, small=True), self.watching(running, "/watch?engine_id=last")
            sent = 0
            for turn in range(20):
                running.send(*(datagram(engine_id=name, timestamp_ms=10**6 + turn) for name in names))
                sent += len(names)
                running.wait_received(sent)
            running.send(datagram(engine_id="last"))
            quick.wait_for("state", "last")
            stats = wait_until("events to be merged", lambda: (s := running.stats())["watch"]["merged_events"] and s)
            self.assertEqual((stats["valid_states"], stats["watch"]["readers"]), (sent + 1, 2))
            latest: dict[str, int] = {}
            for event in stuck.events():  # now it reads, and catches up
                latest[event.engine_id] = event.data["timestamp_ms"]
                if len(latest) == 1001:
                    break
            else:
                self.fail("the stream ended")
            wait_until("it to be level", lambda: running.stats()["watch"]["readers"] == 2)

    def test_many_readers_get_the_same_and_one_too_many_gets_503(self) -> None:
        with daemon(BIND_ADDRESS="127.0.0.1", STALE_THRESHOLD=60_000) as running:
            streams = [self.watching(running) for _ in range(MAX_READERS)]
            refused = ask(running.http_port, "/watch")
            self.assertEqual((refused.status, list(refused.json)), (503, ["error"]))
            running.send(datagram(engine_id="a"))
            for stream in streams:
                stream.wait_for("state", "a")
            self.assertEqual(ask(running.http_port, "/livez").status, 200)
            for stream in streams[:10]:
                stream.close()
            wait_until("ten to be forgotten", lambda: running.stats()["watch"]["readers"] == MAX_READERS - 10)
            self.watching(running)

    def test_readers_that_vanish_are_forgotten(self) -> None:
        with daemon(BIND_ADDRESS="127.0.0.1", STALE_THRESHOLD=60_000) as running:
            for _ in range(30):
                stream = Stream(running.http_port)
                with contextlib.suppress(OSError):
                    stream.sock.shutdown(socket.SHUT_RDWR)
                stream.close()
            running.send(datagram(engine_id="a"))
            wait_until("all to be forgotten", lambda: running.stats()["watch"]["readers"] == 0)
            self.assertEqual(running.stop(), 0)

    def test_a_stop_ends_the_streams_at_once(self) -> None:
        with daemon(BIND_ADDRESS="127.0.0.1") as running:
            streams = [self.watching(running) for _ in range(5)]
            self.assertEqual(running.stop(), 0)
            for stream in streams:
                with contextlib.suppress(ConnectionResetError):
                    self.assertEqual(list(stream.events()), [])

    def test_head_and_http_1_0_are_answered(self) -> None:
        with daemon(BIND_ADDRESS="127.0.0.1") as running:
            head = ask(running.http_port, "/watch", method="HEAD")
            self.assertEqual((head.status, head.headers["Content-Type"], head.body), (200, "text/event-stream", b""))
            with socket.create_connection(("127.0.0.1", running.http_port), timeout=DEADLINE_S) as sock:
                sock.sendall(b"GET /watch HTTP/1.0\r\n\r\n")
                with sock.makefile("rb") as file:
                    self.assertTrue(any(line == b"event: snapshot\n" for line in file))
            wait_until("nobody to be left", lambda: running.stats()["watch"]["readers"] == 0)


if __name__ == "__main__":
    unittest.main()
