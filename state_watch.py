"""What /watch sends: a snapshot, then each change as it happens, as server-sent events.

`Watch` collects what changed, once for all readers, and offers it to each `WatchReader`, which is one reader's stream.
The store notes who was heard from for as long as somebody collects it; intake never waits for a reader. At most one
event of each engine waits for a slow reader, the newest.
Everything here belongs to the query server's thread, but the counters, which any thread may read.
"""

from __future__ import annotations

import itertools
import time
from collections import OrderedDict
from collections.abc import Callable, Iterable
from typing import NamedTuple

from engine_view import Row
from staleness import UNAVAILABLE
from state_entry import EntryTails, TailCache, lone_entry_head
from state_store import StateStore

MAX_READERS = 64
MAX_EVENTS_PER_READ = 256  # of those that wait for a slow reader, so that newer ones can still take their places
MAX_REMOVED = 10_000  # removed engines that are remembered for readers that come back
MAX_SHARED_AGE_S = 0.01  # how far the ages of an event may be behind that is rendered once for several readers
COMMENT_INTERVAL_S = 15.0  # of silence, after which a comment says that the stream is still there
COLLECT_INTERVAL_S = 0.001  # at least, between two collections of what changed
STALE_INTERVAL_S = 0.05  # between two checks for engines that went stale
# A reader that sets min_interval_ms is given its events in bundles. Each look for something to send, and each wake-up
# of the listener for it, costs as much as 20 events: a page that is told within 2 ms took a tenth of a core.
BUNDLES_PER_INTERVAL = 5
MAX_BUNDLE_INTERVAL_S = 0.1
IMPATIENT_BELOW_S = 0.1  # of min_interval_ms: for others intake may let datagrams wait for as long as it likes

EVENT_STATE, EVENT_STALE, EVENT_LIVE, EVENT_REMOVED = b"state", b"stale", b"live", b"removed"

# An event's `data:` lines are one text. A snapshot has a line for each engine, because many readers bound the length
# of a line: Go's bufio.Scanner takes 64 KiB, aiohttp 512 KiB.
DATA_LINE = b"\ndata: "
# The ms after which a browser connects again. In a block of its own it would be an empty event to some libraries; for
# the same reason there is no empty line behind a comment.
_RETRY = b"retry: 1000\n"
_COMMENT = b": nothing happened\n"


class _Event(NamedTuple):
    """One change of one engine. The entry is rendered when the event is sent, so its ages are current.

    No dataclass, because one is made for each datagram, and a frozen one takes three times as long.
    """

    number: int
    kind: bytes
    engine_id: str
    removed: Row | None = None  # the last row of an engine that the store no longer has
    merged: int = 0  # further datagrams of the engine since the collection before


class _ChangeSet:
    """The events of one collection, rendered once for all readers that are given them within MAX_SHARED_AGE_S."""

    def __init__(self, events: list[_Event]) -> None:
        self.events = events
        self.merged = sum(event.merged for event in events)
        self.text = b""
        self.rendered_at = float("-inf")


