#!/usr/bin/env python3
"""The agent for engines as they come: it says to the state gateway what an engine does, and only what is proven.

One file, standard library only. It runs inside vLLM as a plugin (group `vllm.stat_logger_plugins`), as a sidecar beside
any engine that it knows (`--engine URL`), or without an engine (`--simulate`, `--replay`). Whatever happens to it, the
engine goes on.

The file in its order, which is that of the data turned round: the datagram; settings; the sender; what is seen of an
engine and what of it is proven (Prover, Meter); what is said and when (PhaseJudge, Reporter, Agent); a simulated fleet
and a log sent again; asking over HTTP; an adapter for each kind of engine; the sidecar and --check; the plugin; main().
"""

from __future__ import annotations

import argparse
import asyncio
import atexit
import contextlib
import errno
import glob
import gzip
import hmac
import importlib
import ipaddress
import itertools
import json
import logging
import math
import os
import queue
import random
import re
import secrets
import signal
import socket
import ssl
import struct
import sys
import threading
import time
import urllib.parse
import weakref
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import IO, Any, ClassVar, NamedTuple

VERSION = "2.0.0"
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
    `num_requests_waiting` are null while they are unknown, the last two never so if `phase` is `serving`.
    `dp_rank` is there if data-parallel ranks are told apart, `role` and labels if they are configured.
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


# ---------------------------------------------------------------------------------------------------------------------
# Settings
# ---------------------------------------------------------------------------------------------------------------------

PREFIXES = ("ELRAR_", "VLLM_ELRAR_")  # the first that is set counts
UNICAST = "unicast"
BROADCAST = "broadcast"
MERGED = "merged"
RANKS = "ranks"

# What Kubernetes injects as ELRAR_GATEWAY_PORT into every pod beside a Service named elrar-gateway.
_INJECTED = re.compile(r"(?:tcp|udp|sctp)://.*")


class SettingsError(ValueError):
    """Settings that cannot be used: `errors` has a line for each."""

    def __init__(self, errors: Sequence[str]) -> None:
        super().__init__("; ".join(errors))
        self.errors = list(errors)


class _Refused(ValueError):
    """A value that a setting does not take; its text, where there is any, says why."""


class Gateway(NamedTuple):
    """Where a gateway is: a name or an address, and its port."""

    host: str
    port: int | None  # None: the setting GATEWAY_PORT


@dataclass(frozen=True)
class Settings:
    """Every setting, checked; the fields are those of the table SETTINGS."""

    gateways: tuple[Gateway, ...]
    gateway_port: int
    network_mode: str
    broadcast_address: str
    engine_id: str | None
    engine_url: str
    push_interval_s: float
    engine_capacity: float | None  # tokens/s; None: measured
    data_parallel: str
    key: Key | None
    key_file: str | None
    labels: Mapping[str, str]
    engine_api_key: str | None
    engine_ca_file: str | None

    @property
    def stuck_after_s(self) -> float:
        """How long nothing needs to be proven until the engine counts as stuck."""
        return max(2 * self.push_interval_s, 1.0)


def _whole_number(low: int, high: int) -> Callable[[str], int]:
    def parse(text: str) -> int:
        if not re.fullmatch(r"[0-9]{1,9}", text) or not low <= int(text) <= high:
            raise _Refused
        return int(text)

    return parse


def _one_of(*words: str) -> Callable[[str], str]:
    def parse(text: str) -> str:
        if text.lower() not in words:
            raise _Refused
        return text.lower()

    return parse


_NAME = re.compile(r"[A-Za-z0-9_](?:[A-Za-z0-9_.-]{0,252})")


def _host(text: str) -> str:
    """A name or an address without brackets."""
    try:
        return str(ipaddress.ip_address(text.split("%")[0])) + text[len(text.split("%")[0]) :]
    except ValueError:
        # What looks like an IPv4 address and is none would be looked up for ever.
        if not _NAME.fullmatch(text) or re.fullmatch(r"[0-9.]+", text):
            raise _Refused from None
        return text


def _gateways(text: str) -> tuple[Gateway, ...]:
    return tuple(_gateway(part.strip()) for part in text.split(","))


def _gateway(text: str) -> Gateway:
    bracketed = re.fullmatch(r"\[([^\]]*)\](?::([0-9]{1,5}))?", text)
    if bracketed:
        host, port = bracketed.groups()
    elif text.count(":") == 1:
        host, port = text.split(":")
    else:
        host, port = text, None
    if port is not None and not (re.fullmatch(r"[0-9]{1,5}", port) and 0 < int(port) < 65536):
        raise _Refused
    return Gateway(_host(host), None if port is None else int(port))


def _ipv4(text: str) -> str:
    try:
        return str(ipaddress.IPv4Address(text))
    except ValueError:
        raise _Refused from None


def _engine_id(text: str) -> str:
    if len(text) > 250 or not text.isprintable() or text != text.strip():
        raise _Refused
    return text


def _url(text: str) -> str:
    try:
        parts = urllib.parse.urlsplit(text if "://" in text else f"http://{text}")
        port = parts.port
    except ValueError:
        raise _Refused from None
    if parts.scheme not in ("http", "https") or not parts.hostname or parts.query or parts.fragment or port == 0:
        raise _Refused
    if not text.isascii() or not text.isprintable() or " " in text or "@" in parts.netloc:
        raise _Refused
    _host(parts.hostname)
    return parts.geturl().rstrip("/")


def _capacity(text: str) -> float | None:
    if text.lower() == "measured":
        return None
    try:
        number = float(text)
    except ValueError:
        raise _Refused from None
    if not 0.0 <= number <= 1e12:  # false for NaN, too
        raise _Refused
    return number


def _key_file(text: str) -> Key:
    return read_key(text)


def read_key(path: str) -> Key:
    """The first key of a file: lines of `<key id> <hex digits>`, as the gateway's KEYS_FILE has them."""
    try:
        with open(path, encoding="utf-8") as file:
            lines = file.read(1_000_000).splitlines()
    except (OSError, ValueError) as error:
        raise _Refused(f"cannot be read: {getattr(error, 'strerror', None) or error}") from None
    for number, line in enumerate(lines, 1):
        if line.strip() and not line.startswith("#"):
            words = line.split()
            if len(words) < 2 or not re.fullmatch(r"[A-Za-z0-9_-]{1,32}", words[0]):
                raise _Refused(f"line {number} is not `<key id> <key>`")
            if not re.fullmatch(r"(?:[0-9A-Fa-f]{2}){16,64}", words[1]):
                raise _Refused(f"line {number}: the key is not an even number of hex digits from 32 to 128")
            return Key(words[0], bytes.fromhex(words[1]))
    raise _Refused("has no key")


# Names that the datagram has already.
_TAKEN = {
    "engine_id", "timestamp_ms", *Load._fields, "boot", "seq", "phase", "sig", "dp_rank", "engine", "agent",
}  # fmt: skip
_MOST_LABELS = 8
_MOST_LABEL_BYTES = 512  # the gateway keeps 1024 of all further fields, and model and engine are among them


def _labels(text: str) -> dict[str, str]:
    labels: dict[str, str] = {}
    for part in text.split(","):
        name, equals, value = part.strip().partition("=")
        if not equals or not re.fullmatch(r"[a-z][a-z0-9_]{0,63}", name) or name in _TAKEN or name in labels:
            raise _Refused(f"{part.strip()!r} is none" if name not in _TAKEN else f"the name {name} is taken")
        if not value.isprintable() or len(value) > 256:
            raise _Refused(f"the value of {name} is too long or not printable")
        if name == "role" and value not in ("prefill", "decode", "both"):
            raise _Refused("role is prefill, decode or both")
        labels[name] = value
    if len(labels) > _MOST_LABELS or len(json.dumps(labels)) > _MOST_LABEL_BYTES:
        raise _Refused(f"more than {_MOST_LABELS} labels or {_MOST_LABEL_BYTES} bytes")
    return labels


def _path(text: str) -> str:
    if "\0" in text or not os.path.isfile(text):
        raise _Refused("there is no such file")
    return text


def _secret(text: str) -> str:
    if not re.fullmatch(r"[!-~]{1,4096}", text):
        raise _Refused
    return text


class Setting(NamedTuple):
    """One setting: how it is named, what it accepts and what it means."""

    name: str  # without the prefix
    field: str  # of Settings
    default: str  # as documented; in parentheses if it is computed or nothing
    accepts: str
    meaning: str
    check: Callable[[str], Any]
    flag: str = ""
    secret: bool = False  # its value is not shown

    @property
    def option(self) -> str:
        """The flag that sets it."""
        return self.flag or "--" + self.name.lower().replace("_", "-")


SETTINGS: tuple[Setting, ...] = (
    Setting("GATEWAY_HOST", "gateways", "localhost",
            "names or addresses, comma-separated, each with an optional :port",
            "the gateways: every state goes to every address of every name", _gateways, "--gateway"),
    Setting("GATEWAY_PORT", "gateway_port", "9999",
            "a whole number from 1 to 65535", "the gateways' UDP port", _whole_number(1, 65535)),
    Setting("NETWORK_MODE", "network_mode", "unicast",
            "unicast or broadcast", "`unicast`, or `broadcast`", _one_of(UNICAST, BROADCAST)),
    Setting("BROADCAST_ADDRESS", "broadcast_address", "255.255.255.255",
            "an IPv4 address", "where one datagram goes in broadcast mode; another goes to 127.0.0.1", _ipv4),
    Setting("ENGINE_ID", "engine_id", "(http://<own address towards the gateway>:<the engine's port>)",
            "1 to 250 printable characters without space at either end", "what the router knows the engine by",
            _engine_id),
    Setting("ENGINE_URL", "engine_url", "http://127.0.0.1:8000",
            "http:// or https://, a host, an optional port and an optional path", "the sidecar's engine", _url,
            "--engine"),
    Setting("PUSH_INTERVAL", "push_interval_ms", "200",
            "a whole number of milliseconds from 20 to 2000", "ms between two states", _whole_number(20, 2000)),
    Setting("ENGINE_CAPACITY", "engine_capacity", "(measured)",
            "tokens/s, or `measured`",
            "tokens/s; measured is the highest rate of a second with requests waiting, 0 until then", _capacity),
    Setting("DATA_PARALLEL", "data_parallel", "merged",
            "merged or ranks", "`merged`: one engine_id a URL; `ranks`: one a rank, `#dp0` behind it",
            _one_of(MERGED, RANKS)),
    Setting("KEY_FILE", "key", "(none)",
            "the path of a file with a line `<key id> <32 to 128 hex digits>`",
            "signs every datagram with the first key of the file; read again when it changes", _key_file),
    Setting("LABELS", "labels", "(none)",
            "name=value, comma-separated; a name is 1 to 64 of a-z0-9_ that begin with a letter",
            "further fields, such as `model=...,role=prefill`", _labels),
    Setting("ENGINE_API_KEY", "engine_api_key", "(none)",
            "printable ASCII characters without space",
            "what the sidecar's engine asks for (`Authorization: Bearer`); as a flag, every user of the host sees it",
            _secret, secret=True),
    Setting("ENGINE_CA_FILE", "engine_ca_file", "(the system's)",
            "the path of a PEM file",
            "whose certificates the sidecar believes of an https engine; of one on the loopback, any is believed",
            _path),
)  # fmt: skip


def read_settings(environ: Mapping[str, str], flags: Mapping[str, str] | None = None) -> Settings:
    """The settings from flags (by the setting's name), then the environment; raises SettingsError with every error."""
    values: dict[str, Any] = {}
    errors: list[str] = []
    for setting in SETTINGS:
        source, text = _given(setting, environ, flags or {})
        if text is None:
            values[setting.field] = None if setting.default[0] == "(" else setting.check(setting.default)
            continue
        try:
            values[setting.field] = setting.check(text)
        except _Refused as refused:
            shown = "(hidden)" if setting.secret else repr(text)
            why = f" ({refused})" if str(refused) else ""
            errors.append(f"{source}={shown} cannot be used{why}: accepted is {setting.accepts}")
    if errors:
        raise SettingsError(errors)
    values["labels"] = values["labels"] or {}
    values["key_file"] = _given(SETTINGS[_KEY_FILE_ROW], environ, flags or {})[1]
    values["push_interval_s"] = values.pop("push_interval_ms") / 1000
    return Settings(**values)


_KEY_FILE_ROW = [setting.name for setting in SETTINGS].index("KEY_FILE")


def _given(setting: Setting, environ: Mapping[str, str], flags: Mapping[str, str]) -> tuple[str, str | None]:
    """Where a setting's text comes from, and the text; what is empty counts as not set."""
    if flags.get(setting.name) is not None:
        return setting.option, flags[setting.name]
    for prefix in PREFIXES:
        text = environ.get(prefix + setting.name, "")
        if text and not (setting.name == "GATEWAY_PORT" and _INJECTED.fullmatch(text)):
            return prefix + setting.name, text
    return "", None


def settings_help() -> str:
    """The table of settings for `--help`."""
    lines = [
        f"settings: from the environment with the prefix {PREFIXES[0]} (or {PREFIXES[1]}), or as flags, which win:"
    ]
    for setting in SETTINGS:
        lines.append(f"  {setting.option}, {PREFIXES[0]}{setting.name}  (default: {setting.default.strip('()')})")
        lines.append(f"      {setting.meaning.replace('`', '')}; accepted: {setting.accepts.replace('`', '')}")
    return "\n".join(lines)


def example_environment() -> str:
    """The text of config_examples/engines/engine-agent.env: every setting at its default.

    `python3 -c 'import engine_agent; print(engine_agent.example_environment(), end="")'` makes it anew.
    """
    lines = ["# Every setting of the engines' agent, at its default. If a variable has # before it, it is not set."]
    for setting in SETTINGS:
        meaning, accepts = setting.meaning.replace("`", ""), setting.accepts.replace("`", "")
        lines += ["", f"# {meaning}; accepted: {accepts}"]
        if setting.default[0] == "(":
            lines += [f"# default: {setting.default.strip('()')}", f"#{PREFIXES[0]}{setting.name}="]
        else:
            lines.append(f"{PREFIXES[0]}{setting.name}={setting.default}")
    return "\n".join(lines) + "\n"


# ---------------------------------------------------------------------------------------------------------------------
# What is said to the operator
# ---------------------------------------------------------------------------------------------------------------------

Say = Callable[[str], None]
Clock = Callable[[], float]  # seconds


def say_on_stderr(text: str) -> None:
    """Write one line to standard error."""
    with contextlib.suppress(OSError, ValueError):
        sys.stderr.write(f"engine_agent: {text}\n")
        sys.stderr.flush()


class Complaints:
    """Says a trouble when it begins, once a minute while it lasts, and when it is over. Safe in any thread."""

    def __init__(self, say: Say, clock: Callable[[], float] = time.monotonic) -> None:
        self._say = say
        self._clock = clock
        # Guards what follows; nothing is said under it. A signal's handler may come while its own thread holds it.
        self._lock = threading.RLock()
        self._said_at: dict[str, float] = {}
        self._count: dict[str, int] = {}

    def trouble(self, kind: str, text: str) -> None:
        """Something goes wrong; `kind` tells troubles apart."""
        now = self._clock()
        with self._lock:
            self._count[kind] = count = self._count.get(kind, 0) + 1
            if now - self._said_at.get(kind, -math.inf) < 60.0:
                return
            self._said_at[kind] = now
        self._say(text if count == 1 else f"{text} ({count} times)")

    def over(self, kind: str, text: str) -> None:
        """It works again; nothing is said if it did not fail."""
        if kind not in self._count:
            return
        with self._lock:
            known = self._count.pop(kind, None)
            self._said_at.pop(kind, None)
        if known:
            self._say(text)


# ---------------------------------------------------------------------------------------------------------------------
# Sender
# ---------------------------------------------------------------------------------------------------------------------

LOOK_UP_EVERY_S = 5.0
MOST_ADDRESSES = 64  # of one name

Address = tuple[Any, ...]


class _Destination:
    """A name or address and what it stands for now. `addresses` is replaced as a whole, so reading needs no lock."""

    def __init__(self, host: str, port: int) -> None:
        self.host = host
        self.port = port
        self.addresses: tuple[tuple[int, Address], ...] = ()
        self.fixed = True
        if host.lower() == "localhost":
            self.addresses = ((socket.AF_INET, ("127.0.0.1", port)),)
            return
        try:
            version = ipaddress.ip_address(host.split("%")[0]).version
        except ValueError:
            self.fixed = False
            return
        family = socket.AF_INET if version == 4 else socket.AF_INET6
        if "%" in host:  # a zone has to be resolved, and that asks nobody
            self.addresses = ((family, socket.getaddrinfo(host, port, type=socket.SOCK_DGRAM)[0][4]),)
        else:
            self.addresses = ((family, (host, port)),)

    def look_up(self, resolve: Callable[..., Any]) -> None:
        """Take what the name stands for now, of the family of the first answer; raises OSError, and keeps the old."""
        found = resolve(self.host, self.port, type=socket.SOCK_DGRAM)
        family = found[0][0]
        # Sorted, because name servers turn the order with each answer.
        addresses = sorted({(family, one[4]) for one in found if one[0] == family})
        self.addresses = tuple(addresses[:MOST_ADDRESSES])


