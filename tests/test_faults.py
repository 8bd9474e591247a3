"""What strangers, networks and disks do to it: the real process in each kind of trouble, with honest engines beside.

What takes more than a few seconds runs in full where STATE_GATEWAY_LONG_TESTS is set, as .ci/run does, and is shortened
otherwise.
"""

from __future__ import annotations

import contextlib
import json
import os
import pty
import random
import re
import resource
import shutil
import signal
import socket
import subprocess
import tempfile
import threading
import time
import unittest
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from tests.harness import (
    DEADLINE_S,
    TOP,
    Answer,
    Daemon,
    FolderCase,
    again_and_again,
    datagram,
    free_port,
    gateway_command,
    logged_states,
    read_log,
    wait_until,
)
from tests.test_fuzz import mutated

LONG = bool(os.environ.get("STATE_GATEWAY_LONG_TESTS"))
MEMORY_BOUND = 200 * 1024 * 1024


class FaultCase(FolderCase):
    def setUp(self) -> None:
        super().setUp()
        self.log = self.folder / "engine_states.jsonl"

    def start(self, prefix: tuple[str, ...] = (), stdout: int = subprocess.DEVNULL, **settings: object) -> Daemon:
        merged = {"BIND_ADDRESS": "127.0.0.1", "LOG_FILE": self.log, **settings}
        running = Daemon(self.folder, merged, (*prefix, *gateway_command()), stdout)
        self.addCleanup(running.close)
        return running.wait_ready()

    def assert_adds_up(self, stats: Any) -> None:
        rejected = stats["invalid_states"] + stats["rejected_capacity"] + stats["rejected_source"]
        self.assertEqual(stats["total_received"], stats["valid_states"] + rejected)
        self.assertEqual(stats["invalid_states"], sum(stats["invalid_reasons"].values()))

    def assert_takes_a_good_datagram(self, running: Daemon, engine_id: str = "good") -> None:
        """A good datagram that is sent now is shown."""
        timestamp = time.time_ns() // 1_000_000
        running.send(datagram(engine_id=engine_id, timestamp_ms=timestamp))

        def shown() -> bool:
            answer = running.ask(f"/engines/{engine_id}")
            return answer.status == 200 and answer.json["timestamp_ms"] == timestamp

        wait_until("the good datagram to be shown", shown)

    def wait_accounted_for(self, running: Daemon, sent: int) -> Any:
        """The statistics once so many datagrams have been received or dropped by the kernel."""

        def accounted_for() -> Any:
            stats = running.stats()
            return stats if stats["total_received"] + stats["kernel_dropped"] >= sent else None

        return wait_until(f"{sent} datagrams to be accounted for", accounted_for)

    def wait_log(self, running: Daemon, **expected: int) -> Any:
        """The log's counters once they have the expected values."""

        def as_expected() -> Any:
            log = running.stats()["log"]
            return log if all(log[name] == value for name, value in expected.items()) else None

        return wait_until(f"the log's counters to be {expected}", as_expected)

    def wait_written(self, running: Daemon, count: int) -> None:
        """Wait until more than so many states are in the log."""
        wait_until(f"{count} written", lambda: running.stats()["log"]["written"] > count)

    def assert_quiet(self, running: Daemon, pattern: str, at_most: int = 1) -> None:
        """After its end: one kind of trouble has written at most so many lines, and never a traceback."""
        text = "".join(running.lines)
        self.assertNotIn("Traceback", text)
        said = [line for line in running.lines if pattern in line]
        self.assertLessEqual(len(said), at_most, said)


def peak_memory(running: Daemon) -> int:
    """Bytes of memory that the process had at its largest."""
    for line in Path(f"/proc/{running.process.pid}/status").read_text().splitlines():
        if line.startswith("VmHWM:"):
            return int(line.split()[1]) * 1024
    raise AssertionError("the kernel has no VmHWM")


