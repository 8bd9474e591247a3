"""The pages people read: every command was tried and is tried again here, and both languages say the same."""

from __future__ import annotations

import http.server
import itertools
import json
import os
import re
import shlex
import shutil
import socket
import subprocess
import sys
import tempfile
import threading
import unittest
from pathlib import Path
from typing import Any

import boot_memory
import daemon_log
import engine_state
import http_message
import query_connection
import query_server
import state_log
import state_query
import state_watch
import table_room
from config import PREFIX, SETTINGS, read_config
from datagram_signature import SIGNATURE_REASONS
from engine_state import FIELDS, REASONS
from engine_table import EngineTable, Entry
from fleet_events import EVENT_KINDS
from openapi_document import PARAMETERS, openapi_document
from tests.documents import (
    TRANSLATED,
    anchors,
    blocks,
    code,
    english_pages,
    every_page,
    links,
    prose,
    read,
    rows,
    table,
    twin,
)
from tests.harness import (
    DEADLINE_S,
    GUIDE_EXAMPLE,
    TOP,
    Daemon,
    clean_environment,
    daemon,
    datagram,
    free_port,
    gateway_command,
    wait_until,
)
from tests.test_engine_agent_sidecar import vllm_page

START = "python3 gateway.py"
ENGINE = "http://127.0.0.1:8000"
SIMULATE = "python3 engine_agent.py --simulate 20"
FIELD_TABLES = {  # of docs/http.md, and the schemas of which they have the members
    "### An engine's entry": "Entry",
    "### The document of `/engines`": "Snapshot",
    "### The fleet": "Fleet",
    "### The document of `/stats`": "Stats",
    "### An event at `/events`": "Events",
}
LISTED = ("sums", "invalid_reasons", "signature_reasons")  # whose members stand in their row
LIMITS = {"README.md": (180, 11_000), "README.zh-CN.md": (200, 13_000)}  # lines and bytes: one sitting
TOOLS = ("nc", "curl", "ss", "grep", "tail", "jq")
ENGINE_AGENT = (  # in tests/test_engine_agent_command.py and .ci/engines
    "--replay engine_states.jsonl --speed 10",
    "--install-plugin /opt/elrar",
    "--new-key fleet",
    "--check --engine http://127.0.0.1:8000",
    "--engine http://127.0.0.1:8000 --gateway localhost:9999",
)
RUN_ELSEWHERE = {  # by other tests, or by .ci/container and .ci/kubernetes
    START,
    SIMULATE,
    "python3 -m unittest",
    "./start_gateway_unicast.sh",
    "pkill -f gateway.py",
    f"echo '{json.dumps(GUIDE_EXAMPLE, separators=(',', ':'))}' | nc -u localhost 9999",  # in test_operators_guide.py
    "python3 benchmarks/bench.py",
    ".ci/run",
    "python3 gateway_archive.py",
    "python3 gateway.pyz",
    *(f"python3 engine_agent.py {arguments}" for arguments in ENGINE_AGENT),
    "PYTHONPATH=/opt/elrar ELRAR_GATEWAY_HOST=localhost vllm serve MODEL",
    "python3 engine_table.py http://localhost:9999",
    "sed 's/namespace: vllm$/namespace: vllm-b/' config_examples/*.yaml | kubectl apply -f -",
}


def without_buffer_warning(text: str) -> str:
    """What was said, but for what is said besides where a user or kernel does not get the receive buffer asked for."""
    return "".join(line for line in text.splitlines(keepends=True) if "granted a smaller receive buffer" not in line)


def comes_out_as(output: str, shown: str) -> bool:
    """Whether two outputs are alike, where `...` in the one that a page shows stands for what it leaves out."""
    lines, pattern = masked(output), "\n".join(masked(shown))
    return re.fullmatch(re.escape(pattern).replace(r"\.\.\.", ".*"), "\n".join(lines)) is not None