class Watch:
    """Collects what changed and offers it to the readers."""

    def __init__(
        self,
        store: StateStore,
        *,
        instance: str = "",
        is_catching_up: Callable[[float], bool] = lambda now: False,
        clock: Callable[[], float] = time.monotonic,
        wall_clock: Callable[[], float] = time.time,
    ) -> None:
        """`is_catching_up` says whether older states than the last are still being taken, after a pause."""
        self._store = store
        self._is_catching_up = is_catching_up
        self._clock = clock
        self.tail_cache = TailCache()  # the query server's other answers use it too
        # Event ids are a number and the gateway's instance. The numbers grow over its restarts too, because none has a
        # million events a second for long; the instance says whose they are.
        self._number = self._complete_from = int(wall_clock() * 1e6)
        self._instance = instance
        self._last: dict[str, int] = {}  # the number of each engine's last event, the newest at the end
        self._removed: OrderedDict[str, _Event] = OrderedDict()  # the last event of each removed engine, likewise
        self._stale: set[str] = set()  # the engines whose last event was EVENT_STALE
        self._readers: set[WatchReader] = set()
        self._collected_at = self._next_stale_check_at = float("-inf")
        self.events = 0  # sent, to all readers together
        self.merged_events = 0  # not sent, because a newer one of the same engine took their place
        self.rejected_readers = 0

    @property
    def readers(self) -> int:
        """How many readers there are."""
        return len(self._readers)

    def open(
        self, snapshot: Callable[[], bytes], engine_ids: Iterable[str], min_interval_ms: int, last_event_id: str
    ) -> WatchReader | None:
        """A new reader's stream, which has to be closed; None if there are MAX_READERS already.

        `snapshot` returns the document of /engines with DATA_LINE for each line break. Without `engine_ids` the reader
        gets every engine. `last_event_id` is what it was sent last, of this gateway or any other.
        """
        if len(self._readers) >= MAX_READERS:
            self.rejected_readers += 1
            return None
        self._collect(self._clock())
        reader = WatchReader(self, snapshot, frozenset(engine_ids), min_interval_ms / 1000, self._clock)
        missed = None if min_interval_ms else self._since(last_event_id)
        if missed is None:
            reader.begin_anew()
        else:
            self.merged_events += reader.queue(missed)
        self._readers.add(reader)
        return reader

    def _since(self, last_event_id: str) -> list[_Event] | None:
        """The last event of each engine after that one, or None if they are not all known."""
        digits, _, instance = last_event_id.partition("-")
        if instance != self._instance or not (digits.isascii() and digits.isdigit() and len(digits) < 20):
            return None
        number = int(digits)
        if not self._complete_from <= number <= self._number:
            return None
        missed = [event for event in self._removed.values() if event.number > number]
        for engine_id, last in reversed(self._last.items()):
            if last <= number:
                break
            missed.append(_Event(last, EVENT_STALE if engine_id in self._stale else EVENT_STATE, engine_id))
        return sorted(missed, key=lambda event: event.number)

    def close(self, reader: WatchReader) -> None:
        """Forget a reader; twice is harmless."""
        self._readers.discard(reader)

    def collect(self) -> None:
        """Collect what changed since the last collection, and offer it to every reader."""
        now = self._clock()
        if now >= self._collected_at + COLLECT_INTERVAL_S and not self._is_catching_up(now):
            self._collect(now)

    def _collect(self, now: float) -> None:
        self._collected_at = now
        noted = self._store.collect_changes(impatient=any(reader.is_impatient for reader in self._readers))
        if noted is None:
            self._begin_anew()
            return
        touched, removed = noted
        events = [self._removal(row) for row in removed]
        for engine_id, datagrams in touched:
            kind = EVENT_LIVE if engine_id in self._stale else EVENT_STATE
            self._stale.discard(engine_id)
            events.append(self._event(kind, engine_id, merged=datagrams - 1))
        if now >= self._next_stale_check_at:
            self._next_stale_check_at = now + STALE_INTERVAL_S
            for engine_id in self._store.stale() - self._stale:
                self._stale.add(engine_id)
                events.append(self._event(EVENT_STALE, engine_id))
        while len(self._removed) > MAX_REMOVED:
            _, forgotten = self._removed.popitem(last=False)
            self._complete_from = forgotten.number
        if events:
            changes = _ChangeSet(events)
            self.merged_events += sum(reader.offer(changes) for reader in self._readers)

    def _removal(self, row: Row) -> _Event:
        engine_id = row[0]
        self._stale.discard(engine_id)
        self._last.pop(engine_id, None)
        self._removed.pop(engine_id, None)  # so that it goes to the end
        event = self._removed[engine_id] = _Event(self._next_number(), EVENT_REMOVED, engine_id, row)
        return event

    def _event(self, kind: bytes, engine_id: str, *, merged: int = 0) -> _Event:
        self._removed.pop(engine_id, None)
        self._last.pop(engine_id, None)  # so that it goes to the end
        number = self._last[engine_id] = self._next_number()
        return _Event(number, kind, engine_id, merged=merged)

    def _next_number(self) -> int:
        self._number += 1
        return self._number

    def _begin_anew(self) -> None:
        """Nobody noted what changed until now: every reader needs a snapshot."""
        self._complete_from = self._next_number()
        self._last.clear()
        self._removed.clear()
        self._stale = self._store.stale()
        for reader in self._readers:
            reader.begin_anew()

    def render_snapshot(self, document: bytes) -> bytes:
        """The event that begins a stream; `document` has DATA_LINE for each line break but the last."""
        self.events += 1
        return b"%bevent: snapshot%b%b\n" % (self._id_line(self._next_number()), DATA_LINE, document)

    def render(self, events: list[_Event], *, renumber: bool = False) -> bytes:
        """The events as they are sent, with what is known of the engines now."""
        now, known = self._store.snapshot_of(event.engine_id for event in events)
        rows, tails = {row[0]: row for row in known}, EntryTails(now, self._store.freshness, self.tail_cache)
        text = []
        for event in events:
            row = event.removed or rows.get(event.engine_id)
            if row is None:
                continue  # removed meanwhile: the next collection has its event
            _, quoted_id, visible, heard_at = row
            number = self._next_number() if renumber else event.number
            tail, status = tails.of(visible, heard_at)
            # An engine that comes back but takes no requests must not be called live by its event's name.
            kind = EVENT_STATE if event.kind is EVENT_LIVE and status == UNAVAILABLE else event.kind
            entry = lone_entry_head(quoted_id, visible) + tail
            text.append(b"%bevent: %b%b%b\n\n" % (self._id_line(number), kind, DATA_LINE, entry))
        self.events += len(text)
        return b"".join(text)

    def render_changes(self, changes: _ChangeSet) -> bytes:
        """All events of one collection; readers that ask within MAX_SHARED_AGE_S are given the same text."""
        now = self._clock()
        if now - changes.rendered_at > MAX_SHARED_AGE_S:
            changes.text, changes.rendered_at = self.render(changes.events), now
        else:
            self.events += changes.text.count(b"\nevent: ")
        return changes.text

    def _id_line(self, number: int) -> bytes:
        return f"id: {number}-{self._instance}\n".encode()