@contextlib.contextmanager
def honest_engines(running: Daemon, count: int) -> Iterator[None]:
    """Engines that push every 100 ms as long as the context lasts, and that are all known when it begins."""

    def push(turn: int) -> None:
        running.send(*(datagram(engine_id=f"honest-{n}", timestamp_ms=turn * 100) for n in range(count)))

    with again_and_again(0.1, push):
        wait_until("the honest engines to be known", lambda: running.stats()["total_engines"] >= count)
        yield


class Floods(FaultCase):
    """Junk and invented engines cost their senders' time, not the honest engines' place, and memory stays bounded."""

    def test_a_flood_of_junk_beside_honest_engines(self) -> None:
        running = self.start()
        rng = random.Random(1)
        junk = [mutated(rng) for _ in range(200)] + [rng.randbytes(500) for _ in range(200)]
        sent = 0
        with honest_engines(running, 20):
            deadline = time.monotonic() + (10 if LONG else 2)
            before = peak_memory(running)
            with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as sock:
                while time.monotonic() < deadline:
                    for one in junk:
                        sock.sendto(one, ("127.0.0.1", running.udp_port))
                    sent += len(junk)
                    engines = running.ask("/engines").json["engines"]
                    status = {engines[f"honest-{n}"]["status"] for n in range(20)}
                    self.assertEqual(status, {"live"}, f"kernel dropped {running.stats()['kernel_dropped']}")
            self.assertGreater(sent, 2000)
            self.wait_accounted_for(running, sent)
            self.assert_takes_a_good_datagram(running)
        self.assert_adds_up(running.stats())
        self.assertLess(peak_memory(running) - before, 50 * 1024 * 1024)
        self.assertEqual(running.stop(), 0)
        self.assert_quiet(running, "rejected invalid datagrams")

    def flood_of_ids(self, running: Daemon, ids: int, states: int, engine_id: str, mode: str) -> int:
        """Send `states` states of each of so many engines, no faster than they are taken; returns how many it was."""
        sent = 0
        with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as sock:
            for turn in range(states):
                for number in range(ids):
                    name = f"{number:06d}" + engine_id
                    changes = {"engine_id": name, "scheduling_mode": f"{sent:07d}{mode}", "timestamp_ms": turn}
                    one = json.dumps({**json.loads(datagram()), **changes}, ensure_ascii=False).encode()
                    sock.sendto(one, ("127.0.0.1", running.udp_port))
                    sent += 1
                    if sent % 2000 == 0:
                        running.wait_received(sent)
        running.wait_received(sent)
        return sent

    def test_a_hundred_thousand_invented_engines(self) -> None:
        running = self.start(LOG_MAX_BYTES=10_000_000, LOG_BACKUPS=1, STALE_THRESHOLD=60_000)
        self.assert_takes_a_good_datagram(running, "first")
        sent = self.flood_of_ids(running, 100_000 if LONG else 15_000, 1, "-invented", "-mode")
        self.assert_takes_a_good_datagram(running, "first")
        stats = running.stats()
        self.assert_adds_up(stats)
        self.assertEqual(stats["total_engines"], 10_000)
        self.assertEqual(stats["rejected_capacity"], sent - 9_999)
        self.assertEqual(len(running.ask("/engines").json["engines"]), 10_000)
        self.assertLess(peak_memory(running), MEMORY_BOUND)
        self.assertEqual(running.stop(), 0)
        self.assert_quiet(running, "rejected datagrams of new engines")

    @unittest.skipUnless(LONG, "takes a minute; set STATE_GATEWAY_LONG_TESTS")
    def test_the_largest_engines_that_there_can_be(self) -> None:
        """10,000 ids of 256 four-byte characters, with modes of 64, each state another, and 20 states each."""
        running = self.start(LOG_MAX_BYTES=10_000_000, LOG_BACKUPS=1, STALE_THRESHOLD=600_000)
        self.flood_of_ids(running, 10_000, 20, "😀" * 250, "😀" * 57)
        self.assertLess(peak_memory(running), MEMORY_BOUND)
        self.assertEqual(running.stats()["total_engines"], 10_000)
        self.assertEqual(running.stop(), 0)

    def test_what_the_kernel_drops_while_it_is_paused_shows(self) -> None:
        running = self.start(RECEIVE_BUFFER=20_000)
        running.signal(signal.SIGSTOP)
        running.send(*(datagram(timestamp_ms=number) for number in range(1000)))
        running.signal(signal.SIGCONT)
        stats = self.wait_accounted_for(running, 1000)
        self.assertGreater(stats["kernel_dropped"], 0)
        self.assertEqual(stats["total_received"] + stats["kernel_dropped"], 1000)
        self.assertIn(
            f"elrar_state_gateway_kernel_dropped_datagrams_total {stats['kernel_dropped']}\n",
            running.ask("/metrics").body.decode(),
        )

    def test_a_quarter_of_a_second_without_a_turn_loses_nothing(self) -> None:
        running = self.start()
        if running.stats()["receive_buffer_bytes"] < 8388608:
            self.skipTest("this kernel granted a smaller buffer than asked for")
        running.signal(signal.SIGSTOP)
        running.send(*(datagram(timestamp_ms=number) for number in range(750)))
        running.signal(signal.SIGCONT)
        self.assertEqual(running.wait_received(750)["kernel_dropped"], 0)


