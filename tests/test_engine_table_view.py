"""engine_table.py as a program: what it shows, what keys do, how it leaves a terminal; driven through a real one."""

from __future__ import annotations

import contextlib
import fcntl
import json
import os
import pty
import queue
import re
import select
import signal
import struct
import subprocess
import sys
import tempfile
import termios
import time
import unittest
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from unittest import mock

import engine_table
from tests.harness import (
    DEADLINE_S,
    TOP,
    Daemon,
    child,
    clean_environment,
    daemon,
    datagram,
    heartbeat,
    wait_until,
)
from tests.test_engine_table import FakeGateway, TableCase

PROGRAM = str(TOP / "engine_table.py")
IN_A_SESSION = """
import fcntl, os, sys, termios
fcntl.ioctl(0, termios.TIOCSCTTY, 0)
os.execv(sys.executable, [sys.executable, *sys.argv[1:]])
"""
RESTORED = ("\x1b[?25h", "\x1b[?1049l")  # the cursor is shown, and the screen is what it was


class Shown(TableCase):
    """The view alone, by a clock moved by hand."""

    def view(self, gateway: FakeGateway, **how: Any) -> engine_table._View:
        self.known = self.table(gateway)
        return engine_table._View(self.known, None, **how)

    def text(self, view: engine_table._View, width: int = 80, height: int = 24) -> list[str]:
        lines = ["".join(text for text, _ in line) for line in view.lines(width, height)]
        self.assertEqual(len(lines), height)
        for line in lines:
            self.assertLessEqual(engine_table._cell_width(line), width, line)
        return lines

    def ids(self, lines: list[str]) -> list[str]:  # type: ignore[override]
        start = next(number for number, line in enumerate(lines) if line.startswith("ENGINE")) + 1
        return [line.split()[0] for line in lines[start:-1] if line.strip()]

    def fleet(self) -> FakeGateway:
        gateway = self.gateway()
        gateway.engines = {
            "http://busy": gateway.entry("http://busy", 40, pending_tokens_total=5000, kv_cache_free_blocks=250),
            "http://idle": gateway.entry(
                "http://idle", 60, pending_tokens_total=0, phase="serving", extra={"model": "m"}
            ),
            "http://beats": gateway.entry("http://beats", 80, heartbeat=True),
            "http://gone": gateway.entry("http://gone", 3000, pending_tokens_total=70_000),
            "http://drains": gateway.entry("http://drains", 20, pending_tokens_total=1, phase="draining"),
        }
        return gateway

    def test_the_fleet_is_in_the_first_line(self) -> None:
        lines = self.text(self.view(self.fleet()))
        self.assertEqual(lines[0], "3 live, 2 usable, 1 stale, 1 unavailable  pending 5000  KV 82%")
        self.assertEqual(lines[2], "")  # nobody has asked the gateway what was lost

    def test_an_engine_is_a_line_and_what_is_unknown_is_a_dash(self) -> None:
        lines = self.text(self.view(self.fleet()))
        rows = {line.split()[0]: line.split()[1:] for line in lines[4:9]}
        self.assertEqual(rows["http://busy"], ["live", "40ms", "5.00s", "5000", "75%", "100ms", "1000"])
        self.assertEqual(rows["http://beats"], ["live", "80ms", "-", "-", "-", "-", "-"])
        self.assertEqual(rows["http://gone"][:3], ["stale", "3000ms", "70.00s"])
        self.assertEqual(rows["http://drains"][0], "unavail")

    def test_it_is_sorted_by_any_column_with_what_is_unknown_last(self) -> None:
        view = self.view(self.fleet())
        order = ["http://gone", "http://busy", "http://drains", "http://idle", "http://beats"]
        self.assertEqual(self.ids(self.text(view)), order)
        view.press("r")
        self.assertEqual(self.ids(self.text(view)), [*order[3::-1], order[4]])
        for _ in range(3):
            view.press("left")
        self.assertEqual(self.ids(self.text(view)), sorted(order))
        for width in (80, 200):
            for _ in engine_table._COLUMNS:
                view.press(">")
                self.assertEqual(sorted(self.ids(self.text(view, width))), sorted(order))

    def test_the_filter_leaves_what_has_all_its_words(self) -> None:
        view = self.view(self.fleet())
        for key in "/DRAIN":
            view.press(key)
        self.assertEqual(self.ids(self.text(view)), ["http://drains"])
        self.assertEqual(self.text(view)[-1], "filter: DRAIN_")
        for key in ("backspace", "enter"):
            view.press(key)
        self.assertEqual(self.ids(self.text(view)), ["http://drains"])
        view.press("escape")
        self.assertEqual(len(self.ids(self.text(view))), 5)
        for key in "/nothing":
            view.press(key)
        self.assertIn("no engine matches", self.text(view))

    def test_one_engine_is_shown_with_all_that_is_known(self) -> None:
        view = self.view(self.fleet(), words="idle")
        self.text(view)
        for key in ("down", "enter"):
            view.press(key)
        lines = [line.split(maxsplit=1) for line in self.text(view, 80, 50)]
        told = {line[0]: line[1].strip() for line in lines if len(line) == 2}
        self.assertEqual(told["engine_id"], "http://idle")
        self.assertEqual(
            (told["phase"], told["extra.model"], told["heartbeat"], told["age_ms"]), ("serving", "m", "false", "60")
        )
        self.assertEqual(told["seconds_of_work"], "0.000")
        view.press("enter")
        self.assertEqual(self.ids(self.text(view)), ["http://idle"])

    def test_a_selected_engine_stays_selected_wherever_it_goes(self) -> None:
        gateway = self.gateway()
        gateway.engines = {f"e{n:03}": gateway.entry(f"e{n:03}", pending_tokens_total=1000 - n) for n in range(100)}
        view = self.view(gateway)
        self.assertEqual(self.ids(self.text(view))[0], "e000")
        presses = [("down", "e000"), ("down", "e001"), ("page down", "e020"), ("end", "e099"), ("up", "e098")]
        for key, selected in [*presses, ("home", "e000"), ("page up", "e000"), ("G", "e099")]:
            view.press(key)
            lines = self.text(view)
            self.assertEqual(view.selected, selected)
            self.assertIn(selected, self.ids(lines))
        view.press("r")
        self.assertEqual(self.ids(self.text(view))[0], "e099")
        self.assertEqual(view.selected, "e099")

    def test_what_strangers_wrote_does_no_harm(self) -> None:
        gateway = self.gateway()
        nasty = "\x1b[2J\x07\u202eevil\n引擎" * 3
        gateway.engines = {nasty: gateway.entry(nasty, extra={"model": "\x1b]0;x\x07", "num_requests_running": "many"},
                                               phase="\x1b[31m", scheduling_mode="\r\n"),
                           "b": gateway.entry("b", extra={"num_requests_running": 3, "model": 7})}  # fmt: skip
        view = self.view(gateway)
        for width in (20, 40, 80, 160, 220):
            for _ in engine_table._COLUMNS:
                view.press(">")
                text = "".join(self.text(view, width, 10))
                self.assertFalse(re.search(r"[\x00-\x1f\x7f\u202e]", text))
        for key in ("home", "enter"):
            view.press(key)
        self.assertFalse(re.search(r"[\x00-\x1f\x7f\u202e]", "".join(self.text(view, 80, 50))))

    def test_it_is_drawn_in_any_size(self) -> None:
        view = self.view(self.fleet())
        for width in (20, 33, 79, 80, 81, 120, 160, 300):
            for height in (4, 5, 10, 24, 60):
                self.text(view, width, height)

    def test_a_gateway_that_is_not_followed_is_what_is_wrong(self) -> None:
        gateway = self.fleet()
        view = self.view(gateway)
        gateway.close()
        wait_until("it to be noticed", lambda: not self.known.gateways()[0].connected)
        wait_until("it to be said", lambda: self.text(view)[2].startswith(f"! {gateway.url} 127.0.0.1: "))
        self.assertIn("(not followed)", self.text(view)[1])

    def test_a_fleet_without_a_live_engine_is_what_is_wrong(self) -> None:
        """Also if every gateway is well: at three in the morning "nothing is wrong" must not stand over it."""
        gateway = self.fleet()
        gateway.engines = {engine_id: gateway.engines[engine_id] for engine_id in ("http://gone", "http://drains")}
        self.assertEqual(self.text(self.view(gateway))[2], "! no engine is live")

    def test_an_id_with_several_senders_is_what_is_wrong(self) -> None:
        gateway = self.fleet()
        gateway.engines["http://two"] = gateway.entry("http://two", 10, conflict=True)
        self.assertEqual(self.text(self.view(gateway))[2], "! 1 ids with several senders")

    def test_nothing_is_called_well_before_a_gateway_told_its_losses(self) -> None:
        view = self.view(self.fleet())
        with mock.patch.object(engine_table._Gauge, "_run"):
            view._gauge = engine_table._Gauge(self.known)
        self.assertEqual(self.text(view)[2], "")
        view._gauge.add("http://g", time.monotonic(), {"instance": "a"})
        self.assertEqual(self.text(view)[2], "nothing is wrong")

    def test_losses_of_the_last_minute_are_what_is_wrong(self) -> None:
        table = self.table(self.gateway())
        with mock.patch.object(engine_table._Gauge, "_run"):
            gauge = engine_table._Gauge(table)
        now = time.monotonic()
        first: dict[str, Any] = {"instance": "a", "valid_states": 1000, "kernel_dropped": 5, "log": {"dropped": 1}}
        gauge.add("http://g", now - 10, first)
        self.assertEqual(gauge.wrong(), [])
        gauge.add("http://g", now, {**first, "valid_states": 3000, "kernel_dropped": 12, "log": {"dropped": 1}})
        self.assertEqual(gauge.wrong(), ["7 datagrams dropped by the kernel within a minute"])
        self.assertEqual(gauge.states_per_second(), 200.0)
        gauge.add("http://g", now, {**first, "instance": "another", "kernel_dropped": None, "log": []})
        self.assertEqual((gauge.wrong(), gauge.states_per_second()), ([], None))

    def test_numbers_fit_their_columns(self) -> None:
        for value in (0, 0.04, 7.25, 99.96, 123.4, 9999, 10_000, 999_949, 999_999, 123_456_789, 2**53):
            self.assertLessEqual(len(engine_table._number(value)), 7, value)
        for ms in (0, 9999, 10_000, 599_999, 600_000, 10**8, 10**10):
            self.assertLessEqual(len(engine_table._age(ms)), 6, ms)


