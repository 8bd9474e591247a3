"""The last datagram that was rejected for each reason: when, from where, and what was wrong with it."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from datagram_signature import SIGNATURE_REASONS
from engine_state import REASONS, unquote_json
from gateway_counters import REJECTED_CAPACITY, REJECTED_SOURCE

MAX_DETAIL_CHARS = 300

# s since the epoch, the source as JSON text, a pattern and its arguments: put together only when somebody reads it.
_Kept = tuple[float, bytes, str, Sequence[object]]


class RejectedSamples:
    """Written by the listener's thread only; any thread may read it.

    Not locked: each value is replaced as a whole, and no key is ever added.
    """

    def __init__(self) -> None:
        self._last: dict[str, _Kept | None] = dict.fromkeys(
            (*REASONS, *SIGNATURE_REASONS, REJECTED_CAPACITY, REJECTED_SOURCE)
        )

    def keep(self, reason: str, received_s: float, source: bytes, detail: str = "", *arguments: object) -> None:
        """Keep the last one of a reason. `source` is JSON text, as arguments of bytes are."""
        self._last[reason] = received_s, source, detail, arguments

    def document(self) -> dict[str, dict[str, Any]]:
        """As it is at /stats: for each reason that occurred `time_ms`, `source` and `detail`."""
        found = {}
        for reason, kept in self._last.items():
            if kept is not None:
                received_s, source, detail, arguments = kept
                shown = tuple(unquote_json(one) if isinstance(one, bytes) else one for one in arguments)
                found[reason] = {
                    "time_ms": int(received_s * 1000),
                    "source": unquote_json(source),
                    "detail": (detail % shown)[:MAX_DETAIL_CHARS],
                }
        return found
