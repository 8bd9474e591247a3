"""The fleet in one look: how many engines are in which condition, and the sums of the load of those that are usable."""

from __future__ import annotations

import sys
from collections import Counter
from collections.abc import Sequence
from typing import Any

from engine_state import FIELDS, Field
from staleness import LIVE, STALE
from state_record import decode_record
from state_store import EngineView

_COLUMNS = {field.name: at - 1 for at, field in enumerate(FIELDS)}  # of a decoded record
_SUMMED = tuple(field for field in FIELDS if field.summed)
_MODE = next(field for field in FIELDS if field.name == "scheduling_mode")


def fleet_document(views: Sequence[EngineView]) -> dict[str, Any]:
    """The fleet as it is at /stats and /samples, of every engine as it was at one moment.

    The sums are over usable engines, which are live and whose load is known; of each the number of engines behind it,
    since an engine that does not know its own value is left out. `scheduling_modes` are those of usable engines.
    """
    statuses = Counter(view.status for view in views)
    usable = [view.visible[0] for view in views if view.status == LIVE and not view.heartbeat]
    columns = list(zip(*map(decode_record, usable), strict=True)) or [()] * len(FIELDS)
    modes = Counter(columns[_COLUMNS[_MODE.name]])
    return {
        "live": statuses[LIVE],
        "unavailable": len(views) - statuses[LIVE] - statuses[STALE],
        "stale": statuses[STALE],
        "usable": len(usable),
        "sums": {field.name: _sum(field, columns[_COLUMNS[field.name]]) for field in _SUMMED},
        "scheduling_modes": {str(_MODE.decode(text)): count for text, count in modes.most_common()},
        "phases": {},
    }


def _sum(field: Field, texts: Sequence[bytes]) -> dict[str, Any]:
    known = [value for value in map(field.decode, texts) if value != field.unknown]
    return {"sum": min(sum(known), sys.float_info.max), "engines": len(known)}  # infinity is no JSON
