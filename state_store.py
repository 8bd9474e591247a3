"""The table of engines: what becomes of each valid state, how fresh it is, and when an engine is removed.

The store decides the outcome of a datagram and counts it. It never waits for the disk, a socket or a log line.
"""

from __future__ import annotations

import logging
import operator
import threading
import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any

from boot_sequence import LATE, NEWER, REPEATED, RESTARTED
from engine_state import (
    BOOT,
    EXTRA,
    GONE,
    HEARTBEAT_MARK,
    MARK_TEXT,
    PHASE,
    SEQ,
    DatagramTexts,
    is_heartbeat,
    is_idle,
    quote_json,
    unquote_json,
)
from engine_view import NOTHING, EngineView, PastState, Row, Visible, status_of
from farewells import Farewells
from fleet_events import (
    APPEARED,
    CAME_BACK,
    CONFLICT,
    REMOVED,
    WENT_STALE,
    EventNotes,
    FleetEvents,
    Note,
)
from fleet_events import FAREWELL as FAREWELL_EVENT
from fleet_events import (
    RESTARTED as RESTARTED_EVENT,
)
from fleet_summary import FleetSummary
from gateway_counters import (
    ACCEPTED,
    DUPLICATE,
    FAREWELL,
    HEARTBEAT,
    OUT_OF_ORDER,
    REJECTED_CAPACITY,
    DatagramCounters,
)
from known_engine import KnownEngine
from log_throttle import LogThrottle
from staleness import Freshness, age_ms, ages_ms
from state_record import (
    JOINED,
    LINE_END,
    OVERHEAD,
    RECORDED,
    History,
    Record,
    decode_state,
    encode_receipt,
    encode_record,
    received_ms,
    says_nothing_new,
    with_receipt_of,
)
from table_room import TableRoom
from wake_up import WakeUp

logger = logging.getLogger("elrar.store")


@dataclass(slots=True)
class Batch:
    """What the listener took from the socket in one go, in order of arrival."""

    received_at: float  # s, the gateway's monotonic clock
    received_s: float  # s since the epoch
    states: Sequence[DatagramTexts] = ()  # the valid ones
    sources: Sequence[bytes] = ()  # for each of them where it came from, `<ip>:<port>` as JSON text
    rejected_source: int = 0
    invalid: list[str] = field(default_factory=list)  # a reason each
    ignored_fields: int = 0  # valid ones with a field that is not kept
    # With keys only:
    rejected_signature: list[str] = field(default_factory=list)  # a reason each
    copies: int = 0  # the last datagram taken of an engine, again: duplicates that are not heard
    late: list[tuple[DatagramTexts, bytes, bytes]] = field(
        default_factory=list
    )  # of an earlier boot: state, source, text


CHANGES_KEPT_S = 60.0  # changes go on being noted for this long after the last subscriber left
SUBSCRIBED_S = 1.0  # a subscriber asks far more often than this


class _LifeEvent:
    """One kind of event in the lives of engines: a line of the daemon's own log, and an event at /events."""

    def __init__(self, kind: str, what: str, level: int, notes: EventNotes, clock: Callable[[], float]) -> None:
        self.what = what
        self.level = level
        self.throttle = LogThrottle(logger, level, what, clock=clock)
        self._kind = kind
        self._notes = notes

    def record(self, example: str, engine_id: str, *further: object) -> None:
        """Note that it happened to an engine; `example` is the pattern of what the log says of it."""
        self.throttle.record(example, engine_id, *further)
        self._notes.note(self._kind, engine_id)

    def record_senders(self, engine_id: str, senders: tuple[bytes, bytes], *, begins: bool) -> None:
        """Note that two sources send for one engine; it is an event only if this begins, and each time in the log."""
        self.throttle.record("%r from %s and %s", engine_id, *senders)
        if begins:
            self._notes.note(self._kind, engine_id, detail="from {} and {}".format(*map(unquote_json, senders)))


