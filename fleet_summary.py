"""What all engines are together: how many of each status, phase and mode, and the sums of what the usable ones have.

Theory of operation. Making numbers of 10,000 records takes 15 ms, and most of them were read already for the last
answer. So what was read of each engine is kept, in columns, until the table shows something else in its place. Adding a
column up takes a tenth of a millisecond, and is done anew for each answer: who is live changes by itself, and sums that
were carried on would drift, since a sum of floats depends on the order.
"""

from __future__ import annotations

import sys
import threading
from collections import Counter
from collections.abc import Iterable, Sequence
from itertools import compress
from operator import and_, is_not
from typing import Any, TypeVar

from engine_state import FIELDS, SERVING, unquote_json
from engine_view import Visible
from staleness import Freshness
from state_record import decode_columns

_READ_AT_ONCE = 512  # engines; the interpreter's lock is held for a fraction of a millisecond
_SUMMED = tuple(field for field in FIELDS if field.summed)
_DECODED = ("scheduling_mode", *(field.name for field in _SUMMED))
_Value = TypeVar("_Value")


class FleetSummary:
    """The document `fleet` of /engines and /stats; for any thread."""

    def __init__(self, freshness: Freshness) -> None:
        self._freshness = freshness
        # Guards all below, for the time of one summary. Intake never waits for it. A place in each of the lists for
        # each engine, in the table's order; what stands in a place is of the visible that stands in the same one.
        self._lock = threading.Lock()
        self._visibles: list[Visible | None] = []
        self._phases: list[bytes] = []
        self._is_ready: list[bool] = []  # whether the engine is usable as long as it is live
        self._modes: list[str] = []
        self._summed: list[list[float]] = [[] for _ in _SUMMED]

    def document(self, now: float, visibles: Sequence[Visible], heard_at: Sequence[float]) -> dict[str, Any]:
        """What the table shows of each engine at a moment, and when each was last heard from; both monotonic s.

        The sums are over usable engines, which are live and whose load is known; of each the number of engines behind
        it, since an engine that does not know its own value is left out. `scheduling_modes` are those of usable
        engines, `phases` those of all that are not stale; no phase counts as serving.
        """
        live_since = self._freshness.live_since(now)
        live = [heard > live_since for heard in heard_at]
        with self._lock:
            self._read(visibles)
            usable = list(map(and_, live, self._is_ready))
            phases = _counts(_where(live, self._phases))
            modes = _counts(_where(usable, self._modes))
            sums = [
                _sum(_where(usable, column), field.unknown) for field, column in zip(_SUMMED, self._summed, strict=True)
            ]
        heard, serving = live.count(True), phases.get(SERVING, 0)
        return {
            "live": serving,
            "unavailable": heard - serving,
            "stale": len(live) - heard,
            "usable": usable.count(True),
            "sums": {field.name: summed for field, summed in zip(_SUMMED, sums, strict=True)},
            "scheduling_modes": modes,
            "phases": {unquote_json(phase): count for phase, count in phases.items()},
        }

    def _read(self, visibles: Sequence[Visible]) -> None:
        """Read what has changed in its place; an engine that is no more moves those behind it, which are read anew."""
        columns: tuple[list[Any], ...] = (self._phases, self._is_ready, self._modes, *self._summed, self._visibles)
        try:
            self._read_into(columns, visibles)
        except BaseException:  # no memory: nothing half read may stay
            for column in columns:
                column.clear()
            raise

    def _read_into(self, columns: tuple[list[Any], ...], visibles: Sequence[Visible]) -> None:
        missing = len(visibles) - len(self._visibles)
        for column in columns:
            if missing < 0:
                del column[missing:]
            else:
                column.extend([None] * missing)
        changed = list(compress(range(len(visibles)), map(is_not, visibles, self._visibles)))
        for first in range(0, len(changed), _READ_AT_ONCE):
            places = changed[first : first + _READ_AT_ONCE]
            start, end = places[0], places[-1] + 1
            is_run = end - start == len(places)
            now_there = visibles[start:end] if is_run else [visibles[place] for place in places]
            for column, values in zip(columns, _values(now_there), strict=True):
                if is_run:
                    column[start:end] = values
                else:
                    for place, value in zip(places, values, strict=True):
                        column[place] = value


def _values(visibles: Sequence[Visible]) -> Iterable[Iterable[Any]]:
    """What is kept of some engines, column by column."""
    phases = [visible[4][0] or SERVING for visible in visibles]
    is_ready = [not visible[1] and phase == SERVING for visible, phase in zip(visibles, phases, strict=True)]
    return phases, is_ready, *decode_columns([visible[0] for visible in visibles], _DECODED), visibles


def _where(wanted: list[bool], column: list[_Value]) -> list[_Value]:
    return list(compress(column, wanted)) if False in wanted else column


def _counts(values: list[_Value]) -> dict[_Value, int]:
    """How often each occurs. Most often they are all alike, which is seen thirty times as fast."""
    first = values[:1]
    return {first[0]: len(values)} if first and values.count(first[0]) == len(values) else dict(Counter(values))


def _sum(values: list[float], unknown: float | None) -> dict[str, float]:
    if unknown is not None and unknown in values:
        values = [value for value in values if value != unknown]
    return {"sum": min(sum(values), sys.float_info.max), "engines": len(values)}  # infinity is no JSON
