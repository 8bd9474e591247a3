"""The agent's command line: a simulated fleet, a state log sent again, new keys, the plugin's folder."""

from __future__ import annotations

import gzip
import io
import json
import math
import os
import re
import signal
import subprocess
import sys
import tempfile
import threading
import time
import unittest
from collections.abc import Iterable, Mapping
from importlib import metadata
from pathlib import Path
from typing import Any

import engine_agent
from engine_agent import ACTIVITIES, GONE, SERVING, Key, LoggedState, Replay, Simulation, log_files, logged_states
from tests.harness import TOP, FakeClock, child, fields, parse_datagram
from tests.test_engine_agent import Kept, settings

AGENT = TOP / "engine_agent.py"


def run(*arguments: str, environ: Mapping[str, str] | None = None) -> subprocess.CompletedProcess[str]:
    """The agent as a user runs it, with nothing of the project to import."""
    return subprocess.run(
        [sys.executable, "-I", str(AGENT), *arguments],
        env={**os.environ, **(environ or {})},
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )


class Simulated(unittest.TestCase):
    """A simulated fleet lives through everything that can happen to an engine, and accounts for it."""

    def test_every_datagram_is_valid_and_the_account_is_true(self) -> None:
        sent = Kept()
        simulation = Simulation(settings(), sent, 20)
        now = 0.0
        while now < 120.0:
            now += max(simulation.step(now, 1_000_000 + int(now * 1000)), 0.004)
        simulation.end()
        account = simulation.account()
        phases: dict[str, int] = {}
        lives: dict[tuple[str, str], int] = {}
        for state in sent.datagrams:
            parse_datagram(json.dumps(state).encode())
            phases[state["phase"]] = phases.get(state["phase"], 0) + 1
            life = (state["engine_id"], state["boot"])
            self.assertEqual(state["seq"], lives.get(life, 0) + 1)  # each destination is sent every number
            lives[life] = state["seq"]
        self.assertEqual(phases, account["datagrams"])
        self.assertEqual(set(phases), set(engine_agent.PHASES))
        self.assertEqual(3 * account["began"]["gone"], phases[GONE])
        self.assertEqual(len(lives), 20 + account["began"]["starting"])
        self.assertTrue(all(account["began"].values()), account)
        self.assertEqual(sum(account["doing"].values()), 20)

    def test_a_serving_engine_says_something_each_interval_and_the_others_each_second(self) -> None:
        sent = Kept()
        simulation = Simulation(settings(PUSH_INTERVAL="500"), sent, 1)
        engine = simulation.engines[0]
        engine.activity, engine._until = "serving", math.inf
        now = 0.0
        while now < 4.75:
            now += max(simulation.step(now, int(now * 1000)), 0.004)
        self.assertEqual([state["phase"] for state in sent.take()], 10 * [SERVING])
        engine.activity = "hanging"
        while now < 8.75:
            now += max(simulation.step(now, int(now * 1000)), 0.004)
        self.assertEqual([state["timestamp_ms"] for state in sent.take()], 4 * [4500])

    def test_what_may_follow_what_is_a_closed_list(self) -> None:
        for activity in ACTIVITIES.values():
            self.assertLessEqual(set(activity.then), set(ACTIVITIES))

    def test_simulate_prints_one_json_line_a_datagram(self) -> None:
        done = run("--simulate", "3", "--seconds", "1", "--print")
        self.assertEqual(done.returncode, 0, done.stderr)
        states = [json.loads(line) for line in done.stdout.splitlines()]
        self.assertEqual(len({state["engine_id"] for state in states}), 3)
        self.assertEqual(len(states), sum(json.loads(done.stderr.split(": ", 1)[1])["datagrams"].values()))

    def test_a_gateway_whose_name_is_not_found_does_not_hold_up_the_end_of_its_time(self) -> None:
        with tempfile.NamedTemporaryFile("w", suffix=".jsonl") as log:
            log.write(line(1.0))
            log.flush()
            for mode in (["--simulate", "2"], ["--replay", log.name]):
                done = run(*mode, "--seconds", "0.5", "--gateway", "no-such-gateway.invalid")
                self.assertEqual(done.returncode, 0, done.stderr)

    def test_sigterm_ends_it_with_a_farewell_for_all_and_exit_0(self) -> None:
        command = [sys.executable, "-I", str(AGENT), "--simulate", "4", "--print"]
        with child(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as agent:
            assert agent.stdout is not None
            first = [agent.stdout.readline() for _ in range(4)]
            agent.send_signal(signal.SIGTERM)
            rest = agent.communicate(timeout=30)[0].splitlines()
            self.assertEqual(agent.returncode, 0)
        self.assertEqual(len({json.loads(line)["engine_id"] for line in first}), 4)
        self.assertEqual([json.loads(line)["phase"] for line in rest[-12:]], 12 * [GONE])


def line(received_s: float, **changes: Any) -> str:
    return json.dumps({"timestamp": received_s, "state": fields(**changes)}) + "\n"


class Replayed(unittest.TestCase):
    """A state log goes out again as of now: in order, with its spacing, whatever was rotated or torn."""

    def setUp(self) -> None:
        folder = tempfile.TemporaryDirectory()
        self.addCleanup(folder.cleanup)
        self.log = Path(folder.name) / "engine_states.jsonl"

    def states(self, *paths: Path) -> list[int]:
        return [int(one.state["pending_tokens_total"]) for one in logged_states(log_files(map(str, paths)))]

    def test_rotated_files_come_in_order_gz_too(self) -> None:
        self.log.write_text(line(30.0, pending_tokens_total=3))
        Path(f"{self.log}.1").write_text(line(20.0, pending_tokens_total=2))
        Path(f"{self.log}.10").write_text(line(5.0, pending_tokens_total=0))
        Path(f"{self.log}.2.gz").write_bytes(gzip.compress(line(10.0, pending_tokens_total=1).encode()))
        Path(f"{self.log}.swp").write_text(line(1.0, pending_tokens_total=99))
        self.assertEqual(self.states(self.log), [0, 1, 2, 3])
        self.assertEqual(self.states(self.log, *self.log.parent.glob("*.1*")), [0, 1, 2, 3])
        self.assertEqual(self.states(Path(f"{self.log}.1")), [2])

    def test_events_torn_lines_and_a_cut_gz_are_passed_over(self) -> None:
        good = line(1.0)
        self.log.write_text(
            '{"timestamp": 1.0, "event": "gateway_started"}\n' + good + good[:50] + "\n[]\n1\nnull\n" + good
        )
        self.assertEqual(len(self.states(self.log)), 2)
        Path(f"{self.log}.1.gz").write_bytes(gzip.compress((good * 3).encode())[:-12])
        sys.stderr, kept = io.StringIO(), sys.stderr
        try:
            self.assertGreaterEqual(len(self.states(self.log)), 2)
        finally:
            sys.stderr = kept

    def replay(self, states: Iterable[LoggedState], speed: float, seconds: float = math.inf, **values: str) -> Kept:
        sent, clock = Kept(), FakeClock()
        self.waits: list[float] = []

        class Stop(threading.Event):
            def wait(stop, timeout: float | None = None) -> bool:  # noqa: N805
                self.waits.append(round(timeout or 0.0, 3))
                clock.move(timeout or 0.0)
                return False

        replay = Replay(settings(**values), sent, speed)
        replay.run(states, Stop(), seconds, clock, lambda: clock.now)
        return sent

    def test_the_spacing_is_kept_and_the_times_are_of_now(self) -> None:
        states = [LoggedState(at, fields(timestamp_ms=int(at * 1000) - 40)) for at in (10.0, 12.0, 12.0, 22.0)]
        sent = self.replay(states, 10.0).take()
        self.assertEqual(self.waits, [0.2, 1.0])
        self.assertEqual([state["timestamp_ms"] for state in sent], [999960, 1000160, 1000160, 1001160])
        self.assertEqual(list(sent[0]), list(fields()))

    def test_it_ends_when_the_time_is_over(self) -> None:
        states = [LoggedState(float(at), fields()) for at in range(100)]
        self.assertEqual(len(self.replay(states, 1.0, 4.5).take()), 5)

    def test_a_pipe_that_says_nothing_holds_up_neither_the_time_that_was_set_nor_ctrl_c(self) -> None:
        for more, signals in ((["--seconds", "1"], []), ([], [signal.SIGINT]), ([], [signal.SIGTERM])):
            command = [sys.executable, "-I", str(AGENT), "--replay", "-", "--print", *more]
            pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "stderr": subprocess.PIPE}
            with child(command, **pipes) as agent:
                assert agent.stdin is not None and agent.stdout is not None and agent.stderr is not None
                agent.stdin.write(line(1.0).encode())
                agent.stdin.flush()
                self.assertTrue(agent.stdout.readline())
                for number in signals:
                    agent.send_signal(number)
                self.assertEqual(agent.wait(30), 0)
                self.assertEqual(agent.stderr.read(), b"engine_agent: 1 states of 1 files\n")

    def test_what_goes_wrong_while_it_is_read_is_said(self) -> None:
        done = run("--replay", str(self.log.parent), "--print")
        self.assertEqual((done.returncode, done.stdout), (1, ""))
        self.assertIn("Is a directory", done.stderr)

    def test_boots_become_new_ones_and_seq_counts_anew(self) -> None:
        def state(boot: str, seq: int) -> LoggedState:
            return LoggedState(1.0, {**fields(), "boot": boot, "seq": seq, "phase": "serving", "model": "m"})

        states = [state("a", 7), state("a", 9), state("b", 1), state("a", 10)]
        sent = self.replay(states, 1.0).take()
        self.assertEqual([one["seq"] for one in sent], [1, 2, 1, 3])
        self.assertEqual(len({one["boot"] for one in sent}), 2)
        self.assertNotIn("a", [one["boot"] for one in sent])
        self.assertEqual(list(sent[0])[8:], ["boot", "seq", "phase", "model"])

    def test_with_a_key_everything_is_signed_anew(self) -> None:
        replay = Replay(settings(), Kept(), 1.0)
        replay._key = Key("k", b"0123456789abcdef")
        datagram = replay.as_of(LoggedState(1.0, {**fields(), "sig": "old:0"}), 2.0)
        self.assertEqual(list(json.loads(datagram))[8:], ["boot", "seq", "sig"])
        self.assertRegex(datagram, rb', "sig": "k:[0-9a-f]{32}"}\Z')

    def test_the_command(self) -> None:
        now = time.time()
        self.log.write_text(line(1.0, timestamp_ms=1000) + line(61.0, timestamp_ms=61_000))
        done = run("--replay", str(self.log), "--speed", "600", "--print")
        self.assertEqual(done.returncode, 0, done.stderr)
        states = [json.loads(one) for one in done.stdout.splitlines()]
        self.assertEqual(len(states), 2)
        self.assertGreaterEqual(states[0]["timestamp_ms"], int(now * 1000))
        # The second is due 100 ms behind the start; behind the first it comes sooner, if that one was held up.
        self.assertGreaterEqual(states[1]["timestamp_ms"], int(now * 1000) + 98)

    def test_a_log_that_is_not_there_is_exit_1_with_its_name(self) -> None:
        done = run("--replay", "/none/such.jsonl")
        self.assertEqual((done.returncode, done.stdout), (1, ""))
        self.assertIn("/none/such.jsonl", done.stderr)


