"""The main program: its arguments, its exit status, and what it says."""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
import unittest

from config import SETTINGS
from gateway import VERSION
from tests.harness import (
    DEADLINE_S,
    TOP,
    daemon,
    datagram,
    gateway_command,
    ipv6_works,
    read_log,
)
from tests.test_process import ProcessCase


class CommandLine(ProcessCase):
    """--help, --version, --check-config and --health-check."""

    def test_help_lists_every_setting(self) -> None:
        done = self.run_to_end("--help")
        self.assertEqual(done.returncode, 0)
        for setting in SETTINGS:
            self.assertIn(setting.variable, done.stdout)

    def test_version(self) -> None:
        self.assertEqual(self.run_to_end("--version").stdout, f"elrar-state-gateway {VERSION}\n")

    def test_check_config_says_what_is_not_used(self) -> None:
        done = self.run_to_end("--check-config", NETWORK_MODE="broadcast", BIND_ADDRESS="127.0.0.1")
        self.assertRegex(done.stdout, r"BIND_ADDRESS=127\.0\.0\.1  # environment, not used in broadcast mode")

    def test_check_config_prints_what_is_in_effect(self) -> None:
        done = self.run_to_end("--check-config", STALE_THRESHOLD=5000, UDP_PROT=1)
        self.assertEqual(done.returncode, 0)
        self.assertIn("VLLM_STATE_GATEWAY_STALE_THRESHOLD=5000  # environment\n", done.stdout)
        self.assertIn("VLLM_STATE_GATEWAY_EXPIRE_AFTER=15000  # default\n", done.stdout)
        self.assertEqual(len(done.stdout.splitlines()), len(SETTINGS))
        self.assertIn("VLLM_STATE_GATEWAY_UDP_PROT", done.stderr)
        self.assertEqual(self.run_to_end("--check-config", UDP_PORT="x").returncode, 2)
        self.assertEqual(os.listdir(self.folder), [])

    def test_an_unknown_argument_is_refused(self) -> None:
        self.assertEqual(self.run_to_end("--prot", "1").returncode, 2)

    def test_health_check(self) -> None:
        for address in ("127.0.0.1", "0.0.0.0", *(("::", "::1") if ipv6_works() else ())):
            with self.subTest(address), daemon(BIND_ADDRESS=address, ENABLE_LOG="false") as running:
                healthy = self.run_to_end("--health-check", BIND_ADDRESS=address, UDP_PORT=running.udp_port)
                self.assertEqual((healthy.returncode, json.loads(healthy.stdout)["status"]), (0, "ok"))
                self.assertEqual(running.stop(), 0)
                gone = self.run_to_end("--health-check", BIND_ADDRESS=address, UDP_PORT=running.udp_port)
                self.assertEqual(gone.returncode, 1)
                self.assertIn("no answer from http://", gone.stderr)
        self.assertEqual(self.run_to_end("--health-check", HTTP_PORT="off").returncode, 1)

    def test_a_misspelt_variable_is_warned_about_once(self) -> None:
        running = self.start(STALE_TRESHOLD=1).wait_ready()
        warnings = [line for line in running.lines if "STALE_TRESHOLD" in line]
        self.assertEqual(len(warnings), 1, running.lines)
        self.assertIn("did you mean VLLM_STATE_GATEWAY_STALE_THRESHOLD?", warnings[0])

    def test_the_ready_line_names_the_mode_and_what_is_bound(self) -> None:
        running = self.start()
        line = running.wait_for_line("ready")
        port = re.search(r"UDP 127\.0\.0\.1:(\d+)", line)
        assert port is not None
        self.assertIn("network mode: unicast", line)
        self.assertIn(f"HTTP http://127.0.0.1:{port[1]}", line)
        self.assertIn(str(self.log), line)

    def test_a_summary_line_every_interval(self) -> None:
        running = self.start(STATS_INTERVAL=1).wait_ready()
        self.assertIn("total_received=0", running.wait_for_line("summary"))

    @unittest.skipUnless(ipv6_works(), "no IPv6 on this machine")
    def test_both_families_reach_a_dual_stack_gateway(self) -> None:
        running = self.start(BIND_ADDRESS="::").wait_ready()
        running.send(datagram(engine_id="four"), host="127.0.0.1")
        running.send(datagram(engine_id="six"), host="::1")
        running.wait_received(2)
        sources = {name: e["source"] for name, e in running.ask("/engines", host="::1").json["engines"].items()}
        self.assertRegex(sources["four"], r"^127\.0\.0\.1:\d+$")
        self.assertRegex(sources["six"], r"^\[::1\]:\d+$")


