"""One engine's entry, as /engines, /engines/<engine_id> and /watch show it: what was sent, and how fresh it is.

An entry is written in two parts, because one of them stays as it is until the next state comes.
"""

from __future__ import annotations

from typing import Any

from engine_state import FIELDS_JSON
from staleness import LIVE, STALE, Freshness, ages_ms
from state_record import Record, decode_record
from state_store import EngineView, Visible

CACHED_AGES = 65536


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


_HEAD = b', %%b: {%b, "heartbeat": %%b, "received_ms": %%b, "clock_offset_ms": %%d, "source": %%b, ' % FIELDS_JSON


def entry_head(quoted_id: bytes, visible: Visible) -> bytes:
    """The beginning of an entry as it follows others at /engines, under its id: all that lasts until the next state.

    The id is JSON text.
    """
    # In one go, because this is most of what a snapshot takes: in steps it takes half as long again.
    record, heartbeat, _, source = visible
    *texts, received = decode_record(record)
    quoted_heartbeat = b"true" if heartbeat else b"false"
    offset = int(received) - int(texts[0])
    return _HEAD % (quoted_id, quoted_id, *texts, quoted_heartbeat, received, offset, source)


_PAST = b'{%b, "received_ms": %%b}' % FIELDS_JSON


def past_state_json(quoted_id: bytes, record: Record) -> bytes:
    """One state of an engine's history; the id is JSON text."""
    return _PAST % (quoted_id, *decode_record(record))


def lone_entry_head(quoted_id: bytes, visible: Visible) -> bytes:
    """The same of an entry that stands alone."""
    return entry_head(quoted_id, visible)[len(b", ") + len(quoted_id) + len(b": ") :]


class AgesJson(dict[tuple[int, int, bool], bytes]):
    """The end of an entry for each pair of ages, and whether the engine is live, that was needed.

    Looking it up takes a fifth of writing it.
    """

    def __missing__(self, ages: tuple[int, int, bool]) -> bytes:
        if len(self) >= CACHED_AGES:
            self.clear()
        age, state_age, live = ages
        status = LIVE if live else STALE
        text = self[ages] = b'"status": "%b", "age_ms": %d, "state_age_ms": %d}' % (status.encode(), age, state_age)
        return text


class EndsJson(dict[float, tuple[bytes, bool]]):
    """The ends of entries at one moment, by when the engines were last heard from: a batch of them was at once."""

    def __init__(self, now: float, freshness: Freshness, ages_json: AgesJson) -> None:
        super().__init__()
        self._now = now
        self._live_since = freshness.live_since(now)
        self._ages_json = ages_json

    def __missing__(self, heard_at: float) -> tuple[bytes, bool]:
        end = self[heard_at] = self.of(heard_at, heard_at)
        return end

    def of(self, heard_at: float, shown_at: float) -> tuple[bytes, bool]:
        """The end for an engine that was heard from after the state shown was received."""
        age, state_age = ages_ms(self._now, heard_at, shown_at)
        live = heard_at > self._live_since
        return self._ages_json[age, state_age, live], live
