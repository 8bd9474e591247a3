"""What all engines are together: how many of each status, phase and mode, and the sums of what the usable ones have."""

from __future__ import annotations

import sys
from collections import Counter
from collections.abc import Iterable, Sequence
from typing import Any

from engine_state import SERVING, unquote_json
from engine_view import Row
from staleness import Freshness
from state_record import MODE_COLUMN, SUMMED_COLUMNS, columns_of


def fleet_document(now: float, rows: Sequence[Row], freshness: Freshness) -> dict[str, Any]:
    """The document `fleet` of /engines and /stats, of the engines in `rows` at a moment (monotonic s).

    The sums are over usable engines, which are live and whose load is known; of each the number of engines behind it,
    since an engine that does not know its own value is left out. `scheduling_modes` are those of usable engines,
    `phases` those of all that are not stale; no phase counts as serving.
    """
    live_since = freshness.live_since(now)
    heard = [visible for _, _, visible, heard_at in rows if heard_at > live_since]
    phases = Counter([visible[4][0] or SERVING for visible in heard])
    serving = phases[SERVING]
    usable = [record for record, heartbeat, _, _, about in heard if not heartbeat and (about[0] or SERVING) == SERVING]
    columns = columns_of(usable)
    return {
        "live": serving,
        "unavailable": len(heard) - serving,
        "stale": len(rows) - len(heard),
        "usable": len(usable),
        "sums": _sums(columns),
        "scheduling_modes": _counts(columns[MODE_COLUMN]),
        "phases": _counts(+phases),
    }


def _sums(columns: Sequence[Sequence[bytes]]) -> dict[str, dict[str, float]]:
    sums = {}
    for at, field in SUMMED_COLUMNS:
        values = list(map(field.decode, columns[at]))
        if field.unknown is not None:
            values = [value for value in values if value != field.unknown]
        sums[field.name] = {"sum": min(sum(values), sys.float_info.max), "engines": len(values)}  # infinity is no JSON
    return sums


def _counts(texts: Iterable[bytes]) -> dict[str, int]:
    counts = texts if isinstance(texts, Counter) else Counter(texts)
    return {unquote_json(text): count for text, count in counts.items()}
