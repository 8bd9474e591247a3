"""What each path answers (the contract's section 6), without a socket."""

from __future__ import annotations

import json
import unittest
from collections.abc import Callable
from typing import Any
from unittest import mock
from urllib.parse import quote

import state_query
from http_message import Answer, QueryError, Request
from state_entry import entry
from state_query import Query
from state_store import StateStore
from state_watch import Watch
from tests.harness import PLACEHOLDERS, FakeClock, batch, datagram, fields

WALL_S = 1755532567.5
NASTY = (
    "'\"\\<script>alert(1)</script>",
    "../..",
    "%2e%2f",
    "/?#&=+",
    "a/history",
    "http://[::1]:8000/",
    "引擎 😀",
    "{}",
)


class AnyGateway:
    """A gateway that says what it is told to."""

    version = "1.2.3"
    embedded = False

    def __init__(self) -> None:
        self.moving = {"udp-listener": True, "reaper": True}
        self.ready = True
        self.wait_ms = 0
        self.waiting: list[Callable[[], object]] = []  # what has arrived and is not taken yet

    def get_events(self, since_ms: int = 0) -> list[dict[str, Any]]:
        return [{"time_ms": time_ms} for time_ms in (1000, 2000) if time_ms >= since_ms]

    def samples_json(self, since_ms: int = 0) -> bytes:
        return json.dumps(self.get_events(since_ms)).encode()

    def get_stats(self) -> dict[str, Any]:
        raise NotImplementedError  # tested with a real one, in test_state_gateway

    def snapshot_header(self) -> dict[str, Any]:
        return {"instance": "i", "uptime_ms": 1, "time_ms": 2, "stale_threshold_ms": 2000}

    def catch_up(self) -> None:
        while self.waiting:
            self.waiting.pop()()

    def threads(self) -> dict[str, bool]:
        return self.moving

    def is_ready(self) -> bool:
        return self.ready

    def ready_in_ms(self) -> int:
        return self.wait_ms


class QueryCase(unittest.TestCase):
    def setUp(self) -> None:
        self.clock = FakeClock()
        self.store = StateStore(2000, 6000, 1000, 3, clock=self.clock)
        self.gateway = AnyGateway()
        self.query = Query(self.store, self.gateway, Watch(self.store, clock=self.clock), clock=self.clock)

    def take(self, **changes: Any) -> None:
        self.store.apply(batch(self.clock(), WALL_S, datagram(**changes)))

    def get(self, target: str, status: int = 200) -> Any:
        answer = self.query.answer(target)
        assert isinstance(answer, Answer)
        self.assertEqual(answer.status, status)
        self.assertEqual(answer.content_type, "application/json")
        return json.loads(answer.body)

    def assert_refused(self, target: str, status: int) -> None:
        with self.assertRaises(QueryError) as refused:
            self.query.answer(target)
        self.assertEqual(refused.exception.status, status)


class Memory(QueryCase):
    """/events and /samples: what was, from a time on."""

    def test_since_is_inclusive_and_may_be_left_out(self) -> None:
        for path in ("/events", "/samples"):
            with self.subTest(path):
                self.assertEqual([one["time_ms"] for one in self.get(path)], [1000, 2000])
                self.assertEqual([one["time_ms"] for one in self.get(f"{path}?since=2000")], [2000])
                self.assertEqual(self.get(f"{path}?since=2001"), [])

    def test_what_is_no_time_is_refused(self) -> None:
        for since in ("", "-1", "1.5", "x", "1" * 17, str(2**53 + 1), "%EF%BC%91", "1&since=2"):
            for path in ("/events", "/samples"):
                with self.subTest(path, since=since):
                    self.assert_refused(f"{path}?since={since}", 400)


