"""What /watch tells: a snapshot, then each change as it happens, as server-sent events.

`Watch` looks once for all readers what changed; a `WatchReader` is one reader's stream. Intake does not know of either:
the store notes who was heard from, and a slow reader has at most one event an engine waiting, the newest.
Everything here belongs to the query server's thread, but for the counters, which any thread may read.
"""

from __future__ import annotations

import itertools
import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass, replace

from state_entry import AgesJson, EndsJson, lone_entry_head
from state_store import Row, StateStore

MAX_READERS = 64
COMMENT_S = 15.0  # of silence, after which a line says that the stream is still there
LOOK_S = 0.001  # between two looks at what changed, at least
STALE_LOOK_S = 0.05  # between two looks for who went stale
HELD_LOOK_S = 0.02  # between two looks for what min_interval_ms has held back
SHARED_S = 0.01  # by which the ages of an event that is given to several may be behind
EVENTS_AT_A_TIME = 256  # of those that wait for a slow reader, so that the newest can still take their place
REMOVED_KEPT = 10_000  # engines that are no more, for readers that come back
PAUSED_S = 1.0  # without a look, after which intake is given STALE_AFTER_PAUSE_S to take what waits in its socket
STALE_AFTER_PAUSE_S = 0.1

STATE, STALE, LIVE, REMOVED = b"state", b"stale", b"live", b"removed"

# An event's `data:` lines are one text. A snapshot has a line for each engine, because many readers bound the length
# of a line: Go's bufio.Scanner takes 64 KiB, aiohttp 512 KiB.
DATA_LINE = b"\ndata: "
_HELLO = (
    b"retry: 1000\n"  # ms until a browser connects again; a block of its own would be an empty event to some readers
)
_COMMENT = b": nothing happened\n"  # for the same reason without an empty line


@dataclass(frozen=True)
class _Event:
    """That something became of an engine. What is sent with it is looked up when it is sent, so that ages are true."""

    number: int
    kind: bytes
    engine_id: str
    removed: Row | None = None  # the engine as it was, where the store no longer has it
    merged: int = 0  # how often it was heard from besides, since the look before


class _News:
    """The events of one look; written once for all readers that take them in the same turn."""

    def __init__(self, events: list[_Event]) -> None:
        self.events = events
        self.merged = sum(event.merged for event in events)
        self.text = b""
        self.written_at = float("-inf")