class Sender:
    """Sends each datagram to every address of every gateway, and never waits. `send` is for one thread at a time.

    Each name is looked up in a thread of its own, so that a name server that does not answer holds up nothing.
    """

    def __init__(
        self,
        settings: Settings,
        complaints: Complaints,
        *,
        resolve: Callable[..., Any] = socket.getaddrinfo,
    ) -> None:
        self.sent = 0  # datagrams, once for each address
        self.would_block = 0  # not sent: the socket's buffer was full
        self.unreachable = 0  # not sent: no route, or whatever else the system said
        self._complaints = complaints
        self._resolve = resolve
        self._sockets: dict[int, socket.socket] = {}
        self._stop = threading.Event()
        self._broadcasts = settings.network_mode == BROADCAST
        port = settings.gateway_port
        if self._broadcasts:
            self._destinations = [_Destination(settings.broadcast_address, port), _Destination("127.0.0.1", port)]
        else:
            self._destinations = [_Destination(one.host, one.port or port) for one in settings.gateways]

    def start(self) -> None:
        """Begin to look names up, in daemon threads."""
        for destination in self._destinations:
            if not destination.fixed:
                threading.Thread(
                    target=self._keep_looking_up, args=(destination,), name="elrar-names", daemon=True
                ).start()

    def stop(self) -> None:
        """Close the sockets and let the look-ups end."""
        self._stop.set()
        for one in self._sockets.values():
            one.close()
        self._sockets = {}

    def _keep_looking_up(self, destination: _Destination) -> None:
        while not self._stop.is_set():
            self.look_up(destination)
            # A name that never resolved is asked for more often: the gateway may come up just now.
            self._stop.wait(LOOK_UP_EVERY_S if destination.addresses else 1.0)

    def look_up(self, destination: _Destination) -> None:
        """Look one name up, once."""
        kind = f"name {destination.host}"
        try:
            destination.look_up(self._resolve)
        except (OSError, UnicodeError, IndexError) as error:
            kept = "its last addresses are used" if destination.addresses else "nothing is sent there yet"
            self._complaints.trouble(
                kind, f"the gateway's name {destination.host!r} cannot be looked up ({_why(error)}): {kept}; trying on"
            )
        else:
            self._complaints.over(kind, f"the gateway's name {destination.host!r} was found")

    def addresses(self) -> list[tuple[int, Address]]:
        """Where datagrams go now, each address once."""
        if len(self._destinations) == 1:
            return list(self._destinations[0].addresses)
        return list(dict.fromkeys(one for destination in self._destinations for one in destination.addresses))

    def send(self, datagram: bytes) -> None:
        """Send it to every address; what cannot be sent is counted and given up."""
        for family, address in self.addresses():
            try:
                self._socket(family).sendto(datagram, address)
            except BlockingIOError:
                self.would_block += 1
            except OSError as error:
                if error.errno == errno.ENOBUFS:
                    self.would_block += 1
                    continue
                self.unreachable += 1
                self._cannot_send(address, error)
            else:
                self.sent += 1
                self._complaints.over(f"address {address}", f"sending to {address[0]} port {address[1]} works again")

    def _cannot_send(self, address: Address, error: OSError) -> None:
        self._complaints.trouble(
            f"address {address}", f"cannot send to {address[0]} port {address[1]}: {_why(error)}; trying on"
        )

    def own_address(self) -> str | None:
        """The address of this host towards the first gateway; None while there is none."""
        for family, address in self.addresses():
            if self._broadcasts and address[0] == "127.0.0.1":
                continue
            try:
                with socket.socket(family, socket.SOCK_DGRAM) as probe:
                    if self._broadcasts:
                        probe.setsockopt(socket.SOL_SOCKET, socket.SO_BROADCAST, 1)
                    probe.connect(address)  # sends nothing
                    return str(probe.getsockname()[0]).split("%")[0]
            except OSError as error:
                self._cannot_send(address, error)  # else nobody would say it: without the address nothing is sent
        return None

    def _socket(self, family: int) -> socket.socket:
        found = self._sockets.get(family)
        if found is None:
            found = self._sockets[family] = socket.socket(family, socket.SOCK_DGRAM)
            found.setblocking(False)
            if self._broadcasts:
                found.setsockopt(socket.SOL_SOCKET, socket.SO_BROADCAST, 1)
        return found


def _why(error: BaseException) -> str:
    return str(getattr(error, "strerror", None) or error or type(error).__name__)


class Printer:
    """In a Sender's place: writes each datagram as a line."""

    def __init__(self, out: IO[bytes], own: Callable[[], str | None] | None = None) -> None:
        self.sent = 0
        self._out = out
        self._own = own

    def start(self) -> None:
        """Nothing needs to be started."""

    def stop(self) -> None:
        """Nothing is open."""

    def send(self, datagram: bytes) -> None:
        """Write it as a line."""
        self._out.write(datagram + b"\n")
        self._out.flush()
        self.sent += 1

    def own_address(self) -> str | None:
        """The address of this host towards the gateway, or the loopback's."""
        return (self._own() if self._own else None) or "127.0.0.1"


# ---------------------------------------------------------------------------------------------------------------------
# What is seen of an engine, and what of it is proven
# ---------------------------------------------------------------------------------------------------------------------


class Proof(NamedTuple):
    """When the engine was last seen to move, or to be idle."""

    at: float  # by the monotonic clock
    ms: int  # since the epoch


class Counted(NamedTuple):
    """Two counters that grow together: a sum and the number of what was summed."""

    total: float
    times: float


@dataclass
class Reading:
    """What one data-parallel rank of an engine says of itself at one look. What it does not say is unknown."""

    running: int
    waiting: int
    marker: object = None  # differs from the last look's if the engine moved
    rank: int = 0
    proof: Proof | None = None  # when it moved, where the engine's own time of it is known
    free: int = -1  # KV-cache blocks
    total: int = -1
    pending: int | None = None  # tokens
    prompts: Counted | None = None  # tokens of prompts, and prompts
    step_times: Counted | None = None  # seconds of steps, and steps
    step_ms: float | None = None  # of the last step, where the engine says just that
    step_tokens: Counted | None = None  # tokens worked on in steps, and steps
    tokens: float | None = None  # a counter of all tokens worked on
    rate_s: float = 1.0  # over how long its rate is true: one that moves when requests end comes in jumps
    idle_is_proof: bool = True  # False: even an idle engine changes its marker


@dataclass
class Look:
    """What one look at an engine showed."""

    readings: Sequence[Reading]
    at: Proof  # when it was made
    in_flight: int | None = None  # requests in the engine's front end; None: it cannot be seen
    in_flight_by_rank: Mapping[int, int] | None = None
    asleep: bool = False
    lacks_ranks: bool = False  # it has more ranks than those that said something


HIDDEN = 1_000_000_000  # requests in a front end of which a part should have been seen, and was not


@dataclass
class _RankSeen:
    marker: object
    proof: Proof | None = None
    owing_since: float | None = None
    chances: int = 0  # that it was given since it moved, and failed


class Prover:
    """Tells when each rank was last proven to move or to be idle. A rank is idle if nothing runs or waits and no
    request is in the front end for it.

    A rank that left a request of the front end alone for longer than `stuck_after_s` owes a sign: that its clients give
    up does not make it idle. Only when that is `forgiven_after_s` ago, it is given another chance; if it fails that,
    the next takes twice as long, up to `FORGIVEN_AFTER_S`.
    """

    FORGIVEN_AFTER_S = 60.0

    def __init__(self, stuck_after_s: float, forgiven_after_s: float = FORGIVEN_AFTER_S) -> None:
        self._stuck_after_s = stuck_after_s
        self._forgiven_after_s = forgiven_after_s
        self._ranks: dict[int, _RankSeen] = {}

    def prove(self, look: Look) -> dict[int, Proof | None]:
        """The last proof of each rank, after this look."""
        accounted = sum(reading.running + reading.waiting for reading in look.readings)
        return {reading.rank: self._prove(reading, look, accounted) for reading in look.readings}

    def _prove(self, reading: Reading, look: Look, accounted: int) -> Proof | None:
        seen = self._ranks.get(reading.rank)
        if seen is None:
            seen = self._ranks[reading.rank] = _RankSeen(reading.marker, reading.proof)
        elif reading.marker != seen.marker:
            seen.marker = reading.marker
            seen.proof = reading.proof or look.at
            seen.owing_since, seen.chances = None, 0
        if reading.running + reading.waiting > 0:
            return seen.proof
        if look.in_flight_by_rank is not None and look.in_flight != 0:
            left_alone = look.in_flight_by_rank.get(reading.rank, 0)
        else:
            left_alone = (look.in_flight or 0) - accounted
        if look.asleep:
            seen.owing_since, seen.chances = None, 0
        elif left_alone > 0:
            if seen.proof is not None and look.at.at - seen.proof.at > self._stuck_after_s:
                if seen.owing_since is not None and not self._owes(seen, look.at.at):
                    seen.chances += 1
                seen.owing_since = look.at.at
        elif reading.idle_is_proof and not self._owes(seen, look.at.at):
            seen.proof = look.at
        return seen.proof

    def _owes(self, seen: _RankSeen, now: float) -> bool:
        if seen.owing_since is None:
            return False
        pause_s = self._forgiven_after_s * 2.0 ** min(seen.chances, 8)
        return now - seen.owing_since < min(pause_s, self.FORGIVEN_AFTER_S)


class Meter:
    """Makes a Load of one rank's readings: rates of its counters, and what holds from one look to the next."""

    WINDOW_S = 60.0  # over which the mean prompt is taken
    MODE_STEPS = 10

    def __init__(self, capacity: float | None) -> None:
        self._configured = capacity
        self._capacity = 0.0
        self._rate_from: tuple[float, float] | None = None
        self._latency_ms = 0.0
        self._mode = LATENCY_OPTIMIZED
        self._step_times: Counted | None = None
        self._step_tokens: deque[Counted] = deque(maxlen=self.MODE_STEPS + 1)
        self._prompts: deque[tuple[float, Counted]] = deque()
        self._mean_prompt = 0.0

    def measure(self, reading: Reading, now: float) -> Load:
        """The load that a reading shows, at `now` by the monotonic clock."""
        self._measure_latency(reading)
        self._measure_mode(reading.step_tokens)
        self._measure_prompts(reading.prompts, now)
        self._measure_capacity(reading, now)
        pending = reading.pending
        if pending is None:
            pending = round(reading.waiting * self._mean_prompt)
        return Load(
            self._latency_ms,
            self._mode,
            pending,
            reading.free,
            reading.total,
            self._capacity if self._configured is None else self._configured,
            reading.running,
            reading.waiting,
        )

    def _measure_latency(self, reading: Reading) -> None:
        if reading.step_ms is not None:
            self._latency_ms = reading.step_ms
        now, before = reading.step_times, self._step_times
        if now is None:
            return
        if before is None or now.times < before.times or now.total < before.total:
            self._step_times = now
            return
        if now.times == before.times or now.total == before.total:
            return  # no step takes no time: one of the two is rounded, or comes with the next look
        self._step_times = now
        latency_ms = 1000 * (now.total - before.total) / (now.times - before.times)
        # About the mean of the last ten steps: a few new ones do not stand for the next, and a hang is soon forgotten.
        weight = min(1.0, (now.times - before.times) / 10) if self._latency_ms else 1.0
        self._latency_ms += weight * (latency_ms - self._latency_ms)

    def _measure_mode(self, now: Counted | None) -> None:
        seen = self._step_tokens
        if now is None or (seen and now.times == seen[-1].times):
            return
        if seen and (now.times < seen[-1].times or now.total < seen[-1].total):
            seen.clear()  # the engine began anew
        if seen:
            before = next((one for one in reversed(seen) if now.times - one.times >= self.MODE_STEPS), seen[0])
            mean = (now.total - before.total) / (now.times - before.times)
            self._mode = _mode(mean)
        seen.append(now)

    def _measure_prompts(self, now: Counted | None, at: float) -> None:
        if now is None:
            return
        seen = self._prompts
        if seen and (now.times < seen[-1][1].times or now.total < seen[-1][1].total):
            seen.clear()
        if not seen or at - seen[-1][0] >= 1.0:
            seen.append((at, now))
        while len(seen) > 2 and at - seen[1][0] > self.WINDOW_S:
            seen.popleft()
        before = seen[0][1]
        if now.times > before.times:
            self._mean_prompt = (now.total - before.total) / (now.times - before.times)
        elif self._mean_prompt == 0.0 and now.times > 0:
            self._mean_prompt = now.total / now.times  # since the engine's start: better than nothing

    def _measure_capacity(self, reading: Reading, now: float) -> None:
        tokens, since = reading.tokens, self._rate_from
        if tokens is None or reading.waiting == 0 or (since is not None and tokens < since[1]):
            self._rate_from = None
        elif since is None:
            self._rate_from = (now, tokens)
        elif now - since[0] >= reading.rate_s:
            if now - since[0] < reading.rate_s + 1.0:  # longer is an engine that stood still
                self._capacity = max(self._capacity, (tokens - since[1]) / (now - since[0]))
            self._rate_from = (now, tokens)


def _mode(tokens_a_step: float) -> str:
    if tokens_a_step < 256:
        return LATENCY_OPTIMIZED
    return THROUGHPUT_OPTIMIZED if tokens_a_step > 1024 else BALANCED


_MODES_BY_LOAD = (LATENCY_OPTIMIZED, BALANCED, THROUGHPUT_OPTIMIZED)


def merge_loads(loads: Sequence[Load]) -> Load:
    """The load of an engine of several ranks: sums, the greatest latency, the heaviest mode. What a rank does not know,
    the whole does not know."""
    if len(loads) == 1:
        return loads[0]
    unknown = [min(one.kv_cache_free_blocks, one.kv_cache_total_blocks) < 0 for one in loads]
    return Load(
        max(one.latency_pred_ms for one in loads),
        max((one.scheduling_mode for one in loads), key=_MODES_BY_LOAD.index),
        sum(one.pending_tokens_total for one in loads),
        -1 if any(unknown) else sum(one.kv_cache_free_blocks for one in loads),
        -1 if any(unknown) else sum(one.kv_cache_total_blocks for one in loads),
        sum(one.engine_capacity for one in loads),
        sum(one.num_requests_running or 0 for one in loads),
        sum(one.num_requests_waiting or 0 for one in loads),
    )


# ---------------------------------------------------------------------------------------------------------------------
# What is said of an engine, and when
# ---------------------------------------------------------------------------------------------------------------------


class Statement(NamedTuple):
    """What is to be said of an engine now."""

    phase: str
    load: Load
    proven_ms: int | None  # None: now; nothing was proven yet


class PhaseJudge:
    """Says only what is proven, through one life of an engine, until its farewell. Pure: it knows no clock."""

    REPEAT_S = 1.0  # of what is no proof: the gateway is to hear that the agent is there

    def __init__(self, stuck_after_s: float) -> None:
        self._stuck_after_s = stuck_after_s
        self.phase: str | None = None  # of the last statement
        self._proof: Proof | None = None
        self._load = UNKNOWN_LOAD
        self._waiting_since = -math.inf
        self._said_at = -math.inf

    def proven(self, now: float, proof: Proof | None, load: Load) -> Statement | None:
        """The engine answered; `proof` is the last that there is, of which `load` is true."""
        if self._waiting_since == -math.inf:
            self._waiting_since = now  # who sees it for the first time needs a second look
        if proof is None or (self._proof is not None and proof.at <= self._proof.at):
            return self.unproven(now)
        self._proof, self._load, self._waiting_since = proof, load, proof.at
        return self._say(SERVING, now)

    def asleep(self, now: float) -> Statement | None:
        """The engine says that it sleeps."""
        self._waiting_since = now  # when it wakes up, it gets its time
        return self._say(SLEEPING, now) if self._is_due(SLEEPING, now) else None

    def unproven(self, now: float) -> Statement | None:
        """Nothing new is proven: the engine does not answer, or nothing in it moved."""
        if self._waiting_since == -math.inf:
            phase = STARTING
        elif now - self._waiting_since < self._stuck_after_s:
            return None
        else:
            phase = STUCK
        return self._say(phase, now) if self._is_due(phase, now) else None

    def gone(self) -> Statement | None:
        """The engine ended; None if it was not spoken of, or the farewell was said."""
        if self.phase is None or self.phase == GONE:
            return None
        return self._say(GONE, -math.inf)

    def _is_due(self, phase: str, now: float) -> bool:
        # A little early is better than a whole turn late.
        return phase != self.phase or now - self._said_at >= self.REPEAT_S - 0.05

    def _say(self, phase: str, now: float) -> Statement:
        self.phase, self._said_at = phase, now
        return Statement(phase, self._load, self._proof.ms if self._proof else None)


class Reporter:
    """Speaks for one engine_id: judges, writes and sends. For one thread at a time."""

    # Before each after the first. Together, all would be lost to one full buffer; apart, a process that is killed after
    # its SIGTERM sends only the first.
    FAREWELL_GAPS_S = (0.005, 0.05)

    def __init__(
        self,
        writer: DatagramWriter,
        sender: Sender | Printer,
        stuck_after_s: float,
        *,
        clock: Callable[[], float] = time.monotonic,
        wall_clock: Callable[[], float] = time.time,
    ) -> None:
        self.writer = writer
        self._sender = sender
        self._stuck_after_s = stuck_after_s
        self._clock = clock
        self._wall_clock = wall_clock
        self._judge = PhaseJudge(stuck_after_s)
        self._owed: Statement | None = None  # a farewell that was said once

    @property
    def phase(self) -> str | None:
        """The phase of the last datagram."""
        return self._judge.phase

    def proven(self, proof: Proof | None, load: Load) -> None:
        """The engine answered; see PhaseJudge."""
        if self.phase == GONE:
            self._begin_anew()
        self._send(self._judge.proven(self._clock(), proof, load))

    def asleep(self) -> None:
        """The engine sleeps."""
        if self.phase == GONE:
            self._begin_anew()
        self._send(self._judge.asleep(self._clock()))

    def unproven(self, *, answers: bool = False) -> None:
        """Nothing is proven; `answers` says whether the engine is there at all."""
        if self.phase == GONE and answers:
            self._begin_anew()
        if self.phase != GONE:
            self._send(self._judge.unproven(self._clock()))

    def begin_farewell(self) -> None:
        """The engine ended: say so once, without waiting. `farewell` says the rest."""
        statement = self._judge.gone()
        if statement is not None:
            self._owed = statement
            self._send(statement)

    def farewell(self, sleep: Callable[[float], object] = time.sleep) -> None:
        """The engine ended: say so three times within 100 ms, once for each life."""
        self.begin_farewell()
        owed, self._owed = self._owed, None
        if owed is None:
            return
        for gap_s in self.FAREWELL_GAPS_S:
            sleep(gap_s)
            self._send(owed)

    def _begin_anew(self) -> None:
        self.writer.new_life()
        self._judge = PhaseJudge(self._stuck_after_s)

    def _send(self, statement: Statement | None) -> None:
        if statement is not None:
            ms = statement.proven_ms
            if ms is None:
                ms = int(self._wall_clock() * 1000)
            self._sender.send(self.writer.write(statement.phase, ms, statement.load))