class Engines(QueryCase):
    """/engines: every engine, and how fresh it is."""

    def test_an_entry_has_the_state_and_its_freshness(self) -> None:
        self.take()
        self.clock.move(0.25)
        self.assertEqual(
            self.get("/engines"),
            {
                "instance": "i",
                "uptime_ms": 1,
                "time_ms": 2,
                "stale_threshold_ms": 2000,
                "active_engines": 1,
                "total_engines": 1,
                "fleet": {
                    "live": 1,
                    "unavailable": 0,
                    "stale": 0,
                    "usable": 1,
                    "sums": {
                        "pending_tokens_total": {"sum": 10, "engines": 1},
                        "kv_cache_free_blocks": {"sum": 100, "engines": 1},
                        "kv_cache_total_blocks": {"sum": 1000, "engines": 1},
                        "engine_capacity": {"sum": 1000.0, "engines": 1},
                    },
                    "scheduling_modes": {"latency_optimized": 1},
                    "phases": {"serving": 1},
                },
                "engines": {
                    "test": {
                        **fields(),
                        "status": "live",
                        "usable": True,
                        "conflict": False,
                        "heartbeat": False,
                        "load_known": True,
                        "phase": None,
                        "restarts": 0,
                        "lost": None,
                        "age_ms": 250,
                        "state_age_ms": 250,
                        "received_ms": 1755532567500,
                        "clock_offset_ms": 1755532567500 - 1234567890,
                        "source": "10.0.0.1:5000",
                    }
                },
            },
        )

    def test_none_is_an_empty_object(self) -> None:
        self.assertEqual(self.get("/engines")["engines"], {})

    def test_stale_engines_are_shown_as_such_and_can_be_left_out(self) -> None:
        self.take(engine_id="old")
        self.clock.move(2.5)
        self.take(engine_id="new")
        everything = self.get("/engines")
        self.assertEqual(
            {name: e["status"] for name, e in everything["engines"].items()}, {"old": "stale", "new": "live"}
        )
        live = self.get("/engines?status=live")
        self.assertEqual(list(live["engines"]), ["new"])
        self.assertEqual((live["active_engines"], live["total_engines"]), (1, 2))
        self.assertEqual(list(self.get("/engines?status=stale")["engines"]), ["old"])

    def test_what_has_arrived_is_taken_before_it_is_answered(self) -> None:
        for number, path in enumerate(("/engines", "/engines/test", "/engines/test/history")):
            self.gateway.waiting.append(lambda number=number: self.take(timestamp_ms=number))  # type: ignore[misc]
            with self.subTest(path):
                self.assertIn(b'"timestamp_ms": %d,' % number, self.query.answer(path).body)  # type: ignore[union-attr]
        for path in ("/stats", "/metrics"):
            with (
                self.subTest(path),
                mock.patch.object(self.gateway, "get_stats", side_effect=QueryError(503, "-")) as asked,
            ):
                self.gateway.waiting.append(asked.assert_not_called)
                self.assert_refused(path, 503)
                self.assertEqual(self.gateway.waiting, [])

    def test_a_heartbeat_is_marked(self) -> None:
        self.take(**PLACEHOLDERS)
        self.assertIs(self.get("/engines")["engines"]["test"]["heartbeat"], True)

    def test_one_engine_is_its_entry(self) -> None:
        self.take()
        self.assertEqual(self.get("/engines/test"), self.get("/engines")["engines"]["test"])

    def test_from_python_an_entry_is_the_same(self) -> None:
        for engine_id in NASTY:
            self.take(engine_id=engine_id, latency_pred_ms=100)
        shown = self.get("/engines")["engines"]
        self.assertEqual({view.state.engine_id: entry(view) for view in self.store.views()}, shown)

    def test_nasty_names_are_opaque_keys(self) -> None:
        for number, engine_id in enumerate(NASTY):
            self.take(engine_id=engine_id, pending_tokens_total=number)
        self.assertEqual(list(self.get("/engines")["engines"]), list(NASTY))
        for number, engine_id in enumerate(NASTY):
            with self.subTest(engine_id):
                path = "/engines/" + quote(engine_id, safe="")
                self.assertEqual(self.get(path)["pending_tokens_total"], number)
                self.assertEqual(self.get(path + "/history")[0]["engine_id"], engine_id)
                asked = "?engine_id=" + quote(engine_id, safe="")
                self.assertEqual(list(self.get("/engines" + asked)["engines"]), [engine_id])
                self.assertEqual(self.get("/history" + asked), self.get(path + "/history"))

    def test_a_url_that_was_not_encoded_is_understood(self) -> None:
        self.take(engine_id="http://172.17.0.3:8000")
        self.assertEqual(self.get("/engines/http://172.17.0.3:8000")["engine_id"], "http://172.17.0.3:8000")

    def test_history_is_oldest_first_with_receipt(self) -> None:
        for number in range(5):
            self.take(timestamp_ms=number, pending_tokens_total=number)
        past = self.get("/engines/test/history")
        self.assertEqual([state["pending_tokens_total"] for state in past], [2, 3, 4])
        self.assertEqual(past[-1], {**fields(timestamp_ms=4, pending_tokens_total=4), "received_ms": 1755532567500})

    def test_a_slash_too_many_at_the_beginning_is_what_proxies_make_of_a_path_below_theirs(self) -> None:
        self.assertEqual(self.get("//version"), self.get("/version"))

    def test_what_is_not_there_is_404_and_what_is_no_question_400(self) -> None:
        for target in ("/nope", "//", "/..", "/engines/nobody", "/engines/", "/engines/nobody/history", "/engines/%00"):
            with self.subTest(target):
                self.assert_refused(target, 404)
        for target in (
            "/engines?status=dead", "/engines?status=", "/engines/%ff", "/engines?status=%ff", "/engines?%ff=1",
            "/engines?engine_id=", "/history", "/history?", "/history?engine_id=", "/history?engine_id=a&engine_id=b",
            "/engines?" + "status=live&" * 2000, "/engines//history", "/engines/100%", "/engines/%4",
            "/history?engine_id=%zz",
        ):  # fmt: skip
            with self.subTest(target):
                self.assert_refused(target, 400)

    def test_only_the_engines_asked_for(self) -> None:
        """`?engine_id=` narrows /engines, in the order asked; the fleet's counts stay the fleet's."""
        self.take(engine_id="old")
        self.clock.move(2.5)
        for engine_id in ("a", "b", "c d"):
            self.take(engine_id=engine_id)
        document = self.get("/engines?engine_id=c+d&engine_id=a&engine_id=nobody&engine_id=a")
        self.assertEqual(list(document["engines"]), ["c d", "a"])
        self.assertEqual((document["active_engines"], document["total_engines"]), (3, 4))
        self.assertEqual(self.get("/engines?engine_id=nobody")["engines"], {})
        both = self.get("/engines?engine_id=old&engine_id=b&status=stale")
        self.assertEqual(list(both["engines"]), ["old"])
        self.assertEqual(list(self.get("/engines")["engines"]), ["old", "a", "b", "c d"])

    def test_history_by_parameter_is_history_by_path(self) -> None:
        self.take()
        self.assertEqual(self.get("/history?engine_id=test"), self.get("/engines/test/history"))
        self.assert_refused("/history?engine_id=nobody", 404)

    def test_what_is_misspelt_is_refused(self) -> None:
        """A parameter that a path does not know is 400, naming those that it knows; probes and the page take any."""
        self.take()
        for route in state_query.ROUTES:
            target = route.path.replace("<engine_id>", "test") + "?staus=live"
            with self.subTest(target):
                if route.parameters is None:
                    self.assertIsInstance(self.query.answer(target), Answer)
                    self.assertIn(route.path, ("/", "/livez", "/health", "/readyz"))
                    continue
                with self.assertRaises(QueryError) as refused:
                    self.query.answer(target)
                self.assertEqual(refused.exception.status, 400)
                for name in route.parameters or ("no parameters",):
                    self.assertIn(name, str(refused.exception))
        self.assertEqual(list(self.get("/engines?st%61tus=live")["engines"]), ["test"])

    def test_the_error_never_repeats_the_question(self) -> None:
        for target in ("/<script>", "/engines/<script>", "/engines?status=<script>"):
            with self.assertRaises(QueryError) as refused:
                self.query.answer(target)
            self.assertNotIn("<script>", str(refused.exception))