def transcript(text: str) -> list[tuple[str, str]]:
    """A console block as commands with their output."""
    return [(command, output) for command, output in re.findall(r"^\$ (.*)\n((?:(?!\$ ).*\n)*)", text, re.MULTILINE)]


def masked(text: str) -> list[str]:
    """Output with numbers, instances and widths of columns made alike, so that two runs can be compared."""
    text = text.replace(" and [::1]:9999", "")
    text = re.sub(r'"[0-9a-f]{16}"', '"INSTANCE"', text)
    text = re.sub(r"-[0-9a-f]{16}\b", "-INSTANCE", text)
    text = re.sub(r"[0-9]+([.:-][0-9]+)*", "#", text)
    lines = [" ".join(line.split()) for line in text.splitlines()]
    return [line for line in lines if line and not line.startswith(("State", "UNCONN # # [::#]"))]


class BothLanguages(unittest.TestCase):
    """The pages of both languages have the same commands, outputs and tables."""

    def pairs(self) -> list[tuple[str, str]]:
        return [(name, twin(name)) for name in english_pages() if twin(name) in every_page()]

    def test_the_pages_for_operators_are_there_in_chinese(self) -> None:
        self.assertEqual([name for name, _ in self.pairs()], sorted(TRANSLATED))
        self.assertEqual([name for name in every_page() if twin(twin(name)) != name or not read(name).strip()], [])

    def test_the_fenced_blocks_are_the_same(self) -> None:
        for english, chinese in self.pairs():
            with self.subTest(chinese):
                self.assertEqual(blocks(chinese), blocks(english))

    def test_the_tables_have_the_same_rows(self) -> None:
        for english, chinese in self.pairs():
            self.assertEqual(len(rows(english)), len(rows(chinese)), chinese)
            for row, its_twin in zip(rows(english), rows(chinese), strict=True):
                with self.subTest(row):
                    self.assertEqual(row.count("|"), its_twin.count("|"))
                    self.assertEqual(sorted(code(row)), sorted(code(its_twin)))

    def test_each_page_leads_to_itself_in_the_other_language(self) -> None:
        for english, chinese in self.pairs():
            for name, other in ((english, chinese), (chinese, english)):
                self.assertIn((other, ""), links(name)[:1], name)

    def test_links_lead_somewhere(self) -> None:
        for name in every_page():
            for path, anchor in links(name):
                with self.subTest(page=name, link=f"{path}#{anchor}"):
                    self.assertTrue((TOP / path).exists(), path)
                    if anchor:
                        self.assertIn(anchor, anchors(path))

    def test_links_stay_in_their_language(self) -> None:
        for name in every_page():
            is_chinese = name.endswith(".zh-CN.md")
            for path, _ in links(name)[1 if twin(name) in every_page() else 0 :]:
                if path.endswith(".md") and twin(path) in every_page():
                    self.assertEqual(path.endswith(".zh-CN.md"), is_chinese, f"{name} to {path}")


def members(schema: dict[str, Any], above: str = "") -> list[tuple[str, str, list[str]]]:
    """Every member that a document has: its name, its type, and what a row of its own would be too much for."""
    found = []
    for name, value in schema["properties"].items():
        type_of = value.get("type", "object")
        within = value.get("properties", {})
        listed = list(within) if name in LISTED else []
        if listed and "properties" in within[listed[0]]:
            listed += within[listed[0]]["properties"]
        found.append((above + name, type_of if isinstance(type_of, str) else " or ".join(type_of), listed))
        if within and not listed:
            if not value.get("description"):
                found.pop()  # a name for what is in it, and no more
            found += members(value, f"{above}{name}.")
        elif "properties" in value.get("additionalProperties", {}):
            found += members(value["additionalProperties"], f"{above}{name}.<reason>.")
    return found