class Agent:
    """Makes what is seen of an engine into what is said of it: one engine_id for all its ranks, or one for each.

    For one thread at a time. `identify` is given what is known of the engine, as soon as it is known.
    """

    def __init__(
        self,
        settings: Settings,
        sender: Sender | Printer,
        *,
        forgiven_after_s: float = Prover.FORGIVEN_AFTER_S,
        clock: Callable[[], float] = time.monotonic,
        wall_clock: Callable[[], float] = time.time,
    ) -> None:
        self.key = settings.key
        self._settings = settings
        self._sender = sender
        self._clock = clock
        self._wall_clock = wall_clock
        self._engine_id: str | None = None
        self._model: str | None = None
        self._engine = "unknown"
        self._forgiven_after_s = forgiven_after_s
        self._prover = Prover(settings.stuck_after_s, forgiven_after_s)
        self._meters: dict[int, Meter] = {}
        self._reporters: dict[int | None, Reporter] = {}  # by rank; None: the whole engine

    @property
    def engine_id(self) -> str | None:
        """What the router knows the engine by; None until it is known."""
        return self._engine_id

    def identify(self, engine_id: str | None, model: str | None, engine: str) -> None:
        """Say which engine it is: the id is kept once it is known, the rest may change."""
        self._engine_id = self._engine_id or engine_id
        if (model, engine) != (self._model, self._engine):
            self._model, self._engine = model, engine
            for reporter in self._reporters.values():
                reporter.writer.describe(model, engine)

    def use_key(self, key: Key | None) -> None:
        """Sign with another key from now on."""
        self.key = key
        for reporter in self._reporters.values():
            reporter.writer.key = key

    def saw(self, look: Look) -> None:
        """The engine answered: say what is proven."""
        proofs = self._prover.prove(look)
        loads = {reading.rank: self._meter(reading.rank).measure(reading, look.at.at) for reading in look.readings}
        if self._settings.data_parallel == RANKS:
            said: dict[int | None, tuple[Proof | None, Load]] = {rank: (proofs[rank], loads[rank]) for rank in loads}
        else:
            load = merge_loads(list(loads.values()))
            if look.lacks_ranks:
                load = load._replace(kv_cache_free_blocks=-1, kv_cache_total_blocks=-1)
            if self._settings.engine_capacity is not None:
                load = load._replace(engine_capacity=self._settings.engine_capacity)
            # The whole is proven only as far as each rank is: one that hangs is not hidden by the others.
            every = list(proofs.values())
            known = [one for one in every if one is not None]
            said = {None: (min(known) if len(known) == len(every) else None, load)}
        for rank, (proof, load) in said.items():
            reporter = self._reporter(rank)
            if reporter is None:
                continue
            if look.asleep:
                reporter.asleep()
            else:
                reporter.proven(proof, load)

    def saw_nothing(self, *, answers: bool = False) -> None:
        """The engine did not answer, or, if it `answers`, said nothing of its load."""
        if not self._reporters:
            self._reporter(0 if self._settings.data_parallel == RANKS else None)
        for reporter in self._reporters.values():
            reporter.unproven(answers=answers)

    def refused(self, sleep: Callable[[float], object] = time.sleep) -> None:
        """The engine's port refuses connections: it is gone, where it was there before."""
        if all(one.phase in (None, STARTING) for one in self._reporters.values()):
            self.saw_nothing()
        else:
            self.ended(sleep)

    def begin_farewell(self) -> None:
        """The engine ends: say farewell once, without waiting. `ended` says the rest."""
        for reporter in self._reporters.values():
            reporter.begin_farewell()

    def ended(self, sleep: Callable[[float], object] = time.sleep) -> None:
        """The engine ended, or the agent does: say farewell."""
        reporters = list(self._reporters.values())
        for number, reporter in enumerate(reporters):
            # All ranks together within 100 ms: the later ones do not wait again.
            reporter.farewell(sleep if number == len(reporters) - 1 else _do_not_sleep)
        self._prover = Prover(self._settings.stuck_after_s, self._forgiven_after_s)
        self._meters = {}

    @property
    def is_gone(self) -> bool:
        """Whether a farewell was said, and nothing since."""
        return bool(self._reporters) and all(one.phase == GONE for one in self._reporters.values())

    def _meter(self, rank: int) -> Meter:
        if rank not in self._meters:
            self._meters[rank] = Meter(self._settings.engine_capacity)
        return self._meters[rank]

    def _reporter(self, rank: int | None) -> Reporter | None:
        """Who speaks for a rank; None while it is not known as what."""
        if rank not in self._reporters:
            if self._engine_id is None:
                return None
            writer = DatagramWriter(
                self._engine_id if rank is None else f"{self._engine_id}#dp{rank}",
                model=self._model,
                engine=self._engine,
                dp_rank=rank,
                labels=self._settings.labels,
                key=self.key,
            )
            self._reporters[rank] = Reporter(
                writer, self._sender, self._settings.stuck_after_s, clock=self._clock, wall_clock=self._wall_clock
            )
        return self._reporters[rank]


def _do_not_sleep(_: float) -> None:
    pass


class KeyWatch:
    """Reads the key's file again when it changed, so that keys can be changed without a restart."""

    def __init__(self, settings: Settings, complaints: Complaints) -> None:
        self._path = settings.key_file
        self._complaints = complaints
        self._seen = self._stat()
        self._looked_at = -math.inf

    def changed(self, now: float) -> Key | None:
        """The new key, where there is one; looked for every 5 s."""
        if self._path is None or now - self._looked_at < 5.0:
            return None
        self._looked_at = now
        seen = self._stat()
        if seen == self._seen:
            return None
        self._seen = seen
        try:
            key = read_key(self._path)
        except _Refused as refused:
            self._complaints.trouble("key", f"the key in {self._path!r} cannot be used ({refused}): the old one stays")
            return None
        self._complaints.over("key", f"the key in {self._path!r} can be used again")
        return key

    def _stat(self) -> tuple[int, int, int] | None:
        try:
            found = os.stat(self._path or "")
        except OSError:
            return None
        return found.st_ino, found.st_mtime_ns, found.st_size


# ---------------------------------------------------------------------------------------------------------------------
# Without an engine: a simulated fleet, and a state log sent again
# ---------------------------------------------------------------------------------------------------------------------


class Activity(NamedTuple):
    """What a simulated engine does for a while."""

    phase: str | None  # None: it says nothing
    least_s: float
    most_s: float
    then: tuple[str, ...]  # what it may do next


ACTIVITIES = {
    "starting": Activity(STARTING, 1.0, 4.0, ("serving",)),
    "serving": Activity(SERVING, 20.0, 90.0, ("draining", "hanging", "dead", "sleeping")),
    "draining": Activity(DRAINING, 4.0, 8.0, ("gone",)),
    "gone": Activity(None, 5.0, 10.0, ("starting",)),  # it begins with a farewell
    "hanging": Activity(STUCK, 3.0, 8.0, ("serving",)),
    # Without a farewell; a gateway has forgotten it after 6 s, or sees a restart.
    "dead": Activity(None, 3.0, 15.0, ("starting",)),
    "sleeping": Activity(SLEEPING, 5.0, 10.0, ("serving",)),
}


class SimulatedEngine:
    """An engine that is not there: a day of load in four minutes, and now and then a drain, a hang, a nap, a death."""

    DAY_S = 240.0
    MODELS = ("llama-3-8b", "qwen-2.5-32b", "deepseek-v3")

    def __init__(self, number: int, settings: Settings, seed: int) -> None:
        self._random = random.Random(seed * 1_000_003 + number)
        self.writer = DatagramWriter(
            f"http://10.77.{number // 250}.{number % 250 + 1}:8000",
            model=self.MODELS[number % len(self.MODELS)],
            engine="simulated 1.0",
            labels=settings.labels,
            key=settings.key,
        )
        self._capacity = float(self._random.randrange(2000, 12000, 100))
        self._blocks = self._random.choice((4095, 8191, 16383))
        self._phase_of_day = self._random.random()
        self._load = UNKNOWN_LOAD
        self._proven_ms: int | None = None
        self._said_at = -math.inf
        self.activity = "starting"
        self._until = self._random.uniform(0.5, 2.0)
        # The first trouble comes soon, and each kind in turn: a minute of twenty engines shows all of them.
        troubles = ACTIVITIES["serving"].then
        self._first_trouble: str | None = troubles[number % len(troubles)]

    def step(self, now: float, now_ms: int) -> list[bytes]:
        """What it says at `now`, in seconds since the simulation began."""
        if now >= self._until:
            self._go_on(now)
            if self.activity == "gone":
                return [self.farewell(now_ms) for _ in range(3)]
        phase = ACTIVITIES[self.activity].phase
        if phase in (SERVING, DRAINING):
            self._load, self._proven_ms = self._measure(now), now_ms
        elif phase is None or now - self._said_at < 0.95:
            return []
        self._said_at = now
        return [self.writer.write(phase, self._proven_ms or now_ms, self._load)]

    def farewell(self, now_ms: int) -> bytes:
        """One of its farewells."""
        return self.writer.write(GONE, self._proven_ms or now_ms, self._load)

    def _go_on(self, now: float) -> None:
        choice = ACTIVITIES[self.activity].then
        before, self.activity = self.activity, self._random.choice(choice)
        if before == "serving" and self._first_trouble:
            self.activity, self._first_trouble = self._first_trouble, None
        doing = ACTIVITIES[self.activity]
        self._until = now + self._random.uniform(doing.least_s, doing.most_s)
        if self.activity == "serving" and self._first_trouble:
            self._until = now + self._random.uniform(4.0, 40.0)
        self._said_at = -math.inf
        if self.activity == "starting":
            self.writer.new_life()
            self._load, self._proven_ms = UNKNOWN_LOAD, None

    def _measure(self, now: float) -> Load:
        turn = 2 * math.pi * (now / self.DAY_S + self._phase_of_day)
        level = 0.5 - 0.6 * math.cos(turn) + self._random.uniform(-0.05, 0.05)
        if self.activity == "draining":
            level = min(level, (self._until - now) / 8.0)
        level = min(level, 1.0)
        if level <= 0.05:
            return self._load._replace(
                pending_tokens_total=0,
                kv_cache_free_blocks=self._blocks,
                kv_cache_total_blocks=self._blocks,
                engine_capacity=self._capacity,
                num_requests_running=0,
                num_requests_waiting=0,
            )
        running = max(1, round(64 * level))
        waiting = 0 if self.activity == "draining" else max(0, round(120 * (level - 0.75)))
        pending = waiting * self._random.randrange(200, 900)
        used = min(self._blocks, round(self._blocks * (0.02 + 0.95 * level)))
        latency_ms = 8.0 + 0.6 * running + self._random.random()
        free = self._blocks - used
        mode = _mode(running + pending / 8)
        return Load(latency_ms, mode, pending, free, self._blocks, self._capacity, running, waiting)


class Simulation:
    """A fleet of simulated engines, each with its own place within the interval, so that they do not come in bursts."""

    def __init__(self, settings: Settings, sender: Sender | Printer, engines: int, seed: int = 1) -> None:
        self._sender = sender
        self._interval_s = settings.push_interval_s
        self.datagrams = dict.fromkeys(PHASES, 0)
        self.began = dict.fromkeys(ACTIVITIES, 0)  # how many times an engine began to do what
        self.engines = [SimulatedEngine(number, settings, seed) for number in range(engines)]
        self._due = [number * self._interval_s / engines for number in range(engines)]
        self._next = 0

    def run(self, stop: threading.Event, seconds: float, clock: Clock = time.monotonic) -> None:
        """Send until `stop` is set or the time is over, then say farewell for every engine that is known."""
        began = clock()
        while not stop.is_set():
            now = clock() - began
            if now >= seconds:
                break
            due_in = self.step(now, _now_ms())
            # Some at a time: a wake-up for each of thousands of engines would cost more than what they say.
            stop.wait(min(max(due_in, 0.004), max(0.0, seconds - now)))
        self.end()

    def step(self, now: float, now_ms: int) -> float:
        """Send what is due at `now`, in seconds since the start; returns how long nothing more is due."""
        while self._due[self._next] <= now:
            number = self._next
            engine = self.engines[number]
            before = engine.activity
            for datagram in engine.step(now, now_ms):
                self._send(GONE if engine.activity == "gone" else ACTIVITIES[engine.activity].phase or GONE, datagram)
            if engine.activity != before:
                self.began[engine.activity] += 1
            # All have the same interval, so that their order stays. Who is late by whole turns leaves them out.
            self._due[number] = max(self._due[number] + self._interval_s, now - self._interval_s)
            self._next = (number + 1) % len(self.engines)
        return self._due[self._next] - now

    def end(self) -> None:
        """Say farewell for each engine that a gateway knows, three times."""
        known = [engine for engine in self.engines if ACTIVITIES[engine.activity].phase]
        for gap_s in (0.0, *Reporter.FAREWELL_GAPS_S):
            time.sleep(gap_s)
            for engine in known:
                self._send(GONE, engine.farewell(_now_ms()))
        for engine in known:
            engine.activity = "gone"
        self.began["gone"] += len(known)

    def account(self) -> dict[str, Any]:
        """What it did: for comparison with what a gateway says."""
        doing = dict.fromkeys(ACTIVITIES, 0)
        for engine in self.engines:
            doing[engine.activity] += 1
        return {"engines": len(self.engines), "datagrams": self.datagrams, "began": self.began, "doing": doing}

    def _send(self, phase: str, datagram: bytes) -> None:
        self._sender.send(datagram)
        self.datagrams[phase] += 1


def _now_ms() -> int:
    return int(time.time() * 1000)


class LoggedState(NamedTuple):
    """A state of a state log."""

    received_s: float
    state: dict[str, Any]


def log_files(paths: Iterable[str]) -> list[str]:
    """The files of state logs, oldest first: each with the rotated ones beside it (`.1`, `.2.gz`, ...)."""
    found: list[str] = []
    for path in paths:
        beside = [path] if os.path.exists(path) or path == "-" else []
        for one in glob.glob(glob.escape(path) + ".*"):
            if re.fullmatch(r"(?:\.[0-9]+)?(?:-[0-9]+)?(?:\.gz)?", one[len(path) :]):
                beside.append(one)
        if not beside:
            raise FileNotFoundError(errno.ENOENT, "there is no such file", path)
        found += beside
    return sorted(dict.fromkeys(found), key=_first_receipt)


def _first_receipt(path: str) -> float:
    # By what is in them: names say it in different ways, and are sometimes turned round.
    first = next(logged_states([path]), None) if path != "-" else None
    return math.inf if first is None else first.received_s


def logged_states(paths: Iterable[str]) -> Iterator[LoggedState]:
    """The states of some files, in their order; events and torn lines are passed over."""
    for path in paths:
        with _open_log(path) as lines:
            try:
                for line in lines:
                    state = _logged_state(line)
                    if state is not None:
                        yield state
            except (EOFError, OSError, ValueError) as error:  # a .gz that was cut off
                say_on_stderr(f"{path}: {_why(error)}: what follows is left out")


def _open_log(path: str) -> contextlib.AbstractContextManager[Iterable[bytes]]:
    if path == "-":
        # Not sys.stdin: at its exit Python waits for whoever reads that.
        return open(0, "rb", closefd=False)
    if path.endswith(".gz"):
        return gzip.open(path, "rb")
    return open(path, "rb")


def read_ahead(
    states: Iterable[LoggedState], stop: threading.Event, seconds: float, clock: Clock = time.monotonic
) -> Iterator[LoggedState]:
    """The same states, read in a thread of their own until `stop` is set or the time is over: a pipe that says nothing
    holds up nobody. Raises what reading them raised."""
    until = clock() + seconds
    found: queue.Queue[LoggedState | Exception | None] = queue.Queue(1000)

    def read() -> None:
        try:
            for state in states:
                found.put(state)
            found.put(None)
        except Exception as error:
            found.put(error)

    threading.Thread(target=read, name="elrar-log", daemon=True).start()
    while not stop.is_set() and clock() < until:
        try:
            state = found.get(timeout=0.1)
        except queue.Empty:
            continue
        if isinstance(state, Exception):
            raise state
        if state is None:
            return
        yield state


def _logged_state(line: bytes) -> LoggedState | None:
    try:
        document = json.loads(line)
        received_s, state = float(document["timestamp"]), document["state"]
        if math.isfinite(received_s) and isinstance(state, dict) and isinstance(state["engine_id"], str):
            state["timestamp_ms"] = int(state["timestamp_ms"])
            return LoggedState(received_s, state)
    except (ValueError, TypeError, KeyError, OverflowError, RecursionError):
        pass
    return None


class Replay:
    """Sends the states of a log again, as of now: with its spacing, and with `timestamp_ms` moved by as much.

    A `boot` becomes a new one, the same for the same, and `seq` counts anew: what a log does not have was lost then,
    not now. With a key, what had no `boot` gets one, because what is signed has to have one.
    """

    def __init__(self, settings: Settings, sender: Sender | Printer, speed: float) -> None:
        self._sender = sender
        self._key = settings.key
        self._speed = speed
        self._boots: dict[tuple[str, Any], str] = {}
        self._seqs: dict[tuple[str, Any], int] = {}
        self.sent = 0

    def run(
        self,
        states: Iterable[LoggedState],
        stop: threading.Event,
        seconds: float,
        clock: Clock = time.monotonic,
        now_s: Clock = time.time,
    ) -> None:
        """Send all, or until `stop` is set or the time is over."""
        began, first_s = clock(), None
        for logged in states:
            if first_s is None:
                first_s = logged.received_s
            # A clock that was set back in the log holds up nothing.
            due = began + max(0.0, logged.received_s - first_s) / self._speed
            pause = min(due, began + seconds) - clock()
            if pause > 0.001 and stop.wait(pause):
                return
            if stop.is_set() or clock() - began >= seconds:
                return
            self._sender.send(self.as_of(logged, now_s()))
            self.sent += 1

    def as_of(self, logged: LoggedState, now_s: float) -> bytes:
        """A logged state as a datagram of `now_s`, in seconds since the epoch."""
        state = dict(logged.state)
        moved = state["timestamp_ms"] + round((now_s - logged.received_s) * 1000)
        state["timestamp_ms"] = max(0, min(moved, 2**53))
        state.pop("sig", None)
        boot = state.get("boot")
        if boot is not None or self._key is not None:
            life = (state["engine_id"], boot)
            if life not in self._boots:
                self._boots[life] = secrets.token_hex(8)
            self._seqs[life] = self._seqs.get(life, 0) + 1
            state["boot"], state["seq"] = self._boots[life], self._seqs[life]
        datagram = json.dumps(state).encode()
        return datagram if self._key is None else self._key.sign(datagram)


