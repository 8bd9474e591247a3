"""The daemon as a user starts it: start, signals, exit status, and every accepted state in the log."""

from __future__ import annotations

import contextlib
import json
import os
import re
import resource
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import unittest
from collections.abc import Sequence
from pathlib import Path

from tests.harness import (
    CAPTURED,
    DEADLINE_S,
    TOP,
    Daemon,
    clean_environment,
    datagram,
    free_port,
    gateway_command,
    logged_states,
    read_log,
    wait_until,
)


class ProcessCase(unittest.TestCase):
    def setUp(self) -> None:
        folder = tempfile.TemporaryDirectory()
        self.addCleanup(folder.cleanup)
        self.folder = Path(folder.name)
        self.log = self.folder / "engine_states.jsonl"

    def start(self, command: tuple[str, ...] = (), **settings: object) -> Daemon:
        running = Daemon(self.folder, {"BIND_ADDRESS": "127.0.0.1", **settings}, command)
        self.addCleanup(running.close)
        return running

    def run_to_end(self, *arguments: str, **settings: object) -> subprocess.CompletedProcess[str]:
        return subprocess.run(
            gateway_command(*arguments),
            cwd=self.folder,
            env=clean_environment(**{"UDP_PORT": 0, "BIND_ADDRESS": "127.0.0.1", **settings}),
            capture_output=True,
            text=True,
            timeout=DEADLINE_S,
            check=False,
        )


class Replay(ProcessCase):
    """A real engine's minute as 50 engines: every state in the log, once, to the letter."""

    @unittest.skipUnless(CAPTURED.exists(), "the captured states are not on this machine")
    def test_a_captured_minute_as_fifty_engines(self) -> None:
        captured = [json.loads(line)["state"] for line in CAPTURED.read_text().splitlines()]
        running = self.start(STALE_THRESHOLD=60_000).wait_ready()
        sent: list[str] = []
        with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as sock:
            for state in captured:
                for number in range(50):
                    one = json.dumps({**state, "engine_id": f"http://172.17.0.3:{8000 + number}"})
                    sent.append(one)
                    sock.sendto(one.encode(), ("127.0.0.1", running.udp_port))
                if len(sent) % 1000 == 0:
                    running.wait_received(len(sent))
        stats = running.wait_received(len(sent))
        snapshot = running.ask("/engines").json
        self.assertEqual({engine["status"] for engine in snapshot["engines"].values()}, {"live"})
        self.assertEqual((len(snapshot["engines"]), snapshot["active_engines"]), (50, 50))
        self.assertEqual(
            (stats["total_received"], stats["valid_states"], stats["duplicates"]), (len(sent), len(sent), 0)
        )
        self.assertEqual(stats["kernel_dropped"], 0)
        self.assertEqual(running.stop(), 0)
        lines = self.log.read_text().splitlines()[1:-1]
        logged = [re.search(r'"state": (\{.*\}), "source"', line) for line in lines]
        self.assertEqual([match and match[1] for match in logged], sent)


