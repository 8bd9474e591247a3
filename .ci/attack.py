"""An attacker on the path of signed engines, in real time, over UDP on the loopback: does a reader ever see it?

    python3 .ci/attack.py [--seconds 60]

20 engines say something signed five times a second. They restart, die, come back, and say farewell. The attacker sees
every datagram: it holds some back and sends them later, and sends 1,000 others a second, which are replayed, cut,
changed by a bit, lengthened, signed again and forged. The gateway is restarted twice meanwhile, and once told to read
keys that cannot be used. A reader holds /engines against what the engines said, 20 times a second.

At the end the state log is looked through: every datagram that was let through is in it, and none of the attacker's
own but what SECURITY.md says remains: what was held back, of an earlier boot; captures of a boot that this gateway
never heard, after its restart. The reader sees none of them while the engine speaks. tests/test_signed_gateway.py does
the same with clocks moved by hand, at every datagram. Exit 1 where anything was wrong.
"""

from __future__ import annotations

import argparse
import contextlib
import http.client
import json
import os
import random
import secrets
import signal
import socket
import sys
import tempfile
import threading
import time
from collections import Counter, deque
from collections.abc import Callable
from pathlib import Path
from typing import Any

TOP = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(TOP))

from two_gateways import Waiting  # noqa: E402

from engine_agent import DatagramWriter, Key, Load  # noqa: E402
from tests.harness import Daemon, free_port  # noqa: E402

ENGINES = 20
PUSH_S = 0.2
LOOK_S = 0.05
HOSTILE_A_SECOND = 1000
MARGIN_S = 0.1  # from a datagram's being sent to its being seen, beside what the machine kept both waiting for a core
THRESHOLD_S, EXPIRE_S = 2.0, 6.0

HONEST = Key("fleet", secrets.token_bytes(32))
STOLEN = Key("stolen", secrets.token_bytes(32))  # speaks for evil-* only
THEIRS = Key("fleet", secrets.token_bytes(32))  # the attacker's own, of the same name


class Engine:
    """An honest engine: what it said, and when; `said` is what the attacker let through."""

    def __init__(self, number: int) -> None:
        self.engine_id = f"http://10.0.0.{number}:8000"
        self.writer = DatagramWriter(self.engine_id, model="m", key=HONEST)
        self.number = 0  # grows with each datagram, through all lives
        self.said: deque[tuple[float, int]] = deque(maxlen=50)
        self.silent_until = 0.0
        self.gone_at = 0.0  # its last farewell
        self.released_at = 0.0  # when something was sent that had been held back: it counts as heard from
        self.life_began = time.monotonic()

    def write(self, phase: str = "serving") -> bytes:
        """What it says next; the number is in it, so that what is shown can be told from what was said before."""
        self.number += 1
        load = Load(10.0, "balanced", self.number, 50, 100, 1000.0, 1, 0)
        return self.writer.write(phase, int(time.time() * 1000), load)


