"""With keys, the table says the truth, whoever listens in and sends; from the socket on, with clocks moved by hand."""

from __future__ import annotations

import hmac
import json
import random
import re
import secrets
import signal
import socket
import subprocess
import sys
import time
import unittest
from collections import Counter
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, cast

from datagram_signature import SIGNATURE_REASONS
from engine_agent import DatagramWriter, Key, Load
from signed_intake import SignedIntake
from signing_keys import IdPattern, SigningKey
from sockets import open_udp_sockets
from state_log import StateLog
from state_store import StateStore
from tests.harness import (
    DEADLINE_S,
    TOP,
    Daemon,
    FakeClock,
    FolderCase,
    clean_environment,
    daemon,
    datagram,
    gateway_command,
    match_canonical,
    wait_until,
)
from udp_listener import UdpListener

HONEST = Key("fleet", b"a key of the honest" * 2)
STOLEN = Key("stolen", b"a key that speaks for evil-* only")
THEIRS = Key("fleet", b"a key of the attacker's own, of the same name")


def keys() -> dict[bytes, SigningKey]:
    return {
        b"fleet": SigningKey(b"fleet", HONEST.secret, None),
        b"stolen": SigningKey(b"stolen", STOLEN.secret, IdPattern("evil-*")),
    }


class Lines:
    """A log that keeps what it is given."""

    def __init__(self) -> None:
        self.lines: list[bytes] = []

    def append(self, received_s: float, texts: Sequence[bytes], sources: Sequence[bytes]) -> None:
        assert len(texts) == len(sources)
        self.lines += texts


class Gateway:
    """Listener, store and log of a gateway, on loopback, with clocks that are moved by hand."""

    def __init__(self, clock: FakeClock, wall: FakeClock, *, max_engines: int = 50, with_keys: bool = True) -> None:
        self.clock = clock
        self.log = Lines()
        self.store = StateStore(2000, 6000, max_engines, 3, clock=clock)
        self.signed = SignedIntake(keys(), max_engines, self.store.freshness, clock=clock) if with_keys else None
        sockets = open_udp_sockets("127.0.0.1", 0, 1 << 22)
        self.listener = UdpListener(
            sockets, self.store, cast(StateLog, self.log), signed=self.signed, clock=clock, wall_clock=wall
        )
        self.port = sockets[0].getsockname()[1]
        self.sender = socket.socket(socket.AF_INET, socket.SOCK_DGRAM)
        self.sent = 0

    def send(self, *datagrams: bytes) -> dict[str, Any]:
        """Have them taken; returns what was counted because of them, without what was not."""
        before = self.flat()
        for at in range(0, len(datagrams), 100):
            for one in datagrams[at : at + 100]:
                self.sender.sendto(one, ("127.0.0.1", self.port))
            while self.listener.step(0):
                pass
        self.sent += len(datagrams)
        return {name: count - before[name] for name, count in self.flat().items() if count != before[name]}

    def flat(self) -> dict[str, int]:
        """Outcomes, with the reasons in the place of what is rejected for a reason."""
        counters = self.store.counters()
        names = ("accepted", "heartbeats", "duplicates", "out_of_order", "farewells", "rejected_capacity")
        return {
            **{name: counters[name] for name in names},
            **counters["invalid_reasons"],
            **counters["signature_reasons"],
        }

    def entry(self, engine_id: str) -> Any:
        view = self.store.view(engine_id)
        return view and (view.state.pending_tokens_total, view.age_ms, view.status)

    def close(self) -> None:
        self.listener.close()
        self.sender.close()


class SignedCase(unittest.TestCase):
    def setUp(self) -> None:
        self.clock, self.wall = FakeClock(), FakeClock(1_795_000_000.0)
        self.gateway = self.new_gateway()

    def new_gateway(self, **how: Any) -> Gateway:
        gateway = Gateway(self.clock, self.wall, **how)
        self.addCleanup(gateway.close)
        return gateway

    def move(self, seconds: float) -> None:
        self.clock.move(seconds)
        self.wall.move(seconds)

    def writer(self, engine_id: str = "e", key: Key | None = HONEST) -> DatagramWriter:
        return DatagramWriter(engine_id, model="m", key=key)

    def write(self, writer: DatagramWriter, pending: int = 1, off_s: float = 0, phase: str = "serving") -> bytes:
        load = Load(10.0, "balanced", pending, 50, 100, 1000.0, 1, 0)
        return writer.write(phase, int((self.wall.now + off_s) * 1000), load)