class Terminal:
    """The program in a terminal of its own."""

    def __init__(self, *arguments: str, columns: int = 80, rows: int = 24, **environment: str) -> None:
        self.ours, theirs = pty.openpty()
        self.resize(columns, rows)
        self.before = termios.tcgetattr(theirs)
        self.process = subprocess.Popen(
            [sys.executable, "-c", IN_A_SESSION, PROGRAM, *arguments],
            stdin=theirs,
            stdout=theirs,
            stderr=theirs,
            env={**clean_environment(), "TERM": "xterm-256color", "LANG": "C.UTF-8", **environment},
            start_new_session=True,
        )
        self.theirs = theirs
        self.output = ""

    def resize(self, columns: int, rows: int) -> None:
        fcntl.ioctl(self.ours, termios.TIOCSWINSZ, struct.pack("HHHH", rows, columns, 0, 0))

    def read(self) -> str:
        """What has come since the last look, and is kept."""
        came = b""
        while select.select([self.ours], [], [], 0.01)[0]:
            try:
                received = os.read(self.ours, 65536)
            except OSError:
                break
            if not received:
                break
            came += received
        self.output += came.decode("utf-8", "replace")
        return self.output

    def wait_for(self, text: str) -> None:
        wait_until(f"{text!r} in {self.output[-300:]!r}", lambda: text in self.read())

    def press(self, keys: str) -> None:
        self.output = ""
        os.write(self.ours, keys.encode())

    def wait_exit(self) -> int:
        """The exit status; what it wrote is read meanwhile, or it could not end."""
        wait_until("it to end", lambda: self.read() is not None and self.process.poll() is not None)
        self.read()
        return int(self.process.returncode)

    def close(self) -> None:
        if self.process.poll() is None:
            self.process.kill()
        self.process.wait(DEADLINE_S)
        for descriptor in (self.ours, self.theirs):
            with contextlib.suppress(OSError):
                os.close(descriptor)