# ---------------------------------------------------------------------------------------------------------------------
# Asking an engine over HTTP
# ---------------------------------------------------------------------------------------------------------------------


class NoAnswer(Exception):
    """The engine did not answer as an engine does; the text says how."""


class RefusedConnection(NoAnswer):
    """Nobody listens at the engine's port."""


class NoNumbers(NoAnswer):
    """The engine answered, and did not say what is needed."""


class EngineClient:
    """HTTP/1.1 GETs to one engine over one kept connection. Each is bounded in time as a whole and in size."""

    TIMEOUT_S = 2.0
    FURTHER_S = 0.3  # for each answer behind the first: some servers forget what was asked with it
    MOST_BYTES = 8_000_000
    MOST_HEADER_BYTES = 65_536

    def __init__(self, url: str, api_key: str | None = None, ca_file: str | None = None) -> None:
        parts = urllib.parse.urlsplit(url)
        self._host = parts.hostname or "localhost"
        self._tls = _tls_for(self._host, ca_file) if parts.scheme == "https" else None
        self._port = parts.port or (443 if self._tls else 80)
        self._base = parts.path.rstrip("/")
        self._headers = (
            f"Host: {parts.netloc}\r\nUser-Agent: {AGENT.replace(' ', '-agent/')}\r\nAccept: */*\r\n"
            + (f"Authorization: Bearer {api_key}\r\n" if api_key else "")
            + "\r\n"
        )
        self._socket: socket.socket | None = None
        self._takes_several = True  # questions at once; False as soon as they were not all answered
        self.give_up_at = math.inf  # for all that is asked

    def close(self) -> None:
        """Close the connection."""
        if self._socket is not None:
            self._socket.close()
            self._socket = None

    def get(self, path: str) -> tuple[int, bytes]:
        """Status and body; raises NoAnswer."""
        return self.get_all(path)[0]

    def get_all(self, *paths: str) -> list[tuple[int, bytes]]:
        """Status and body of each; raises NoAnswer. All are asked at once, for which an idle server wakes up once."""
        until = min(time.monotonic() + self.TIMEOUT_S, self.give_up_at)
        answers: list[tuple[int, bytes]] = []
        try:
            while len(answers) < len(paths):
                left = paths[len(answers) :]
                kept, before = self._socket is not None, len(answers)
                if not kept:
                    self._connect(until)
                try:
                    self._ask(left if self._takes_several else left[:1], answers, until)
                except _ClosedBefore:  # as any server may while a connection is idle
                    if not kept and len(answers) == before:
                        if not self._takes_several or len(left) == 1:
                            raise
                        self._takes_several = False
                    self.close()
        except BaseException as error:
            self.close()
            if isinstance(error, _ClosedBefore):
                raise NoAnswer("the connection was closed without an answer") from None
            if isinstance(error, TimeoutError):
                raise NoAnswer(f"no answer to {paths[len(answers)].split('?')[0]} in time") from None
            if isinstance(error, (OSError, ValueError)):
                raise NoAnswer(_why(error)) from None
            raise
        return answers

    def _ask(self, paths: Sequence[str], answers: list[tuple[int, bytes]], until: float) -> None:
        """Ask on the connection, and append each answer. If several were not all answered, it asks one by one from
        then on, and leaves the rest to that."""
        assert self._socket is not None
        received = bytearray()
        first = True
        try:
            self._socket.settimeout(_left(until))
            requests = (f"GET {self._base}{path} HTTP/1.1\r\n{self._headers}" for path in paths)
            self._send("".join(requests).encode("latin-1"))
            for number in range(1, len(paths) + 1):
                answers.append(
                    self._answer(received, until if first else min(until, time.monotonic() + self.FURTHER_S))
                )
                first = False
                if self._socket is None and number < len(paths):
                    raise _ClosedBefore
        except (OSError, ValueError, NoAnswer, _ClosedBefore) as error:
            if len(paths) == 1 or (first and isinstance(error, (TimeoutError, _ClosedBefore))):
                raise
            self._takes_several = False
            self.close()

    def _send(self, requests: bytes) -> None:
        assert self._socket is not None
        try:
            self._socket.sendall(requests)
        except (ConnectionResetError, BrokenPipeError):
            raise _ClosedBefore from None

    def json(self, path: str) -> Any:
        """The document of a 200, or None."""
        return _document(*self.get(path))

    def _connect(self, until: float) -> None:
        refused: OSError | None = None
        other: OSError | None = None
        for family, kind, protocol, _, address in _look_up(self._host, self._port, until):
            try:
                found = socket.socket(family, kind, protocol)
            except OSError as error:  # this host does not have that family
                other = other or error
                continue
            try:
                found.settimeout(_left(until))
                found.connect(address)
                found.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
                if self._tls is not None:
                    found = self._tls.wrap_socket(found, server_hostname=self._host)
            except ConnectionRefusedError as error:
                found.close()
                refused = error
            except OSError as error:  # another address may be reached
                found.close()
                other = other or error
            except BaseException:
                found.close()
                raise
            else:
                self._socket = found
                return
        if other is not None:
            raise other
        raise RefusedConnection(_why(refused) if refused else "the name has no address")

    def _answer(self, received: bytearray, until: float) -> tuple[int, bytes]:
        """The next answer on the connection; `received` keeps what came behind it."""
        try:
            if not received and not self._more(received, until):
                raise _ClosedBefore
        except ConnectionResetError:
            raise _ClosedBefore from None
        while (end := received.find(b"\r\n\r\n")) < 0:
            if len(received) > self.MOST_HEADER_BYTES or not self._more(received, until):
                raise NoAnswer("what answers does not speak HTTP")
        head = bytes(received[:end]).lower()
        del received[: end + 4]
        status = re.match(rb"http/1\.[01] ([0-9]{3})", head)
        if status is None:
            raise NoAnswer("what answers does not speak HTTP")
        length = re.search(rb"\r\ncontent-length:[ \t]*([0-9]{1,12})[ \t]*(?:\r|\Z)", head)
        if re.search(rb"\r\ntransfer-encoding:[ \t]*chunked", head):
            body, whole = self._chunked(received, until), True
        elif length is not None:
            body, whole = self._sized(received, int(length[1]), until), True
        else:
            body, whole = self._rest(received, until), False
        if not whole or re.search(rb"\r\nconnection:[ \t]*close", head) or head.startswith(b"http/1.0"):
            self.close()
        return int(status[1]), body

    def _more(self, received: bytearray, until: float) -> bool:
        assert self._socket is not None
        self._socket.settimeout(_left(until))
        data = self._socket.recv(262_144)
        received += data
        return bool(data)

    def _sized(self, received: bytearray, length: int, until: float) -> bytes:
        if length > self.MOST_BYTES:
            raise NoAnswer(f"the answer is too large: {length} bytes")
        while len(received) < length:
            if not self._more(received, until):
                raise NoAnswer("the answer was cut off")
        body = bytes(received[:length])
        del received[:length]
        return body

    def _rest(self, received: bytearray, until: float) -> bytes:
        while self._more(received, until):
            if len(received) > self.MOST_BYTES:
                raise NoAnswer(f"the answer is too large: more than {self.MOST_BYTES} bytes")
        return bytes(received)

    def _chunked(self, received: bytearray, until: float) -> bytes:
        body = bytearray()
        while True:
            while (end := received.find(b"\r\n")) < 0:
                if len(received) > 1000 or not self._more(received, until):
                    raise NoAnswer("the answer was cut off")
            size = int(bytes(received[:end]).split(b";")[0], 16)
            if size > self.MOST_BYTES or len(body) + size > self.MOST_BYTES:
                raise NoAnswer(f"the answer is too large: more than {self.MOST_BYTES} bytes")
            while len(received) < end + 2 + size + 2:
                if not self._more(received, until):
                    raise NoAnswer("the answer was cut off")
            body += received[end + 2 : end + 2 + size]
            del received[: end + 2 + size + 2]  # else all of it would be kept twice
            if size == 0:
                return bytes(body)


def _document(status: int, body: bytes) -> Any:
    try:
        return json.loads(body) if status == 200 else None
    except (ValueError, RecursionError):
        return None


class _ClosedBefore(Exception):
    """The connection ended before the first byte of an answer."""


def _left(until: float) -> float:
    left = until - time.monotonic()
    if left <= 0.0:
        raise TimeoutError
    return left


def _look_up(host: str, port: int, until: float) -> list[Any]:
    """What `socket.getaddrinfo` finds; raises OSError, or NoAnswer when the time is over: that may take it a minute."""
    with contextlib.suppress(OSError):  # an address asks nobody
        return socket.getaddrinfo(host, port, type=socket.SOCK_STREAM, flags=socket.AI_NUMERICHOST)
    found: queue.SimpleQueue[Any] = queue.SimpleQueue()

    def look_up() -> None:
        try:
            found.put(socket.getaddrinfo(host, port, type=socket.SOCK_STREAM))
        except Exception as error:
            found.put(error)

    threading.Thread(target=look_up, name="elrar-name", daemon=True).start()
    try:
        answer = found.get(timeout=_left(until))
    except queue.Empty:
        raise NoAnswer(f"its name {host!r} cannot be looked up in time") from None
    if isinstance(answer, Exception):
        raise answer
    return list(answer)


def _is_loopback(host: str) -> bool:
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host.lower() == "localhost"


def _tls_for(host: str, ca_file: str | None) -> ssl.SSLContext:
    context = ssl.create_default_context(cafile=ca_file)
    if _is_loopback(host) and ca_file is None:
        # Nobody stands between, and no certificate is made out for the loopback.
        context.check_hostname = False
        context.verify_mode = ssl.CERT_NONE
    return context


class Page:
    """Some metrics of a page in Prometheus' text format: only lines of the names asked for are looked at."""

    def __init__(self, pattern: re.Pattern[bytes], page: bytes) -> None:
        self._samples: dict[bytes, list[tuple[bytes, float]]] = {}
        for name, labels, text in pattern.findall(page):
            with contextlib.suppress(ValueError):
                value = float(text)
                if math.isfinite(value):
                    self._samples.setdefault(name, []).append((labels, value))

    @staticmethod
    def pattern(names: Iterable[str]) -> re.Pattern[bytes]:
        """What finds the lines of these names."""
        wanted = b"|".join(re.escape(name.encode()) for name in names)
        return re.compile(rb"^(%b)(?:\{([^\n]*)\})?[ \t]+([^\s]+)" % wanted, re.MULTILINE)

    def has(self, name: str) -> bool:
        """Whether there is a sample of that name."""
        return name.encode() in self._samples

    def total(self, name: str) -> float | None:
        """The sum of all samples, or None."""
        samples = self._samples.get(name.encode())
        return None if not samples else sum(value for _, value in samples)

    def need(self, name: str) -> float:
        """The sum of all samples; raises NoNumbers."""
        found = self.total(name)
        if found is None:
            raise NoNumbers(f"its metrics have no {name} (yet)")
        return found

    def by(self, label: str, name: str, **where: str) -> dict[str, float]:
        """The samples by the value of a label, of those whose other labels are as said; one of a value counts."""
        found = {}
        for labels, value in self._samples.get(name.encode(), ()):
            if all(label_of(labels, other) == wanted for other, wanted in where.items()):
                found[label_of(labels, label) or ""] = value
        return found

    def labels(self, name: str) -> list[bytes]:
        """The labels of each sample, as they are written."""
        return [labels for labels, _ in self._samples.get(name.encode(), ())]

    def counted(self, name: str) -> Counted | None:
        """Sum and count of a histogram or summary, or None."""
        total, times = self.total(f"{name}_sum"), self.total(f"{name}_count")
        return None if total is None or times is None else Counted(total, times)


def label_of(labels: bytes, name: str) -> str | None:
    """The value of one label, or None."""
    found = re.search(rb'(?:^|,)%b="((?:[^"\\]|\\.)*)"' % name.encode(), labels)
    return None if found is None else found[1].decode("utf-8", "replace")


# ---------------------------------------------------------------------------------------------------------------------
# Beside an engine: one adapter for each kind
# ---------------------------------------------------------------------------------------------------------------------


class Adapter:
    """How one kind of engine is asked. `look` raises NoAnswer; what an engine does not say is unknown, and never 0."""

    kind = ""
    prefixes: tuple[bytes, ...] = ()  # of its metrics' names
    owner = ""  # what /v1/models says of whom a model is
    # For --check: where each field comes from and how exact it is, and what else would help.
    sources: ClassVar[Mapping[str, str]] = {}
    hints: tuple[str, ...] = ()

    def __init__(self, client: EngineClient) -> None:
        self.client = client
        self.model: str | None = None
        self.version = "unknown"

    def describe(self) -> None:
        """Find out model and version, as far as that can be had; raises NoAnswer."""
        self.model = _model_of(self.client.json("/v1/models")) or self.model

    def look(self, at: Callable[[], Proof]) -> Look:
        """Look once; `at` tells the time, and is asked when the answer is there."""
        raise NotImplementedError

    def missing(self) -> tuple[str, ...]:
        """Which of the hints would help with what was not found."""
        return self.hints


def _model_of(document: Any) -> str | None:
    try:
        name = document["data"][0]["id"]
    except (TypeError, KeyError, IndexError):
        return None
    return name[:256] if isinstance(name, str) and name.isprintable() else None


def _owner_of(document: Any) -> str:
    try:
        return str(document["data"][0]["owned_by"]).lower()
    except (TypeError, KeyError, IndexError):
        return ""


def _text_in(document: Any, *names: str) -> str | None:
    for name in names:
        found = document.get(name) if isinstance(document, dict) else None
        if isinstance(found, str) and 0 < len(found) <= 256 and found.isprintable():
            return found
    return None


def _number_in(document: Mapping[str, Any], name: str) -> float | None:
    found = document.get(name)
    if isinstance(found, bool) or not isinstance(found, (int, float)) or not math.isfinite(found):
        return None
    return float(found)


def _metrics(client: EngineClient, path: str) -> bytes:
    """A page of metrics; raises NoAnswer if it is none."""
    status, page = client.get(path)
    if status != 200:
        raise NoAnswer(f"{path.split('?')[0]} is answered with {status}")
    if page[:200].lstrip()[:1] == b"<":
        raise NoAnswer(f"{path.split('?')[0]} is answered with a web page")
    return page


class LoadTracking:
    """Whether vLLM's /load counts the requests in its front end: with --enable-server-load-tracking only.

    Without it 0 is said for ever, so that it is known as soon as the engine is busy.
    """

    UNKNOWN_EVERY_S = 0.3  # while the engine is idle: a hang is seen in time all the same

    def __init__(self) -> None:
        self.counts: bool | None = None
        self._asked_at = -math.inf
        self._busy_zeros = 0  # answers while the engine was busy

    def is_due_if_idle(self, now: float) -> bool:
        """Whether this look asks, should the engine be idle."""
        return bool(self.counts) or (self.counts is None and now - self._asked_at >= self.UNKNOWN_EVERY_S)

    def is_due(self, busy: bool, ranks: int, now: float) -> bool:
        """Whether this look asks."""
        if self.counts is None:
            return busy or self.is_due_if_idle(now)
        if self.counts is False:
            return now - self._asked_at >= 60.0
        return not busy or ranks > 1

    def learn(self, busy: bool, look: Look) -> None:
        """Take in what was answered; if that means nothing, it is taken out of the look."""
        self._asked_at = look.at.at
        if look.in_flight:
            self.counts = True
        elif busy and self.counts is None:
            # Not tracked, or another API server has them all; it is asked again. Once may be a request that just ended.
            self._busy_zeros += 1
            self.counts = False if self._busy_zeros > 1 else None
        if self.counts is False:
            look.in_flight = None


