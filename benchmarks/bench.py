"""What the gateway takes, how fast, and at what cost: the real daemon on one core, load from another. Linux only.

    python3 benchmarks/bench.py            the whole table, about four minutes
    python3 benchmarks/bench.py --quick    the same in one, less exact
    python3 benchmarks/bench.py --peer 'CMD {port} {file}'
                                           another program too, that writes a line a datagram into {file}

Figures are medians of interleaved runs. CPU is the user and system time of the receiving process, all threads.
"""

from __future__ import annotations

import argparse
import contextlib
import http.client
import json
import os
import random
import re
import select
import shlex
import shutil
import signal
import socket
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

HERE = Path(__file__).resolve().parent
TOP = HERE.parent
RECEIVING_CORE, SENDING_CORE = "0", "1"
WAIT_S = 30.0  # generous: reached only if something is broken
SENDER_S = 300.0  # of a sender that is ended when it was long enough
PROBE_S = 1.0  # a datagram that is not shown by then was dropped

BARE_PYTHON = """
import socket, sys
sock = socket.socket(socket.AF_INET, socket.SOCK_DGRAM)
sock.setsockopt(socket.SOL_SOCKET, 33, 8 << 20)
sock.bind(("127.0.0.1", int(sys.argv[1])))
recv = sock.recv
while True:
    recv(8193)
"""

IN_PROCESS = """
import json, subprocess, sys, threading
sys.path.insert(0, sys.argv[1])
from gateway import get_state_gateway
gateway = get_state_gateway()
def spin():
    number = 0
    while True:
        number += 1
threading.Thread(target=spin, daemon=True).start()
sender = [sys.executable, sys.argv[2], str(gateway.udp_port), *sys.argv[3:]]
sent = json.loads(subprocess.run(sender, capture_output=True, check=True).stdout)
received = -1
for _ in range(100):
    if received == (received := gateway.get_stats()["total_received"]):
        break
    threading.Event().wait(0.3)
print(json.dumps({"sent": sent["sent"], "stats": gateway.get_stats()}))
"""


def cpu_seconds(pid: int) -> float:
    """CPU time of a process's threads, in seconds, to the nanosecond: ticks count short turns wrongly."""
    return sum(int(path.read_text().split()[0]) for path in Path(f"/proc/{pid}/task").glob("*/schedstat")) / 1e9


