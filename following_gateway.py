"""The gateway of a router's process whose port another gateway on this host has: it follows that one over HTTP.

Another worker of the same router may have the port, or a daemon. The table is the same as there, over /watch, and when
that gateway is gone, one of those that followed it takes its place, with what it knew growing old in its table.
"""

from __future__ import annotations

import contextlib
import errno
import json
import logging
import os
import random
import re
import socket
import threading
import time
from collections.abc import Callable
from typing import Any

from config import PREFIX, Config, ConfigError
from engine_state import FIELD_NAMES, EngineState
from engine_table import EngineTable, Entry
from reader_access import load_tokens
from sockets import format_address, listen_address
from start_errors import StartError
from state_gateway import VERSION, StateGateway

logger = logging.getLogger("elrar.gateway")

ASK_TIMEOUT_S = 0.1  # for which a router waits until it is known who has the port
STATS_TIMEOUT_S = 1.0
MAX_ANSWER_BYTES = 1024 * 1024
LOOK_S = 0.05  # between two looks whether it is still followed
HURRY_S, HURRIED_LOOK_S = 1.0, 0.02  # after it was lost or came back: a worker may have its place, and newer states
DAEMON_GONE_S = 10.0  # of a free port, after which a daemon is not expected to come back to it
STOP_TIMEOUT_S = 1.0

_SIGNS_OF_LIFE = ("age_ms", "status", "source")  # what a heartbeat tells nevertheless


def follow(config: Config, error: StartError) -> FollowingGateway:
    """The gateway that follows the one that has the port; raises StartError if nobody there is a gateway.

    `error` is why the port cannot be had.
    """
    if not config.http_follows_udp and not config.http_port:
        port = "off" if config.http_port is None else config.http_port
        raise StartError(
            f"{error}. If it is a gateway, it cannot be followed: with {PREFIX}HTTP_PORT={port} there is nobody to ask"
        ) from error
    deadline = time.monotonic() + ASK_TIMEOUT_S
    other = _OtherGateway(config)
    try:
        document = other.ask("/version", ASK_TIMEOUT_S)
        if not isinstance(document.get("version"), str):
            raise ValueError(f"its answer is {document!r}")
    except (OSError, ValueError, AttributeError) as why:
        raise StartError(
            f"{error}. Asked at {other.url}/version, it is no gateway that could be followed: {why}"
        ) from error
    gateway = FollowingGateway(config, other, embedded=document.get("embedded") is True)
    gateway.start(max(0.0, deadline - time.monotonic()))
    return gateway


class _OtherGateway:
    """Where the gateway that has the port answers."""

    def __init__(self, config: Config) -> None:
        address = listen_address(config.network_mode, config.bind_address)
        self.host = {"0.0.0.0": "127.0.0.1", "::": "::1"}.get(address, address)
        self.port = config.udp_port if config.http_follows_udp else config.http_port or 0
        self.url = f"http://{format_address(self.host, self.port)}"
        self._tokens_file = config.http_tokens_file
        self._tokens = self._first_token()
        self._turn = 0

    def _first_token(self) -> tuple[str, ...]:
        tokens = load_tokens(self._tokens_file, warn=False)
        return (tokens[0].decode(),) if tokens else ("",)

    def tokens(self) -> tuple[str, ...]:
        """The one that was right last, and the first of the file as it is now if that is another.

        In this order: the other gateway reads the file again at SIGHUP, or never, and holds back who is often wrong.
        """
        with contextlib.suppress(ConfigError):
            (newest,) = self._first_token()
            right = self._tokens[0]
            self._tokens = (right,) if newest == right else (right, newest)
        return self._tokens

    def next_token(self) -> str:
        """The token for the next attempt to follow it: each of them in turn."""
        tokens = self.tokens()
        token = tokens[self._turn % len(tokens)]
        self._turn += 1
        return token

    def ask(self, path: str, timeout_s: float) -> Any:
        """A JSON document of it; raises OSError or ValueError. All of it takes `timeout_s` at most."""
        deadline = time.monotonic() + timeout_s
        for token in self.tokens():
            head, body = self._exchange(path, token, deadline)
            if re.match(rb"HTTP/1\.[01] 200 ", head):
                self._tokens = (token,)
                return json.loads(body)
            if not re.match(rb"HTTP/1\.[01] 401 ", head):
                break
        raise ValueError(repr(head[:200]))

    def _exchange(self, path: str, token: str, deadline: float) -> tuple[bytes, bytes]:
        """The head and the body of its answer.

        Not http.client, whose timeout is for each read: whoever has the port may send a byte at a time.
        """
        lines = [f"GET {path} HTTP/1.1", f"Host: {format_address(self.host, self.port)}", "Connection: close"]
        if token:
            lines.append(f"Authorization: Bearer {token}")
        received = bytearray()
        timeout_s = max(0.001, deadline - time.monotonic())
        with socket.create_connection((self.host, self.port), timeout_s) as sock:
            sock.sendall("\r\n".join([*lines, "", ""]).encode())
            while True:
                sock.settimeout(max(0.001, deadline - time.monotonic()))
                piece = sock.recv(65536)
                if not piece:
                    break
                received += piece
                if len(received) > MAX_ANSWER_BYTES or time.monotonic() > deadline:
                    raise TimeoutError(f"no whole answer within {timeout_s:.3g} s and {MAX_ANSWER_BYTES} bytes")
        head, _, body = bytes(received).partition(b"\r\n\r\n")
        return head, body

    def has_gone(self) -> bool:
        """Whether nobody listens there."""
        with socket.socket(socket.AF_INET6 if ":" in self.host else socket.AF_INET, socket.SOCK_STREAM) as sock:
            sock.settimeout(ASK_TIMEOUT_S)
            return sock.connect_ex((self.host, self.port)) == errno.ECONNREFUSED


