"""What the tests share: datagrams, a clock that is moved by hand, and the daemon started as a user starts it."""

from __future__ import annotations

import contextlib
import http.client
import json
import os
import queue
import random
import re
import shutil
import signal
import socket
import struct
import subprocess
import sys
import tempfile
import threading
import time
import unittest
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from engine_state import DatagramTexts, EngineState, match_all_canonical, parse
from state_store import Batch

TOP = Path(__file__).resolve().parent.parent
CAPTURED = TOP.parent / "shared" / "data" / "captured_engine_states.jsonl"
DEADLINE_S = 30.0  # generous: reached only where something is broken

GUIDE_EXAMPLE: dict[str, Any] = {
    "engine_id": "test",
    "timestamp_ms": 1234567890,
    "latency_pred_ms": 100.0,
    "scheduling_mode": "latency_optimized",
    "pending_tokens_total": 10,
    "kv_cache_free_blocks": 100,
    "kv_cache_total_blocks": 1000,
    "engine_capacity": 1000.0,
}
PLACEHOLDERS: dict[str, Any] = {
    "latency_pred_ms": 0.0,
    "pending_tokens_total": 0,
    "kv_cache_free_blocks": -1,
    "kv_cache_total_blocks": -1,
    "engine_capacity": 0.0,
}


def fields(**changes: Any) -> dict[str, Any]:
    """The eight fields of a state, with some changed."""
    return {**GUIDE_EXAMPLE, **changes}


def datagram(**changes: Any) -> bytes:
    """A state as an engine sends it."""
    return json.dumps(fields(**changes)).encode()


def heartbeat(**changes: Any) -> bytes:
    """A heartbeat as an engine's agent sends it."""
    return datagram(**{**PLACEHOLDERS, **changes})


def match_canonical(one: bytes) -> DatagramTexts | None:
    """The texts of a canonical datagram, or None if it is not one."""
    return match_all_canonical([one])[0]


def parse_datagram(one: bytes) -> EngineState:
    """The state that a datagram holds, as the full parser finds it; raises InvalidDatagram."""
    return parse(one).state


def batch(at: float, wall_s: float, *datagrams: bytes, canonical: bool = True, source: str = "10.0.0.1:5000") -> Batch:
    """Valid datagrams as the listener hands them on: matched as canonical ones, or, if not `canonical`, parsed."""
    states = [(match_canonical(one) if canonical else None) or parse(one).texts() for one in datagrams]
    return Batch(at, wall_s, states, [json.dumps(source).encode()] * len(states))


class FakeClock:
    """A clock in seconds that moves only when it is told to."""

    def __init__(self, now: float = 1000.0) -> None:
        self.now = now

    def __call__(self) -> float:
        return self.now

    def move(self, seconds: float) -> None:
        self.now += seconds


class FolderCase(unittest.TestCase):
    """A test with a temporary folder of its own."""

    def setUp(self) -> None:
        folder = tempfile.TemporaryDirectory()
        self.addCleanup(folder.cleanup)
        self.folder = Path(folder.name)


def wait_until(what: str, happened: Callable[[], Any]) -> Any:
    """Ask again and again until the answer is true, and return it; fails after DEADLINE_S."""
    deadline = time.monotonic() + DEADLINE_S
    while True:
        answer = happened()
        if answer:
            return answer
        if time.monotonic() > deadline:
            raise AssertionError(f"waited {DEADLINE_S:.0f} s in vain: {what}")
        os.sched_yield()


@contextlib.contextmanager
def again_and_again(interval_s: float, do: Callable[[int], None]) -> Iterator[None]:
    """Have `do` called with 1, 2, 3, ... in a thread of its own, as long as the context lasts."""
    done = threading.Event()

    def run() -> None:
        turn = 0
        while not done.wait(interval_s):
            turn += 1
            do(turn)

    thread = threading.Thread(target=run, daemon=True)
    thread.start()
    try:
        yield
    finally:
        done.set()
        thread.join(DEADLINE_S)


def ipv6_works() -> bool:
    """Whether this machine has an IPv6 loopback."""
    try:
        with socket.socket(socket.AF_INET6, socket.SOCK_DGRAM) as sock:
            sock.bind(("::1", 0))
    except OSError:
        return False
    return True