class Paused(FaultCase):
    """A pause of the gateway itself is not blamed on the engines."""

    def pause(self, running: Daemon) -> None:
        running.signal(signal.SIGSTOP)
        time.sleep(2.5)
        running.signal(signal.SIGCONT)

    def test_engines_that_go_on_pushing(self) -> None:
        """They are never called stale, nor removed."""
        running = self.start(STALE_THRESHOLD=1500, EXPIRE_AFTER=1500)
        with honest_engines(running, 20):
            self.pause(running)
            for _ in range(100):
                engines = running.ask("/engines").json["engines"]
                self.assertEqual({engine["status"] for engine in engines.values()}, {"live"})
                self.assertEqual(len(engines), 20)
        stats = running.stats()
        self.assertEqual(stats["expired_engines"], 0)
        self.assertGreater(stats["held_up_ms"], 1000)
        self.assertIn("elrar_state_gateway_held_up_seconds_total", running.ask("/metrics").body.decode())
        self.assertEqual(running.stop(), 0)
        self.assert_quiet(running, "held up")
        self.assertFalse([line for line in running.lines if "went stale" in line], running.lines)

    def test_engines_paused_with_it(self) -> None:
        """As on one machine that moved. Their ages are true all the same, and who stays silent is removed later."""
        running = self.start(STALE_THRESHOLD=1500, EXPIRE_AFTER=1500)
        running.send(datagram(engine_id="returns"), datagram(engine_id="silent"))
        running.wait_received(2)
        self.pause(running)
        engines = running.ask("/engines").json["engines"]
        self.assertEqual([(e["status"], e["age_ms"] > 2400) for e in engines.values()], [("live", True)] * 2)
        self.assertEqual(running.ask("/engines/silent").json["status"], "live")
        self.assertEqual(running.stats()["active_engines"], 2)
        running.send(datagram(engine_id="returns", timestamp_ms=1234567891))
        wait_until("the silent one to be removed", lambda: running.stats()["expired_engines"])
        self.assertEqual(list(running.ask("/engines").json["engines"]), ["returns"])


