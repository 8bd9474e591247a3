"""The staleness rule: from when it was heard from until an engine is stale, and until it is removed.

After a pause of the gateway itself staleness is judged as of the pause's beginning for a while: see pause_meter.

All is judged by the gateway's own monotonic clock, when somebody looks, and in whole milliseconds, as they are shown.
"""

from __future__ import annotations

from collections.abc import Callable

LIVE = "live"
STALE = "stale"
UNAVAILABLE = "unavailable"  # live, and says itself that it is not to be sent requests
STATUSES = (LIVE, UNAVAILABLE, STALE)


def age_ms(now: float, then: float) -> int:
    """Whole milliseconds since then, 0 if it is not over yet; both in s, monotonic."""
    # A difference of two floats may be a hair below the millisecond that it is.
    return int((now - then) * 1000 + 1e-3) if then < now else 0


def ages_ms(now: float, heard_at: float, shown_at: float) -> tuple[int, int]:
    """`age_ms` and `state_age_ms` of an engine; the state shown is never younger than the engine's last sign."""
    age = age_ms(now, heard_at)
    return age, max(age, age_ms(now, shown_at))


class Freshness:
    """Says of an engine whether it is live, stale or expired; never changes, safe in any thread."""

    def __init__(self, stale_ms: int, expire_ms: int, judged_at: Callable[[float], float] = lambda now: now) -> None:
        """`judged_at` says as of which moment staleness is judged now: earlier than now after a pause."""
        self.stale_ms = stale_ms  # the oldest age of a live engine
        self.expire_ms = expire_ms  # the oldest age of an engine that is not removed
        self.judged_at = judged_at
        self._stale_s = (stale_ms + 1 - 1e-3) / 1000  # the first moment at which age_ms is above stale_ms

    def live_since(self, now: float) -> float:
        """Engines that were heard from after this moment are live, the others are stale."""
        return self.judged_at(now) - self._stale_s

    def stale_at(self, heard_at: float) -> float:
        """The first moment at which an engine that was heard from then is stale."""
        return heard_at + self._stale_s

    def is_live(self, silence_ms: int) -> bool:
        """Whether an engine is live that was silent for so long at the moment of `judged_at`."""
        return silence_ms <= self.stale_ms

    def is_expired(self, silence_ms: int) -> bool:
        """Whether an engine is to be removed that was silent for so long at the moment of `judged_at`."""
        return silence_ms > self.expire_ms