def clean_environment(**settings: object) -> dict[str, str]:
    """This process's environment without settings of a gateway or of Python, and with those given (without prefix)."""
    environment = {name: value for name, value in os.environ.items() if not name.startswith(("VLLM_", "PYTHON"))}
    environment["PYTHONDONTWRITEBYTECODE"] = "1"
    for name, value in settings.items():
        environment[name if name.startswith("VLLM_") else f"VLLM_STATE_GATEWAY_{name}"] = str(value)
    return environment


def free_port() -> int:
    """A number that is free for UDP and for TCP, below those that systems give to clients: none takes it meanwhile."""
    for _ in range(1000):
        port = random.randrange(15_000, 32_000)
        with (
            socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as udp,
            socket.socket(socket.AF_INET, socket.SOCK_STREAM) as tcp,
        ):
            try:
                udp.bind(("0.0.0.0", port))
                tcp.bind(("0.0.0.0", port))
            except OSError:
                continue
            return port
    raise AssertionError("no port from 15,000 to 32,000 is free for both UDP and TCP")


@contextlib.contextmanager
def child(command: Sequence[str], **how: Any) -> Iterator[subprocess.Popen[Any]]:
    """A process that is killed at the end, or after 2 * DEADLINE_S: then whoever waits for it, or reads it, goes on."""
    with subprocess.Popen(command, **how) as process:
        late = threading.Timer(2 * DEADLINE_S, process.kill)
        late.daemon = True
        late.start()
        try:
            yield process
        finally:
            late.cancel()
            process.kill()


class Answer:
    """A response of the query interface."""

    def __init__(self, status: int, headers: Mapping[str, str], body: bytes) -> None:
        self.status = status
        self.headers = headers
        self.body = body

    @property
    def json(self) -> Any:
        return json.loads(self.body)


def ask(port: int, path: str, *, method: str = "GET", host: str = "127.0.0.1") -> Answer:
    """One request on a connection of its own."""
    connection = http.client.HTTPConnection(host, port, timeout=DEADLINE_S)
    try:
        connection.request(method, path)
        # Reset at the end: thousands of questions would leave thousands of ports in TIME_WAIT, and no free one to bind.
        connection.sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        response = connection.getresponse()
        return Answer(response.status, dict(response.getheaders()), response.read())
    finally:
        connection.close()


def read_log(path: Path) -> list[dict[str, Any]]:
    """Every whole line of a state log; fails where one is no JSON object."""
    lines = path.read_bytes().split(b"\n")
    documents = [json.loads(line) for line in lines[:-1]]
    assert all(type(document) is dict for document in documents)
    return documents


def logged_states(path: Path) -> list[dict[str, Any]]:
    """The states in a log, without the events."""
    return [document["state"] for document in read_log(path) if "state" in document]


def gateway_command(*arguments: str) -> list[str]:
    """The README's command, with the interpreter and the warnings that the tests run with."""
    return [sys.executable, *(f"-W{option}" for option in sys.warnoptions), str(TOP / "gateway.py"), *arguments]