class Tables(unittest.TestCase):
    """What the pages list is what the program has."""

    def test_the_page_lists_exactly_the_fields_of_the_interface(self) -> None:
        schemas = openapi_document(state_query.ROUTES, "1.0")["components"]["schemas"]
        schemas["Events"] = schemas["Events"]["items"]
        for heading, name in FIELD_TABLES.items():
            shown = {code(row[0])[0]: (row[1], code(row[2])) for row in table("docs/http.md", heading)}
            expected = members(schemas[name])
            self.assertEqual(list(shown), [field for field, _, _ in expected], heading)
            for field, type_of, listed in expected:
                with self.subTest(field):
                    self.assertEqual(shown[field][0], type_of)
                    self.assertLessEqual(set(listed), set(shown[field][1]))
        short = [f"{code(row[1])[0]} {row[2]}" for row in table("docs/http.md", "### Short answers")]
        answers = [schemas[name] for name in ("Liveness", "Version", "Error")]
        expected_short = [f"{field} {type_of}" for schema in answers for field, type_of, _ in members(schema)]
        self.assertEqual(sorted(short), sorted([*expected_short, "status string"]))
        self.assertEqual(set(schemas["PastState"]["properties"]), {*(field.name for field in FIELDS), "received_ms"})

    def test_the_page_lists_the_parameters_of_every_path(self) -> None:
        shown = {code(row[0])[0]: code(row[1]) for row in table("docs/http.md", "## Ask it", 1)}
        known = {
            name: [route.path for route in state_query.ROUTES if name in (route.parameters or ())]
            for name in PARAMETERS
        }
        self.assertEqual(
            {name: sorted(paths) for name, paths in shown.items()}, {n: sorted(p) for n, p in known.items()}
        )

    def test_the_page_lists_the_events(self) -> None:
        shown = [(code(row[0])[0], row[1]) for row in table("docs/http.md", "### An event at `/events`", 1)]
        self.assertEqual(shown, list(EVENT_KINDS.items()))
        paths = openapi_document(state_query.ROUTES, "1.0")["paths"]
        events = [code(row[0])[0] for row in table("docs/http.md", "## Watch it")]
        self.assertEqual(events, list(paths["/watch"]["get"]["x-events"]))

    def test_the_page_names_what_a_table_of_engines_can_be_asked(self) -> None:
        names = {name for of in (EngineTable, Entry) for name in vars(of) if not name.startswith("_")}
        for page in ("docs/routers.md", "docs/routers.zh-CN.md"):
            self.assertLessEqual(names, set(re.findall(r"\w+", " ".join(code(prose(page))))), page)

    def test_the_page_lists_every_status(self) -> None:
        shown = [row[0] for row in table("docs/http.md", "## Ask it", 2)]
        paths = openapi_document(state_query.ROUTES, "1.0")["paths"].values()
        self.assertEqual(shown, sorted({status for path in paths for status in path["get"]["responses"]} - {"200"}))

    def test_the_reasons_are_those_of_the_parser(self) -> None:
        for reason, meaning in {**REASONS, **SIGNATURE_REASONS}.items():
            self.assertIn(f"| `{reason}` | {meaning} |", read("docs/engines.md"))

    def test_the_bounds_are_those_of_the_program(self) -> None:
        table = read("docs/design.md").partition("| bound |")[2].partition("\n\n")[0]
        bounds = re.findall(r"^\| [^|]* \| ([^|]*) \|", table, flags=re.MULTILINE)
        numbers = [[int(number) for number in re.findall(r"(?<![A-Z_])[0-9]+", bound)] for bound in bounds]
        self.assertEqual(
            [bound for bound in numbers if bound],
            [
                [engine_state.MAX_DATAGRAM_BYTES],
                [engine_state.MAX_NESTING],
                [boot_memory.MAX_BOOTS, boot_memory.BOOTS_PER_ENGINE],
                [table_room.MAX_HISTORY_BYTES >> 20],
                [state_log.BUFFER_BYTES >> 20],
                [query_server.MAX_CONNECTIONS, query_connection.RESERVE_CONNECTIONS],
                [http_message.MAX_REQUEST_LINE_BYTES],
                [http_message.MAX_HEAD_BYTES, http_message.MAX_HEADERS],
                [query_connection.REQUEST_DEADLINE_S],
                [query_connection.RESPONSE_DEADLINE_S],
                [read_config({}).http_idle_timeout_s],
                [state_watch.MAX_READERS],
                [query_server.MAX_UNSENT_BYTES >> 20],
                [daemon_log.MAX_QUEUED_LINES],
            ],
        )

    def test_the_table_of_paths_is_that_of_the_program(self) -> None:
        for name in ("docs/http.md", "docs/http.zh-CN.md"):
            for route in state_query.ROUTES:
                with self.subTest(name=name, path=route.path):
                    self.assertRegex(read(name), rf"(?m)^\|.*`{re.escape(route.path)}[?`]")

    def test_every_file_of_the_program_has_its_row_in_the_layout(self) -> None:
        for name in ("docs/design.md", "docs/design.zh-CN.md"):
            listed = set(re.findall(r"^\| `(\w+\.py)` \|", read(name), flags=re.MULTILINE))
            self.assertEqual(listed, {path.name for path in TOP.glob("*.py")})

    def test_a_readme_is_read_in_one_sitting(self) -> None:
        for name, (most_lines, most_bytes) in LIMITS.items():
            text = read(name)
            self.assertLessEqual(len(text.splitlines()), most_lines, name)
            self.assertLessEqual(len(text.encode()), most_bytes, name)

    def test_every_page_is_named_in_the_readme(self) -> None:
        for name in ("README.md", "README.zh-CN.md"):
            named = {path for path, _ in links(name)}
            is_chinese = name != "README.md"
            for page in english_pages():
                with self.subTest(readme=name, page=page):
                    self.assertIn(twin(page) if is_chinese and page in TRANSLATED else page, {*named, name})

    def test_every_check_is_explained_to_those_who_contribute(self) -> None:
        checks = {path.name for path in (TOP / ".ci").iterdir() if not path.suffix}
        self.assertEqual({name for name in checks if f"`.ci/{name}`" not in read("CONTRIBUTING.md")}, set())

    def test_the_two_commands_are_in_the_first_screen(self) -> None:
        for name in ("README.md", "README.zh-CN.md"):
            first_screen = "\n".join(read(name).splitlines()[:25])
            self.assertIn("```bash\npython3 gateway.py\npython3 -m unittest\n```", first_screen)


