"""What each path of the query interface answers. Nothing here knows of sockets; nothing can be changed through it.

To add a route, add a row to ROUTES. Answers are computed from copies, without any lock.
"""

from __future__ import annotations

import base64
import contextlib
import hashlib
import json
import pkgutil
import re
import time
from collections.abc import Callable, Collection, Container
from dataclasses import replace
from pathlib import Path
from typing import Any, Protocol

import state_metrics as metrics
from engine_state import SERVING, quote_json
from engine_view import Visible
from http_message import METHODS, Answer, QueryError, Request, StreamsFull, error_answer, json_answer
from openapi_document import openapi_document
from query_route import MAX_INTERVAL_MS, Question, Route, decode, listed, parse_query
from reader_access import ReaderAccess
from staleness import STATUSES
from state_entry import EntryTails, entry_head, lone_entry_head, past_state_json, tail_kind
from state_store import StateStore
from state_watch import DATA_LINE, MAX_READERS, Watch, WatchReader

DISTRIBUTION = "elrar-state-gateway"
STATUS_PAGE = Path(__file__).parent / "status_page.html"
_ALLOW = f"Allow: {', '.join(METHODS)}"
_SCRIPT_TYPE = "text/javascript; charset=utf-8"
SHARED_S = 0.01  # how old a snapshot may be that is given to several readers


def _read_status_page() -> bytes:
    """Beside this module; or, as `pip install` has it, in a folder for data that its record knows; raises OSError."""
    try:
        return STATUS_PAGE.read_bytes()
    except NotADirectoryError:  # the module is in an archive, gateway.pyz, and so is the page
        return pkgutil.get_data(__name__, STATUS_PAGE.name) or b""
    except FileNotFoundError:
        import importlib.metadata  # only here: it takes 50 ms

        with contextlib.suppress(importlib.metadata.PackageNotFoundError):
            for file in importlib.metadata.files(DISTRIBUTION) or ():
                if file.name == STATUS_PAGE.name:
                    return Path(str(file.locate())).read_bytes()
        raise


def status_page() -> tuple[Answer, Answer]:
    """The status page, with a policy under which a browser runs its own scripts and style and nothing else.

    Its first script is the second answer: by itself it is the worker that feeds all tabs of a browser.
    """
    try:
        page = _read_status_page()
    except OSError as error:
        missing = error_answer(404, f"the status page is not there: {error}")
        return missing, missing
    scripts, styles = (
        re.findall(rb"<%b>(.*?)</%b>" % (element, element), page, flags=re.DOTALL) for element in (b"script", b"style")
    )
    sources = [
        " ".join(f"'sha256-{base64.b64encode(hashlib.sha256(text).digest()).decode()}'" for text in texts) or "'none'"
        for texts in (scripts, styles)
    ]
    policy = (
        f"default-src 'none'; script-src {sources[0]}; style-src {sources[1]}; worker-src 'self'; connect-src 'self';"
        " img-src data:; base-uri 'none'; form-action 'none'; frame-ancestors 'none';"
        " require-trusted-types-for 'script'; trusted-types status-feed"
    )
    headers = (f"Content-Security-Policy: {policy}", "Referrer-Policy: no-referrer")
    feed_headers = ("Content-Security-Policy: default-src 'none'; connect-src 'self'", "Referrer-Policy: no-referrer")
    feed = Answer(200, scripts[0] if scripts else b"", _SCRIPT_TYPE, feed_headers)
    return Answer(200, page, "text/html; charset=utf-8", headers), feed


class Gateway(Protocol):
    """What a query asks of the gateway besides the store."""

    @property
    def version(self) -> str:
        """The version of the gateway."""

    @property
    def embedded(self) -> bool:
        """Whether it runs in a router's process."""

    def get_stats(self) -> dict[str, Any]:
        """The document of /stats."""

    def get_events(self, since_ms: int = 0) -> list[dict[str, Any]]:
        """The document of /events, from a time on, in ms since the epoch."""

    def samples_json(self, since_ms: int = 0) -> bytes:
        """The document of /samples, likewise, as JSON text."""

    def snapshot_header(self) -> dict[str, Any]:
        """What heads the document of /engines: instance, uptime_ms, time_ms, stale_threshold_ms."""

    def catch_up(self) -> None:
        """Have everything taken that has arrived by now, if that does not take long."""

    def threads(self) -> dict[str, bool]:
        """For each thread, by name, whether it is alive and moving."""

    def is_ready(self) -> bool:
        """Whether everything is open and nothing is stopping."""

    def ready_in_ms(self) -> int:
        """How much of READY_AFTER is left."""


