"""A closed list is one table: what a row of it changes, and that the pages say the same."""

from __future__ import annotations

import http.client
import json
import re
import shutil
import sys
import tempfile
import unittest
from pathlib import Path
from typing import Any

from engine_state import FIELDS, EngineState
from tests.harness import DEADLINE_S, TOP, Daemon, datagram, logged_states

NEW_FIELD = """    Field(
        "engine_temperature_c", "degrees, 0 or more", "how warm it is",
        _number, _DECIMAL, _decode_number,
        Metric("engine_temperature_celsius", "How warm the engine is"),
    ),
)  # fmt: skip
FIELD_NAMES = """
NEW_LINE = """    engine_capacity: float  # tokens/s, 0 = unknown
    engine_temperature_c: float
"""


class AFieldMore(unittest.TestCase):
    """A new field of a state is one row of FIELDS and one line of EngineState."""

    def setUp(self) -> None:
        temporary = tempfile.TemporaryDirectory()
        self.addCleanup(temporary.cleanup)
        self.folder = Path(temporary.name)
        for path in (*TOP.glob("*.py"), TOP / "status_page.html"):
            shutil.copy(path, self.folder)
        module = self.folder / "engine_state.py"
        text = module.read_text()
        row, line = ")  # fmt: skip\nFIELD_NAMES = ", "    engine_capacity: float  # tokens/s, 0 = unknown\n"
        self.assertEqual((text.count(row), text.count(line)), (1, 1))
        module.write_text(text.replace(row, NEW_FIELD).replace(line, NEW_LINE))

    def first_event(self, port: int) -> Any:
        connection = http.client.HTTPConnection("127.0.0.1", port, timeout=DEADLINE_S)
        self.addCleanup(connection.close)
        connection.request("GET", "/watch")
        response, data = connection.getresponse(), ""
        self.addCleanup(response.close)
        for line in response:
            text = line.decode().rstrip("\n")
            if text.startswith("data: "):
                data += text.removeprefix("data: ")
            if not text and data:
                return json.loads(data)
        raise AssertionError("the stream ended")

    def test_it_arrives_everywhere(self) -> None:
        running = Daemon(self.folder, {"LOG_FILE": "states.jsonl"}, [sys.executable, str(self.folder / "gateway.py")])
        self.addCleanup(running.close)
        running.wait_ready()
        sent = {
            "canonical": datagram(engine_id="canonical", engine_temperature_c=61.5),
            "parsed": datagram(engine_id="parsed", engine_temperature_c=7).replace(b" ", b""),
        }
        running.send(*sent.values(), datagram(engine_id="without"))
        stats = running.wait_received(3)
        self.assertEqual((stats["valid_states"], stats["invalid_reasons"]["missing_field"]), (2, 1))
        engines = running.ask("/engines").json["engines"]
        watched = self.first_event(running.http_port)["engines"]
        for engine_id, one in sent.items():
            with self.subTest(engine_id):
                state = json.loads(one)
                past = running.ask(f"/engines/{engine_id}/history").json
                entry = running.ask(f"/engines/{engine_id}").json
                for shown in (engines[engine_id], entry, watched[engine_id], past[-1]):
                    self.assertEqual({name: shown[name] for name in state}, state)
        lines = running.ask("/metrics").body.decode().splitlines()
        for engine_id, value in (("canonical", "61.5"), ("parsed", "7")):
            self.assertIn(f'elrar_state_gateway_engine_temperature_celsius{{engine_id="{engine_id}"}} {value}', lines)
        self.assertIn("# HELP elrar_state_gateway_engine_temperature_celsius How warm the engine is", lines)
        self.assertEqual(running.stop(), 0)
        self.assertEqual(logged_states(self.folder / "states.jsonl"), [json.loads(one) for one in sent.values()])


class Fields(unittest.TestCase):
    """The table of fields is the EngineState's, and docs/engines.md's."""

    def test_the_table_and_the_state_have_the_same_fields(self) -> None:
        self.assertEqual([field.name for field in FIELDS], list(EngineState.__dataclass_fields__))

    def test_at_most_two_modules_name_a_field_of_the_kv_cache(self) -> None:
        apart = {"engine_agent.py", "engine_table.py"}  # which are for other machines
        named = [
            path.name
            for path in TOP.glob("*.py")
            if path.name not in apart and re.search("kv_cache_[a-z]+_blocks", path.read_text())
        ]
        self.assertLessEqual(len(named), 2, named)

    def test_the_page_s_table_is_this_one(self) -> None:
        text = (TOP / "docs" / "engines.md").read_text()
        for field in FIELDS:
            row = f"| `{field.name}` | {field.accepts} | {field.meaning} |"
            self.assertTrue(row in text, row)


if __name__ == "__main__":
    unittest.main()
