"""The description of the interface is true: every answer is as it says, and it says something of every member."""

from __future__ import annotations

import http.client
import json
import time
import unittest
from typing import Any

from openapi_document import PARAMETERS
from query_route import Route
from state_query import ROUTES
from tests.event_stream import EventStream
from tests.harness import DEADLINE_S, Daemon, daemon, datagram, heartbeat
from tests.json_schema import faults


class Description(unittest.TestCase):
    """What the document says by itself."""

    document: dict[str, Any]
    running: Daemon

    @classmethod
    def setUpClass(cls) -> None:
        context = daemon(BIND_ADDRESS="127.0.0.1", STALE_THRESHOLD=60_000)
        cls.running = context.__enter__()
        cls.addClassCleanup(context.__exit__, None, None, None)
        cls.running.send(
            datagram(engine_id="http://a:8000"),
            datagram(engine_id="http://a:8000", latency_pred_ms=7, timestamp_ms=2**53),
            heartbeat(engine_id="idle"),
            b"junk",
        )
        cls.running.wait_received(4)
        cls.document = cls.running.ask("/openapi.json").json

    def response(self, path: str, status: int) -> dict[str, Any]:
        response = self.document["paths"][path]["get"]["responses"][str(status)]
        assert isinstance(response, dict)
        return response

    def assert_described(self, path: str, target: str, status: int = 200) -> None:
        answer = self.running.ask(target)
        self.assertEqual(answer.status, status, target)
        media_type = answer.headers["Content-Type"].partition(";")[0]
        content = self.response(path, status)["content"]
        self.assertIn(media_type, content)
        if media_type == "application/json":
            self.assertEqual(faults(answer.json, content[media_type]["schema"], self.document, target), [])

    def test_every_route_is_in_it(self) -> None:
        self.assertEqual(self.document["openapi"], "3.1.0")
        paths = [route.path.replace("<", "{").replace(">", "}") for route in ROUTES]
        self.assertEqual(list(self.document["paths"]), paths)
        identifiers = [path["get"]["operationId"] for path in self.document["paths"].values()]
        self.assertEqual(len(set(identifiers)), len(identifiers))

    def test_every_parameter_is_in_it(self) -> None:
        known = {name for route in ROUTES for name in route.parameters or ()}
        self.assertLessEqual(known, set(PARAMETERS))
        for route in ROUTES:
            operation = self.document["paths"][route.path.replace("<", "{").replace(">", "}")]["get"]
            in_query = [one["name"] for one in operation["parameters"] if one["in"] == "query"]
            self.assertEqual(in_query, list(route.parameters or ()))

    def test_every_reference_leads_somewhere(self) -> None:
        schemas = self.document["components"]["schemas"]

        def references(part: Any) -> set[str]:
            if isinstance(part, dict):
                own = {part["$ref"]} if "$ref" in part else set()
                return own.union(*map(references, part.values()))
            return set().union(*map(references, part)) if isinstance(part, list) else set()

        used = {reference.removeprefix("#/components/schemas/") for reference in references(self.document)}
        self.assertLessEqual(used, set(schemas))

    def test_every_member_has_a_meaning(self) -> None:
        """With its unit, if it has one."""
        for name, schema in self.document["components"]["schemas"].items():
            for member, about in schema.get("properties", {}).items():
                with self.subTest(schema=name, member=member):
                    self.assertTrue(about.get("description") or "$ref" in about or about["type"] == "object")
                    if member.endswith("_ms") and "clock" not in member:
                        self.assertRegex(about["description"], r"\bms\b|milliseconds")

    def target(self, route: Route) -> str:
        target = route.path.replace("<engine_id>", "http%3A%2F%2Fa%3A8000")
        return target + ("?engine_id=http%3A%2F%2Fa%3A8000" if "engine_id" in route.required else "")

    def test_every_answer_is_described(self) -> None:
        """Every member of every document, and the status and media type of the others."""
        for route in ROUTES:
            path = route.path.replace("<", "{").replace(">", "}")
            if path != "/watch":
                with self.subTest(path):
                    self.assert_described(path, self.target(route))

    def test_errors_are_described(self) -> None:
        for path, target, status in (
            ("/engines", "/engines?staus=live", 400),
            ("/engines/{engine_id}", "/engines/nobody", 404),
            ("/engines/{engine_id}/history", "/engines/nobody/history", 404),
            ("/history", "/history", 400),
            ("/history", "/history?engine_id=nobody", 404),
            ("/watch", "/watch?min_interval_ms=x", 400),
            ("/metrics", "/metrics?engines=maybe", 400),
            ("/stats", "/stats?x", 400),
        ):
            with self.subTest(target):
                self.assert_described(path, target, status)

    def test_events_of_watch_are_described(self) -> None:
        events = self.document["paths"]["/watch"]["get"]["x-events"]
        connection = http.client.HTTPConnection("127.0.0.1", self.running.http_port, timeout=DEADLINE_S)
        self.addCleanup(connection.close)
        connection.request("GET", "/watch")
        response = connection.getresponse()
        self.assertIn(response.headers["Content-Type"].partition(";")[0], self.response("/watch", 200)["content"])
        stream = EventStream()
        seen: set[str] = set()
        number = 0
        deadline = time.monotonic() + DEADLINE_S
        while seen != {"snapshot", "state"}:
            self.assertLess(time.monotonic(), deadline, f"only {seen} came")
            # Again and again, because the snapshot may have the first of them already.
            number += 1
            self.running.send(datagram(engine_id="http://a:8000", timestamp_ms=2**52 + number, latency_pred_ms=8))
            for event in stream.feed(response.readline()):
                seen.add(event.kind)
                schema = events[event.kind]["data"]
                self.assertEqual(faults(json.loads(event.data), schema, self.document, event.kind), [])


if __name__ == "__main__":
    unittest.main()