class Watch:
    """Finds out what changed and gives it to the readers."""

    def __init__(
        self,
        store: StateStore,
        stale_ms: int,
        *,
        clock: Callable[[], float] = time.monotonic,
        wall_clock: Callable[[], float] = time.time,
    ) -> None:
        self._store = store
        self._clock = clock
        self.ages_json = AgesJson(stale_ms)  # the query server's other answers use it too
        # Numbers grow over a restart of the gateway, too: none has a million events a second for long.
        self._number = self._complete_from = int(wall_clock() * 1e6)
        self._last: dict[str, int] = {}  # the last event of each engine, the newest at the end
        self._removed: dict[str, _Event] = {}  # the same, of engines that are no more
        self._stale: set[str] = set()  # as the readers were told
        self._readers: set[WatchReader] = set()
        self._looked_at = self._look_for_stale_at = float("-inf")
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
        """A new reader's stream, or None where there are MAX_READERS; it has to be closed.

        `snapshot` gives the document of /engines; no `engine_ids` means all.
        """
        if len(self._readers) >= MAX_READERS:
            self.rejected_readers += 1
            return None
        self._look(self._clock())
        reader = WatchReader(self, snapshot, frozenset(engine_ids), min_interval_ms / 1000, self._clock)
        missed = None if min_interval_ms else self._since(last_event_id)
        if missed is None:
            reader.begin_anew()
        else:
            reader.wait_with(missed)
        self._readers.add(reader)
        return reader

    def _since(self, last_event_id: str) -> list[_Event] | None:
        """The last event of each engine after that one, or None where that is not known of all."""
        if not (last_event_id.isascii() and last_event_id.isdigit() and len(last_event_id) < 20):
            return None
        number = int(last_event_id)
        if not self._complete_from <= number <= self._number:
            return None
        missed = [event for event in self._removed.values() if event.number > number]
        for engine_id, last in reversed(self._last.items()):
            if last <= number:
                break
            missed.append(_Event(last, STALE if engine_id in self._stale else STATE, engine_id))
        return sorted(missed, key=lambda event: event.number)

    def close(self, reader: WatchReader) -> None:
        """Forget a reader; twice is harmless."""
        self._readers.discard(reader)

    def look(self) -> None:
        """Find out what changed since the last look, and give it to every reader."""
        now = self._clock()
        if now >= self._looked_at + LOOK_S:
            self._look(now)

    def _look(self, now: float) -> None:
        if now - self._looked_at > PAUSED_S:
            self._look_for_stale_at = now + STALE_AFTER_PAUSE_S
        self._looked_at = now
        news = self._store.collect_changes()
        if news is None:
            self._begin_anew()
            return
        heard, gone = news
        events = []
        for row in gone:
            engine_id = row[0]
            self._stale.discard(engine_id)
            self._last.pop(engine_id, None)
            self._removed.pop(engine_id, None)  # so that it goes to the end
            event = self._removed[engine_id] = _Event(self.next_number(), REMOVED, engine_id, row)
            events.append(event)
        for engine_id, count in heard:
            kind = LIVE if engine_id in self._stale else STATE
            self._stale.discard(engine_id)
            events.append(self._event(kind, engine_id, merged=count - 1))
        if now >= self._look_for_stale_at:
            self._look_for_stale_at = now + STALE_LOOK_S
            for engine_id in self._store.stale() - self._stale:
                self._stale.add(engine_id)
                events.append(self._event(STALE, engine_id))
        for engine_id in list(itertools.islice(self._removed, max(0, len(self._removed) - REMOVED_KEPT))):
            self._complete_from = self._removed.pop(engine_id).number
        if events:
            given = _News(events)
            for reader in self._readers:
                reader.take(given)

    def _event(self, kind: bytes, engine_id: str, *, merged: int = 0) -> _Event:
        self._removed.pop(engine_id, None)
        self._last.pop(engine_id, None)  # so that it goes to the end
        number = self._last[engine_id] = self.next_number()
        return _Event(number, kind, engine_id, merged=merged)

    def next_number(self) -> int:
        """The number of the next event."""
        self._number += 1
        return self._number

    @property
    def number(self) -> int:
        """The number of the last event."""
        return self._number

    def _begin_anew(self) -> None:
        """Nobody noted what changed until now: every reader needs a snapshot."""
        self._complete_from = self.next_number()
        self._last.clear()
        self._removed.clear()
        self._stale = self._store.stale()
        for reader in self._readers:
            reader.begin_anew()

    def write(self, events: list[_Event], *, anew: bool = False) -> bytes:
        """The events as they are sent, with what is known of the engines now; `anew` numbers them anew."""
        now, known = self._store.snapshot_of(event.engine_id for event in events)
        rows, ends = {row[0]: row for row in known}, EndsJson(now, self.ages_json)
        text = []
        for event in events:
            row = event.removed or rows.get(event.engine_id)
            if row is None:
                continue  # removed meanwhile, which the next look tells
            _, quoted_id, shown, heard_at = row
            number = self.next_number() if anew else event.number
            end, _ = ends.of(heard_at, shown[2])
            entry = lone_entry_head(quoted_id, shown) + end
            text.append(b"id: %d\nevent: %b%b%b\n\n" % (number, event.kind, DATA_LINE, entry))
        self.events += len(text)
        return b"".join(text)

    def write_news(self, news: _News) -> bytes:
        """The events of one look; readers that take them in the same turn are given the same text."""
        now = self._clock()
        if now - news.written_at > SHARED_S:
            news.text, news.written_at = self.write(news.events), now
        else:
            self.events += news.text.count(b"\nevent: ")
        return news.text


