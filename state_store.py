"""The table of engines: what becomes of each valid state, how fresh it is, and when an engine is removed.

The store decides the outcome of a datagram and counts it. It never waits for the disk, a socket or a log line.
"""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

from engine_state import HEARTBEAT_MARK, MARK_TEXT, EngineState, FieldTexts, is_heartbeat, quote_json, unquote_json
from fleet_events import APPEARED, CAME_BACK, REMOVED, WENT_STALE, EventNotes, FleetEvents
from gateway_counters import ACCEPTED, DUPLICATE, HEARTBEAT, OUT_OF_ORDER, REJECTED_CAPACITY, DatagramCounters
from log_throttle import LogThrottle
from staleness import LIVE, STALE, Freshness, age_ms, ages_ms
from state_record import (
    LINE_END,
    History,
    Record,
    decode_state,
    encode_fields,
    encode_receipt,
    received_ms,
    same_state,
    timestamp_ms,
)
from wake_up import WakeUp

logger = logging.getLogger("elrar.store")


@dataclass(slots=True)
class Batch:
    """What the listener took from the socket in one go, in order of arrival."""

    received_at: float  # s, the gateway's monotonic clock
    received_s: float  # s since the epoch
    states: Sequence[FieldTexts] = ()  # the valid ones
    sources: Sequence[bytes] = ()  # for each of them where it came from, `<ip>:<port>` as JSON text
    rejected_source: int = 0
    invalid: list[str] = field(default_factory=list)  # a reason each


# What the table shows of an engine: state, whether it is a heartbeat, when it was received (monotonic s), and its
# source as JSON text. Replaced as a whole and never changed, so that readers need no lock to see it whole.
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


# One engine as plain values: engine_id, the same as JSON text, what is shown, and when it was last heard from
# (monotonic s), which is never earlier than the receipt of the state shown.
Row = tuple[str, bytes, Visible, float]


class PastState(NamedTuple):
    """A state that was shown for an engine, and when it was received, in ms since the epoch."""

    state: EngineState
    received_ms: int


HISTORY_BYTES = 128 * 1024 * 1024  # of all engines: enough for 10,000 usual ones with 100 states each
CHANGES_KEPT_S = 60.0  # changes go on being noted for this long after the last subscriber left
SUBSCRIBED_S = 1.0  # a subscriber asks far more often than this


class _Engine:
    """What is held of one engine. Written under the store's lock only."""

    __slots__ = (
        "engine_id",
        "heard_at",
        "history",
        "last",
        "load",
        "newest",
        "quoted_id",
        "stale_logged",
        "visible",
    )

    def __init__(self, quoted_id: bytes, visible: Visible) -> None:
        self.quoted_id = quoted_id
        self.engine_id = unquote_json(quoted_id)
        self.heard_at = float("-inf")  # monotonic, when the last datagram was taken from it
        self.last = visible[0]  # the last datagram taken from it
        self.newest = visible[0]  # the one with the newest timestamp_ms since it last restarted
        self.load: Record | None = None  # the newest that is no heartbeat, since it last restarted or came back
        self.visible = visible
        self.history = History()
        self.stale_logged = False


class _LifeEvent:
    """One kind of event in the lives of engines: a line of the daemon's own log, and an event at /events."""

    def __init__(self, kind: str, what: str, notes: EventNotes, clock: Callable[[], float]) -> None:
        self.what = what
        self.throttle = LogThrottle(logger, logging.INFO, what, clock=clock)
        self._kind = kind
        self._notes = notes

    def record(self, example: str, engine_id: str) -> None:
        """Note that it happened to an engine; `example` is the pattern of what the log says of it."""
        self.throttle.record(example, engine_id)
        self._notes.note(self._kind, engine_id)


class _LifeLog:
    """What is told of the lives of engines. Noted under the store's lock; logged, and made events, without it."""

    def __init__(self, clock: Callable[[], float]) -> None:
        self.notes = EventNotes()
        self._by_kind = {
            kind: _LifeEvent(kind, what, self.notes, clock)
            for kind, what in (
                (APPEARED, "engine appeared"),
                (WENT_STALE, "engine went stale"),
                (CAME_BACK, "engine came back"),
                (REMOVED, "engine removed"),
            )
        }
        self.appeared, self.went_stale, self.came_back, self.removed = self._by_kind.values()

    def take_due(self) -> list[str]:
        """The lines to log now."""
        lines = [event.throttle.take_due() for event in self._by_kind.values()]
        return [line for line in lines if line is not None]

    def tell(self, noted: Iterable[tuple[str, str, int | None, int]], events: FleetEvents) -> None:
        """Make events of what was noted."""
        for kind, engine_id, time_ms, count in noted:
            events.record(kind, engine_id, self._by_kind[kind].what, time_ms=time_ms, count=count)


