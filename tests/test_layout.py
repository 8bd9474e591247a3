"""What docs/design.md says to edit for a change is true: each change is made to a copy, in those files only."""

from __future__ import annotations

import ast
import re
import shutil
import subprocess
import sys
import tempfile
import unittest
from dataclasses import dataclass
from pathlib import Path

from tests.harness import DEADLINE_S, TOP, clean_environment, datagram
from tests.test_tables import NEW_FIELD, NEW_LINE

# What each check has: a gateway of the changed copy, and ways to send to it and to ask it.
PRELUDE = """
import json, os, socket, sys, time, urllib.request
from config import read_config
from state_gateway import StateGateway

settings = {"UDP_PORT": "0", "BIND_ADDRESS": "127.0.0.1", "STALE_THRESHOLD": "600000", "LOG_FILE": "log.jsonl"}
state = json.loads(sys.argv[1])

def start(**changes):
    config = read_config({f"VLLM_STATE_GATEWAY_{name}": value for name, value in {**settings, **changes}.items()})
    gateway = StateGateway(config)
    gateway.open()
    gateway.start()
    return gateway

def open_url(gateway, path):
    return urllib.request.urlopen(f"http://127.0.0.1:{gateway.http_port}{path}", timeout=30)

def get(gateway, path):
    with open_url(gateway, path) as response:
        return response.read().decode()

def send(gateway, **changes):
    before = json.loads(get(gateway, "/stats"))["total_received"]
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as sock:
        sock.sendto(json.dumps({**state, **changes}).encode(), ("127.0.0.1", gateway.udp_port))
    give_up_at = time.monotonic() + 30  # an answer itself waits for 5 ms at most
    while time.monotonic() < give_up_at:
        stats = json.loads(get(gateway, "/stats"))
        if stats["total_received"] > before:
            return stats
    raise AssertionError("the datagram was not received within 30 s")
"""


@dataclass(frozen=True)
class Change:
    """A change as somebody makes it who reads the row: what is replaced in which file, and what must hold then."""

    edits: tuple[tuple[str, str, str], ...]
    check: str
    elsewhere: tuple[str, ...] = ()  # files that the row names in words only


