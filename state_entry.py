"""One engine's entry, as /engines, /engines/<engine_id> and /watch show it: what was sent, and how fresh it is.

An entry is written in two parts, because one of them stays as it is until the next state comes.
"""

from __future__ import annotations

from typing import Any

from engine_state import as_json, quote_json, received_ms, timestamp_ms
from state_store import LIVE, STALE, EngineView, Shown

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


def lasting_json(engine_id: str, shown: Shown) -> bytes:
    """The beginning of an entry: all that stays as it is until the next state comes."""
    held, heartbeat, _, source = shown
    received = received_ms(held)
    return b'{%b, "heartbeat": %b, "received_ms": %d, "clock_offset_ms": %d, "source": %b, ' % (
        as_json(quote_json(engine_id).encode(), held),
        b"true" if heartbeat else b"false",
        received,
        received - timestamp_ms(held),
        source,
    )


class AgesJson(dict[tuple[int, int], bytes]):
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
