"""What was taken of each boot of each engine, with keys: so that nothing that was signed is taken a second time.

Theory of operation. What is signed has `boot` and `seq`, and a `timestamp_ms` within MAX_CLOCK_ERROR_MS of this host's
clock. A number is taken once: within a boot, only one above the highest taken passes. A boot is remembered until
MAX_CLOCK_ERROR_MS after the highest timestamp taken of it, whatever becomes of the engine's entry in the table; from
then on its datagrams are refused for their timestamps. So nothing passes twice, however often the engine restarts. The
clock may be set back: a boot is forgotten only once both clocks, the host's and the monotonic one, say that it is time.

None is forgotten before, so that nobody can make room for a replay: beyond MAX_BOOTS an engine, or the maximum of all,
it is the new boot that is refused. What the memory does not know is a boot that this gateway never heard: it takes over
from a live one only with a timestamp above all that were taken of that; if the engine is silent it passes.
"""

from __future__ import annotations

from collections.abc import Sequence
from heapq import heapify, heappop, heappush, heapreplace

from datagram_signature import CLOCK, NO_SEQUENCE, REPLAYED, TOO_MANY_BOOTS
from engine_state import BOOT, GONE, PHASE, SEQ, DatagramTexts
from staleness import Freshness

MAX_CLOCK_ERROR_MS = 300_000
MAX_BOOTS = 16  # of one engine
BOOTS_PER_ENGINE = 4  # of MAX_ENGINES: so many boots in all
MAX_LOOKED_AT = 256  # boots that are looked at in one go, whether it is time to forget them
MIN_TAKEN_BACK = 1024  # of which the heap is rid in one go

# What is to become of a datagram, besides a reason for which it is refused.
TAKEN = "taken"
COPY = "copy"  # the last one that was taken, again: a duplicate
LATE = "late"  # of an earlier boot, while the current one is live: out of order


class _Boot:
    """What is remembered of one boot."""

    __slots__ = ("boot", "engine", "first_at", "highest", "is_known", "newest_ms")

    def __init__(self, engine: _Engine, boot: bytes, now: float) -> None:
        self.engine = engine
        self.boot = boot
        self.first_at = now  # when it was first heard, monotonic s
        self.highest = -1  # the highest number taken
        self.newest_ms = 0  # the highest timestamp taken
        self.is_known = True  # until it is forgotten


class _Engine:
    """What is remembered of one engine_id."""

    __slots__ = ("boots", "current", "heard_at", "quoted_id", "signature")

    def __init__(self, quoted_id: bytes) -> None:
        self.quoted_id = quoted_id
        self.boots: dict[bytes, _Boot] = {}
        self.current: _Boot | None = None  # the boot that the table shows
        self.heard_at = float("-inf")  # when that was last heard from, monotonic s
        self.signature = b""  # of the last datagram taken


