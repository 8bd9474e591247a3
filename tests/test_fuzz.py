"""Mutated datagrams by the hundred thousand: each is a state that is exactly valid, or refused with one reason."""

from __future__ import annotations

import json
import math
import os
import random
import socket
import tempfile
import unittest
from pathlib import Path
from typing import Any

from engine_state import (
    BOOT,
    FIELD_NAMES,
    FIELDS_JSON,
    REASONS,
    SEQ,
    EngineState,
    InvalidDatagram,
    datagram_json,
    is_heartbeat,
    match_all_canonical,
    parse,
)
from sockets import open_udp_sockets
from state_log import StateLog
from state_record import decode_record, decode_state, encode_receipt, encode_record, same_state
from state_store import StateStore
from tests.harness import (
    CAPTURED,
    PLACEHOLDERS,
    datagram,
    fields,
    heartbeat,
    logged_states,
    match_canonical,
    parse_datagram,
)
from tests.test_engine_state import INVALID, VALID
from udp_listener import UdpListener

SEED = int(os.environ.get("STATE_GATEWAY_FUZZ_SEED", "20261122"))
GOOD = [one for one in (datagram(), heartbeat(), *VALID.values()) if len(one) <= 600]
ANY = [*VALID.values(), *(one for _, one in INVALID.values())]
SPLICES = (
    b'"', b"\\", b"\\u0000", b"\\ud800", b"\x00", b"\xff", b"{", b"}", b"[", b"]", b",", b":", b"null", b"true", b"NaN",
    b"-Infinity", b"1e999", b"-1", b"0.5", b"9" * 30, b"1E2", b" ", b"\n", b"\xef\xbb\xbf",
    "\u202e".encode(), b"engine_id", b"7",
)  # fmt: skip


def mutated(rng: random.Random) -> bytes:
    """A datagram that was something sensible, one to three mutations ago."""
    one = bytearray(rng.choice(GOOD if rng.random() < 0.95 else ANY))
    for _ in range(rng.choice((1, 1, 2, 3))):
        at = rng.randrange(len(one) + 1)
        kind = rng.randrange(6)
        if kind == 0:
            one[at:at] = rng.choice(SPLICES)
        elif kind == 1:
            del one[at : at + rng.randint(1, 8)]
        elif kind == 2 and at < len(one):
            one[at] ^= 1 << rng.randrange(8)
        elif kind == 3:
            one[at : at + rng.randint(0, 6)] = rng.choice(SPLICES)
        elif kind == 4:
            other = rng.choice(GOOD)
            one[at:] = other[rng.randrange(len(other) + 1) :]
        else:
            start = rng.randrange(len(one) + 1)
            one[at:at] = one[start : start + rng.randint(1, 40)]
    return bytes(one)


def is_integer(value: object, low: int) -> bool:
    return type(value) is int and low <= value <= 2**53


def is_number(value: object) -> bool:
    return isinstance(value, (int, float)) and type(value) is not bool and math.isfinite(value) and value >= 0


def is_text(value: object, longest: int) -> bool:
    return type(value) is str and 0 < len(value) <= longest and value.isprintable()


def is_exactly_valid(state: EngineState) -> bool:
    """The contract's section 1, written once more and without haste."""
    return (
        is_text(state.engine_id, 256)
        and state.engine_id == state.engine_id.strip()
        and is_integer(state.timestamp_ms, 0)
        and is_number(state.latency_pred_ms)
        and is_text(state.scheduling_mode, 64)
        and is_integer(state.pending_tokens_total, 0)
        and is_integer(state.kv_cache_free_blocks, -1)
        and is_integer(state.kv_cache_total_blocks, -1)
        and is_number(state.engine_capacity)
    )


