"""Two gateways for 200 engines: what a reader of both sees while one of the two is in trouble.

    python3 .ci/two_gateways.py [--seconds 300] [--engines 200] [--only pause,cut]

Two processes with half of the engines each, the two gateways, and the reader (engine_table.py) have a network namespace
of their own each, and every engine a wire to each gateway. Each engine says something to both every 200 ms, by the
agent's own code. One gateway after the other is killed, restarted, paused, cut off from half of the engines (the other
one, at the same time, from the other half), and cut off from the reader. There is always a way from every engine to the
reader, so that no trouble explains an engine that is missing, or older than what it said last.

The engines note when they said what; at each look the reader compares. Where no namespaces can be made, everything is
on the loopback, and what needs wires is said to be left out. Default: about 40 s. Exit 1 where a look was wrong.
"""

from __future__ import annotations

import argparse
import contextlib
import itertools
import json
import logging
import mmap
import os
import random
import signal
import struct
import subprocess
import sys
import tempfile
import threading
import time
from collections import Counter, deque
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

TOP = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(TOP))

import engine_agent  # noqa: E402
from engine_table import EngineTable, Entry  # noqa: E402
from tests.harness import Daemon, Namespace, free_port  # noqa: E402

PUSH_S = 0.2
LOOK_S = 0.02
# From an engine's saying so to its being seen, beside what the machine kept the processes waiting for a core.
MARGIN_S = 0.1
JUDGED_AFTER_S = 0.5
THRESHOLD_S = 2.0
TROUBLES = ("kill", "restart", "pause", "cut", "silence")
NEED_WIRES = ("cut", "silence")
# For the notes: a write to a mapped file on a disk waits for the disk now and then, and the datagram after it, too.
SHARED_MEMORY = "/dev/shm"
KNOWN_S = 3.0  # after a trouble: the reader is connected to both again, and both know all engines


class Notes:
    """What the engines said last and before, for the reader: two times and the last number of each, in shared memory.

    Written by one process for each engine; times are of the monotonic clock, which all processes share.
    """

    ROW = struct.Struct("ddq")

    def __init__(self, path: Path, engines: int) -> None:
        with path.open("r+b") as file:
            self._memory = mmap.mmap(file.fileno(), engines * self.ROW.size)

    @classmethod
    def make(cls, path: Path, engines: int) -> Notes:
        """Notes of engines that said nothing yet."""
        path.write_bytes(bytes(engines * cls.ROW.size))
        return cls(path, engines)

    def write(self, engine: int, number: int, now: float) -> None:
        """An engine says its next number now."""
        _, last, _ = self.read(engine)
        self.ROW.pack_into(self._memory, engine * self.ROW.size, last, now, number)

    def read(self, engine: int) -> tuple[float, float, int]:
        """When it spoke the last time but one, and the last time, and the number that it said then."""
        before, last, number = self.ROW.unpack_from(self._memory, engine * self.ROW.size)
        return before, last, number


def id_of(number: int) -> str:
    """An engine's id."""
    return f"http://10.7.{number // 100}.{number % 100 + 1}:8000"


def at_the_end_of_input() -> threading.Event:
    """What is set when standard input ends."""
    ended = threading.Event()

    def wait() -> None:
        sys.stdin.read()
        ended.set()

    threading.Thread(target=wait, daemon=True).start()
    return ended


# -- the engines -------------------------------------------------------------------------------------------------------


def be_engines(given: argparse.Namespace) -> None:
    """Some busy engines: each looks and says what it saw five times a second, until the end of standard input."""
    ended = at_the_end_of_input()
    notes = Notes(given.notes, given.engines)
    names = {"GATEWAY_HOST": given.gateways, "PUSH_INTERVAL": str(round(PUSH_S * 1000))}
    environ = {"ELRAR_" + name: value for name, value in names.items()}
    settings = engine_agent.read_settings(environ)
    complaints = engine_agent.Complaints(engine_agent.say_on_stderr)
    sender = engine_agent.Sender(settings, complaints)
    agents = {}
    for engine in range(given.first, given.last):
        agents[engine] = engine_agent.Agent(settings, sender)
        agents[engine].identify(id_of(engine), "m", "trial 1.0")
    began = time.monotonic()
    for turn in itertools.count(1):
        for place, (engine, agent) in enumerate(agents.items()):
            due = began + (turn + place / len(agents)) * PUSH_S
            if ended.wait(max(0.0, due - time.monotonic())):
                return
            now = engine_agent.Proof(time.monotonic(), int(time.time() * 1000))
            # The number is in the state, so that what is shown can be told from what was said before.
            reading = engine_agent.Reading(4, 1, marker=turn, proof=now, free=50, total=100, pending=turn)
            notes.write(engine, turn, now.at)
            agent.saw(engine_agent.Look([reading], now))