class VllmAdapter(Adapter):
    """vLLM beside a sidecar. Its filtered page costs it a sixth of the whole one; with several API servers it is empty.

    Its gauges stand still when the engine does, so that only counters that grow prove anything.
    """

    kind = "vllm"
    prefixes = (b"vllm:",)
    owner = "vllm"
    sources: ClassVar[Mapping[str, str]] = {
        "latency_pred_ms": "vllm:inter_token_latency_seconds, mean since the last look",
        "scheduling_mode": "vllm:iteration_tokens_total, mean of the last steps",
        "pending_tokens_total": "vllm:num_requests_waiting x mean prompt of the last minute: an estimate",
        "kv_cache_free_blocks": "vllm:kv_cache_usage_perc, exact",
        "kv_cache_total_blocks": "vllm:cache_config_info, exact",
        "engine_capacity": "vllm:iteration_tokens_total, greatest rate of a second with requests waiting",
        "num_requests_running": "vllm:num_requests_running",
        "num_requests_waiting": "vllm:num_requests_waiting",
    }
    hints = (
        "--enable-server-load-tracking: a hang from idle cannot be seen without it, nor with several API servers",
        "--disable-access-log-for-endpoints /metrics,/metrics/,/load: each look is a line of its access log",
        "the plugin (--install-plugin): pending tokens exact to a percent, changes within 20 ms instead of a look",
    )
    MOVING = (
        *("vllm:num_requests_running", "vllm:num_requests_waiting"),
        *("vllm:kv_cache_usage_perc", "vllm:gpu_cache_usage_perc"),
        *("vllm:iteration_tokens_total_sum", "vllm:iteration_tokens_total_count"),
        *("vllm:inter_token_latency_seconds_sum", "vllm:inter_token_latency_seconds_count"),
        *("vllm:time_per_output_token_seconds_sum", "vllm:time_per_output_token_seconds_count"),  # before 0.12
        *("vllm:request_prompt_tokens_sum", "vllm:request_prompt_tokens_count", "vllm:engine_sleep_state"),
    )
    # Enough while the engine is idle, and half as dear; every STATIC_EVERY_S and FULL_EVERY_S more is asked for.
    IDLE = (*MOVING[:4], "vllm:engine_sleep_state")
    FULL_EVERY_S = 2.0
    PAGE_EVERY_S = 0.5  # at least: /load alone does not show that it fell asleep
    STATIC = ("vllm:cache_config_info",)
    STATIC_EVERY_S = 10.0  # a kilobyte that hardly ever changes
    # Its gauges go on for seconds after its core died, and read idle; /health knows.
    HEALTH_EVERY_S = 1.0

    def __init__(self, client: EngineClient) -> None:
        super().__init__(client)
        self._pattern = Page.pattern(self.MOVING + self.STATIC)
        self._filtered = True
        self._idle = False  # at the last look
        # What was idle is asked for the requests of its front end alone for some turns: that costs half.
        self._idle_look: Look | None = None
        self._full_at = -math.inf
        self._static_at = -math.inf
        self._blocks: int | None = None
        self._ranks = 0
        self._steps: dict[str, Counted | None] = {}  # of each rank, at the last look at all
        self._left_alone: tuple[float, dict[str, Counted | None]] | None = None  # when requests were, and these steps
        self.tracking = LoadTracking()
        self._health_asked_at = -math.inf
        self._ahead: dict[str, tuple[int, bytes]] = {}  # answers of this look that were asked for in advance

    def describe(self) -> None:
        """See Adapter."""
        self.version = _text_in(self.client.json("/version"), "version") or self.version
        if self.model is None:
            super().describe()

    def missing(self) -> tuple[str, ...]:
        """See Adapter."""
        return self.hints if self.tracking.counts is not True else self.hints[1:]

    def look(self, at: Callable[[], Proof]) -> Look:
        """See Adapter."""
        now = time.monotonic()
        look, self._idle_look = self._idle_look, None
        load = None
        if look is not None and now - look.at.at < self.PAGE_EVERY_S:
            load = self._load()
            if load == 0:
                self._idle_look = look
                return Look(look.readings, at(), 0, lacks_ranks=look.lacks_ranks)
        look = None
        self._ahead.clear()
        asked_at = None
        if self._idle and self._filtered:
            whole = bool(load) or now - self._full_at >= self.FULL_EVERY_S
            names = self._all_names(now) if whole else self.IDLE
            asked_at = at()  # the page is that old at most
            self._ask_ahead(names, now)
            if not whole:
                look = self._look(self._filtered_page(names), asked_at)
                asked_at = None
        if look is None or not _is_idle(look):
            look = self._look(self._page(now), asked_at or at())
            self._full_at = now
        idle = _is_idle(look)
        if idle and now - self._health_asked_at >= self.HEALTH_EVERY_S:
            self._health_asked_at = now
            self._must_be_healthy()
        if self.tracking.is_due(not idle, len(look.readings), now):
            look.in_flight = self._load()
            self.tracking.learn(not idle, look)
        if idle and look.in_flight:
            self._left_alone = (now, dict(self._steps))
        elif self._left_alone is not None:
            at_s, steps = self._left_alone
            if self._steps != steps or now - at_s >= Prover.FORGIVEN_AFTER_S:
                self._left_alone = None
        # As long as a request was left alone, a single step is to be seen with the next look.
        self._idle = idle and not look.in_flight and self._left_alone is None
        # Without tracking, 0 says nothing.
        self._idle_look = (
            look if self.tracking.counts and self._idle and not look.asleep and look.in_flight == 0 else None
        )
        return look

    def _ask_ahead(self, names: Iterable[str], now: float) -> None:
        """Ask at once for what is needed if the engine is idle, as it was: it costs it less."""
        paths = [self._filter(names)]
        if now - self._health_asked_at >= self.HEALTH_EVERY_S:
            paths.append("/health")
        if self.tracking.is_due_if_idle(now):
            paths.append("/load")
        self._ahead = dict(zip(paths, self.client.get_all(*paths), strict=True))

    def _all_names(self, now: float) -> tuple[str, ...]:
        return self.MOVING + (self.STATIC if now - self._static_at >= self.STATIC_EVERY_S else ())

    def _get(self, path: str) -> tuple[int, bytes]:
        return self._ahead.pop(path, None) or self.client.get(path)

    def _must_be_healthy(self) -> None:
        status, _ = self._get("/health")
        if status >= 500:
            self._health_asked_at = -math.inf  # until it says something else, each look asks
            raise NoAnswer(f"/health is answered with {status}")

    def _load(self) -> int | None:
        document = _document(*self._get("/load"))
        found = _number_in(document, "server_load") if isinstance(document, dict) else None
        return None if found is None else int(found)

    @staticmethod
    def _filter(names: Iterable[str]) -> str:
        return "/metrics/?" + "&".join(f"name%5B%5D={name}" for name in names)

    def _filtered_page(self, names: Iterable[str]) -> Page:
        status, text = self._get(self._filter(names))
        return Page(self._pattern, text if status == 200 else b"")

    def _page(self, now: float) -> Page:
        if self._filtered:
            page = self._filtered_page(self._all_names(now))
            if self._says_load(page):
                self._learn_static(page, now)
                return page
        page = Page(self._pattern, _metrics(self.client, "/metrics"))
        if self._says_load(page):
            self._filtered = False  # the whole page says more than the filtered one: several API servers
            self._learn_static(page, now)
        return page

    @staticmethod
    def _says_load(page: Page) -> bool:
        return page.has("vllm:num_requests_running") or page.has("vllm:iteration_tokens_total_count")

    def _learn_static(self, page: Page, now: float) -> None:
        found = page.labels("vllm:cache_config_info")
        if not found:
            return
        self._static_at = now
        blocks = label_of(found[0], "num_gpu_blocks") or ""
        ranks = {label_of(labels, "engine") for labels in found}
        self._ranks = len(ranks)
        # Each label of several ranks says the sum of all.
        self._blocks = int(blocks) // len(ranks) - 1 if blocks.isdecimal() and int(blocks) > 0 else None
        running = page.labels("vllm:num_requests_running")
        self.model = (label_of(running[0], "model_name") if running else None) or self.model

    def _look(self, page: Page, at: Proof) -> Look:
        running = page.by("engine", "vllm:num_requests_running")
        waiting = page.by("engine", "vllm:num_requests_waiting")
        usage = page.by("engine", "vllm:kv_cache_usage_perc") or page.by("engine", "vllm:gpu_cache_usage_perc")
        awake = page.by("engine", "vllm:engine_sleep_state", sleep_state="awake")
        columns = {name: page.by("engine", name) for name in self.MOVING if name.endswith(("_sum", "_count"))}
        for engine, steps_made in columns["vllm:iteration_tokens_total_count"].items():
            # With several API servers a rank has gauges from its first step on, and none before. A counter that says 0
            # steps proves that nothing ran yet and that every block is free; without that proof it stays unknown.
            if steps_made == 0 and engine not in running and engine not in waiting:
                running[engine] = waiting[engine] = usage[engine] = 0.0
        if not running:
            page.need("vllm:num_requests_running")  # raises
        readings = []
        for number, engine in enumerate(sorted(running, key=lambda one: (len(one), one))):
            if engine not in waiting:
                raise NoNumbers("its metrics have no vllm:num_requests_waiting (yet)")

            def counted(name: str, engine: str = engine) -> Counted | None:
                total, times = columns[f"vllm:{name}_sum"].get(engine), columns[f"vllm:{name}_count"].get(engine)
                return None if total is None or times is None else Counted(total, times)

            steps = counted("iteration_tokens_total")
            if steps is not None:
                self._steps[engine] = steps
            total = -1 if self._blocks is None else self._blocks
            used = usage.get(engine)
            readings.append(
                Reading(
                    int(running[engine]),
                    int(waiting[engine]),
                    marker=(self._steps.get(engine), running[engine], waiting[engine]),
                    rank=int(engine) if engine.isdecimal() and len(engine) < 6 else number,
                    free=-1 if used is None or total < 0 else round((1.0 - min(max(used, 0.0), 1.0)) * total),
                    total=total,
                    prompts=counted("request_prompt_tokens"),
                    step_times=counted("inter_token_latency_seconds") or counted("time_per_output_token_seconds"),
                    step_tokens=steps,
                    tokens=None if steps is None else steps.total,
                )
            )
        lacks_ranks = len(readings) < self._ranks  # the others say nothing of themselves
        return Look(readings, at, asleep=bool(awake) and not any(awake.values()), lacks_ranks=lacks_ranks)


def _is_idle(look: Look) -> bool:
    return not any(reading.running + reading.waiting for reading in look.readings)


class SglangAdapter(Adapter):
    """SGLang's /v1/loads: each rank's scheduler says itself when it said so, busy or idle."""

    kind = "sglang"
    prefixes = (b"sglang:", b"sglang_")
    owner = "sglang"
    sources: ClassVar[Mapping[str, str]] = {
        "latency_pred_ms": "decode_moments of /v1/loads, mean since the last look",
        "scheduling_mode": "prefilled and decoded tokens a decode step",
        "pending_tokens_total": "num_waiting_uncached_tokens, exact",
        "kv_cache_free_blocks": "max_total_num_tokens less num_used_tokens, in pages",
        "kv_cache_total_blocks": "max_total_num_tokens, in pages",
        "engine_capacity": "greatest rate of a second with requests waiting",
        "num_requests_running": "num_running_reqs",
        "num_requests_waiting": "num_waiting_reqs",
    }

    def __init__(self, client: EngineClient) -> None:
        super().__init__(client)
        self._page_size = 1
        self._sleeps_on_idle = False

    def describe(self) -> None:
        """See Adapter."""
        info = self.client.json("/server_info") or self.client.json("/get_server_info")
        self.version = _text_in(info, "version") or self.version
        self.model = _text_in(info, "served_model_name", "model_path") or self.model
        if isinstance(info, dict):
            size = _number_in(info, "page_size")
            self._page_size = int(size) if size and size >= 1 else 1
            self._sleeps_on_idle = info.get("sleep_on_idle") is True
        if self.model is None:
            super().describe()

    def look(self, at: Callable[[], Proof]) -> Look:
        """See Adapter."""
        status, body = self.client.get("/v1/loads?include=core")
        now = at()
        if status in (401, 403):
            raise NoNumbers("/v1/loads asks for the API key: set ENGINE_API_KEY")
        try:
            document = json.loads(body) if status == 200 else None
            self.version = _text_in(document, "version") or self.version
            loads = [self._reading(load, now) for load in document["loads"]]  # type: ignore[index]
        except (ValueError, TypeError, KeyError, AttributeError, RecursionError):
            raise NoNumbers(f"/v1/loads is answered with {status}, and not with loads") from None
        if not loads:
            raise NoNumbers("/v1/loads has no loads (yet)")
        return Look(loads, now)

    def _reading(self, load: dict[str, Any], now: Proof) -> Reading:
        running, waiting = int(load["num_running_reqs"]), int(load["num_waiting_reqs"])
        said_s = _number_in(load, "timestamp")
        most, used = _number_in(load, "max_total_num_tokens"), _number_in(load, "num_used_tokens")
        prefilled, moments = _number_in(load, "total_prefill_uncached_tokens"), load.get("decode_moments")
        steps = tokens = None
        if isinstance(moments, list) and len(moments) >= 6:  # steps, batch, microseconds, batch^2, batch x us, tokens
            steps = Counted(moments[2] / 1e6, moments[0])
            tokens = None if prefilled is None else prefilled + moments[5]
        uncached = _number_in(load, "num_waiting_uncached_tokens")
        reading = Reading(
            running,
            waiting,
            marker=tuple(sorted((name, str(value)) for name, value in load.items())),
            rank=int(load.get("dp_rank") or 0),
            pending=None if uncached is None else int(uncached),
            step_times=steps,
            step_tokens=None if steps is None or tokens is None else Counted(tokens, steps.times),
            tokens=tokens,
        )
        if most is not None and most > 0:
            reading.total = int(most) // self._page_size
            reading.free = -1 if used is None else max(0, int(most - used)) // self._page_size
        if said_s is not None:
            if said_s <= 0:
                raise KeyError("timestamp")  # nothing was said yet
            age_s = now.ms / 1000 - said_s
            reading.marker = said_s
            if 0.0 <= age_s <= 5.0:  # of a host whose clock is ours
                reading.proof = Proof(now.at - age_s, round(said_s * 1000))
            # With --sleep-on-idle a scheduler says so once a second, else all the time.
            reading.idle_is_proof = self._sleeps_on_idle and 0.0 <= age_s < 1.5
        return reading


class LlamaCppAdapter(Adapter):
    """llama.cpp's server: what answers is its main loop, so that each answer is a proof that it moves."""

    kind = "llama.cpp"
    prefixes = (b"llamacpp:",)
    owner = "llamacpp"
    sources: ClassVar[Mapping[str, str]] = {
        "latency_pred_ms": "llamacpp:tokens_predicted_seconds_total, a token, as requests end",
        "scheduling_mode": "tokens a decode, by its counters and /slots",
        "pending_tokens_total": "/slots, exact; and llamacpp:requests_deferred x mean prompt of the slots",
        "kv_cache_free_blocks": "/slots, in tokens",
        "kv_cache_total_blocks": "/slots: sum of n_ctx, in tokens",
        "engine_capacity": "greatest rate of a second with requests waiting",
        "num_requests_running": "llamacpp:requests_processing",
        "num_requests_waiting": "llamacpp:requests_deferred",
    }
    hints = (
        "--metrics: without it waiting requests cannot be known, and nothing is sent",
        "--slots: without it pending tokens, the KV cache and the capacity are not known",
    )
    NAMES = (
        *("llamacpp:requests_processing", "llamacpp:requests_deferred"),
        *("llamacpp:prompt_tokens_total", "llamacpp:tokens_predicted_total", "llamacpp:n_decode_total"),
        "llamacpp:tokens_predicted_seconds_total",
    )
    EXACT = 10_000_000  # It writes six digits: above, the growth of a second is lost in rounding.

    def __init__(self, client: EngineClient) -> None:
        super().__init__(client)
        self._pattern = Page.pattern(self.NAMES)
        self._has_slots = True
        self._mean_prompt = 0.0

    def describe(self) -> None:
        """See Adapter."""
        super().describe()
        self.version = _text_in(self.client.json("/props"), "build_info") or self.version

    def missing(self) -> tuple[str, ...]:
        """See Adapter."""
        return () if self._has_slots else self.hints[1:]

    def look(self, at: Callable[[], Proof]) -> Look:
        """See Adapter."""
        page = Page(self._pattern, _metrics(self.client, "/metrics"))
        now = at()
        waiting = int(page.need("llamacpp:requests_deferred"))
        reading = Reading(int(page.need("llamacpp:requests_processing")), waiting, marker=now.at)
        prompt, predicted = page.total("llamacpp:prompt_tokens_total"), page.total("llamacpp:tokens_predicted_total")
        decodes = page.total("llamacpp:n_decode_total")
        seconds = page.total("llamacpp:tokens_predicted_seconds_total")
        if seconds is not None and predicted is not None:
            reading.step_times = Counted(seconds, predicted)
        slots = self.client.json("/slots") if self._has_slots else None
        self._has_slots = isinstance(slots, list)
        if isinstance(slots, list):
            decoded = self._read_slots(reading, [one for one in slots if isinstance(one, dict)])
            if prompt is not None and predicted is not None and prompt + predicted < self.EXACT:
                # What was decoded is counted when its request ends; until then its slot knows.
                reading.tokens = prompt + predicted + decoded
                reading.step_tokens = None if decodes is None else Counted(reading.tokens, decodes)
        return Look([reading], now)

    def _read_slots(self, reading: Reading, slots: Sequence[dict[str, Any]]) -> int:
        """Put down what the slots say; returns how many tokens were decoded for requests that are not over."""
        total = used = pending = decoding = 0
        prompts = []
        for slot in slots:
            total += int(_number_in(slot, "n_ctx") or 0)
            if slot.get("is_processing") is not True:
                continue  # it keeps the numbers of its last request
            prompt = int(_number_in(slot, "n_prompt_tokens") or 0)
            done = int(
                (_number_in(slot, "n_prompt_tokens_processed") or 0) + (_number_in(slot, "n_prompt_tokens_cache") or 0)
            )
            following = slot.get("next_token")
            following = following[0] if isinstance(following, list) and following else following
            decoded = int(_number_in(following, "n_decoded") or 0) if isinstance(following, dict) else 0
            decoding += decoded
            used += max(prompt, done + decoded)
            if decoded == 0:
                pending += max(0, prompt - done)
                prompts.append(prompt)
            else:
                prompts.append(done)  # what is decoded is counted as prompt by then
        if prompts:
            self._mean_prompt = sum(prompts) / len(prompts)
        reading.pending = pending + round(reading.waiting * self._mean_prompt)
        if total > 0:
            reading.total, reading.free = total, max(0, total - used)
        return decoding


class MetricsAdapter(Adapter):
    """An engine that is known by one page of metrics: the names of what it says are all that differs."""

    path = "/metrics"
    running: tuple[str, ...] = ()
    waiting: tuple[str, ...] = ()
    prompts: tuple[str, str] | str | None = None  # a histogram, or the names of a sum and a count
    step_times: str | None = None  # a histogram of seconds
    step_seconds: str | None = None  # a gauge of the last step's
    step_tokens: str | None = None  # a histogram
    last_step_tokens: tuple[str, ...] = ()  # gauges of the last step
    tokens: tuple[str, ...] = ()  # counters
    rate_s = 1.0  # see Reading
    blocks: tuple[str, str] | None = None  # gauges of free and of all blocks
    steps_gauges: tuple[str, ...] = ()  # gauges that a step sets, and nothing else: they prove that it moves, too
    more: tuple[str, ...] = ()  # what else is read

    def __init__(self, client: EngineClient) -> None:
        super().__init__(client)
        histograms = (self.step_times, self.step_tokens, self.prompts if isinstance(self.prompts, str) else None)
        names = {f"{name}_{part}" for name in histograms if name for part in ("sum", "count")}
        names |= {*self.running, *self.waiting, *self.last_step_tokens, *self.tokens, *(self.blocks or ())}
        names |= {*self.steps_gauges, *self.more}
        names |= {self.step_seconds or "", *(self.prompts if isinstance(self.prompts, tuple) else ())} - {""}
        self._pattern = Page.pattern(sorted(names))
        self._last_steps = Counted(0.0, 0)

    def look(self, at: Callable[[], Proof]) -> Look:
        """See Adapter."""
        page = Page(self._pattern, _metrics(self.client, self.path))
        now = at()
        running = waiting = 0
        if not self.is_untouched(page):
            running = int(sum(map(page.need, self.running)))
            waiting = int(page.need(self.waiting[0]) + sum(page.total(name) or 0.0 for name in self.waiting[1:]))
        tokens = [page.total(name) for name in self.tokens]
        reading = Reading(running, waiting, rate_s=self.rate_s)
        reading.tokens = None if None in tokens else sum(one or 0.0 for one in tokens)
        reading.step_times = page.counted(self.step_times) if self.step_times else None
        reading.step_tokens = page.counted(self.step_tokens) if self.step_tokens else None
        if isinstance(self.prompts, str):
            reading.prompts = page.counted(self.prompts)
        elif self.prompts is not None:
            total, times = map(page.total, self.prompts)
            reading.prompts = None if total is None or times is None else Counted(total, times)
        if self.step_seconds is not None:
            seconds = page.total(self.step_seconds)
            reading.step_ms = None if seconds is None or running == 0 else 1000 * seconds
        # No gauges of a queue: they move while the engine stands still.
        steps = tuple(page.total(name) for name in self.steps_gauges)
        reading.marker = (reading.tokens, reading.step_times, reading.step_tokens, reading.prompts, steps)
        last = [page.total(name) for name in self.last_step_tokens]
        if last and running and None not in last:
            self._last_steps = Counted(
                self._last_steps.total + sum(one or 0.0 for one in last), self._last_steps.times + 1
            )
            reading.step_tokens = self._last_steps
        if self.blocks is not None:
            free, total_blocks = map(page.total, self.blocks)
            reading.free = -1 if free is None else int(free)
            reading.total = -1 if total_blocks is None else int(total_blocks)
        self.add(reading, page)
        return Look([reading], now)

    def is_untouched(self, page: Page) -> bool:
        """Whether the page proves that no request ever came, though it has no gauges yet."""
        return False

    def add(self, reading: Reading, page: Page) -> None:
        """What is particular to the kind."""