class InATerminal(unittest.TestCase):
    """It is usable in any terminal, and leaves it as it was, whatever ends it."""

    running: Daemon

    def setUp(self) -> None:
        self.running = self.enter(daemon(BIND_ADDRESS="127.0.0.1", STALE_THRESHOLD=60_000))
        self.running.send(datagram(engine_id="http://one:8000"), heartbeat(engine_id="http://two:8000"))
        self.running.wait_received(2)
        self.url = f"http://127.0.0.1:{self.running.http_port}"

    def enter(self, context: Any) -> Any:
        value = context.__enter__()
        self.addCleanup(context.__exit__, None, None, None)
        return value

    @contextlib.contextmanager
    def terminal(self, *arguments: str, **how: Any) -> Iterator[Terminal]:
        terminal = Terminal(self.url, "--interval", "0.05", *arguments, **how)
        try:
            yield terminal
        finally:
            terminal.close()

    def assert_restored(self, terminal: Terminal) -> None:
        for sequence in RESTORED:
            self.assertIn(sequence, terminal.output[-200:])
        self.assertEqual(termios.tcgetattr(terminal.theirs), terminal.before)

    def test_it_shows_the_fleet_and_q_ends_it(self) -> None:
        with self.terminal() as terminal:
            terminal.wait_for("http://two:8000")
            terminal.wait_for("states/s")
            self.assertIn("2 live, 1 usable", terminal.output)
            terminal.press("\x1b[B\r")
            terminal.wait_for("kv_cache_total_blocks")
            terminal.press("/")
            terminal.wait_for("filter: _")
            terminal.press("one\r")
            terminal.wait_for("filter: one (Esc)")
            terminal.press("\x1b")
            terminal.wait_for("http://two:8000")
            terminal.press("h")
            terminal.wait_for("reverse the order")
            terminal.press("hq")
            self.assertEqual(terminal.wait_exit(), 0)
            self.assert_restored(terminal)

    def test_every_end_leaves_the_terminal_as_it_was(self) -> None:
        for number, status in ((signal.SIGINT, 130), (signal.SIGTERM, 143), (signal.SIGHUP, 129)):
            with self.subTest(number), self.terminal() as terminal:
                terminal.wait_for("http://two:8000")
                terminal.process.send_signal(number)
                self.assertEqual(terminal.wait_exit(), status)
                self.assert_restored(terminal)
                self.assertNotIn("Traceback", terminal.output)

    def test_ctrl_c_ends_it(self) -> None:
        with self.terminal() as terminal:
            terminal.wait_for("http://two:8000")
            terminal.press("\x03")
            self.assertEqual(terminal.wait_exit(), 130)
            self.assert_restored(terminal)

    def test_ctrl_z_gives_the_terminal_back_for_as_long(self) -> None:
        with self.terminal() as terminal:
            terminal.wait_for("http://two:8000")
            terminal.press("\x1a")
            terminal.wait_for(RESTORED[1])
            wait_until(
                "it to stop", lambda: os.waitid(os.P_PID, terminal.process.pid, os.WSTOPPED | os.WNOHANG | os.WNOWAIT)
            )
            self.assertEqual(termios.tcgetattr(terminal.theirs), terminal.before)
            terminal.output = ""
            terminal.process.send_signal(signal.SIGCONT)
            terminal.wait_for("http://two:8000")
            terminal.press("q")
            self.assertEqual(terminal.wait_exit(), 0)
            self.assert_restored(terminal)

    def test_a_terminal_that_goes_away_ends_it(self) -> None:
        with self.terminal() as terminal:
            terminal.wait_for("http://two:8000")
            os.close(terminal.theirs)
            os.close(terminal.ours)
            self.assertIn(terminal.process.wait(DEADLINE_S), (1, 129))

    def test_it_is_drawn_anew_where_the_window_changes(self) -> None:
        with self.terminal() as terminal:
            terminal.wait_for("http://two:8000")
            self.assertNotIn("LOAD AGE", terminal.output)
            terminal.resize(160, 50)
            terminal.wait_for("LOAD AGE")

    def test_the_last_column_is_not_erased(self) -> None:
        """A terminal waits in its last column, and would erase what it has just been sent."""
        with self.terminal() as terminal:
            terminal.wait_for("TOK/S")
            titles = next(line for line in re.split(r"\x1b\[[0-9;]*H", terminal.output) if "ENGINE" in line)
            self.assertRegex(titles, r"TOK/S(\x1b\[0m)?$")

    def test_there_is_no_colour_where_none_is_wanted(self) -> None:
        for environment in ({"NO_COLOR": "1"}, {"TERM": "vt100"}, {}):
            with self.subTest(environment):
                arguments = [] if environment else ["--no-color"]
                with self.terminal(*arguments, **environment) as terminal:
                    terminal.wait_for("http://two:8000")
                    self.assertIsNone(re.search(r"\x1b\[[34][0-9]m|\x1b\[2m", terminal.output))

    def test_a_terminal_that_cannot_be_drawn_on_gets_it_once(self) -> None:
        with self.terminal(TERM="dumb") as terminal:
            self.assertEqual(terminal.wait_exit(), 0)
            self.assertIn("http://two:8000", terminal.output)
            self.assertNotIn("\x1b", terminal.output)