def further(rng: random.Random) -> dict[str, Any]:
    """What an agent says besides the fields, mostly in its own way."""
    said: dict[str, Any] = {
        "boot": rng.choice(("a1b2c3d4e5f60718", "0" * 64)),
        "seq": rng.choice((0, 1, rng.randrange(10**9))),
        "phase": rng.choice(("serving", "draining", "gone", "x_y")),
        "model": rng.choice((None, "meta-llama/Llama-3.1-8B-Instruct", "a b", "m" * 256)),
        "num_requests_running": rng.choice((None, 0, 7, 256)),
        "num_requests_waiting": rng.choice((None, 0, 7, 999_999_999)),
        **rng.choice(({}, {"dp_rank": 0}, {"role": "prefill"}, {"dp_rank": 12, "role": "both"})),
        "engine": "vllm 0.33.0",
        "agent": "engine_agent 1.0",
    }
    if rng.random() < 0.2:
        said[rng.choice((*said, "label", "Label", "sig"))] = rng.choice(
            (1.5, -1, "", "\u00e9", '"', True, None, [], 2**60)
        )
    return said


def generated(rng: random.Random) -> bytes:
    """A state with values of every size, written as an agent would, and sometimes with one byte changed."""
    odd = rng.random() < 0.2
    digits = rng.choice((1, 15, 16, 18)) if odd else rng.randint(1, 14)
    number = rng.choice((rng.random() * 10**digits, float(rng.randrange(10**digits)), 59768.27))
    if odd:
        number = rng.choice((rng.random() / 10**digits, 0.0, 1e22))
    state = fields(
        engine_id="http://172.17.0.3:8000",
        timestamp_ms=rng.randrange(10**digits),
        latency_pred_ms=number,
        scheduling_mode=rng.choice(("latency_optimized", "throughput_optimized", "balanced")),
        pending_tokens_total=rng.choice((rng.randrange(10**digits), 0)),
        kv_cache_free_blocks=rng.choice((rng.randrange(10**digits), 0, -1)),
        kv_cache_total_blocks=rng.choice((rng.randrange(10**digits), 0, -1)),
        engine_capacity=rng.choice((number, 59768.2749641796)),
    )
    if rng.random() < 0.1:
        state.update(PLACEHOLDERS)
    if rng.random() < 0.4:
        state.update(further(rng))
    if odd:
        field, values = rng.choice(
            (
                ("engine_id", ("a b", "e", "x" * rng.randint(250, 260), '"', "\\", "~", "é", " ")),
                ("timestamp_ms", (2**53 - 1, 2**53, 2**53 + 1, 0, -1, 10**15)),
                ("scheduling_mode", ("other", "balance", "balanced ")),
                ("pending_tokens_total", (-1, 1.0, 2**53, 2**53 + 1)),
                ("kv_cache_free_blocks", (-2, 2**53 + 1, True)),
                ("engine_capacity", (0.0, 0, 7, -0.0, 0.5)),
            )
        )
        state[field] = rng.choice(values)
    one = bytearray(json.dumps(state, ensure_ascii=rng.random() < 0.5).encode())
    if rng.random() < 0.3:
        one[rng.randrange(len(one))] = rng.choice(b'0123456789.-+eE"{}:, \\_aA\x00\xff')
    return bytes(one)