class FollowingGateway:
    """Answers as StateGateway does, from the table of another gateway, and from its own once it took that one's place.

    Every public method may be called from any thread, and what it returns is the caller's own.
    """

    def __init__(
        self,
        config: Config,
        other: _OtherGateway,
        *,
        embedded: bool,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        """`embedded`: the other one is in a router's process, and nobody restarts it."""
        self.config = config
        self.udp_port = config.udp_port
        self.http_port: int | None = other.port
        self._other = other
        self._other_is_embedded = embedded
        self._clock = clock
        self._pid = os.getpid()
        self._table: EngineTable | None = EngineTable(
            other.url, token=other.next_token, expire_after_ms=config.expire_after_ms, clock=clock
        )
        self._own: StateGateway | None = None  # set once
        self._own_since = 0.0
        self._instance = ""  # of the other one, as followed last
        self._gone_since: float | None = None
        self._lost_at: float | None = None  # since when it is not followed, or when it came back after that
        self._stats: dict[str, Any] = {}
        self._stopping = threading.Event()
        self._thread = threading.Thread(target=self._run, name="gateway-follower", daemon=True)

    def start(self, wait_s: float) -> None:
        """Begin to follow, and wait for so long at most until the table is there."""
        logger.info(
            "another gateway has the port, following it url=%s embedded=%s", self._other.url, self._other_is_embedded
        )
        self._thread.start()
        if self._table is not None:
            self._table.wait_until_known(wait_s)

    # -- following, and taking the other one's place -------------------------------------------------------------------

    def _run(self) -> None:
        while not self._stopping.wait(HURRIED_LOOK_S if self._is_in_hurry(self._clock()) else LOOK_S):
            self.look()

    def _is_in_hurry(self, now: float) -> bool:
        return self._lost_at is not None and now - self._lost_at < HURRY_S

    def look(self) -> None:
        """See whether the other gateway is still there, and take its place if it is time to; for the thread."""
        now, table = self._clock(), self._table
        if self._own is not None:
            if table is not None and (now - self._own_since) * 1000 > self.config.expire_after_ms:
                self._table = None  # all that is still to be known is known again
            return
        assert table is not None
        status = table.gateways()[0] if table.gateways() else None
        if status is not None and status.connected:
            self._gone_since = self._lost_at = None
            if status.instance != self._instance:
                self._learn_of(status.instance)
            return
        if not self._other.has_gone():
            if self._lost_at is None or self._gone_since is not None:
                self._lost_at = now
            self._gone_since = None
            if self._is_in_hurry(now):
                table.retry_now()
            return
        self._lost_at = now
        if self._gone_since is None:
            self._gone_since = now
        if self._other_is_embedded or now - self._gone_since >= DAEMON_GONE_S:
            self._take_its_place()

    def _learn_of(self, instance: str) -> None:
        """Ask what kind of gateway has the port now."""
        try:
            self._other_is_embedded = self._other.ask("/version", STATS_TIMEOUT_S).get("embedded") is True
            self._stats = self._other.ask("/stats", STATS_TIMEOUT_S)
        except (OSError, ValueError, AttributeError):
            return  # asked again at the next look
        self._instance = instance

    def _take_its_place(self) -> None:
        self._stopping.wait(random.uniform(0, LOOK_S))  # others try, too
        gateway = StateGateway(self.config, embedded=True)
        try:
            gateway.open()
            gateway.start()
        except StartError as error:
            logger.debug("another one was faster: %s", error)
            self._followed().retry_now()
            return
        self._own_since = self._clock()
        self.udp_port, self.http_port = gateway.udp_port, gateway.http_port
        self._own = gateway
        self._lost_at = None
        if self._stopping.is_set():
            gateway.shutdown()
            return
        logger.warning("took the place of the gateway that had the port and is gone: %s", gateway.describe())
        if self._table is not None:
            self._table.close()  # what it knew stays, and grows old

    @property
    def has_ended(self) -> bool:
        """Whether it was shut down, or a thread of its own gateway died."""
        return self._stopping.is_set() or (self._own is not None and self._own.has_ended)

    def shutdown(self) -> None:
        """Stop following, and its own gateway if it has one; twice is harmless."""
        if os.getpid() != self._pid:
            return
        self._stopping.set()
        if self._thread is not threading.current_thread() and self._thread.is_alive():
            self._thread.join(STOP_TIMEOUT_S)
        if self._table is not None:
            self._table.close()
        if self._own is not None:
            self._own.shutdown()

    def close_descriptors(self) -> None:
        """Close the descriptors that a forked child has of its parent's gateway; takes no lock, writes nothing."""
        if self._own is not None:
            self._own.close_descriptors()

    # -- answers -------------------------------------------------------------------------------------------------------

    @property
    def version(self) -> str:
        """The version of this gateway."""
        return VERSION

    @property
    def log_path(self) -> str:
        """Where the state log is, or would be: the other gateway's as configured here."""
        return self.config.log_file if self._own is None else self._own.log_path

    def describe(self) -> str:
        """What it follows, or what was really bound."""
        return f"following {self._other.url}" if self._own is None else self._own.describe()

    def is_ready(self) -> bool:
        """Whether a gateway is followed, or its own one is ready."""
        if self._own is not None:
            return self._own.is_ready()
        return not self._stopping.is_set() and any(one.connected for one in self._followed().gateways())

    def threads(self) -> dict[str, bool]:
        """For each thread, by name, whether it is alive and moving."""
        own = {} if self._own is None else self._own.threads()
        return {"gateway-follower": self._thread.is_alive(), **own}

    def get_engine_states_dict(self) -> dict[str, dict[str, Any]]:
        """The eight fields of every known engine that is not unavailable, by engine_id; the caller's own.

        Raises RuntimeError if it was shut down, if a thread of its own gateway died, and in a forked child.
        """
        self._refuse_if_gone()
        if self._own is not None and self._table is None:
            return self._own.get_engine_states_dict()
        return {
            engine_id: {field: fields[field] for field in FIELD_NAMES}
            for engine_id, fields in self.get_engine_snapshot().items()
            if fields["status"] != "unavailable"
        }

    def get_engine_snapshot(self) -> dict[str, dict[str, Any]]:
        """The entries as /engines has them, all of them; raises RuntimeError as above."""
        self._refuse_if_gone()
        snapshot = {entry.engine_id: entry.as_dict() for entry in self._remembered()}
        own = {} if self._own is None else self._own.get_engine_snapshot()
        for engine_id, fields in own.items():
            known = snapshot.get(engine_id)
            # One that has just been started may hear a busy engine's heartbeat first: the load that is known stays.
            if known and fields["heartbeat"] and not known["heartbeat"] and self._is_fresh(known):
                snapshot[engine_id] = {**known, **{name: fields[name] for name in _SIGNS_OF_LIFE}}
            else:
                snapshot[engine_id] = fields
        return snapshot

    def _is_fresh(self, fields: dict[str, Any]) -> bool:
        return bool(fields["state_age_ms"] <= self.config.stale_threshold_ms)

    def get_engine_state(self, engine_id: str) -> EngineState | None:
        """The state of one engine, live or stale, or None if it is not known; raises RuntimeError as above."""
        self._refuse_if_gone()
        if self._own is not None and self._table is None:
            return self._own.get_engine_state(engine_id)
        if self._own is None:
            fields = next((entry.as_dict() for entry in self._remembered(engine_id)), None)
        else:  # for as long as something is remembered
            fields = self.get_engine_snapshot().get(engine_id)
        return None if fields is None else EngineState(**{field: fields[field] for field in FIELD_NAMES})

    def get_active_engines_count(self) -> int:
        """How many engines are live; raises RuntimeError as above."""
        return sum(fields["status"] == "live" for fields in self.get_engine_snapshot().values())

    def get_total_engines_count(self) -> int:
        """How many engines are known; raises RuntimeError as above."""
        return len(self.get_engine_snapshot())

    def get_stats(self) -> dict[str, Any]:
        """The document of /stats of the gateway that is followed, a second old at most while it answers, or its own.

        Asks over HTTP, STATS_TIMEOUT_S at most; if that gateway does not answer, it is what it said last. Raises
        RuntimeError if it has never said anything.
        """
        if self._own is not None:
            return self._own.get_stats()
        try:
            self._stats = self._other.ask("/stats", STATS_TIMEOUT_S)
        except (OSError, ValueError) as error:
            if not self._stats:
                raise RuntimeError(f"the state gateway at {self._other.url} does not answer: {error}") from None
        return json.loads(json.dumps(self._stats))  # type: ignore[no-any-return]

    def _followed(self) -> EngineTable:
        assert self._table is not None
        return self._table

    def _remembered(self, engine_id: str | None = None) -> list[Entry]:
        """What is known from the other gateway, of one engine or of all; not what is too old."""
        table = self._table
        if table is None:
            return []
        if engine_id is None:
            entries = table.entries()
        else:
            entry = table.get(engine_id)
            entries = [] if entry is None else [entry]
        if self._own is None:
            return entries
        return [entry for entry in entries if entry.age_ms <= self.config.expire_after_ms]

    def _refuse_if_gone(self) -> None:
        if os.getpid() != self._pid:
            raise RuntimeError("this is the state gateway of the parent process; read it over HTTP, at /engines")
        if self._stopping.is_set():
            raise RuntimeError("the state gateway was shut down")