class _LifeLog:
    """What is told of the lives of engines. Noted under the store's lock; logged, and made events, without it."""

    def __init__(self, clock: Callable[[], float]) -> None:
        self.notes = EventNotes()
        self._by_kind = {
            kind: _LifeEvent(kind, what, level, self.notes, clock)
            for kind, level, what in (
                (APPEARED, logging.INFO, "engine appeared"),
                (WENT_STALE, logging.INFO, "engine went stale"),
                (CAME_BACK, logging.INFO, "engine came back"),
                (RESTARTED_EVENT, logging.INFO, "engine restarted"),
                (FAREWELL_EVENT, logging.INFO, "engine said farewell"),
                (REMOVED, logging.INFO, "engine removed"),
                (
                    CONFLICT,
                    logging.WARNING,
                    "several senders use one engine_id, and what is shown jumps between them: give each its own id;",
                ),
            )
        }
        self.appeared = self._by_kind[APPEARED]
        self.went_stale = self._by_kind[WENT_STALE]
        self.came_back = self._by_kind[CAME_BACK]
        self.restarted = self._by_kind[RESTARTED_EVENT]
        self.said_farewell = self._by_kind[FAREWELL_EVENT]
        self.removed = self._by_kind[REMOVED]
        self.conflict = self._by_kind[CONFLICT]

    def take_due(self) -> list[tuple[int, str]]:
        """The lines to log now, each with its level."""
        lines = [(event.level, event.throttle.take_due()) for event in self._by_kind.values()]
        return [(level, line) for level, line in lines if line is not None]

    def tell(self, noted: Iterable[Note], events: FleetEvents) -> None:
        """Make events of what was noted."""
        for kind, engine_id, time_ms, count, detail in noted:
            what = self._by_kind[kind].what
            events.record(kind, engine_id, f"{detail}: {what}" if detail else what, time_ms=time_ms, count=count)


class _ChangeFeed:
    """What changed since the subscriber asked last. Used under the store's lock, but for one property.

    While nobody asks, nothing is noted: noting who was heard from takes a hundredth of what intake takes.
    """

    def __init__(self, max_removed: int, clock: Callable[[], float]) -> None:
        self.touched: dict[bytes, int] | None = None  # datagrams of each engine; None = nobody subscribes
        self.removed: list[KnownEngine] = []
        self._max_removed = max_removed
        self._clock = clock
        self._asked_at = self._impatient_at = float("-inf")

    def collect(self, *, impatient: bool) -> tuple[dict[bytes, int] | None, list[KnownEngine]]:
        """What was noted, None if nothing was; noting begins anew."""
        touched, self.touched = self.touched, {}
        removed, self.removed = self.removed, []
        self._asked_at = self._clock()
        if impatient:
            self._impatient_at = self._asked_at
        return touched, removed

    def note_removed(self, engine: KnownEngine) -> None:
        """Note that an engine is no more."""
        if self.touched is not None:
            self.removed.append(engine)

    def expire(self) -> None:
        """Stop noting if nobody has asked for long."""
        if self._clock() - self._asked_at > CHANGES_KEPT_S or len(self.removed) > self._max_removed:
            self.touched = None
            self.removed = []

    @property
    def has_impatient_subscriber(self) -> bool:
        """Whether somebody impatient has asked just now; needs no lock, because it reads one attribute."""
        return self._clock() - self._impatient_at < SUBSCRIBED_S


class _Conflicts:
    """Until when several senders count as using an engine_id. Used under the store's lock."""

    def __init__(self, freshness: Freshness, is_one_sender: Callable[[bytes, bytes], bool]) -> None:
        self.is_one_sender = is_one_sender
        self._freshness = freshness
        self._until: dict[bytes, float] = {}  # by engine_id as JSON text; monotonic s

    def note(self, quoted_id: bytes, now: float) -> None:
        """Several senders used it at that moment."""
        self._until[quoted_id] = self._freshness.stale_at(now)

    def count(self, now: float) -> int:
        """How many engine_ids several senders use now."""
        return sum(until > now for until in self._until.values())

    def forget(self, quoted_id: bytes) -> None:
        """The engine is removed."""
        self._until.pop(quoted_id, None)

    def expire(self, now: float) -> None:
        """Forget those that are over."""
        self._until = {key: until for key, until in self._until.items() if until > now}


def _quoted(engine_id: str) -> bytes:
    return quote_json(engine_id).encode("utf-8", "surrogatepass")  # no engine that is known has a surrogate


