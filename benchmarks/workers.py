"""Four workers of a router, each with get_state_gateway() at 50 looks a second, while the one that listens is killed.

    python3 benchmarks/workers.py               a minute: 40 engines that push every 200 ms, three kills
    python3 benchmarks/workers.py --seconds 20 --kills 2

What has to hold: no look without every engine after a worker's first second, and one table, so that what one worker
shows is shown by all of them, or something newer, MAX_BEHIND_S later. Exit status 1 if it does not. Where the machine
kept a worker from running just before, that is said and not held against the gateway: it runs on the same cores.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from itertools import pairwise
from pathlib import Path
from typing import Any

from bench import free_port

TOP = Path(__file__).resolve().parent.parent
WORKERS = 4
LOOKS_PER_S = 50
ENGINES = [f"http://172.17.0.{number}:8000" for number in range(3, 43)]
PUSH_INTERVAL_S = 0.2
FIRST_S = 1.0  # of a worker, in which it may know nobody yet
MAX_BEHIND_S = 0.1
STALL_S = 0.05  # not got round to for so long besides its pause, a worker had no core

# Each look is a line: when it began and ended, which gateway answered, and each engine's timestamp.
WORKER = """
import json, sys, time
from gateway import get_state_gateway
while True:
    began_at = time.monotonic()
    gateway = get_state_gateway()
    states = gateway.get_engine_states_dict()
    ended_at = time.monotonic()
    listens = type(gateway).__name__ == "StateGateway" or getattr(gateway, "_own", None) is not None
    shown = {name: state["timestamp_ms"] for name, state in states.items()}
    print(json.dumps([began_at, ended_at, listens, shown]), flush=True)
    time.sleep(max(0.0, began_at + float(sys.argv[1]) - time.monotonic()))