class Siege:
    """Engines, attacker and reader, a thread each, beside a gateway."""

    def __init__(self, folder: Path, seconds: float) -> None:
        self.folder = folder
        self.seconds = seconds
        self.chance = random.Random(16)
        self.engines = [Engine(number) for number in range(ENGINES)]
        self.lock = threading.Lock()  # guards engines and what the attacker has; held for a datagram or a look
        self.ours, self.theirs = (socket.socket(socket.AF_INET, socket.SOCK_DGRAM) for _ in range(2))
        for sock in (self.ours, self.theirs):
            sock.bind(("127.0.0.1", 0))
        self.port = free_port()
        self.seen: deque[bytes] = deque(maxlen=4000)
        self.withheld: list[tuple[Engine, int, bytes]] = []
        self.delivered: dict[tuple[str, int], float] = {}  # by boot and seq, when
        self.ready_at = self.ready_s = 0.0  # of the gateway, by both clocks; infinite while there is none
        self.lives: list[tuple[float, float]] = []  # of gateways, by the monotonic clock
        self.ended = threading.Event()
        self.counts: Counter[str] = Counter()
        self.wrong: list[str] = []
        self.waiting = Waiting(folder / "pids")
        self.waited_s = 0.0

    # -- the gateway

    def start_gateway(self) -> Daemon:
        """Start it, with the same port and log."""
        settings = {
            "UDP_PORT": self.port,
            "BIND_ADDRESS": "127.0.0.1",
            "STALE_THRESHOLD": round(1000 * THRESHOLD_S),
            "KEYS_FILE": self.folder / "keys",
            "LOG_FILE": "states.jsonl",
            "STATS_INTERVAL": 0,
        }
        running = Daemon(self.folder, settings)
        (self.folder / "pids").write_text(f"{running.process.pid} {os.getpid()}")
        running.wait_ready()
        with self.lock:
            self.ready_at, self.ready_s = time.monotonic(), time.time()
        return running

    def write_keys(self, more: str = "") -> None:
        """Write the file of keys, with something behind them."""
        path = self.folder / "keys"
        path.write_text(f"fleet {HONEST.secret.hex()}\nstolen {STOLEN.secret.hex()} evil-*\n{more}")
        path.chmod(0o600)

    def stop_gateway(self, running: Daemon) -> None:
        """Stop it, and keep when it was there."""
        with self.lock:
            self.lives.append((self.ready_at, time.monotonic()))
            self.ready_at = float("inf")
        if running.stop() != 0:
            self.wrong.append(f"the gateway ended with {running.process.returncode}: {running.lines[-3:]}")
        running.close()

    # -- the engines

    def speak(self) -> None:
        """Each engine in its turn, until the end."""
        due = {
            engine.engine_id: time.monotonic() + PUSH_S * place / ENGINES for place, engine in enumerate(self.engines)
        }
        while not self.ended.is_set():
            for engine in self.engines:
                now = time.monotonic()
                if due[engine.engine_id] <= now:
                    due[engine.engine_id] = max(due[engine.engine_id] + PUSH_S, now)
                    if now >= engine.silent_until:
                        self.go_on(engine, now)
            time.sleep(0.004)

    def go_on(self, engine: Engine, now: float) -> None:
        """An engine's turn: mostly it says how it is."""
        chance = self.chance.random() if now - engine.life_began > 3.0 else 1.0
        if chance < 0.004:  # it dies, and comes back
            engine.silent_until = now + self.chance.uniform(0.5, 9.0)
        elif chance < 0.008:  # it says farewell, and comes back
            with self.lock:
                for _ in range(3):
                    self.ours.sendto(engine.write("gone"), ("127.0.0.1", self.port))
                engine.gone_at = time.monotonic()
            engine.silent_until = now + self.chance.uniform(0.5, 9.0)
        if chance < 0.02:  # also in the middle of its sending
            engine.writer.new_life()
            engine.life_began = max(now, engine.silent_until)
            self.counts["restarts of engines"] += 1
        if chance < 0.008:
            return
        with self.lock:
            datagram = engine.write()
            if self.chance.random() < 0.05 and engine.writer.seq > 1:
                self.withheld.append((engine, engine.number, datagram))
                self.counts["held back"] += 1
                return
            self.ours.sendto(datagram, ("127.0.0.1", self.port))
            self.seen.append(datagram)  # what is held back is none of it: sent at once, it would be no more than late
            at = time.monotonic()
            engine.said.append((at, engine.number))
            self.delivered[engine.writer.boot, engine.writer.seq] = at
        self.counts["honest"] += 1

    # -- the attacker

    def attack(self) -> None:
        """A thousand a second, until the end."""
        began = time.monotonic()
        sent = 0
        while not self.ended.is_set():
            while sent < (time.monotonic() - began) * HOSTILE_A_SECOND:
                with self.lock:
                    datagram = self.hostile() if self.seen else b""
                self.theirs.sendto(datagram, ("127.0.0.1", self.port))
                sent += 1
            time.sleep(0.005)
        self.counts["hostile"] = sent

    def hostile(self) -> bytes:
        """One datagram of the attacker's."""
        chance = self.chance
        if self.withheld and chance.random() < 0.01:
            place = chance.randrange(len(self.withheld))
            engine, number, datagram = self.withheld[place]
            now = time.monotonic()
            # Before, it would be no more than a delay; of a silent engine it can pass, as SECURITY.md says.
            if (
                engine.said
                and engine.said[-1][1] > number
                and now - engine.said[-1][0] < 1.0
                and now > engine.gone_at + 9
            ):
                del self.withheld[place]
                engine.released_at = now
                self.seen.append(datagram)
                return datagram
        victim = self.seen[-chance.randrange(1, len(self.seen) + 1)]
        body = victim[: victim.index(b', "sig"')]
        engine_id = json.loads(victim)["engine_id"]
        ways: list[Callable[[], bytes]] = [
            lambda: victim,
            lambda: victim,
            lambda: self.seen[-1],
            lambda: victim[: chance.randrange(len(victim))],
            lambda: self.flip(victim),
            lambda: victim[:-1] + b', "pending_tokens_total": 0}',
            lambda: victim + self.seen[-1],
            lambda: THEIRS.sign(body + b"}"),
            lambda: STOLEN.sign(body + b"}"),
            lambda: self.forge(engine_id, THEIRS),
            lambda: self.forge(engine_id, STOLEN),
            lambda: self.forge(engine_id, None),
            lambda: self.forge(engine_id, THEIRS, phase="gone"),
            lambda: self.forge(f"evil-{secrets.token_hex(4)}", STOLEN, off_s=chance.choice((-301, 301))),
            lambda: chance.randbytes(chance.randrange(400)),
        ]
        return chance.choice(ways)()

    def flip(self, victim: bytes) -> bytes:
        """One bit changed, anywhere."""
        changed = bytearray(victim)
        changed[self.chance.randrange(len(changed))] ^= 1 << self.chance.randrange(8)
        return bytes(changed)

    @staticmethod
    def forge(engine_id: str, key: Key | None, phase: str = "serving", off_s: float = 0.0) -> bytes:
        """A state of the attacker's own making."""
        load = Load(10.0, "balanced", 999_999, 50, 100, 1000.0, 1, 0)
        return DatagramWriter(engine_id, model="m", key=key).write(phase, int((time.time() + off_s) * 1000), load)

    # -- the reader

    def look(self) -> None:
        """Hold /engines against the truth, again and again."""
        connection = http.client.HTTPConnection("127.0.0.1", self.port, timeout=5)
        while not self.ended.wait(LOOK_S):
            began = time.monotonic()
            self.waited_s = self.waiting.seconds(began)
            try:
                connection.request("GET", "/engines")
                document = json.loads(connection.getresponse().read())
            except (OSError, http.client.HTTPException):
                connection.close()
                continue
            with self.lock:
                ended, ready_at = time.monotonic(), self.ready_at
                if document["uptime_ms"] / 1000 < ended - ready_at - 1.0 or ready_at > began:
                    continue  # the gateway was being restarted
                for engine in self.engines:
                    error = self.error(engine, document["engines"].pop(engine.engine_id, None), began, ended)
                    if error:
                        self.wrong.append(f"{engine.engine_id} {error}")
                if document["engines"]:
                    self.wrong.append(f"{list(document['engines'])} are shown, and are no engines")
            self.counts["looks"] += 1

    def error(self, engine: Engine, entry: Any, began: float, ended: float) -> str | None:
        """What is wrong with an engine's entry, if anything."""
        margin_s = MARGIN_S + self.waited_s + ended - began
        said = [one for one in engine.said if one[0] > self.ready_at]
        before = [one for one in said if one[0] < began - margin_s]
        if not before:
            return None  # this gateway has not heard it: captures may pass for it, and SECURITY.md says so
        last_at, last = before[-1]
        if engine.gone_at > last_at:
            if engine.gone_at < said[-1][0] or engine.gone_at > began - margin_s:
                return None  # just now, or it is coming back
            self.counts["looks at gone ones"] += not self.lives
            return "is shown, and said farewell" if entry is not None and not self.lives else None
        silent_s = began - said[-1][0]
        heard_s = min(silent_s, began - engine.released_at)  # if what was released was of an earlier boot
        if silent_s > THRESHOLD_S - margin_s:
            if self.lives:
                return None  # of its earlier boots, which this gateway never heard, captures may pass: likewise
            self.counts["looks at silent ones"] += 1
            if heard_s > EXPIRE_S + 1.0 + margin_s:
                return "is shown, and is silent" if entry is not None else None
            if silent_s > EXPIRE_S - margin_s:
                return None
        if entry is None:
            return "is missing"
        if heard_s > THRESHOLD_S + margin_s and entry["status"] != "stale":
            return f"is {entry['status']} after {heard_s:.2f} s of silence"
        if silent_s < THRESHOLD_S - margin_s and entry["status"] != "live":
            return f"is {entry['status']}, and spoke {silent_s:.2f} s ago"
        shown = entry["pending_tokens_total"]
        if not last <= shown <= engine.number:
            return f"is shown as of {shown}, and said {last} to {engine.number}"
        if entry["source"] != f"127.0.0.1:{self.ours.getsockname()[1]}":
            return f"is shown as said by {entry['source']}"
        shown_at = next((at for at, number in said if number == shown), ended)
        if entry["age_ms"] / 1000 > ended - last_at + margin_s:
            return f"is shown {entry['age_ms']} ms old, and spoke {ended - last_at:.3f} s ago"
        if abs(entry["state_age_ms"] / 1000 - (ended - shown_at)) > margin_s:
            return f"is shown as it was {entry['state_age_ms']} ms ago, and said so {ended - shown_at:.3f} s ago"
        return None

    # -- what is found in the log

    def look_through_the_log(self) -> None:
        """Nothing that was let through is missing, and nothing of the attacker's own is there but what is said."""
        ours = f"127.0.0.1:{self.ours.getsockname()[1]}"
        logged: set[tuple[str, int]] = set()
        heard: set[str] = set()  # engines and boots, by this gateway
        for line in (self.folder / "states.jsonl").read_text().splitlines():
            document = json.loads(line)
            if document.get("event") == "gateway_started":
                heard = set()
            state = document.get("state")
            if state is None:
                continue
            number = state["boot"], state["seq"]
            if document["source"] == ours:
                heard |= {state["engine_id"], state["boot"]}
                if number in logged:
                    self.counts["twice in the log, over a restart"] += 1
                logged.add(number)
            elif number not in self.delivered:
                self.counts["held back, taken as late"] += 1
            elif state["engine_id"] not in heard:
                self.counts["captures before an engine was heard"] += 1
            elif state["boot"] not in heard:
                self.counts["captures of boots that this gateway never heard"] += 1
            else:
                self.wrong.append(f"{state['engine_id']} {number} was taken again")
        for number, at in self.delivered.items():
            is_clear = any(began + 0.1 < at < ended - 0.1 for began, ended in self.lives)
            if is_clear and number not in logged:
                self.wrong.append(f"{number} was let through, and is not in the log")

    def run(self) -> None:
        """All of it."""
        self.write_keys()
        running = self.start_gateway()
        threads = [threading.Thread(target=one, daemon=True) for one in (self.speak, self.attack, self.look)]
        for thread in threads:
            thread.start()
        began = time.monotonic()
        try:
            for part, do in ((0.2, "keys"), (0.5, "restart"), (0.6, "right keys"), (0.75, "restart"), (1.0, "")):
                self.ended.wait(max(0.0, began + part * self.seconds - time.monotonic()))
                if do == "restart":
                    self.write_keys()
                    self.stop_gateway(running)
                    running = self.start_gateway()
                elif do:
                    self.write_keys("fleet of the line\n" if do == "keys" else "")
                    running.signal(signal.SIGHUP)
                    if do == "keys":
                        running.wait_for_line("the keys stay as they were")
            reasons = {name: count for name, count in running.stats()["signature_reasons"].items() if count}
        finally:
            self.ended.set()
            for thread in threads:
                thread.join(60)
            with contextlib.suppress(Exception):
                self.stop_gateway(running)
        self.look_through_the_log()
        self.counts["withheld to the end"] = len(self.withheld)
        print(", ".join(f"{count} {name}" for name, count in sorted(self.counts.items())))
        print(f"rejected by the last of three gateways: {reasons}")


def main() -> int:
    """Run it, and say what was wrong."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seconds", type=float, default=60.0)
    given = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        siege = Siege(Path(folder), given.seconds)
        siege.run()
    for line in siege.wrong[:10]:
        print(line)
    print(f"{given.seconds:.0f} s: {siege.counts['looks']} looks at {ENGINES} engines, {len(siege.wrong)} wrong")
    return 1 if siege.wrong or siege.counts["looks"] < 5 * given.seconds else 0


if __name__ == "__main__":
    sys.exit(main())