class Stop(ProcessCase):
    """SIGTERM and SIGINT end it with status 0, and what was counted as accepted is in the log."""

    def assert_whole(self) -> None:
        first, *states, last = read_log(self.log)
        self.assertEqual((first["event"], last["event"]), ("gateway_started", "gateway_stopped"))
        self.assertEqual(len(states), last["valid_states"] - last["duplicates"])
        self.assertEqual(last["log_written"], len(states))

    def stop_under_load(self, *signals: int) -> None:
        running = self.start().wait_ready()
        ended = threading.Event()

        def load() -> None:
            number = 0
            with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as sock:
                while not ended.is_set() and number < 1_000_000:
                    number += 1
                    sock.sendto(datagram(timestamp_ms=number), ("127.0.0.1", running.udp_port))

        sender = threading.Thread(target=load, daemon=True)
        sender.start()
        try:
            running.wait_received(5000)
            for number in signals:
                running.signal(number)
            self.assertEqual(running.wait_exit(), 0, running.lines)
        finally:
            ended.set()
            sender.join(DEADLINE_S)
        self.assert_whole()
        self.assertGreaterEqual(len(logged_states(self.log)), 5000)

    def test_sigterm_under_load(self) -> None:
        self.stop_under_load(signal.SIGTERM)

    def test_sigint_under_load(self) -> None:
        self.stop_under_load(signal.SIGINT)

    def test_both_twice_under_load(self) -> None:
        self.stop_under_load(signal.SIGTERM, signal.SIGINT, signal.SIGTERM, signal.SIGINT)

    def test_what_waits_in_the_socket_is_in_the_log(self) -> None:
        running = self.start().wait_ready()
        running.signal(signal.SIGSTOP)
        running.send(*(datagram(timestamp_ms=number) for number in range(300)))
        running.signal(signal.SIGTERM)
        running.signal(signal.SIGCONT)
        self.assertEqual(running.wait_exit(), 0)
        self.assertEqual(len(logged_states(self.log)), 300)
        self.assert_whole()

    def test_a_signal_at_any_moment_stops_it(self) -> None:
        """Right after the ready line, while it starts, and again while it stops; nothing but a signal wakes it here."""
        for attempt in range(12):
            with self.subTest(attempt):
                running = self.start(STATS_INTERVAL=0, ENABLE_LOG="false")
                if attempt % 3:
                    running.wait_ready()
                else:
                    self.wait_for_program(running)
                number = signal.SIGINT if attempt % 2 else signal.SIGTERM
                running.signal(number)
                if attempt % 3 == 2:
                    self.signal_until_it_ends(running, number)
                self.assertEqual(running.wait_exit(), 0, running.lines)

    def signal_until_it_ends(self, running: Daemon, number: int) -> None:
        def ended() -> bool:
            running.signal(number)
            return running.process.poll() is not None

        wait_until("it to end", ended)

    def wait_for_program(self, running: Daemon) -> None:
        """Wait until Python itself has started, and the program has blocked the signals for its own start."""
        status = Path(f"/proc/{running.process.pid}/status")
        wait_until("the program to run", lambda: "SigBlk:\t0000000000004003" in status.read_text())

    def test_a_second_run_continues_the_log(self) -> None:
        for _ in range(2):
            running = self.start().wait_ready()
            running.send(datagram())
            running.wait_received(1)
            self.assertEqual(running.stop(), 0)
        kinds = [line.get("event", "state") for line in read_log(self.log)]
        self.assertEqual(kinds, ["gateway_started", "state", "gateway_stopped"] * 2)

    def test_readers_that_are_connected_do_not_hold_it_up(self) -> None:
        running = self.start().wait_ready()
        with socket.create_connection(("127.0.0.1", running.http_port), DEADLINE_S) as idle:
            idle.sendall(b"GET /engines HT")
            self.assertEqual(running.stop(), 0)


class Folders(ProcessCase):
    """The folder that it was started in may go away."""

    def test_the_working_folder_is_removed(self) -> None:
        self.folder = self.folder / "start"
        self.folder.mkdir()
        running = self.start(STATS_INTERVAL=1).wait_ready()
        shutil.rmtree(self.folder)
        running.send(datagram())
        stats = running.wait_received(1)
        self.assertEqual(stats["log"]["file"], str(self.folder / "engine_states.jsonl"))
        running.wait_for_line("summary")
        wait_until("the state to be logged", lambda: running.stats()["log"]["written"])
        self.assertEqual(running.stop(), 0)
        self.assertEqual(len(logged_states(self.folder / "engine_states.jsonl")), 1)

    def run_in_a_folder_that_is_gone(self, log_file: str, enable_log: str = "true") -> subprocess.CompletedProcess[str]:
        """Run it until it is ready or fails, in a folder that was removed before."""
        program = (
            "import os, subprocess, sys, tempfile\n"
            "folder = tempfile.mkdtemp()\n"
            "os.chdir(folder)\n"
            "os.rmdir(folder)\n"
            "with subprocess.Popen(sys.argv[1:], stderr=subprocess.PIPE, text=True) as process:\n"
            "    for line in process.stderr:\n"
            "        print(line, end='', flush=True)\n"
            "        if 'ready: ' in line:\n"
            "            process.terminate()\n"
            "sys.exit(process.returncode)\n"
        )
        return subprocess.run(
            [sys.executable, "-c", program, *gateway_command()],
            env=clean_environment(UDP_PORT=0, BIND_ADDRESS="127.0.0.1", LOG_FILE=log_file, ENABLE_LOG=enable_log),
            capture_output=True,
            text=True,
            timeout=DEADLINE_S,
            check=False,
        )

    def test_the_working_folder_was_gone_before(self) -> None:
        for log_file, enable_log in ((str(self.log), "true"), ("engine_states.jsonl", "false")):
            with self.subTest(log_file):
                done = self.run_in_a_folder_that_is_gone(log_file, enable_log)
                self.assertEqual(done.returncode, 0, done.stdout + done.stderr)

    def test_a_log_in_a_folder_that_is_gone_is_said(self) -> None:
        done = self.run_in_a_folder_that_is_gone("engine_states.jsonl")
        self.assertEqual(done.returncode, 1)
        self.assertIn("cannot open the state log engine_states.jsonl", done.stdout)
        self.assertIn("the working folder is gone", done.stdout)
        self.assertNotIn("Traceback", done.stdout)