# -- the reader --------------------------------------------------------------------------------------------------------


class Waiting:
    """How long something may have waited for a core on its way through the trial's processes, within the last WITHIN_S.

    Linux says of each thread how long it waited, and adds that when the wait is over: what one wait took is in one
    tenth of a second. Two are added up, since a state goes through several processes. What the host of a virtual
    machine kept from it is in no thread's account, and added.
    """

    EVERY_S = 0.1
    WITHIN_S = 1.5

    def __init__(self, pids: Path) -> None:
        self._pids = pids
        self._before: dict[str, int] = {}
        self._waited: deque[float] = deque(maxlen=round(self.WITHIN_S / self.EVERY_S))
        self._next = 0.0

    def seconds(self, now: float) -> float:
        """The most that one state can have waited."""
        if now >= self._next:
            self._next = now + self.EVERY_S
            found = {}
            for task in (
                task for pid in self._pids.read_text().split() for task in Path(f"/proc/{pid}").glob("task/*")
            ):
                with contextlib.suppress(OSError, IndexError):  # it ended meanwhile
                    found[str(task)] = int((task / "schedstat").read_text().split()[1])
            found["the host"] = self._stolen_ns()
            before = self._before or found
            self._waited.append(sum(waited - before.get(task, 0) for task, waited in found.items()) / 1e9)
            self._before = found
        return sum(sorted(self._waited)[-2:])

    @staticmethod
    def _stolen_ns() -> int:
        """For how long a virtual machine's cores were wanted, and its host had others to serve."""
        ticks = Path("/proc/stat").read_text().split()[8]
        return int(ticks) * 10**9 // os.sysconf("SC_CLK_TCK")


class Shown:
    """An entry as it was at a look."""

    def __init__(self, entry: Entry) -> None:
        self.age_s = entry.age_ms / 1000
        self.status = entry.status
        self.number = entry.pending_tokens_total
        self.gateway = entry.gateway


class Reader:
    """Looks at the table of both gateways 50 times a second, and holds each entry against what the engine said."""

    def __init__(self, notes: Notes, pids: Path, engines: int) -> None:
        self.notes = notes
        self.waiting = Waiting(pids)
        self.engines = engines
        self.looks = 0
        self._looks: deque[tuple[float, float, list[tuple[float, float, int]], list[Shown | None]]] = deque()
        self.longest_s = 0.0  # that a core was waited for
        self.ages_ms: Counter[int] = Counter()
        self.wrong: list[str] = []

    def look(self, table: EngineTable) -> None:
        """One look at all engines; it is judged when it is known who waited for a core meanwhile."""
        began = time.monotonic()
        said = [self.notes.read(engine) for engine in range(self.engines)]
        entries = [table.get(id_of(engine)) for engine in range(self.engines)]
        shown = [None if entry is None else Shown(entry) for entry in entries]
        self._looks.append((began, time.monotonic(), said, shown))
        self.looks += 1
        while self._looks and began - self._looks[0][0] > JUDGED_AFTER_S:
            self.judge(*self._looks.popleft(), self.waiting.seconds(began))

    def judge(
        self,
        began: float,
        ended: float,
        said: list[tuple[float, float, int]],
        shown: list[Shown | None],
        waited_s: float,
    ) -> None:
        """Hold a look against what was said."""
        self.longest_s = max(self.longest_s, waited_s)
        margin_s = MARGIN_S + waited_s + ended - began
        for engine, (one, (before, last, number)) in enumerate(zip(shown, said, strict=True)):
            if one is not None:
                self.ages_ms[round(1000 * one.age_s)] += 1
            error = self.error(one, before, last, number, began, margin_s)
            if error:
                self.wrong.append(f"{time.time() - (time.monotonic() - began):.3f} {id_of(engine)} {error}")

    def error(
        self, shown: Shown | None, before: float, last: float, number: int, began: float, margin_s: float
    ) -> str | None:
        """What is wrong with an entry, if anything: missing, not live, older or younger than what the engine said."""
        if shown is None:
            return "is missing"
        must_be_known = began - last > margin_s
        silent_s = began - (last if must_be_known else before)
        if shown.age_s > silent_s + margin_s:
            return (
                f"is shown {1000 * shown.age_s:.0f} ms old by {shown.gateway}, and spoke {1000 * silent_s:.0f} ms ago"
            )
        if shown.status != "live" and shown.age_s <= THRESHOLD_S:
            return f"is {shown.status}"
        if shown.number < number - (0 if must_be_known else 1 + int(margin_s / PUSH_S)):
            return f"is shown as of {shown.number} by {shown.gateway}, and said {number}"
        # Never younger than it is: what a look shows was said at that time, or after the notes were read.
        if shown.age_s + margin_s < began - last and shown.number <= number:
            return f"is shown {1000 * shown.age_s:.0f} ms old, and spoke {1000 * (began - last):.0f} ms ago"
        return None