def signed(text: bytes, key: Key = HONEST) -> bytes:
    """Any object with a signature behind it."""
    return key.sign(text)


class Attacks(SignedCase):
    """Each family of attacks, one outcome: the table in SECURITY.md. Nothing of it is seen at /engines."""

    def outcomes(self) -> dict[str, set[str]]:
        """What becomes of each family of attacks, beside an engine that goes on sending."""
        send, found = self.gateway.send, {}
        writer = self.writer()
        earlier = self.writer()
        captured = [self.write(earlier, number) for number in (100, 101, 102)]
        send(*captured[:2])
        self.move(0.1)
        first, current = self.write(writer, 1), self.write(writer, 7)
        self.assertEqual(send(first, current), {"accepted": 2})
        log, shown = list(self.gateway.log.lines), self.gateway.entry("e")
        later = self.write(writer, 8)

        def attack(family: str, *datagrams: bytes) -> None:
            found[family] = set(send(*datagrams))
            self.assertEqual(self.gateway.entry("e"), shown, family)
            self.assertEqual(self.gateway.store.counts(), (1, 1), family)

        attack(
            "not signed", later.replace(later[later.index(b', "sig"') : -1], b""), datagram(engine_id="e"), b"", b"x"
        )
        attack("forged, with a key that is not known", self.write(self.writer(key=Key("x", b"x" * 16)), 999))
        attack("forged, with another key of a known name", self.write(self.writer(key=THEIRS), 999))
        attack("cut, at any byte", *(later[:end] for end in range(1, len(later))))
        attack("something behind it", later + b" ", later + b"\n", later + later, later[:-1] + b', "a": 1}')
        flipped = [bytearray(later) for _ in range(8 * len(later))]
        for bit, one in enumerate(flipped):
            one[bit // 8] ^= 1 << bit % 8
        attack("one bit changed, anywhere", *map(bytes, flipped))
        body = later[: later.index(b', "sig"')]
        attack("signed again with another key", THEIRS.sign(body + b"}"), THEIRS.sign(later))
        attack("another engine's id, by a key with a pattern", self.write(self.writer(key=STOLEN), 999))
        attack(
            "signed without `boot` and `seq`", signed(datagram(engine_id="e", timestamp_ms=int(self.wall.now * 1000)))
        )
        attack("a clock that is 301 s off", self.write(self.writer(), 999, 301), self.write(self.writer(), 999, -301))
        attack("a replay of the last one", current)
        attack("a replay of the same boot", first)
        attack("a replay of an earlier boot", *captured[:2])
        attack("one of a boot never heard, held back", self.write(self.writer(), 999, -0.2))
        high = json.loads(body + b"}")
        attack("a `seq` above 2^53", signed(json.dumps({**high, "seq": 2**53 + 1}).encode()))
        attack("a name twice, signed", signed(body + b', "seq": 9}'))
        self.assertEqual(self.gateway.log.lines, log, "nothing was written")
        found["one of an earlier boot that was held back"] = set(send(captured[2]))
        self.assertEqual(self.gateway.entry("e"), shown)
        self.assertEqual(send(later), {"accepted": 1})
        return found

    def test_each_has_its_outcome(self) -> None:
        text = (TOP / "SECURITY.md").read_text(encoding="utf-8")
        documented = {
            family: set(re.findall(r"`(\w+)`", outcomes))
            for family, outcomes in re.findall(r"^\| ([^|]*) \| counted as ([^|]*) \|", text, re.MULTILINE)
        }
        self.assertEqual(self.outcomes(), documented)

    def test_what_is_allowed(self) -> None:
        """Clocks that are 299 s off, a seq of 2^53, a key with a pattern for its own engines."""
        send = self.gateway.send
        for number, off_s in enumerate((-299, 299)):
            self.assertEqual(send(self.write(self.writer(f"off-{number}"), 1, off_s)), {"accepted": 1})
        self.assertEqual(send(self.write(self.writer("evil-1", STOLEN))), {"accepted": 1})
        writer = self.writer()
        writer.seq = 2**53 - 2
        self.assertEqual(send(self.write(writer), self.write(writer, 2)), {"accepted": 2})
        self.assertEqual(self.gateway.entry("e")[0], 2)
        self.assertEqual(send(self.write(self.writer(), 3, 0.001)), {"accepted": 1})  # and a restart after it

    def test_after_a_restart_of_the_gateway(self) -> None:
        """What the old one took is a replay again as soon as the new one has heard the engine."""
        writer = self.writer()
        captured = [self.write(writer, number) for number in range(10)]
        self.gateway.send(*captured)
        self.gateway = self.new_gateway()
        self.move(0.2)
        self.assertEqual(self.gateway.send(self.write(writer, 77)), {"accepted": 1})
        self.assertEqual(self.gateway.send(*captured), {"replayed": 10})
        self.assertEqual(self.gateway.entry("e")[0], 77)

    def test_a_replay_extends_no_life(self) -> None:
        """A silent engine is stale in time, and gone in time, however often its last words are said again."""
        writer = self.writer()
        captured = [self.write(writer, number) for number in range(5)]
        self.gateway.send(*captured)
        for step in range(70):
            self.gateway.send(*captured)
            self.gateway.store.advance_watermark(self.clock.now)
            self.gateway.store.sweep()
            age_ms = step * 100
            expected = None if age_ms > 6000 else (4, age_ms, "live" if age_ms <= 2000 else "stale")
            self.assertEqual(self.gateway.entry("e"), expected)
            self.move(0.1)
        self.assertEqual(self.gateway.send(self.write(writer, 5)), {"accepted": 1})

    def test_a_farewell_is_not_undone(self) -> None:
        writer = self.writer()
        captured = [self.write(writer, number) for number in range(5)]
        goodbyes = [self.write(writer, phase="gone") for _ in range(3)]
        self.gateway.send(*captured)
        self.assertEqual(self.gateway.send(*goodbyes), {"farewells": 3})
        self.assertEqual(self.gateway.send(*captured, *goodbyes), {"replayed": 7, "duplicates": 1})
        self.assertEqual(self.gateway.store.counts(), (0, 0))

    def test_a_farewell_is_not_forged_nor_replayed(self) -> None:
        earlier, writer = self.writer(), self.writer()
        self.gateway.send(self.write(earlier))
        goodbye = self.write(earlier, phase="gone")
        self.gateway.send(goodbye)
        self.move(1)
        self.gateway.send(self.write(writer))
        self.gateway.send(goodbye, self.write(self.writer(key=THEIRS), phase="gone"), self.write(earlier, phase="gone"))
        self.assertEqual(self.gateway.store.counts(), (1, 1))

    def test_a_flood_of_boots_from_a_stolen_key(self) -> None:
        """It fills what may be remembered, and costs no engine that is known its place or its next state."""
        writer = self.writer("evil-twin", STOLEN)
        honest = self.writer()
        self.gateway.send(self.write(honest))
        outcomes: Counter[str] = Counter()
        for number in range(1000):
            writer = self.writer(f"evil-{number % 7}", STOLEN)
            outcomes.update(self.gateway.send(self.write(writer, 1, number / 1000)))
        self.assertEqual(outcomes, {"accepted": 7 * 16, "too_many_boots": 1000 - 7 * 16})
        self.assertEqual(self.gateway.send(self.write(honest, 2)), {"accepted": 1})

    def test_a_flood_of_engines_from_a_stolen_key(self) -> None:
        """What finds no place in the table is not remembered, so that honest restarts still are."""
        self.gateway = self.new_gateway(max_engines=50)
        self.gateway.send(self.write(self.writer()))
        flood = [self.write(self.writer(f"evil-{number}", STOLEN)) for number in range(500)]
        self.assertEqual(self.gateway.send(*flood), {"accepted": 49, "rejected_capacity": 451})
        self.assertEqual(self.gateway.send(self.write(self.writer(), 2, 0.001)), {"accepted": 1})

    def test_the_keys_are_changed(self) -> None:
        """What was signed with a key that is gone is refused from then on; what was taken stays remembered."""
        assert self.gateway.signed is not None
        writer = self.writer()
        first = self.write(writer)
        self.gateway.send(first, self.write(writer))
        self.gateway.signed.set_keys({b"new": SigningKey(b"new", HONEST.secret, None)})
        self.assertEqual(self.gateway.send(self.write(writer)), {"unknown_key": 1})
        writer.key = Key("new", HONEST.secret)
        self.assertEqual(
            self.gateway.send(self.write(writer), writer.key.sign(b'{"a": 1}')), {"accepted": 1, "missing_field": 1}
        )
        self.gateway.signed.set_keys(keys())
        self.assertEqual(self.gateway.send(first), {"replayed": 1})


class AsItCame(SignedCase):
    """What is taken is in the log byte for byte, so that its signature can be checked later."""

    def test_the_log(self) -> None:
        writer = self.writer()
        canonical = self.write(writer)
        fields = {**json.loads(canonical), "seq": 2, "label": "ä", "nested": {"a": [1]}}
        del fields["sig"]
        loose = signed(("  " + json.dumps(fields, ensure_ascii=False, separators=(" ,", ":  "))).encode())
        self.assertIsNotNone(match_canonical(canonical))
        self.assertIsNone(match_canonical(loose))
        self.assertEqual(self.gateway.send(canonical, loose), {"accepted": 2})
        self.assertEqual(self.gateway.log.lines, [canonical, loose])
        for line in self.gateway.log.lines:
            body, _, code = line.rpartition(b', "sig": "fleet:')
            self.assertEqual(hmac.digest(HONEST.secret, body, "sha256")[:16].hex().encode() + b'"}', code)

    def test_what_is_late_is_written_too(self) -> None:
        earlier, writer = self.writer(), self.writer()
        self.gateway.send(self.write(earlier))
        self.move(0.1)
        self.gateway.send(self.write(writer))
        late = self.write(earlier, 5)
        self.assertEqual(self.gateway.send(late, self.write(writer, 6)), {"accepted": 1, "out_of_order": 1})
        self.assertIn(late, self.gateway.log.lines)
        self.assertEqual(self.gateway.entry("e")[0], 6)

    def test_without_keys_a_signature_is_no_matter(self) -> None:
        """So that agents may sign before the gateway asks for it; the fast way takes them."""
        self.gateway = self.new_gateway(with_keys=False)
        canonical = self.write(self.writer())
        self.assertIsNotNone(match_canonical(canonical))
        self.assertEqual(self.gateway.send(canonical, self.write(self.writer("f", THEIRS))), {"accepted": 2})


class Siege(SignedCase):
    """60 s of 1,000 hostile datagrams a second beside honest engines that restart, and two restarts of the gateway.

    The attacker sees every datagram and holds a key for `evil-*`. At every look the table is what the engines said.
    """

    def test_the_table_is_the_truth(self) -> None:
        chance = random.Random(16)
        engines = {f"http://10.0.0.{number}:8000": 0 for number in range(20)}
        writers = {engine_id: self.writer(engine_id) for engine_id in engines}
        seen: list[bytes] = [self.write(self.writer("nobody", THEIRS))]
        said: dict[str, tuple[int, float]] = {}  # by engine: what it said last, and when
        logged: list[bytes] = []
        honest_sent = hostile_sent = 0
        for step in range(600):
            self.move(0.1)
            if step in (200, 450):
                self.gateway.close()
                self.gateway = self.new_gateway()
                said.clear()
                logged.clear()
                honest_sent = hostile_sent = 0
            for engine_id in engines:
                if chance.random() < 0.01:
                    writers[engine_id].new_life()  # in the middle of its sending
            honest = []
            for engine_id, writer in writers.items():
                if step % 2 == 0 or chance.random() < 0.2:
                    engines[engine_id] += 1
                    honest.append(self.write(writer, engines[engine_id]))
                    said[engine_id] = (engines[engine_id], self.clock.now)
            self.assertEqual(self.gateway.send(*honest), {"accepted": len(honest)} if honest else {})
            logged += honest
            seen += honest
            hostile = [self.hostile(chance, seen) for _ in range(100)]
            counted = self.gateway.send(*hostile)
            self.assertLessEqual(counted.keys(), {*SIGNATURE_REASONS, "duplicates"})
            honest_sent, hostile_sent = honest_sent + len(honest), hostile_sent + len(hostile)
            for engine_id, (pending, at) in said.items():
                expected = (pending, round((self.clock.now - at) * 1000), "live")
                self.assertEqual(self.gateway.entry(engine_id), expected)
            self.assertEqual(self.gateway.store.counts()[1], len(said))
        counters = self.gateway.store.counters()
        self.assertEqual(counters["total_received"], honest_sent + hostile_sent)
        self.assertEqual(counters["valid_states"] - counters["duplicates"], honest_sent)
        self.assertEqual(counters["rejected_signature"], sum(counters["signature_reasons"].values()))
        self.assertEqual(self.gateway.log.lines, logged)

    def hostile(self, chance: random.Random, seen: list[bytes]) -> bytes:
        """One datagram of the attacker, who has seen these."""
        victim = seen[-chance.randrange(1, min(len(seen), 4000) + 1)]
        engine_id = json.loads(victim)["engine_id"]
        ways: list[Callable[[], bytes]] = [
            lambda: victim,
            lambda: victim,
            lambda: seen[-1],
            lambda: victim[: chance.randrange(len(victim))],
            lambda: self.flip(victim, chance),
            lambda: victim[:-1] + b', "pending_tokens_total": 0}',
            lambda: victim + seen[-1],
            lambda: THEIRS.sign(victim[: victim.index(b', "sig"')] + b"}"),
            lambda: STOLEN.sign(victim[: victim.index(b', "sig"')] + b"}"),
            lambda: self.write(self.writer(engine_id, THEIRS), 999_999),
            lambda: self.write(self.writer(engine_id, STOLEN), 999_999),
            lambda: self.write(self.writer(engine_id, None), 999_999),
            lambda: self.write(self.writer(f"evil-{secrets.token_hex(4)}", STOLEN), 1, chance.choice((-400, 400))),
            lambda: self.write(self.writer(engine_id, THEIRS), phase="gone"),
            lambda: chance.randbytes(chance.randrange(400)),
        ]
        return chance.choice(ways)()

    @staticmethod
    def flip(victim: bytes, chance: random.Random) -> bytes:
        changed = bytearray(victim)
        changed[chance.randrange(len(changed))] ^= 1 << chance.randrange(8)
        return bytes(changed)


class Daemons(FolderCase):
    """The daemon itself, its files, and the agent, as an operator has them."""

    def setUp(self) -> None:
        super().setUp()
        self.path = self.folder / "keys"
        self.line = subprocess.run(
            [sys.executable, str(TOP / "engine_agent.py"), "--new-key", "fleet"],
            capture_output=True,
            text=True,
            timeout=DEADLINE_S,
            check=True,
        ).stdout
        self.secret = self.line.split()[1]
        self.write(self.line)

    def write(self, text: str, path: Path | None = None) -> None:
        path = path or self.path
        path.write_text(text)
        path.chmod(0o600)

    def datagram(self, engine_id: str, key: Key) -> bytes:
        load = Load(10.0, "balanced", 1, 50, 100, 1000.0, 1, 0)
        return DatagramWriter(engine_id, model="m", key=key).write("serving", int(time.time() * 1000), load)

    def test_what_the_agent_sends_is_taken(self) -> None:
        """One line that it printed, on both sides; nothing else is taken, and the key is shown nowhere."""
        with daemon(self.folder, KEYS_FILE=self.path, LOG_FILE="states.jsonl") as running:
            agent = subprocess.run(
                [
                    *(sys.executable, str(TOP / "engine_agent.py"), "--simulate", "3", "--seconds", "1"),
                    *("--gateway", f"127.0.0.1:{running.udp_port}", "--key-file", str(self.path)),
                ],
                capture_output=True,
                text=True,
                timeout=DEADLINE_S,
                check=True,
            )
            running.send(datagram(), self.datagram("e", Key("fleet", b"x" * 32)))
            stats = wait_until("both to be refused", lambda: (s := running.stats())["rejected_signature"] >= 2 and s)
            reasons = {name: count for name, count in stats["signature_reasons"].items() if count}
            self.assertEqual(reasons, {"unsigned": 1, "bad_signature": 1})
            self.assertEqual(stats["rejected_samples"].keys(), reasons.keys())
            self.assertGreater(stats["valid_states"], 3)
            self.assertEqual(stats["valid_states"] + 2, stats["total_received"])
            page = running.ask("/metrics").body.decode()
            self.assertIn('elrar_state_gateway_datagrams_unsigned_total{reason="unsigned"} 1\n', page)
            self.assertEqual(running.stop(), 0)
            said = agent.stdout + agent.stderr + "".join(running.lines) + page + json.dumps(stats)
        log = self.folder / "states.jsonl"
        self.assertNotIn(self.secret[:8], said + log.read_text())
        for state in re.findall(r'"state": (\{.*"sig": "[^"]*"\}), "source"', log.read_text()):
            body, _, code = state.encode().rpartition(b', "sig": "fleet:')
            self.assertEqual(hmac.digest(bytes.fromhex(self.secret), body, "sha256")[:16].hex(), code[:-2].decode())

    def test_sighup(self) -> None:
        """A file that cannot be used leaves the keys as they are, and is said; one that can takes their place."""
        old, new = Key("fleet", bytes.fromhex(self.secret)), Key("new", b"n" * 16)
        with daemon(self.folder, KEYS_FILE=self.path) as running:
            self.write(f"{self.line}fleet {self.secret}\n")
            running.signal(signal.SIGHUP)
            self.assertIn("line 2: its key id is that of line 1", running.wait_for_line("the keys stay as they were"))
            running.send(self.datagram("first", old))
            running.wait_received(1)
            self.assertEqual(running.ask("/engines/first").status, 200)
            self.write(f"new {new.secret.hex()} by-*\n")
            running.signal(signal.SIGHUP)

            def is_taken() -> bool:
                running.send(self.datagram("by-new", new))
                return running.ask("/engines/by-new").status == 200

            wait_until("the new key to be known", is_taken)
            before = running.stats()
            running.send(self.datagram("third", old), self.datagram("third", new))
            stats = running.wait_received(before["total_received"] + 2)
            for reason in ("unknown_key", "not_its_engine"):
                self.assertGreater(stats["signature_reasons"][reason], 0)
            self.assertEqual(running.ask("/engines/third").status, 404)
            self.assertEqual(running.stop(), 0)
            self.assertNotIn(self.secret[:8], "".join(running.lines))

    def test_wrong_files_are_wrong_settings(self) -> None:
        """All at once, exit 2, and no key in what is said."""
        tokens = self.folder / "tokens"
        self.write(self.secret)
        self.write("short", tokens)
        running = Daemon(self.folder, {"KEYS_FILE": self.path, "HTTP_TOKENS_FILE": tokens})
        self.addCleanup(running.close)
        self.assertEqual(running.wait_exit(), 2)
        said = "".join(running.lines)
        self.assertRegex(said, "HTTP_TOKENS_FILE=.* line 1: ")
        self.assertRegex(said, "KEYS_FILE=.* line 1: ")
        self.assertNotIn(self.secret[:8], said)

    def test_check_config(self) -> None:
        """The path is shown, and not the key; a file for everybody's eyes is warned about."""
        self.path.chmod(0o644)
        done = subprocess.run(
            gateway_command("--check-config"),
            env=clean_environment(KEYS_FILE=self.path),
            capture_output=True,
            text=True,
            check=False,
        )
        self.assertEqual(done.returncode, 0)
        self.assertIn(f"VLLM_STATE_GATEWAY_KEYS_FILE={self.path}  # environment", done.stdout)
        self.assertIn("chmod o=", done.stdout + done.stderr)
        self.assertNotIn(self.secret[:8], done.stdout + done.stderr)


if __name__ == "__main__":
    unittest.main()