class Commands(unittest.TestCase):
    """What a page shows is what one sees."""

    def setUp(self) -> None:
        folder = tempfile.TemporaryDirectory()
        self.addCleanup(folder.cleanup)
        self.folder = Path(folder.name).resolve()
        for name in ("gateway.py", "engine_agent.py", "start_gateway_unicast.sh"):
            (self.folder / name).symlink_to(TOP / name)
        (self.folder / "bin").mkdir()
        wrapper = self.folder / "bin" / "python3"
        wrapper.write_text(f'#!/bin/sh\nexec "{sys.executable}" "$@"\n')
        wrapper.chmod(0o755)
        self.port = free_port()

    def environment(self) -> dict[str, str]:
        # A long threshold, because a slow machine may take more than two seconds from one command to the next.
        environment = clean_environment(UDP_PORT=self.port, STALE_THRESHOLD=60_000)
        environment["PATH"] = f"{self.folder / 'bin'}:{environment['PATH']}"
        return environment

    def shell(self, command: str) -> str:
        done = subprocess.run(
            ["bash", "-c", command.replace("9999", str(self.port))],
            cwd=self.folder,
            env=self.environment(),
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            timeout=DEADLINE_S,
            check=False,
        )
        return self.as_shown(done.stdout)

    def as_shown(self, output: str) -> str:
        return output.replace(str(self.port), "9999").replace(str(self.folder), "/tmp/try")

    def wait_logged(self, running: Daemon) -> None:
        """Wait for the log to hold what was received, as one who types the next command has done by then."""

        def logged() -> bool:
            stats = running.stats()
            return bool(stats["log"]["written"] == stats["valid_states"] - stats["duplicates"])

        wait_until("the states to be logged", logged)

    def started(self) -> Daemon:
        running = Daemon(self.folder, {"UDP_PORT": self.port, "STALE_THRESHOLD": 60_000})
        self.addCleanup(running.close)
        return running.wait_ready()

    def engine(self) -> str:
        """The URL of what answers as a vLLM does that has nothing to do, until the test ends."""
        page = vllm_page(0, 0, 0)
        answers = {
            "/metrics": page,
            "/metrics/": page,
            "/version": '{"version": "0.32.0"}',
            "/load": '{"server_load": 0}',
        }

        class Answer(http.server.BaseHTTPRequestHandler):
            def do_GET(self) -> None:
                text = answers.get(self.path.partition("?")[0], "")
                self.send_response(200 if text else 404)
                self.end_headers()
                self.wfile.write(text.encode())

            def log_message(self, *_: object) -> None:
                """Nothing of it in the tests' output."""

        server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Answer)
        thread = threading.Thread(target=server.serve_forever, daemon=True)
        thread.start()
        self.addCleanup(thread.join, DEADLINE_S)
        self.addCleanup(server.server_close)
        self.addCleanup(server.shutdown)
        return f"http://127.0.0.1:{server.server_port}"

    def test_every_transcript_comes_out_as_shown(self) -> None:
        """A page that does not begin with the start finds a gateway that runs and has heard from the engine `test`."""
        for page in english_pages():
            commands = [one for language, text in blocks(page) if language == "console" for one in transcript(text)]
            missing = [tool for tool in TOOLS if not shutil.which(tool) and re.search(rf"\b{tool}\b", str(commands))]
            with self.subTest(page):
                if missing:
                    self.skipTest(f"{', '.join(missing)}: not on this machine")
                if commands:
                    self.try_transcript(commands)

    def try_transcript(self, commands: list[tuple[str, str]]) -> None:
        self.setUp()
        running: Daemon | None = None
        if commands[0][0] != START:
            running = self.started()
            running.send(*(datagram(timestamp_ms=1234567890 + n) for n in range(2)))
            running.wait_received(2)
        for command, shown in commands:
            with self.subTest(command):
                if command == START and running is None:
                    running = self.started()
                    output = self.as_shown("".join(running.lines))
                elif command == SIMULATE and running is not None:
                    output = self.simulate(running)
                else:
                    if running is not None and "engine_states.jsonl" in command:
                        self.wait_logged(running)
                    output = self.shell(command.replace(ENGINE, self.engine()) if ENGINE in command else command)
                output = without_buffer_warning(output)
                if not comes_out_as(output, shown):
                    self.assertEqual(masked(output), masked(shown))
        assert running is not None
        self.assertEqual(running.stop(), 0)

    def simulate(self, running: Daemon) -> str:
        """Simulated engines until the test ends; all of them are there when this returns."""
        simulation = subprocess.Popen(
            [*shlex.split(SIMULATE.replace("python3", sys.executable)), "--gateway-port", str(self.port)],
            cwd=self.folder,
            env=clean_environment(),
            stderr=subprocess.DEVNULL,
        )
        self.addCleanup(simulation.wait, DEADLINE_S)
        self.addCleanup(simulation.terminate)
        wait_until("twenty engines", lambda: running.stats()["fleet"]["usable"] == 20)
        return ""

    def test_every_line_of_the_shell_blocks_is_known_to_work(self) -> None:
        tried = 0
        for page in english_pages():
            for language, text in blocks(page):
                for line in text.replace("\\\n", "").splitlines() if language == "bash" else ():
                    with self.subTest(page=page, line=line):
                        self.assert_works(line)
                        tried += 1
        self.assertGreater(tried, 30)

    def assert_works(self, line: str) -> None:
        export = re.fullmatch(rf' *export ({PREFIX}\w+)="([^"]*)"', line)
        if export:
            self.assert_setting(export[1], export[2])
        elif line.strip().startswith(("docker ", "kubectl ")):
            self.assert_names_what_is_here(shlex.split(line))
        else:
            self.assertIn(line.strip(), RUN_ELSEWHERE)

    def assert_setting(self, variable: str, value: str) -> None:
        self.assertIn(variable, [setting.variable for setting in SETTINGS])
        read_config({variable: value})

    def assert_names_what_is_here(self, command: list[str]) -> None:
        """What no container engine or cluster here can run whole: its settings, files and ports are this project's."""
        for flag, value in itertools.pairwise(command):
            if flag == "-e":
                self.assert_setting(*value.split("=", 1))
            elif flag == "-f":
                self.assertTrue((TOP / value).exists(), value)
            elif flag == "-k":
                self.assertTrue((TOP / value / "kustomization.yaml").exists(), value)
            elif flag == "-p":
                self.assertRegex(value, "^9999:9999/(udp|tcp)$")
            elif flag == "-v":
                self.assertRegex(value, ":/data$")
        for name in re.findall(r"\b(?:service|deployment)/(\S+)", " ".join(command)):
            named = "".join(path.read_text(encoding="utf-8") for path in TOP.glob("config_examples/*.yaml"))
            self.assertIn(f"\n  name: {name}\n", named)
        if command[1] == "run":
            self.assertEqual(command[-1], "elrar/state-gateway:latest")

    def run_example(self, program: str, **settings: object) -> subprocess.CompletedProcess[str]:
        return subprocess.run(
            [sys.executable, "-c", program],
            cwd=self.folder,
            env={**clean_environment(**settings), "PYTHONPATH": str(TOP)},
            capture_output=True,
            text=True,
            check=False,
            timeout=DEADLINE_S,
        )

    def python(self, page: str) -> list[str]:
        return [text for language, text in blocks(page) if language == "python"]

    def test_every_python_example_has_its_test_here(self) -> None:
        examples = {page: len(self.python(page)) for page in english_pages() if self.python(page)}
        self.assertEqual(examples, {"README.md": 1, "docs/engines.md": 1, "docs/routers.md": 3, "docs/state-log.md": 1})

    def test_the_first_example_runs(self) -> None:
        (program,) = self.python("README.md")
        with daemon(BIND_ADDRESS="127.0.0.1", STALE_THRESHOLD=60_000) as running:
            running.send(datagram(engine_id="http://172.17.0.3:8000"))
            running.wait_received(1)
            done = self.run_example(program.replace("9999", str(running.http_port)))
        self.assertRegex(done.stdout, r"^http://172\.17\.0\.3:8000 10 tokens wait, as of \d+ ms ago\n$")
        self.assertLessEqual(len([line for line in program.splitlines() if line]), 5)

    def test_the_sender_of_one_s_own_sends_what_is_taken(self) -> None:
        (program,) = self.python("docs/engines.md")
        with daemon(BIND_ADDRESS="127.0.0.1") as running:
            done = self.run_example(program.replace("9999", str(running.udp_port)))
            self.assertEqual((done.returncode, done.stdout, done.stderr), (0, "", ""))
            stats = running.wait_received(8)
        expected = {"valid_states": 8, "farewells": 3, "lost_states": 0, "out_of_order": 0, "heartbeats": 0}
        self.assertEqual({name: stats[name] for name in expected}, expected)
        self.assertEqual((stats["total_engines"], stats["ignored_fields"], stats["duplicates"]), (0, 0, 0))

    def test_the_routers_example_runs(self) -> None:
        program, *_ = self.python("docs/routers.md")
        with daemon(BIND_ADDRESS="127.0.0.1", STALE_THRESHOLD=60_000) as running:
            program = program.replace("9999", str(running.http_port))
            self.assertEqual(self.run_example(program).stdout, "no engine is live\n")
            running.send(datagram(engine_id="http://172.17.0.3:8000"))
            running.wait_received(1)
            done = self.run_example(program)
        self.assertRegex(done.stdout, r"^http://172\.17\.0\.3:8000, heard from \d+ ms ago\n$")
        self.assertEqual((done.returncode, done.stderr), (0, ""))

    def test_the_example_over_http_runs(self) -> None:
        _, program, _ = self.python("docs/routers.md")
        with daemon(BIND_ADDRESS="127.0.0.1", STALE_THRESHOLD=60_000) as running:
            running.send(datagram(engine_id="http://172.17.0.3:8000"))
            running.wait_received(1)
            done = subprocess.run(
                [sys.executable, "-c", program.replace("localhost:9999", f"127.0.0.1:{running.http_port}")],
                capture_output=True,
                text=True,
                check=True,
                timeout=DEADLINE_S,
            )
        self.assertRegex(done.stdout, r"^http://172\.17\.0\.3:8000 10 tokens wait, as of \d+ ms ago\n$")

    def test_the_example_in_process_runs(self) -> None:
        *_, program = self.python("docs/routers.md")
        done = subprocess.run(
            [sys.executable, "-c", program],
            cwd=self.folder,
            env={**clean_environment(UDP_PORT=0, BIND_ADDRESS="127.0.0.1"), "PYTHONPATH": str(TOP)},
            capture_output=True,
            text=True,
            check=False,
            timeout=DEADLINE_S,
        )
        self.assertEqual((done.returncode, done.stdout), (0, "0 of 0 engines are live\n0 datagrams received\n"))
        warning = rf"^every state is logged, .* up to 1100 MiB file={self.folder}/engine_states\.jsonl\n$"
        self.assertRegex(without_buffer_warning(done.stderr), warning)

    def test_the_logs_example_finds_the_longest_silence(self) -> None:
        """In a real log, in one with a torn line, and over files in their order."""
        (program,) = [text for language, text in blocks("docs/state-log.md") if language == "python"]
        with daemon(self.folder, BIND_ADDRESS="127.0.0.1") as running:
            running.send(datagram(engine_id="real"))
            running.wait_received(1)
            self.assertEqual(running.stop(), 0)
        logged = (self.folder / "engine_states.jsonl").read_text()
        (real,) = [json.loads(line) for line in logged.splitlines() if '"state"' in line]
        for name, times in (("old.jsonl", (100.0, 101.5)), ("new.jsonl", (104.25, 104.5))):
            entries = [{**real, "timestamp": at, "state": {**real["state"], "engine_id": "silent"}} for at in times]
            (self.folder / name).write_text("".join(json.dumps(one) + "\n" for one in entries) + '{"timestamp": 1\n')
        done = subprocess.run(
            [sys.executable, "-c", program, "engine_states.jsonl", "old.jsonl", "new.jsonl"],
            cwd=self.folder,
            capture_output=True,
            text=True,
            check=True,
            timeout=DEADLINE_S,
        )
        silent, other = done.stdout.splitlines()
        self.assertEqual(silent, "   2.750 s until 104.250  silent")
        self.assertRegex(other, r"^   0\.000 s until \d+\.\d{3}  real$")

    def test_the_log_line_is_as_shown(self) -> None:
        (shown,) = [text for language, text in blocks("docs/state-log.md") if language == "json"]
        with daemon(self.folder, BIND_ADDRESS="127.0.0.1") as running:
            with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as sock:
                sock.sendto(json.dumps(json.loads(shown)["state"]).encode(), ("127.0.0.1", running.udp_port))
            running.wait_received(1)
            self.assertEqual(running.stop(), 0)
        logged = (self.folder / "engine_states.jsonl").read_text().splitlines()[1]
        self.assertEqual(masked(logged), masked(shown))

    def test_help_is_there(self) -> None:
        done = subprocess.run(
            gateway_command("--help"),
            capture_output=True,
            text=True,
            timeout=DEADLINE_S,
            check=True,
            env=dict(os.environ),
        )
        self.assertIn("settings, from the environment:", done.stdout)


if __name__ == "__main__":
    unittest.main()