class _ChangeFeed:
    """What changed since the subscriber asked last. Used under the store's lock, but for `has_subscriber`.

    While nobody asks, nothing is noted: noting who was heard from takes a hundredth of what intake takes.
    """

    def __init__(self, max_removed: int, clock: Callable[[], float]) -> None:
        self.touched: dict[bytes, int] | None = None  # datagrams of each engine; None = nobody subscribes
        self.removed: list[_Engine] = []
        self._max_removed = max_removed
        self._clock = clock
        self._asked_at = float("-inf")

    def collect(self) -> tuple[dict[bytes, int] | None, list[_Engine]]:
        """What was noted, None if nothing was; noting begins anew."""
        touched, self.touched = self.touched, {}
        removed, self.removed = self.removed, []
        self._asked_at = self._clock()
        return touched, removed

    def note_removed(self, engine: _Engine) -> None:
        """Note that an engine is no more."""
        if self.touched is not None:
            self.removed.append(engine)

    def expire(self) -> None:
        """Stop noting if nobody has asked for long."""
        if self._clock() - self._asked_at > CHANGES_KEPT_S or len(self.removed) > self._max_removed:
            self.touched = None
            self.removed = []

    @property
    def has_subscriber(self) -> bool:
        """Whether somebody has asked just now; needs no lock, because it reads one attribute."""
        return self._clock() - self._asked_at < SUBSCRIBED_S


def _quoted(engine_id: str) -> bytes:
    return quote_json(engine_id).encode("utf-8", "surrogatepass")  # no engine that is known has a surrogate