class Methods(QueryCase):
    """Nothing can be changed: GET, HEAD and OPTIONS are answered."""

    def respond(self, method: str, target: str) -> Answer:
        answer = self.query.respond(Request(method, target, keep_alive=True))
        assert isinstance(answer, Answer)
        return answer

    def test_others_are_405_and_told_which_are_not(self) -> None:
        for method in ("POST", "DELETE", "MADE-UP", "get"):
            answer = self.respond(method, "/engines")
            self.assertEqual((answer.status, answer.headers), (405, ("Allow: GET, HEAD, OPTIONS",)))
            self.assertEqual(list(json.loads(answer.body)), ["error"])

    def test_options_is_204_on_any_path(self) -> None:
        """As HAProxy's default check asks."""
        for target in ("/", "*", "/engines", "/nowhere", "/engines?staus=live"):
            answer = self.respond("OPTIONS", target)
            self.assertEqual((answer.status, answer.body, answer.headers), (204, b"", ("Allow: GET, HEAD, OPTIONS",)))

    def test_an_error_is_an_answer(self) -> None:
        self.assertEqual(
            [self.respond("GET", target).status for target in ("/x", "/history", "/engines")], [404, 400, 200]
        )

    def test_probes_are_known_as_such(self) -> None:
        """They are answered before all others, whatever their parameters."""
        for target in ("/livez", "/health?x=y", "/readyz?"):
            self.assertTrue(self.query.is_probe(Request("GET", target, keep_alive=True)))
        for target in ("/", "/engines", "/livez/x", "/engines?/livez"):
            self.assertFalse(self.query.is_probe(Request("GET", target, keep_alive=True)))


class Health(QueryCase):
    """/livez says whether every thread moves, /readyz whether everything is open."""

    def test_alive(self) -> None:
        for path in ("/livez", "/health"):
            self.assertEqual(self.get(path), {"status": "ok", "threads": {"udp-listener": "ok", "reaper": "ok"}})

    def test_a_stuck_thread_is_named(self) -> None:
        self.gateway.moving["reaper"] = False
        for path in ("/livez", "/health"):
            document = self.get(path, 503)
            self.assertEqual(document["threads"], {"udp-listener": "ok", "reaper": "stuck"})
            self.assertIn("reaper", document["status"])

    def test_ready_and_not(self) -> None:
        self.get("/readyz")
        self.gateway.ready = False
        self.get("/readyz", 503)

    def test_ready_after(self) -> None:
        """Until READY_AFTER is over it says for how long; whoever asks for engines is answered all the same."""
        self.gateway.wait_ms = 1500
        self.assertIn("1500 ms", self.get("/readyz", 503)["status"])
        self.get("/engines")
        self.gateway.wait_ms = 0
        self.assertEqual(self.get("/readyz"), {"status": "ready"})

    def test_version(self) -> None:
        self.assertEqual(self.get("/version"), {"version": "1.2.3"})


if __name__ == "__main__":
    unittest.main()