class TensorRtAdapter(MetricsAdapter):
    """TensorRT-LLM's Prometheus page. Not its other one: a reader of that takes it away from another."""

    kind = "tensorrt-llm"
    prefixes = (b"trtllm_",)
    owner = "tensorrt_llm"
    sources: ClassVar[Mapping[str, str]] = {
        "latency_pred_ms": "trtllm_iteration_latency_seconds, the last step",
        "scheduling_mode": "trtllm_total_context_tokens + trtllm_num_generation_requests of the steps that were seen",
        "pending_tokens_total": "trtllm_num_requests_waiting x mean prompt of the last minute: an estimate",
        "kv_cache_free_blocks": "trtllm_kv_cache_free_blocks",
        "kv_cache_total_blocks": "trtllm_kv_cache_max_blocks",
        "engine_capacity": "tokens of requests that ended, greatest rate of 30 s with requests waiting",
        "num_requests_running": "trtllm_num_requests_running",
        "num_requests_waiting": "trtllm_num_requests_waiting",
    }
    hints = (
        "enable_iter_perf_stats: true and return_perf_metrics: true: without them its page has no numbers",
        "a first request, such as a readiness probe that completes a token: its page has no numbers before",
    )
    path = "/prometheus/metrics"
    running = ("trtllm_num_requests_running",)
    waiting = ("trtllm_num_requests_waiting",)
    prompts = ("trtllm_prompt_tokens_total", "trtllm_request_success_total")
    step_seconds = "trtllm_iteration_latency_seconds"
    last_step_tokens = ("trtllm_total_context_tokens", "trtllm_num_generation_requests")
    tokens = ("trtllm_prompt_tokens_total", "trtllm_generation_tokens_total")
    rate_s = 30.0
    blocks = ("trtllm_kv_cache_free_blocks", "trtllm_kv_cache_max_blocks")
    # Its counters move only when a request ends, which may take minutes.
    steps_gauges = ("trtllm_iteration_latency_seconds", "trtllm_kv_cache_used_blocks", *last_step_tokens)

    def describe(self) -> None:
        """See Adapter."""
        super().describe()
        self.version = _text_in(self.client.json("/version"), "version") or self.version


class TgiAdapter(MetricsAdapter):
    """Text Generation Inference. While a batch is prefilled it is in no gauge: what began and did not end tells."""

    kind = "tgi"
    prefixes = (b"tgi_",)
    sources: ClassVar[Mapping[str, str]] = {
        "latency_pred_ms": "tgi_request_mean_time_per_token_duration, of requests that ended since the last look",
        "scheduling_mode": "not known: latency_optimized",
        "pending_tokens_total": "tgi_queue_size x mean prompt of the last minute: an estimate",
        "kv_cache_free_blocks": "tgi_batch_current_max_tokens of the total, in tokens: what is set aside",
        "kv_cache_total_blocks": "tgi_batch_max_total_tokens, or max_batch_total_tokens of /info, in tokens",
        "engine_capacity": "tokens of requests that ended, greatest rate of 30 s with requests waiting",
        "num_requests_running": "tgi_batch_current_size",
        "num_requests_waiting": "tgi_queue_size",
    }
    running = ("tgi_batch_current_size",)
    waiting = ("tgi_queue_size",)
    prompts = "tgi_request_input_length"
    step_times = "tgi_request_mean_time_per_token_duration"
    tokens = ("tgi_request_input_length_sum", "tgi_request_generated_tokens_sum")
    rate_s = 30.0
    more = (
        *("tgi_batch_current_max_tokens", "tgi_batch_max_total_tokens"),
        *("tgi_request_count", "tgi_batch_forward_duration_count"),
        *("tgi_batch_inference_count", "tgi_batch_inference_success", "tgi_batch_inference_failure"),
    )

    def __init__(self, client: EngineClient) -> None:
        super().__init__(client)
        self._total: int | None = None

    def describe(self) -> None:
        """See Adapter."""
        info = self.client.json("/info")
        self.model = _text_in(info, "model_id") or self.model
        self.version = _text_in(info, "version") or self.version
        total = _number_in(info, "max_batch_total_tokens") if isinstance(info, dict) else None
        self._total = int(total) if total is not None and total > 0 else None

    def is_untouched(self, page: Page) -> bool:
        """See MetricsAdapter. A metric is on its page from its first value on; that of all tokens from the start."""
        if self._total is None and not page.has("tgi_batch_max_total_tokens"):
            return False  # of another backend, or not its page
        return not any(map(page.has, ("tgi_request_count", *self.running, *self.waiting)))

    def add(self, reading: Reading, page: Page) -> None:
        """See MetricsAdapter."""
        began = page.total("tgi_batch_inference_count")
        ended = sum(page.total(f"tgi_batch_inference_{end}") or 0.0 for end in ("success", "failure"))
        # Steps, which move long before a request ends.
        reading.marker = (began, ended, page.total("tgi_batch_forward_duration_count"), reading.marker)
        if began is not None and 0 < ended < began:
            reading.running = max(1, reading.running)
        used = page.total("tgi_batch_current_max_tokens")
        total = page.total("tgi_batch_max_total_tokens") or self._total
        if total:
            reading.total = int(total)
            if self.is_untouched(page):
                used = 0.0
            reading.free = -1 if used is None else max(0, int(total - used))


class LmdeployAdapter(MetricsAdapter):
    """LMDeploy. It says what part of its KV cache is used, not of how much: the blocks stay unknown.

    Behind a load it says for up to 10 s that requests run, while nothing moves: that is `stuck` for so long.
    """

    kind = "lmdeploy"
    prefixes = (b"lmdeploy:",)
    owner = "lmdeploy"
    sources: ClassVar[Mapping[str, str]] = {
        "latency_pred_ms": "lmdeploy:time_per_output_token_seconds, mean since the last look",
        "scheduling_mode": "lmdeploy:iteration_tokens_total, mean of the last steps",
        "pending_tokens_total": "waiting requests x mean prompt of the last minute: an estimate",
        "kv_cache_free_blocks": "not known: it does not say of how many blocks",
        "kv_cache_total_blocks": "not known",
        "engine_capacity": "greatest rate of a second with requests waiting",
        "num_requests_running": "lmdeploy:num_requests_running, renewed every 10 s; at least 1 while tokens come",
        "num_requests_waiting": "lmdeploy:num_requests_waiting + lmdeploy:num_api_requests_waiting, every 10 s",
    }
    running = ("lmdeploy:num_requests_running",)
    waiting = ("lmdeploy:num_requests_waiting", "lmdeploy:num_api_requests_waiting")
    prompts = "lmdeploy:request_prompt_tokens"
    step_times = "lmdeploy:time_per_output_token_seconds"
    step_tokens = "lmdeploy:iteration_tokens_total"
    tokens = ("lmdeploy:prompt_tokens_total", "lmdeploy:generation_tokens_total")

    def __init__(self, client: EngineClient) -> None:
        super().__init__(client)
        self._tokens: float | None = None  # at the last look

    def add(self, reading: Reading, page: Page) -> None:
        """See MetricsAdapter. Its gauges are renewed every 10 s, its counters at once."""
        if self._tokens is not None and reading.tokens != self._tokens:
            reading.running = max(1, reading.running)
        self._tokens = reading.tokens


ADAPTERS: tuple[type[Adapter], ...] = (
    VllmAdapter,
    SglangAdapter,
    LlamaCppAdapter,
    TensorRtAdapter,
    TgiAdapter,
    LmdeployAdapter,
)


def find_adapter(client: EngineClient) -> Adapter:
    """Find out which kind of engine answers; raises NoAnswer."""
    statuses = []
    for path in ("/metrics", "/prometheus/metrics"):
        status, page = client.get(path)
        statuses.append(f"{path}: {status}")
        if status == 200:
            for kind in ADAPTERS:
                wanted = b"|".join(map(re.escape, kind.prefixes))
                if re.search(rb"^(?:# (?:HELP|TYPE) )?(?:%b)" % wanted, page, re.MULTILINE):
                    return kind(client)
    loads = client.json("/v1/loads?include=core")
    if isinstance(loads, dict) and isinstance(loads.get("loads"), list):
        return SglangAdapter(client)
    if _text_in(client.json("/info"), "router") == "text-generation-router":
        return TgiAdapter(client)  # before 3.0 its page is empty until the first request
    status, models = client.get("/v1/models")
    statuses.append(f"/v1/models: {status}")
    with contextlib.suppress(ValueError, RecursionError):
        owner = _owner_of(json.loads(models))
        for kind in ADAPTERS:
            if kind.owner and kind.owner in owner:
                return kind(client)
    kinds = ", ".join(kind.kind for kind in ADAPTERS)
    raise NoAnswer(f"it is none of the engines that are known ({kinds}): {', '.join(statuses)}")


class EngineWatch:
    """Looks at one engine, whatever it is, again and again. For one thread."""

    DESCRIBE_EVERY_S = 60.0
    FIND_EVERY_S = 1.0  # several questions, to whatever is there

    def __init__(self, client: EngineClient, clock: Clock = time.monotonic, wall_clock: Clock = time.time) -> None:
        self.adapter: Adapter | None = None
        self._client = client
        self._clock = clock
        self._wall_clock = wall_clock
        self._described_at = -math.inf
        self._unknown: tuple[float, NoAnswer] | None = None  # when it was none that is known, and what was said

    def now(self) -> Proof:
        """The time, by both clocks."""
        return Proof(self._clock(), int(self._wall_clock() * 1000))

    def look(self) -> Look:
        """Look once; raises NoAnswer."""
        try:
            if self.adapter is None:
                self.adapter = self._find()
                self._described_at = -math.inf
            if self._clock() - self._described_at >= self.DESCRIBE_EVERY_S:
                self._described_at = self._clock()
                self.adapter.describe()
            return self.adapter.look(self.now)
        except RefusedConnection:
            self.adapter = None  # what comes up there may be something else
            raise

    def _find(self) -> Adapter:
        if self._unknown is not None and self._clock() - self._unknown[0] < self.FIND_EVERY_S:
            raise self._unknown[1]
        try:
            return find_adapter(self._client)
        except RefusedConnection:
            raise
        except NoAnswer as error:
            self._unknown = (self._clock(), error)
            raise


class Outcome(NamedTuple):
    """How a look ended."""

    look: Look | None
    error: NoAnswer | None


class Sidecar:
    """The agent beside an engine: one thread looks, and the calling one judges and sends, so that an engine that does
    not answer does not keep it from being said."""

    PATIENCE_S = 0.1  # how often it is judged while a look takes its time
    # From outside, an engine whose clients gave up shows nothing when it moves again, so it gets its chance sooner.
    FORGIVEN_AFTER_S = 10.0

    def __init__(
        self, settings: Settings, sender: Sender | Printer, watch: EngineWatch, complaints: Complaints, say: Say
    ) -> None:
        self._settings = settings
        self._sender = sender
        self._watch = watch
        self._complaints = complaints
        self._say = say
        self._agent = Agent(settings, sender, forgiven_after_s=self.FORGIVEN_AFTER_S)
        self._keys = KeyWatch(settings, complaints)
        self._outcomes: queue.SimpleQueue[Outcome | None] = queue.SimpleQueue()
        self._model: str | None = None
        self._engine = "unknown"

    def stop(self) -> None:
        """End it; may be called by a signal's handler."""
        self._outcomes.put(None)

    def run(self, stop: threading.Event, seconds: float = math.inf) -> None:
        """Look and send until `stop` is set or the time is over, then say farewell."""
        end = time.monotonic() + seconds
        patient_until = time.monotonic() + 1.0  # the first look finds out what it is, and takes its time
        threading.Thread(target=self._keep_looking, args=(stop,), name="elrar-look", daemon=True).start()
        while not stop.is_set() and time.monotonic() < end:
            try:
                outcome = self._outcomes.get(timeout=max(0.0, min(self.PATIENCE_S, end - time.monotonic())))
            except queue.Empty:
                if time.monotonic() > patient_until:
                    self._identify()
                    self._agent.saw_nothing()
                continue
            patient_until = 0.0
            if outcome is None:
                break
            self.take(outcome)
        stop.set()
        self._agent.ended()

    def _keep_looking(self, stop: threading.Event) -> None:
        while not stop.is_set():
            began = time.monotonic()
            self._outcomes.put(self.look())
            stop.wait(max(0.005, began + self._settings.push_interval_s - time.monotonic()))

    def look(self) -> Outcome:
        """Look once. In the thread that looks."""
        try:
            return Outcome(self._watch.look(), None)
        except NoAnswer as error:
            return Outcome(None, error)
        except Exception as error:
            return Outcome(None, NoAnswer(f"its answer was not understood ({type(error).__name__}: {error})"))

    def take(self, outcome: Outcome) -> None:
        """Judge the outcome of one look, and say what is proven."""
        self._identify()
        key = self._keys.changed(time.monotonic())
        if key is not None:
            self._agent.use_key(key)
        if outcome.look is not None:
            self._complaints.over("engine", f"{self._settings.engine_url} answers again")
            self._agent.saw(outcome.look)
            return
        self._complaints.trouble(
            "engine", f"{self._settings.engine_url} does not say how it is: {outcome.error}; trying on"
        )
        if isinstance(outcome.error, RefusedConnection):
            self._agent.refused()
        else:
            self._agent.saw_nothing(answers=isinstance(outcome.error, NoNumbers))

    def _identify(self) -> None:
        engine_id = self._agent.engine_id or default_engine_id(self._settings, self._sender)
        adapter = self._watch.adapter
        if adapter is not None:  # else what it was: also a farewell names the engine
            self._model, engine = adapter.model, f"{adapter.kind} {adapter.version}"
            if engine_id is not None and self._engine != engine:
                self._engine = engine
                self._say(f"{engine} at {self._settings.engine_url} is reported as {engine_id}")
        self._agent.identify(engine_id, self._model, self._engine)


def default_engine_id(settings: Settings, sender: Sender | Printer) -> str | None:
    """What the router knows the sidecar's engine by; None while this host's address is not known."""
    if settings.engine_id is not None:
        return settings.engine_id
    parts = urllib.parse.urlsplit(settings.engine_url)
    if not _is_loopback(parts.hostname or ""):
        return settings.engine_url  # it is elsewhere: this host's address would not lead there
    own = sender.own_address()
    if own is None:
        return None
    host = f"[{own}]" if ":" in own else own
    return f"{parts.scheme}://{host}:{parts.port or (443 if parts.scheme == 'https' else 80)}"


# ---------------------------------------------------------------------------------------------------------------------
# --check
# ---------------------------------------------------------------------------------------------------------------------

CHECK_S = 3.0
CHECK_GAP_S = 0.8  # between the two looks


def check(settings: Settings, sender: Sender | Printer, write: Callable[[str], object]) -> int:
    """Look twice, and write what would be sent and where it comes from; returns the exit status."""
    began = time.monotonic()
    client = EngineClient(settings.engine_url, settings.engine_api_key, settings.engine_ca_file)
    client.give_up_at = began + CHECK_S - 0.2
    watch = EngineWatch(client)
    try:
        first = watch.look()
        time.sleep(max(0.0, min(CHECK_GAP_S, client.give_up_at - time.monotonic() - 1.0)))
        second = watch.look()
        if second.in_flight == HIDDEN:  # of an idle vLLM every second look asks for less, and may say nothing
            second = watch.look()
    except NoAnswer as error:
        write(f"{settings.engine_url}: {error}\n")
        if watch.adapter is not None:
            write(f"it is {watch.adapter.kind} {watch.adapter.version}\n")
            for hint in watch.adapter.hints:
                write(f"would help: {hint}\n")
        return 1
    finally:
        client.close()
    assert watch.adapter is not None
    _write_check(settings, sender, watch.adapter, first, second, write)
    return 0