@unittest.skipUnless(sys.platform == "linux", "limits of other systems differ")
class Limits(ProcessCase):
    """What the system does not grant ends it with a sentence and status 1: never a traceback, never deaf."""

    def start_limited(
        self, limit: int, value: int, user: int = 0, command: Sequence[str] = (), **settings: object
    ) -> Daemon:
        program = (
            "import os, resource, sys\n"
            "limit, value, user = map(int, sys.argv[1:4])\n"
            "resource.setrlimit(limit, (value, value))\n"
            "if user: os.setgroups([]); os.setgid(user); os.setuid(user)\n"
            "os.execv(sys.argv[4], sys.argv[4:])\n"
        )
        arguments = (str(limit), str(value), str(user), *(command or gateway_command()))
        return self.start((sys.executable, "-c", program, *arguments), **settings)

    def assert_ends_with_a_sentence(self, running: Daemon, pattern: str) -> None:
        self.assertEqual(running.wait_exit(), 1, running.lines)
        text = "".join(running.lines)
        self.assertRegex(text, pattern)
        self.assertNotIn("Traceback", text)

    def test_open_files(self) -> None:
        for number in range(6, 20, 2):
            with self.subTest(number):
                running = self.start_limited(resource.RLIMIT_NOFILE, number)
                self.assert_ends_with_a_sentence(running, "[Oo]pen files.*ulimit -n")

    @unittest.skipUnless(os.geteuid() == 0, "needs a user who runs nothing else")
    def test_threads(self) -> None:
        user = 50_000 + os.getpid() % 10_000  # another run of the tests at the same time has another one
        for python in (sys.executable, "/usr/bin/python3"):
            with contextlib.suppress(OSError):
                command = [python, str(TOP / "gateway.py"), "--version"]
                if not subprocess.run(
                    command, user=user, group=user, capture_output=True, timeout=DEADLINE_S, check=False
                ).returncode:
                    break
        else:
            self.skipTest("no Python here that another user may run")
        for number in range(1, 6):
            with self.subTest(number):
                running = self.start_limited(resource.RLIMIT_NPROC, number, user, command[:2], LOG_FILE="/dev/null")
                self.assert_ends_with_a_sentence(running, "cannot start a thread.*ulimit -u")

    def test_memory_while_engines_appear(self) -> None:
        """A table that would take all memory stops growing; the engines that are known go on, and are answered for."""
        running = self.start_limited(
            resource.RLIMIT_AS, 250_000_000, MAX_ENGINES=1_000_000, EXPIRE_AFTER=600_000, ENABLE_LOG="false"
        ).wait_ready()
        running.send(datagram(engine_id="http://first:8000", timestamp_ms=1))
        number, stats = 0, {"rejected_capacity": 0}
        with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as sock:
            while not stats["rejected_capacity"] and number < 1_000_000:
                for _ in range(2000):
                    number += 1
                    long_id = f"http://10.0.0.1:8000/{number:0200}"
                    sock.sendto(datagram(engine_id=long_id), ("127.0.0.1", running.udp_port))
                stats = running.ask("/stats").json
                self.assertIn(running.ask("/engines").status, (200, 503))
        self.assertGreater(stats["rejected_capacity"], 0)
        running.send(datagram(engine_id="http://first:8000", timestamp_ms=2, pending_tokens_total=77))
        first = "http://first:8000"
        wait_until(
            "the known engine's next state",
            lambda: running.ask(f"/engines?engine_id={first}").json["engines"][first]["pending_tokens_total"] == 77,
        )
        self.assertEqual(running.stop(), 0)
        self.assertRegex("".join(running.lines), "rejected datagrams of new engines.*ulimit -v")


