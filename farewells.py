"""The farewells of engines that were known, so that a datagram that comes late behind one revives nobody."""

from __future__ import annotations

from typing import NamedTuple

from boot_sequence import MAX_GAP, BootSequence
from staleness import Freshness, age_ms


class _Farewell(NamedTuple):
    at: float  # when it was heard, monotonic s
    sequence: BootSequence | None  # of the engine; None if it had no `boot`
    timestamp_ms: int


class Farewells:
    """By engine_id; at most `max_engines`, the oldest making room. Not locked: used under the store's lock."""

    def __init__(self, max_engines: int, freshness: Freshness) -> None:
        self._max_engines = max_engines
        self._freshness = freshness
        self._farewells: dict[bytes, _Farewell] = {}  # the oldest first

    def remember(self, quoted_id: bytes, now: float, sequence: BootSequence | None, timestamp_ms: int) -> None:
        """Remember the farewell of a known engine."""
        self._farewells.pop(quoted_id, None)
        if len(self._farewells) >= self._max_engines:
            del self._farewells[next(iter(self._farewells))]
        self._farewells[quoted_id] = _Farewell(now, sequence, timestamp_ms)

    def overtook(
        self, quoted_id: bytes, boot: bytes | None, seq: int, timestamp_ms: int, now: float, *, is_farewell: bool
    ) -> bool:
        """Whether a datagram of an engine that is not known was sent before the engine's farewell.

        One without `boot` was if its timestamp is not above the farewell's; the same is the farewell itself again.
        """
        farewell = self._farewells.get(quoted_id)
        if farewell is None or self._freshness.is_expired(age_ms(now, farewell.at)):
            return False
        if boot is None or farewell.sequence is None:
            behind_ms = farewell.timestamp_ms - timestamp_ms
            return boot is None and (1 if is_farewell else 0) <= behind_ms <= self._freshness.stale_ms
        if boot == farewell.sequence.boot:
            return seq < farewell.sequence.highest
        # An earlier boot, as while the engine was there.
        return farewell.sequence.knows(boot) and self._freshness.is_live(age_ms(now, farewell.at))

    def place(self, quoted_id: bytes, boot: bytes | None, seq: int, now: float) -> tuple[int, int]:
        """Note a further number of the boot that said farewell, such as the farewell's repetition.

        Returns how many numbers were passed over, and how many of those came after all, as BootSequence counts them.
        """
        farewell = self._farewells.get(quoted_id)
        if farewell is None or farewell.sequence is None or boot != farewell.sequence.boot:
            return 0, 0
        if seq > farewell.sequence.highest + MAX_GAP:
            return 0, 0  # nonsense, and a lower one is not to be overtaken by it
        farewell.sequence.place(boot, seq, now, now)
        return farewell.sequence.uncounted_losses()

    def forget(self, quoted_id: bytes, now: float) -> BootSequence | None:
        """The engine speaks again; returns the numbers of what it was before, if they still count."""
        farewell = self._farewells.pop(quoted_id, None)
        if farewell is None or self._freshness.is_expired(age_ms(now, farewell.at)):
            return None
        return farewell.sequence

    def expire(self, now: float) -> None:
        """Forget those that are older than EXPIRE_AFTER."""
        while self._farewells:
            quoted_id, farewell = next(iter(self._farewells.items()))
            if not self._freshness.is_expired(age_ms(now, farewell.at)):
                return
            del self._farewells[quoted_id]

    def __len__(self) -> int:
        return len(self._farewells)
