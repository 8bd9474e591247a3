"""engine_table.py: event streams, ages, several gateways, what a router asks, and what answers instead of a gateway."""

from __future__ import annotations

import asyncio
import contextlib
import copy
import itertools
import json
import logging
import os
import pickle
import random
import shutil
import socket
import ssl
import subprocess
import sys
import tempfile
import threading
import time
import unittest
from collections.abc import Callable
from typing import Any
from unittest import mock

import engine_table
from engine_table import EngineTable, Entry, EventStream, StreamError
from tests.harness import (
    DEADLINE_S,
    TOP,
    FakeClock,
    again_and_again,
    clean_environment,
    daemon,
    datagram,
    fields,
    free_port,
    heartbeat,
    wait_until,
)

WALL_MS = 1_795_000_000_000  # what the fake gateways' clocks show when FakeClock shows 1000 s


# -- event streams -----------------------------------------------------------------------------------------------------


def parse(text: bytes, *splits: int) -> list[tuple[str, str]]:
    """The events of a stream that comes in pieces."""
    stream = EventStream()
    pieces = [text[start:end] for start, end in itertools.pairwise([0, *splits, len(text)])]
    return [(kind, data) for piece in pieces for kind, data, _ in stream.feed(piece)]


def parse_simply(text: bytes) -> list[tuple[str, str]]:
    """The same by the standard's words, of a stream that is there as a whole."""
    lines = text.decode("utf-8", "replace").removeprefix("\ufeff").replace("\r\n", "\n").replace("\r", "\n").split("\n")
    events, kind, data = [], "", ""
    for line in lines[:-1]:  # the last one has not ended
        if not line:
            if data:
                events.append((kind or "message", data[:-1]))
            kind = data = ""
            continue
        name, colon, value = line.partition(":")
        value = value[1:] if colon and value.startswith(" ") else value
        if name == "event":
            kind = value
        elif name == "data":
            data += value + "\n"
    return events


STREAMS = {
    "one line": (b"data: a\n\n", [("message", "a")]),
    "a kind and an id": (b"id: 7\nevent: state\ndata: {}\n\n", [("state", "{}")]),
    "several data lines are one text": (b"data: a\ndata: b\ndata:\ndata: c\n\n", [("message", "a\nb\n\nc")]),
    "carriage returns": (b"data: a\rdata: b\r\rdata: c\r\r", [("message", "a\nb"), ("message", "c")]),
    "both": (b"data: a\r\n\r\ndata: b\r\n\r\n", [("message", "a"), ("message", "b")]),
    "mixed": (b"data: a\r\n\rdata: b\n\r\n", [("message", "a"), ("message", "b")]),
    "a byte-order mark": (b"\xef\xbb\xbfdata: a\n\n", [("message", "a")]),
    "a second byte-order mark is text": (b"\xef\xbb\xbf\xef\xbb\xbfdata: a\n\n", []),
    "comments": (b": hello\n\n:\ndata: a\n: within\ndata: b\n\n", [("message", "a\nb")]),
    "one space is no text": (b"data:  a\ndata:b\n\n", [("message", " a\nb")]),
    "a field without a colon": (b"data\n\ndata\ndata\n\n", [("message", ""), ("message", "\n")]),
    "empty data": (b"data:\n\n", [("message", "")]),
    "a kind without data is no event": (b"event: state\n\ndata: a\n\n", [("message", "a")]),
    "unknown fields": (b"Data: x\n data: y\nfoo: z\ndata: a\nfoo\n\n", [("message", "a")]),
    "what has not ended is no event": (b"data: a\n\ndata: b\n", [("message", "a")]),
    "the last kind counts": (b"event: a\nevent: b\ndata: x\n\n", [("b", "x")]),
    "no text": (b"", []),
    "bytes that are no UTF-8": (b"data: \xff\xc3\n\n", [("message", "\ufffd\ufffd")]),
    "characters of several bytes": ("data: 引擎🚀\n\n".encode(), [("message", "引擎🚀")]),
}


class EventStreams(unittest.TestCase):
    """A stream means what the standard says, however it is cut."""

    def test_every_form_is_read_by_the_standards_rules(self) -> None:
        for name, (text, events) in STREAMS.items():
            with self.subTest(name):
                self.assertEqual(parse(text), events)
                self.assertEqual(parse_simply(text), events)

    def test_where_it_is_split_makes_no_difference(self) -> None:
        for name, (text, events) in STREAMS.items():
            with self.subTest(name):
                for split in range(len(text)):
                    self.assertEqual(parse(text, split), events, split)
                self.assertEqual(parse(text, *range(len(text))), events)

    def test_any_stream_is_read_as_by_the_simplest_parser(self) -> None:
        chance = random.Random(1)
        whole = b"id: 12\nevent: state\ndata: {}\n\n"
        parts = [whole, *b"data|event|id|: |:| |\n|\n\n|\r|\r\n|x|\xe5\xbc|\x95|retry: 5\n|\0".split(b"|")]
        for _ in range(2000):
            text = b"".join(chance.choices(parts, k=chance.randrange(40)))
            splits = sorted(chance.randrange(len(text) + 1) for _ in range(chance.randrange(6)))
            self.assertEqual(parse(text, *splits), parse_simply(text), text)

    def test_an_id_counts_once_its_event_is_whole(self) -> None:
        stream = EventStream()
        stream.feed(b"id: 1\n\nid: 2\ndata: a\n")
        self.assertEqual(stream.last_event_id, "1")
        stream.feed(b"\n")
        self.assertEqual(stream.last_event_id, "2")
        stream.feed(b"data: b\n\nid: 3\0\ndata: c\n\n")
        self.assertEqual(stream.last_event_id, "2")
        stream.feed(b"id\n\n")
        self.assertEqual(stream.last_event_id, "")

    def test_retry_is_a_whole_number_or_nothing(self) -> None:
        stream = EventStream()
        stream.feed(b"retry: x\nretry: -1\nretry: 1.5\nretry:\n")
        self.assertIsNone(stream.retry_ms)
        stream.feed(b"retry: 1500\n")
        self.assertEqual(stream.retry_ms, 1500)

    def test_an_event_is_as_old_as_its_first_byte(self) -> None:
        stream = EventStream()
        self.assertEqual(stream.feed(b": hello\n\nid: 1\n", 5.0), [])
        self.assertEqual(stream.feed(b"data: a\n", 6.0), [])
        self.assertEqual(stream.feed(b"\nid: 2\nevent: x\ndata: b\n\n", 7.0), [("message", "a", 6.0), ("x", "b", 7.0)])

    def test_long_lines_are_read_up_to_a_bound(self) -> None:
        stream = EventStream(1000)
        ((_, data, _),) = stream.feed(b"data: " + b"x" * 990 + b"\n\n")
        self.assertEqual(len(data), 990)
        for endless in (b"x", b"data: x", b":", b"data\n", b"data: xxxxxxxx\n"):
            with self.subTest(endless), self.assertRaises(StreamError):
                stream = EventStream(1000)
                for _ in range(1100):
                    stream.feed(endless)

    def test_comments_may_go_on_for_ever(self) -> None:
        stream = EventStream(1000)
        for _ in range(1000):
            self.assertEqual(stream.feed(b": still here\n"), [])


# -- when things were written ------------------------------------------------------------------------------------------


