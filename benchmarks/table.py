"""What engine_table.py costs a router: the real gateway, the real table, states from the sender. Linux only.

    python3 benchmarks/table.py            about half a minute
    python3 benchmarks/table.py --quick    shorter, less exact

The gateway and the sender have one core, the table the other. CPU is the user and system time of the table's process.
"""

from __future__ import annotations

import argparse
import json
import os
import socket
import statistics
import subprocess
import sys
import time
from pathlib import Path

HERE = Path(__file__).resolve().parent
TOP = HERE.parent
sys.path.insert(0, str(TOP))

from engine_table import EngineTable  # noqa: E402

OTHERS_CORE, TABLES_CORE = "0", 1


def free_port() -> int:
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as udp:
        udp.bind(("127.0.0.1", 0))
        return int(udp.getsockname()[1])


def send(port: int, rate: int, seconds: float, engines: int) -> subprocess.Popen[bytes]:
    command = ["taskset", "-c", OTHERS_CORE, sys.executable, str(HERE / "sender.py")]
    return subprocess.Popen([*command, str(port), str(rate), str(seconds), str(engines)], stdout=subprocess.DEVNULL)


def following(table: EngineTable, port: int, engines: int, rate: int, seconds: float) -> None:
    """Print what it costs to follow so many engines, and how old the freshest of two looks is."""
    sender = send(port, rate, seconds + 1.5, engines)
    while len(table) < engines:
        time.sleep(0.05)
    time.sleep(0.5)
    events, cpu, start = table.gateways()[0].events, time.process_time(), time.monotonic()
    time.sleep(seconds)
    events, cpu = table.gateways()[0].events - events, time.process_time() - cpu
    elapsed = time.monotonic() - start
    ages = sorted(entry.state_age_ms for entry in table.entries())
    sender.wait()
    print(
        f"following {engines} engines x {rate // engines}/s: {events / elapsed:.0f} events/s, "
        f"{100 * cpu / elapsed:.1f} % of a core, {1e6 * cpu / max(1, events):.1f} us an event; "
        f"states p50 {ages[len(ages) // 2]} ms old, oldest {ages[-1]} ms"
    )


def microseconds(what: str, call: object, times: int) -> None:
    """Print the median of some rounds of calls."""
    assert callable(call)
    rounds = []
    for _ in range(7):
        start = time.perf_counter()
        for _ in range(times):
            call()
        rounds.append((time.perf_counter() - start) / times * 1e6)
    print(f"{what}: {statistics.median(rounds):.2f} us")


def asking(table: EngineTable, port: int) -> None:
    """Print what a router's questions cost with 1,000 engines that push five times a second meanwhile."""
    sender = send(port, 5000, 12, 1000)
    while len(table.live()) < 1000:
        time.sleep(0.05)
    microseconds("choose() of 1,000 engines", table.choose, 5000)
    microseconds("choose(usable=True)", lambda: table.choose(usable=True), 5000)
    microseconds("choose(exclude={one})", lambda: table.choose(exclude={"http://10.100.100.100:8000"}), 5000)
    microseconds("get()", lambda: table.get("http://10.100.100.100:8000"), 20000)
    microseconds("live() of 1,000 engines", table.live, 50)
    sender.terminate()
    sender.wait()


def main() -> None:
    """Measure, each with the gateway started anew."""
    parser = argparse.ArgumentParser(description="What engine_table.py costs a router.")
    parser.add_argument("--quick", action="store_true", help="shorter, less exact")
    seconds = 2.0 if parser.parse_args().quick else 6.0
    os.sched_setaffinity(0, {TABLES_CORE % (os.cpu_count() or 1)})
    for engines, rate in ((1000, 5000), (10_000, 50_000)):
        port = free_port()
        environment = {
            **os.environ,
            "VLLM_STATE_GATEWAY_UDP_PORT": str(port),
            "VLLM_STATE_GATEWAY_BIND_ADDRESS": "127.0.0.1",
            "VLLM_STATE_GATEWAY_ENABLE_LOG": "false",
        }
        gateway = subprocess.Popen(
            ["taskset", "-c", OTHERS_CORE, sys.executable, str(TOP / "gateway.py")],
            env=environment,
            stderr=subprocess.DEVNULL,
        )
        try:
            with EngineTable(f"http://127.0.0.1:{port}") as table:
                table.wait_until_known(10)
                following(table, port, engines, rate, seconds)
                if engines == 1000:
                    asking(table, port)
                print(json.dumps({"round_trip_ms": round(table.gateways()[0].round_trip_ms, 2)}))
        finally:
            gateway.terminate()
            gateway.wait(10)


if __name__ == "__main__":
    main()