CHANGES = {
    "a state field": Change(
        (
            ("engine_state.py", ")  # fmt: skip\nFIELD_NAMES = ", NEW_FIELD),
            ("engine_state.py", "    engine_capacity: float  # tokens/s, 0 = unknown\n", NEW_LINE),
        ),
        """
gateway = start()
send(gateway, engine_temperature_c=61.5)
assert json.loads(get(gateway, "/engines"))["engines"]["test"]["engine_temperature_c"] == 61.5
assert 'engine_temperature_celsius{engine_id="test"} 61.5' in get(gateway, "/metrics")
described = json.loads(get(gateway, "/openapi.json"))["components"]["schemas"]["Entry"]["properties"]
assert described["engine_temperature_c"]["type"] == "number", described
""",
    ),
    "a setting": Change(
        (
            (
                "config.py",
                '    Setting("STATS_INTERVAL"',
                '    Setting("SPARE", "spare", "7", "a whole number", "nothing", _whole_number(0, 9)),\n'
                '    Setting("STATS_INTERVAL"',
            ),
            ("config.py", "    stats_interval_s: int\n", "    stats_interval_s: int\n    spare: int\n"),
        ),
        """
import config
assert read_config({}).spare == 7
assert "VLLM_STATE_GATEWAY_SPARE=8  # environment" in config.effective_settings(
    read_config({"VLLM_STATE_GATEWAY_SPARE": "8"}), {"VLLM_STATE_GATEWAY_SPARE": "8"})
assert "VLLM_STATE_GATEWAY_SPARE  (default: 7)" in config.settings_help()
assert "VLLM_STATE_GATEWAY_SPARE=7" in config.example_environment()
""",
    ),
    "a counter": Change(
        (
            (
                "gateway_counters.py",
                '    Counter("watch.readers", ',
                '    Counter("watch.opened", "watch_opened_total", "Readers of /watch that came"),\n'
                '    Counter("watch.readers", ',
            ),
            ("state_watch.py", "        self.events = 0 ", "        self.opened = 3\n        self.events = 0 "),
        ),
        """
gateway = start()
assert json.loads(get(gateway, "/stats"))["watch"]["opened"] == 3
assert "elrar_state_gateway_watch_opened_total 3\\n" in get(gateway, "/metrics")
""",
        elsewhere=("state_watch.py",),
    ),
    "an outcome of a datagram": Change(
        (
            (
                "gateway_counters.py",
                "    Outcome(ACCEPTED, None,",
                '    Outcome("odd", "odd_states", "its latency is odd", "no", False, True),\n'
                "    Outcome(ACCEPTED, None,",
            ),
            (
                "state_store.py",
                "                engine = engines.get(quoted_id)\n",
                '                if texts[2] == b"77.0":\n'
                '                    outcomes.append("odd")\n'
                "                    continue\n"
                "                engine = engines.get(quoted_id)\n",
            ),
        ),
        """
gateway = start()
send(gateway)
stats = send(gateway, latency_pred_ms=77.0)
assert (stats["total_received"], stats["valid_states"], stats["odd_states"]) == (2, 2, 1), stats
assert 'datagrams_total{outcome="odd"} 1' in get(gateway, "/metrics")
gateway.shutdown()
lines = [json.loads(line) for line in open("log.jsonl")]
assert lines[-1]["odd_states"] == 1 and len(lines) == 3, lines
""",
    ),
    "a rejection reason": Change(
        (
            (
                "engine_state.py",
                'NOT_PRINTABLE = "not_printable"\nREASONS = {\n',
                'NOT_PRINTABLE = "not_printable"\nREASONS = {\n    "not_today": "it says so",\n',
            ),
            (
                "engine_state.py",
                "    if len(datagram) > MAX_DATAGRAM_BYTES:\n        raise InvalidDatagram(TOO_LARGE)\n",
                "    if len(datagram) > MAX_DATAGRAM_BYTES:\n        raise InvalidDatagram(TOO_LARGE)\n"
                '    if b"not today" in datagram:\n        raise InvalidDatagram("not_today")\n',
            ),
            (
                "status_page.html",
                '  "invalid_reasons.too_large": ',
                '  "invalid_reasons.not_today": ["not today", "今天不行"],\n  "invalid_reasons.too_large": ',
            ),
        ),
        """
gateway = start()
stats = send(gateway, scheduling_mode="not today", more=1)
assert (stats["invalid_states"], stats["invalid_reasons"]["not_today"]) == (1, 1), stats
assert 'datagrams_invalid_total{reason="not_today"} 1' in get(gateway, "/metrics")
assert "invalid_reasons.not_today" in get(gateway, "/")
""",
    ),
    "a network mode": Change(
        (
            (
                "config.py",
                '        Mode("broadcast", ',
                '        Mode("multicast", "all interfaces", on_all_interfaces=True),\n        Mode("broadcast", ',
            ),
        ),
        """
gateway = start(NETWORK_MODE="multicast")
stats = send(gateway)
assert (stats["network_mode"], stats["bind_address"], stats["multicast_received"]) == ("multicast", "0.0.0.0", 1)
assert 'datagrams_received_total{network_mode="multicast"} 1' in get(gateway, "/metrics")
described = json.loads(get(gateway, "/openapi.json"))["components"]["schemas"]["Stats"]["properties"]
assert set(stats) <= set(described) and "multicast" in described["network_mode"]["enum"], described
""",
    ),
    "a query route": Change(
        (
            (
                "state_query.py",
                '    Route("/stats", ',
                '    Route("/numbers", Query._stats, "the same", schema="Stats"),\n    Route("/stats", ',
            ),
        ),
        """
gateway = start()
assert "total_received" in json.loads(get(gateway, "/numbers"))
assert "/numbers" in json.loads(get(gateway, "/openapi.json"))["paths"]
""",
    ),
    "an event of `/watch`": Change(
        (("state_watch.py", 'b"state", b"stale", b"live"', 'b"changed", b"stale", b"live"'),),
        """
gateway = start()
with open_url(gateway, "/watch") as stream:
    while stream.readline() != b"\\n":  # the snapshot: what it has already brings no event
        pass
    send(gateway)
    while stream.readline() != b"event: changed\\n":
        pass
""",
    ),
    "the status page": Change(
        (("status_page.html", "</title>", " of ours</title>"),),
        """
assert " of ours</title>" in get(start(), "/")
""",
    ),
    "the log's format": Change(
        (("state_log.py", """b'{"timestamp": %b, "state": '""", """b'{"received": %b, "state": '"""),),
        """
gateway = start()
send(gateway)
gateway.shutdown()
assert list(json.loads(open("log.jsonl").readlines()[1])) == ["received", "state", "source"]
""",
    ),
    "the staleness rule": Change(
        (
            ("staleness.py", "self._stale_s = (stale_ms + 1", "self._stale_s = (3 * stale_ms + 1"),
            ("staleness.py", "return silence_ms <= self.stale_ms", "return silence_ms <= 3 * self.stale_ms"),
        ),
        """
from state_store import StateStore
store = StateStore(1000, 9000, 10, 10, clock=lambda: 0.0)
for silence_ms, live in ((1000, True), (3000, True), (3001, False)):
    assert store.freshness.is_live(silence_ms) == live
    assert (0.0 > store.freshness.live_since(silence_ms / 1000)) == live
""",
    ),
    "the expiry rule": Change(
        (("staleness.py", "return silence_ms > self.expire_ms", "return silence_ms > 3 * self.expire_ms"),),
        """
from state_store import StateStore
freshness = StateStore(1000, 2000, 10, 10).freshness
assert (freshness.is_expired(6000), freshness.is_expired(6001)) == (False, True)
""",
    ),
    "a benchmark": Change(
        (
            (
                "benchmarks/bench.py",
                "def main() -> None:\n",
                "def one_more() -> int:\n    return 1\n\n\ndef main() -> None:\n",
            ),
        ),
        """
sys.path.insert(0, "benchmarks")
import bench
assert bench.one_more() == 1
""",
    ),
}