class Disks(FaultCase):
    """Whatever the disk does, states are taken; what is accepted is logged, or counted as dropped; lines are whole."""

    def test_a_folder_that_vanishes_is_made_again(self) -> None:
        folder = self.folder / "logs"
        running = self.start(LOG_FILE=folder / "states.jsonl")
        self.assert_takes_a_good_datagram(running)
        self.wait_log(running, written=1)
        shutil.rmtree(folder)
        self.assert_takes_a_good_datagram(running)
        self.wait_log(running, written=2)
        self.assertEqual(len(logged_states(folder / "states.jsonl")), 1)
        self.assertEqual(running.stop(), 0)

    def test_a_folder_that_becomes_a_file_and_back(self) -> None:
        folder = self.folder / "logs"
        running = self.start(LOG_FILE=folder / "states.jsonl")
        shutil.rmtree(folder)
        folder.touch()
        wait_until("an error to be counted", lambda: running.stats()["log"]["errors"])
        for number in range(3):
            self.assert_takes_a_good_datagram(running, f"e{number}")
        folder.unlink()
        self.wait_log(running, written=3, dropped=0)
        self.assertEqual(running.stop(), 0)
        self.assertEqual(len(logged_states(folder / "states.jsonl")), 3)
        self.assert_quiet(running, "cannot write the state log")

    def test_a_disk_that_fills_up_in_mid_line_and_is_freed(self) -> None:
        """RLIMIT_FSIZE stands for the disk: beyond it a write ends in mid-line, and then fails."""
        room = 5000
        running = self.start()
        resource.prlimit(running.process.pid, resource.RLIMIT_FSIZE, (room, resource.RLIM_INFINITY))
        for number in range(100):
            running.send(datagram(timestamp_ms=number))
        running.wait_received(100)
        wait_until("an error to be counted", lambda: running.stats()["log"]["errors"])
        self.assertTrue(self.log.read_bytes().endswith(b"}\n"), "half a line is left in the file")
        read_log(self.log)
        self.assert_takes_a_good_datagram(running, "while-it-is-full")
        unlimited = (resource.RLIM_INFINITY, resource.RLIM_INFINITY)
        resource.prlimit(running.process.pid, resource.RLIMIT_FSIZE, unlimited)
        self.wait_log(running, written=101, dropped=0)
        self.assertEqual(running.stop(), 0)
        timestamps = [state["timestamp_ms"] for state in logged_states(self.log)]
        self.assertEqual(timestamps[:100], list(range(100)))
        self.assert_quiet(running, "cannot write the state log")
        self.assert_quiet(running, "writing the state log again")

    def test_a_full_disk_at_stop_gives_up_in_time_and_says_so(self) -> None:
        running = self.start()
        resource.prlimit(running.process.pid, resource.RLIMIT_FSIZE, (1000, resource.RLIM_INFINITY))
        running.send(*(datagram(timestamp_ms=number) for number in range(100)))
        running.wait_received(100)
        self.assertEqual(running.stop(), 0)
        given_up = [line for line in running.lines if "gave up on states" in line]
        self.assertEqual(len(given_up), 1, running.lines)
        self.assertIn(f"states={100 - len(logged_states(self.log))}", given_up[0])

    def test_a_fifo_whose_reader_stops_and_leaves(self) -> None:
        fifo = self.folder / "fifo"
        os.mkfifo(fifo)
        reader = os.open(fifo, os.O_RDONLY | os.O_NONBLOCK)
        running = self.start(LOG_FILE=fifo)
        running.send(*(datagram(timestamp_ms=number) for number in range(1000)))
        running.wait_received(1000)
        wait_until("the pipe to be full", lambda: running.stats()["log"]["errors"])
        os.close(reader)
        self.assert_takes_a_good_datagram(running)
        self.assertEqual(running.ask("/livez").status, 200)
        self.assertEqual(running.stop(), 0)

    def test_a_fifo_with_a_reader_gets_everything(self) -> None:
        fifo, copied = self.folder / "fifo", self.folder / "copied"
        os.mkfifo(fifo)
        with copied.open("wb") as out, fifo.open("r+b", buffering=0) as keep_open:
            reader = subprocess.Popen(["cat", str(fifo)], stdout=out)
            self.addCleanup(reader.wait, DEADLINE_S)
            self.addCleanup(reader.kill)
            running = self.start(LOG_FILE=fifo)
            for first in range(0, 5000, 500):
                running.send(*(datagram(timestamp_ms=number) for number in range(first, first + 500)))
                running.wait_received(first + 500)
            self.assertEqual(self.wait_log(running, written=5000)["errors"], 0)
            self.assertEqual(running.stop(), 0)
            keep_open.close()
            reader.wait(DEADLINE_S)
        self.assertEqual([state["timestamp_ms"] for state in logged_states(copied)], list(range(5000)))

    def test_killed_under_load_again_and_again(self) -> None:
        """At most the last line of each run is torn, and no other is spoilt by it."""
        runs = 20 if LONG else 4
        rng = random.Random(2)
        stop = threading.Event()
        port = 0

        def load() -> None:
            number = 0
            with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as sock:
                while not stop.is_set():
                    number += 1
                    sock.sendto(datagram(timestamp_ms=number), ("127.0.0.1", port or 1))

        port = free_port()
        running = self.start(UDP_PORT=port)
        sender = threading.Thread(target=load, daemon=True)
        sender.start()
        try:
            for _ in range(runs):
                self.wait_written(running, rng.randrange(2000))
                running.process.kill()
                running.wait_exit()
                running = self.start(UDP_PORT=port)
        finally:
            stop.set()
            sender.join(DEADLINE_S)
        self.assertEqual(running.stop(), 0)
        torn = 0
        for line in self.log.read_bytes().split(b"\n")[:-1]:
            try:
                json.loads(line)
            except ValueError:
                torn += 1
        self.assertLessEqual(torn, runs)
        self.assertEqual(read_log_tolerantly(self.log)[-1]["event"], "gateway_stopped")

    def rotate(self, *directives: str) -> None:
        """Let the real logrotate rotate the log now."""
        configuration = self.folder / "logrotate.conf"
        lines = "\n".join(("su root root", *directives, "rotate 5", "missingok"))
        configuration.write_text(f"{self.log} {{\n{lines}\n}}\n")
        configuration.chmod(0o644)
        command = ["logrotate", "--force", "--state", str(self.folder / "state"), str(configuration)]
        subprocess.run(command, check=True, capture_output=True, timeout=DEADLINE_S)

    @unittest.skipUnless(shutil.which("logrotate"), "logrotate is not on this machine")
    @unittest.skipUnless(os.geteuid() == 0, "logrotate wants to be root here")
    def test_logrotate(self) -> None:
        for directives in (("create",), ("nocreate",), ("copytruncate",)):
            with self.subTest(directives), tempfile.TemporaryDirectory() as name:
                self.folder = Path(name)
                self.log = self.folder / "engine_states.jsonl"
                running = self.start()
                sent = 0
                for _ in range(4):
                    for _ in range(100):
                        sent += 1
                        running.send(datagram(timestamp_ms=sent))
                    self.wait_log(running, written=sent)
                    self.rotate(*directives)
                self.assertEqual(running.stop(), 0)
                files = sorted(self.folder.glob("engine_states.jsonl.*"), key=lambda path: -int(path.suffix[1:]))
                states = [s["timestamp_ms"] for path in (*files, self.log) for s in logged_states(path)]
                self.assertEqual(states, list(range(1, sent + 1)))
                self.assertFalse(any(b"\0" in path.read_bytes() for path in files))

    @unittest.skipUnless(shutil.which("logrotate"), "logrotate is not on this machine")
    @unittest.skipUnless(os.geteuid() == 0, "logrotate wants to be root here")
    def test_logrotate_under_load_loses_nothing(self) -> None:
        running = self.start()
        with honest_engines(running, 200):
            for _ in range(3):
                received = running.stats()["total_received"]
                running.wait_received(received + 400)
                self.rotate("create")
        self.assertEqual(running.stop(), 0)
        files = (*self.folder.glob("engine_states.jsonl.*"), self.log)
        self.assertEqual(len(files), 4)
        last = read_log(self.log)[-1]
        self.assertEqual(sum(len(logged_states(path)) for path in files), last["valid_states"])


