"""What the engines' agent costs, and how soon a change at an engine shows at a gateway.

    python3 benchmarks/agent.py [--quick] [--only record,push,scrape,reach,polled]

record: one call of the plugin's record(), at 20 and at 200 requests: what it adds to a step of the engine.
push:   one look and datagram of the plugin's thread, and of all threads of the agent at 5 a second.
scrape: one look of the sidecar at an engine that answers at once, in CPU of the agent.
reach:  from the statistics of a first request after idle to the changed entry at a real gateway.
polled: the same for those who ask an engine's /metrics every 1 s or 5 s, as routers without a gateway do.

The engine is a fake with the shape of a real vLLM's; .ci/engines does it with a real one. Medians of several rounds.
"""

from __future__ import annotations

import argparse
import http.client
import http.server
import itertools
import os
import random
import re
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

from bench import wait_ready

TOP = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(TOP))

import engine_agent as agent  # noqa: E402

NOTHING: Callable[[], None] = lambda: None  # noqa: E731


class FakeEngine:
    """The parts of vLLM's AsyncLLM that the plugin looks at."""

    def __init__(self, requests: int) -> None:
        self.output_processor = FakeProcessor(requests)
        self.engine_core = FakeCore()


class FakeProcessor:
    """Its table of requests."""

    def __init__(self, requests: int) -> None:
        self.request_states = {
            f"cmpl-{number}": SimpleNamespace(prompt_len=500, is_prefilling=number % 4 == 0)
            for number in range(requests)
        }


class FakeCore:
    """Its client of the engine core."""

    def __init__(self) -> None:
        self.resources = SimpleNamespace(engine_dead=False)


def statistics_of(requests: int) -> tuple[Any, Any]:
    """What vLLM passes to record() at a step of so many requests."""
    scheduler = SimpleNamespace(
        num_running_reqs=requests, num_waiting_reqs=2, num_skipped_waiting_reqs=0, kv_cache_usage=0.5,
        iteration_details=None,
    )  # fmt: skip
    iteration = SimpleNamespace(
        num_generation_tokens=requests,
        prompt_token_stats=SimpleNamespace(computed=0, total=0),
        inter_token_latencies_iter=[0.01] * requests,
        finished_requests=[],
    )
    return scheduler, iteration


def each_us(do: Callable[[], object], times: int, rounds: int) -> float:
    """Microseconds of one call, the median of some rounds."""
    found = []
    for _ in range(rounds):
        began = time.perf_counter()
        for _ in range(times):
            do()
        found.append(1e6 * (time.perf_counter() - began) / times)
    return statistics.median(found)


def bench_record(quick: bool) -> None:
    for requests in (20, 200):
        took = each_us(steps_of(requests), 2_000 if quick else 20_000, 3 if quick else 7)
        print(f"record(), {requests} requests: {took:.1f} us a step")


def steps_of(requests: int) -> Callable[[], None]:
    """A step of an engine with so many requests; now and then one comes and one goes."""
    engine = FakeEngine(requests)
    watch = agent.StepWatch([0], agent.FrontEnd(engine), NOTHING)
    scheduler, iteration = statistics_of(requests)
    table = engine.output_processor.request_states
    numbers = itertools.count(1)
    kept = [engine]  # the watch holds it weakly

    def step() -> None:
        number = next(numbers)
        if number % 16 == 0 and kept:
            table[f"new-{number}"] = table.pop(next(iter(table)))
        watch.record(scheduler, iteration, 0)

    return step


def settings(port: int, **values: str) -> agent.Settings:
    names = {"ELRAR_GATEWAY_PORT": str(port), "ELRAR_GATEWAY_HOST": "127.0.0.1"}
    return agent.read_settings({**names, **{"ELRAR_" + name: value for name, value in values.items()}})


def plugin(port: int, engine: FakeEngine, **values: str) -> agent.PluginAgent:
    facts = agent.ServerFacts("tiny", "vllm 0.33.0", "http", None, "127.0.0.1", 0, 1, (0,))
    config = SimpleNamespace(cache_config=SimpleNamespace(num_gpu_blocks=4096))
    return agent.PluginAgent(settings(port, ENGINE_ID="bench", **values), facts, config, engine, lambda _: None)


def bench_push(quick: bool) -> None:
    engine = FakeEngine(20)
    one = plugin(9, engine)
    scheduler, iteration = statistics_of(20)

    def push() -> None:
        one.watch.record(scheduler, iteration, 0)
        one.step()

    took = each_us(push, 500 if quick else 3_000, 3 if quick else 7)
    print(f"a look, judged, written and sent, 20 requests: {took:.0f} us")
    one.start()
    began, cpu = time.monotonic(), time.process_time()
    while time.monotonic() - began < (1.0 if quick else 8.0):
        one.watch.record(scheduler, iteration, 0)  # 100 steps a second
        time.sleep(0.01)
    with_steps = time.process_time() - cpu
    began, cpu = time.monotonic(), time.process_time()
    one.end(1.0)
    while time.monotonic() - began < (1.0 if quick else 8.0):
        one.watch.record(scheduler, iteration, 0)
        time.sleep(0.01)
    share = 100 * (with_steps - (time.process_time() - cpu)) / (1.0 if quick else 8.0)
    print(f"the agent's thread at 5 states/s: {share:.2f} % of a core")