class Written(unittest.TestCase):
    """An event that was held up is as old as it is, whatever a gateway's clock does."""

    def setUp(self) -> None:
        self.stamps = engine_table._WrittenAt()
        self.ahead = 5000.0  # by which the gateway's clock is ahead

    def answered(self, asked_at: float, written_at: float, arrived_at: float) -> float:
        self.stamps.ask(asked_at)
        return self.stamps.of(arrived_at, written_at + self.ahead)

    def comes(self, written_at: float, arrived_at: float) -> float:
        when = self.stamps.of(arrived_at, written_at + self.ahead)
        self.stamps.learn(arrived_at, written_at + self.ahead)
        return when

    def test_what_is_answered_fast_is_dated_by_its_arrival(self) -> None:
        self.assertAlmostEqual(self.answered(100.0, 100.005, 100.01), 100.01)
        self.assertEqual(self.stamps.doubt_s, 0.0)

    def test_what_was_held_up_is_as_old_as_it_is(self) -> None:
        self.answered(100.0, 100.005, 100.01)
        self.comes(101.0, 101.001)
        self.assertAlmostEqual(self.comes(101.2, 111.2), 101.2, delta=0.01)
        self.assertAlmostEqual(self.comes(111.3, 111.301), 111.3, delta=0.01)

    def test_a_slow_answer_counts_as_age_but_for_a_tenth_of_a_second(self) -> None:
        when = self.answered(100.0, 101.5, 103.0)
        self.assertAlmostEqual(when, 100.1)
        self.assertAlmostEqual(self.stamps.doubt_s, 2.9)
        self.assertAlmostEqual(self.answered(104.0, 104.0, 104.01), 104.01, delta=0.01)  # asked again, it is fast
        self.assertLess(self.stamps.doubt_s, 0.01)

    def test_a_clock_that_is_set_makes_nothing_older_or_younger(self) -> None:
        for step in (3600.0, -3600.0, 0.4, -0.4):
            with self.subTest(step):
                self.setUp()
                self.answered(100.0, 100.005, 100.01)
                for turn in range(20):
                    self.comes(101 + turn / 10, 101.001 + turn / 10)
                self.ahead += step
                for turn in range(20):
                    when = self.comes(103 + turn / 10, 103.001 + turn / 10)
                    self.assertAlmostEqual(when, 103 + turn / 10, delta=0.11)

    def test_a_clock_that_is_set_back_while_nothing_comes_is_followed_in_the_end(self) -> None:
        self.answered(100.0, 100.0, 100.001)
        self.ahead -= 1.5
        ages = [at + 0.001 - self.comes(at, at + 0.001) for at in range(102, 142, 2)]
        self.assertLess(max(ages), 1.6)
        self.assertLess(ages[-1], 0.11)

    def test_a_clock_that_runs_fast_or_slow_is_followed(self) -> None:
        for rate in (1e-4, -1e-4):
            with self.subTest(rate):
                self.setUp()
                self.answered(100.0, 100.0, 100.001)
                for turn in range(0, 20_000, 5):
                    self.ahead = 5000.0 + turn * rate
                    when = self.comes(101.0 + turn, 101.001 + turn)
                    self.assertAlmostEqual(when, 101.0 + turn, delta=0.2)
                    if self.stamps.doubt_s > engine_table.DOUBT_S:
                        self.answered(102.0 + turn, 102.0 + turn, 102.001 + turn)


# -- fake gateways -----------------------------------------------------------------------------------------------------


class FakeGateway:
    """Whatever a test wants to answer at a port of 127.0.0.1, a connection at a time or several."""

    def __init__(self, clock: Callable[[], float], instance: str = "0123456789abcdef") -> None:
        self.clock = clock
        self.instance = instance
        self.engines: dict[str, dict[str, Any]] = {}
        self.stale_ms = 2000
        self.number = 1
        self.tls: ssl.SSLContext | None = None
        self.heads: list[str] = []
        self.answer: Callable[[socket.socket, str], None] = self.watch
        self.open: list[socket.socket] = []
        self._listener = socket.create_server(("127.0.0.1", 0))
        self.port = self._listener.getsockname()[1]
        self.url = f"http://127.0.0.1:{self.port}"
        self.thread = threading.Thread(target=self._serve, daemon=True)
        self.thread.start()

    def _serve(self) -> None:
        while True:
            try:
                sock, _ = self._listener.accept()
            except OSError:
                return
            sock.settimeout(DEADLINE_S)
            head = b""
            with contextlib.suppress(OSError):
                if self.tls is not None:
                    sock = self.tls.wrap_socket(sock, server_side=True)
                while b"\r\n\r\n" not in head and (received := sock.recv(65536)):
                    head += received
                self.open.append(sock)
                self.heads.append(head.decode())
                self.answer(sock, head.decode())

    # What a gateway says.

    def entry(self, engine_id: str, age_ms: int = 0, **changes: Any) -> dict[str, Any]:
        """An entry as a gateway of the first edition has it, unless the changes say more."""
        received_ms = WALL_MS + round((self.clock() - 1000) * 1000) - changes.get("state_age_ms", age_ms)
        entry = {
            **fields(engine_id=engine_id, timestamp_ms=received_ms),
            "heartbeat": False,
            "received_ms": received_ms,
            "clock_offset_ms": 0,
            "source": "10.0.0.1:5000",
            "status": "live" if age_ms <= self.stale_ms else "stale",
            "age_ms": age_ms,
            "state_age_ms": age_ms,
        }
        return {**entry, **changes}

    def snapshot(self) -> str:
        return json.dumps(
            {
                "instance": self.instance,
                "uptime_ms": 1,
                "time_ms": WALL_MS + round((self.clock() - 1000) * 1000),
                "stale_threshold_ms": self.stale_ms,
                "engines": self.engines,
            }
        )

    def head(self, status: str = "200 OK", kind: str = "text/event-stream") -> bytes:
        return f"HTTP/1.1 {status}\r\nContent-Type: {kind}\r\nConnection: close\r\n\r\n".encode()

    def watch(self, sock: socket.socket, head: str) -> None:
        """As a gateway does: a snapshot, or what was missed, which is nothing here."""
        text = "retry: 1000\n\n"
        if "Last-Event-ID" not in head:
            text += self.event("snapshot", self.snapshot())
        sock.sendall(self.head() + text.encode())

    def event(self, kind: str, data: str) -> str:
        self.number += 1
        return f"id: {self.number}\nevent: {kind}\ndata: {data}\n\n"

    def tell(self, engine_id: str, age_ms: int = 0, *, kind: str = "state", **changes: Any) -> None:
        """An event to whoever watches."""
        self.say(self.event(kind, json.dumps(self.entry(engine_id, age_ms, **changes))))

    def say(self, text: str) -> None:
        self.open[-1].sendall(text.encode())

    def hang_up(self) -> None:
        for sock in self.open:
            with contextlib.suppress(OSError):
                sock.shutdown(socket.SHUT_RDWR)
            sock.close()
        self.open.clear()

    def close(self) -> None:
        with contextlib.suppress(OSError):
            self._listener.shutdown(socket.SHUT_RDWR)
        self._listener.close()
        self.thread.join(DEADLINE_S)
        self.hang_up()


class TableCase(unittest.TestCase):
    def setUp(self) -> None:
        self.clock = FakeClock()
        for name, value in (("FIRST_RETRY_S", 0.01), ("LONGEST_RETRY_S", 0.02), ("REFUSED_RETRY_S", 0.02)):
            patch = mock.patch.object(engine_table, name, value)
            patch.start()
            self.addCleanup(patch.stop)
        # Nothing is logged but where a test looks for it.
        logger = logging.getLogger("engine_table")
        logger.disabled = True
        self.addCleanup(setattr, logger, "disabled", False)

    def gateway(self, *engine_ids: str, instance: str = "0123456789abcdef") -> FakeGateway:
        gateway = FakeGateway(self.clock, instance)
        gateway.engines = {engine_id: gateway.entry(engine_id) for engine_id in engine_ids}
        self.addCleanup(gateway.close)
        return gateway

    def table(self, *gateways: FakeGateway, **how: Any) -> EngineTable:
        """A table that has been told by every gateway."""
        table = EngineTable(*(gateway.url for gateway in gateways), clock=self.clock, **how)
        self.addCleanup(table.close)
        wait_until(
            "the gateways to be followed", lambda: [g.connected for g in table.gateways()] == [True] * len(gateways)
        )
        return table

    def heard(self, table: EngineTable, gateway: FakeGateway, engine_id: str, age_ms: int = 0, **changes: Any) -> Entry:
        """An entry, once what the gateway is made to tell has been taken."""
        before = self.events(table, gateway)
        gateway.tell(engine_id, age_ms, **changes)
        self.taken(table, gateway, before + 1)
        entry = table.get(engine_id)
        assert entry is not None
        return entry

    def said(self, table: EngineTable, gateway: FakeGateway, *events: str) -> None:
        """Returns once the table has taken events that nothing can be seen of."""
        before = self.events(table, gateway)
        gateway.say("".join(events))
        self.taken(table, gateway, before + len(events))

    @staticmethod
    def events(table: EngineTable, gateway: FakeGateway) -> int:
        return sum(status.events for status in table.gateways() if status.url == gateway.url)

    def taken(self, table: EngineTable, gateway: FakeGateway, events: int) -> None:
        wait_until("events to be taken", lambda: self.events(table, gateway) >= events)

    def ids(self, entries: list[Entry]) -> set[str]:
        return {entry.engine_id for entry in entries}


