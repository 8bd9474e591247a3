"""The table of engines: what becomes of each valid state, how fresh it is, and when an engine is removed.

The store decides the outcome of a datagram and counts it. It never waits for the disk, a socket or a log line.
"""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field, replace
from typing import NamedTuple

from daemon_log import OncePerMinute
from engine_state import (
    REASONS,
    EngineState,
    FieldTexts,
    Record,
    decode_state,
    encode_record,
    is_heartbeat,
    pack,
    quote_json,
    received_ms,
    same_state,
    timestamp_ms,
    unpack,
    unquote_json,
)
from wake_up import WakeUp

logger = logging.getLogger("elrar.store")

# Outcomes of a valid datagram; the invalid ones have their reasons in engine_state.
ACCEPTED = "accepted"
HEARTBEAT = "heartbeat"
DUPLICATE = "duplicate"
OUT_OF_ORDER = "out_of_order"
REJECTED_CAPACITY = "rejected_capacity"

LIVE = "live"
STALE = "stale"


@dataclass(slots=True)
class DatagramCounters:
    """What became of every datagram. `received` is always the sum of the outcomes."""

    received: int = 0
    accepted: int = 0
    heartbeats: int = 0
    duplicates: int = 0
    out_of_order: int = 0
    rejected_capacity: int = 0
    rejected_source: int = 0
    invalid: dict[str, int] = field(default_factory=lambda: dict.fromkeys(REASONS, 0))
    expired_engines: int = 0
    last_received_s: float | None = None  # since the epoch

    def count(self, batch: Batch, outcomes: list[str]) -> None:
        """Count what became of a batch; `outcomes` are those of its states."""
        self.received += batch.size
        accepted = outcomes.count(ACCEPTED)
        self.accepted += accepted
        if accepted < len(outcomes):  # looking for what is hardly ever there takes a tenth of a microsecond a state
            self.heartbeats += outcomes.count(HEARTBEAT)
            self.duplicates += outcomes.count(DUPLICATE)
            self.out_of_order += outcomes.count(OUT_OF_ORDER)
            self.rejected_capacity += outcomes.count(REJECTED_CAPACITY)
        self.rejected_source += batch.rejected_source
        self.last_received_s = batch.received_s
        for reason in batch.invalid:
            self.invalid[reason] += 1

    @property
    def valid_states(self) -> int:
        """Valid datagrams that were taken."""
        return self.accepted + self.heartbeats + self.duplicates + self.out_of_order

    @property
    def invalid_states(self) -> int:
        """Datagrams that were rejected as invalid."""
        return sum(self.invalid.values())


@dataclass(slots=True)
class Batch:
    """What the listener took from the socket in one go, in order of arrival."""

    received_at: float  # s, the gateway's monotonic clock
    received_s: float  # s since the epoch
    states: Sequence[FieldTexts] = ()  # the valid ones
    sources: Sequence[bytes] = ()  # for each of them where it came from, `<ip>:<port>` as JSON text
    rejected_source: int = 0
    invalid: list[str] = field(default_factory=list)  # a reason each

    @property
    def size(self) -> int:
        """How many datagrams it is."""
        return len(self.states) + self.rejected_source + len(self.invalid)


# What the table shows of an engine: state, whether it is a heartbeat, when it was received (monotonic), and its source
# as JSON text. Replaced as a whole and never changed, so that readers need no lock to see it whole.
Visible = tuple[Record, bool, float, bytes]


class EngineView(NamedTuple):
    """One engine as a reader sees it, at the moment that the reader looked."""

    engine_id: str
    status: str  # LIVE or STALE
    age_ms: int  # since the engine was last heard from
    state_age_ms: int  # since the state shown was received
    visible: Visible

    @property
    def state(self) -> EngineState:
        """The state shown, made at each call."""
        return decode_state(self.engine_id, self.visible[0])

    @property
    def heartbeat(self) -> bool:
        """Whether the state shown is one."""
        return self.visible[1]

    @property
    def received_ms(self) -> int:
        """When the state shown was received, in ms since the epoch."""
        return received_ms(self.visible[0])

    @property
    def source(self) -> str:
        """Where the state shown came from, as `<ip>:<port>`."""
        return unquote_json(self.visible[3])

    @property
    def clock_offset_ms(self) -> int:
        """Receipt minus the engine's own timestamp: how far its clock is off, plus the way here."""
        return received_ms(self.visible[0]) - timestamp_ms(self.visible[0])


