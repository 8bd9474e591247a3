"""One engine's entry, as /engines, /engines/<engine_id> and /watch show it: what was sent, and how fresh it is.

An entry is written in two parts. Its head stays as it is until the table shows something else of the engine; its tail,
the ages and what follows from them, is another one at each moment.
"""

from __future__ import annotations

from typing import Any

from engine_state import FIELDS_JSON, SERVING
from engine_view import EngineView, Visible, status_of
from staleness import LIVE, Freshness, ages_ms
from state_record import Record, decode_record

MAX_CACHED_TAILS = 65536


def entry(view: EngineView) -> dict[str, Any]:
    """One engine as a dictionary, with the same keys and values as its entry at /engines."""
    return {
        **view.state.as_dict(),
        "heartbeat": view.heartbeat,
        "load_known": view.load_known,
        "received_ms": view.received_ms,
        "clock_offset_ms": view.clock_offset_ms,
        "source": view.source,
        "phase": view.phase,
        "restarts": view.restarts,
        "lost": view.lost,
        **({"extra": view.extra} if view.visible[4][1] else {}),
        "status": view.status,
        "usable": view.usable,
        "conflict": view.conflict,
        "age_ms": view.age_ms,
        "state_age_ms": view.state_age_ms,
    }


_HEAD = (
    b', %%b: {%b, "heartbeat": %%b, "received_ms": %%b, "clock_offset_ms": %%d, "source": %%b, "phase": %%b,'
    b' "restarts": %%d, "lost": %%b, %%b' % FIELDS_JSON
)
_LOAD_KNOWN = {True: b'true, "load_known": false', False: b'false, "load_known": true'}


def entry_head(quoted_id: bytes, visible: Visible) -> bytes:
    """The head of an entry as it follows others at /engines, under its id, which is JSON text."""
    # In one go, because this is most of what a snapshot takes: in steps it takes half as long again.
    record, heartbeat, _, source, (phase, extra, restarts, lost, _) = visible
    *texts, received = decode_record(record)
    return _HEAD % (
        quoted_id,
        quoted_id,
        *texts,
        _LOAD_KNOWN[heartbeat],
        received,
        int(received) - int(texts[0]),
        source,
        phase or b"null",
        restarts,
        b"null" if lost is None else b"%d" % lost,
        b'"extra": {%b}, ' % extra[2:] if extra else b"",
    )


def lone_entry_head(quoted_id: bytes, visible: Visible) -> bytes:
    """The head of an entry that stands alone, without the id before it."""
    return entry_head(quoted_id, visible)[len(b", ") + len(quoted_id) + len(b": ") :]


_PAST = b'{%b, "received_ms": %%b}' % FIELDS_JSON


def past_state_json(quoted_id: bytes, record: Record) -> bytes:
    """One state of an engine's history; the id is JSON text."""
    return _PAST % (quoted_id, *decode_record(record))


# What of an engine its tail depends on, besides its ages: a sum of these.
_SHOWS_HEARTBEAT, _NOT_SERVING, _CONFLICT, _STALE = 1, 2, 4, 8
Tail = tuple[bytes, str]  # and the status that is in it


def tail_kind(visible: Visible) -> int:
    """What of an engine its tail depends on, for as long as the table shows that of it."""
    phase = visible[4][0]
    return visible[1] * _SHOWS_HEARTBEAT + (phase is not None and phase != SERVING) * _NOT_SERVING


class TailCache(dict[tuple[int, int, int], Tail]):
    """The tail for each kind and pair of ages that was needed. Looking it up takes a fifth of writing it."""

    def __missing__(self, key: tuple[int, int, int]) -> Tail:
        if len(self) >= MAX_CACHED_TAILS:
            self.clear()
        kind, age, state_age = key
        status = status_of(not kind & _STALE, b"" if kind & _NOT_SERVING else None)
        usable = status == LIVE and not kind & _SHOWS_HEARTBEAT
        text = b'"status": "%b", "usable": %b, "conflict": %b, "age_ms": %d, "state_age_ms": %d}' % (
            status.encode(),
            b"true" if usable else b"false",
            b"true" if kind & _CONFLICT else b"false",
            age,
            state_age,
        )
        tail = self[key] = text, status
        return tail


class EntryTails(dict[tuple[int, float], Tail]):
    """The tails of entries at one moment, by kind and by when the engines were last heard from: many were at once.

    Looked up like this, they are of engines that were last heard from when the state shown was received.
    """

    def __init__(self, now: float, freshness: Freshness, cache: TailCache) -> None:
        super().__init__()
        self._now = now
        self._live_since = freshness.live_since(now)
        self._cache = cache

    def __missing__(self, key: tuple[int, float]) -> Tail:
        kind, heard_at = key
        tail = self[key] = self._of(kind, heard_at, heard_at)
        return tail

    def of(self, visible: Visible, heard_at: float) -> Tail:
        """The tail of any engine."""
        conflict = _CONFLICT if visible[4][4] > self._now else 0
        return self._of(tail_kind(visible) + conflict, heard_at, visible[2])

    def _of(self, kind: int, heard_at: float, shown_at: float) -> Tail:
        age, state_age = ages_ms(self._now, heard_at, shown_at)
        stale = 0 if heard_at > self._live_since else _STALE
        return self._cache[kind + stale, age, state_age]