class Printed(unittest.TestCase):
    """Without a terminal, or once."""

    def run_program(self, *arguments: str) -> subprocess.CompletedProcess[str]:
        return subprocess.run(
            [sys.executable, PROGRAM, *arguments],
            env=clean_environment(),
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
            timeout=DEADLINE_S * 2,
            check=False,
        )

    def test_it_is_printed_once_and_nothing_is_cut_off(self) -> None:
        long_id = "http://an-engine-with-a-very-long-name.some-namespace.svc.cluster.local:8000/behind/a/path"
        with daemon(BIND_ADDRESS="127.0.0.1", STALE_THRESHOLD=60_000) as running:
            running.send(datagram(engine_id=long_id), datagram(engine_id="引擎"))
            running.wait_received(2)
            url = f"http://127.0.0.1:{running.http_port}"
            for arguments in ((), ("--once",)):
                done = self.run_program(url, *arguments)
                self.assertEqual((done.returncode, done.stderr), (0, ""))
                self.assertIn(f"\n{long_id} live ", done.stdout)
                self.assertIn("\n引擎 ", done.stdout)
                self.assertNotIn("\x1b", done.stdout)
            done = self.run_program(url, "--once", "--json", "--sort", "engine")
            entries = [json.loads(line) for line in done.stdout.splitlines()]
            self.assertEqual([entry["engine_id"] for entry in entries], [long_id, "引擎"])
            self.assertEqual(entries[0]["status"], "live")
            done = self.run_program(url, "--once", "--json", "--filter", "引")
            self.assertEqual(len(done.stdout.splitlines()), 1)

    def test_json_goes_on_with_each_change_until_its_reader_leaves(self) -> None:
        with daemon(BIND_ADDRESS="127.0.0.1", STALE_THRESHOLD=60_000) as running:
            running.send(datagram(engine_id="a"))
            running.wait_received(1)
            command = [sys.executable, PROGRAM, "--json", f"http://127.0.0.1:{running.http_port}"]
            with child(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, env=clean_environment()) as process:
                assert process.stdout is not None and process.stderr is not None
                self.assertEqual(json.loads(process.stdout.readline())["engine_id"], "a")
                running.send(datagram(engine_id="b"))
                self.assertEqual(json.loads(process.stdout.readline())["engine_id"], "b")
                process.stdout.close()  # and nothing changes any more: it does not wait for a line that it cannot write
                self.assertEqual(process.wait(DEADLINE_S), 1)
                self.assertEqual(process.stderr.read(), b"")

    def test_where_an_output_cannot_be_polled_a_change_is_waited_for_all_the_same(self) -> None:
        """On Windows, which has no poll()."""
        changed = mock.Mock()
        changed.get.side_effect = [queue.Empty, frozenset("a")]
        with mock.patch.object(engine_table, "select", mock.Mock(spec=["select"])):
            self.assertEqual(engine_table._next_of(changed), {"a"})

    def test_a_token_that_is_replaced_is_read_again(self) -> None:
        with tempfile.TemporaryDirectory() as folder:
            path = Path(folder, "token")
            path.write_text("0123456789abcdef\n")
            with daemon(BIND_ADDRESS="127.0.0.1", STALE_THRESHOLD=60_000, HTTP_TOKENS_FILE=path) as running:
                command = [sys.executable, PROGRAM, "--json", "--token-file", str(path)]
                command += ["--timeout", str(DEADLINE_S), f"http://127.0.0.1:{running.http_port}"]
                running.send(datagram(engine_id="a"))
                with child(command, stdout=subprocess.PIPE, env=clean_environment()) as process:
                    assert process.stdout is not None
                    self.assertEqual(json.loads(process.stdout.readline())["engine_id"], "a")
                    path.write_text("another-token-0123\n")
                    running.signal(signal.SIGHUP)  # its stream ends
                    running.send(datagram(engine_id="b"))
                    while json.loads(process.stdout.readline())["engine_id"] != "b":
                        pass

    def test_where_nobody_is_it_says_so(self) -> None:
        done = self.run_program("http://127.0.0.1:1", "--once", "--timeout", "0.5")
        self.assertEqual((done.returncode, done.stdout), (1, ""))
        self.assertIn("http://127.0.0.1:1: ", done.stderr)
        self.assertIn("refused", done.stderr)

    def test_without_an_output_it_says_so(self) -> None:
        for closed, said in ((">&-", "no standard output"), (">&- 2>&-", "")):
            with self.subTest(closed):
                command = f"exec {sys.executable} {PROGRAM} http://127.0.0.1:1 --once {closed}"
                done = subprocess.run(
                    command,
                    shell=True,
                    capture_output=True,
                    text=True,
                    env=clean_environment(),
                    timeout=DEADLINE_S,
                    check=False,
                )
                self.assertEqual((done.returncode, done.stdout), (1, ""))
                self.assertIn(said, done.stderr)
                self.assertNotIn("Traceback", done.stderr)

    def test_what_cannot_be_used_is_said_with_status_2(self) -> None:
        for arguments, said in (
            (["gateway:9999"], "is no gateway's URL"),
            ([], "required: url"),
            (["http://g", "--token-file", "/nowhere"], "/nowhere"),
            (["http://g", "--token-file", "/dev/null"], "no token"),
            (["http://g", "--token-file", "/etc/fstab-that-is-not-there"], "No such file"),
            (["http://g", "--ca-file", "/nowhere"], "No such file"),
            (["http://g", "--sort", "nothing"], "invalid choice"),
            (["http://g", "--interval", "0"], "--interval"),
        ):  # fmt: skip
            with self.subTest(arguments):
                done = self.run_program(*arguments)
                self.assertEqual((done.returncode, done.stdout), (2, ""))
                self.assertIn(said, done.stderr)
                self.assertNotIn("Traceback", done.stderr)


if __name__ == "__main__":
    unittest.main()