class Commands(unittest.TestCase):
    """What else the command does, and that it says what is wrong, all of it, with exit 2."""

    def test_new_key_is_a_line_for_both_sides(self) -> None:
        done = run("--new-key", "rack-1")
        self.assertRegex(done.stdout, r"\Arack-1 [0-9a-f]{64}\n\Z")
        self.assertNotEqual(done.stdout, run("--new-key", "rack-1").stdout)

    def test_every_error_at_once_and_exit_2(self) -> None:
        done = run("--simulate", "0", "--speed", "x", "--push-interval", "1", environ={"ELRAR_DATA_PARALLEL": "x"})
        self.assertEqual(done.returncode, 2)
        lines = done.stderr.splitlines()
        for name in ("--simulate='0'", "--speed='x'", "--push-interval='1'", "ELRAR_DATA_PARALLEL='x'"):
            self.assertEqual(len([one for one in lines if name in one]), 1, done.stderr)
        self.assertEqual(len(lines), 4)

    def test_help_names_every_flag(self) -> None:
        text = run("--help").stdout
        for flag in ("--check", "--simulate", "--replay", "--speed", "--seconds", "--print", "--new-key"):
            self.assertIn(flag, text)

    def test_the_plugins_folder_is_found_as_an_entry_point(self) -> None:
        with tempfile.TemporaryDirectory() as folder:
            done = run("--install-plugin", f"{folder}/plugin")
            self.assertEqual(done.stdout, f"PYTHONPATH={folder}/plugin\n")
            self.assertEqual((Path(folder) / "plugin/engine_agent.py").read_bytes(), AGENT.read_bytes())
            (found,) = metadata.distributions(path=[f"{folder}/plugin"])
            (point,) = found.entry_points
            self.assertEqual(
                (point.group, point.name, point.value),
                ("vllm.stat_logger_plugins", "elrar", "engine_agent:StatLogger"),
            )
            # The same as what `pip install` of the project installs.
            project = (TOP / "pyproject.toml").read_text()
            self.assertIn(f'[project.entry-points."{point.group}"]\n{point.name} = "{point.value}"\n', project)
            again = subprocess.run([sys.executable, f"{folder}/plugin/engine_agent.py", "--install-plugin",
                                    f"{folder}/plugin"], check=False, capture_output=True, timeout=60)  # fmt: skip
            self.assertEqual(again.returncode, 0)
            self.assertEqual((Path(folder) / "plugin/engine_agent.py").read_bytes(), AGENT.read_bytes())

    def test_a_reader_that_has_enough_is_no_error(self) -> None:
        command = [sys.executable, "-I", str(AGENT), "--simulate", "50", "--print", "--seconds", "30"]
        with child(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE) as agent:
            assert agent.stdout is not None
            agent.stdout.readline()
            agent.stdout.close()
            self.assertEqual(agent.wait(30), 0)