class Query:
    """Answers questions by path; for one thread at a time."""

    def __init__(
        self,
        store: StateStore,
        gateway: Gateway,
        watch: Watch,
        *,
        access: ReaderAccess | None = None,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._access = access or ReaderAccess()
        self._store = store
        self._gateway = gateway
        self._watch = watch
        self._clock = clock
        self._page, self._feed = status_page()
        self._openapi_answer = json_answer(openapi_document(ROUTES, gateway.version))
        self._tail_cache = watch.tail_cache
        self._lasting: dict[str, tuple[Visible, bytes, int]] = {}  # of each engine, for as long as it shows that state
        self._shared = Answer(200, b"")  # the last snapshot, for those who ask before anything changes
        self._shared_key: object = None
        self._shared_at = 0.0

    def is_probe(self, request: Request) -> bool:
        """Whether a request is answered before all others, and also if there is no place for more connections."""
        if request.method == "OPTIONS":
            return True
        try:
            return find_route(request.target.partition("?")[0])[0].is_probe
        except QueryError:
            return False

    def headers_for(self, request: Request) -> tuple[str, ...]:
        """Header lines that any answer to this request has."""
        return self._access.headers_for(request)

    def may_go_on(self, request: Request) -> bool:
        """Whether the stream that a request was given may go on: tokens may have been replaced since."""
        return self._access.may_read(request)

    def respond(self, request: Request, network: str = "") -> Answer | WatchReader:
        """Answer a request that comes from a network, also one that cannot be answered; raises StreamsFull."""
        if request.method == "OPTIONS":
            return Answer(204, b"", headers=(_ALLOW,))
        if self._access.needs_token and not self.is_probe(request):
            refusal = self._access.refusal(request, network)
            if refusal is not None:
                return refusal
        if request.method not in METHODS:
            not_allowed = error_answer(405, f"this is read-only: {listed(METHODS)} are answered")
            return replace(not_allowed, headers=(_ALLOW,))
        try:
            return self.answer(request.target, request.header("last-event-id"))
        except StreamsFull:
            raise
        except QueryError as error:
            return error_answer(error.status, str(error))

    def answer(self, target: str, last_event_id: str = "") -> Answer | WatchReader:
        """Answer GET of a request target such as `/engines?status=live`; raises QueryError.

        `last_event_id` is what a reader of /watch says that it was sent last.
        """
        path, _, query = target.partition("?")
        route, engine_id = find_route(path)
        parameters = {} if route.parameters is None else parse_query(query, route)
        if engine_id is not None:
            parameters["engine_id"] = [decode(engine_id)]
        answer: Answer | WatchReader = route.function(self, Question(parameters, last_event_id))
        return answer

    def _status_page(self, _: Question) -> Answer:
        return self._page

    def _status_feed(self, _: Question) -> Answer:
        return self._feed

    def _engines(self, question: Question) -> Answer:
        wanted = question.among("status", STATUSES)
        phases = {quote_json(phase).encode("utf-8", "replace") for phase in question.parameters.get("phase", [])}
        engine_ids = question.engine_ids()
        self._gateway.catch_up()
        changes = self._store.changes()
        key = (changes, tuple(wanted), frozenset(phases), engine_ids)
        now = self._clock()
        if self._shared_key == key and now - self._shared_at <= SHARED_S:
            return self._shared
        self._shared = self._snapshot(wanted or STATUSES, engine_ids, phases)
        self._shared_key, self._shared_at = key, now
        return self._shared

    def _watched(self, question: Question) -> WatchReader:
        if not self._gateway.is_ready():
            raise QueryError(503, "starting or stopping")
        engine_ids = question.engine_ids()
        intervals = question.parameters.get("min_interval_ms", ["0"])
        if not all(re.fullmatch("[0-9]{1,7}", text) and int(text) <= MAX_INTERVAL_MS for text in intervals):
            raise QueryError(400, f"min_interval_ms is a whole number of milliseconds from 0 to {MAX_INTERVAL_MS}")
        self._gateway.catch_up()
        reader = self._watch.open(
            lambda: self._snapshot(STATUSES, engine_ids, between=DATA_LINE).body,
            engine_ids,
            int(intervals[-1]),
            question.last_event_id,
        )
        if reader is None:
            raise StreamsFull(503, f"/watch has its {MAX_READERS} readers already; /engines can be asked instead")
        return reader

    def _snapshot(
        self,
        statuses: Container[str],
        engine_ids: Collection[str] = (),
        phases: Collection[bytes] = (),
        *,
        between: bytes = b"",
    ) -> Answer:
        """The engines asked for, joined from pieces: what has not changed since the last time is not written anew.

        `between` is put before each engine and before the end, where JSON allows white space.
        """
        head = self._gateway.snapshot_header()
        now, rows = self._store.snapshot_of(engine_ids) if engine_ids else self._store.snapshot()
        fleet = self._store.fleet() if engine_ids else self._store.fleet_of(now, rows)
        tails, lasting = EntryTails(now, self._store.freshness, self._tail_cache), self._lasting
        pieces = [b""]
        for engine_id, quoted_id, visible, heard_at in rows:
            piece = lasting.get(engine_id)
            if piece is None or piece[0] is not visible:
                piece = lasting[engine_id] = visible, entry_head(quoted_id, visible), tail_kind(visible)
            _, _, shown_at, _, (phase, _, _, _, conflict_until) = visible
            if shown_at == heard_at and conflict_until < now:
                tail, status = tails[piece[2], heard_at]
            else:
                tail, status = tails.of(visible, heard_at)
            if status in statuses and (not phases or (phase or SERVING) in phases):
                pieces += (between, piece[1], tail)
        if not engine_ids and len(lasting) > len(rows):  # some are no more
            self._lasting = {engine_id: lasting[engine_id] for engine_id, *_ in rows}
        total = fleet["live"] + fleet["unavailable"] + fleet["stale"]
        counts = {"active_engines": fleet["live"], "total_engines": total, "fleet": fleet}
        document = json.dumps({**head, **counts, "engines": {}}, ensure_ascii=False)
        pieces[0] = document[:-2].encode()
        if len(pieces) > 1:
            pieces[2] = pieces[2].removeprefix(b", ")
        pieces += (between, b"}}\n")
        return Answer(200, b"".join(pieces))  # at once: each further copy of half a megabyte takes 0.3 ms

    def _one_engine(self, question: Question) -> Answer:
        engine_id = question.engine_id()
        self._gateway.catch_up()
        now, rows = self._store.snapshot_of([engine_id])
        if not rows:
            raise QueryError(404, _NO_SUCH_ENGINE)
        ((_, quoted_id, visible, heard_at),) = rows
        tail, _ = EntryTails(now, self._store.freshness, self._tail_cache).of(visible, heard_at)
        return Answer(200, lone_entry_head(quoted_id, visible) + tail + b"\n")

    def _history(self, question: Question) -> Answer:
        engine_id = question.engine_id()
        self._gateway.catch_up()
        past = self._store.history_records(engine_id)
        if past is None:
            raise QueryError(404, _NO_SUCH_ENGINE)
        quoted_id = quote_json(engine_id).encode()
        return Answer(200, b"[%b]\n" % b", ".join([past_state_json(quoted_id, record) for record in past]))

    def _stats(self, _: Question) -> Answer:
        self._gateway.catch_up()
        return json_answer(self._gateway.get_stats())

    def _events(self, question: Question) -> Answer:
        return json_answer(self._gateway.get_events(question.since_ms()))

    def _samples(self, question: Question) -> Answer:
        return Answer(200, self._gateway.samples_json(question.since_ms()) + b"\n")

    def _metrics(self, question: Question) -> Answer:
        wanted = question.among("engines", ("yes", "no"))
        self._gateway.catch_up()
        page = metrics.gateway_metrics(self._gateway.get_stats())
        if "no" not in wanted:
            page += metrics.engine_metrics(self._store.views())
        return Answer(200, page, metrics.CONTENT_TYPE)

    def _livez(self, _: Question) -> Answer:
        threads = self._gateway.threads()
        stuck = [name for name, moving in threads.items() if not moving]
        document = {
            "status": "not alive: " + ", ".join(stuck) if stuck else "ok",
            "threads": {name: "ok" if moving else "stuck" for name, moving in threads.items()},
        }
        return json_answer(document, 503 if stuck else 200)

    def _readyz(self, _: Question) -> Answer:
        if not self._gateway.is_ready():
            return json_answer({"status": "not ready: starting or stopping"}, 503)
        wait_ms = self._gateway.ready_in_ms()
        if wait_ms:
            return json_answer({"status": f"not ready: for another {wait_ms} ms, by READY_AFTER"}, 503)
        return json_answer({"status": "ready"})

    def _openapi(self, _: Question) -> Answer:
        return self._openapi_answer

    def _version(self, _: Question) -> Answer:
        embedded = {"embedded": True} if self._gateway.embedded else {}  # nobody restarts a router's own gateway
        return json_answer({"version": self._gateway.version, **embedded})


_NO_SUCH_ENGINE = "no such engine; in a path its id is percent-encoded, as in http%3A%2F%2Fhost%3A8000"

_HTML, _METRICS, _EVENTS, _SCRIPT = "text/html", "text/plain", "text/event-stream", "text/javascript"

ROUTES = (
    Route("/", Query._status_page, "the status page, for people", None, media_type=_HTML),
    Route("/status-feed.js", Query._status_feed, "the status page's script that reads for all tabs of a browser",
          media_type=_SCRIPT),
    Route("/engines", Query._engines, "every engine and how fresh its state is, or those that are asked for",
          ("engine_id", "status", "phase"), schema="Snapshot"),
    Route("/engines/<engine_id>", Query._one_engine, "one engine", schema="Entry"),
    Route("/engines/<engine_id>/history", Query._history, "an engine's latest states, oldest first", schema="History"),
    Route("/history", Query._history, "the same, for readers behind a proxy that decodes paths", ("engine_id",),
          required=("engine_id",), schema="History"),
    Route("/stats", Query._stats, "counters, settings in effect, losses of the log and the kernel", schema="Stats"),
    Route("/events", Query._events, "what happened lately, oldest first", ("since",), schema="Events"),
    Route("/samples", Query._samples, "the last two hours, a sample every 10 s", ("since",), schema="Samples"),
    Route("/metrics", Query._metrics, "the same and every engine, in Prometheus' text format", ("engines",),
          media_type=_METRICS),
    Route("/livez", Query._livez, "whether every thread is alive and moving", None, schema="Liveness", is_probe=True),
    Route("/health", Query._livez, "the same", None, schema="Liveness", is_probe=True),
    Route("/readyz", Query._readyz, "whether everything is open", None, schema="Readiness", is_probe=True),
    Route("/version", Query._version, "the version of the gateway", schema="Version"),
    Route("/watch", Query._watched, "a snapshot, then each change as it happens, as server-sent events",
          ("engine_id", "min_interval_ms"), media_type=_EVENTS),
    Route("/openapi.json", Query._openapi, "this description", schema="Anything"),
)  # fmt: skip
_BY_PATH = {route.path: route for route in ROUTES}


def find_route(path: str) -> tuple[Route, str | None]:
    """The route of a path, and the engine_id in the path, still encoded; raises QueryError for an unknown path."""
    if path.startswith("//"):  # what some proxies make of a path below theirs
        path = "/" + (path.lstrip("/") or "/")
    route = _BY_PATH.get(path)
    if route is not None:
        return route, None
    if path.startswith("/engines/") and path != "/engines/":
        encoded = path.removeprefix("/engines/")
        encoded_id = encoded.removesuffix("/history")
        return _BY_PATH["/engines/<engine_id>" + encoded[len(encoded_id) :]], encoded_id
    raise QueryError(404, f"no such path; there are {listed(_BY_PATH)}")