class WithoutCtypes(ProcessCase):
    """A Python that was built without ctypes runs the gateway too, with a limit of memory or without."""

    def test_states_are_taken_and_logged(self) -> None:
        program = (
            "import resource, sys\n"
            "if len(sys.argv) > 2: resource.setrlimit(resource.RLIMIT_AS, (1 << 30, 1 << 30))\n"
            "sys.modules['ctypes'] = None\n"
            "sys.path.insert(0, sys.argv[1])\n"
            "import gateway, udp_receiver\n"
            "assert udp_receiver.ctypes is None\n"
            "sys.exit(gateway.main([]))\n"
        )
        for limited in ((), ("limited",)):
            with self.subTest(limited):
                running = self.start((sys.executable, "-c", program, str(TOP), *limited)).wait_ready()
                running.send(*(datagram(engine_id=f"e{number}") for number in range(300)))
                self.assertEqual(running.wait_received(300)["total_engines"], 300)
                self.assertEqual(running.stop(), 0)
                self.assertEqual(len(logged_states(self.log)), 300)
                self.log.unlink()


class Signals(ProcessCase):
    """SIGHUP opens the log anew; nothing else that may happen to a daemon kills it."""

    def test_sighup_opens_the_log_anew(self) -> None:
        running = self.start().wait_ready()
        running.send(datagram(timestamp_ms=1))
        wait_until("the first state to be logged", lambda: logged_states(self.log))
        aside = self.folder / "aside"
        self.log.rename(aside)
        running.signal(signal.SIGHUP)
        wait_until("the log to be there again", self.log.exists)
        running.send(datagram(timestamp_ms=2))
        wait_until("the second state to be logged", lambda: logged_states(self.log))
        self.assertEqual(running.stop(), 0)
        self.assertEqual([state["timestamp_ms"] for state in logged_states(aside)], [1])
        self.assertEqual([state["timestamp_ms"] for state in logged_states(self.log)], [2])

    def test_it_survives_sighup_under_nohup_and_sigpipe(self) -> None:
        running = self.start().wait_ready()
        running.signal(signal.SIGPIPE)
        running.signal(signal.SIGHUP)
        running.send(datagram())
        self.assertEqual(running.wait_received(1)["valid_states"], 1)

    def test_after_a_pause_longer_than_the_expiry_nobody_is_removed(self) -> None:
        running = self.start(STALE_THRESHOLD=400, EXPIRE_AFTER=800).wait_ready()
        running.send(*(datagram(engine_id=f"e{number}", timestamp_ms=1000) for number in range(20)))
        running.wait_received(20)
        running.signal(signal.SIGSTOP)
        with self.assertRaises(subprocess.TimeoutExpired):
            running.process.wait(1.0)  # the engines go on for longer than the expiry
        running.send(*(datagram(engine_id=f"e{number}", timestamp_ms=9000) for number in range(20)))
        running.signal(signal.SIGCONT)
        stats = running.wait_received(40)
        self.assertEqual((stats["expired_engines"], stats["total_engines"]), (0, 20))

    def test_after_a_pause_nobody_is_called_stuck(self) -> None:
        """Longer than any thread may be silent; asked while it is paused, and at once when it goes on."""
        program = (
            "import sys; sys.path.insert(0, sys.argv[1])\n"
            "import gateway, pause_meter, state_gateway\n"
            "pause_meter.PAUSED_AFTER_S, state_gateway.STUCK_AFTER_S = 0.7, 1.0\n"
            "sys.exit(gateway.main([]))\n"
        )
        running = self.start((sys.executable, "-c", program, str(TOP)), ENABLE_LOG="false").wait_ready()
        for _ in range(3):
            running.signal(signal.SIGSTOP)
            with contextlib.ExitStack() as stack:
                asked = [
                    stack.enter_context(socket.create_connection(("127.0.0.1", running.http_port), DEADLINE_S))
                    for _ in range(5)
                ]
                for sock in asked:
                    sock.sendall(b"GET /livez HTTP/1.1\r\nHost: a\r\n\r\n")
                with self.assertRaises(subprocess.TimeoutExpired):
                    running.process.wait(1.5)
                running.signal(signal.SIGCONT)
                for sock in asked:
                    sock.settimeout(DEADLINE_S)
                    self.assertEqual(sock.recv(12), b"HTTP/1.1 200")
            self.assertEqual(running.ask("/livez").status, 200)