# One engine as plain values: engine_id, the same as JSON text, what is shown, and when it was last heard from,
# monotonic: then or later.
Row = tuple[str, bytes, Visible, float]


class PastState(NamedTuple):
    """A state that was shown for an engine, and when it was received, in ms since the epoch."""

    state: EngineState
    received_ms: int


HISTORY_BYTES = 128 * 1024 * 1024  # of all engines: enough for 10,000 usual ones with 100 states each
NEWS_KEPT_S = 60.0  # for somebody who watched and may come back
WATCHED_S = 1.0  # since somebody looked, who looks all the time
_PACKED = 8  # states of a history that are kept as one text
_OVERHEAD = 48  # bytes of memory of a text besides its characters
_ONE = b"1"
_LINE_END = ord("\n")


class _Engine:
    """What is held of one engine. Written under the store's lock only."""

    __slots__ = (
        "engine_id",
        "heard_at",
        "last",
        "load",
        "newest",
        "packed",
        "quoted_id",
        "recent",
        "said_stale",
        "visible",
    )

    heard_at: float  # monotonic, when the last datagram was taken from it
    last: Record  # the last datagram taken from it
    load: Record | None  # the newest that is no heartbeat; None: there is none since it restarted or came back
    newest: Record  # the one with the newest timestamp_ms since it last restarted
    visible: Visible

    def __init__(self, quoted_id: bytes, visible: Visible) -> None:
        self.quoted_id = quoted_id
        self.engine_id = unquote_json(quoted_id)
        self.heard_at = float("-inf")  # until the datagram is taken that it appears with
        self.last = self.newest = visible[0]
        self.load = None
        self.visible = visible
        self.packed: list[bytes] = []  # its history, _PACKED states each, the oldest first
        self.recent: list[Record] = []  # what follows in its history, fewer than _PACKED states
        self.said_stale = False

    def history_bytes(self) -> int:
        """How many bytes of memory its history takes."""
        return sum(map(len, self.packed + self.recent)) + _OVERHEAD * (len(self.packed) + len(self.recent))


def _pack(engine: _Engine, history: int) -> int:
    """Pack the recent states of an engine, and forget what is too old; returns how many bytes of memory that frees."""
    packed = engine.packed
    packed.append(pack(engine.recent))
    engine.recent.clear()
    freed = (_PACKED - 1) * (_OVERHEAD - 1)  # of each but one the object, less the character in its place
    return freed + _forget_oldest(packed, 1) if (len(packed) - 1) * _PACKED >= history else freed


def _forget_oldest(texts: list[bytes], count: int) -> int:
    """Forget so many texts of an engine's history; returns how many bytes of memory they took."""
    freed = sum(map(len, texts[:count])) + count * _OVERHEAD
    del texts[:count]
    return freed


def _make_room(engine: _Engine, history: int) -> int:
    """Forget the oldest of an engine's history, but not its newest state; returns the same."""
    freed = _pack(engine, history) if len(engine.recent) >= _PACKED else 0
    if engine.packed:
        return freed + _forget_oldest(engine.packed, 1)
    return _forget_oldest(engine.recent, min(2, len(engine.recent) - 1))


def age_ms(now: float, then: float) -> int:
    """Whole milliseconds since then, 0 where it is not over yet."""
    # A difference of two floats may be a hair below the millisecond that it is.
    return int((now - then) * 1000 + 1e-3) if then < now else 0