class Collected:
    """Reads a descriptor to its end in a thread of its own, as a log collector does."""

    def __init__(self, fd: int) -> None:
        self._fd = fd
        self.data = bytearray()
        self._thread = threading.Thread(target=self._run, daemon=True)
        self._thread.start()

    def _run(self) -> None:
        with contextlib.suppress(OSError):  # a terminal's end
            while data := os.read(self._fd, 65536):
                self.data += data

    def finish(self) -> list[bytes]:
        """Every line, once all writers are gone."""
        self._thread.join(DEADLINE_S)
        os.close(self._fd)
        return bytes(self.data).splitlines()


class StandardStreams(FaultCase):
    """The state log on standard output or error, whatever that is, and whatever its reader does."""

    def pair(self, kind: str) -> tuple[int, int]:
        """Descriptors to read from and to write to."""
        if kind == "pipe":
            return os.pipe()
        if kind == "socket":  # what systemd connects a service's output to
            reading, writing = socket.socketpair()
            return reading.detach(), writing.detach()
        return pty.openpty()

    def test_all_states_arrive_and_nothing_is_opened_or_rotated(self) -> None:
        for kind, path in (("pipe", "-"), ("socket", "/dev/stdout"), ("terminal", "-")):
            with self.subTest(kind, path=path):
                reading, writing = self.pair(kind)
                running = self.start(stdout=writing, LOG_FILE=path, LOG_MAX_BYTES=1000)
                os.close(writing)
                collected = Collected(reading)
                for number in range(300):
                    running.send(datagram(timestamp_ms=number))
                running.wait_received(300)
                running.signal(signal.SIGHUP)
                self.assert_takes_a_good_datagram(running)
                log = self.wait_log(running, written=301)
                self.assertEqual(
                    log,
                    {
                        "enabled": True,
                        "file": "/dev/stdout",
                        "written": 301,
                        "dropped": 0,
                        "errors": 0,
                        "rotations": 0,
                    },
                )
                self.assertEqual(running.stop(), 0)
                documents = [json.loads(line) for line in collected.finish()]
                self.assertEqual(documents[-1]["event"], "gateway_stopped")
                self.assertEqual(len([one for one in documents if "state" in one]), 301)
                self.assertEqual(os.listdir(self.folder), [])

    def test_on_standard_error_both_logs_stay_whole(self) -> None:
        running = self.start(LOG_FILE="/dev/stderr", VLLM_LOGGING_LEVEL="DEBUG")
        for number in range(500):
            running.send(datagram(timestamp_ms=number))
        running.wait_received(500)
        self.assertEqual(running.stop(), 0)
        states = [json.loads(line) for line in running.lines if line.startswith("{")]
        own = [line for line in running.lines if not line.startswith("{")]
        self.assertEqual(len([one for one in states if "state" in one]), 500)
        self.assertEqual([line for line in own if not re.match(r"\d{4}-\d\d-\d\dT[\d:.]+Z [A-Z]+ elrar\.", line)], [])

    def test_a_file_that_both_logs_are_sent_to(self) -> None:
        both = self.folder / "both"
        command = ("sh", "-c", f'exec "$@" >{both} 2>&1', "sh")
        running = Daemon(self.folder, {"BIND_ADDRESS": "127.0.0.1", "LOG_FILE": "-", "UDP_PORT": (port := free_port())},
                         (*command, *gateway_command()))  # fmt: skip
        self.addCleanup(running.close)
        wait_until("it to be ready", lambda: both.exists() and b" ready: " in both.read_bytes())
        running.udp_port = running.http_port = port
        for number in range(100):
            running.send(datagram(timestamp_ms=number))
        running.wait_received(100)
        self.assertEqual(running.stop(), 0)
        lines = both.read_bytes().splitlines()
        self.assertEqual(len([line for line in lines if line.startswith(b'{"timestamp"') and json.loads(line)]), 102)
        self.assertNotIn(b"\0", both.read_bytes())

    def test_a_reader_that_stops_reading_and_one_that_leaves(self) -> None:
        for kind in ("pipe", "socket", "terminal"):
            for leaves in (False, True):
                with self.subTest(kind, leaves=leaves):
                    reading, writing = self.pair(kind)
                    running = self.start(stdout=writing, LOG_FILE="-")
                    os.close(writing)
                    if leaves:
                        os.close(reading)
                    for number in range(1500):
                        running.send(datagram(timestamp_ms=number))
                    running.wait_received(1500)
                    wait_until("an error to be counted", lambda r=running: r.stats()["log"]["errors"])  # type: ignore[misc]
                    self.assert_takes_a_good_datagram(running)
                    self.assertEqual(running.ask("/livez").status, 200)
                    self.assertEqual(running.stop(), 0)
                    self.assert_quiet(running, "cannot write the state log")
                    if not leaves:
                        os.close(reading)

    def test_a_reader_that_goes_on_gets_everything(self) -> None:
        reading, writing = os.pipe()
        running = self.start(stdout=writing, LOG_FILE="-")
        os.close(writing)
        for number in range(1500):
            running.send(datagram(timestamp_ms=number))
        running.wait_received(1500)
        wait_until("the pipe to be full", lambda: running.stats()["log"]["errors"])
        collected = Collected(reading)
        wait_until("all to be written", lambda: running.stats()["log"]["written"] == 1500)
        self.assertEqual(running.stop(), 0)
        numbers = [one["state"]["timestamp_ms"] for line in collected.finish() if "state" in (one := json.loads(line))]
        self.assertEqual(numbers, list(range(1500)))

    @unittest.skipUnless(os.geteuid() == 0 and shutil.which("setpriv"), "only root can become another user")
    def test_another_user_who_may_not_open_it(self) -> None:
        """As in the container: root's pipe, and the gateway is an ordinary user by then."""
        python = shutil.which("python3", path="/usr/local/bin:/usr/bin") or ""
        user = ("setpriv", "--reuid=65532", "--regid=65532", "--clear-groups")
        tried = subprocess.run(
            [*user, python, str(TOP / "gateway.py"), "--version"], capture_output=True, timeout=DEADLINE_S, check=False
        )
        if tried.returncode:
            self.skipTest(f"that user cannot run it here: {tried.stderr.decode()[-200:]}")
        for kind in ("pipe", "socket"):
            with self.subTest(kind):
                reading, writing = self.pair(kind)
                running = Daemon(self.folder, {"BIND_ADDRESS": "127.0.0.1", "LOG_FILE": "/dev/stdout"},
                                 (*user, python, str(TOP / "gateway.py")), writing)  # fmt: skip
                self.addCleanup(running.close)
                os.close(writing)
                collected = Collected(reading)
                running.wait_ready()
                self.assert_takes_a_good_datagram(running)
                self.assertEqual(running.stop(), 0)
                self.assertEqual(len(collected.finish()), 3)