class StandardStreams(ProcessCase):
    """It runs with its standard streams closed, full or gone."""

    def run_with(self, redirection: str) -> None:
        port = free_port()
        command = ("bash", "-c", f'exec "$@" {redirection}', "bash", *gateway_command())
        running = self.start(command, UDP_PORT=port, HTTP_PORT=0, VLLM_LOGGING_LEVEL="DEBUG")
        self.sent = 0

        def taken() -> bool:
            self.sent += 1
            running.udp_port = port
            running.send(datagram(timestamp_ms=self.sent))
            return self.log.exists() and len(logged_states(self.log)) > 0

        wait_until("a state to be logged", taken)
        self.assertEqual(running.stop(), 0)
        self.assertTrue(logged_states(self.log))

    def test_all_closed(self) -> None:
        self.run_with("<&- >&- 2>&-")

    def test_a_log_on_an_output_that_is_closed_is_none(self) -> None:
        """Its number is /dev/null's then, and every line would count as written."""
        for redirection, target in ((">&-", "-"), (">&-", "/dev/fd/1"), ("2>&-", "/dev/stderr")):
            with self.subTest(redirection):
                command = ("bash", "-c", f'exec "$@" {redirection}', "bash", *gateway_command())
                running = self.start(command, UDP_PORT=0, LOG_FILE=target)
                self.assertEqual(running.wait_exit(), 1)
                if redirection == ">&-":
                    self.assertIn("it was closed when this process was started", "".join(running.lines))

    def test_stderr_full(self) -> None:
        self.run_with("2>/dev/full")

    def test_a_stderr_that_nobody_reads_holds_up_nothing(self) -> None:
        reader, writer = os.pipe()
        self.addCleanup(os.close, reader)
        running = Daemon.__new__(Daemon)
        process = subprocess.Popen(
            gateway_command(),
            cwd=self.folder,
            env=clean_environment(BIND_ADDRESS="127.0.0.1", UDP_PORT=0, VLLM_LOGGING_LEVEL="DEBUG"),
            stderr=writer,
        )
        os.close(writer)
        self.addCleanup(process.wait, DEADLINE_S)
        self.addCleanup(process.kill)
        started = wait_until("the start to be logged", lambda: self.log.exists() and read_log(self.log))[0]
        running.udp_port, running.http_port = started["udp_port"], started["http_port"]
        for number in range(3000):  # a line each at DEBUG, far more than a pipe holds
            running.send(datagram(timestamp_ms=number))
        self.assertEqual(running.wait_received(3000)["valid_states"], 3000)
        self.assertGreater(running.stats()["own_log_dropped"], 0)
        process.send_signal(signal.SIGTERM)
        self.assertEqual(process.wait(DEADLINE_S), 0)
        self.assertEqual(len(logged_states(self.log)), 3000)


class StartScript(ProcessCase):
    """./start_gateway_unicast.sh: unicast, from any folder, with whatever else is exported, as the same process."""

    def path_with_this_python(self) -> str:
        """A PATH whose python3 is the one that runs the tests."""
        (self.folder / "bin").mkdir()
        wrapper = self.folder / "bin" / "python3"
        wrapper.write_text(f'#!/bin/sh\nexec "{sys.executable}" "$@"\n')
        wrapper.chmod(0o755)
        return f"{self.folder / 'bin'}:{os.environ['PATH']}"

    def script(self, path: Path, **settings: object) -> Daemon:
        shell = f'PATH="{self.path_with_this_python()}" exec "{path}"'
        return self.start(("sh", "-c", shell), **settings)

    def test_from_another_folder_with_exported_settings(self) -> None:
        running = self.script(
            TOP / "start_gateway_unicast.sh", NETWORK_MODE="broadcast", STALE_THRESHOLD=3000
        ).wait_ready()
        stats = running.stats()
        self.assertEqual((stats["network_mode"], stats["bind_address"]), ("unicast", "127.0.0.1"))
        self.assertEqual(stats["stale_threshold_ms"], 3000)
        self.assertTrue(self.log.exists(), "the log is in the folder where the script was called")
        self.assertEqual(running.stop(), 0)

    def test_through_a_symbolic_link(self) -> None:
        link = self.folder / "link"
        link.symlink_to(TOP / "start_gateway_unicast.sh")
        self.assertEqual(self.script(link).wait_ready().stop(), 0)

    def test_from_a_folder_with_a_space_and_a_dash(self) -> None:
        odd = self.folder / "-a b"
        odd.mkdir()
        for path in TOP.glob("*.py"):
            shutil.copy(path, odd)
        shutil.copy(TOP / "start_gateway_unicast.sh", odd)
        self.assertEqual(self.script(odd / "start_gateway_unicast.sh").wait_ready().stop(), 0)


if __name__ == "__main__":
    unittest.main()