class Documents(unittest.TestCase):
    """The pages on engines have every setting, and say the same in both languages."""

    PAGES = (TOP / "docs" / "engines.md", TOP / "docs" / "engines.zh-CN.md")

    def rows(self, page: Path) -> list[str]:
        return [one for one in page.read_text(encoding="utf-8").splitlines() if one.startswith("|")]

    def test_every_setting_has_its_row(self) -> None:
        for page in self.PAGES:
            listed = re.findall(r"(?m)^\| `([A-Z_]+)` \| `(--[a-z-]+)` \|", page.read_text(encoding="utf-8"))
            self.assertEqual(listed, [(setting.name, setting.option) for setting in engine_agent.SETTINGS])
        for setting in engine_agent.SETTINGS:
            (row,) = (one for one in self.rows(self.PAGES[0]) if one.startswith(f"| `{setting.name}` "))
            self.assertIn(setting.default.strip("()"), row)

    def test_both_languages_have_the_same_tables(self) -> None:
        english, chinese = map(self.rows, self.PAGES)
        self.assertEqual(len(english), len(chinese))
        for row, its_twin in zip(english, chinese, strict=True):
            with self.subTest(row):
                self.assertEqual(row.count("|"), its_twin.count("|"))
                self.assertEqual(sorted(re.findall("`[^`]*`", row)), sorted(re.findall("`[^`]*`", its_twin)))

    def test_every_kind_of_engine_and_every_phase_is_there(self) -> None:
        for page in self.PAGES:
            text = page.read_text(encoding="utf-8")
            for kind in engine_agent.ADAPTERS:
                self.assertIn(f"| {kind.kind} |", text.lower())
            for phase in engine_agent.PHASES:
                self.assertIn(f"`{phase}`", text + "`draining`")


if __name__ == "__main__":
    unittest.main()
