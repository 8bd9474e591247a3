"""What happened lately: the last 1,000 events of the fleet and of the gateway itself, for /events.

They are kept in memory only, for as long as the process lives. A flood of one kind is merged and pushes no other kind
out: the first MAX_ALONE events of a kind within a second stand alone, the others are one event with their number, and
when the memory is full, the kind that has the most events gives up its oldest one.
"""

from __future__ import annotations

import threading
import time
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

MAX_EVENTS = 1000
MAX_ALONE = 10  # events of a kind within WINDOW_S that are not merged
WINDOW_S = 1.0
MAX_MESSAGE_BYTES = 200  # as UTF-8

APPEARED, WENT_STALE, CAME_BACK, REMOVED = "appeared", "stale", "live", "removed"
FAREWELL, RESTARTED, CONFLICT = "farewell", "restarted", "conflict"
LOG_TROUBLE, LOG_RECOVERED = "log_trouble", "log_recovered"
KERNEL_DROPS, PAUSED, GATEWAY_STARTED = "kernel_drops", "paused", "gateway_started"

# Every kind there is, and when it happens; docs/http.md and the status page have the same ones.
EVENT_KINDS = {
    APPEARED: "an engine was heard from that was not known",
    WENT_STALE: "an engine has been silent for longer than `STALE_THRESHOLD`",
    CAME_BACK: "a stale engine was heard from again",
    REMOVED: "an engine was removed, silent for longer than `EXPIRE_AFTER`",
    FAREWELL: "an engine said that it is gone",
    RESTARTED: "an engine began a new life under the same name",
    CONFLICT: "several senders use one engine_id",
    LOG_TROUBLE: "the state log cannot be written",
    LOG_RECOVERED: "the state log is written again",
    KERNEL_DROPS: "the kernel dropped datagrams, its receive buffer being full",
    PAUSED: "the gateway itself stood still for more than a second",
    GATEWAY_STARTED: "the gateway was started",
}


Note = tuple[str, str, int | None, int, str]  # kind, engine_id, time_ms, count, and what more there is to say of it


@dataclass(slots=True)
class FleetEvent:
    """One event, or several of a kind that were merged; then all but `count` is the first one's."""

    number: int  # grows with each
    time_ms: int  # since the epoch
    kind: str
    engine_id: str | None
    message: str
    count: int

    def document(self) -> dict[str, Any]:
        """As it is at /events."""
        return {
            "time_ms": self.time_ms,
            "event": self.kind,
            "engine_id": self.engine_id,
            "message": self.message,
            "count": self.count,
        }


@dataclass(slots=True)
class _Window:
    """What happened of a kind within a second."""

    began_at: float
    alone: int = 0
    merged: FleetEvent | None = None


class FleetEvents:
    """The last events; any thread may record one and read them."""

    def __init__(
        self, *, clock: Callable[[], float] = time.monotonic, wall_clock: Callable[[], float] = time.time
    ) -> None:
        self._clock = clock
        self._wall_clock = wall_clock
        self._lock = threading.Lock()  # guards all below; nothing slow happens under it
        self._number = 0
        self._by_kind: dict[str, deque[FleetEvent]] = {kind: deque() for kind in EVENT_KINDS}
        self._windows: dict[str, _Window] = {}

    def record(
        self,
        kind: str,
        engine_id: str | None = None,
        message: str = "",
        *,
        time_ms: int | None = None,
        count: int = 1,
    ) -> None:
        """Keep an event, or several of one kind; `time_ms` is now if it is not given."""
        if time_ms is None:
            time_ms = int(self._wall_clock() * 1000)
        message = message.encode("utf-8", "replace")[:MAX_MESSAGE_BYTES].decode("utf-8", "ignore")
        now = self._clock()
        with self._lock:
            window = self._windows.get(kind)
            if window is None or now - window.began_at >= WINDOW_S:
                window = self._windows[kind] = _Window(now)
            if window.merged is not None:
                window.merged.count += count
                return
            self._number += 1
            event = FleetEvent(self._number, time_ms, kind, engine_id, message, count)
            if window.alone < MAX_ALONE and count == 1:
                window.alone += 1
            else:
                window.merged = event
            self._by_kind[kind].append(event)
            if sum(map(len, self._by_kind.values())) > MAX_EVENTS:
                max(self._by_kind.values(), key=len).popleft()

    def documents(self, since_ms: int = 0) -> list[dict[str, Any]]:
        """The events from a time on, as they are at /events, the oldest first."""
        with self._lock:
            kept = [event for events in self._by_kind.values() for event in events if event.time_ms >= since_ms]
            kept.sort(key=lambda event: event.number)
            return [event.document() for event in kept]


class EventNotes:
    """What happened to engines until it is handed on: the first of each kind, and how many more there were.

    Not locked: it belongs to the store and is used under its lock, so that intake pays for no more than a note.
    """

    def __init__(self) -> None:
        self._notes: dict[str, list[tuple[str, int | None, str]]] = {}
        self._more: dict[str, int] = {}

    def note(self, kind: str, engine_id: str, time_ms: int | None = None, detail: str = "") -> None:
        """Note an event; `time_ms` is that of the handing on if it is not given."""
        noted = self._notes.setdefault(kind, [])
        if len(noted) <= MAX_ALONE:
            noted.append((engine_id, time_ms, detail))
        else:
            self._more[kind] = self._more.get(kind, 0) + 1

    def take(self) -> list[Note]:
        """All that was noted since the last call."""
        taken = [
            (kind, engine_id, time_ms, 1 + (self._more.get(kind, 0) if at == MAX_ALONE else 0), detail)
            for kind, noted in self._notes.items()
            for at, (engine_id, time_ms, detail) in enumerate(noted)
        ]
        if taken:
            self._notes, self._more = {}, {}
        return taken