def memory_bytes(pid: int) -> int:
    """Resident memory of a process, in bytes."""
    return int(Path(f"/proc/{pid}/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")


def free_port() -> int:
    """A number that is free for UDP and for TCP, below those that systems give to clients: none takes it meanwhile."""
    for _ in range(1000):
        port = random.randrange(15_000, 32_000)
        with (
            socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as udp,
            socket.socket(socket.AF_INET, socket.SOCK_STREAM) as tcp,
            contextlib.suppress(OSError),
        ):
            udp.bind(("127.0.0.1", port))
            tcp.bind(("127.0.0.1", port))
            return port
    raise SystemExit("no port from 15,000 to 32,000 is free for both UDP and TCP")


def kernel_drops(port: int) -> int:
    """Datagrams dropped at the receive buffer of a UDP port, by the kernel's table."""
    wanted = f":{port:04X}"
    for line in Path("/proc/net/udp").read_text().splitlines()[1:]:
        fields = line.split()
        if fields[1].endswith(wanted):
            return int(fields[-1])
    return 0


def wait_for(what: str, happened: Callable[[], Any], within_s: float = WAIT_S) -> Any:
    """Ask until the answer is true, and return it; ends the benchmark with a message if it is not in time."""
    until = time.monotonic() + within_s
    while not (answer := happened()):
        if time.monotonic() > until:
            raise SystemExit(f"waited {within_s:.0f} s in vain for {what}")
        time.sleep(0.0005)
    return answer


def end(process: subprocess.Popen[bytes]) -> None:
    """End a process, however it is doing."""
    process.terminate()
    try:
        process.wait(10)
    except subprocess.TimeoutExpired:
        process.kill()
        process.wait(10)


def start_sender(port: int, rate: float | str, seconds: float, engines: int, *key: str) -> subprocess.Popen[bytes]:
    """`key`: a line of a KEYS_FILE, with which each is signed."""
    command = ["taskset", "-c", SENDING_CORE, sys.executable, str(HERE / "sender.py")]
    return subprocess.Popen([*command, str(port), str(rate), str(seconds), str(engines), *key], stdout=subprocess.PIPE)


def finish_sender(sender: subprocess.Popen[bytes]) -> int:
    """Wait for the sender; returns how many it sent."""
    try:
        said, _ = sender.communicate(timeout=SENDER_S)
    except subprocess.TimeoutExpired:
        end(sender)
        raise SystemExit(f"the sender did not end within {SENDER_S:.0f} s") from None
    if sender.returncode:
        raise SystemExit(f"the sender ended with status {sender.returncode}")
    return int(json.loads(said)["sent"])


@contextlib.contextmanager
def sending(port: int, rate: float, engines: int, core: str = SENDING_CORE) -> Iterator[subprocess.Popen[bytes]]:
    """A sender that goes on for as long as the context lasts."""
    command = ["taskset", "-c", core, sys.executable, str(HERE / "sender.py"), str(port), str(rate), str(SENDER_S)]
    process = subprocess.Popen([*command, str(engines)], stdout=subprocess.DEVNULL)
    try:
        yield process
        if process.poll() is not None:
            raise SystemExit(f"the sender ended by itself, with status {process.returncode}")
    finally:
        end(process)


@contextlib.contextmanager
def pinned(command: list[str], **how: Any) -> Iterator[subprocess.Popen[bytes]]:
    """A process on the receiving core, ended at the end."""
    process = subprocess.Popen(["taskset", "-c", RECEIVING_CORE, *command], **how)
    try:
        yield process
    finally:
        end(process)
        if process.stderr is not None:
            process.stderr.close()


def wait_ready(process: subprocess.Popen[bytes]) -> int:
    """The port of a gateway's HTTP side, once it is ready; what it said is shown if it does not come to it."""
    assert process.stderr is not None
    said, until = b"", time.monotonic() + WAIT_S
    while select.select([process.stderr], [], [], max(0.0, until - time.monotonic()))[0]:
        piece = os.read(process.stderr.fileno(), 65536)
        said += piece
        if match := re.search(rb"ready: .*HTTP http://\S+:(\d+)", said):
            threading.Thread(target=process.stderr.read, daemon=True).start()
            return int(match[1])
        if not piece:
            raise SystemExit(f"the gateway ended before it was ready; it said:\n{said.decode()}")
    raise SystemExit(f"the gateway was not ready within {WAIT_S:.0f} s; it said:\n{said.decode()}")


class Gateway:
    """The real daemon, on the receiving core."""

    def __init__(self, process: subprocess.Popen[bytes], port: int) -> None:
        self.process = process
        self.port = port
        self.connection = http.client.HTTPConnection("127.0.0.1", port, timeout=30)

    def get(self, path: str, **headers: str) -> bytes:
        self.connection.request("GET", path, headers={name.replace("_", "-"): headers[name] for name in headers})
        return self.connection.getresponse().read()

    def stats(self) -> Any:
        return json.loads(self.get("/stats"))

    def settled_stats(self) -> Any:
        """The statistics once nothing more comes and the log has everything."""
        before, stats = None, self.stats()
        until = time.monotonic() + WAIT_S
        while before != (before := stats["total_received"]) or log_is_behind(stats):
            if time.monotonic() > until:
                raise SystemExit(f"the gateway did not settle within {WAIT_S:.0f} s: {stats}")
            time.sleep(0.2)
            stats = self.stats()
        return stats


def log_is_behind(stats: Any) -> bool:
    log = stats["log"]
    return bool(log["enabled"]) and log["written"] + log["dropped"] < stats["valid_states"] - stats["duplicates"]


@contextlib.contextmanager
def gateway(folder: Path, **settings: object) -> Iterator[Gateway]:
    environment = {name: value for name, value in os.environ.items() if not name.startswith("VLLM_")}
    log = folder / "states.jsonl"
    merged = {"UDP_PORT": 0, "BIND_ADDRESS": "127.0.0.1", "LOG_FILE": log, "LOG_BACKUPS": 1, **settings}
    environment.update({f"VLLM_STATE_GATEWAY_{name}": str(value) for name, value in merged.items()})
    with pinned([sys.executable, str(TOP / "gateway.py")], env=environment, stderr=subprocess.PIPE) as process:
        running = Gateway(process, wait_ready(process))
        yield running
        running.connection.close()
    for path in folder.glob("states.jsonl*"):
        path.unlink()


def account(sent: int, stats: Any, what: str) -> None:
    """Say so where what was sent is not what was taken or dropped."""
    accounted = stats["total_received"] + (stats["kernel_dropped"] or 0)
    if accounted != sent or stats["invalid_states"] or stats["duplicates"] or stats["out_of_order"]:
        print(f"!! {what}: sent {sent}, received and dropped {accounted}, {stats}", file=sys.stderr)


def probe(number: int) -> bytes:
    """A state of the engine whose way through the gateway is timed."""
    state = {
        "engine_id": "probe",
        "timestamp_ms": number,
        "latency_pred_ms": 1.5,
        "scheduling_mode": "balanced",
        "pending_tokens_total": 1,
        "kv_cache_free_blocks": 1,
        "kv_cache_total_blocks": 2,
        "engine_capacity": 1.5,
    }
    return json.dumps(state).encode()


def quantiles(delays: list[float]) -> tuple[str, str]:
    """The middle and the 99th hundredth of what was timed, as a row shows them."""
    delays.sort()
    p50, p99 = (delays[int(len(delays) * part)] * 1000 for part in (0.5, 0.99))
    return f"p50 {p50:.2f} ms", f"p99 {p99:.2f} ms"


def watch(port: int, target: str = "/watch") -> socket.socket:
    """A reader of /watch that has asked and not yet read."""
    sock = socket.create_connection(("127.0.0.1", port), timeout=30)
    sock.sendall(f"GET {target} HTTP/1.1\r\nHost: bench\r\n\r\n".encode())
    return sock


@contextlib.contextmanager
def reader(port: int, target: str) -> Iterator[None]:
    """A reader that takes all it is sent, as a page does."""
    with watch(port, target) as sock:
        thread = threading.Thread(target=drain, args=(sock,), daemon=True)
        thread.start()
        try:
            yield
        finally:
            sock.shutdown(socket.SHUT_RDWR)
            thread.join(WAIT_S)


def drain(sock: socket.socket) -> None:
    """Read until the end, ten times a second."""
    while sock.recv(1 << 20):
        time.sleep(0.1)


class Bench:
    """The rows of the table, each measured by one method."""

    def __init__(self, folder: Path, *, quick: bool, peer: str | None) -> None:
        self.folder = folder
        self.runs = 1 if quick else 3
        self.seconds = 1.0 if quick else 2.0
        self.long_seconds = 2.0 if quick else 5.0
        self.quick = quick
        self.peer = peer

    def offered(
        self, rate: float, seconds: float, engines: int, *key: str, **settings: object
    ) -> tuple[float, float, int, int]:
        """Offer load to a new gateway; returns states/s taken, CPU microseconds a state, sent, dropped."""
        with gateway(self.folder, STALE_THRESHOLD=60_000, **settings) as running:
            before, start = cpu_seconds(running.process.pid), time.perf_counter()
            sent = finish_sender(start_sender(running.port, rate, seconds, engines, *key))
            elapsed = time.perf_counter() - start
            stats = running.settled_stats()
            cpu = cpu_seconds(running.process.pid) - before
        account(sent, stats, f"{rate:.0f}/s, {engines} engines")
        taken = stats["total_received"]
        return taken / elapsed, cpu / taken * 1e6, sent, stats["kernel_dropped"]

    def limit(self, command: Callable[[int], list[str]]) -> tuple[float, float]:
        """The same for a receiver that only receives: states/s and CPU microseconds a state, at saturation."""
        port = free_port()
        with pinned(command(port), stdout=subprocess.DEVNULL) as process:
            time.sleep(0.7)
            before, start = cpu_seconds(process.pid), time.perf_counter()
            sent = finish_sender(start_sender(port, 0, self.seconds, 100))
            elapsed = time.perf_counter() - start
            time.sleep(0.5)
            taken = sent - kernel_drops(port)
            return taken / elapsed, (cpu_seconds(process.pid) - before) / taken * 1e6

    def saturated(self) -> None:
        rows: dict[str, Callable[[], tuple[float, ...]]] = {}
        program = self.c_receiver()
        if program:
            rows["limit: C, receives, scans and writes the line"] = lambda: self.limit(
                lambda port: [str(program), str(port), str(self.folder / "c.jsonl")]
            )
        rows["limit: bare Python recv loop, does nothing"] = lambda: self.limit(
            lambda port: [sys.executable, "-c", BARE_PYTHON, str(port)]
        )
        if self.peer:
            peer = self.peer
            rows["peer"] = lambda: self.limit(
                lambda port: shlex.split(peer.format(port=port, file=self.folder / "peer.jsonl"))
            )
        rows["gateway, log on"] = lambda: self.offered(0, self.seconds, 100)
        rows["gateway, log off"] = lambda: self.offered(0, self.seconds, 100, ENABLE_LOG="false")
        found: dict[str, list[tuple[float, ...]]] = {name: [] for name in rows}
        for _ in range(self.runs):
            for name, run in rows.items():
                found[name].append(run())
                for path in self.folder.glob("*.jsonl"):
                    path.unlink()
        costs = {name: statistics.median(run[1] for run in runs) for name, runs in found.items()}
        for name, runs in found.items():
            rate = statistics.median(run[0] for run in runs)
            row(f"saturated, {name}", f"{rate:,.0f} states/s", f"{costs[name]:.2f} us CPU a state")
        if program:
            ratios = [
                ours[1] / c[1] for ours, c in zip(found["gateway, log on"], next(iter(found.values())), strict=True)
            ]
            row("gateway with log, against C", f"{statistics.median(ratios):.2f} x", "of the CPU a state")

    def no_loss(self) -> None:
        best = 0
        for rate in (50_000, 100_000, 125_000, 150_000, 200_000):
            _, _, _, dropped = self.offered(rate, self.long_seconds, 1000)
            if dropped:
                break
            best = rate
        row(f"highest rate without loss over {self.long_seconds:.0f} s", f"{best:,} states/s", "1,000 engines, log on")

    def growth(self) -> None:
        sizes = (10, 100, 1000, 10_000)
        costs: dict[int, list[float]] = {engines: [] for engines in sizes}
        for _ in range(self.runs):
            for engines in sizes:
                costs[engines].append(self.offered(100_000, self.seconds, engines)[1])
        for engines in sizes:
            cost = statistics.median(costs[engines])
            row(f"{engines:,} engines, 100,000 states/s", f"{cost:.2f} us CPU a state", "log on")
        ratios = [many / few for many, few in zip(costs[sizes[-1]], costs[sizes[0]], strict=True)]
        row("10,000 engines, against 10", f"{statistics.median(ratios):.2f} x", "of the CPU a state")

    def keys(self) -> None:
        """The same signed datagrams of agents, to a gateway that checks them and to one that does not."""
        key = f"bench {'5a' * 32}"
        keys_file = self.folder / "keys"
        keys_file.write_text(f"{key}\n")
        keys_file.chmod(0o600)
        found: dict[str, list[tuple[float, float, int, int]]] = {}
        for _ in range(self.runs):
            for what, settings in (("no keys", {}), ("KEYS_FILE", {"KEYS_FILE": keys_file})):
                found.setdefault(what, []).append(self.offered(100_000, self.seconds, 1000, key, **settings))
        for what, runs in found.items():
            lost = sum(run[3] for run in runs) / sum(run[2] for run in runs)
            cost = statistics.median(run[1] for run in runs)
            row(f"100,000 signed states/s, {what}", f"{cost:.2f} us CPU a state", f"{lost * 100:.1f} % lost")
        more = [checked[1] - taken[1] for checked, taken in zip(found["KEYS_FILE"], found["no keys"], strict=True)]
        row("signatures", f"{statistics.median(more):.2f} us CPU a state more", "HMAC-SHA256 of 440 bytes")

    def compressed(self) -> None:
        """Large pages as gzip, beside 50,000 states/s on the same core."""
        for engines, path, pause_s in ((1000, "/engines", 0.1), (10_000, "/engines", 0.5), (10_000, "/metrics", 1.0)):
            with gateway(self.folder, STALE_THRESHOLD=60_000) as running:
                sent = finish_sender(start_sender(running.port, 50_000, 0.5, engines))
                sender = start_sender(running.port, 50_000, self.long_seconds, engines)
                times = []
                while sender.poll() is None:
                    start = time.perf_counter()
                    running.get(path, Accept_Encoding="gzip")
                    times.append(time.perf_counter() - start)
                    time.sleep(pause_s)
                sent += finish_sender(sender)
                stats = running.settled_stats()
            account(sent, stats, f"compressed {path}")
            row(
                f"{path} of {engines:,} engines as gzip, {pause_s} s apart, beside 50,000 states/s",
                f"median {statistics.median(times) * 1000:.0f} ms",
                f"{stats['kernel_dropped'] / sent * 100:.1f} % lost",
            )

    def everyday(self) -> None:
        """1,000 engines that push every 200 ms: as one burst, and evenly spread, where each is a wake-up of its own."""
        program = self.c_receiver()
        shares: dict[str, list[float]] = {}
        for _ in range(self.runs):
            for way in ("together", "spread"):
                with gateway(self.folder) as running:
                    share = self.share(running.process.pid, running.port, way)
                    stats = running.settled_stats()
                account(int(self.long_seconds / 0.2) * 1000, stats, f"everyday, {way}")
                shares.setdefault(f"1,000 engines x 5/s, {way}", []).append(share)
                if program:
                    port = free_port()
                    with pinned([program, str(port), str(self.folder / "c.jsonl")]) as process:
                        share = self.share(process.pid, port, way)
                    shares.setdefault(f"limit: C, 1,000 engines x 5/s, {way}", []).append(share)
        for what, found in shares.items():
            row(what, f"{statistics.median(found) * 100:.1f} % of a core", "log on")

    def share(self, pid: int, port: int, way: str) -> float:
        """The share of a core that a receiver takes for 1,000 engines."""
        time.sleep(0.5)
        before, start = cpu_seconds(pid), time.perf_counter()
        finish_sender(start_sender(port, way, self.long_seconds, 1000))
        return (cpu_seconds(pid) - before) / (time.perf_counter() - start)

    def page(self) -> None:
        """What one open status page adds to 1,000 engines that push every 200 ms, and one impatient reader of all."""
        shares: dict[str, list[float]] = {}
        targets = {"no reader": None, "an open page": "/watch?min_interval_ms=500", "a reader of /watch": "/watch"}
        for _ in range(self.runs):
            for what, target in targets.items():
                with gateway(self.folder) as running, contextlib.ExitStack() as opened:
                    if target:
                        opened.enter_context(reader(running.port, target))
                    shares.setdefault(what, []).append(self.share(running.process.pid, running.port, "spread"))
        for what, found in shares.items():
            more = [with_it - without for with_it, without in zip(found, shares["no reader"], strict=True)]
            row(
                f"1,000 engines x 5/s, spread, {what}",
                f"{statistics.median(found) * 100:.1f} % of a core",
                f"{statistics.median(more) * 100:.1f} points more" if targets[what] else "",
            )

    def c_receiver(self) -> str | None:
        """The compiled C receiver, or None where there is no compiler."""
        program = self.folder / "receiver"
        if not program.exists():
            compiler = shutil.which("cc")
            if compiler is None:
                return None
            subprocess.run([compiler, "-O2", "-o", str(program), str(HERE / "receiver.c")], check=True, timeout=120)
        return str(program)

    def visible(self) -> None:
        """From the sending of a datagram to the first answer that shows it, of a reader that asks without a pause."""
        for rate in (5000, 50_000):
            for path in ("/engines/probe", "/engines"):
                with gateway(self.folder, STALE_THRESHOLD=60_000) as running:
                    sender = start_sender(running.port, rate, self.long_seconds, 1000)
                    delays, number = self.probes(running, sender, path)
                    account(finish_sender(sender) + number, running.settled_stats(), f"visible, {rate}/s")
                if not delays:
                    raise SystemExit(f"none of {number} probes was shown at {path} within {PROBE_S:.0f} s")
                row(f"from send to visible at {path}, {rate:,} states/s of 1,000 engines", *quantiles(delays))

    @staticmethod
    def probes(running: Gateway, sender: subprocess.Popen[bytes], path: str) -> tuple[list[float], int]:
        """How soon probes were shown while the sender sends, and how many were sent; the kernel may drop some."""
        delays, number = [], 0
        with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as sock:
            while sender.poll() is None:
                number += 1
                start = time.perf_counter()
                sock.sendto(probe(number), ("127.0.0.1", running.port))
                while b'"timestamp_ms": %d,' % number not in running.get(path):
                    if time.perf_counter() - start > PROBE_S:
                        break
                else:
                    delays.append(time.perf_counter() - start)
                time.sleep(random.uniform(0.001, 0.010))  # not in step with the gateway's gathering
        if len(delays) < number:
            print(f"{number - len(delays)} of {number} probes were not shown at {path} within {PROBE_S:.0f} s")
        return delays, number

    def watching(self) -> None:
        """From the sending of a datagram to its event, on one of 20 streams of everything."""
        with gateway(self.folder, STALE_THRESHOLD=60_000) as running, contextlib.ExitStack() as opened:
            poller = select.poll()
            streams = [opened.enter_context(watch(running.port)) for _ in range(20)]
            for stream in streams:
                poller.register(stream, select.POLLIN)
            sending = opened.enter_context(socket.socket(socket.AF_INET, socket.SOCK_DGRAM))
            sender = start_sender(running.port, 5000, self.long_seconds, 1000)
            before, began = cpu_seconds(running.process.pid), time.perf_counter()
            delays, room, first = [], bytearray(1 << 20), streams[0].fileno()
            by_number = {stream.fileno(): stream for stream in streams}
            number, sent_at, tail = 0, 0.0, b""
            while sender.poll() is None:
                now = time.perf_counter()
                if not sent_at or now - sent_at > 0.02:
                    number += 1
                    sent_at = now
                    sending.sendto(probe(number), ("127.0.0.1", running.port))
                for fd, _ in poller.poll(2):
                    size = by_number[fd].recv_into(room)
                    if fd == first:
                        text = tail + room[:size]
                        if b'"probe", "timestamp_ms": %d,' % number in text:
                            delays.append(time.perf_counter() - sent_at)
                            sent_at = now
                        tail = text[-64:]
            sent = finish_sender(sender) + number
            share = (cpu_seconds(running.process.pid) - before) / (time.perf_counter() - began) * 100
            stats = running.settled_stats()
        account(sent, stats, "watching")
        if not delays:
            raise SystemExit(f"none of {number} probes came as an event")
        merged = stats["watch"]["merged_events"]
        row("from send to event, 1,000 engines x 5/s, 20 readers of /watch", *quantiles(delays))
        row("the same", f"{share:.0f} % of a core", f"{stats['watch']['events']:,} events, {merged} merged")

    def reading(self) -> None:
        for engines in (100, 1000, 10_000):
            for path in ("/engines", "/metrics"):
                with gateway(self.folder, STALE_THRESHOLD=60_000) as running:
                    first = finish_sender(start_sender(running.port, 50_000, 0.5, engines))
                    sender = start_sender(running.port, 20_000, self.seconds, engines)
                    times = []
                    end = time.perf_counter() + self.seconds
                    while time.perf_counter() < end:
                        start = time.perf_counter()
                        running.get(path)
                        times.append(time.perf_counter() - start)
                    sent = finish_sender(sender)
                    stats = running.settled_stats()
                account(first + sent, stats, f"reading {path} of {engines}")
                lost = stats["kernel_dropped"] / sent
                times.sort()
                p99 = times[int(len(times) * 0.99)] * 1000
                rate = len(times) / sum(times)
                row(
                    f"{path}, {engines:,} engines, one reader without pause",
                    f"{rate:,.0f} requests/s, p99 {p99:.1f} ms",
                    f"of 20,000 states/s beside it, {lost * 100:.1f} % lost",
                )

    def readers(self) -> None:
        """200 snapshots a second of 1,000 engines, beside 50,000 states/s on the same core."""
        with gateway(self.folder, STALE_THRESHOLD=60_000) as running:
            sender = start_sender(running.port, 50_000, self.long_seconds, 1000)
            start = time.perf_counter()
            asked = 0
            while sender.poll() is None:
                if time.perf_counter() - start >= asked / 200:
                    running.get("/engines")
                    asked += 1
                else:
                    time.sleep(0.0003)
            sent = finish_sender(sender)
            stats = running.settled_stats()
        account(sent, stats, "readers")
        row(
            "200 snapshots/s of 1,000 engines beside 50,000 states/s",
            f"{asked / self.long_seconds:.0f} snapshots/s",
            f"{stats['total_received'] / sent * 100:.1f} % taken in",
        )

    def memory(self) -> None:
        for history in (0, 100):
            with gateway(self.folder, STALE_THRESHOLD=60_000, HISTORY=history, ENABLE_LOG="false") as running:
                before = memory_bytes(running.process.pid)
                sent = finish_sender(start_sender(running.port, 80_000, 2 if self.quick else 14, 10_000))
                account(sent, running.settled_stats(), "memory")
                grown = memory_bytes(running.process.pid) - before
            states = min(history, sent // 10_000)
            row(f"memory an engine, history of {states}", f"{grown / 10_000 / 1000:.1f} kB", "10,000 engines")

    def busy_thread(self) -> None:
        for rate in (20_000, 50_000):
            environment = {name: value for name, value in os.environ.items() if not name.startswith("VLLM_")}
            settings = {"UDP_PORT": "0", "BIND_ADDRESS": "127.0.0.1", "LOG_FILE": str(self.folder / "busy.jsonl")}
            environment.update({f"VLLM_STATE_GATEWAY_{name}": value for name, value in settings.items()})
            command = [sys.executable, "-c", IN_PROCESS, str(TOP), str(HERE / "sender.py"), str(rate)]
            done = subprocess.run(
                [*command, str(self.seconds), "1000"], env=environment, stdout=subprocess.PIPE, check=True, timeout=120
            )
            result = json.loads(done.stdout)
            account(result["sent"], result["stats"], "busy thread")
            taken = result["stats"]["total_received"] / result["sent"] * 100
            row(f"beside a CPU-bound thread, {rate:,} states/s", f"{taken:.1f} % taken in", "same process, two cores")

    def start(self) -> None:
        ready, known = [], []
        for _ in range(self.runs):
            port = free_port()
            with sending(port, 5000, 1000):  # 1,000 engines that push every 200 ms, all along
                time.sleep(0.5)
                start = time.perf_counter()
                with gateway(self.folder, UDP_PORT=port) as running:
                    ready.append(time.perf_counter() - start)
                    wait_for("1,000 engines that the gateway knows", lambda: running.stats()["total_engines"] >= 1000)
                    known.append(time.perf_counter() - start)
        row("from start to ready", f"{statistics.median(ready) * 1000:.0f} ms", "")
        row(
            "from restart to all of 1,000 engines known",
            f"{statistics.median(known) * 1000:.0f} ms",
            "each pushes every 200 ms",
        )


def row(what: str, figure: str, remark: str) -> None:
    """Print a row of the table as it is found."""
    print(f"| {what} | {figure} | {remark} |", flush=True)


def main() -> None:
    """Measure what the command line asks for."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true")
    parser.add_argument("--peer", metavar="CMD")
    parser.add_argument("--only", metavar="ROWS", help="comma-separated, such as saturated,growth")
    options = parser.parse_args()
    names = (
        "saturated",
        "no_loss",
        "growth",
        "keys",
        "everyday",
        "compressed",
        "visible",
        "watching",
        "page",
        "reading",
        "readers",
        "memory",
        "busy_thread",
        "start",
    )
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # what was started is ended then, too
    print(f"Python {sys.version.split()[0]}, {os.cpu_count()} cores, receiver on core {RECEIVING_CORE}\n")
    row("what", "figure", "")
    print("|---|---|---|")
    with tempfile.TemporaryDirectory() as folder:
        bench = Bench(Path(folder), quick=options.quick, peer=options.peer)
        for name in options.only.split(",") if options.only else names:
            getattr(bench, name)()


if __name__ == "__main__":
    main()