def _rows(engines: Iterable[KnownEngine]) -> list[Row]:
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
        is_one_sender: Callable[[bytes, bytes], bool] = operator.eq,
        clock: Callable[[], float] = time.monotonic,
        judged_at: Callable[[float], float] = lambda now: now,
    ) -> None:
        """`events` is where the lives of engines are told.

        `is_one_sender` says of two sources, as JSON texts, whether they are addresses of one sender on this host;
        `judged_at`: see Freshness.
        """
        self._events = FleetEvents(clock=clock) if events is None else events
        self.freshness = Freshness(stale_threshold_ms, expire_after_ms, judged_at)
        self._summary = FleetSummary(self.freshness)
        self._room = TableRoom(max_engines)
        self._history = history
        self._clock = clock
        # Guards all below, for the time of one batch or one copy. Nothing slow happens under it.
        self._lock = threading.Lock()
        self._engines: dict[bytes, KnownEngine] = {}  # by engine_id as JSON text, which is what a datagram has
        self._history_bytes = 0
        self._version = 0
        self._counters = DatagramCounters()
        self._watermark = clock()
        self._feed = _ChangeFeed(max_engines, clock)
        self._life_log = _LifeLog(clock)
        self._farewells = Farewells(max_engines, self.freshness)
        self._conflicts = _Conflicts(self.freshness, is_one_sender)

    def apply(self, batch: Batch) -> list[str]:
        """Take over what the listener received; returns the outcome of each of `batch.states`, in their order."""
        # What is usual is done in one loop: a live engine's load state or heartbeat that is newer than all before, with
        # the next number if it has one. `_apply_one` does the same and all the rest, and takes twice as long.
        now = batch.received_at
        receipt = encode_receipt(batch.received_s)
        live_since = self.freshness.live_since(now)
        history_limit = self._history
        outcomes, grown = [], 0
        mark, mark_text, line_end, recorded, further = HEARTBEAT_MARK, MARK_TEXT, LINE_END, RECORDED, EXTRA
        with self._lock:
            engines, touched = self._engines, self._feed.touched
            crowded = self._history_bytes > self._room.max_history_bytes
            for texts, source in zip(batch.states, batch.sources, strict=True):
                quoted_id, stamp = texts[0], texts[1]
                record = encode_record(texts[recorded] + receipt)
                heartbeat = texts[mark] == mark_text and is_heartbeat(texts)
                engine = engines.get(quoted_id)
                about = None
                # Timestamps are compared as they came, if both have as many digits: making numbers of them takes a
                # tenth of this loop.
                if (
                    engine is not None
                    and engine.heard_at > live_since
                    and stamp > (newest := engine.newest)
                    and newest[len(stamp)] == line_end
                ):
                    if texts[further] is None:
                        about = engine.visible[4] if source is engine.plain_source else None
                    elif not heartbeat:
                        about = engine.advance(texts, now)
                if engine is None or about is None:
                    outcomes.append(self._apply_one(engine, texts, (record, heartbeat, now, source, NOTHING)))
                    continue
                if touched is not None:
                    touched[quoted_id] = touched.get(quoted_id, 0) + 1
                engine.heard_at = now
                engine.last = engine.newest = record
                if heartbeat:
                    outcomes.append(HEARTBEAT)
                    _, shows_heartbeat, shown_at, _, _ = engine.visible
                    if not shows_heartbeat and shown_at > live_since:
                        continue  # its placeholders would make a busy engine look idle: the load state stays
                else:
                    outcomes.append(ACCEPTED)
                    engine.load = record
                engine.visible = (record, heartbeat, now, source, about)
                if history_limit:
                    history = engine.history
                    history.append(record)
                    grown += len(record) + OVERHEAD
                    if crowded or len(history) >= JOINED:
                        grown -= history.make_room(history_limit, crowded)
            self._history_bytes += grown
            self._counters.count(batch.received_s, outcomes, batch.invalid, batch.rejected_source)
            self._counters.add("ignored_fields", batch.ignored_fields)
            if batch.rejected_signature or batch.copies or batch.late:
                late = [self._apply_earlier(state, source, now, receipt) for state, source, _ in batch.late]
                self._counters.count_signed(late, batch.copies, batch.rejected_signature)
            self._version += 1
        return outcomes

    def _apply_earlier(self, texts: DatagramTexts, source: bytes, now: float, receipt: tuple[bytes]) -> str:
        """The outcome of a signed datagram of an earlier boot: late, also if that boot is not remembered here."""
        engine = self._engines.get(texts[0])
        if engine is None:
            return OUT_OF_ORDER
        if engine.sequence is not None and engine.sequence.knows(texts[BOOT]):
            record = encode_record(texts[RECORDED] + receipt)
            return self._apply_one(engine, texts, (record, is_heartbeat(texts), now, source, NOTHING))
        self._hear(engine, engine.heard_at, now)
        return OUT_OF_ORDER

    def _apply_one(self, engine: KnownEngine | None, texts: DatagramTexts, shown: Visible) -> str:
        """The outcome of any datagram; `shown` is what it would show."""
        record, heartbeat, now, source, about = shown
        if heartbeat and is_idle(texts):
            shown = record, False, now, source, about
        return self._appear(texts, shown) if engine is None else self._apply_to(engine, texts, shown)

    def _apply_to(self, engine: KnownEngine, texts: DatagramTexts, shown: Visible) -> str:
        """The outcome of a datagram of an engine that is in the table."""
        record, heartbeat, now, source, _ = shown
        phase, boot = texts[PHASE], texts[BOOT]
        was_heard_at = engine.heard_at
        place = engine.place(texts, record, now, self.freshness)
        self._count_lost(*engine.uncounted_losses())
        if phase == GONE and (place is NEWER or place is RESTARTED):
            self._part(engine, texts, now)
            return FAREWELL
        self._hear(engine, was_heard_at, now)
        if place is REPEATED:
            return DUPLICATE
        self._note_sender(engine, boot, source, now)
        engine.note_further(texts)
        engine.last = record
        if place is LATE:
            return self._apply_late(engine, texts, (record, heartbeat, now, source, NOTHING))
        if place is RESTARTED:
            engine.note_restart()
            self._counters.add("restarts")
            self._life_log.restarted.record("%r", engine.engine_id)
        engine.newest = record
        about = engine.about(texts)
        shown_record, shows_heartbeat, shown_at, _, _ = engine.visible
        if not heartbeat:
            engine.note_load(texts, record)
        elif (
            not shows_heartbeat
            and shown_at > self.freshness.live_since(now)
            and not (place is RESTARTED and boot is not None)  # the load of an earlier life says nothing any more
        ):
            engine.show_about(about)
            return HEARTBEAT
        if engine.has_further and says_nothing_new(record, shown_record):
            record = with_receipt_of(record, shown_record)
            engine.visible = (record, heartbeat, shown_at, engine.visible[3], about)
        else:
            self._show(engine, (record, heartbeat, now, source, about))
        return HEARTBEAT if heartbeat else ACCEPTED

    def _appear(self, texts: DatagramTexts, shown: Visible) -> str:
        """The outcome of a datagram of an engine that is not in the table."""
        quoted_id, now = texts[0], shown[2]
        is_farewell = texts[PHASE] == GONE
        if self._farewells:
            boot = texts[BOOT]
            seq = 0 if boot is None else int(texts[SEQ])
            overtaken = self._farewells.overtook(quoted_id, boot, seq, int(texts[1]), now, is_farewell=is_farewell)
            if overtaken or is_farewell:
                self._count_lost(*self._farewells.place(quoted_id, boot, seq, now))
                return OUT_OF_ORDER if overtaken else FAREWELL
        if is_farewell:
            return FAREWELL
        if not self._room.for_one_more(len(self._engines)):
            return REJECTED_CAPACITY
        before = self._farewells.forget(quoted_id, now)
        engine = self._engines[quoted_id] = KnownEngine(texts, shown)
        if before is not None and engine.sequence is not None:
            engine.sequence.follow(before)  # what is still under way of that life is late, its other farewells too
        self._life_log.appeared.record("%r", engine.engine_id)
        self._hear(engine, now, now)
        self._show(engine, engine.visible)
        return HEARTBEAT if shown[1] else ACCEPTED

    def _count_lost(self, gap_states: int, late_states: int) -> None:
        """Count the gaps and the late ones that an engine's numbers showed since the last time."""
        if gap_states:
            self._counters.add("sequence_gap_states", gap_states)
        if late_states:
            self._counters.add("late_states", late_states)

    def _hear(self, engine: KnownEngine, was_heard_at: float, now: float) -> None:
        engine.heard_at = now
        touched = self._feed.touched
        if touched is not None:
            touched[engine.quoted_id] = touched.get(engine.quoted_id, 0) + 1
        if engine.stale_logged and was_heard_at <= self.freshness.live_since(now):
            engine.stale_logged = False
            self._life_log.came_back.record("%r", engine.engine_id)

    def _note_sender(self, engine: KnownEngine, boot: bytes | None, source: bytes, now: float) -> None:
        before = engine.source
        engine.source = source
        if not engine.has_further:
            engine.plain_source = source
        if boot is None and source != before and self._conflicts.is_one_sender(source, before):
            return
        conflict_until = engine.visible[4][4]
        if engine.note_sender(boot or source, now, self.freshness):
            self._conflicts.note(engine.quoted_id, now)
            self._life_log.conflict.record_senders(engine.engine_id, (before, source), begins=conflict_until <= now)

    def _apply_late(self, engine: KnownEngine, texts: DatagramTexts, shown: Visible) -> str:
        """A late datagram; a load state that only heartbeats overtook is newer load than what is shown."""
        record, heartbeat, now, source, _ = shown
        phase, extra, restarts, lost, conflict_until = engine.visible[4]
        if engine.sequence is not None and lost != engine.sequence.lost:
            engine.show_about((phase, extra, restarts, engine.sequence.lost, conflict_until))
        if heartbeat or not engine.is_newer_load(texts, record):
            return OUT_OF_ORDER
        engine.note_load(texts, record)
        self._show(engine, (record, heartbeat, now, source, engine.visible[4]))
        return ACCEPTED

    def _part(self, engine: KnownEngine, texts: DatagramTexts, now: float) -> None:
        """A farewell: the engine is no more, and is remembered as such."""
        engine.show_about(engine.about(texts))
        self._farewells.remember(engine.quoted_id, now, engine.sequence, int(texts[1]))
        self._remove(engine)
        self._life_log.said_farewell.record("%r", engine.engine_id)

    def _show(self, engine: KnownEngine, visible: Visible) -> None:
        engine.visible = visible
        if self._history:
            crowded = self._history_bytes > self._room.max_history_bytes
            self._history_bytes += engine.history.add(visible[0], self._history, crowded)

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
                        self._life_log.removed.record("%r", engine.engine_id)
                        removed += 1
                elif not engine.stale_logged and not self.freshness.is_live(silence_ms):
                    engine.stale_logged = True
                    self._life_log.went_stale.record("%r", engine.engine_id)
            self._counters.add("expired_engines", removed)
            self._feed.expire()
            self._farewells.expire(watermark)
            self._conflicts.expire(watermark)
            lines, noted = self._life_log.take_due(), self._life_log.notes.take()
        for level, line in lines:
            logger.log(level, "%s", line)
        self._life_log.tell(noted, self._events)
        return removed

    def _remove(self, engine: KnownEngine) -> None:
        del self._engines[engine.quoted_id]
        self._history_bytes -= engine.history.nbytes
        engine.history = History()  # whoever is told of the removal later needs none
        self._version += 1
        self._feed.note_removed(engine)
        self._conflicts.forget(engine.quoted_id)

    def counters(self) -> dict[str, Any]:
        """The counters of datagrams of one moment, by their names at /stats, and `accepted`."""
        now = self._clock()
        with self._lock:
            return {**self._counters.document(), "conflicting_ids": self._conflicts.count(now)}

    def counts(self) -> tuple[int, int]:
        """How many engines are live, and how many are known."""
        engines = self._all()
        live_since = self.freshness.live_since(self._clock())
        return len([1 for engine in engines if engine.heard_at > live_since and engine.is_serving]), len(engines)

    def _all(self) -> list[KnownEngine]:
        with self._lock:
            return list(self._engines.values())

    def _one(self, engine_id: str) -> KnownEngine | None:
        with self._lock:
            return self._engines.get(_quoted(engine_id))

    def fleet(self) -> dict[str, Any]:
        """What all engines are together, as /engines and /stats have it."""
        engines = self._all()
        now = self._clock()
        # In this order: see _rows.
        visibles = [engine.visible for engine in engines]
        return self._summary.document(now, visibles, [engine.heard_at for engine in engines])

    def fleet_of(self, now: float, rows: Sequence[Row]) -> dict[str, Any]:
        """The same of a snapshot."""
        return self._summary.document(now, [row[2] for row in rows], [row[3] for row in rows])

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

    def collect_changes(self, *, impatient: bool = True) -> tuple[list[tuple[str, int]], list[Row]] | None:
        """The changes since the previous call: (engine_id, datagrams) of each known engine that was heard from, and the
        last row of each engine that was removed. Apply the removals first.

        None if nothing was noted: at the first call, and if the previous one was CHANGES_KEPT_S ago. There is one
        subscriber; if it is `impatient`, datagrams are not left to wait for others for long.
        """
        with self._lock:
            touched, removed = self._feed.collect(impatient=impatient)
            known = self._engines
            heard = [(known[key].engine_id, count) for key, count in (touched or {}).items() if key in known]
        return None if touched is None else (heard, _rows(removed))

    @property
    def has_impatient_subscriber(self) -> bool:
        """Whether somebody who wants to be told within milliseconds has asked for changes just now."""
        return self._feed.has_impatient_subscriber

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

    def _view(self, engine: KnownEngine, now: float) -> EngineView:
        # Without the lock: `visible` is replaced as a whole, and `heard_at`, read after it, is at least as new.
        visible, heard_at = engine.visible, engine.heard_at
        ages = ages_ms(now, heard_at, visible[2])
        phase, _, _, _, conflict_until = visible[4]
        status = status_of(heard_at > self.freshness.live_since(now), phase)
        return EngineView(engine.engine_id, status, *ages, visible, conflict_until > now)


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
        """See Component."""
        self.close_descriptors()

    def close_descriptors(self) -> None:
        """See Component: what woke it is all that it has."""
        self._wakeup.close()