def ages_ms(now: float, heard_at: float, shown_at: float) -> tuple[int, int]:
    """`age_ms` and `state_age_ms` of an engine; the state shown is never younger than the engine's last sign."""
    age = age_ms(now, heard_at)
    return age, max(age, age_ms(now, shown_at))


def _quoted(engine_id: str) -> bytes:
    return quote_json(engine_id).encode("utf-8", "surrogatepass")  # no engine that is known has a surrogate


def _rows(engines: Iterable[_Engine]) -> list[Row]:
    # `shown` is read before `heard_at`, which is at least as new then: they are not read under the lock.
    return [(engine.engine_id, engine.quoted_id, engine.visible, engine.heard_at) for engine in engines]


class StateStore:
    """The latest state of every engine, for any number of threads.

    `apply` and `advance_watermark` are the listener's; every other method may be called from any thread and
    returns copies.
    """

    def __init__(
        self,
        stale_threshold_ms: int,
        expire_after_ms: int,
        max_engines: int,
        history: int,
        *,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._stale_ms = stale_threshold_ms
        self._stale_s = (stale_threshold_ms + 1 - 1e-3) / 1000  # whole milliseconds, as age_ms has them
        self._expire_ms = expire_after_ms
        self._max_engines = max_engines
        self._history = history
        self._clock = clock
        # Guards all below, for the time of one batch or one copy. Nothing slow happens under it.
        self._lock = threading.Lock()
        self._engines: dict[bytes, _Engine] = {}  # by engine_id as JSON text, which is what a datagram has
        self._history_bytes = 0
        self._changes = 0
        self._counters = DatagramCounters()
        self._watermark = clock()
        self._heard: dict[bytes, int] | None = None  # how often each since somebody looked; None = nobody looks
        self._gone: list[_Engine] = []  # who was removed since then
        self._news_at = float("-inf")  # when somebody looked
        self._appeared = OncePerMinute(clock)
        self._went_stale = OncePerMinute(clock)
        self._returned = OncePerMinute(clock)
        self._removed = OncePerMinute(clock)

    def apply(self, batch: Batch) -> list[str]:
        """Take what the listener received; returns the outcome of each of `batch.states`, in their order."""
        # One loop for all of it: a call for each state, and its look-ups of attributes, took half as long again.
        now = batch.received_at
        received = b"%d" % (batch.received_s * 1000)
        stale_s, stale_ms = self._stale_s, self._stale_ms
        live_since = now - stale_s
        history = self._history
        outcomes = []
        with self._lock:
            engines, history_bytes, heard = self._engines, self._history_bytes, self._heard
            crowded = history_bytes > HISTORY_BYTES
            most_recent = 2 if crowded else _PACKED
            for fields, source in zip(batch.states, batch.sources, strict=True):
                quoted_id, stamp, latency, mode, pending, free, total, capacity = fields
                held = encode_record((stamp, latency, mode, pending, free, total, capacity, received))
                heartbeat = capacity < _ONE and is_heartbeat(fields)  # no zero begins with a digit from 1 to 9
                engine = engines.get(quoted_id)
                if engine is None:
                    if len(engines) >= self._max_engines:
                        outcomes.append(REJECTED_CAPACITY)
                        continue
                    engine = engines[quoted_id] = _Engine(quoted_id, (held, heartbeat, now, source))
                    _count(self._appeared, engine.engine_id)
                if heard is not None:
                    heard[quoted_id] = heard.get(quoted_id, 0) + 1
                live = engine.heard_at > live_since
                engine.heard_at = now
                newest = held
                if not live:
                    engine.load = None
                    if engine.said_stale:
                        engine.said_stale = False
                        _count(self._returned, engine.engine_id)
                # What is newer than all before is none of the following. Digits are compared as they came, if both
                # stamps have as many: making numbers of them takes a tenth of this loop.
                elif not (stamp > engine.newest and engine.newest[len(stamp)] == _LINE_END):
                    if same_state(held, engine.last):
                        outcomes.append(DUPLICATE)
                        continue
                    behind_ms = timestamp_ms(engine.newest) - int(stamp)
                    if behind_ms > stale_ms:  # an engine that restarted, or whose clock was set
                        engine.load = None
                    elif behind_ms > 0:
                        if heartbeat or (engine.load is not None and timestamp_ms(engine.load) >= int(stamp)):
                            engine.last = held
                            outcomes.append(OUT_OF_ORDER)
                            continue
                        newest = engine.newest  # only heartbeats overtook this load, and it is newer than what is shown
                engine.last = held
                engine.newest = newest
                if not heartbeat:
                    engine.load = held
                else:
                    _, shows_heartbeat, shown_at, _ = engine.visible
                    if not shows_heartbeat and now - shown_at < stale_s:
                        # Its placeholders would make a busy engine look idle: the load state stays in the table.
                        outcomes.append(HEARTBEAT)
                        continue
                engine.visible = (held, heartbeat, now, source)
                if history:
                    recent = engine.recent
                    recent.append(held)
                    history_bytes += len(held) + _OVERHEAD
                    if len(recent) >= most_recent:
                        history_bytes -= _make_room(engine, history) if crowded else _pack(engine, history)
                outcomes.append(HEARTBEAT if heartbeat else ACCEPTED)
            self._history_bytes = history_bytes
            self._counters.count(batch, outcomes)
            self._changes += 1
        return outcomes

    def advance_watermark(self, at: float) -> None:
        """The listener says that everything that had arrived by `at` (monotonic, s) has been taken.

        Nothing is removed for a silence that the gateway was not listening to: after the gateway was paused, what
        waits in the socket is taken before anything is removed.
        """
        self._watermark = at  # without the lock: one writer, and a reaper that sees the value before it waits a turn

    def sweep(self) -> int:
        """Remove the engines that expired, and log who came and went; returns how many were removed."""
        watermark = self._watermark
        with self._lock:
            engines = list(self._engines.values())
        # Looked through without the lock, since `heard_at` only moves forward; what is found is checked again under it.
        heard_until = watermark - self._stale_s
        silent = [engine for engine in engines if engine.heard_at <= heard_until]
        removed = 0
        with self._lock:
            for engine in silent:
                silence_ms = age_ms(watermark, engine.heard_at)
                if silence_ms > self._expire_ms:
                    if self._engines.pop(engine.quoted_id, None) is None:
                        continue  # by another sweep
                    self._history_bytes -= engine.history_bytes()
                    engine.packed, engine.recent = [], []
                    removed += 1
                    if self._heard is not None:
                        self._gone.append(engine)
                    _count(self._removed, engine.engine_id)
                elif silence_ms > self._stale_ms and not engine.said_stale:
                    engine.said_stale = True
                    _count(self._went_stale, engine.engine_id)
            self._counters.expired_engines += removed
            self._changes += removed
            self._forget_news()
            changes = [
                (what, notice.due())
                for what, notice in (
                    ("engine appeared", self._appeared),
                    ("engine went stale", self._went_stale),
                    ("engine came back", self._returned),
                    ("engine removed", self._removed),
                )
            ]
        for what, said in changes:
            if said is not None:
                logger.info("%s %s", what, said)
        return removed

    def counters(self) -> DatagramCounters:
        """A copy of the counters of one moment."""
        with self._lock:
            return replace(self._counters, invalid=self._counters.invalid.copy())

    def counts(self) -> tuple[int, int]:
        """How many engines are live, and how many are known."""
        with self._lock:
            engines = list(self._engines.values())
        heard_until = self._clock() - self._stale_s
        return len([engine for engine in engines if engine.heard_at > heard_until]), len(engines)

    def views(self) -> list[EngineView]:
        """Every engine, in the order in which they appeared. The lock is held for one list copy only."""
        with self._lock:
            engines = list(self._engines.values())
        now = self._clock()
        return [self._view(engine, now) for engine in engines]

    def snapshot(self) -> tuple[float, list[Row]]:
        """The moment of looking (monotonic), and every engine, as the least that a snapshot takes."""
        with self._lock:
            engines = list(self._engines.values())
        return self._clock(), _rows(engines)

    def snapshot_of(self, engine_ids: Iterable[str]) -> tuple[float, list[Row]]:
        """The same of some engines, in their order, without those that are not known."""
        quoted_ids = [_quoted(engine_id) for engine_id in engine_ids]
        with self._lock:
            found = [self._engines.get(quoted_id) for quoted_id in quoted_ids]
        return self._clock(), _rows(engine for engine in found if engine is not None)

    def collect_changes(self) -> tuple[list[tuple[str, int]], list[Row]] | None:
        """Who was heard from since the last call and is known, how often; before that, who was removed, as they were.

        None where that was not noted: at the first call, and where the last one was NEWS_KEPT_S ago. For one reader.
        """
        with self._lock:
            noted, self._heard = self._heard, {}
            gone, self._gone = self._gone, []
            self._news_at = self._clock()
            known = self._engines
            heard = [(known[key].engine_id, count) for key, count in (noted or {}).items() if key in known]
        return None if noted is None else (heard, _rows(gone))

    @property
    def has_subscriber(self) -> bool:
        """Whether somebody has asked for `news` just now."""
        return self._clock() - self._news_at < WATCHED_S  # without the lock: one attribute, written under it

    def _forget_news(self) -> None:
        """Stop noting who is heard from, which costs intake a hundredth, once nobody asks for it. Under the lock."""
        if self._clock() - self._news_at > NEWS_KEPT_S or len(self._gone) > self._max_engines:
            self._heard = None
            self._gone = []

    def stale(self) -> set[str]:
        """The ids of the engines that are stale now."""
        with self._lock:
            engines = list(self._engines.values())
        heard_until = self._clock() - self._stale_s
        return {engine.engine_id for engine in engines if engine.heard_at <= heard_until}

    def changes(self) -> int:
        """A number that is another one after each change of what `views` shows, but for the passing of time."""
        return self._changes  # without the lock: one int, written under it

    def view(self, engine_id: str) -> EngineView | None:
        """One engine, or None where it is not known."""
        with self._lock:
            engine = self._engines.get(_quoted(engine_id))
        return None if engine is None else self._view(engine, self._clock())

    def history(self, engine_id: str) -> list[PastState] | None:
        """The states that the table showed for an engine, oldest first; None where it is not known."""
        with self._lock:
            engine = self._engines.get(_quoted(engine_id))
            if engine is None:
                return None
            packed, recent = engine.packed.copy(), engine.recent.copy()
        past = [held for text in packed for held in unpack(text)] + recent
        return [PastState(decode_state(engine_id, held), received_ms(held)) for held in past[-self._history :]]

    def _view(self, engine: _Engine, now: float) -> EngineView:
        # Without the lock: `shown` is replaced as a whole, and `heard_at`, read after it, is at least as new.
        shown = engine.visible
        ages = ages_ms(now, engine.heard_at, shown[2])
        status = LIVE if ages[0] <= self._stale_ms else STALE
        return EngineView(engine.engine_id, status, *ages, shown)


def _count(notice: OncePerMinute, engine_id: str) -> None:
    if notice.add():
        notice.example(repr(engine_id))


class Reaper:
    """Sweeps the store every so often; the gateway gives it its thread."""

    def __init__(self, store: StateStore, expire_after_ms: int, *, clock: Callable[[], float] = time.monotonic) -> None:
        self._store = store
        self._period_s = min(0.5, max(0.02, expire_after_ms / 10_000))
        self._clock = clock
        self._stopping = False
        self._turn = WakeUp()
        self.moved_at = clock()  # monotonic; written by the reaper's thread only

    def run(self) -> None:
        """Sweep until `stop` is called."""
        while True:
            self._turn.wait(self._period_s)
            if self._stopping:
                return
            self.moved_at = self._clock()
            self._store.sweep()

    def stop(self) -> None:
        """Make `run` return; from any thread, twice is harmless."""
        self._stopping = True
        self._turn.set()
