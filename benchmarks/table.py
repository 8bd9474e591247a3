"""What engine_table.py costs a router: the real gateway, the real table, states from the sender. Linux only.

    python3 benchmarks/table.py            about half a minute
    python3 benchmarks/table.py --quick    shorter, less exact

The gateway and the sender have one core, the table the other. CPU is the user and system time of the table's process.
Every wait has an end: if some engines do not get in, it goes on with the others and says so.
"""

from __future__ import annotations

import argparse
import json
import os
import signal
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

from bench import RECEIVING_CORE, WAIT_S, Gateway, gateway, sending

TOP = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(TOP))

from engine_table import EngineTable  # noqa: E402

TABLES_CORE = 1
NO_MORE_S = 3.0  # if no further engine came for so long, none is waited for


def wait_for_engines(what: str, count: Callable[[], int], wanted: int, running: Gateway, table: EngineTable) -> int:
    """How many there are once all are there or no more come; ends the benchmark with what is known if there is none."""
    most, began = 0, time.monotonic()
    since = began
    while (there := count()) < wanted:
        now = time.monotonic()
        if there > most:
            most, since = there, now
        if now - began > WAIT_S or (there and now - since > NO_MORE_S):
            break
        time.sleep(0.05)
    if not there:
        of_table = "; ".join(f"{one.engines} engines, problem: {one.problem!r}" for one in table.gateways())
        raise SystemExit(
            f"waited {WAIT_S:.0f} s for {wanted} engines that the table has {what}, and there is none;"
            f" the table says of the gateway: {of_table}; the gateway says: {json.dumps(running.stats())}"
        )
    if there < wanted:
        print(f"{there} of {wanted} engines are {what}; the others were not awaited any longer")
    return there


def following(table: EngineTable, running: Gateway, engines: int, rate: int, seconds: float) -> None:
    """Print what it costs to follow so many engines, and how old the freshest of two looks is."""
    with sending(running.port, rate, engines, RECEIVING_CORE):
        known = wait_for_engines("known", lambda: len(table), engines, running, table)
        time.sleep(0.5)
        events, cpu, start = table.gateways()[0].events, time.process_time(), time.monotonic()
        time.sleep(seconds)
        events, cpu = table.gateways()[0].events - events, time.process_time() - cpu
        elapsed = time.monotonic() - start
        ages = sorted(entry.state_age_ms for entry in table.entries())
    if not ages:
        raise SystemExit(f"all of {known} engines were removed within {elapsed:.1f} s, while the sender sent")
    print(
        f"following {known} engines x {rate // engines}/s: {events / elapsed:.0f} events/s, "
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


def asking(table: EngineTable, running: Gateway) -> None:
    """Print what a router's questions cost with 1,000 engines that push five times a second meanwhile."""
    with sending(running.port, 5000, 1000, RECEIVING_CORE):
        live = wait_for_engines("live", lambda: len(table.live()), 1000, running, table)
        microseconds(f"choose() of {live:,} engines", table.choose, 5000)
        microseconds("choose(usable=True)", lambda: table.choose(usable=True), 5000)
        microseconds("choose(exclude={one})", lambda: table.choose(exclude={"http://10.100.100.100:8000"}), 5000)
        microseconds("get()", lambda: table.get("http://10.100.100.100:8000"), 20000)
        microseconds(f"live() of {live:,} engines", table.live, 50)


def main() -> None:
    """Measure, each with the gateway started anew."""
    parser = argparse.ArgumentParser(description="What engine_table.py costs a router.")
    parser.add_argument("--quick", action="store_true", help="shorter, less exact")
    seconds = 2.0 if parser.parse_args().quick else 6.0
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # what was started is ended then, too
    os.sched_setaffinity(0, {TABLES_CORE % (os.cpu_count() or 1)})
    for engines, rate in ((1000, 5000), (10_000, 50_000)):
        with (
            tempfile.TemporaryDirectory() as folder,
            gateway(Path(folder), ENABLE_LOG="false") as running,
            EngineTable(f"http://127.0.0.1:{running.port}") as table,
        ):
            if not table.wait_until_known(WAIT_S):
                raise SystemExit(
                    f"the table did not follow the gateway in {WAIT_S:.0f} s: {table.gateways()[0].problem}"
                )
            following(table, running, engines, rate, seconds)
            if engines == 1000:
                asking(table, running)
            print(json.dumps({"round_trip_ms": round(table.gateways()[0].round_trip_ms, 2)}))


if __name__ == "__main__":
    main()