class OneLog(FaultCase):
    """Two gateways never write to one log."""

    def test_the_second_waits_two_seconds_and_says_so(self) -> None:
        first = self.start()
        self.assert_takes_a_good_datagram(first)
        second = Daemon(self.folder, {"BIND_ADDRESS": "127.0.0.1", "LOG_FILE": self.log})
        self.addCleanup(second.close)
        self.assertEqual(second.wait_exit(), 1)
        errors = [line for line in second.lines if " ERROR " in line]
        self.assertEqual(len(errors), 1, second.lines)
        for word in (str(self.log), "perhaps another gateway", "LOG_FILE", "fuser -v"):
            self.assertIn(word, errors[0])
        self.assertEqual(first.stop(), 0)
        self.assertEqual([one.get("event") for one in read_log(self.log)], ["gateway_started", None, "gateway_stopped"])

    def test_the_second_has_it_once_the_first_has_stopped(self) -> None:
        first = self.start()
        second = Daemon(self.folder, {"BIND_ADDRESS": "127.0.0.1", "LOG_FILE": self.log})
        self.addCleanup(second.close)
        self.assertEqual(first.stop(), 0)
        second.wait_ready()
        self.assertEqual(second.stop(), 0)

    def test_a_killed_one_leaves_no_lock(self) -> None:
        first = self.start()
        first.process.kill()
        first.wait_exit()
        self.assertEqual(self.start().stop(), 0)