class ExitStatus(ProcessCase):
    """0 after a signal, 2 for settings, 1 for anything else, each with what to do."""

    def test_a_second_gateway_on_the_same_port_exits_at_once_and_says_why(self) -> None:
        running = self.start().wait_ready()
        done = self.run_to_end(UDP_PORT=running.udp_port)
        self.assertEqual(done.returncode, 1)
        self.assertIn(f"cannot listen on UDP 127.0.0.1:{running.udp_port}: Address already in use", done.stderr)
        self.assertIn("ss -lunp", done.stderr)
        self.assertNotIn("Traceback", done.stderr)
        running.send(datagram())
        running.wait_received(1)

    def test_wrong_settings_are_all_named_and_nothing_is_started(self) -> None:
        done = self.run_to_end(UDP_PORT="abc", NETWORK_MODE="unicst", HISTORY="", VLLM_LOGGING_LEVEL="LOUD")
        self.assertEqual(done.returncode, 2)
        self.assertEqual(len(done.stderr.splitlines()), 4)
        for variable in ("UDP_PORT='abc'", "NETWORK_MODE='unicst'", "HISTORY=''", "VLLM_LOGGING_LEVEL='LOUD'"):
            self.assertIn(variable, done.stderr)
        self.assertEqual(os.listdir(self.folder), [])

    def test_a_log_that_cannot_be_opened_exits_at_once(self) -> None:
        done = self.run_to_end(LOG_FILE="/dev/full")
        self.assertEqual(done.returncode, 1)
        self.assertIn("cannot open the state log /dev/full: No space left on device", done.stderr)

    def test_settings_that_cannot_be_used_are_unhealthy(self) -> None:
        self.assertEqual(self.run_to_end("--health-check", UDP_PORT="abc").returncode, 1)

    def test_the_status_is_the_same_where_stderr_is_full(self) -> None:
        for arguments, settings, status in (((), {"UDP_PORT": "abc"}, 2), (("--check-config",), {}, 1)):
            command = ("bash", "-c", 'exec "$@" >/dev/full 2>&1', "bash", *gateway_command(*arguments))
            self.assertEqual(self.start(command, **settings).wait_exit(), status)

    @unittest.skipIf(os.geteuid() == 0, "root may write and bind everything")
    def test_what_needs_privileges_says_so(self) -> None:
        self.assertIn("CAP_NET_BIND_SERVICE", self.run_to_end(UDP_PORT=80).stderr)

    def test_a_thread_that_dies_ends_it_with_its_traceback(self) -> None:
        program = (
            "import sys; sys.path.insert(0, sys.argv[1])\n"
            "import gateway, state_store\n"
            "def sweep(self): raise ZeroDivisionError('nobody expected this')\n"
            "state_store.StateStore.sweep = sweep\n"
            "sys.exit(gateway.main([]))\n"
        )
        running = self.start((sys.executable, "-c", program, str(TOP)))
        self.assertEqual(running.wait_exit(), 1)
        text = "".join(running.lines)
        self.assertIn("thread died of an error that nobody expected thread=reaper", text)
        self.assertIn("ZeroDivisionError: nobody expected this", text)
        self.assertIn("stopping reason=thread reaper died", text)
        self.assertEqual(read_log(self.log)[-1]["event"], "gateway_stopped")

    def test_an_older_python_says_what_is_needed(self) -> None:
        older = shutil.which("python3.9")
        if (
            older is None
            or subprocess.run([older, "--version"], capture_output=True, timeout=DEADLINE_S, check=False).returncode
        ):
            self.skipTest("no Python 3.9 on this machine")
        done = subprocess.run(
            [older, TOP / "gateway.py"], capture_output=True, text=True, check=False, timeout=DEADLINE_S
        )
        self.assertEqual(done.returncode, 1)
        self.assertRegex(done.stderr, r"^the state gateway needs Python 3\.10 or newer, and this is 3\.9")


if __name__ == "__main__":
    unittest.main()