class WatchReader:
    """One reader's stream: `read` returns what is to be sent next, and is called once all before has been sent.

    An engine's events wait in one of two places: in `_queued`, which is sent as soon as the reader takes it, or, if
    `min_interval_ms` has not passed since the engine's last event, in `_throttled`.
    """

    content_type = "text/event-stream"

    def __init__(
        self,
        watch: Watch,
        snapshot: Callable[[], bytes],
        engine_ids: frozenset[str],
        min_interval_s: float,
        clock: Callable[[], float],
    ) -> None:
        self._watch = watch
        self._snapshot = snapshot
        self._engine_ids = engine_ids  # none = all
        self._min_interval_s = min_interval_s
        self._clock = clock
        self._retry = _RETRY  # until it has gone out with the first event
        self._needs_snapshot = False
        self._changes: _ChangeSet | None = None  # to be sent as it is
        self._queued: dict[str, _Event] = {}  # by engine, in the order of their numbers
        self._throttled: dict[str, _Event] = {}
        self._throttled_until: OrderedDict[str, float] = OrderedDict()  # by engine, the earliest first
        self._bundle_interval_s = min(min_interval_s / BUNDLES_PER_INTERVAL, MAX_BUNDLE_INTERVAL_S)
        self._sent_at = clock()

    def begin_anew(self) -> None:
        """Have a snapshot sent next."""
        self._needs_snapshot = True
        self._changes = None
        for waiting in (self._queued, self._throttled, self._throttled_until):
            waiting.clear()

    def offer(self, changes: _ChangeSet) -> int:
        """Have the changes sent; returns how many events that makes superfluous."""
        if self._needs_snapshot:
            return 0  # the snapshot will show them
        wanted = self._engine_ids
        merged = changes.merged
        if wanted:
            merged = sum(event.merged for event in changes.events if event.engine_id in wanted)
        if not (wanted or self._min_interval_s or self._queued or self._changes):
            self._changes = changes
            return merged
        if self._changes is not None:
            earlier, self._changes = self._changes, None
            merged += self.queue(earlier.events)
        return merged + self.queue(changes.events)

    def queue(self, events: list[_Event]) -> int:
        """Have events sent, MAX_EVENTS_PER_READ at a time; returns how many earlier ones they take the place of."""
        wanted, replacements = self._engine_ids, 0
        for event in events:
            if wanted and event.engine_id not in wanted:
                continue
            replaced = self._queued.pop(event.engine_id, None) or self._throttled.pop(event.engine_id, None)
            newest = event
            if replaced is not None:
                replacements += 1
                if event.kind is EVENT_STATE and replaced.kind is not EVENT_STATE:
                    self._throttled_until.pop(event.engine_id, None)  # what the reader was told last is not true now
                    if replaced.kind is EVENT_LIVE:
                        newest = event._replace(kind=EVENT_LIVE)  # the reader does not know yet that it came back
            is_throttled = newest.kind is EVENT_STATE and event.engine_id in self._throttled_until
            (self._throttled if is_throttled else self._queued)[event.engine_id] = newest
        return replacements

    @property
    def is_large(self) -> bool:
        """Whether what is to be sent next is a snapshot."""
        return self._needs_snapshot

    @property
    def is_impatient(self) -> bool:
        """Whether it wants to be told of each change within milliseconds."""
        return self._min_interval_s < IMPATIENT_BELOW_S

    @property
    def pause_s(self) -> float:
        """How long to wait before the next `read`."""
        return 0.0 if self._queued or self._needs_snapshot else self._bundle_interval_s

    def read(self) -> bytes:
        """What is to be sent next; nothing if there is nothing yet."""
        if self._changes is None:  # otherwise its text would no longer be the one that other readers are given
            self._watch.collect()
        text = self._next()
        now = self._clock()
        if text:
            self._sent_at = now
            retry, self._retry = self._retry, b""
            return retry + text
        if now - self._sent_at >= COMMENT_INTERVAL_S:
            self._sent_at = now
            return _COMMENT
        return b""

    def _next(self) -> bytes:
        if self._needs_snapshot:
            self._needs_snapshot = False
            return self._watch.render_snapshot(self._snapshot())
        if self._changes is not None:
            changes, self._changes = self._changes, None
            return self._watch.render_changes(changes)
        if self._min_interval_s:
            self._end_throttling()
        if not self._queued:
            return b""
        engine_ids = list(itertools.islice(self._queued, MAX_EVENTS_PER_READ))
        events = [self._queued.pop(engine_id) for engine_id in engine_ids]
        if not self._min_interval_s:
            return self._watch.render(events)
        self._begin_throttling(events)
        return self._watch.render(events, renumber=True)  # throttled ones are late: their numbers are of the past

    def _begin_throttling(self, events: list[_Event]) -> None:
        """Hold back the next state of each engine whose event is about to be sent."""
        until = self._clock() + self._min_interval_s
        for event in events:
            self._throttled_until.pop(event.engine_id, None)  # so that it goes to the end
            if event.kind is not EVENT_REMOVED:
                self._throttled_until[event.engine_id] = until

    def _end_throttling(self) -> None:
        """Queue the states that have been held back for long enough. Looks at none whose time has not come."""
        now = self._clock()
        while self._throttled_until and next(iter(self._throttled_until.values())) <= now:
            engine_id, _ = self._throttled_until.popitem(last=False)
            event = self._throttled.pop(engine_id, None)
            if event is not None:
                self._queued[engine_id] = event

    def close(self) -> None:
        """Forget the reader; twice is harmless."""
        self._watch.close(self)