def be_reader(given: argparse.Namespace) -> None:
    """Look until the end of standard input, then print what was seen."""
    logging.disable(logging.CRITICAL)
    ended = at_the_end_of_input()
    reader = Reader(Notes(given.notes, given.engines), given.notes.with_name("pids"), given.engines)
    with EngineTable(*(f"http://{address}" for address in given.gateways.split(","))) as table:
        until = time.monotonic() + 30
        while any(status.engines < given.engines for status in table.gateways()):
            if time.monotonic() > until:
                raise SystemExit(f"the reader never knew all engines: {table.gateways()}")
            time.sleep(0.05)
        print("ready", flush=True)
        due = time.monotonic() + LOOK_S
        while not ended.wait(max(0.0, due - time.monotonic())):
            reader.look(table)
            due = max(due + LOOK_S, time.monotonic())
        status = [f"{one.url} {'connected' if one.connected else one.problem}" for one in table.gateways()]
    ages = sorted(reader.ages_ms.elements())
    account = {
        "looks": reader.looks,
        "oldest_ms": ages[-1],
        "median_ms": ages[len(ages) // 2],
        "p999_ms": ages[len(ages) * 999 // 1000],
        "waited_ms": round(1000 * reader.longest_s),
    }
    print(
        json.dumps(
            {**account, "wrong": len(reader.wrong), "first": first_of_each_second(reader.wrong), "status": status}
        )
    )


def first_of_each_second(wrong: Sequence[str]) -> list[str]:
    """Some of what was wrong, each line with the time before it."""
    seconds: dict[str, list[str]] = {}
    for line in wrong:
        seconds.setdefault(line.partition(".")[0], []).append(line)
    return [f"{lines[0]} (and {len(lines) - 1} more within that second)" for lines in seconds.values()][:50]


# -- the network -------------------------------------------------------------------------------------------------------


class Places:
    """Where everything runs: a namespace each, with a wire between any two that talk; or all on the loopback."""

    NAMES = ("engines-0", "engines-1", "reader", "gateway-0", "gateway-1")
    READER = 2

    def __init__(self) -> None:
        self.why_not = Namespace.why_not()
        self._stack = contextlib.ExitStack()
        self._spaces: dict[str, Namespace] = {}
        self._port = free_port()
        if self.why_not:
            return
        for name in self.NAMES:
            self._spaces[name] = Namespace()
            self._stack.callback(self._spaces[name].close)
        for user, gateway in itertools.product(range(3), range(2)):
            ours, theirs = self._spaces[self.NAMES[user]], self._spaces[f"gateway-{gateway}"]
            wire, peer = self._wire(user, gateway), self._wire(user, gateway) + "g"
            try:
                ours.run("ip", "link", "add", wire, "type", "veth", "peer", "name", peer, "netns", str(theirs.pid))
            except subprocess.CalledProcessError as error:
                self.close()
                self._spaces = {}
                self.why_not = f"no wire can be made between namespaces: {error.stderr.strip()}"
                return
            for space, device, host in ((ours, wire, 2), (theirs, peer, 1)):
                space.run("ip", "address", "add", f"10.{gateway}.{user}.{host}/24", "dev", device)
                space.run("ip", "link", "set", device, "up")

    @staticmethod
    def _wire(user: int, gateway: int) -> str:
        return f"w{user}{gateway}"

    def command(self, name: str, *command: str) -> list[str]:
        """A command as it runs at a place."""
        return self._spaces[name].command(*command) if self._spaces else list(command)

    def gateways(self, user: int) -> str:
        """The addresses of both gateways as half of the engines, or the reader, see them."""
        hosts = [f"10.{one}.{user}.1" if self._spaces else f"127.0.{one + 1}.1" for one in range(2)]
        return ",".join(f"{host}:{self._port}" for host in hosts)

    def settings(self, gateway: int) -> dict[str, object]:
        """Where a gateway listens."""
        return {
            "BIND_ADDRESS": "0.0.0.0" if self._spaces else f"127.0.{gateway + 1}.1",
            "UDP_PORT": self._port,
            "STALE_THRESHOLD": round(1000 * THRESHOLD_S),
            "ENABLE_LOG": "false",
            "STATS_INTERVAL": 0,
        }

    def set_wire(self, user: int, gateway: int, state: str, *, at_the_gateway: bool) -> None:
        """Cut a wire, or mend it: at the gateway's end nobody is told; at the other its address cannot be reached."""
        name = f"gateway-{gateway}" if at_the_gateway else self.NAMES[user]
        device = self._wire(user, gateway) + ("g" if at_the_gateway else "")
        self._spaces[name].run("ip", "link", "set", device, state)

    def close(self) -> None:
        """Let go of the namespaces, and so of the wires."""
        self._stack.close()


# -- the trial ---------------------------------------------------------------------------------------------------------


class Trial:
    """Starts everything, makes one trouble after another, and ends everything."""

    def __init__(self, folder: Path, engines: int, seconds: float, only: Sequence[str]) -> None:
        self.folder = folder
        self.only = only
        self.engines = engines
        self.seconds = seconds
        self.places = Places()
        self.stack = contextlib.ExitStack()
        self.stack.callback(self.places.close)
        self.chance = random.Random(16)
        self.troubles: dict[str, int] = {}
        self.events: list[str] = []
        self.users: list[subprocess.Popen[str]] = []
        self.gateways: list[Daemon] = []

    def start(self) -> None:
        """Gateways, engines, reader; back when the reader knows all engines by both."""
        notes = self.folder / "notes"
        Notes.make(notes, self.engines)
        self.gateways = [self.start_gateway(one) for one in range(2)]
        half = self.engines // 2
        for user, (first, last) in enumerate(((0, half), (half, self.engines))):
            self.start_user(user, "engines", "--first", str(first), "--last", str(last))
        self.start_user(Places.READER, "reader")
        reader = self.users[Places.READER]
        assert reader.stdout is not None
        if reader.stdout.readline() != "ready\n":
            raise SystemExit("the reader did not start")

    def start_gateway(self, number: int) -> Daemon:
        """Start one of the two, and wait until it is ready."""
        self.write_pids(leave_out=number)
        command = self.places.command(f"gateway-{number}", sys.executable, str(TOP / "gateway.py"))
        running = Daemon(self.folder, self.places.settings(number), command)
        self.stack.callback(running.close)
        running.wait_ready()
        self.write_pids(running.process.pid, leave_out=number)
        return running

    def write_pids(self, *more: int, leave_out: int = -1) -> None:
        """Tell the reader which processes there are."""
        gateways = [one.process.pid for number, one in enumerate(self.gateways) if number != leave_out]
        pids = [*(one.pid for one in self.users), *gateways, *more]
        new = self.folder / "pids.new"
        new.write_text(" ".join(map(str, pids)))
        new.rename(self.folder / "pids")

    def start_user(self, user: int, role: str, *arguments: str) -> None:
        """Start half of the engines, or the reader."""
        own = [sys.executable, __file__, "--be", role, "--engines", str(self.engines), *arguments]
        own += ["--notes", str(self.folder / "notes"), "--gateways", self.places.gateways(user)]
        command = self.places.command(Places.NAMES[user], *own)
        process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
        self.stack.callback(process.kill)
        self.users.append(process)
        self.write_pids()

    def run(self) -> None:
        """One trouble after another, at one gateway after the other, until the time is over."""
        ends = time.monotonic() + self.seconds
        names = [name for name in TROUBLES if name in self.only and not (self.places.why_not and name in NEED_WIRES)]
        makes: list[Callable[[int, float], None]] = [getattr(self, name) for name in names]
        for turn in itertools.count():
            make, gateway = makes[turn % len(makes)], (turn // len(makes) + turn % len(makes)) % 2
            most_s = ends - time.monotonic() - KNOWN_S
            if most_s < 1.0:
                break
            name = make.__doc__ or ""
            self.events.append(f"{time.time():.3f} gateway {gateway} is {name}")
            make(gateway, min(most_s, self.chance.uniform(2.0, 4.0 if self.seconds < 60 else 12.0)))
            self.events.append(f"{time.time():.3f} it is over")
            self.troubles[name] = self.troubles.get(name, 0) + 1
            time.sleep(KNOWN_S)
            self.must_go_on()

    def must_go_on(self) -> None:
        """No process ended by itself."""
        statuses = [*(one.poll() for one in self.users), *(one.process.poll() for one in self.gateways)]
        if any(status is not None for status in statuses):
            raise SystemExit(f"a process ended: {statuses}")

    def kill(self, gateway: int, seconds: float) -> None:
        """killed, and started again"""
        self.gateways[gateway].process.kill()
        self.gateways[gateway].process.wait(30)
        time.sleep(seconds)
        self.gateways[gateway] = self.start_gateway(gateway)

    def restart(self, gateway: int, seconds: float) -> None:
        """restarted"""
        self.gateways[gateway].stop()
        self.gateways[gateway] = self.start_gateway(gateway)

    def pause(self, gateway: int, seconds: float) -> None:
        """paused"""
        self.gateways[gateway].signal(signal.SIGSTOP)
        time.sleep(seconds)
        self.gateways[gateway].signal(signal.SIGCONT)

    def cut(self, gateway: int, seconds: float) -> None:
        """cut off from half of the engines, the other one from the other half"""
        silently = self.chance.random() < 0.5
        for half, one in ((0, gateway), (1, 1 - gateway)):
            self.places.set_wire(half, one, "down", at_the_gateway=silently)
        time.sleep(seconds)
        for half, one in ((0, gateway), (1, 1 - gateway)):
            self.places.set_wire(half, one, "up", at_the_gateway=silently)

    def silence(self, gateway: int, seconds: float) -> None:
        """cut off from the reader"""
        self.places.set_wire(Places.READER, gateway, "down", at_the_gateway=True)
        time.sleep(seconds)
        self.places.set_wire(Places.READER, gateway, "up", at_the_gateway=True)

    def end(self) -> dict[str, Any]:
        """End engines and reader; returns the reader's account."""
        said, _ = self.users[Places.READER].communicate(timeout=30)
        for user in self.users[: Places.READER]:
            user.communicate(timeout=30)
        return dict(json.loads(said))


def main() -> int:
    """Run it, and say what was seen."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seconds", type=float, default=36.0, help="how long there is trouble (default 36)")
    parser.add_argument("--engines", type=int, default=200)
    parser.add_argument("--only", default=",".join(TROUBLES), help="comma-separated (default: all)")
    parser.add_argument("--be", choices=("engines", "reader"), help=argparse.SUPPRESS)
    for name, kind in (("first", int), ("last", int), ("notes", Path), ("gateways", str)):
        parser.add_argument(f"--{name}", type=kind, help=argparse.SUPPRESS)
    given = parser.parse_args()
    if given.be:
        (be_engines if given.be == "engines" else be_reader)(given)
        return 0
    with tempfile.TemporaryDirectory(dir=SHARED_MEMORY if os.access(SHARED_MEMORY, os.W_OK) else None) as folder:
        trial = Trial(Path(folder), given.engines, given.seconds, given.only.split(","))
        with trial.stack:
            if trial.places.why_not:
                print(f"not tried here: cut off from half of the engines, or from the reader: {trial.places.why_not}")
            trial.start()
            trial.run()
            account = trial.end()
    for trouble, times in trial.troubles.items():
        print(f"{times} x one of the two {trouble}")
    print(
        f"{given.engines} engines x {1 / PUSH_S:.0f}/s, {given.seconds:.0f} s: {account['looks']} looks at all of them,"
        f" {account['wrong']} wrong; entries were {account['median_ms']} ms old in the"
        f" median, {account['p999_ms']} ms at p99.9, {account['oldest_ms']} ms at most; a core was waited for up to"
        f" {account['waited_ms']} ms"
    )
    for line in sorted([*account["first"], *trial.events]) if account["wrong"] else ():
        print(line)
    return 1 if account["wrong"] or account["looks"] < 10 * given.seconds else 0


if __name__ == "__main__":
    sys.exit(main())