class Entries(TableCase):
    """Small read-only objects with the contract's names, their ages as of now."""

    def test_it_has_what_a_gateway_of_the_first_edition_says(self) -> None:
        gateway = self.gateway("a")
        entry = self.table(gateway).get("a")
        assert entry is not None
        for name, value in gateway.engines["a"].items():
            with self.subTest(name):
                self.assertEqual(getattr(entry, name), value)
        self.assertTrue(entry.usable and entry.load_known)
        self.assertEqual(
            (entry.phase, entry.restarts, entry.lost, entry.conflict, entry.extra), (None, 0, None, False, {})
        )
        self.assertEqual(entry.gateway, gateway.url)

    def test_it_has_what_a_gateway_of_the_second_edition_says(self) -> None:
        gateway = self.gateway()
        more: Any = {"load_known": True, "usable": True, "phase": "serving", "restarts": 2, "lost": 7, "conflict": True,
                "extra": {"model": "m"}}  # fmt: skip
        gateway.engines["a"] = gateway.entry("a", **more)
        entry = self.table(gateway).get("a")
        assert entry is not None
        self.assertEqual({name: getattr(entry, name) for name in more}, more)
        self.assertEqual(entry.as_dict(), gateway.engines["a"])

    def test_ages_grow_by_the_readers_clock_and_the_status_with_them(self) -> None:
        gateway = self.gateway()
        gateway.engines["a"] = gateway.entry("a", 100, state_age_ms=900)
        entry = self.table(gateway).get("a")
        assert entry is not None
        self.assertEqual((entry.age_ms, entry.state_age_ms, entry.status), (100, 900, "live"))
        self.clock.move(1.75)
        self.assertEqual((entry.age_ms, entry.state_age_ms, entry.status), (1850, 2650, "live"))
        self.clock.move(0.25)
        self.assertEqual((entry.age_ms, entry.status, entry.usable), (2100, "stale", False))
        self.assertEqual(entry.as_dict()["status"], "stale")

    def test_it_cannot_be_changed(self) -> None:
        gateway = self.gateway()
        gateway.engines["a"] = gateway.entry("a", extra={"model": "m"})
        entry = self.table(gateway).get("a")
        assert entry is not None
        for name in ("pending_tokens_total", "age_ms", "anything"):
            with self.subTest(name), self.assertRaises(AttributeError):
                setattr(entry, name, 1)
        entry.extra["model"] = "other"
        entry.as_dict()["extra"]["model"] = "other"
        self.assertEqual(entry.extra, {"model": "m"})
        with self.assertRaisesRegex(AttributeError, "no 'nothing'"):
            entry.nothing  # noqa: B018

    def test_a_copy_is_itself_and_it_goes_to_no_other_process(self) -> None:
        gateway = self.gateway("a")
        entry = self.table(gateway).get("a")
        self.assertIs(copy.copy(entry), entry)
        self.assertIs(copy.deepcopy({"chosen": entry})["chosen"], entry)
        with self.assertRaisesRegex(TypeError, "as_dict"):
            pickle.dumps(entry)

    def test_work_is_in_seconds_and_unknown_is_none(self) -> None:
        gateway = self.gateway()
        gateway.engines = {
            "busy": gateway.entry("busy", pending_tokens_total=5000, engine_capacity=1000.0),
            "idle": gateway.entry("idle", pending_tokens_total=0),
            "no capacity": gateway.entry("no capacity", pending_tokens_total=0, engine_capacity=0.0),
            "heartbeat": gateway.entry("heartbeat", heartbeat=True),
            "load unknown": gateway.entry("load unknown", load_known=False),
        }
        table = self.table(gateway)
        self.assertEqual(
            {entry.engine_id: entry.seconds_of_work for entry in table},
            {"busy": 5.0, "idle": 0.0, "no capacity": None, "heartbeat": None, "load unknown": None},
        )