class Fuzz(unittest.TestCase):
    """Seeded, so that what is found once is found again."""

    def test_what_is_canonical_is_what_the_parser_says(self) -> None:
        rng = random.Random(SEED + 2)
        recognised = numbered = 0
        for first in range(0, 200_000, 100):
            batch = [generated(rng) if number % 2 else mutated(rng) for number in range(rng.randint(1, 200))]
            for number, (one, usual) in enumerate(zip(batch, match_all_canonical(batch), strict=True), first):
                if usual is None:
                    continue
                recognised += 1
                try:
                    whole = parse(one)
                except InvalidDatagram as error:
                    self.fail(f"datagram {number} is recognised, and {error}: {one!r}")
                state, parsed = whole.state, whole.state.texts()
                numbered += usual[SEQ] is not None
                if usual[BOOT:] != whole.further or whole.passed_over:
                    self.fail(f"datagram {number} is recognised as {usual} and parsed as {whole}: {one!r}")
                held = encode_record(usual[1:BOOT] + encode_receipt(1.795e9))
                held_parsed = encode_record(parsed[1:] + encode_receipt(1.8e9))
                if (
                    datagram_json(usual) != one
                    or {name: json.loads(one)[name] for name in FIELD_NAMES} != state.as_dict()
                ):
                    self.fail(f"datagram {number} is logged as {usual} and parsed as {state}: {one!r}")
                if usual[:2] != parsed[:2] or is_heartbeat(usual) is not is_heartbeat(parsed):
                    self.fail(f"datagram {number}: {usual} {parsed} from {one!r}")
                if decode_state(state.engine_id, held) != state or not same_state(held, held_parsed):
                    self.fail(f"datagram {number} is held as {held!r} and as {held_parsed!r}")
        self.assertGreater(recognised, 30_000)
        self.assertGreater(numbered, 5_000)

    @unittest.skipUnless(CAPTURED.exists(), "the captured states are not on this machine")
    def test_a_real_engine_s_states_are_canonical(self) -> None:
        for line in CAPTURED.read_text().splitlines():
            self.assertIsNotNone(match_canonical(json.dumps(json.loads(line)["state"]).encode()))

    def test_the_parser(self) -> None:
        rng = random.Random(SEED)
        taken = refused = 0
        for number in range(100_000):
            one = mutated(rng)
            try:
                state = parse_datagram(one)
            except InvalidDatagram as error:
                refused += 1
                if error.reason not in REASONS:
                    self.fail(f"reason {error.reason} for {one!r}")
                continue
            except Exception as error:
                self.fail(f"datagram {number}: {error!r} for {one!r}")
            taken += 1
            fields = state.texts()
            if not is_exactly_valid(state) or json.loads(b"{%b}" % (FIELDS_JSON % fields)) != state.as_dict():
                self.fail(f"datagram {number}: {state} from {one!r}")
            held = encode_record(fields[1:] + encode_receipt(1.795e9))
            if (
                repr(decode_state(state.engine_id, held)) != repr(state)
                or tuple(decode_record(held)[:-1]) != fields[1:]
            ):
                self.fail(f"datagram {number}: {state} is held as {held!r}")
        self.assertGreater(taken, 4_000)
        self.assertGreater(refused, 50_000)

    def take_all(self, listener: UdpListener, log: StateLog) -> None:
        while listener.step(0):
            pass
        listener.flush_notices()
        log.step()

    def test_the_whole_way_through_the_socket(self) -> None:
        rng = random.Random(SEED + 1)
        with tempfile.TemporaryDirectory() as folder:
            path = Path(folder) / "states.jsonl"
            store, log = StateStore(2000, 6000, 30, 10), StateLog(str(path), 0, 1)
            log.open("gateway_started", "network mode: unicast, fuzz")
            sockets = open_udp_sockets("127.0.0.1", 0, 8 << 20)
            listener = UdpListener(sockets, store, log)
            address = ("127.0.0.1", sockets[0].getsockname()[1])
            with (
                socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as sock,
                self.assertLogs("elrar.listener", "WARNING") as logged,
            ):
                for number in range(5_000):
                    sock.sendto(mutated(rng), address)
                    if number % 50 == 0:
                        sock.sendto(datagram(engine_id="honest", timestamp_ms=number), address)
                        self.take_all(listener, log)
                        honest = store.view("honest")
                        assert honest is not None
                        self.assertEqual(honest.state.timestamp_ms, number)
                self.take_all(listener, log)
            counters = store.counters()
            listener.close()
            log.end("gateway_stopped", "stopped")
            self.assertEqual(counters["total_received"], 5_100)
            rejected = counters["invalid_states"] + counters["rejected_capacity"] + counters["rejected_source"]
            self.assertEqual(counters["total_received"], counters["valid_states"] + rejected)
            self.assertEqual(len(logged_states(path)), counters["valid_states"] - counters["duplicates"])
            self.assertLessEqual(len(logged.records), 2, "a line a minute and kind of trouble")


if __name__ == "__main__":
    unittest.main()