def read_log_tolerantly(path: Path) -> list[Any]:
    """Every line of a log that is valid, without those that a crash tore."""
    documents = []
    for line in path.read_bytes().splitlines():
        with contextlib.suppress(ValueError):
            documents.append(json.loads(line))
    return documents


class Strangers(FaultCase):
    """HTTP clients by the hundred: an honest look at /livez is answered, datagrams are taken, nothing is lost."""

    def connect(self, running: Daemon, count: int, first_bytes: bytes = b"") -> list[socket.socket]:
        connections = []
        for _ in range(count):
            connection = socket.create_connection(("127.0.0.1", running.http_port), timeout=DEADLINE_S)
            self.addCleanup(connection.close)
            if first_bytes:
                connection.sendall(first_bytes)
            connections.append(connection)
        return connections

    def assert_unharmed(self, running: Daemon) -> None:
        # Behind slow strangers others than health checks may be turned away, for half a second.
        answer = wait_until("statistics", lambda: (a := running.ask("/stats")).status == 200 and a)
        received = answer.json["total_received"]
        with honest_engines(running, 20):
            for _ in range(20):
                self.assertEqual(running.ask("/livez").status, 200)
            stats = running.wait_received(received + 100)
        self.assertEqual(stats["kernel_dropped"], 0)
        self.assert_adds_up(stats)

    def test_a_thousand_idle_connections(self) -> None:
        running = self.start()
        self.connect(running, 1000)
        self.assert_unharmed(running)
        self.assertLessEqual(running.stats()["http"]["connections"], 512 + 32)
        self.assertEqual(running.stop(), 0)
        self.assert_quiet(running, "connections")

    def test_hundreds_of_slow_requests_and_slow_readers(self) -> None:
        running = self.start()
        running.send(*(datagram(engine_id=f"e{number}") for number in range(1000)))
        running.wait_received(1000)
        self.connect(running, 300, b"GET /engines HTTP/1.1\r\nHost: a\r\nX-Slow: ")
        self.connect(running, 300, b"GET /engines HTTP/1.1\r\nHost: a\r\n\r\n")
        self.assert_unharmed(running)
        self.assertEqual(running.stop(), 0)
        self.assert_quiet(running, "connections")

    def test_exhausted_file_descriptors(self) -> None:
        running = self.start(("prlimit", "--nofile=64"))
        self.connect(running, 200)
        self.assert_takes_a_good_datagram(running)
        aside = self.folder / "aside"
        wait_until("the state to be logged", lambda: logged_states(self.log))
        self.log.rename(aside)
        self.assert_takes_a_good_datagram(running)
        wait_until("the log to be followed", lambda: self.log.exists() and logged_states(self.log))
        before = cpu_seconds(running)
        self.assert_unharmed(running)
        self.assertLess(cpu_seconds(running) - before, 5.0)
        self.assertEqual(running.stop(), 0)

    def test_large_snapshots_in_a_loop_under_load(self) -> None:
        running = self.start(STALE_THRESHOLD=60_000)
        count = 10_000 if LONG else 2_000
        for first in range(0, count, 1000):
            running.send(*(datagram(engine_id=f"e{number}") for number in range(first, first + 1000)))
            running.wait_received(first + 1000)
        with honest_engines(running, 50):
            for _ in range(5):
                for path in ("/engines", "/metrics"):
                    answer: Answer = running.ask(path)
                    self.assertEqual(answer.status, 200)
                    self.assertEqual(answer.body[-1:], b"\n")
                snapshot = running.ask("/engines").json
                self.assertEqual(len(snapshot["engines"]), snapshot["total_engines"])
                live = sum(engine["status"] == "live" for engine in snapshot["engines"].values())
                self.assertEqual(live, snapshot["active_engines"])
        stats = running.stats()
        self.assertEqual(stats["kernel_dropped"], 0)
        self.assert_adds_up(stats)


def cpu_seconds(running: Daemon) -> float:
    """CPU time that the process has had, in seconds."""
    fields = Path(f"/proc/{running.process.pid}/stat").read_text().rpartition(")")[2].split()
    return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")


if __name__ == "__main__":
    unittest.main()