SAMPLES = {
    "num_requests_running": 8, "num_requests_waiting": 16, "kv_cache_usage_perc": 0.5,
    "iteration_tokens_total_sum": 64000, "iteration_tokens_total_count": 800,
    "inter_token_latency_seconds_sum": 20, "inter_token_latency_seconds_count": 1000,
    "request_prompt_tokens_sum": 9000, "request_prompt_tokens_count": 90,
}  # fmt: skip
PAGE = "".join(f'vllm:{name}{{engine="0",model_name="tiny"}} {value}\n' for name, value in SAMPLES.items())


class Handler(http.server.BaseHTTPRequestHandler):
    """An engine's HTTP side that answers at once."""

    protocol_version = "HTTP/1.1"

    def do_GET(self) -> None:
        body = PAGE.encode() if self.path.startswith("/metrics") else b"{}"
        self.send_response(200)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, *_: object) -> None:
        pass


def bench_scrape(quick: bool) -> None:
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    command = [sys.executable, str(TOP / "engine_agent.py"), "--engine", f"http://127.0.0.1:{server.server_port}"]
    command += ["--gateway", "127.0.0.1:9", "--engine-id", "bench"]
    one = subprocess.Popen(command, stderr=subprocess.DEVNULL)
    try:
        time.sleep(1.0)
        began, cpu = time.monotonic(), cpu_of(one.pid)
        time.sleep(1.0 if quick else 10.0)
        share = 100 * (cpu_of(one.pid) - cpu) / (time.monotonic() - began)
    finally:
        end("the sidecar", one)
    print(f"the sidecar at 5 looks/s: {share:.2f} % of a core, {share / 5 * 10:.2f} ms a look")
    server.shutdown()
    server.server_close()


def end(what: str, process: subprocess.Popen[Any]) -> None:
    """End a process that was started here; raises SystemExit if it does not end."""
    process.terminate()
    try:
        process.wait(30)
    except subprocess.TimeoutExpired:
        process.kill()
        raise SystemExit(f"{what} was awaited for 30 s behind its SIGTERM, and did not end") from None


def cpu_of(pid: int) -> float:
    """Seconds of CPU of all threads of a process."""
    tasks = Path(f"/proc/{pid}/task")
    return sum(int((task / "schedstat").read_text().split()[0]) for task in tasks.iterdir()) / 1e9


def gateway(folder: str) -> tuple[subprocess.Popen[bytes], int]:
    """A real gateway, ready; returns it with its port."""
    names = {"UDP_PORT": "0", "BIND_ADDRESS": "127.0.0.1", "ENABLE_LOG": "false", "STATS_INTERVAL": "0"}
    environ = {**os.environ, **{"VLLM_STATE_GATEWAY_" + name: value for name, value in names.items()}}
    started = subprocess.Popen(
        [sys.executable, str(TOP / "gateway.py")], env=environ, cwd=folder, stderr=subprocess.PIPE
    )
    try:
        return started, wait_ready(started)
    except BaseException:
        started.kill()
        raise


def bench_reach(quick: bool) -> None:
    """A follower of /watch notes when the entry changed."""
    with tempfile.TemporaryDirectory() as folder:
        started, port = gateway(folder)
        try:
            engine = FakeEngine(0)
            one = plugin(port, engine)
            table = engine.output_processor.request_states
            one.start()
            changed: dict[int, float] = {}

            def follow() -> None:
                connection = http.client.HTTPConnection("127.0.0.1", port)
                connection.request("GET", "/watch")
                response = connection.getresponse()
                while line := response.readline():
                    if b'"pending_tokens_total"' in line:
                        at = time.monotonic()
                        for tokens in re.findall(rb'"pending_tokens_total": ([0-9]+)', line):
                            changed.setdefault(int(tokens), at)

            threading.Thread(target=follow, daemon=True).start()
            time.sleep(1.0)
            took = []
            for number in range(10 if quick else 90):
                time.sleep(random.uniform(0.0, 0.05))
                tokens = 1000 + number
                table["one"] = SimpleNamespace(prompt_len=tokens, is_prefilling=True)
                began = time.monotonic()
                one.watch.record(*statistics_of(1), 0)
                until = began + 10.0
                while tokens not in changed and time.monotonic() < until:
                    time.sleep(0.0005)
                if tokens not in changed:
                    raise SystemExit("no change was seen at the gateway within 10 s")
                took.append(1000 * (changed[tokens] - began))
                table.clear()
                one.watch.record(SimpleNamespace(num_running_reqs=0, num_waiting_reqs=0, kv_cache_usage=0.0), None, 0)
                time.sleep(0.25)
            one.end(1.0)
        finally:
            end("the gateway", started)
    took.sort()
    print(f"from a first request's statistics to the changed entry: {percentiles(took)}")


def percentiles(sorted_ms: list[float]) -> str:
    return f"p50 {sorted_ms[len(sorted_ms) // 2]:.1f} ms, p99 {sorted_ms[int(len(sorted_ms) * 0.99)]:.1f} ms"


def bench_polled(quick: bool) -> None:
    """Whoever polls learns of a change with the next poll: counted, not waited for."""
    chance = random.Random(1)
    for every_ms in (1000.0, 5000.0):
        waits = sorted(chance.uniform(0.0, every_ms) for _ in range(10_000))
        print(f"the same by polling /metrics every {every_ms / 1000:.0f} s: {percentiles(waits)}, by the poll alone")


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="a few rounds, to see that it runs")
    parser.add_argument("--only", default="record,push,scrape,reach,polled", help="comma-separated")
    given = parser.parse_args()
    for name in given.only.split(","):
        globals()[f"bench_{name}"](given.quick)
    return 0


if __name__ == "__main__":
    sys.exit(main())