class BootMemory:
    """Says of each signed datagram whether it may be taken. For the listener's thread."""

    def __init__(self, max_engines: int, freshness: Freshness) -> None:
        self._max_boots = BOOTS_PER_ENGINE * max_engines
        self._freshness = freshness
        self._engines: dict[bytes, _Engine] = {}  # by engine_id as JSON text
        self._boots = 0
        self._due: list[tuple[float, int, _Boot]] = []  # a heap: when each boot is to be looked at, monotonic s
        self._pushed = 0  # decides which is first if two are due at once
        self._now = float("-inf")
        self._wall_ms = 0.0
        self._live_since = float("-inf")

    def __len__(self) -> int:
        """The boots that are remembered."""
        return self._boots

    def begin(self, now: float, wall_s: float) -> None:
        """What follows came at this time: monotonic, and since the epoch. Boots whose time is over are forgotten."""
        self._now, self._wall_ms = now, wall_s * 1000
        self._live_since = self._freshness.live_since(now)
        self._forget_due(MAX_LOOKED_AT)

    def judge_all(self, states: Sequence[DatagramTexts], signatures: Sequence[bytes]) -> list[str]:
        """What `judge` says of each state of a batch; the usual one, the next number of a known boot, needs no call."""
        engines, now, taken = self._engines, self._now, TAKEN
        earliest, latest = self._wall_ms - MAX_CLOCK_ERROR_MS, self._wall_ms + MAX_CLOCK_ERROR_MS
        at_boot, at_seq, at_phase, gone = BOOT, SEQ, PHASE, GONE
        found = []
        for state, signature in zip(states, signatures, strict=True):
            engine = engines.get(state[0])
            if engine is not None:
                known = engine.current
                if known is not None and known.boot == state[at_boot] and state[at_phase] != gone:
                    seq, timestamp_ms = int(state[at_seq]), int(state[1])
                    if seq > known.highest and earliest <= timestamp_ms <= latest:
                        known.highest = seq
                        if timestamp_ms > known.newest_ms:
                            known.newest_ms = timestamp_ms
                        engine.signature = signature
                        engine.heard_at = now
                        found.append(taken)
                        continue
            boot = state[at_boot]
            if boot is None:
                found.append(NO_SEQUENCE)
                continue
            is_farewell = state[at_phase] == gone
            found.append(self.judge(state[0], boot, int(state[at_seq]), int(state[1]), signature, is_farewell))
        return found

    def judge(
        self, quoted_id: bytes, boot: bytes, seq: int, timestamp_ms: int, signature: bytes, is_farewell: bool = False
    ) -> str:
        """TAKEN, COPY or LATE, or the reason for which a datagram is refused; what is taken is remembered."""
        if not -MAX_CLOCK_ERROR_MS <= timestamp_ms - self._wall_ms <= MAX_CLOCK_ERROR_MS:
            return CLOCK
        engine = self._engines.get(quoted_id)
        if engine is None:
            return self._begin_boot(_Engine(quoted_id), boot, seq, timestamp_ms, signature, is_farewell)
        known = engine.current
        if known is None or known.boot != boot:
            is_live = engine.heard_at > self._live_since
            known = engine.boots.get(boot)
            if known is None:
                if is_live and engine.current is not None and timestamp_ms <= engine.current.newest_ms:
                    return REPLAYED
                return self._begin_boot(engine, boot, seq, timestamp_ms, signature, is_farewell)
            if is_live and seq > known.highest:
                known.highest = seq
                known.newest_ms = max(known.newest_ms, timestamp_ms)
                engine.signature = signature
                return LATE
        if seq <= known.highest:
            return COPY if signature == engine.signature else REPLAYED
        self._take(engine, known, seq, timestamp_ms, signature, is_farewell)
        return TAKEN

    def _take(
        self, engine: _Engine, known: _Boot, seq: int, timestamp_ms: int, signature: bytes, is_farewell: bool
    ) -> None:
        known.highest = seq
        if timestamp_ms > known.newest_ms:
            known.newest_ms = timestamp_ms
        engine.current = known
        engine.signature = signature
        engine.heard_at = float("-inf") if is_farewell else self._now

    def _begin_boot(
        self, engine: _Engine, boot: bytes, seq: int, timestamp_ms: int, signature: bytes, is_farewell: bool
    ) -> str:
        if len(engine.boots) >= MAX_BOOTS or self._boots >= self._max_boots:
            return TOO_MANY_BOOTS
        self._engines[engine.quoted_id] = engine
        known = engine.boots[boot] = _Boot(engine, boot, self._now)
        self._boots += 1
        self._take(engine, known, seq, timestamp_ms, signature, is_farewell)
        heappush(self._due, self._look_at(known))
        return TAKEN

    def take_back(self, quoted_id: bytes, boot: bytes) -> None:
        """A datagram that was just taken found no place in the table: a boot that began with it is not remembered."""
        engine = self._engines.get(quoted_id)
        known = engine and engine.boots.get(boot)
        if known and known.first_at == self._now:
            self._forget(known)
            if len(self._due) > 2 * self._boots + MIN_TAKEN_BACK:  # half of the heap is forgotten
                self._due = [entry for entry in self._due if entry[2].is_known]
                heapify(self._due)

    def _forget(self, known: _Boot) -> None:
        known.is_known = False
        engine = known.engine
        del engine.boots[known.boot]
        self._boots -= 1
        if engine.current is known:
            engine.current = None
        if not engine.boots:
            del self._engines[engine.quoted_id]

    def _look_at(self, known: _Boot) -> tuple[float, int, _Boot]:
        self._pushed += 1
        left_ms = known.newest_ms + MAX_CLOCK_ERROR_MS - self._wall_ms
        return self._now + max(0.001, left_ms / 1000), self._pushed, known

    def _forget_due(self, at_most: int) -> None:
        due = self._due
        for _ in range(at_most):
            if not due or due[0][0] > self._now:
                return
            known = due[0][2]
            if known.is_known and known.newest_ms + MAX_CLOCK_ERROR_MS >= self._wall_ms:
                heapreplace(due, self._look_at(known))  # it was heard from since, or the clock was set
                continue
            heappop(due)
            if known.is_known:
                self._forget(known)
