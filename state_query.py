"""What each path of the query interface answers. Nothing here knows of sockets; nothing can be changed through it.

To add a route, add a row to `Query._routes`. Answers are computed from copies, without any lock.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Protocol
from urllib.parse import parse_qs, unquote

import state_metrics as metrics
from engine_state import as_json_fields, quote_json
from state_store import LIVE, STALE, EngineView, Shown, StateStore

JSON_TYPE = "application/json"
SHARED_MS = 10  # by which the ages of a snapshot that is given to several may be behind
CACHED_AGES = 65536


@dataclass(frozen=True)
class Answer:
    """One response: status, body and the media type of the body."""

    status: int
    body: bytes
    content_type: str = JSON_TYPE


class QueryError(Exception):
    """A question that has no answer; becomes a JSON error with this status."""

    def __init__(self, status: int, message: str) -> None:
        super().__init__(message)
        self.status = status


def json_answer(document: object, status: int = 200) -> Answer:
    """A JSON document, with a newline at its end for those who read it in a terminal."""
    return Answer(status, json.dumps(document, ensure_ascii=False).encode("utf-8", "replace") + b"\n")


def error_answer(status: int, message: str) -> Answer:
    """`{"error": message}`."""
    return json_answer({"error": message}, status)


def entry(view: EngineView) -> dict[str, Any]:
    """One engine as a dictionary, with the same keys and values as its entry at /engines."""
    return {
        **view.state.as_dict(),
        "heartbeat": view.heartbeat,
        "received_ms": view.received_ms,
        "clock_offset_ms": view.clock_offset_ms,
        "source": view.source,
        "status": view.status,
        "age_ms": view.age_ms,
        "state_age_ms": view.state_age_ms,
    }


def _lasting_json(shown: Shown) -> bytes:
    """The beginning of an entry: all that stays as it is until the next state comes."""
    held, heartbeat, _, received_s, source, timestamp_ms = shown
    received_ms = int(received_s * 1000)
    return (
        f'{{{as_json_fields(held)}, "heartbeat": {"true" if heartbeat else "false"}, "received_ms": {received_ms}, '
        f'"clock_offset_ms": {received_ms - timestamp_ms}, "source": {quote_json(source)}, '
    ).encode()


class _AgesJson(dict[tuple[int, int], bytes]):
    """The end of an entry for each pair of ages that was needed: looking it up takes a fifth of writing it."""

    def __init__(self, stale_ms: int) -> None:
        super().__init__()
        self._stale_ms = stale_ms

    def __missing__(self, ages: tuple[int, int]) -> bytes:
        if len(self) >= CACHED_AGES:
            self.clear()
        status = LIVE if ages[0] <= self._stale_ms else STALE
        end = self[ages] = b'"status": "%b", "age_ms": %d, "state_age_ms": %d}' % (status.encode(), *ages)
        return end


class Gateway(Protocol):
    """What a query asks of the gateway besides the store."""

    @property
    def version(self) -> str:
        """The version of the gateway."""

    def get_stats(self) -> dict[str, Any]:
        """The document of /stats."""

    def about(self) -> dict[str, Any]:
        """What heads the document of /engines: instance, uptime_ms, time_ms, stale_threshold_ms."""

    def threads(self) -> dict[str, bool]:
        """For each thread, by name, whether it is alive and moving."""

    def is_ready(self) -> bool:
        """Whether everything is open and nothing is stopping."""


class Query:
    """Answers questions by path; for one thread at a time."""

    def __init__(self, store: StateStore, gateway: Gateway) -> None:
        self._store = store
        self._gateway = gateway
        self._ages_json = _AgesJson(gateway.about()["stale_threshold_ms"])
        self._lasting: dict[str, tuple[Shown, bytes]] = {}  # of each engine, for as long as it shows that state
        self._shared = Answer(200, b"")  # the last snapshot, for those who ask before anything changes
        self._shared_key: object = None
        self._shared_ms = 0
        self._routes: dict[str, Callable[[dict[str, list[str]]], Answer]] = {
            "/engines": self._engines,
            "/stats": lambda _: json_answer(self._gateway.get_stats()),
            "/metrics": lambda _: self._metrics(),
            "/livez": lambda _: self._livez(),
            "/health": lambda _: self._livez(),
            "/readyz": lambda _: self._readyz(),
            "/version": lambda _: json_answer({"version": self._gateway.version}),
        }

    def answer(self, target: str) -> Answer:
        """Answer GET of a request target such as `/engines?status=live`; raises QueryError."""
        path, _, query = target.partition("?")
        route = self._routes.get(path)
        if route is not None:
            return route(_parameters(query))
        if path.startswith("/engines/"):
            return self._one_engine(path.removeprefix("/engines/"))
        raise QueryError(404, f"no such path; there are {', '.join(self._routes)} and /engines/<engine_id>")

    def _engines(self, parameters: dict[str, list[str]]) -> Answer:
        wanted = parameters.get("status", [])
        if any(status not in (LIVE, STALE) for status in wanted):
            raise QueryError(400, "status is live or stale")
        changes = self._store.changes()
        key = (changes, tuple(wanted))
        now_ms = self._gateway.about()["uptime_ms"]
        if self._shared_key == key and now_ms - self._shared_ms <= SHARED_MS:
            return self._shared
        self._shared = self._snapshot(wanted)
        self._shared_key, self._shared_ms = key, now_ms
        return self._shared

    def _snapshot(self, wanted: list[str]) -> Answer:
        """Every engine, joined from pieces: what has not changed since the last time is not written anew."""
        head = self._gateway.about()
        stale_ms, old, ages_json = head["stale_threshold_ms"], self._lasting, self._ages_json
        lasting: dict[str, tuple[Shown, bytes]] = {}
        pieces: list[bytes] = []
        live = 0
        rows = self._store.ages()
        for engine_id, shown, age_ms, state_age_ms in rows:
            piece = old.get(engine_id)
            if piece is None or piece[0] is not shown:
                piece = (shown, quote_json(engine_id).encode() + b": " + _lasting_json(shown))
            lasting[engine_id] = piece
            if age_ms <= stale_ms:
                live += 1
            if not wanted or (LIVE if age_ms <= stale_ms else STALE) in wanted:
                pieces += (piece[1], ages_json[age_ms, state_age_ms], b", ")
        self._lasting = lasting
        beginning = json.dumps({**head, "active_engines": live, "total_engines": len(rows)})[:-1].encode()
        return Answer(200, b'%b, "engines": {%b}}\n' % (beginning, b"".join(pieces[:-1])))

    def _one_engine(self, encoded: str) -> Answer:
        encoded_id = encoded.removesuffix("/history")
        try:
            engine_id = unquote(encoded_id, errors="strict")
        except UnicodeDecodeError:
            raise QueryError(400, "the engine_id is not percent-encoded UTF-8") from None
        if encoded_id == encoded:
            view = self._store.view(engine_id)
            if view is not None:
                ages = self._ages_json[view.age_ms, view.state_age_ms]
                return Answer(200, _lasting_json(view.shown) + ages + b"\n")
        else:
            past = self._store.history(engine_id)
            if past is not None:
                states = ", ".join(
                    f'{{{state.json_fields()}, "received_ms": {received_ms}}}' for state, received_ms in past
                )
                return Answer(200, f"[{states}]\n".encode())
        raise QueryError(404, "no such engine; its id is percent-encoded, as in http%3A%2F%2Fhost%3A8000")

    def _metrics(self) -> Answer:
        page = metrics.gateway_metrics(self._gateway.get_stats()) + metrics.engine_metrics(self._store.views())
        return Answer(200, page, metrics.CONTENT_TYPE)

    def _livez(self) -> Answer:
        threads = self._gateway.threads()
        stuck = [name for name, moving in threads.items() if not moving]
        document = {
            "status": "not alive: " + ", ".join(stuck) if stuck else "ok",
            "threads": {name: "ok" if moving else "stuck" for name, moving in threads.items()},
        }
        return json_answer(document, 503 if stuck else 200)

    def _readyz(self) -> Answer:
        ready = self._gateway.is_ready()
        return json_answer({"status": "ready" if ready else "not ready: starting or stopping"}, 200 if ready else 503)


def _parameters(query: str) -> dict[str, list[str]]:
    try:
        return parse_qs(query, keep_blank_values=True, errors="strict", max_num_fields=100)
    except ValueError:
        raise QueryError(400, "the query is not percent-encoded UTF-8") from None