"""


@dataclass
class Look:
    """What one worker was shown at a moment, monotonic s."""

    began_at: float
    ended_at: float
    listens: bool
    shown: dict[str, int]


@dataclass
class Worker:
    """A process of the router."""

    process: subprocess.Popen[str]
    looks: list[Look] = field(default_factory=list)
    killed_at: float = float("inf")

    def read(self) -> None:
        """Keep what it says; for a thread."""
        assert self.process.stdout is not None
        for line in self.process.stdout:
            if line.endswith("\n"):
                self.looks.append(Look(*json.loads(line)))

    def first_s_is_over_at(self) -> float:
        """From when on it has to know everybody."""
        return (self.looks[0].began_at if self.looks else float("inf")) + FIRST_S


class Trial:
    """The router, its engines, and who is killed when."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._port = free_port()
        self._over = threading.Event()
        self._stalls: list[tuple[float, float]] = []
        self.workers: list[Worker] = []

    def start_worker(self) -> None:
        """One more process."""
        settings = {"UDP_PORT": self._port, "BIND_ADDRESS": "127.0.0.1", "LOG_FILE": self._folder / "states.jsonl"}
        environment = {name: value for name, value in os.environ.items() if not name.startswith("VLLM_")}
        environment.update({f"VLLM_STATE_GATEWAY_{name}": str(value) for name, value in settings.items()})
        process = subprocess.Popen(
            [sys.executable, "-c", WORKER, str(1 / LOOKS_PER_S)],
            stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True,
            env={**environment, "PYTHONPATH": str(TOP)},
        )  # fmt: skip
        worker = Worker(process)
        self.workers.append(worker)
        threading.Thread(target=worker.read, daemon=True).start()

    def push(self) -> None:
        """The engines, each every PUSH_INTERVAL_S, evenly spread; for a thread."""
        state: dict[str, Any] = {
            "engine_id": "", "timestamp_ms": 0, "latency_pred_ms": 1.5, "scheduling_mode": "balanced",
            "pending_tokens_total": 1, "kv_cache_free_blocks": 1, "kv_cache_total_blocks": 2, "engine_capacity": 1.5,
        }  # fmt: skip
        with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as sock:
            while True:
                for engine_id in ENGINES:
                    state.update(engine_id=engine_id, timestamp_ms=time.time_ns() // 1_000_000)
                    sock.sendto(json.dumps(state).encode(), ("127.0.0.1", self._port))
                    if self._over.wait(PUSH_INTERVAL_S / len(ENGINES)):
                        return

    def run(self, seconds: float, kills: int) -> None:
        """Push, look, and kill the listening one every so often; a new worker comes in its place."""
        threading.Thread(target=self.push, daemon=True).start()
        for _ in range(WORKERS):
            self.start_worker()
        for _ in range(kills):
            time.sleep(seconds / (kills + 1) * random.uniform(0.9, 1.0))
            listening = [worker for worker in self.alive() if worker.looks and worker.looks[-1].listens]
            for worker in listening[:1]:
                worker.killed_at = time.monotonic()
                worker.process.send_signal(signal.SIGKILL)
                worker.process.wait(30)
                self.start_worker()
        time.sleep(seconds / (kills + 1))
        for worker in self.alive():
            worker.killed_at = time.monotonic()
            worker.process.kill()
            worker.process.wait(30)
        self._over.set()
        self.find_stalls()

    def alive(self) -> list[Worker]:
        """The workers that were not killed."""
        return [worker for worker in self.workers if worker.killed_at == float("inf")]

    # -- what has to hold ----------------------------------------------------------------------------------------------

    def incomplete(self) -> Iterator[str]:
        """The looks without an engine."""
        for number, worker in enumerate(self.workers):
            for look in worker.looks:
                missing = len(ENGINES) - len(look.shown)
                if missing and look.began_at >= worker.first_s_is_over_at():
                    yield f"worker {number}: {missing} engines are not there"

    def had_no_core(self, at: float) -> bool:
        """Whether a worker was kept from running in the half second before."""
        return any(began < at and ended > at - 0.5 for began, ended in self._stalls)

    def find_stalls(self) -> None:
        """When a worker was not got round to; to be called once all have ended."""
        for worker in self.workers:
            for before, after in pairwise(worker.looks):
                if after.began_at - before.ended_at > 1 / LOOKS_PER_S + STALL_S:
                    self._stalls.append((before.ended_at, after.began_at))

    def behind(self) -> Iterator[tuple[float, str]]:
        """When and which: the looks that do not show what another worker had shown MAX_BEHIND_S before.

        What only a killed worker knew is lost with it, until the engine's next push.
        """
        for number, worker in enumerate(self.workers):
            for other in self.workers:
                if other is worker:
                    continue
                known: dict[str, int] = {}
                earlier = iter(other.looks)
                seen = next(earlier, None)
                for look in worker.looks:
                    while seen is not None and seen.ended_at <= look.began_at - MAX_BEHIND_S:
                        if seen.ended_at < other.killed_at - MAX_BEHIND_S:
                            known.update(seen.shown)
                        seen = next(earlier, None)
                    if look.began_at < worker.first_s_is_over_at():
                        continue
                    old = [name for name, timestamp_ms in known.items() if look.shown.get(name, 0) < timestamp_ms]
                    if old:
                        yield look.began_at, f"worker {number}: {len(old)} states are older than another one's"

    def longest_silence_s(self) -> float:
        """The longest that nothing new of an engine was shown by a worker that lived: what a takeover takes."""
        longest = 0.0
        for worker in self.workers:
            changed_at: dict[str, tuple[float, int]] = {}
            for look in worker.looks:
                for name, timestamp_ms in look.shown.items():
                    at, shown = changed_at.get(name, (look.began_at, 0))
                    if timestamp_ms != shown:
                        longest = max(longest, look.began_at - at)
                        changed_at[name] = look.began_at, timestamp_ms
        return longest

    def longest_look_s(self) -> float:
        """The longest that a worker waited for an answer, its first one aside."""
        return max(look.ended_at - look.began_at for worker in self.workers for look in worker.looks[1:])

    def longest_between_looks_s(self) -> float:
        """The longest that a worker was not got round to: what the machine did, and not the gateway."""
        return max(
            after.began_at - before.ended_at for worker in self.workers for before, after in pairwise(worker.looks)
        )


def main() -> int:
    """Run the trial, and say what was found."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seconds", type=float, default=60.0)
    parser.add_argument("--kills", type=int, default=3)
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        trial = Trial(Path(folder))
        trial.run(options.seconds, options.kills)
    if not all(worker.looks for worker in trial.workers):
        raise SystemExit(f"looks of the workers: {[len(worker.looks) for worker in trial.workers]}")
    looks = sum(len(worker.looks) for worker in trial.workers)
    killed = len(trial.workers) - WORKERS
    incomplete, found = list(trial.incomplete()), list(trial.behind())
    behind = [what for at, what in found if not trial.had_no_core(at)]
    print(f"{looks:,} looks of {len(trial.workers)} workers, {killed} of them killed while they listened")
    print(f"without all {len(ENGINES)} engines after the first second: {len(incomplete)}")
    print(
        f"older than what another one showed {MAX_BEHIND_S * 1000:.0f} ms before: {len(behind)},"
        f" and {len(found) - len(behind)} just after a worker had no core"
    )
    print(f"longest without news of an engine: {trial.longest_silence_s() * 1000:.0f} ms")
    print(
        f"longest look: {trial.longest_look_s() * 1000:.1f} ms; longest that the machine kept a worker from looking:"
        f" {trial.longest_between_looks_s() * 1000:.0f} ms"
    )
    for what in (*incomplete[:5], *behind[:5]):
        print(what)
    return int(bool(incomplete or behind or killed < options.kills))


if __name__ == "__main__":
    sys.exit(main())