def _rows(engines: Iterable[_Engine]) -> list[Row]:
    # `visible` is read before `heard_at`, which is at least as new then: they are read without the lock.
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
        events: FleetEvents | None = None,
        clock: Callable[[], float] = time.monotonic,
        judged_at: Callable[[float], float] = lambda now: now,
    ) -> None:
        """`events` is where the lives of engines are told; `judged_at`: see Freshness."""
        self._events = FleetEvents(clock=clock) if events is None else events
        self.freshness = Freshness(stale_threshold_ms, expire_after_ms, judged_at)
        self._max_engines = max_engines
        self._history = history
        self._clock = clock
        # Guards all below, for the time of one batch or one copy. Nothing slow happens under it.
        self._lock = threading.Lock()
        self._engines: dict[bytes, _Engine] = {}  # by engine_id as JSON text, which is what a datagram has
        self._history_bytes = 0
        self._version = 0
        self._counters = DatagramCounters()
        self._watermark = clock()
        self._feed = _ChangeFeed(max_engines, clock)
        self._life_log = _LifeLog(clock)

    def apply(self, batch: Batch) -> list[str]:
        """Take over what the listener received; returns the outcome of each of `batch.states`, in their order."""
        # One loop for all of it, and only what is rare is a method: a call for each state takes a tenth of the loop.
        now = batch.received_at
        receipt = encode_receipt(batch.received_s)
        live_since = self.freshness.live_since(now)
        history_limit = self._history
        outcomes, grown = [], 0
        mark, mark_text, line_end = HEARTBEAT_MARK, MARK_TEXT, LINE_END
        with self._lock:
            engines, touched = self._engines, self._feed.touched
            crowded = self._history_bytes > HISTORY_BYTES
            for texts, source in zip(batch.states, batch.sources, strict=True):
                quoted_id, stamp = texts[0], texts[1]
                record = encode_fields(texts[1:]) + receipt
                heartbeat = texts[mark] == mark_text and is_heartbeat(texts)
                engine = engines.get(quoted_id)
                if engine is None:
                    if len(engines) >= self._max_engines:
                        outcomes.append(REJECTED_CAPACITY)
                        continue
                    engine = engines[quoted_id] = _Engine(quoted_id, (record, heartbeat, now, source))
                    self._life_log.appeared.record("%r", engine.engine_id)
                if touched is not None:
                    touched[quoted_id] = touched.get(quoted_id, 0) + 1
                was_live = engine.heard_at > live_since
                engine.heard_at = now
                if not was_live:
                    self._begin_anew(engine)
                # What is newer than all before needs no second look. Timestamps are compared as they came, if both
                # have as many digits: making numbers of them takes a tenth of this loop.
                elif not (stamp > (newest := engine.newest) and newest[len(stamp)] == line_end):
                    outcome = self._place(engine, record, heartbeat)
                    if outcome is not None:
                        if outcome is ACCEPTED:
                            self._show(engine, (record, heartbeat, now, source), crowded)
                        outcomes.append(outcome)
                        continue
                engine.last = engine.newest = record
                if heartbeat:
                    outcomes.append(HEARTBEAT)
                    _, shows_heartbeat, shown_at, _ = engine.visible
                    if not shows_heartbeat and shown_at > live_since:
                        continue  # its placeholders would make a busy engine look idle: the load state stays
                else:
                    outcomes.append(ACCEPTED)
                    engine.load = record
                engine.visible = (record, heartbeat, now, source)
                if history_limit:
                    grown += engine.history.append(record, history_limit, crowded)
            self._history_bytes += grown
            self._counters.count(batch.received_s, outcomes, batch.invalid, batch.rejected_source)
            self._version += 1
        return outcomes

    def _begin_anew(self, engine: _Engine) -> None:
        """An engine that appears, or comes back from silence: what it said before does not count for order."""
        engine.load = None
        if engine.stale_logged:
            engine.stale_logged = False
            self._life_log.came_back.record("%r", engine.engine_id)

    def _place(self, engine: _Engine, record: Record, heartbeat: bool) -> str | None:
        """The outcome of a datagram of a live engine that is not newer than all before, None if it starts anew."""
        if same_state(record, engine.last):
            return DUPLICATE
        behind_ms = timestamp_ms(engine.newest) - timestamp_ms(record)
        if behind_ms > self.freshness.stale_ms:  # an engine that restarted, or whose clock was set
            engine.load = None
        if not 0 < behind_ms <= self.freshness.stale_ms:
            return None
        engine.last = record
        if heartbeat or (engine.load is not None and timestamp_ms(engine.load) >= timestamp_ms(record)):
            return OUT_OF_ORDER
        engine.load = record  # only heartbeats overtook it: it is newer load than what is shown
        return ACCEPTED

    def _show(self, engine: _Engine, visible: Visible, crowded: bool) -> None:
        engine.visible = visible
        if self._history:
            self._history_bytes += engine.history.append(visible[0], self._history, crowded)

    def advance_watermark(self, at: float) -> None:
        """Say that everything that had arrived by `at` (monotonic, s) has been taken; the listener does.

        Nothing is removed for a silence that the gateway was not listening to: after the gateway was paused, what
        waits in the socket is taken before anything is removed.
        """
        self._watermark = at  # no lock: one writer, and a reaper that reads the old value removes one sweep later

    def sweep(self) -> int:
        """Remove the engines that expired, and log who came and went; returns how many were removed."""
        watermark = self._watermark
        with self._lock:
            engines = list(self._engines.values())
        # Looked through without the lock, since `heard_at` only moves forward; what is found is checked again under it.
        judged_at, live_since = self.freshness.judged_at(watermark), self.freshness.live_since(watermark)
        silent = [engine for engine in engines if engine.heard_at <= live_since]
        removed = 0
        with self._lock:
            for engine in silent:
                silence_ms = age_ms(judged_at, engine.heard_at)
                if self.freshness.is_expired(silence_ms):
                    if self._engines.get(engine.quoted_id) is engine:  # not removed by another sweep
                        self._remove(engine)
                        removed += 1
                elif not engine.stale_logged and not self.freshness.is_live(silence_ms):
                    engine.stale_logged = True
                    self._life_log.went_stale.record("%r", engine.engine_id)
            self._counters.add("expired_engines", removed)
            self._feed.expire()
            lines, noted = self._life_log.take_due(), self._life_log.notes.take()
        for line in lines:
            logger.info("%s", line)
        self._life_log.tell(noted, self._events)
        return removed

    def _remove(self, engine: _Engine) -> None:
        del self._engines[engine.quoted_id]
        self._history_bytes -= engine.history.nbytes
        engine.history = History()  # whoever is told of the removal later needs none
        self._version += 1
        self._feed.note_removed(engine)
        self._life_log.removed.record("%r", engine.engine_id)

    def counters(self) -> dict[str, Any]:
        """The counters of datagrams of one moment, by their names at /stats, and `accepted`."""
        with self._lock:
            return self._counters.document()

    def counts(self) -> tuple[int, int]:
        """How many engines are live, and how many are known."""
        engines = self._all()
        live_since = self.freshness.live_since(self._clock())
        return len([engine for engine in engines if engine.heard_at > live_since]), len(engines)

    def _all(self) -> list[_Engine]:
        with self._lock:
            return list(self._engines.values())

    def _one(self, engine_id: str) -> _Engine | None:
        with self._lock:
            return self._engines.get(_quoted(engine_id))

    def views(self) -> list[EngineView]:
        """Every engine, in the order in which they appeared. The lock is held for one list copy only."""
        engines = self._all()
        now = self._clock()
        return [self._view(engine, now) for engine in engines]

    def snapshot(self) -> tuple[float, list[Row]]:
        """The moment of looking (monotonic), and every engine, as the least that a snapshot takes."""
        engines = self._all()
        return self._clock(), _rows(engines)

    def snapshot_of(self, engine_ids: Iterable[str]) -> tuple[float, list[Row]]:
        """The same of some engines, in their order, without those that are not known."""
        quoted_ids = [_quoted(engine_id) for engine_id in engine_ids]
        with self._lock:
            found = [self._engines.get(quoted_id) for quoted_id in quoted_ids]
        return self._clock(), _rows(engine for engine in found if engine is not None)

    def collect_changes(self) -> tuple[list[tuple[str, int]], list[Row]] | None:
        """The changes since the previous call: (engine_id, datagrams) of each known engine that was heard from, and the
        last row of each engine that was removed. Apply the removals first.

        None if nothing was noted: at the first call, and if the previous one was CHANGES_KEPT_S ago. There is one
        subscriber.
        """
        with self._lock:
            touched, removed = self._feed.collect()
            known = self._engines
            heard = [(known[key].engine_id, count) for key, count in (touched or {}).items() if key in known]
        return None if touched is None else (heard, _rows(removed))

    @property
    def has_subscriber(self) -> bool:
        """Whether somebody has asked for changes just now."""
        return self._feed.has_subscriber

    def stale(self) -> set[str]:
        """The ids of the engines that are stale now."""
        engines = self._all()
        live_since = self.freshness.live_since(self._clock())
        return {engine.engine_id for engine in engines if engine.heard_at <= live_since}

    def changes(self) -> int:
        """A number that is another one after each change of what `views` shows, but for the passing of time."""
        return self._version  # without the lock: one int, written under it

    def view(self, engine_id: str) -> EngineView | None:
        """One engine, or None if it is not known."""
        engine = self._one(engine_id)
        return None if engine is None else self._view(engine, self._clock())

    def history(self, engine_id: str) -> list[PastState] | None:
        """The states that the table showed for an engine, oldest first; None if it is not known."""
        past = self.history_records(engine_id)
        return (
            None
            if past is None
            else [PastState(decode_state(engine_id, record), received_ms(record)) for record in past]
        )

    def history_records(self, engine_id: str) -> list[Record] | None:
        """The same as records."""
        with self._lock:
            engine = self._engines.get(_quoted(engine_id))
            if engine is None:
                return None
            history = engine.history.copy()
        return history.records()[-self._history :] if self._history else []

    def _view(self, engine: _Engine, now: float) -> EngineView:
        # Without the lock: `visible` is replaced as a whole, and `heard_at`, read after it, is at least as new.
        visible, heard_at = engine.visible, engine.heard_at
        ages = ages_ms(now, heard_at, visible[2])
        status = LIVE if heard_at > self.freshness.live_since(now) else STALE
        return EngineView(engine.engine_id, status, *ages, visible)


class Reaper:
    """Sweeps the store every so often; the gateway gives it its thread."""

    def __init__(
        self,
        store: StateStore,
        expire_after_ms: int,
        *,
        after_sweep: Callable[[], object] = lambda: None,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        """`after_sweep` is called in its thread, every half second at least."""
        self._store = store
        self._after_sweep = after_sweep
        self._period_s = min(0.5, max(0.02, expire_after_ms / 10_000))
        self._clock = clock
        self._stopping = False
        self._wakeup = WakeUp()
        self.last_progress_at = clock()  # monotonic; written by the reaper's thread only

    def run(self) -> None:
        """Sweep until `stop` is called."""
        while True:
            self._wakeup.wait(self._period_s)
            if self._stopping:
                return
            self.last_progress_at = self._clock()
            self._store.sweep()
            self._after_sweep()

    def stop(self) -> None:
        """Make `run` return; from any thread, twice is harmless."""
        self._stopping = True
        self._wakeup.set()

    def close(self) -> None:
        """See Component: there is nothing to let go of."""

    def close_descriptors(self) -> None:
        """See Component: it has none."""
