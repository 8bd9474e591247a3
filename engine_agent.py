#!/usr/bin/env python3
"""The agent for engines as they come: it says to the state gateway what an engine does, and only what is proven.

One file, standard library only. It runs inside vLLM as a plugin (group `vllm.stat_logger_plugins`), as a sidecar beside
any engine that it knows (`--engine URL`), or without an engine (`--simulate`, `--replay`). Whatever happens to it, the
engine goes on.
"""

from __future__ import annotations

import hmac
import json
import math
import secrets
from collections.abc import Mapping
from dataclasses import dataclass
from typing import NamedTuple

VERSION = "1.0"
AGENT = f"elrar {VERSION}"

# What an engine is up to, as the gateway's contract has it.
STARTING = "starting"  # it does not answer yet
SERVING = "serving"
DRAINING = "draining"  # it takes no new requests
SLEEPING = "sleeping"
STUCK = "stuck"  # the agent sees no proof that the engine moves
GONE = "gone"  # a farewell
PHASES = (STARTING, SERVING, DRAINING, SLEEPING, STUCK, GONE)

LATENCY_OPTIMIZED = "latency_optimized"
BALANCED = "balanced"
THROUGHPUT_OPTIMIZED = "throughput_optimized"


# ---------------------------------------------------------------------------------------------------------------------
# Load and datagram
# ---------------------------------------------------------------------------------------------------------------------


class Load(NamedTuple):
    """What an engine says of its load; the defaults say that nothing is known."""

    latency_pred_ms: float = 0.0
    scheduling_mode: str = BALANCED
    pending_tokens_total: int = 0
    kv_cache_free_blocks: int = -1  # -1 = unknown
    kv_cache_total_blocks: int = -1
    engine_capacity: float = 0.0  # tokens/s, 0 = unknown
    num_requests_running: int | None = None  # None = unknown
    num_requests_waiting: int | None = None


UNKNOWN_LOAD = Load()  # as a datagram, the placeholders of a heartbeat


@dataclass(frozen=True)
class Key:
    """A key that signs datagrams."""

    name: str
    secret: bytes

    def sign(self, datagram: bytes) -> bytes:
        """The datagram with its signature as the last member."""
        text = datagram[:-1]
        code = hmac.digest(self.secret, text, "sha256")[:16].hex()
        return b'%b, "sig": "%b:%b"}' % (text, self.name.encode(), code.encode())


class DatagramWriter:
    """Writes the datagrams of one engine_id: one object for each, one `boot` for each life of the engine.

    The order and spelling never change, for the gateway's fast way recognises datagrams by them. It is what
    `json.dumps` writes by default (`", "` and `": "`, ASCII only):

        {"engine_id": S, "timestamp_ms": N, "latency_pred_ms": F, "scheduling_mode": S, "pending_tokens_total": N,
         "kv_cache_free_blocks": N, "kv_cache_total_blocks": N, "engine_capacity": F,
         "boot": "16 lower-case hex digits", "seq": N, "phase": S,
         "model": S, "num_requests_running": N, "num_requests_waiting": N,
         [then "dp_rank": N,] [then "role": S,] "engine": S, "agent": S[, then labels, each NAME: S]
         [, "sig": "KEY:32 lower-case hex digits"]}

    (on one line). N is a whole number of at most 15 digits, -1 only for blocks; F always has a point, at most 12 digits
    before and at most 3 behind it, and no exponent; S is a string. `model`, `num_requests_running` and
    `num_requests_waiting` are null while they are unknown, the last two never so where `phase` is `serving`.
    `dp_rank` is there where data-parallel ranks are told apart, `role` and labels where they are configured.
    `seq` begins with 1.
    """

    def __init__(
        self,
        engine_id: str,
        *,
        model: str | None = None,
        engine: str = "unknown",
        dp_rank: int | None = None,
        labels: Mapping[str, str] | None = None,
        key: Key | None = None,
    ) -> None:
        self.engine_id = engine_id
        self.key = key
        self._labels = dict(labels or {})
        self._dp_rank = dp_rank
        self._head = f'{{"engine_id": {json.dumps(engine_id)}, "timestamp_ms": '
        self.describe(model, engine)
        self.new_life()

    def describe(self, model: str | None, engine: str) -> None:
        """Say which model and engine it is from now on."""
        labels = dict(self._labels)
        model = labels.pop("model", model)
        role = labels.pop("role", None)
        self._model = json.dumps(model)
        tail: dict[str, object] = {}
        if self._dp_rank is not None:
            tail["dp_rank"] = self._dp_rank
        if role is not None:
            tail["role"] = role
        tail.update(engine=engine, agent=AGENT, **labels)
        self._tail = ", " + json.dumps(tail)[1:]

    def new_life(self) -> None:
        """Begin a new `boot`: the engine started anew."""
        self.boot = secrets.token_hex(8)
        self.seq = 0  # of the last datagram
        self._boot = f', "boot": "{self.boot}", "seq": '

    def write(self, phase: str, timestamp_ms: int, load: Load) -> bytes:
        """The next datagram: it takes the next `seq`."""
        self.seq += 1
        latency, mode, pending, free, total, capacity, running, waiting = load
        text = (
            f'{self._head}{_whole(timestamp_ms)}, "latency_pred_ms": {_decimal(latency)}, '
            f'"scheduling_mode": "{mode}", "pending_tokens_total": {_whole(pending)}, '
            f'"kv_cache_free_blocks": {_whole(free, -1)}, "kv_cache_total_blocks": {_whole(total, -1)}, '
            f'"engine_capacity": {_decimal(capacity)}{self._boot}{self.seq}, "phase": "{phase}", '
            f'"model": {self._model}, "num_requests_running": {_whole_or_null(running)}, '
            f'"num_requests_waiting": {_whole_or_null(waiting)}{self._tail}'
        )
        datagram = text.encode("ascii")
        return datagram if self.key is None else self.key.sign(datagram)


def _whole(number: int, least: int = 0) -> int:
    return max(least, min(int(number), 999_999_999_999_999))


def _whole_or_null(number: int | None) -> int | str:
    return "null" if number is None else _whole(number)


def _decimal(number: float) -> float:
    """A number that repr writes with a point and without an exponent: 3 decimals at most."""
    number = float(number)
    return round(min(number, 999_999_999_999.0), 3) if 0.0 < number < math.inf else 0.0