class WatchReader:
    """One reader's stream: `read` gives what is to be sent next, as often as all before has been sent."""

    content_type = "text/event-stream"

    def __init__(
        self,
        watch: Watch,
        snapshot: Callable[[], bytes],
        wanted: frozenset[str],
        min_interval_s: float,
        clock: Callable[[], float],
    ) -> None:
        self._watch = watch
        self._snapshot = snapshot
        self._wanted = wanted  # nothing = all
        self._min_interval_s = min_interval_s
        self._clock = clock
        self._hello = _HELLO  # goes with the first event
        self._needs_snapshot = False
        self._news: _News | None = None  # to be sent as it is
        self._waiting: dict[str, _Event] = {}  # by engine, in the order of their numbers
        self._held_until: dict[str, float] = {}  # for min_interval_ms
        self._look_at = float("-inf")
        self._sent_at = clock()

    def begin_anew(self) -> None:
        """Have a snapshot sent next."""
        self._needs_snapshot = True
        self._news = None
        self._waiting.clear()
        self._held_until.clear()

    def take(self, news: _News) -> None:
        """Take what is new; what this reader has not been sent yet is replaced by what is newer."""
        if self._needs_snapshot:
            return  # which will have it
        wanted = self._wanted
        self._watch.merged_events += (
            sum(event.merged for event in news.events if event.engine_id in wanted) if wanted else news.merged
        )
        if not (self._wanted or self._min_interval_s or self._waiting or self._news):
            self._news = news
            return
        if self._news is not None:
            self.wait_with(self._news.events)
            self._news = None
        self.wait_with(news.events)

    def wait_with(self, events: list[_Event]) -> None:
        """Have events sent, EVENTS_AT_A_TIME of them, the newest of each engine."""
        waiting, wanted = self._waiting, self._wanted
        for event in events:
            if wanted and event.engine_id not in wanted:
                continue
            replaced = waiting.pop(event.engine_id, None)
            waiting[event.engine_id] = event
            if replaced is None:
                continue
            self._watch.merged_events += 1
            if event.kind is STATE and replaced.kind is not STATE:
                self._held_until.pop(event.engine_id, None)  # what was told of it last is not true any more
                if replaced.kind is LIVE:
                    waiting[event.engine_id] = replace(event, kind=LIVE)  # that it came back is not told yet

    @property
    def is_large(self) -> bool:
        """Whether what is to be sent next is a snapshot."""
        return self._needs_snapshot

    def read(self) -> bytes:
        """What is to be sent next, or nothing where there is nothing yet."""
        if self._news is None:  # else its text would no longer be the one that the other readers are given
            self._watch.look()
        text = self._next()
        now = self._clock()
        if text:
            self._sent_at = now
            hello, self._hello = self._hello, b""
            return hello + text
        if now - self._sent_at >= COMMENT_S:
            self._sent_at = now
            return _COMMENT
        return text

    def _next(self) -> bytes:
        if self._needs_snapshot:
            self._needs_snapshot = False
            self._watch.events += 1
            number = self._watch.next_number()
            hello, self._hello = self._hello, b""
            return b"%bid: %d\nevent: snapshot%b%b\n" % (hello, number, DATA_LINE, self._snapshot())
        if self._news is not None:
            news, self._news = self._news, None
            return self._watch.write_news(news)
        if self._waiting:
            return self._next_held() if self._min_interval_s else self._next_waiting()
        return b""

    def _next_waiting(self) -> bytes:
        waiting = self._waiting
        engine_ids = [engine_id for engine_id, _ in zip(waiting, range(EVENTS_AT_A_TIME), strict=False)]
        return self._watch.write([waiting.pop(engine_id) for engine_id in engine_ids])

    def _next_held(self) -> bytes:
        """With min_interval_ms: states are held back until it is over, and are numbered when they are sent."""
        now = self._clock()
        if now < self._look_at:
            return b""
        waiting, held_until = self._waiting, self._held_until
        all_due = (
            event
            for event in waiting.values()
            if event.kind is not STATE or held_until.get(event.engine_id, now) <= now
        )
        due = list(itertools.islice(all_due, EVENTS_AT_A_TIME))
        if len(due) < EVENTS_AT_A_TIME:
            self._look_at = now + HELD_LOOK_S
        for event in due:
            del waiting[event.engine_id]
            if event.kind is REMOVED:
                held_until.pop(event.engine_id, None)
            else:
                held_until[event.engine_id] = now + self._min_interval_s
        return self._watch.write(due, anew=True)

    def close(self) -> None:
        """The reader is gone; twice is harmless."""
        self._watch.close(self)