class Freshness(TableCase):
    """Whatever ends, what is known grows old by itself; whatever begins, what is known stays."""

    def test_what_a_gateway_tells_is_there_at_once(self) -> None:
        gateway = self.gateway("a")
        table = self.table(gateway)
        self.clock.move(1.0)
        self.assertEqual(self.heard(table, gateway, "a", pending_tokens_total=77).pending_tokens_total, 77)
        self.assertEqual(self.heard(table, gateway, "b").age_ms, 0)
        self.assertEqual((self.ids(table.live()), len(table), "b" in table), ({"a", "b"}, 2, True))
        gateway.tell("a", kind="removed", age_ms=6001, state_age_ms=6001)
        wait_until("a to be gone", lambda: table.get("a") is None)
        self.assertEqual(self.ids(table.entries()), {"b"})

    def test_events_that_were_held_up_come_as_old_as_they_are(self) -> None:
        gateway = self.gateway("a", "b")
        table = self.table(gateway)
        self.clock.move(0.2)
        self.heard(table, gateway, "a")
        self.clock.move(0.2)
        late = [gateway.event("state", json.dumps(gateway.entry(engine_id))) for engine_id in "ab"]
        self.clock.move(10.0)
        self.said(table, gateway, *late)
        self.assertEqual([entry.age_ms // 10 for entry in table], [1000, 1000])
        self.assertEqual(table.live(), [])
        self.clock.move(0.1)
        self.assertLess(self.heard(table, gateway, "a").age_ms, 2)

    def test_without_its_gateway_an_engine_is_live_then_stale_then_removed(self) -> None:
        gateway = self.gateway("a")
        table = self.table(gateway)
        gateway.close()
        wait_until("the connection to be gone", lambda: not table.gateways()[0].connected)
        self.assertEqual(self.ids(table.live()), {"a"})
        self.clock.move(2.1)
        self.assertEqual((table.live(), self.ids(table.entries())), ([], {"a"}))
        self.clock.move(4.0)
        wait_until("it to be removed", lambda: len(table) == 0)

    def test_a_thread_that_begins_late_finds_what_is_old_by_then(self) -> None:
        gateway, begin, keep = self.gateway("a"), threading.Event(), EngineTable._keep

        def keep_late(table: EngineTable) -> None:
            begin.wait(DEADLINE_S)
            keep(table)

        with mock.patch.object(EngineTable, "_keep", keep_late):
            table = self.table(gateway)
        self.addCleanup(begin.set)
        gateway.close()
        wait_until("the connection to be gone", lambda: not table.gateways()[0].connected)
        self.clock.move(6.1)
        begin.set()
        wait_until("it to be removed", lambda: len(table) == 0)

    def test_what_a_gateway_that_is_there_speaks_of_is_never_removed(self) -> None:
        gateway = self.gateway("a")
        table = self.table(gateway)
        self.clock.move(3600.0)
        gateway.tell("b")
        wait_until("b to be there", lambda: "b" in table)
        self.assertEqual(self.ids(table.entries()), {"a", "b"})

    def test_a_gateway_that_was_restarted_empties_no_table(self) -> None:
        gateway = self.gateway("a", "b")
        table = self.table(gateway)
        gateway.instance = "another"
        gateway.engines = {"b": gateway.entry("b", pending_tokens_total=5)}
        gateway.answer = lambda sock, _: sock.sendall(
            gateway.head() + gateway.event("snapshot", gateway.snapshot()).encode()
        )
        events = self.events(table, gateway)
        gateway.hang_up()
        self.taken(table, gateway, events + 1)
        self.assertEqual(table.gateways()[0].instance, "another")
        self.assertEqual(table.get("b").pending_tokens_total, 5)  # type: ignore[union-attr]
        self.assertEqual(self.ids(table.live()), {"a", "b"})
        self.clock.move(2.1)
        self.heard(table, gateway, "b")
        self.assertEqual((self.ids(table.live()), self.ids(table.entries())), ({"b"}, {"a", "b"}))
        self.clock.move(4.0)
        wait_until("a to be removed", lambda: self.ids(table.entries()) == {"b"})

    def test_what_the_same_gateway_no_longer_knows_is_gone(self) -> None:
        gateway = self.gateway("a", "b")
        table = self.table(gateway)
        del gateway.engines["a"]
        gateway.say(gateway.event("snapshot", gateway.snapshot()))
        wait_until("a to be gone", lambda: self.ids(table.entries()) == {"b"})

    def test_a_large_snapshot_is_read_however_it_is_written(self) -> None:
        engines = {str(n): {"engine_id": str(n), "extra": {"a": "},\\n"}} for n in range(500)}
        document = {"instance": "i", "fleet": {"live": 2}, "engines": engines}
        lines = [f"{json.dumps(name)}: {json.dumps(entry)}" for name, entry in engines.items()]
        head = json.dumps({**document, "engines": {}})[:-2]
        as_gateways_write_it = "\n, ".join(["\n".join([head, lines[0]]), *lines[1:]]) + "\n}}"
        for text in (
            as_gateways_write_it,
            "\n".join([head, ",\n".join(lines), "}}"]),
            json.dumps(document),
            json.dumps(document, indent=1),
            json.dumps(document).replace(", ", ",\n"),
        ):
            self.assertEqual(engine_table._parse_snapshot(text), document)
        for wrong in ("\n".join([head, *lines, "}}"]), as_gateways_write_it + "}", as_gateways_write_it[:-1]):
            with self.assertRaises(StreamError):
                engine_table._parse_snapshot(wrong)
        with mock.patch.object(engine_table, "_parse_json", wraps=engine_table._parse_json) as parse:
            engine_table._parse_snapshot(as_gateways_write_it)
        self.assertLess(max(len(call.args[0]) for call in parse.mock_calls), len(as_gateways_write_it) / 5)

    def test_it_goes_on_where_it_left_off(self) -> None:
        gateway = self.gateway("a")
        table = self.table(gateway)
        self.heard(table, gateway, "b")
        number = gateway.number
        gateway.hang_up()
        wait_until("it to come back", lambda: len(gateway.heads) == 2 and table.gateways()[0].connected)
        self.assertNotIn("Last-Event-ID", gateway.heads[0])
        self.assertIn(f"\r\nLast-Event-ID: {number}\r\n", gateway.heads[1])
        self.assertEqual(self.ids(table.entries()), {"a", "b"})

    def test_a_gateway_that_answered_slowly_is_asked_again(self) -> None:
        gateway = self.gateway("a")

        def slowly(sock: socket.socket, head: str) -> None:
            if len(gateway.heads) == 1:
                self.clock.move(3.0)
            gateway.watch(sock, head)

        gateway.answer = slowly
        table = EngineTable(gateway.url, clock=self.clock)
        self.addCleanup(table.close)
        wait_until("it to be asked again", lambda: len(gateway.heads) > 1 and table.gateways()[0].round_trip_ms < 1)
        self.assertEqual(self.heard(table, gateway, "b").age_ms, 0)

    def test_a_gateway_that_has_gone_silent_while_engines_were_live_is_asked_again(self) -> None:
        gateway = self.gateway("a")
        gateway.stale_ms = 10
        with mock.patch.object(engine_table, "HUNG_AFTER_S", 0.05):
            self.table(gateway)
            wait_until("it to be asked again", lambda: len(gateway.heads) > 1)

    def test_an_engine_that_takes_no_requests_is_unavailable(self) -> None:
        gateway = self.gateway("a")
        table = self.table(gateway)
        said: Any
        for said in ({"status": "unavailable"}, {"phase": "draining"}, {"phase": "anything"}):
            with self.subTest(said):
                entry = self.heard(table, gateway, "a", **said)
                self.assertEqual(
                    (entry.status, entry.usable, table.live(), table.choose()), ("unavailable", False, [], None)
                )
                self.assertEqual(self.heard(table, gateway, "a", phase="serving").status, "live")

    def test_entries_that_are_none_are_passed_over(self) -> None:
        gateway = self.gateway("a")
        gateway.engines["b"] = {"engine_id": "b"}
        table = self.table(gateway)
        wrong: dict[str, Any]
        for wrong in (
            {"age_ms": -1}, {"age_ms": "7"}, {"age_ms": None}, {"state_age_ms": 10**400}, {"engine_capacity": -1.0},
            {"pending_tokens_total": "many"}, {"scheduling_mode": 5}, {"received_ms": []}, {"status": None},
            {"phase": []}, {"phase": 5}, {"extra": "x"}, {"extra": [1]}, {"restarts": "x"}, {"lost": {}},
            {"conflict": 0}, {"source": None}, {"clock_offset_ms": "x"}, {"engine_id": "a\x1b[2J"},
        ):  # fmt: skip
            text = json.dumps({**gateway.entry("a", pending_tokens_total=99), **wrong})
            self.said(table, gateway, gateway.event("state", text))
        for wrong_data in ("[]", "7", "null", '"text"', "{}", json.dumps({"engine_id": "a"})):
            self.said(table, gateway, gateway.event("state", wrong_data))
        self.assertEqual(self.heard(table, gateway, "c").engine_id, "c")
        self.assertEqual(self.ids(table.entries()), {"a", "c"})
        self.assertNotEqual(table.get("a").pending_tokens_total, 99)  # type: ignore[union-attr]

    def test_events_of_a_newer_gateway_are_passed_over(self) -> None:
        gateway = self.gateway("a")
        table = self.table(gateway)
        self.said(table, gateway, gateway.event("weather", "no JSON"))
        self.heard(table, gateway, "b")
        self.assertEqual(len(gateway.heads), 1)


class SeveralGateways(TableCase):
    """Of each engine the freshest entry counts, and no gateway in particular is needed."""

    def test_the_freshest_entry_counts(self) -> None:
        a, b = self.gateway(), self.gateway()
        a.engines = {"x": a.entry("x", 900, pending_tokens_total=1)}
        b.engines = {"x": b.entry("x", 100, pending_tokens_total=2), "y": b.entry("y")}
        table = self.table(a, b)
        self.assertEqual(table.get("x").pending_tokens_total, 2)  # type: ignore[union-attr]
        self.assertEqual(self.heard(table, a, "x", 50, pending_tokens_total=3).pending_tokens_total, 3)
        self.assertEqual(self.heard(table, b, "x", 70, pending_tokens_total=4).pending_tokens_total, 3)
        self.assertEqual(self.ids(table.live()), {"x", "y"})

    def test_what_one_no_longer_knows_the_other_may(self) -> None:
        a, b = self.gateway("x", "y"), self.gateway("x")
        table = self.table(a, b)
        a.close()
        self.clock.move(1.0)
        self.heard(table, b, "x")
        self.clock.move(2.1)
        self.assertEqual(self.ids(table.live()), set())
        self.heard(table, b, "x")
        self.assertEqual(self.ids(table.live()), {"x"})
        self.clock.move(4.0)
        wait_until("y to be removed", lambda: self.ids(table.entries()) == {"x"})

    def test_a_heartbeat_at_one_does_not_hide_the_load_that_another_shows(self) -> None:
        a, b = self.gateway(), self.gateway()
        a.engines = {"x": a.entry("x", 500, pending_tokens_total=7)}
        table = self.table(a, b)
        entry = self.heard(table, b, "x", heartbeat=True, pending_tokens_total=0)
        self.assertEqual((entry.pending_tokens_total, entry.usable, entry.age_ms), (7, True, 0))
        self.assertEqual(entry.state_age_ms, 500)
        self.clock.move(1.6)
        self.assertTrue(self.heard(table, b, "x", heartbeat=True).heartbeat)

    def test_an_old_state_does_not_become_young_because_another_gateway_says_so(self) -> None:
        a, b = self.gateway(), self.gateway()
        table = self.table(a, b)
        state = {"timestamp_ms": 5, "pending_tokens_total": 7}
        self.heard(table, a, "x", **state)
        self.clock.move(1.5)
        self.heard(table, a, "y")  # a is there
        for _ in range(3):
            self.assertEqual(self.heard(table, b, "x", **state).age_ms, 1500)
            self.assertEqual(table.get("x").state_age_ms, 1500)  # type: ignore[union-attr]
        # A sign of life that is newer than the state is another one.
        self.assertEqual(self.heard(table, b, "x", 0, state_age_ms=1500, **state).age_ms, 0)
        # So is another state.
        self.assertEqual(self.heard(table, b, "x", timestamp_ms=6).state_age_ms, 0)

    def test_an_old_state_does_not_become_young_where_the_witness_has_removed_the_engine(self) -> None:
        """A gateway that was paused takes what waited in its socket for new."""
        a, b = self.gateway(), self.gateway()
        table = self.table(a, b)
        self.heard(table, a, "x", timestamp_ms=5)
        self.clock.move(6.1)
        events = self.events(table, a)
        a.tell("x", 6100, kind="removed", timestamp_ms=5)
        self.taken(table, a, events + 1)
        self.assertNotIn("x", table)
        self.assertEqual(self.heard(table, b, "x", timestamp_ms=5).status, "stale")
        self.assertEqual(self.heard(table, b, "x", timestamp_ms=6).status, "live")

    def test_a_state_does_not_take_the_place_of_one_that_was_said_later(self) -> None:
        """A gateway that was paused takes what waited in its socket one by one, and each for new."""
        a, b = self.gateway(), self.gateway()
        table = self.table(a, b)
        self.heard(table, a, "x", timestamp_ms=5000, pending_tokens_total=9)
        self.clock.move(0.1)
        for timestamp_ms, pending in ((1000, 2), (4000, 5), (4800, 8)):
            entry = self.heard(table, b, "x", timestamp_ms=timestamp_ms, pending_tokens_total=pending)
            self.assertEqual((entry.pending_tokens_total, entry.age_ms), (9, 100))
        self.assertEqual(self.heard(table, b, "x", timestamp_ms=5200, pending_tokens_total=10).age_ms, 0)

    def test_an_engine_whose_clock_was_set_back_is_shown_as_soon_as_both_have_heard_of_it(self) -> None:
        """Or, if one of them hears nothing of it any more, once that one calls it stale."""
        a, b = self.gateway(), self.gateway()
        table = self.table(a, b)
        for engine_id in ("x", "y"):
            self.heard(table, a, engine_id, timestamp_ms=9000, pending_tokens_total=9)
        self.clock.move(0.1)
        set_back = {"timestamp_ms": 4000, "pending_tokens_total": 1}
        self.heard(table, a, "x", **set_back)
        self.assertEqual(self.heard(table, b, "x", **set_back).pending_tokens_total, 1)
        self.assertEqual(self.heard(table, b, "y", **set_back).pending_tokens_total, 9)
        self.clock.move(2.0)
        self.assertEqual(self.heard(table, b, "y", **set_back).pending_tokens_total, 1)

    def test_a_gateway_that_is_not_there_is_no_witness(self) -> None:
        a, b = self.gateway(), self.gateway()
        table = self.table(a, b)
        state = {"timestamp_ms": 5}
        self.heard(table, a, "x", **state)
        a.close()
        self.clock.move(3.0)
        self.assertEqual(self.heard(table, b, "x", **state).age_ms, 0)

    def test_a_farewell_at_one_is_one_at_all(self) -> None:
        a, b = self.gateway("x"), self.gateway("x")
        table = self.table(a, b)
        self.clock.move(0.2)
        self.heard(table, b, "x")
        self.clock.move(0.1)
        a.tell("x", 0, kind="removed")
        wait_until("x to be gone", lambda: table.get("x") is None)
        self.heard(table, b, "y")
        self.assertNotIn("x", table)
        self.clock.move(0.2)
        self.assertEqual(self.heard(table, b, "x").status, "live")  # it has spoken since

    def test_what_one_let_expire_another_may_have_heard(self) -> None:
        a, b = self.gateway("x"), self.gateway("x")
        table = self.table(a, b)
        self.clock.move(6.1)
        self.heard(table, b, "x")
        events = self.events(table, a)
        a.tell("x", 6100, kind="removed")
        self.taken(table, a, events + 1)
        self.assertEqual(self.ids(table.live()), {"x"})

    def test_a_name_with_several_addresses_is_several_gateways(self) -> None:
        listening = self.gateway("x")
        addresses = ["127.0.0.1", "127.0.0.2"]
        real = socket.getaddrinfo

        def look_up(host: str, port: int, *rest: Any, **how: Any) -> Any:
            if host != "gateways.example":
                return real(host, port, *rest, **how)
            return [(socket.AF_INET, socket.SOCK_STREAM, 6, "", (address, port)) for address in addresses]

        with mock.patch("socket.getaddrinfo", look_up), mock.patch.object(engine_table, "LOOKUP_S", 0.01):
            table = EngineTable(f"http://gateways.example:{listening.port}", clock=self.clock)
            self.addCleanup(table.close)
            wait_until("both to be tried", lambda: {g.address for g in table.gateways()} == set(addresses))
            wait_until("one to be followed", lambda: "x" in table)
            self.assertIn(f"Host: gateways.example:{listening.port}", listening.heads[0])
            addresses[:] = ["127.0.0.1", "127.0.0.3"]
            wait_until("the new one to be tried", lambda: "127.0.0.3" in {g.address for g in table.gateways()})
            wait_until(
                "the old one to be given up",
                lambda: {g.problem for g in table.gateways() if g.address == "127.0.0.2"} <= {"no longer followed"},
            )
            self.clock.move(0.2)
            wait_until("the old one to be left", lambda: "127.0.0.2" not in {g.address for g in table.gateways()})
            self.assertEqual(self.ids(table.live()), {"x"})
            table.close()

    def test_a_name_that_cannot_be_looked_up_is_tried_again(self) -> None:
        listening = self.gateway("x")
        known = False

        def look_up(*where: Any, **how: Any) -> Any:
            if how.get("flags") or known:
                return [(socket.AF_INET, socket.SOCK_STREAM, 6, "", ("127.0.0.1", listening.port))]
            raise socket.gaierror(-2, "Name or service not known")

        with mock.patch("socket.getaddrinfo", look_up), mock.patch.object(engine_table, "LOOKUP_S", 0.01):
            table = EngineTable(f"http://gateways.example:{listening.port}", clock=self.clock)
            self.addCleanup(table.close)
            wait_until("it to be said", lambda: [g for g in table.gateways() if "not known" in g.problem])
            known = True
            wait_until(
                "it to be followed", lambda: [(g.address, g.problem) for g in table.gateways()] == [("127.0.0.1", "")]
            )
            self.assertIn("x", table)
            table.close()

    def test_where_nobody_is_by_one_family_of_addresses_the_other_is_tried(self) -> None:
        listening = self.gateway("x")

        def look_up(host: str, port: int, *_: Any, **how: Any) -> Any:
            v4 = (socket.AF_INET, socket.SOCK_STREAM, 6, "", ("127.0.0.1", port))
            nobody = (socket.AF_INET6, socket.SOCK_STREAM, 6, "", ("::1", 1))
            if how.get("flags"):
                return [v4 if host == "127.0.0.1" else nobody]
            return [nobody, v4]

        with mock.patch("socket.getaddrinfo", look_up), mock.patch.object(engine_table, "LOOKUP_S", 0.01):
            table = EngineTable(f"http://gateway.example:{listening.port}", clock=self.clock)
            self.addCleanup(table.close)
            wait_until("it to be followed", lambda: "x" in table)
            table.close()


class Choosing(TableCase):
    """The engine for the next request: live, less loaded than another, and unknown is not idle."""

    def chosen(self, table: EngineTable, **how: Any) -> set[str]:
        entries = [table.choose(**how) for _ in range(200)]
        return {entry.engine_id for entry in entries if entry is not None}

    def test_of_two_the_one_with_fewer_seconds_of_work(self) -> None:
        gateway = self.gateway()
        gateway.engines = {
            "slow": gateway.entry("slow", pending_tokens_total=100, engine_capacity=10.0),
            "fast": gateway.entry("fast", pending_tokens_total=1000, engine_capacity=1000.0),
        }
        self.assertEqual(self.chosen(self.table(gateway)), {"fast"})

    def test_of_many_every_one_but_the_most_loaded_may_be_chosen(self) -> None:
        gateway = self.gateway()
        gateway.engines = {str(n): gateway.entry(str(n), pending_tokens_total=n) for n in range(5)}
        self.assertEqual(self.chosen(self.table(gateway)), {"0", "1", "2", "3"})

    def test_unknown_counts_as_usual_and_never_as_idle(self) -> None:
        gateway = self.gateway()
        loads = {"idle": 0, "usual": 500, "busy": 90_000}
        gateway.engines = {name: gateway.entry(name, pending_tokens_total=load) for name, load in loads.items()}
        gateway.engines["beats"] = gateway.entry("beats", pending_tokens_total=0, engine_capacity=0.0, heartbeat=True)
        table = self.table(gateway)
        pairs = {("beats", "idle"): "idle", ("beats", "busy"): "beats"}
        for pair, better in pairs.items():
            with self.subTest(pair):
                self.assertEqual(self.chosen(table, where=lambda entry, pair=pair: entry.engine_id in pair), {better})
        self.assertEqual(self.chosen(table, exclude={"idle", "usual", "busy"}), {"beats"})
        self.assertNotIn("beats", self.chosen(table, usable=True))
        self.assertEqual(self.ids(table.usable()), set(loads))
        self.assertEqual(self.ids(table.live()), {*loads, "beats"})

    def test_unknown_is_not_idle_either_when_the_first_engines_have_just_come(self) -> None:
        """The usual load is looked for while nobody is there; then the first ones are chosen from at once."""
        gateway = self.gateway()
        table = self.table(gateway)
        table._look_for_usual()
        self.heard(table, gateway, "usual", pending_tokens_total=500)
        self.heard(table, gateway, "busy", pending_tokens_total=90_000)
        self.heard(table, gateway, "idle", pending_tokens_total=0)
        self.heard(table, gateway, "beats", pending_tokens_total=0, engine_capacity=0.0, heartbeat=True)
        chosen = self.chosen(table, where=lambda entry: entry.engine_id in ("beats", "idle"))
        self.assertEqual(chosen, {"idle"})

    def test_where_nothing_is_known_any_may_be_chosen(self) -> None:
        gateway = self.gateway()
        gateway.engines = {name: gateway.entry(name, heartbeat=True) for name in "ab"}
        table = self.table(gateway)
        self.assertEqual(self.chosen(table), {"a", "b"})
        self.assertIsNone(table.choose(usable=True))

    def test_only_what_is_live_is_chosen_and_none_where_nothing_is(self) -> None:
        gateway = self.gateway(*map(str, range(50)))
        table = self.table(gateway)
        self.clock.move(1.0)
        self.heard(table, gateway, "7")
        self.clock.move(1.1)
        self.assertEqual(self.chosen(table), {"7"})
        self.assertIsNone(table.choose(exclude={"7"}))
        self.clock.move(1.0)
        self.assertIsNone(table.choose())
        self.heard(table, gateway, "8")
        self.assertEqual(self.chosen(table), {"8"})

    def test_among_few_of_many_a_choice_is_found(self) -> None:
        gateway = self.gateway(*map(str, range(300)))
        gateway.engines["5"]["pending_tokens_total"] = 10_000
        table = self.table(gateway)
        for _ in range(20):
            entry = table.choose(where=lambda entry: entry.engine_id in ("5", "6"))
            self.assertEqual(entry and entry.engine_id, "6")

    def test_fleet_has_the_sums_of_what_is_known(self) -> None:
        gateway = self.gateway()
        gateway.engines = {
            "a": gateway.entry("a", pending_tokens_total=7, phase="serving"),
            "b": gateway.entry("b", pending_tokens_total=5, kv_cache_free_blocks=-1, engine_capacity=0.0),
            "c": gateway.entry("c", heartbeat=True),
            "d": gateway.entry("d", phase="sleeping"),
            "e": gateway.entry("e", 2500),
        }
        fleet = self.table(gateway).fleet()
        self.assertEqual([fleet[name] for name in ("live", "unavailable", "stale", "usable")], [3, 1, 1, 2])
        self.assertEqual(fleet["sums"]["pending_tokens_total"], {"sum": 12, "engines": 2})
        self.assertEqual(fleet["sums"]["kv_cache_free_blocks"], {"sum": 100, "engines": 1})
        self.assertEqual(fleet["sums"]["engine_capacity"], {"sum": 1000.0, "engines": 1})
        self.assertEqual(fleet["phases"], {"serving": 3, "sleeping": 1})
        self.assertEqual(fleet["scheduling_modes"], {"latency_optimized": 4})


class Signals(TableCase):
    """A signal's handler may ask whatever it likes, in the middle of whatever its thread does."""

    def test_a_thread_that_holds_every_lock_asks_and_closes(self) -> None:
        gateway, done = self.gateway("a"), threading.Event()

        def interrupted() -> None:
            table = EngineTable(gateway.url, clock=self.clock)  # here, so that nobody else waits for its locks
            self.assertTrue(table.wait_until_known(DEADLINE_S))
            name, changes = table._names[0], table._changes
            table.on_change(lambda _: None)
            with table._lock, changes.condition, changes.subscriptions[0]._lock, name._lock:
                self.assertEqual(len(table.live()), table.fleet()["live"])
                table.choose()
                table.wait(0)
                table.gateways()
                table.retry_now()
                table.on_change(lambda _: None)()
                table.close()
            done.set()

        threading.Thread(target=interrupted, daemon=True).start()
        self.assertTrue(done.wait(DEADLINE_S), "the thread failed, or waits for itself")


class Changes(TableCase):
    """Who wants to know of changes is told of all of them, and holds up nobody."""

    def test_wait_returns_with_the_next_change(self) -> None:
        gateway = self.gateway("a")
        table = self.table(gateway)
        version = table.wait(0)
        self.assertEqual(table.wait(0.01, version), version)
        gateway.tell("b")
        self.assertGreater(table.wait(DEADLINE_S, version), version)

    def test_callbacks_get_the_ids_also_of_what_grew_stale(self) -> None:
        gateway = self.gateway("a", "b")
        table = self.table(gateway)
        seen: set[str] = set()

        def raises(_: frozenset[str]) -> None:
            raise RuntimeError("as a router's own mistake may be")

        def exits(_: frozenset[str]) -> None:
            raise SystemExit

        table.on_change(raises)
        table.on_change(exits)
        end = table.on_change(seen.update)
        gateway.tell("b")
        wait_until("b to be told", lambda: seen == {"b"})
        seen.clear()
        self.clock.move(2.1)
        wait_until("both to be told stale", lambda: seen == {"a", "b"})
        end()
        end()
        seen.clear()
        self.heard(table, gateway, "c")
        self.clock.move(0.2)
        self.heard(table, gateway, "d")
        self.assertEqual(seen, set())

    def test_asyncio_follows_without_a_thread_of_its_own(self) -> None:
        gateway = self.gateway("a")
        table = self.table(gateway)

        async def follow() -> list[frozenset[str]]:
            told: list[frozenset[str]] = []
            async for changed in table.changes():
                told.append(changed)
                if len(told) == 1:
                    gateway.tell("b")
                else:
                    table.close()
            return told

        self.assertEqual(asyncio.run(asyncio.wait_for(follow(), DEADLINE_S)), [{"a"}, {"b"}])
        self.assertEqual(table._changes.subscriptions, [])

    def test_closing_ends_every_thread_and_leaves_what_is_known(self) -> None:
        gateway = self.gateway("a")
        before = threading.active_count()
        with EngineTable(gateway.url, clock=self.clock) as table:
            self.assertTrue(table.wait_until_known(DEADLINE_S))
            self.assertGreater(threading.active_count(), before)
        wait_until("the threads to end", lambda: threading.active_count() == before)
        self.assertEqual(self.ids(table.live()), {"a"})
        table.close()

    def test_who_waits_for_nobody_is_told_so(self) -> None:
        gateway = self.gateway()
        gateway.close()
        with EngineTable(gateway.url) as table:
            self.assertFalse(table.wait_until_known(0.05))


class Trouble(TableCase):
    """Whatever answers: nothing raises where a router looks, one line a minute says what is wrong, and ages grow."""

    def setUp(self) -> None:
        super().setUp()
        logging.getLogger("engine_table").disabled = False

    def assert_survived(self, answer: Callable[[socket.socket, str], None], problem: str) -> None:
        """It followed a gateway; that is answered instead; then it is followed again."""
        gateway = self.gateway("a")
        with self.assertLogs("engine_table") as logged:
            table = self.table(gateway)
            gateway.answer = answer
            gateway.hang_up()
            wait_until("it to be asked some times", lambda: len(gateway.heads) > 4)
            wait_until(f"to be told of {problem}", lambda: problem in table.gateways()[0].problem)
            self.assertEqual(self.ids(table.live()), {"a"})
            self.clock.move(2.1)
            self.assertEqual((table.live(), table.choose(), len(table)), ([], None, 1))
            gateway.answer = gateway.watch
            gateway.engines["b"] = gateway.entry("b")
            wait_until("it to be followed again", lambda: table.gateways()[0].connected)
            wait_until("to know what is new", lambda: "b" in table or "Last-Event-ID" in gateway.heads[-1])
            wait_until("that to be said", lambda: "followed again" in logged.output[-1])
        self.assertEqual(len(logged.output), 2, logged.output)
        self.assertRegex(logged.output[0], "^WARNING:engine_table:gateway http://127.0.0.1:[0-9]+: cannot be followed")

    def answers(self, text: bytes) -> Callable[[socket.socket, str], None]:
        def answer(sock: socket.socket, _: str) -> None:
            sock.sendall(text)
            sock.shutdown(socket.SHUT_RDWR)

        return answer

    def http(self, status: str, kind: str, body: str) -> Callable[[socket.socket, str], None]:
        head = f"HTTP/1.1 {status}\r\nContent-Type: {kind}\r\nContent-Length: {len(body)}\r\n\r\n"
        return self.answers((head + body).encode())

    def stream(self, text: str) -> Callable[[socket.socket, str], None]:
        return self.answers(b"HTTP/1.1 200 OK\r\nContent-Type: text/event-stream\r\n\r\n" + text.encode())

    def endless(
        self, piece: bytes, head: bytes = b"HTTP/1.1 200 OK\r\nContent-Type: text/event-stream\r\n\r\n"
    ) -> Callable[[socket.socket, str], None]:
        """Nothing but that behind the head, for as long as anybody reads it."""

        def answer(sock: socket.socket, _: str) -> None:
            with contextlib.suppress(OSError):
                sock.sendall(head)
                while True:
                    sock.sendall(piece)

        return answer

    def test_html(self) -> None:
        self.assert_survived(self.http("200 OK", "text/html; charset=utf-8", "<p>welcome"), "'text/html', not an event")

    def test_an_answer_without_a_type(self) -> None:
        self.assert_survived(self.answers(b"HTTP/1.1 200 OK\r\n\r\n"), "no content type")

    def test_401(self) -> None:
        self.assert_survived(self.http("401 Unauthorized", "application/json", '{"error": "no"}'), "wants a token")

    def test_404(self) -> None:
        self.assert_survived(self.http("404 Not Found", "text/plain", "what?"), "is this a state gateway")

    def test_503(self) -> None:
        self.assert_survived(self.http("503 Service Unavailable", "application/json", '{"error": "full"}'), "full")

    def test_a_redirection_is_not_followed(self) -> None:
        self.assert_survived(self.http("302 Found", "text/plain", ""), "302 Found")
        text = b"HTTP/1.1 301 Moved\r\nLocation: https://elsewhere.example/\r\n\r\n"
        self.assert_survived(self.answers(text), "not followed to 'https://elsewhere.example/'")

    def test_no_http(self) -> None:
        self.assert_survived(self.answers(b"SSH-2.0-OpenSSH_9.2\r\n"), "does not speak HTTP")

    def test_nothing(self) -> None:
        self.assert_survived(self.answers(b""), "closed connection")

    def test_half_a_head(self) -> None:
        self.assert_survived(self.answers(b"HTTP/1.1 200 OK\r\nContent-Ty"), "no content type")

    def test_half_a_line(self) -> None:
        self.assert_survived(self.stream('id: 5\nevent: snapshot\ndata: {"insta'), "closed the stream")

    def test_an_endless_line(self) -> None:
        with mock.patch.object(engine_table.EventStream.__init__, "__defaults__", (5000, "")):
            self.assert_survived(self.stream("data: " + "x" * 9000), "longer than 5000")

    def test_an_endless_head(self) -> None:
        self.assert_survived(self.answers(b"HTTP/1.1 200 OK\r\n" + b"x" * 100_000), "does not speak HTTP")

    def test_wrong_json(self) -> None:
        for wrong in ("{", "{}{}", "NaN", "[" * 100_000, '{"engines": ' + "1" * 10_000 + "}"):
            with self.subTest(wrong[:20]):
                self.assert_survived(self.stream(f"id: 5\nevent: snapshot\ndata: {wrong}\n\n"), "JSON")

    def test_another_api(self) -> None:
        for other in (
            'data: {"choices": []}\n\n', 'event: state\ndata: {"engine_id": "a"}\n\n', "event: snapshot\ndata: []\n\n",
            'event: snapshot\ndata: {"engines": {}}\n\n',
            'event: snapshot\ndata: {"instance": 1, "engines": [], "stale_threshold_ms": 0, "time_ms": 1}\n\n',
        ):  # fmt: skip
            with self.subTest(other):
                self.assert_survived(self.stream(other), "snapshot")

    def test_a_compressed_stream(self) -> None:
        text = b"HTTP/1.1 200 OK\r\nContent-Type: text/event-stream\r\nContent-Encoding: gzip\r\n\r\n"
        self.assert_survived(self.answers(text), "compressed")

    def test_one_that_never_answers(self) -> None:
        with mock.patch.object(engine_table, "ANSWER_TIMEOUT_S", 0.02):
            self.assert_survived(lambda *_: None, "no answer within 0.02 s")

    def test_one_that_answers_a_little_at_a_time(self) -> None:
        with mock.patch.object(engine_table, "ANSWER_TIMEOUT_S", 0.02):
            self.assert_survived(self.endless(b"HTTP/1.1 100 Continue\r\n\r\n", b""), "no answer within 0.02 s")

    def test_a_refusal_without_its_words(self) -> None:
        with mock.patch.object(engine_table, "REFUSAL_TIMEOUT_S", 0.02):
            head = b"HTTP/1.1 401 Unauthorized\r\nContent-Length: 10\r\n\r\n"
            self.assert_survived(lambda sock, _: sock.sendall(head), "wants a token")

    def test_an_event_that_never_ends(self) -> None:
        with mock.patch.object(engine_table, "EVENT_TIMEOUT_S", 0.02):
            self.assert_survived(self.endless(b"data: x\n"), "not whole after 0.02 s")

    def test_comments_are_no_snapshot(self) -> None:
        gateway = self.gateway()
        gateway.answer = self.endless(b":\n\n")
        with (
            mock.patch.object(engine_table, "SNAPSHOT_TIMEOUT_S", 0.02),
            self.assertLogs("engine_table") as logged,
            EngineTable(gateway.url, clock=self.clock),
        ):
            wait_until("it to be asked some times", lambda: len(gateway.heads) > 4)
        self.assertEqual(len(logged.output), 1, logged.output)
        self.assertRegex(logged.output[0], "no snapshot within 0.02 s|silent for 0.0 s")

    def test_one_that_never_tells(self) -> None:
        with mock.patch.object(engine_table, "SILENCE_S", 0.02):
            self.assert_survived(
                lambda sock, _: sock.sendall(b"HTTP/1.1 200 OK\r\nContent-Type: text/event-stream\r\n\r\n"), "silent"
            )

    def test_a_chunked_stream_that_breaks_off(self) -> None:
        text = b"HTTP/1.1 200 OK\r\nContent-Type: text/event-stream\r\nTransfer-Encoding: chunked\r\n\r\n5\r\nid"
        self.assert_survived(self.answers(text), "broke off")

    def test_a_zone_is_written_as_in_a_url_or_as_it_is(self) -> None:
        """`fe80::1%25eth0` is what curl takes, `fe80::1%eth0` what everybody types."""
        for host in ("[fe80::1%25eth0]", "[fe80::1%eth0]"):
            url = engine_table._Url(f"http://{host}:9999/gateway/")
            self.assertEqual((url.addresses(), url.port), ([["fe80::1%eth0"]], 9999))

    def test_a_wrong_url_raises_at_once(self) -> None:
        for wrong in (
            "", "gateway:9999", "ftp://gateway", "http://", "http:///x", "http://gateway:99999", "http://gateway:0",
            "http://gateway:port", "http://gate way", "http://user:secret@gateway", "http://gateway?x=1", "http://gateway#x",
            "http://gateway/watch", "http://gateway:9999/engines/", "http://[::1", "http://gateway\n", "http://g\u00e4teway",
            "http://<gateway>", None, 9999, b"http://gateway",
        ):  # fmt: skip
            with self.subTest(wrong), self.assertRaises(ValueError):
                EngineTable("http://127.0.0.1:9", wrong)  # type: ignore[arg-type]
        with self.assertRaises(ValueError):
            EngineTable()
        for token in ("a b", "a\r\nX: y", "\u00e4", ""):
            with self.subTest(token), self.assertRaises(ValueError) as raised:
                EngineTable("http://127.0.0.1:9", token=token)
            self.assertNotIn("X: y", str(raised.exception))
        with self.assertRaises(ValueError):
            EngineTable("http://127.0.0.1:9", expire_after_ms=0)

    def test_no_secret_is_in_what_is_raised(self) -> None:
        with self.assertRaises(ValueError) as raised:
            EngineTable("http://user:secret@gateway")
        self.assertNotIn("secret", str(raised.exception))


class Asking(TableCase):
    """How a gateway is asked: base paths, tokens, TLS."""

    def test_the_base_path_and_the_token_are_sent(self) -> None:
        gateway = self.gateway("a")
        gateway.url += "/base/path/"
        self.assertEqual(self.known(gateway, token="0123456789abcdef"), {"a"})
        self.assertRegex(gateway.heads[0], "^GET /base/path/watch HTTP/1.1\r\n")
        self.assertIn("\r\nAuthorization: Bearer 0123456789abcdef\r\n", gateway.heads[0])
        self.assertIn("\r\nAccept: text/event-stream\r\n", gateway.heads[0])

    def known(self, gateway: FakeGateway, **how: Any) -> set[str]:
        with EngineTable(gateway.url, clock=self.clock, **how) as table:
            self.assertTrue(table.wait_until_known(DEADLINE_S), table.gateways())
            return self.ids(table.entries())

    def test_a_thread_that_cannot_be_started_now_is_started_later(self) -> None:
        real_start, ours = threading.Thread.start, threading.current_thread
        refused: list[threading.Thread] = []

        def start(thread: threading.Thread) -> None:
            """The name's own thread is started by the constructor; its follower's is refused once."""
            if not refused and thread.name.startswith("engine-table 127.") and ours().name == thread.name:
                refused.append(thread)
                raise RuntimeError("can't start new thread")
            real_start(thread)

        logging.getLogger("engine_table").disabled = False
        with (
            mock.patch.object(threading.Thread, "start", start),
            mock.patch("engine_table.LOOKUP_S", 0.01),
            self.assertLogs("engine_table", "WARNING") as caught,
        ):
            self.assertEqual(self.known(self.gateway("a")), {"a"})
        self.assertIn("it cannot be followed: can't start new thread", caught.output[0])

    def test_a_token_is_asked_for_at_each_connection(self) -> None:
        gateway = self.gateway("a")
        tokens = iter(["first-token-0123", "second-token-012"])
        table = self.table(gateway, token=lambda: next(tokens, "another-token-01"))
        gateway.hang_up()
        wait_until("it to come back", lambda: len(gateway.heads) > 1 and table.gateways()[0].connected)
        sent = [head.partition("Bearer ")[2].partition("\r\n")[0] for head in gateway.heads[:2]]
        self.assertEqual(sent, ["first-token-0123", "second-token-012"])

    def test_a_token_that_cannot_be_had_is_what_is_wrong(self) -> None:
        gateway = self.gateway("a")

        def raises() -> str:
            raise RuntimeError("no vault")

        for token, problem in (
            (raises, "the function that is asked for the token raised RuntimeError('no vault')"),
            (lambda: b"0123456789abcdef", "the token is a string, and not of type bytes"),
        ):
            with self.subTest(problem):
                table = EngineTable(gateway.url, token=token, clock=self.clock)  # type: ignore[arg-type]
                self.addCleanup(table.close)
                wait_until("it to be said", lambda: bool(table.gateways()))  # noqa: B023
                wait_until("it to be said", lambda: table.gateways()[0].problem == problem)  # noqa: B023
        with self.assertRaisesRegex(ValueError, "not of type int"):
            EngineTable(gateway.url, token=5)  # type: ignore[arg-type]

    def test_answers_before_the_answer_are_passed_over(self) -> None:
        gateway = self.gateway("a")

        def answer(sock: socket.socket, head: str) -> None:
            for status in ("103 Early Hints", "100 Continue", "102 Processing"):
                sock.sendall(f"HTTP/1.1 {status}\r\nLink: </x>\r\n\r\n".encode())
            gateway.watch(sock, head)

        gateway.answer = answer
        self.assertEqual(self.known(gateway), {"a"})

    def test_a_stream_in_chunks_is_read(self) -> None:
        gateway = self.gateway("a")

        def answer(sock: socket.socket, _: str) -> None:
            head = b"HTTP/1.1 200 OK\r\nContent-Type: text/event-stream\r\nTransfer-Encoding: chunked\r\n\r\n"
            text = gateway.event("snapshot", gateway.snapshot()).encode()
            sock.sendall(head + b"".join(b"%x\r\n%b\r\n" % (1, bytes([byte])) for byte in text))

        gateway.answer = answer
        self.assertEqual(self.known(gateway), {"a"})

    @unittest.skipUnless(shutil.which("openssl"), "openssl is not on this machine")
    def test_https_is_spoken_and_certificates_are_checked(self) -> None:
        folder = tempfile.mkdtemp()
        self.addCleanup(shutil.rmtree, folder, ignore_errors=True)
        key, certificate = f"{folder}/key.pem", f"{folder}/certificate.pem"
        subprocess.run(
            ["openssl", "req", "-x509", "-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:P-256", "-nodes", "-days", "2",
             "-subj", "/CN=gateway", "-addext", "subjectAltName=IP:127.0.0.1", "-keyout", key, "-out", certificate],
            check=True, capture_output=True, timeout=DEADLINE_S,
        )  # fmt: skip
        gateway = self.gateway("a")
        gateway.tls = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
        gateway.tls.load_cert_chain(certificate, key)
        gateway.url = gateway.url.replace("http:", "https:")
        self.assertEqual(self.known(gateway, ssl_context=ssl.create_default_context(cafile=certificate)), {"a"})
        with EngineTable(gateway.url) as table:
            wait_until(
                "it to be refused", lambda: [g for g in table.gateways() if "certificate verify failed" in g.problem]
            )
            self.assertEqual(len(table), 0)


class InUse(unittest.TestCase):
    """The file as a router has it: beside nothing else, with the real gateway."""

    def run_alone(self, program: str, *arguments: str) -> str:
        """What a program prints that has a copy of the file beside it, and nothing else of the project."""
        with tempfile.TemporaryDirectory() as folder:
            shutil.copy(TOP / "engine_table.py", folder)
            done = subprocess.run(
                [sys.executable, "-c", program, *arguments],
                cwd=folder,
                env=clean_environment(),
                capture_output=True,
                text=True,
                timeout=DEADLINE_S * 2,
                check=False,
            )
        self.assertEqual((done.returncode, done.stderr), (0, ""))
        return done.stdout

    def test_it_needs_nothing_but_itself(self) -> None:
        program = (
            "import sys; before = set(sys.modules); import engine_table; "
            "print({name.partition('.')[0] for name in set(sys.modules) - before} - sys.stdlib_module_names)"
        )
        self.assertEqual(self.run_alone(program), "{'engine_table'}\n")

    def test_it_follows_a_real_gateway_through_start_silence_return_and_restart(self) -> None:
        """At no look is an engine live that was not pushed within the threshold, but for what a slow machine takes."""
        port = free_port()
        settings: dict[str, Any] = {"UDP_PORT": port, "BIND_ADDRESS": "127.0.0.1", "STALE_THRESHOLD": 1000}
        pushed: dict[str, float] = {}
        silent: set[str] = set()

        def push(turn: int) -> None:
            with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as sock:
                for engine_id in {"a", "b", "c"} - silent:
                    pushed[engine_id] = time.monotonic()
                    sock.sendto(datagram(engine_id=engine_id, timestamp_ms=turn), ("127.0.0.1", port))

        def live() -> set[str]:
            now = time.monotonic()
            found = {entry.engine_id for entry in table.live()}
            for engine_id in found:
                self.assertLess(now - pushed[engine_id], 1.0 + 4.0)
            return found

        logging.getLogger("engine_table").disabled = True
        self.addCleanup(setattr, logging.getLogger("engine_table"), "disabled", False)
        with again_and_again(0.05, push), EngineTable(f"http://localhost:{port}") as table:
            with daemon(**settings):
                wait_until("all to be seen", lambda: live() == {"a", "b", "c"})
                silent.add("b")
                wait_until("b to be stale", lambda: live() == {"a", "c"})
                self.assertEqual(table.get("b").status, "stale")  # type: ignore[union-attr]
                silent.clear()
                wait_until("b to be back", lambda: live() == {"a", "b", "c"})
                self.assertIn(table.choose().engine_id, {"a", "b", "c"})  # type: ignore[union-attr]
                instance = table.gateways()[0].instance
            with daemon(**settings):
                wait_until("the new one to be followed", lambda: live() and table.gateways()[0].instance != instance)
                wait_until("all to be seen again", lambda: live() == {"a", "b", "c"})
            wait_until("all to be stale without a gateway", lambda: not live())
            self.assertIsNone(table.choose())
            wait_until("all to be removed", lambda: len(table) == 0)

    def test_entries_are_those_of_engines(self) -> None:
        with daemon(BIND_ADDRESS="127.0.0.1", STALE_THRESHOLD=60_000) as running:
            running.send(datagram(engine_id="a"), heartbeat(engine_id="b"), datagram(engine_id='"\\引擎'))
            running.wait_received(3)
            with EngineTable(f"http://127.0.0.1:{running.http_port}") as table:
                self.assertTrue(table.wait_until_known(DEADLINE_S))
                shown = running.ask("/engines").json["engines"]
                entries = {entry.engine_id: entry.as_dict() for entry in table}
        ages = {"age_ms": 0, "state_age_ms": 0}
        self.assertEqual(entries.keys(), shown.keys())
        for engine_id, entry in shown.items():
            self.assertEqual({**entries[engine_id], **entry, **ages}, {**entries[engine_id], **ages})
        self.assertEqual([entry["usable"] for entry in entries.values()], [True, False, True])

    @unittest.skipUnless(hasattr(os, "fork"), "no fork here")
    def test_a_forked_child_follows_anew(self) -> None:
        program = """
import os, sys, time, warnings
warnings.simplefilter("ignore")  # newer Pythons warn of forks beside threads
from engine_table import EngineTable
table = EngineTable(sys.argv[1])
assert table.wait_until_known(30)
print(len(table), flush=True)
with table._lock, table._changes.condition, table._names[0]._lock:  # as another thread of the parent's may have them
    child = os.fork()
if not child:
    table.on_change(lambda ids: None)
    assert table.get("a") is not None  # known by the parent
    assert len(table._changes.subscriptions) == 1  # that of the child, which began anew before
    deadline = time.monotonic() + 30
    while not (len(table.gateways()) == 1 and table.gateways()[0].connected):
        assert time.monotonic() < deadline
    print(table.live()[0].engine_id, flush=True)
    table.close()
    os._exit(0)
assert os.waitpid(child, 0)[1] == 0
assert table.gateways()[0].connected
print("and the parent goes on")
"""
        with (
            daemon(BIND_ADDRESS="127.0.0.1", STALE_THRESHOLD=60_000) as running,
            # It changes all the time: the child may ask for changes after it was told what there is.
            again_and_again(0.05, lambda turn: running.send(datagram(engine_id="a", timestamp_ms=turn + 1))),
        ):
            running.wait_received(1)
            said = self.run_alone(program, f"http://127.0.0.1:{running.http_port}")
        self.assertEqual(said, "1\na\nand the parent goes on\n")


if __name__ == "__main__":
    unittest.main()