class Daemon:
    """The gateway in a process of its own, started with the README's command."""

    def __init__(
        self, cwd: Path, settings: Mapping[str, object], command: Sequence[str] = (), stdout: int = subprocess.DEVNULL
    ) -> None:
        environment = clean_environment(**{"UDP_PORT": 0, "STALE_THRESHOLD": 600_000, **settings})
        self.process = subprocess.Popen(
            command or gateway_command(),
            cwd=cwd,
            env=environment,
            stdin=subprocess.DEVNULL,
            stdout=stdout,
            stderr=subprocess.PIPE,
        )
        self.lines: list[str] = []
        self._queue: queue.Queue[str | None] = queue.Queue()
        self._reader = threading.Thread(target=self._read_stderr, daemon=True)
        self._reader.start()
        self.udp_port = self.http_port = 0

    def _read_stderr(self) -> None:
        assert self.process.stderr is not None
        for line in self.process.stderr:
            self._queue.put(line.decode())
        self._queue.put(None)

    def wait_for_line(self, pattern: str) -> str:
        """The next line of its own log that matches; fails if the process ends, or goes on for long, without it."""
        deadline = time.monotonic() + DEADLINE_S
        while True:
            try:
                line = self._queue.get(timeout=max(0.0, deadline - time.monotonic()))
            except queue.Empty:
                raise AssertionError(f"waited {DEADLINE_S:.0f} s for {pattern!r} in {self.lines}") from None
            if line is None:
                self._queue.put(None)
                raise AssertionError(f"ended without {pattern!r} in {self.lines}")
            self.lines.append(line)
            if re.search(pattern, line):
                return line

    def wait_ready(self) -> Daemon:
        ready = self.wait_for_line("ready: ")
        udp = re.search(r"UDP \S+:(\d+)", ready)
        http_ = re.search(r"HTTP http://\S+:(\d+)", ready)
        self.udp_port = int(udp[1]) if udp else 0
        self.http_port = int(http_[1]) if http_ else 0
        return self

    def send(self, *datagrams: bytes, host: str = "127.0.0.1") -> None:
        family = socket.AF_INET6 if ":" in host else socket.AF_INET
        with socket.socket(family, socket.SOCK_DGRAM) as sock:
            for one in datagrams:
                sock.sendto(one, (host, self.udp_port))

    def ask(self, path: str, **how: Any) -> Answer:
        return ask(self.http_port, path, **how)

    def stats(self) -> Any:
        return self.ask("/stats").json

    def wait_received(self, count: int) -> Any:
        """The statistics once at least `count` datagrams were received."""
        return wait_until(f"{count} received", lambda: (s := self.stats())["total_received"] >= count and s)

    def signal(self, number: int) -> None:
        self.process.send_signal(number)

    def wait_exit(self) -> int:
        """The exit status; `lines` has all of its own log then."""
        status = self.process.wait(DEADLINE_S)
        self._reader.join(DEADLINE_S)
        while not self._queue.empty():
            line = self._queue.get()
            if line is not None:
                self.lines.append(line)
        return status

    def stop(self) -> int:
        self.signal(signal.SIGTERM)
        return self.wait_exit()

    def close(self) -> None:
        """End the process, however it is doing."""
        if self.process.poll() is None:
            self.process.send_signal(signal.SIGCONT)
            self.process.kill()
            self.process.wait(DEADLINE_S)
        self._reader.join(DEADLINE_S)
        assert self.process.stderr is not None
        self.process.stderr.close()


@contextlib.contextmanager
def daemon(folder: Path | None = None, **settings: object) -> Iterator[Daemon]:
    """A daemon that is ready; its working folder is `folder` or one of its own, and it is ended at the end."""
    with contextlib.ExitStack() as stack:
        if folder is None:
            folder = Path(stack.enter_context(tempfile.TemporaryDirectory()))
        running = Daemon(folder, settings)
        stack.callback(running.close)
        yield running.wait_ready()


class Namespace:
    """A network namespace of the test's own, in which nothing else is: commands run in it see no other network."""

    def __init__(self) -> None:
        self._holder = subprocess.Popen(["unshare", "-n", "cat"], stdin=subprocess.PIPE, stdout=subprocess.DEVNULL)
        ours = os.readlink("/proc/self/ns/net")
        self.pid = self._holder.pid
        wait_until("the namespace to be there", lambda: os.readlink(f"/proc/{self.pid}/ns/net") != ours)
        self.run("ip", "link", "set", "lo", "up")

    @staticmethod
    def why_not() -> str:
        """Why this machine lets the tests make none, or nothing where it does."""
        for tool in ("unshare", "nsenter", "ip"):
            if shutil.which(tool) is None:
                return f"{tool} is not on this machine"
        tried = subprocess.run(
            ["unshare", "-n", "ip", "link", "set", "lo", "up"],
            capture_output=True,
            text=True,
            timeout=DEADLINE_S,
            check=False,
        )
        return f"no network namespace can be made here: {tried.stderr.strip()}" if tried.returncode else ""

    def command(self, *command: str) -> list[str]:
        """A command as it is run in the namespace."""
        return ["nsenter", "-t", str(self.pid), "-n", *command]

    def run(self, *command: str) -> str:
        """What a command prints that must succeed."""
        done = subprocess.run(self.command(*command), capture_output=True, text=True, timeout=DEADLINE_S, check=True)
        return done.stdout

    def python(self, program: str, *arguments: str) -> str:
        """What a Python program prints that must succeed."""
        return self.run(sys.executable, "-c", program, *arguments)

    def get(self, url: str) -> Any:
        """The JSON document at a URL."""
        return json.loads(
            self.python("import sys, urllib.request as u; print(u.urlopen(sys.argv[1]).read().decode())", url)
        )

    def close(self) -> None:
        """Let go of it; the kernel removes it with the last process in it."""
        self._holder.communicate(timeout=DEADLINE_S)