def _write_check(
    settings: Settings,
    sender: Sender | Printer,
    adapter: Adapter,
    first: Look,
    second: Look,
    write: Callable[[str], object],
) -> None:
    prover = Prover(settings.stuck_after_s)
    before = prover.prove(first)
    proofs = prover.prove(second)
    meters = {reading.rank: Meter(settings.engine_capacity) for reading in second.readings}
    for reading in first.readings:
        if reading.rank in meters:
            meters[reading.rank].measure(reading, first.at.at)
    load = merge_loads([meters[reading.rank].measure(reading, second.at.at) for reading in second.readings])
    moved = [rank for rank, proof in proofs.items() if proof is not None and proof != before.get(rank)]
    if second.asleep:
        phase, why = SLEEPING, "the engine says so"
    elif len(moved) == len(proofs):
        phase, why = SERVING, "it moved, or is idle"
    else:
        phase, why = "not proven", "nothing in it moved between two looks; after a second, that is stuck"
    sources = {
        "engine_id": "ENGINE_ID" if settings.engine_id else "by default",
        "timestamp_ms": "time of the last proof",
        **adapter.sources,
    }
    if settings.engine_capacity is not None:
        sources["engine_capacity"] = "ENGINE_CAPACITY"
    at = max((proof for proof in proofs.values() if proof is not None), default=second.at)
    values: dict[str, object] = {
        "engine_id": default_engine_id(settings, sender) or "not known yet: no gateway's address",
        "timestamp_ms": at.ms,
        **load._asdict(),
    }
    write(f"{adapter.kind} {adapter.version} at {settings.engine_url}, model {adapter.model or 'unknown'}\n")
    write(f"{'phase':<24}{phase:<34}{why}\n")
    for name, value in values.items():
        shown = f"{value:.3f}" if isinstance(value, float) else str(value)
        if (name.startswith("kv_") and value == -1) or (
            name in ("engine_capacity", "latency_pred_ms") and value == 0.0
        ):
            shown += " (unknown so far)"
        write(f"{name:<24}{shown:<34}{sources[name]}\n")
    if len(second.readings) > 1:
        write(f"of {len(second.readings)} data-parallel ranks: sums, and the greatest latency (DATA_PARALLEL=merged)\n")
    for hint in adapter.missing():
        write(f"would help: {hint}\n")


# ---------------------------------------------------------------------------------------------------------------------
# Inside vLLM: the plugin
# ---------------------------------------------------------------------------------------------------------------------
#
# vLLM's API server calls record() on its event loop after every step of the engine. There, numbers are only put down.
# A thread of the agent's own looks at them, judges and sends. With several API servers each has a part of what is to be
# known: all of them pass it on to the first, which alone speaks.

MOST_EXTRA_LOOKS = 20  # a second, beside the regular ones
EXTRA_TOKENS = 256  # pending tokens have to double or halve by as many for one
MOST_NEW_REQUESTS = 256  # of one step that are looked at one by one
MOST_COUNTED = 1_000_000_000  # of anything in one step; more is no number that vLLM meant


class RankStats:
    """What one rank's steps left behind. Written by record() alone; `stats` is replaced as a whole for its readers."""

    __slots__ = (
        "prompt_tokens",
        "prompts",
        "stats",
        "step_seconds",
        "step_tokens",
        "steps",
        "steps_timed",
        "tokens",
    )

    def __init__(self) -> None:
        # When the last scheduler statistics came (monotonic, ms since the epoch), running, waiting, KV cache usage.
        self.stats: tuple[float, int, int, int, float] | None = None
        self.step_seconds = 0.0
        self.steps_timed = 0
        self.step_tokens = 0
        self.steps = 0
        self.tokens = 0
        self.prompt_tokens = 0  # of requests that finished
        self.prompts = 0

    def add_iteration(self, iteration: Any, details: Any) -> int:
        """Count what a step did; returns how many tokens of prompts are no longer pending after it."""
        latencies = getattr(iteration, "inter_token_latencies_iter", None)
        if latencies:
            seconds = sum(latencies) / len(latencies)
            if 0.0 <= seconds < MOST_COUNTED:  # false for NaN, too, which no later number would make good again
                self.step_seconds += seconds
                self.steps_timed += 1
        generated = getattr(iteration, "num_generation_tokens", 0)
        prompt = getattr(iteration, "prompt_token_stats", None)
        if prompt is not None:
            computed, done = getattr(prompt, "computed", 0), getattr(prompt, "total", 0)
        else:  # before vLLM 0.20
            computed = done = getattr(iteration, "num_prompt_tokens", 0)
        if details is not None:
            # Of this step; what is computed of a prompt is otherwise credited only when its prefill ends.
            computed = getattr(details, "num_ctx_tokens", computed)
            generated = getattr(details, "num_generation_tokens", generated)
        worked = computed + generated
        if 0 < worked < MOST_COUNTED:
            self.tokens += worked
            self.step_tokens += worked
            self.steps += 1
        for request in getattr(iteration, "finished_requests", None) or ():
            tokens = getattr(request, "num_prompt_tokens", 0)
            if 0 <= tokens < MOST_COUNTED:
                self.prompt_tokens += tokens
                self.prompts += 1
        return int(done)


class FrontEnd:
    """The requests that one API server has in hand: the table of vLLM's output processor, by weak references."""

    def __init__(self, engine: Any) -> None:
        self._processor = weakref.ref(engine.output_processor)
        core = getattr(engine, "engine_core", None)
        self._core = None if core is None else weakref.ref(core)
        self._newest: Any = None  # the key of the newest request that was counted as new
        len(self._table())  # raises where there is no table

    def _table(self) -> dict[Any, Any]:
        processor = self._processor()
        table = processor.request_states if processor is not None else {}
        if not isinstance(table, dict):
            raise TypeError("request_states is no dictionary")
        return table

    def pending(self) -> tuple[int, int]:
        """How many requests there are, and the tokens of prompts of those whose first token has not come."""
        states = list(self._table().values())  # at once: the event loop changes the table meanwhile
        return len(states), sum(map(_pending_of, states))

    def new_prompt_tokens(self) -> int:
        """The tokens of prompts that came since this was asked last. On the event loop only."""
        table = self._table()
        newest = next(reversed(table), None)
        if newest is None or newest == self._newest:
            return 0
        tokens = 0
        for key in itertools.islice(reversed(table), MOST_NEW_REQUESTS):  # a dictionary keeps the order of arrival
            if key == self._newest:
                break
            tokens += _pending_of(table[key])
        self._newest = newest
        return tokens

    def by_rank(self, indexes: Sequence[int]) -> dict[int, list[int]] | None:
        """Requests and pending tokens of each rank; None if the client does not say which rank has which request."""
        core = self._core() if self._core is not None else None
        owners, identities = getattr(core, "reqs_in_flight", None), getattr(core, "core_engines", None)
        if not isinstance(owners, dict) or not isinstance(identities, list) or len(identities) != len(indexes):
            return None
        found = {index: [0, 0] for index in indexes}
        index_of = dict(zip(identities, indexes, strict=True))
        for key, one in list(self._table().items()):
            index = index_of.get(owners.get(key))
            if index is None:
                return None  # on its way to a rank
            found[index][0] += 1
            found[index][1] += _pending_of(one)
        return found

    def is_dead(self) -> bool:
        """Whether the engine's process ended under the API server."""
        core = self._core() if self._core is not None else None
        return getattr(getattr(core, "resources", None), "engine_dead", False) is True


def _pending_of(request: Any) -> int:
    return (getattr(request, "prompt_len", 0) or 0) if getattr(request, "is_prefilling", False) else 0


@dataclass
class Summary:
    """What one API server knows of the engine at one time; passed between API servers as JSON."""

    api_rank: int
    at: float
    ms: int
    requests: int | None  # None: its front end cannot be seen
    pending: int | None
    by_rank: dict[int, list[int]] | None
    asleep: bool
    asleep_at: float  # when that was said
    dead: bool
    stats: dict[int, tuple[float, int, int, int, float]]
    counted: dict[int, list[float]]  # the counters of RankStats
    urgent: bool = False

    def as_json(self) -> bytes:
        """The summary as a JSON text."""
        return json.dumps(vars(self)).encode()

    @classmethod
    def of_json(cls, text: bytes) -> Summary:
        """What as_json made; raises anything if the text is something else."""
        found = cls(**json.loads(text))
        found.stats = {int(rank): tuple(one) for rank, one in found.stats.items()}  # type: ignore[misc]
        found.counted = {int(rank): one for rank, one in found.counted.items()}
        if found.by_rank is not None:
            found.by_rank = {int(rank): one for rank, one in found.by_rank.items()}
        return found


class StepWatch:
    """Takes vLLM's calls in one API server and sums them up. The methods named by vLLM run on its event loop."""

    def __init__(
        self,
        indexes: Sequence[int],
        front_end: FrontEnd | None,
        wake: Callable[[], None],
        *,
        api_rank: int = 0,
        clock: Clock = time.monotonic,
        wall_clock: Clock = time.time,
    ) -> None:
        self.front_end = front_end
        self.indexes = list(indexes)
        self.failures = 0  # calls that could not be understood
        self._api_rank = api_rank
        self._wake = wake
        self._clock = clock
        self._wall_clock = wall_clock
        self._ranks = {index: RankStats() for index in indexes}
        # Of a server that has one rank, whatever number that has elsewhere.
        self._only = self._ranks[self.indexes[0]] if len(self._ranks) == 1 else None
        self._asleep = (False, 0.0)
        self._woken_at: deque[float] = deque(maxlen=MOST_EXTRA_LOOKS)
        self._is_woken = False
        self._was_idle = True  # by the statistics at the last look
        self._pending = 0  # at the last look
        self._pending_now = 0  # since then, by what came and what was prefilled

    def record(self, scheduler_stats: Any, iteration_stats: Any, engine_idx: Any) -> None:
        """Put a step's numbers down, and wake the agent's thread if they say something that cannot wait."""
        rank = self._ranks.get(engine_idx) if self._only is None else self._only
        if rank is None:
            return  # a rank that came later: vLLM makes no plugin for it either
        now = self._clock()
        busy = False
        if scheduler_stats is not None:
            running = scheduler_stats.num_running_reqs
            waiting = scheduler_stats.num_waiting_reqs + getattr(scheduler_stats, "num_skipped_waiting_reqs", 0)
            busy = running + waiting > 0  # raises if they are no numbers, before anything is kept
            rank.stats = (
                now,
                int(self._wall_clock() * 1000),
                running,
                waiting,
                getattr(scheduler_stats, "kv_cache_usage", math.nan),
            )
        if iteration_stats is not None:
            done = rank.add_iteration(iteration_stats, getattr(scheduler_stats, "iteration_details", None))
            self._pending_now -= done
        if self.front_end is not None:
            self._pending_now += self.front_end.new_prompt_tokens()
        if self._is_woken or not ((busy and self._was_idle) or _differs(self._pending, self._pending_now)):
            return
        if len(self._woken_at) < MOST_EXTRA_LOOKS or now - self._woken_at[0] >= 1.0:
            self._woken_at.append(now)
            self._is_woken = True
            self._wake()

    def record_sleep_state(self, sleep: Any, level: Any) -> None:
        """The engine fell asleep (`sleep` is 1) or woke up."""
        self._asleep = (bool(sleep), self._clock())
        self._wake()

    def summary(self, *, urgent: bool = False) -> Summary:
        """What is known now. In the agent's thread."""
        now, now_ms = self._clock(), int(self._wall_clock() * 1000)
        requests = pending = by_rank = None
        dead = False
        if self.front_end is not None:
            requests, pending = self.front_end.pending()
            if len(self._ranks) > 1:
                by_rank = self.front_end.by_rank(self.indexes)
            dead = self.front_end.is_dead()
        ranks = self._ranks
        stats = {index: rank.stats for index, rank in ranks.items() if rank.stats is not None}
        self._is_woken = False
        self._pending = self._pending_now = pending or 0
        self._was_idle = all(one[2] + one[3] == 0 for one in stats.values())
        counted = {
            index: [
                rank.step_seconds, rank.steps_timed, rank.step_tokens, rank.steps,
                rank.tokens, rank.prompt_tokens, rank.prompts,
            ]
            for index, rank in ranks.items()
        }  # fmt: skip
        asleep, asleep_at = self._asleep
        return Summary(
            self._api_rank, now, now_ms, requests, pending, by_rank, asleep, asleep_at, dead, stats, counted, urgent
        )


def _differs(before: int, now: int) -> bool:
    """Whether pending tokens doubled or halved, by enough to be told at once."""
    less, more = (before, now) if before < now else (now, before)
    return more - less >= EXTRA_TOKENS and more >= 2 * less


def look_of(
    summaries: Sequence[Summary], servers: int, indexes: Sequence[int], blocks: int | None, old_s: float
) -> Look:
    """One look at the engine, of what its API servers know; `servers` is how many there are, `blocks` the KV cache's
    blocks of all ranks. What an API server said more than `old_s` ago is not known any more."""
    newest = max(one.at for one in summaries)
    fresh = [one for one in summaries if newest - one.at <= old_s]
    oldest = min(fresh, key=lambda one: one.at)
    requests: int | None = None
    if len(fresh) < servers:
        requests = HIDDEN
    elif all(one.requests is not None for one in fresh):
        requests = sum(one.requests or 0 for one in fresh)
    by_rank: dict[int, list[int]] | None = None
    if len(fresh) >= servers and all(one.by_rank is not None for one in fresh):
        by_rank = {
            index: [sum((one.by_rank or {}).get(index, [0, 0])[kind] for one in fresh) for kind in (0, 1)]
            for index in indexes
        }
    pending = None if any(one.pending is None for one in fresh) else sum(one.pending or 0 for one in fresh)
    total = -1 if not blocks else blocks // len(indexes) - 1
    readings = [_reading(index, summaries, total) for index in indexes]
    if pending is not None:
        _share_pending(readings, pending, by_rank)
    asleep = max(summaries, key=lambda one: one.asleep_at).asleep
    return Look(
        readings,
        Proof(oldest.at, oldest.ms),
        requests,
        None if by_rank is None else {index: one[0] for index, one in by_rank.items()},
        asleep,
    )


def _reading(index: int, summaries: Sequence[Summary], total: int) -> Reading:
    stats = max((one.stats[index] for one in summaries if index in one.stats), default=None)
    counted = [sum(one.counted.get(index, _NOTHING)[place] for one in summaries) for place in range(len(_NOTHING))]
    seconds, timed, step_tokens, steps, tokens, prompt_tokens, prompts = counted
    reading = Reading(
        0,
        0,
        rank=index,
        total=total,
        free=total,
        step_times=Counted(seconds, timed),
        step_tokens=Counted(step_tokens, steps),
        tokens=tokens,
        prompts=Counted(prompt_tokens, prompts),
    )
    if stats is not None:
        at, ms, reading.running, reading.waiting, usage = stats
        reading.marker, reading.proof = at, Proof(at, ms)
        reading.free = round((1.0 - usage) * total) if total >= 0 and 0.0 <= usage <= 1.0 else -1
    return reading


_NOTHING = (0.0,) * 7


def _share_pending(readings: Sequence[Reading], pending: int, by_rank: Mapping[int, Sequence[int]] | None) -> None:
    """Give each rank its pending tokens: as known, or else by its waiting requests."""
    waiting = sum(one.waiting for one in readings)
    for number, reading in enumerate(readings):
        if by_rank is not None:
            reading.pending = by_rank[reading.rank][1]
        elif waiting:
            reading.pending = round(pending * reading.waiting / waiting)
        else:
            reading.pending = pending if number == 0 else 0


class Meeting:
    """Where the API servers of one vLLM meet: a datagram socket of the first, in Linux's abstract namespace, by the
    process that started them all. Only this user's processes are listened to."""

    MOST_BYTES = 65536

    def __init__(self) -> None:
        parent = os.getppid()
        with open(f"/proc/{parent}/stat", "rb") as file:
            started = file.read().rsplit(b") ", 1)[1].split()[19].decode()
        # Containers that share the host's network have the same abstract names, and often the same process ids.
        space = os.stat("/proc/self/ns/pid").st_ino
        self._name = f"\0elrar-agent-{space}-{parent}-{started}"
        self._socket = socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM)

    def open(self) -> None:
        """Be the one that all others send to; raises OSError."""
        self._socket.setsockopt(socket.SOL_SOCKET, socket.SO_PASSCRED, 1)
        self._socket.bind(self._name)

    def receive(self) -> Summary | None:
        """Wait for the next summary; None for what is none."""
        text, ancillary, flags, _ = self._socket.recvmsg(self.MOST_BYTES, 256)
        users = [
            struct.unpack("3i", data)[1]
            for level, kind, data in ancillary
            if level == socket.SOL_SOCKET and kind == socket.SCM_CREDENTIALS and len(data) == 12
        ]
        if users != [os.getuid()] or flags & socket.MSG_TRUNC:
            return None
        try:
            return Summary.of_json(text)
        except Exception:  # whatever it was
            return None

    def send(self, summary: Summary) -> None:
        """Send it to the first API server, without waiting; raises OSError."""
        self._socket.setblocking(False)
        self._socket.sendto(summary.as_json(), self._name)

    def close(self) -> None:
        """Close the socket."""
        self._socket.close()


@dataclass(frozen=True)
class ServerFacts:
    """What is known of vLLM's API server when the plugin is made."""

    model: str | None
    engine: str
    scheme: str
    port: int | None  # None if it has none, such as with --uds
    host: str
    api_rank: int
    servers: int
    indexes: tuple[int, ...]