ENGLISH, CHINESE = "docs/design.md", "docs/design.zh-CN.md"


def rows(name: str) -> list[tuple[str, str]]:
    """The rows of a page's table: the change, and where it lands."""
    text = (TOP / name).read_text(encoding="utf-8")
    start = "| to change | edit |\n|---|---|\n" if name == ENGLISH else "| 要改什么 | 编辑哪里 |\n|---|---|\n"
    table = text.partition(start)[2].partition("\n\n")[0]
    return re.findall(r"^\| (.*?) \| (.*?) \|$", table, flags=re.MULTILINE)


class ToChange(unittest.TestCase):
    """Who follows the table to the letter has made the change, everywhere."""

    def test_every_row_has_its_change_here(self) -> None:
        self.assertEqual([change for change, _ in rows(ENGLISH)], list(CHANGES))

    def test_both_languages_name_the_same_files(self) -> None:
        for row, its_twin in zip(rows(ENGLISH), rows(CHINESE), strict=True):
            self.assertEqual(re.findall("`[^`]+`", row[1]), re.findall("`[^`]+`", its_twin[1]), row)

    def make(self, folder: Path, change: Change) -> set[str]:
        """Copy the project, edit the copy, and return the files that differ."""
        shutil.copytree(TOP / "benchmarks", folder / "benchmarks", ignore=shutil.ignore_patterns("__pycache__"))
        for path in (*TOP.glob("*.py"), TOP / "status_page.html"):
            shutil.copy(path, folder)
        for name, old, new in change.edits:
            text = (folder / name).read_text(encoding="utf-8")
            self.assertEqual(text.count(old), 1, f"{old!r} in {name}")
            (folder / name).write_text(text.replace(old, new), encoding="utf-8")
        return {name for name, _, _ in change.edits}

    def test_each_change_lands_in_the_files_of_its_row_and_takes_effect(self) -> None:
        for row, where in rows(ENGLISH):
            change = CHANGES[row]
            with self.subTest(row), tempfile.TemporaryDirectory() as folder:
                edited = self.make(Path(folder), change)
                self.assertLessEqual(edited, {*re.findall("`([^`]+)`", where), *change.elsewhere})
                done = subprocess.run(
                    [sys.executable, "-c", PRELUDE + change.check, datagram().decode()],
                    cwd=folder,
                    env=clean_environment(),
                    capture_output=True,
                    text=True,
                    timeout=DEADLINE_S,
                    check=False,
                )
                self.assertEqual(done.returncode, 0, done.stderr[-3000:])


RECORDS = {"Config", "Entry"}  # of the settings, and of what the contract says of an engine: each is an attribute


class Sizes(unittest.TestCase):
    """What grows beyond one head is cut in two: 16 attributes of a class, 70 lines of a function."""

    def test_classes(self) -> None:
        for path in TOP.glob("*.py"):
            for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
                if isinstance(node, ast.ClassDef) and node.name not in RECORDS:
                    own = {
                        one.attr
                        for one in ast.walk(node)
                        if isinstance(one, ast.Attribute) and isinstance(one.ctx, ast.Store)
                        if isinstance(one.value, ast.Name) and one.value.id == "self"
                    }
                    own |= {ast.unparse(one.target) for one in node.body if isinstance(one, ast.AnnAssign)}
                    self.assertLessEqual(len(own), 16, f"{node.name} in {path.name}: {sorted(own)}")

    def test_functions(self) -> None:
        for path in TOP.glob("*.py"):
            for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
                if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
                    lines = (node.end_lineno or 0) - node.lineno + 1
                    self.assertLessEqual(lines, 70, f"{node.name} in {path.name}")

    def test_the_main_program(self) -> None:
        self.assertLessEqual(len((TOP / "gateway.py").read_text(encoding="utf-8").splitlines()), 350)


class Tests(unittest.TestCase):
    """Who changes a module finds its tests by its name."""

    def test_each_module_has_a_file_of_tests(self) -> None:
        tested = {path.stem.removeprefix("test_") for path in (TOP / "tests").glob("test_*.py")}
        self.assertEqual({path.stem for path in TOP.glob("*.py")} - tested, set())


if __name__ == "__main__":
    unittest.main()