class PluginAgent:
    """The agent in one API server: its thread, and what starts and ends it. Nothing of it raises into vLLM."""

    def __init__(self, settings: Settings, facts: ServerFacts, vllm_config: Any, engine: Any, say: Say) -> None:
        self.say = say
        self.complaints = Complaints(say)
        self._settings = settings
        self._facts = facts
        self._config = vllm_config
        self._wake = threading.Event()
        self._ending = False
        self._ended = threading.Event()
        front_end = None
        try:
            front_end = FrontEnd(engine)
        except Exception as error:
            say(
                f"the table of requests cannot be read ({_why(error)}): pending tokens are estimated, and a hang from"
                " idle cannot be seen"
            )
        self.watch = StepWatch(facts.indexes, front_end, self._wake.set, api_rank=facts.api_rank)
        self._sender = Sender(settings, self.complaints)
        self._agent = Agent(settings, self._sender)
        self._turn = threading.Lock()  # guards the agent: its thread's, but for the first farewell
        self._keys = KeyWatch(settings, self.complaints)
        self._meeting = Meeting() if facts.servers > 1 else None
        self._others: dict[int, Summary] = {}  # replaced item by item by the meeting's thread
        self._answers = facts.port is None

    @property
    def speaks(self) -> bool:
        """Whether this API server is the one that sends."""
        return self._facts.api_rank == 0

    def start(self) -> None:
        """Start the thread, and for the first of several API servers the one that listens to the others."""
        if self.speaks:
            self._sender.start()
            if self._meeting is not None:
                try:
                    self._meeting.open()
                except OSError as error:
                    self.say(f"the other API servers cannot be heard ({_why(error)}): idleness cannot be proven")
                else:
                    threading.Thread(target=self._listen, name="elrar-meeting", daemon=True).start()
        threading.Thread(target=self._run, name="elrar-agent", daemon=True).start()
        gateways = ", ".join(one.host for one in self._settings.gateways)
        who = f"API server {self._facts.api_rank + 1} of {self._facts.servers}" if self._meeting else "this engine"
        self.say(f"{AGENT} reports {who} to {gateways} every {round(self._settings.push_interval_s * 1000)} ms")

    MOST_WAIT_S = 0.005  # of a signal's handler for a look that is being made

    def end(self, wait_s: float = 0.0) -> None:
        """Say farewell, the first one here and now, and nothing after it. Raises nothing."""
        self._ending = True
        # Of several API servers each is killed a few ms after its SIGTERM: the agent's thread might come too late.
        if self.speaks and self._turn.acquire(timeout=self.MOST_WAIT_S):
            try:
                self._agent.begin_farewell()
            except Exception as error:
                self.complaints.trouble("farewell", f"the farewell failed ({type(error).__name__}: {error})")
            finally:
                self._turn.release()
        self._wake.set()
        if wait_s:
            self._ended.wait(wait_s)

    def _listen(self) -> None:
        while not self._ending:
            try:
                summary = self._meeting.receive() if self._meeting is not None else None
            except OSError as error:
                self.complaints.trouble("meeting", f"the other API servers cannot be heard ({_why(error)})")
                time.sleep(1.0)
                continue
            if summary is not None and 0 < summary.api_rank < self._facts.servers:
                self._others[summary.api_rank] = summary
                if summary.urgent:
                    self._wake.set()

    def _run(self) -> None:
        due = time.monotonic()
        while True:
            woken = self._wake.wait(max(0.0, due - time.monotonic()))
            self._wake.clear()
            with self._turn:
                if self._ending:
                    break
                try:
                    self.step(urgent=woken)
                except BaseException as error:  # a thread that ends says nothing any more
                    self.complaints.trouble("step", f"a look at the engine failed ({type(error).__name__}: {error})")
            due = time.monotonic() + self._settings.push_interval_s
        try:
            if self.speaks:
                with self._turn:
                    self._agent.ended()
        finally:
            self._sender.stop()
            self._ended.set()

    def step(self, *, urgent: bool = False) -> None:
        """Look once, and say what is proven; or, in an API server that is not the first, pass on what is known."""
        summary = self.watch.summary(urgent=urgent)
        if not self.speaks:
            try:
                if self._meeting is not None:
                    self._meeting.send(summary)
            except OSError as error:
                self.complaints.trouble("meeting", f"the first API server cannot be reached ({_why(error)})")
            return
        if self.watch.failures:
            self.complaints.trouble("calls", f"{self.watch.failures} calls of vLLM were not understood")
        self._identify()
        key = self._keys.changed(summary.at)
        if key is not None:
            self._agent.use_key(key)
        summaries = [summary, *self._others.values()]
        if any(one.dead for one in summaries):
            self._agent.ended()
        elif self._is_up(summaries):
            blocks = getattr(getattr(self._config, "cache_config", None), "num_gpu_blocks", None)
            blocks = blocks if isinstance(blocks, int) and blocks > 0 else None
            old_s = max(1.0, 3 * self._settings.push_interval_s)
            self._agent.saw(look_of(summaries, self._facts.servers, self.watch.indexes, blocks, old_s))
        else:
            self._agent.saw_nothing()

    def _identify(self) -> None:
        engine_id = self._settings.engine_id
        if engine_id is None and self._agent.engine_id is None:
            own = self._sender.own_address()
            if own is not None:
                host = f"[{own}]" if ":" in own else own
                engine_id = f"{self._facts.scheme}://{host}:{self._facts.port or 8000}"
        self._agent.identify(engine_id, self._facts.model, self._facts.engine)

    def _is_up(self, summaries: Sequence[Summary]) -> bool:
        """Whether the server takes requests: the plugin is there half a second before its port is."""
        if not self._answers:
            self._answers = any(one.stats for one in summaries)  # it had some
        if not self._answers and self._facts.port is not None and len(summaries) >= self._facts.servers:
            with contextlib.suppress(OSError), socket.create_connection((self._facts.host, self._facts.port), 0.5):
                self._answers = True
        return self._answers


def _frames(most: int = 80) -> Iterator[Any]:
    frame = sys._getframe(1)
    for _ in range(most):
        if frame is None:
            return
        yield frame
        frame = frame.f_back  # type: ignore[assignment]


def _find_local(name: str, *attributes: str) -> Any:
    """The nearest caller's variable of that name that has these attributes, or None."""
    for frame in _frames():
        found = frame.f_locals.get(name)
        try:
            for attribute in attributes:
                getattr(found, attribute)
        except Exception:
            continue
        return found
    return None


def _facts(vllm_config: Any, indexes: Sequence[int], argv: Sequence[str]) -> ServerFacts:
    arguments = _find_local("args", "host", "port")  # of the API server's command line
    port = getattr(arguments, "port", None)
    if not isinstance(port, int):
        port = _port_in(argv)
    host = getattr(arguments, "host", None)
    if not isinstance(host, str) or host in ("", "0.0.0.0"):
        host = "127.0.0.1"
    elif host == "::":
        host = "::1"
    parallel = getattr(vllm_config, "parallel_config", None)
    servers = getattr(parallel, "_api_process_count", 1)
    rank = getattr(parallel, "_api_process_rank", 0)
    config = getattr(vllm_config, "model_config", None)
    name = getattr(config, "served_model_name", None) or getattr(config, "model", None)
    name = name[0] if isinstance(name, (list, tuple)) and name else name
    return ServerFacts(
        name[:256] if isinstance(name, str) and name.isprintable() else None,
        f"vllm {getattr(sys.modules.get('vllm'), '__version__', 'unknown')}",
        "https" if getattr(arguments, "ssl_certfile", None) else "http",
        None if getattr(arguments, "uds", None) else port,
        host,
        rank if isinstance(rank, int) and rank > 0 else 0,
        servers if isinstance(servers, int) and servers > 1 else 1,
        tuple(indexes),
    )


def _port_in(argv: Sequence[str]) -> int:
    for at, word in enumerate(argv):
        text = word[len("--port=") :] if word.startswith("--port=") else None
        if word == "--port" and at + 1 < len(argv):
            text = argv[at + 1]
        if text is not None and text.isdecimal():
            return int(text)
    return 8000


class _Ending:
    """Sees to the farewell: at SIGTERM and SIGINT, and at the process's end.

    vLLM's event loop has its signals by a file descriptor, and a Python function that does nothing beside it: ours is
    put before that function, on the event loop, again and again, because vLLM puts its own there when it is ready.
    """

    CHECK_S = 0.5

    def __init__(self, agent: PluginAgent) -> None:
        self._agent = agent
        self._pid = os.getpid()
        self._mine: set[Any] = set()
        atexit.register(self._at_exit)
        with contextlib.suppress(RuntimeError):  # no event loop
            self._watch(asyncio.get_running_loop())

    def _at_exit(self) -> None:
        if os.getpid() == self._pid:
            self._agent.end(wait_s=0.2)

    def _watch(self, loop: Any) -> None:
        try:
            if threading.current_thread() is threading.main_thread():
                for number in (signal.SIGTERM, signal.SIGINT):
                    self._put_before(number)
            loop.call_later(self.CHECK_S, self._watch, loop)
        except Exception as error:
            self._agent.complaints.trouble("signals", f"the end cannot be seen coming ({_why(error)})")

    def _put_before(self, number: int) -> None:
        before = signal.getsignal(number)
        if before in self._mine or not callable(before) or before is signal.default_int_handler:
            return

        def farewell(signum: int, frame: Any) -> Any:
            if os.getpid() == self._pid:
                self._agent.end()
            return before(signum, frame)

        self._mine.add(farewell)
        signal.signal(number, farewell)
        signal.siginterrupt(number, False)


def _start_plugin(vllm_config: Any, indexes: Sequence[int], say: Say) -> PluginAgent | None:
    """Start the agent in this API server; None, with a line that says why, where that cannot be."""
    try:
        settings = read_settings(os.environ)
        engine = _find_local("self", "output_processor", "engine_core")  # vLLM's AsyncLLM, being constructed
        agent = PluginAgent(settings, _facts(vllm_config, indexes, sys.argv), vllm_config, engine, say)
        agent.start()
        _Ending(agent)
    except SettingsError as error:
        say("is silent, because settings cannot be used: " + "; ".join(error.errors))
    except Exception as error:
        say(f"is silent, because it could not be started ({type(error).__name__}: {error})")
    else:
        return agent
    return None


def _say_in_vllm(text: str) -> None:
    with contextlib.suppress(Exception):
        # Below vLLM's own logger, so that it goes where vLLM's lines go.
        logging.getLogger("vllm.elrar_agent").warning("engine_agent: %s", text)


def _make_stat_logger() -> type:
    """The class that vLLM's plugin group wants: it has to derive from vLLM's own, which only vLLM has."""
    base: Any = importlib.import_module("vllm.v1.metrics.loggers").AggregateStatLoggerBase

    class StatLogger(base):  # type: ignore[misc]
        """What vLLM makes and calls. An exception here would end the server: none gets out."""

        def __init__(self, vllm_config: Any = None, engine_indexes: Any = (0,), *_: Any, **__: Any) -> None:
            self._agent: PluginAgent | None = None
            try:
                indexes = [engine_indexes] if isinstance(engine_indexes, int) else [int(one) for one in engine_indexes]
                self._agent = _start_plugin(vllm_config, indexes or [0], _say_in_vllm)
                if self._agent is not None:
                    os.register_at_fork(after_in_child=self._forget)
            except BaseException as error:
                _say_in_vllm(f"is silent, because it could not be started ({type(error).__name__})")

        def _forget(self) -> None:
            self._agent = None  # a child has no thread of the agent's, and is no API server

        def record(
            self,
            scheduler_stats: Any = None,
            iteration_stats: Any = None,
            mm_cache_stats: Any = None,
            engine_idx: Any = 0,
            *_: Any,
            **__: Any,
        ) -> None:
            agent = self._agent
            if agent is not None:
                try:
                    agent.watch.record(scheduler_stats, iteration_stats, engine_idx)
                except BaseException:  # whatever it is: on vLLM's event loop it would end the server
                    agent.watch.failures += 1

        def record_sleep_state(self, is_awake: Any = 0, level: Any = 0, *_: Any, **__: Any) -> None:
            agent = self._agent
            if agent is not None:
                try:
                    agent.watch.record_sleep_state(is_awake, level)  # 1 means asleep, whatever the base class says
                except BaseException:
                    agent.watch.failures += 1

        def log_engine_initialized(self, *_: Any, **__: Any) -> None:
            pass

        def log(self, *_: Any, **__: Any) -> None:
            pass

        def record_admission_rejection(self, *_: Any, **__: Any) -> None:
            pass

    return StatLogger


def __getattr__(name: str) -> Any:
    if name == "StatLogger":  # made when vLLM asks for it: everything else of this file needs no vLLM
        made = _make_stat_logger()
        globals()[name] = made
        return made
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


# ---------------------------------------------------------------------------------------------------------------------
# The plugin's folder
# ---------------------------------------------------------------------------------------------------------------------

PLUGIN_FOLDER = f"elrar_agent-{VERSION}.dist-info"
PLUGIN_FILES = {
    "METADATA": f"Metadata-Version: 2.1\nName: elrar-agent\nVersion: {VERSION}\n",
    "entry_points.txt": "[vllm.stat_logger_plugins]\nelrar = engine_agent:StatLogger\n",
}


def install_plugin(folder: str) -> None:
    """Put this file and the folder by which vLLM finds it into `folder`; raises OSError."""
    info = os.path.join(folder, PLUGIN_FOLDER)
    os.makedirs(info, exist_ok=True)
    for name, text in PLUGIN_FILES.items():
        with open(os.path.join(info, name), "w", encoding="utf-8") as file:
            file.write(text)
    here, there = os.path.realpath(__file__), os.path.join(folder, "engine_agent.py")
    if os.path.realpath(there) != here:
        with open(here, "rb") as source, open(there, "wb") as copy:
            copy.write(source.read())


# ---------------------------------------------------------------------------------------------------------------------
# Command line
# ---------------------------------------------------------------------------------------------------------------------


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="engine_agent.py",
        description="Says to the ELRAR state gateway what an engine does: beside an engine (this command), inside vLLM"
        " (--install-plugin), or without an engine (--simulate, --replay).",
        epilog=settings_help(),
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    modes = parser.add_mutually_exclusive_group()
    modes.add_argument("--check", action="store_true", help="look at the engine once, say what was found; send nothing")
    modes.add_argument("--simulate", metavar="N", help="send for N engines that are not there (1 to 50000)")
    modes.add_argument(
        "--replay", metavar="FILE", nargs="+", help="send a state log again, as of now; - is standard input"
    )
    modes.add_argument("--new-key", metavar="NAME", help="print a new key: a line for KEYS_FILE and for KEY_FILE")
    modes.add_argument("--install-plugin", metavar="FOLDER", help="make the folder for vLLM's PYTHONPATH")
    parser.add_argument("--speed", metavar="X", default="1", help="with --replay: X times as fast (default 1)")
    parser.add_argument("--seconds", metavar="S", help="end after so many seconds")
    parser.add_argument("--print", action="store_true", help="write each datagram as a line instead of sending it")
    parser.add_argument("--version", action="version", version=AGENT)
    for setting in SETTINGS:
        parser.add_argument(setting.option, dest=setting.name, metavar="VALUE", help=argparse.SUPPRESS)
    return parser


class _Options(NamedTuple):
    """What is asked for on the command line beside settings, checked."""

    simulate: int | None
    speed: float
    seconds: float  # infinite if nothing is said


def _options(given: argparse.Namespace, errors: list[str]) -> _Options:
    def number(option: str, text: str | None, low: float, high: float, otherwise: float) -> float:
        if text is None:
            return otherwise
        try:
            value = float(text)
        except ValueError:
            value = math.nan
        if not low <= value <= high:
            errors.append(f"{option}={text!r} cannot be used: accepted is a number from {low:g} to {high:g}")
        return value

    engines = None
    if given.simulate is not None:
        if not re.fullmatch(r"[0-9]{1,5}", given.simulate) or not 1 <= int(given.simulate) <= 50_000:
            errors.append(f"--simulate={given.simulate!r} cannot be used: accepted is a whole number from 1 to 50000")
        else:
            engines = int(given.simulate)
    return _Options(
        engines,
        number("--speed", given.speed, 0.001, 100_000, 1.0),
        number("--seconds", given.seconds, 0, 1e9, math.inf),
    )


def main(arguments: Sequence[str] | None = None, environ: Mapping[str, str] = os.environ) -> int:
    """Run it; returns the exit status: 0, 2 for settings that cannot be used, 1 for anything else."""
    given = _parser().parse_args(arguments)
    errors: list[str] = []
    options = _options(given, errors)
    settings = None
    try:
        settings = read_settings(environ, {setting.name: getattr(given, setting.name) for setting in SETTINGS})
    except SettingsError as error:
        errors = error.errors + errors
    if given.new_key is not None and not re.fullmatch(r"[A-Za-z0-9_-]{1,32}", given.new_key):
        errors.append(f"--new-key={given.new_key!r} cannot be used: accepted is 1 to 32 of A-Za-z0-9_-")
    if errors or settings is None:
        for line in errors:
            say_on_stderr(line)
        return 2
    try:
        return _run(given, options, settings)
    except BrokenPipeError:
        # Whoever read it has enough; Python must not try again when it exits.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 0
    except OSError as error:
        where = f"{error.filename}: " if error.filename else ""
        say_on_stderr(f"{where}{_why(error)}")
        return 1


def _run(given: argparse.Namespace, options: _Options, settings: Settings) -> int:
    if given.new_key is not None:
        sys.stdout.write(f"{given.new_key} {secrets.token_hex(32)}\n")
        return 0
    if given.install_plugin is not None:
        install_plugin(given.install_plugin)
        sys.stdout.write(f"PYTHONPATH={os.path.abspath(given.install_plugin)}\n")
        return 0
    complaints = Complaints(say_on_stderr)
    sender: Sender | Printer = Sender(settings, complaints)
    if given.print:
        towards = sender
        sender = Printer(sys.stdout.buffer, towards.own_address)
    sender.start()
    try:
        if given.check:
            _wait_for_addresses(sender, threading.Event(), 0.5)
            return check(settings, sender, sys.stdout.write)
        stop = threading.Event()
        for number in (signal.SIGTERM, signal.SIGINT):
            signal.signal(number, lambda *_: stop.set())
        if options.simulate is not None:
            return _simulate(settings, sender, options, stop)
        if given.replay is not None:
            return _replay(given.replay, settings, sender, options, stop)
        return _beside(settings, sender, complaints, options, stop)
    finally:
        sender.stop()


def _beside(
    settings: Settings, sender: Sender | Printer, complaints: Complaints, options: _Options, stop: threading.Event
) -> int:
    client = EngineClient(settings.engine_url, settings.engine_api_key, settings.engine_ca_file)
    sidecar = Sidecar(settings, sender, EngineWatch(client), complaints, say_on_stderr)
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, lambda *_: sidecar.stop())
    sidecar.run(stop, options.seconds)
    return 0


def _simulate(settings: Settings, sender: Sender | Printer, options: _Options, stop: threading.Event) -> int:
    simulation = Simulation(settings, sender, options.simulate or 1)
    simulation.run(stop, _wait_for_addresses(sender, stop, options.seconds))
    say_on_stderr(json.dumps(simulation.account()))
    return 0


def _replay(
    paths: Sequence[str], settings: Settings, sender: Sender | Printer, options: _Options, stop: threading.Event
) -> int:
    files = log_files(paths)
    replay = Replay(settings, sender, options.speed)
    seconds = _wait_for_addresses(sender, stop, options.seconds)
    replay.run(read_ahead(logged_states(files), stop, seconds), stop, seconds)
    say_on_stderr(f"{replay.sent} states of {len(files)} files")
    return 0


def _wait_for_addresses(sender: Sender | Printer, stop: threading.Event, seconds: float) -> float:
    """Wait until at least one name was found, since what is sent before is lost; returns what is left of the time."""
    until = time.monotonic() + seconds
    while isinstance(sender, Sender) and not sender.addresses() and not stop.is_set() and time.monotonic() < until:
        stop.wait(0.1)
    return max(0.0, until - time.monotonic())


if __name__ == "__main__":
    sys.exit(main())
