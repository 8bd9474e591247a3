"""Follows state gateways over HTTP and answers a router's questions in microseconds, without any I/O.

This file needs nothing but Python 3.10: copy it beside a router, or put its folder on the path.

    from engine_table import EngineTable

    table = EngineTable("http://gateway-a:9999", "http://gateway-b:9999")  # one for the process
    engine = table.choose()  # for each request; None if no engine is live
    if engine is not None:
        forward_to(engine.engine_id)

A thread for each gateway address follows its /watch. Ages grow by this process's monotonic clock, so that whatever ends
(a gateway, the network, an engine), what is known of an engine grows old by itself: live, then stale, then removed.

How several gateways are put together:

- For each engine the entry counts that was heard from last. A heartbeat, which says nothing of the load, does not
  replace a load that another gateway still shows and that is younger than the threshold.
- An entry is dated by when the gateway wrote it, not by when it was read: events that were held up (a gateway or this
  process paused, a slow path) come as old as they are. The gateway's clock is compared with this process's between the
  request that opened the stream and the answer, so an entry can look younger than it is by one such round trip at most,
  and by 100 ms if the round trip is longer: the rest is added to its age.
- If two gateways show the same state, it is as old as the older evidence says, but for one round trip: a gateway
  that repeats an old state as new makes nothing younger. One that invents new states is believed, as any gateway is.
- A state that an engine said before the one that another gateway shows is older than that, whenever it was received:
  a gateway that was paused takes what waited in its socket for new, one state after another.
- A farewell that one gateway was sent removes the engine, whatever another one knew before.
- A gateway that has just been started knows nobody. What was known before stays until it is too old.

In a child process after a fork the threads are gone: the table's first use there starts them anew.

Run as a program, `python3 engine_table.py http://gateway:9999` shows the fleet in a terminal; see --help.
"""

from __future__ import annotations

import argparse
import codecs
import contextlib
import functools
import http.client
import io
import ipaddress
import json
import logging
import math
import os
import queue
import random
import re
import select
import shutil
import signal
import socket
import ssl
import statistics
import sys
import threading
import time
import unicodedata
import urllib.parse
import weakref
from collections.abc import AsyncIterator, Callable, Container, Iterator
from dataclasses import dataclass
from operator import itemgetter
from typing import Any

try:
    import termios
except ImportError:  # Windows: the table works, the live view does not
    termios = None  # type: ignore[assignment]

__all__ = ["EngineTable", "Entry", "EventStream", "GatewayStatus", "StreamError"]

VERSION = "2.0.0"

logger = logging.getLogger(__name__)

LIVE, STALE, UNAVAILABLE = "live", "stale", "unavailable"
SUMMED = ("pending_tokens_total", "engine_capacity", "kv_cache_free_blocks", "kv_cache_total_blocks")

CONNECT_TIMEOUT_S = 5.0
ANSWER_TIMEOUT_S = 5.0  # from the request to the head of the answer
SNAPSHOT_TIMEOUT_S = 10.0  # from then to the first event's beginning, and of silence until that event is whole
EVENT_TIMEOUT_S = 60.0  # from an event's first byte to its last
REFUSAL_TIMEOUT_S = 1.0  # for the words that come with a refusal
SILENCE_S = 20.0  # of a stream; a gateway that has nothing to tell sends a comment every 15 s
HUNG_AFTER_S = 1.0  # beyond the threshold, while engines were live: by then the gateway must have called one stale
FIRST_RETRY_S, LONGEST_RETRY_S = 0.1, 2.0  # the delay doubles; the longest is also what `retry:` says, up to 30 s
REFUSED_RETRY_S = 5.0  # the longest delay after an answer that is no event stream
LOOKUP_S = 5.0  # between two looks at a name's addresses
DOUBT_S = 0.1  # a stream that was opened so slowly is opened again, to know better when things were written
CONFIDENCE_S = 0.1  # by which an entry may look younger than it is if the round trip is longer
ORDER_S = 0.01  # by which stamps of milliseconds may seem out of order
LATE_S = 0.05  # events that come later than that are looked at twice
DRIFT = 0.00005  # seconds a second by which two clocks drift apart at most
SAME_SIGN_S = 0.002  # ages of one event: a state that is also the last sign of life
REACHABLE_S = 2.0  # a gateway that sent something within this time is a witness against another
GONE_S = 60.0  # for how long it is known what a gateway removed, as a witness against another
FAREWELL_S = 0.1  # after a farewell, what another gateway heard counts only if it is newer by this much
KEEPER_S = 0.1  # between two looks for what grew old
USUAL_OF = 101  # engines looked at for the usual load
NOTICE_S = 60.0  # between two log lines about one gateway

MAX_EVENT_CHARS = 64 * 1024 * 1024  # of one event, and of one line: 100,000 engines and more
MAX_ID_CHARS = 1024
MAX_ENGINES = 1_000_000  # of one gateway
MAX_INTEGER = 2**53
READ_BYTES = 65536
LINES_AT_A_TIME = 64  # of a snapshot
RECEIVE_BUFFER = 512 * 1024  # what waits longer than that is replaced at the gateway by what is newer


# -- event streams -----------------------------------------------------------------------------------------------------


class StreamError(ValueError):
    """What came is no event stream of a state gateway; the text says why."""


_USUAL_EVENT = re.compile(r"id: ([!-~]{1,200})\nevent: ([a-z]+)\ndata: ([^\n]*)\n\n")


class EventStream:
    """Parses text/event-stream by the rules of the HTML standard, however it is split; not thread-safe.

    `last_event_id` is what to send as Last-Event-ID, `retry_ms` what the server asked for (None: nothing).
    """

    def __init__(self, max_chars: int = MAX_EVENT_CHARS, last_event_id: str = "") -> None:
        self.last_event_id = last_event_id
        self.retry_ms: int | None = None
        self._max_chars = max_chars
        self._decode = codecs.getincrementaldecoder("utf-8")("replace").decode
        self._began_at: float | None = None  # when the first byte of the event came that is not whole yet
        self._id = last_event_id
        self._kind = ""
        self._data: list[str] = []
        self._data_chars = 0
        self._line: list[str] = []  # the pieces of a line that has not ended
        self._line_chars = 0
        self._at_start = True  # where a byte-order mark may be
        self._after_cr = False  # where a line feed belongs to the line before

    @property
    def is_within(self) -> bool:
        """Whether an event or a line has begun that is not whole yet."""
        return bool(self._line or self._data or self._kind)

    def feed(self, received: bytes, now: float = 0.0) -> list[tuple[str, str, float]]:
        """The events that end in what was received: kind, data, and when the event's first byte came.

        Raises StreamError if a line or an event is longer than `max_chars`.
        """
        text = self._decode(received)
        if text and self._at_start:
            self._at_start = False
            text = text.removeprefix("\ufeff")
        if text and self._after_cr:
            self._after_cr = False
            text = text.removeprefix("\n")
        if "\r" in text:
            self._after_cr = text[-1] == "\r"
            text = text.replace("\r\n", "\n").replace("\r", "\n")
        events: list[tuple[str, str, float]] = []
        position = 0
        while True:
            if not self.is_within:
                # Most events come whole, each with the same three lines.
                while usual := _USUAL_EVENT.match(text, position):
                    self._id, kind, data = usual.groups()
                    events.append((kind, data, now if self._began_at is None else self._began_at))
                    self._began_at = None
                    position = usual.end()
                    self.last_event_id = self._id
            end = text.find("\n", position)
            if end < 0:
                break
            line = text[position:end]
            position = end + 1
            if self._line:
                line = "".join((*self._line, line))
                self._line, self._line_chars = [], 0
            self._take_line(line, now, events)
        if position < len(text):
            self._line.append(text[position:])
            self._line_chars += len(text) - position
        if self._line_chars + self._data_chars > self._max_chars:
            raise StreamError(f"a line or an event is longer than {self._max_chars} characters")
        if not self.is_within:
            self._began_at = None
        elif self._began_at is None:
            self._began_at = now
        return events

    def _take_line(self, line: str, now: float, events: list[tuple[str, str, float]]) -> None:
        if not line:
            self.last_event_id = self._id
            if self._data:
                began_at = now if self._began_at is None else self._began_at
                events.append((self._kind or "message", "\n".join(self._data), began_at))
            self._kind, self._data, self._data_chars, self._began_at = "", [], 0, None
            return
        name, _, value = line.partition(":")
        value = value.removeprefix(" ")
        if name == "data":
            self._data.append(value)
            self._data_chars += len(value) + 1
            if self._data_chars > self._max_chars:
                raise StreamError(f"an event is longer than {self._max_chars} characters")
        elif name == "event":
            self._kind = value
        elif name == "id":
            if "\0" not in value:
                self._id = value if len(value) <= MAX_ID_CHARS else ""
        elif name == "retry" and value.isascii() and value.isdigit():
            self.retry_ms = int(value[:9])


# -- entries -----------------------------------------------------------------------------------------------------------


class _NoNumber(ValueError):
    """NaN or an infinity, which JSON does not have."""


def _no_constant(text: str) -> Any:
    raise _NoNumber(text)


_decode_json = json.JSONDecoder(parse_constant=_no_constant).raw_decode


def _parse_json(text: str) -> Any:
    """The JSON document that a text is; raises StreamError."""
    text = text.strip(" \t\n\r")
    try:
        document, end = _decode_json(text)
    except (ValueError, RecursionError) as error:
        raise StreamError(f"an event's data is no JSON: {error}") from None
    if end != len(text):
        raise StreamError("an event's data is more than one JSON document")
    return document


def _parse_all_json(texts: list[str]) -> list[Any]:
    """The documents of many events at once, which takes two thirds of the time; raises StreamError."""
    if len(texts) > 1:
        joined = "[" + ",".join(texts) + "]"
        try:
            documents, end = _decode_json(joined)
        except (ValueError, RecursionError):
            pass  # which one it is shows below
        else:
            if end == len(joined) and len(documents) == len(texts):
                return documents  # type: ignore[no-any-return]
    return [_parse_json(text) for text in texts]


def _ms(seconds: float) -> int:
    """Whole ms, for what is a whole number but for the rounding of floats, too."""
    return max(0, int(seconds * 1000 + 0.001))


def _parse_snapshot(text: str) -> Any:
    """The document of a snapshot, a piece at a time, so that a large fleet holds up no other thread for long.

    Gateways write it with an engine a line, where other threads can have their turn; any other JSON is as good.
    """
    lines = text.split("\n")
    if len(lines) > 2 * LINES_AT_A_TIME:
        try:
            document = _parse_json(lines[0] + lines[-1])
            engines = document["engines"]
            for start in range(1, len(lines) - 1, LINES_AT_A_TIME):
                piece = "".join(lines[start : min(start + LINES_AT_A_TIME, len(lines) - 1)])
                engines.update(_parse_json("{" + piece.strip().removeprefix(",").removesuffix(",") + "}"))
            return document
        except (StreamError, LookupError, TypeError, AttributeError, ValueError):
            pass  # it is written in another way
    return _parse_json(text)


class Entry:
    """What is known of an engine: read-only, with the names that /engines has, and its ages as of now.

    Ages are in ms and grow from one look at this very entry to the next; `status` and `usable` follow them, all else
    stays as it is. A newer entry is another object: ask the table again. From any thread.
    """

    engine_id: str
    timestamp_ms: int
    latency_pred_ms: float
    scheduling_mode: str
    pending_tokens_total: int
    kv_cache_free_blocks: int
    kv_cache_total_blocks: int
    engine_capacity: float
    heartbeat: bool
    received_ms: int
    clock_offset_ms: int
    source: str
    # What older gateways do not tell is None, no restarts and no conflict; `extra` is empty if there is none.
    phase: str | None
    restarts: int
    lost: int | None
    conflict: bool
    extra: dict[str, Any]

    __slots__ = ("_available", "_fields", "_gateway", "_heard_at", "_load_known", "_shown_at")

    def __init__(
        self,
        fields: dict[str, Any],
        gateway: _Gateway,
        heard_at: float,
        shown_at: float,
        available: bool,
        load_known: bool,
    ) -> None:
        self._fields = fields
        self._gateway = gateway
        self._heard_at = heard_at
        self._shown_at = shown_at
        self._available = available
        self._load_known = load_known

    def __getattr__(self, name: str) -> Any:
        if name.startswith("_"):
            raise AttributeError(name)
        try:
            value = self._fields[name]
        except KeyError:
            if name not in _OPTIONAL:
                raise AttributeError(f"an engine's entry has no {name!r}") from None
            value = _OPTIONAL[name]
        return dict(value) if type(value) is dict else value

    def __repr__(self) -> str:
        return f"<Entry {self.engine_id!r} {self.status} age_ms={self.age_ms}>"

    def __copy__(self) -> Entry:
        return self  # it is never changed

    def __deepcopy__(self, _: object) -> Entry:
        return self

    def __reduce__(self) -> str:
        raise TypeError("an Entry cannot be pickled: its ages are by this process's clock; use its as_dict()")

    @property
    def age_ms(self) -> int:
        """Since the engine was last heard from, in ms, by the gateway that heard from it last."""
        return _ms(self._gateway.clock() - self._heard_at)

    @property
    def state_age_ms(self) -> int:
        """Since the load state shown was received, in ms."""
        return _ms(self._gateway.clock() - self._shown_at)

    @property
    def status(self) -> str:
        """`live`, `stale` (silent for longer than the gateway's threshold) or `unavailable` (takes no requests)."""
        if self._gateway.clock() - self._heard_at > self._gateway.stale_s:
            return STALE
        return LIVE if self._available else UNAVAILABLE

    @property
    def load_known(self) -> bool:
        """Whether the state shown is a load, and not a heartbeat's placeholders."""
        return self._load_known

    @property
    def usable(self) -> bool:
        """Whether it is live and its load is known: safe to send requests to by these numbers."""
        return self._load_known and self.status == LIVE

    @property
    def gateway(self) -> str:
        """The URL of the gateway that this is from."""
        return self._gateway.url

    @property
    def seconds_of_work(self) -> float | None:
        """What waits, in seconds of the engine's capacity; None if that is not known, which does not mean idle."""
        capacity = self._fields["engine_capacity"]
        if not self._load_known or not capacity:
            return None
        return float(self._fields["pending_tokens_total"] / capacity)

    def as_dict(self) -> dict[str, Any]:
        """A dictionary of its own for the caller, as /engines has it, with the ages as of now."""
        extra = self._fields.get("extra")
        return {
            **self._fields,
            **({"extra": dict(extra)} if type(extra) is dict else {}),
            "load_known": self._load_known,
            "usable": self.usable,
            "status": self.status,
            "age_ms": self.age_ms,
            "state_age_ms": self.state_age_ms,
        }

    def _is_live(self, now: float) -> bool:
        return self._available and now - self._heard_at <= self._gateway.stale_s

    def _gateway_clock_s(self) -> float:
        """What the gateway's clock showed when it wrote this, in s."""
        return float((self._fields["received_ms"] + self._fields["state_age_ms"]) / 1000)


_STATE = (
    "engine_id", "timestamp_ms", "latency_pred_ms", "scheduling_mode", "pending_tokens_total", "kv_cache_free_blocks",
    "kv_cache_total_blocks", "engine_capacity",
)  # fmt: skip
_AVAILABLE = frozenset((LIVE, STALE))  # a status that is not known here takes no requests either
_OPTIONAL: dict[str, Any] = {"phase": None, "restarts": 0, "lost": None, "conflict": False, "extra": {}}
_state_of = itemgetter(*_STATE)
_needed_of = itemgetter(
    "engine_id", "age_ms", "state_age_ms", "received_ms", "pending_tokens_total", "engine_capacity", "heartbeat",
    "status", "kv_cache_free_blocks", "kv_cache_total_blocks", "latency_pred_ms", "timestamp_ms", "scheduling_mode",
    "source", "clock_offset_ms",
)  # fmt: skip


# -- one gateway -------------------------------------------------------------------------------------------------------


class _WrittenAt:
    """When, by this process's clock, a gateway wrote what comes on its streams; one thread's.

    The gateway's clock stands in each entry: when the state shown was received, plus that state's age. This process's
    clock is ahead of it by an amount that lies between two bounds: what is answered was written after it was asked for,
    and whatever comes was written before it came. Each answer and each event can make them narrower.
    """

    WINDOW_S = 10.0
    SAMPLES = 5

    def __init__(self) -> None:
        self._asked_at: float | None = None
        self._offset: float | None = None  # what is added to the gateway's clock
        self._least = self._most = 0.0
        self._last = float("-inf")  # when what came last was written
        self._bounds_at = 0.0
        self.round_trip_s = 0.0
        self._begin_window(0.0)

    def _begin_window(self, now: float) -> None:
        self._window_ends = now + self.WINDOW_S
        self._fastest: float = float("inf")
        self._samples: int = 0
        self._sample_at: float = now

    @property
    def doubt_s(self) -> float:
        """By how much ages may be too high, because it is not known better when things were written."""
        return max(0.0, self._most - self._least - CONFIDENCE_S)

    def ask(self, now: float) -> None:
        """The request is sent now: all that comes on the stream is written later."""
        self._asked_at = now

    def of(self, arrived_at: float, clock_s: float, before: Entry | None = None) -> float:
        """Of an event; `before` is what the same gateway told of the same engine before."""
        if self._asked_at is not None:
            return self._of_answer(arrived_at, clock_s)
        written_at = clock_s + self._offset  # type: ignore[operator]
        if self._last - ORDER_S <= written_at <= arrived_at and (
            arrived_at - written_at < LATE_S or before is None or clock_s - before._gateway_clock_s() > SAME_SIGN_S
        ):
            if written_at > self._last:
                self._last = written_at
            return written_at
        most = arrived_at - clock_s
        if most < self._least - ORDER_S or written_at <= arrived_at:
            # The gateway's clock was set: nothing comes before it is written, and no stamp goes back.
            self._least += most - self._most
        self._most = most
        self._offset = most
        self._last = arrived_at
        return arrived_at

    def _of_answer(self, arrived_at: float, clock_s: float) -> float:
        """Of the first event of a stream: what is not known of when it was written counts as age, but CONFIDENCE_S."""
        asked_at = self._asked_at or 0.0
        self._asked_at = None
        least, most = asked_at - clock_s, arrived_at - clock_s
        self.round_trip_s = most - least
        self._widen(arrived_at)
        if self._offset is not None and least <= self._most + ORDER_S and most >= self._least - ORDER_S:
            self._least = max(self._least, least)
            self._most = max(self._least, min(self._most, most))
        else:
            self._least, self._most = least, most
            self._begin_window(arrived_at)
        self._offset = min(self._most, self._least + CONFIDENCE_S)
        self._last = max(asked_at, min(arrived_at, clock_s + self._offset))
        return self._last

    def learn(self, arrived_at: float, clock_s: float) -> None:
        """Make the bounds narrower by what came, and follow a clock that was set back while nothing came."""
        most = arrived_at - clock_s
        self._widen(arrived_at)
        self._most = max(self._least, min(self._most, most))
        self._offset = min(self._most, self._least + CONFIDENCE_S)
        self._fastest = min(self._fastest, most)
        if arrived_at >= self._sample_at:
            self._sample_at = arrived_at + 1.0
            self._samples += 1
        if arrived_at >= self._window_ends and self._samples >= self.SAMPLES:
            if self._fastest > self._most + LATE_S:
                # Everything has been late for so long: it is not late, the clock was set back.
                self._least += self._fastest - self._most
                self._most = self._fastest
            self._begin_window(arrived_at)

    def _widen(self, now: float) -> None:
        """Clocks drift apart."""
        drift = max(0.0, now - self._bounds_at) * DRIFT
        self._bounds_at = now
        self._least -= drift
        self._most += drift


@dataclass(frozen=True)
class GatewayStatus:
    """How one gateway address is doing."""

    url: str
    address: str  # "" until its name was looked up
    connected: bool
    problem: str  # "" while it is followed
    instance: str  # of the gateway; "" before its first snapshot
    stale_threshold_ms: int
    engines: int  # that it knows
    events: int  # that came from it
    round_trip_ms: float  # of the request that opened the stream


_Change = tuple["Entry", "float | None"]  # an engine's entry, and when it was removed, where it was


class _Gateway:
    """What one gateway address told; the table's lock guards `view`, `carried` and `connected`."""

    def __init__(self, url: _Url, address: str, clock: Callable[[], float]) -> None:
        self.url = url.text
        self.address = address
        self.clock = clock
        self.stale_s = 2.0
        self.instance = ""
        self.connected = False
        self.problem = "not asked yet"
        self.view: dict[str, Entry] = {}
        self.followed = True
        self.known = False  # whether it has ever told what it knows
        self.carried: set[str] = set()  # engines that an earlier instance knew, and this one does not know yet
        self.arrived_at = float("-inf")
        self.live_until = float("-inf")  # until when the gateway must have told something: one was live
        self.round_trip_s = 0.0
        self.events = 0
        self.faults = 0

    def status(self) -> GatewayStatus:
        return GatewayStatus(
            self.url,
            self.address,
            self.connected,
            self.problem,
            self.instance,
            round(self.stale_s * 1000),
            len(self.view),
            self.events,
            self.round_trip_s * 1000,
        )

    def entry(self, fields: dict[str, Any], written_at: float) -> Entry:
        """An entry from what came; raises LookupError, TypeError or ValueError if it is none."""
        (
            engine_id, age_ms, state_age_ms, received_ms, pending, capacity, heartbeat,
            status, free, total, latency, timestamp_ms, mode, source, clock_offset_ms,
        ) = _needed_of(fields)  # fmt: skip
        if not (
            type(engine_id) is type(mode) is type(status) is type(source) is str
            and engine_id.isprintable()
            and type(clock_offset_ms) is int
            and 0 <= age_ms <= MAX_INTEGER
            and 0 <= state_age_ms <= MAX_INTEGER
            and 0 <= received_ms <= MAX_INTEGER
            and 0 <= pending <= MAX_INTEGER
            and 0 <= timestamp_ms <= MAX_INTEGER
            and -1 <= free <= MAX_INTEGER
            and -1 <= total <= MAX_INTEGER
            and 0 <= capacity < math.inf
            and 0 <= latency < math.inf
        ):
            raise ValueError("a field is out of its range")
        get = fields.get
        phase, extra, lost = get("phase"), get("extra"), get("lost")
        if not (
            (phase is None or type(phase) is str)
            and (extra is None or type(extra) is dict)
            and (lost is None or type(lost) is int)
            and type(get("restarts", 0)) is int
            and type(get("conflict", False)) is bool
        ):
            raise ValueError("phase, extra, lost, restarts or conflict is not what it should be")
        return Entry(
            fields,
            self,
            written_at - age_ms / 1000,
            written_at - state_age_ms / 1000,
            status in _AVAILABLE and (phase is None or phase == "serving"),
            not heartbeat and get("load_known", True) is True,
        )


_HOST = re.compile(r"[A-Za-z0-9._-]+|[0-9A-Fa-f:.]*:[0-9A-Fa-f:.]*(%[A-Za-z0-9._-]+)?")


class _Url:
    """A gateway's base URL, taken apart; raises ValueError."""

    def __init__(self, text: str) -> None:
        if not isinstance(text, str):
            raise ValueError(f"a gateway's URL is a string, not {text!r}")
        if not text.isprintable() or " " in text or not text.isascii():
            raise ValueError(f"{text!r} is no URL: it has characters that none has")
        try:
            parts = urllib.parse.urlsplit(text)
            port = parts.port
        except ValueError as error:
            raise ValueError(f"{text!r} is no URL: {error}") from None
        if parts.scheme not in ("http", "https") or not parts.hostname or not _HOST.fullmatch(parts.hostname):
            raise ValueError(f"{text!r} is no gateway's URL: it is like http://gateway.example:9999 or https://...")
        if parts.username is not None or parts.password is not None:
            raise ValueError(f"the URL of {parts.hostname!r} has a user name or password: give a token= instead")
        if parts.query or parts.fragment or "?" in text or "#" in text:
            raise ValueError(f"{text!r} ends in a query or fragment: give the base URL alone")
        if parts.path.rstrip("/").endswith(("/watch", "/engines")):
            raise ValueError(f"{text!r} is a page of a gateway: give the base URL, without /watch or /engines")
        if port == 0:
            raise ValueError(f"{text!r}: port 0 is none to connect to")
        self.secure = parts.scheme == "https"
        self.host = parts.hostname.replace("%25", "%", 1)  # as a URL writes the zone of fe80::1%eth0 (RFC 6874)
        self.port = port or (443 if self.secure else 80)
        self.path = parts.path.rstrip("/")
        host = f"[{self.host}]" if ":" in self.host else self.host
        self.text = f"{parts.scheme}://{host}:{self.port}{self.path}"

    def addresses(self) -> list[list[str]]:
        """Its addresses, by family, in the order of the answer; raises OSError. localhost is 127.0.0.1 first."""
        if self.is_literal():
            return [[self.host]]
        if self.host == "localhost":
            return [["127.0.0.1"], ["::1"]]
        try:
            found = socket.getaddrinfo(self.host, self.port, type=socket.SOCK_STREAM)
        except UnicodeError as error:
            raise OSError(f"{self.host!r} is no host name: {error}") from None
        groups: dict[int, list[str]] = {}
        for family, _, _, _, address in found:
            one = str(address[0])
            if one not in groups.setdefault(family, []):
                groups[family].append(one)
        return list(groups.values())

    def is_literal(self) -> bool:
        """Whether it names an address, so that there is nothing to look up."""
        try:
            ipaddress.ip_address(self.host)
        except ValueError:
            return False
        return True


_SNAPSHOT, _REMOVED = "snapshot", "removed"
_KINDS = frozenset((_SNAPSHOT, "state", "stale", "live", _REMOVED))


class _Refused(Exception):
    """A gateway's answer that is no event stream."""


class _Received(io.RawIOBase):
    """The bytes that come on a connection; nobody waits for them beyond `deadline`, however few come at a time."""

    def __init__(self, sock: socket.socket) -> None:
        super().__init__()
        self._socket = sock
        self.deadline = float("inf")  # monotonic s

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any) -> int:
        left_s = self.deadline - time.monotonic()
        if left_s <= 0:
            raise TimeoutError("timed out")
        self._socket.settimeout(left_s)
        return self._socket.recv_into(buffer)

    def makefile(self, _: str) -> io.BufferedReader:
        return io.BufferedReader(self)

    def answer(self) -> http.client.HTTPResponse:
        """The head of the answer, within ANSWER_TIMEOUT_S; raises OSError or HTTPException."""
        self.deadline = time.monotonic() + ANSWER_TIMEOUT_S
        response = http.client.HTTPResponse(self, method="GET")  # type: ignore[arg-type]
        try:
            response.begin()
            while 101 < response.status < 200:  # http.client passes over 100 only: the answer is still to come
                response.headers = None  # type: ignore[assignment]
                response.begin()
        except TimeoutError:
            raise TimeoutError(f"no answer within {ANSWER_TIMEOUT_S:g} s") from None
        return response


class _Follower:
    """Follows /watch of one gateway address, in a thread of its own, until it is stopped."""

    def __init__(self, table: EngineTable, name: _Name, gateway: _Gateway) -> None:
        self._table = table
        self._name = name
        self.gateway = gateway
        self.failed_to_connect = False
        self._stop = threading.Event()
        self._retry_now = threading.Event()
        self._socket: socket.socket | None = None
        self._stream = EventStream()
        self._resumes = False
        self._stamps = _WrittenAt()
        self._retry_ms: int | None = None
        self._doubted_s = 0.0
        self._ask_again_at = float("-inf")
        self._ask_again_after_s = 1.0
        self.thread = threading.Thread(target=self._run, name=f"engine-table {gateway.address}", daemon=True)

    def stop(self) -> None:
        """Make the thread end soon; from any thread, twice is harmless."""
        self._stop.set()
        self._retry_now.set()
        self.close_socket()

    def retry_now(self) -> None:
        """If the thread waits before it tries again, end that; from any thread."""
        self._retry_now.set()

    def close_socket(self, *, shut_down: bool = True) -> None:
        """Wake the thread if it waits for the gateway; without `shut_down`, only let go of the descriptor."""
        sock = self._socket
        if sock is not None:
            with contextlib.suppress(OSError):
                if shut_down:
                    sock.shutdown(socket.SHUT_RDWR)
                else:
                    os.close(sock.detach())

    def _run(self) -> None:
        failures = 0
        while not self._stop.is_set():
            longest = LONGEST_RETRY_S
            began_at = time.monotonic()
            try:
                self._follow()
                problem = ""
            except (StreamError, _Refused) as error:
                problem, longest = str(error), REFUSED_RETRY_S
                self._resumes = False
            except OSError as error:
                problem = str(error) or repr(error)
            except http.client.HTTPException as error:
                problem, longest = f"it does not speak HTTP: {error!r}", REFUSED_RETRY_S
                self._resumes = False
            except Exception as error:
                problem, longest = f"{error!r}, which is a bug of engine_table.py", REFUSED_RETRY_S
                self._resumes = False
                logger.debug("while following %s", self.gateway.url, exc_info=True)
            if self._stop.is_set():
                break
            if problem:
                self._disconnected(problem)
                failures = failures + 1 if time.monotonic() - began_at < REFUSED_RETRY_S else 1
                self._name.look_again()
                if not self._name.wants(self):
                    break
                if self._retry_ms is not None and longest == LONGEST_RETRY_S:
                    longest = min(max(self._retry_ms / 1000, FIRST_RETRY_S), 30.0)
                delay = min(longest, FIRST_RETRY_S * 2 ** min(failures - 1, 20))
                self._retry_now.clear()
                if not self._stop.is_set():
                    self._retry_now.wait(delay * random.uniform(0.5, 1.0))
        self._table._set_connected(self.gateway, False)
        self.gateway.followed = False
        self.gateway.problem = "no longer followed"

    def _disconnected(self, problem: str) -> None:
        self._table._set_connected(self.gateway, False)
        self.gateway.problem = problem
        self._name.say(f"cannot be followed, and what it told grows old: {problem}", self.gateway.address)

    def _follow(self) -> None:
        """Open the stream and follow it until it breaks; returns if it is to be opened once more at once."""
        clock = self.gateway.clock
        sock = self._socket = self._connect()
        connection = self._name.connection()
        connection.sock = sock
        try:
            if self._stop.is_set():
                return
            self._stamps.ask(clock())
            resumes = self._resumes
            last_event_id = self._stream.last_event_id if resumes else ""
            self._name.ask(connection, "/watch", "text/event-stream", last_event_id)
            received = _Received(sock)
            response = received.answer()
            self._check(response, received)
            self._resumes = False  # until something came that can be used
            self._stream = EventStream(last_event_id=last_event_id)
            self._read(received, response, resumes)
        except UnicodeEncodeError as error:
            raise _Refused(f"the request cannot be written: {error}") from None
        finally:
            self._socket = None
            connection.close()
            sock.close()

    def _connect(self) -> socket.socket:
        self.failed_to_connect = True
        sock = self._name.connect(self.gateway.address, self._set_socket)
        self.failed_to_connect = False
        return sock

    def _set_socket(self, sock: socket.socket) -> None:
        self._socket = sock

    def _check(self, response: http.client.HTTPResponse, received: _Received) -> None:
        """Raise _Refused if the answer is no event stream, saying what it is and what to do."""
        if response.status != 200:
            received.deadline = time.monotonic() + REFUSAL_TIMEOUT_S
            try:
                said = response.read1(300).decode("utf-8", "replace").strip()
            except (OSError, http.client.HTTPException):
                said = ""
            hint = {
                401: "; it wants a token: EngineTable(..., token=...), or --token-file",
                403: "; is the token one of its HTTP_TOKENS_FILE?",
                404: "; is this a state gateway, and is the base path right?",
            }.get(response.status, "")
            leads_to = response.getheader("Location")
            if 300 <= response.status < 400 and leads_to:
                hint = f"; it is not followed to {leads_to[:200]!r}: if a gateway is there, give its URL"
            raise _Refused(f"it answered {response.status} {response.reason}{hint}: {said[:200]!r}")
        kind = (response.getheader("Content-Type") or "").partition(";")[0].strip().lower()
        if kind != "text/event-stream":
            raise _Refused(f"it answered {kind or 'no content type'!r}, not an event stream; is this a state gateway?")
        if (response.getheader("Content-Encoding") or "identity").strip().lower() != "identity":
            raise _Refused("its event stream is compressed, which was not asked for: a proxy between must not do that")

    def _read(self, received: _Received, response: http.client.HTTPResponse, resumes: bool) -> None:
        gateway, stream, clock = self.gateway, self._stream, self.gateway.clock
        arrived_at = clock()
        is_first, was_within = True, False
        snapshot_by = float("inf") if resumes else time.monotonic() + SNAPSHOT_TIMEOUT_S
        whole_by = float("inf")  # the event that has begun
        if resumes:
            self._is_followed()
        while True:
            wait_s = SILENCE_S if snapshot_by == float("inf") else min(SILENCE_S, SNAPSHOT_TIMEOUT_S)
            if gateway.live_until > arrived_at:
                wait_s = min(wait_s, gateway.live_until - arrived_at + HUNG_AFTER_S)
            limit = whole_by if stream.is_within else snapshot_by
            received.deadline = min(time.monotonic() + wait_s, limit)
            try:
                piece = response.read1(READ_BYTES)
            except TimeoutError:
                if received.deadline < limit:
                    raise TimeoutError(f"it has been silent for {wait_s:.1f} s, and is taken for hung") from None
                if stream.is_within:
                    raise TimeoutError(f"an event is not whole after {EVENT_TIMEOUT_S:g} s") from None
                raise StreamError(f"no snapshot within {SNAPSHOT_TIMEOUT_S:g} s; is this a state gateway?") from None
            except http.client.IncompleteRead:
                raise OSError("it broke off the stream") from None
            arrived_at = clock()
            if not piece:
                raise OSError("it closed the stream")
            events = stream.feed(piece, arrived_at)
            gateway.arrived_at = arrived_at
            if stream.retry_ms is not None:
                self._retry_ms = stream.retry_ms
            if events or (stream.is_within and not was_within):
                whole_by = time.monotonic() + EVENT_TIMEOUT_S
            was_within = stream.is_within
            if not events:
                continue
            if is_first and events[0][0] not in (_KINDS if resumes else (_SNAPSHOT,)):
                raise StreamError(f"its first event is {events[0][0][:40]!r}, not a snapshot")
            is_first, snapshot_by = False, float("inf")
            if self._take(events, arrived_at):
                self._resumes = bool(stream.last_event_id)
            if not gateway.connected:
                self._is_followed()
            gateway.round_trip_s = self._stamps.round_trip_s
            if self._is_to_be_asked_again(arrived_at):
                self._resumes = self._resumes and len(gateway.view) > 1000
                return

    def _is_to_be_asked_again(self, now: float) -> bool:
        """Whether it answered so slowly that ages are in doubt, and may answer faster now; less and less often."""
        doubt_s = self._stamps.doubt_s
        if doubt_s <= DOUBT_S:
            self._doubted_s = 0.0
            return False
        if doubt_s > self._doubted_s + DOUBT_S:
            self._ask_again_at, self._ask_again_after_s = now, 1.0  # it was better known before
        self._doubted_s = doubt_s
        if now < self._ask_again_at:
            return False
        self._ask_again_at = now + self._ask_again_after_s
        self._ask_again_after_s = min(60.0, 2 * self._ask_again_after_s)
        return True

    def _is_followed(self) -> None:
        self.gateway.problem = ""
        self._table._set_connected(self.gateway, True)
        self._name.say_well(self.gateway.address)

    def _take(self, events: list[tuple[str, str, float]], arrived_at: float) -> bool:
        """Put events into the table; returns whether any could be used.

        Raises StreamError if what follows could not be trusted.
        """
        gateway, stamps, view = self.gateway, self._stamps, self.gateway.view
        count, has_snapshot = len(events), False
        events = [event for event in events if event[0] in _KINDS]  # others are of a newer gateway
        changes: list[_Change] = []
        clock_s = None
        if any(event[0] == _SNAPSHOT for event in events):
            documents = [_parse_snapshot(data) if kind == _SNAPSHOT else _parse_json(data) for kind, data, _ in events]
        else:
            documents = _parse_all_json([event[1] for event in events])
        for (kind, _, began_at), document in zip(events, documents, strict=True):
            if kind == _SNAPSHOT:
                self._table._apply(gateway, changes)
                changes = []
                self._take_snapshot(document, began_at)
                has_snapshot = True
                continue
            try:
                clock_s = (document["received_ms"] + document["state_age_ms"]) / 1000
                before = view.get(document["engine_id"])  # read without the lock: a single look-up
                written_at = stamps.of(began_at, clock_s, before)
                entry = gateway.entry(document, written_at)
            except (LookupError, TypeError, ValueError, OverflowError) as error:
                self._fault(error)
                continue
            changes.append((entry, written_at if kind == _REMOVED else None))
        if clock_s is not None:
            stamps.learn(arrived_at, clock_s)
        self._table._apply(gateway, changes)
        gateway.events += count
        return has_snapshot or bool(changes)

    def _take_snapshot(self, document: Any, began_at: float) -> None:
        try:
            instance, engines = document["instance"], document["engines"]
            stale_ms, clock_s = document["stale_threshold_ms"], document["time_ms"] / 1000
            if not (type(instance) is str and type(engines) is dict and 0 < stale_ms <= MAX_INTEGER):
                raise ValueError("instance, engines or stale_threshold_ms is not what it should be")
        except (LookupError, TypeError, ValueError, OverflowError) as error:
            raise StreamError(f"its snapshot is no state gateway's: {error!r}") from None
        gateway = self.gateway
        written_at = self._stamps.of(began_at, clock_s)
        changes: list[_Change] = []
        for engine_id, fields in engines.items():
            try:
                if fields["engine_id"] != engine_id:
                    raise ValueError("it has another engine_id than its name")
                changes.append((gateway.entry(fields, written_at), None))
            except (LookupError, TypeError, ValueError, OverflowError) as error:
                self._fault(error)
        self._table._begin_anew(gateway, instance, stale_ms / 1000, engines.keys())
        self._table._apply(gateway, changes)

    def _fault(self, error: Exception) -> None:
        self.gateway.faults += 1
        self._name.say(f"an entry cannot be used and is passed over: {error!r}", self.gateway.address)


class _Name:
    """A gateway's URL and who answers there: a name with several addresses is several gateways.

    If it is a name, a thread looks it up again when a connection breaks, and every few seconds.
    """

    def __init__(self, table: EngineTable, url: _Url, context: ssl.SSLContext | None) -> None:
        self.url = url
        self.ssl_context = context or (ssl.create_default_context() if url.secure else None)  # type: ignore[assignment]
        self.problem = ""
        self._table = table
        self._lock = threading.RLock()  # guards the next two; nothing slow happens under it
        self._followers: list[_Follower] = []
        self._addresses: list[str] = []
        self._group = 0  # which family of addresses is tried
        self._stop = threading.Event()
        self._look = threading.Event()
        self._notice_at = float("-inf")
        self._not_said = 0
        self._said = False  # that something is wrong
        self.thread = threading.Thread(target=self._run, name=f"engine-table {url.host}", daemon=True)

    ssl_context: ssl.SSLContext

    def connection(self) -> http.client.HTTPConnection:
        """For the Host header; its socket is connected by the follower."""
        if self.url.secure:
            return http.client.HTTPSConnection(self.url.host, self.url.port, context=self.ssl_context)
        return http.client.HTTPConnection(self.url.host, self.url.port)

    def connect(self, address: str, began: Callable[[socket.socket], None] = lambda sock: None) -> socket.socket:
        """A connection to one of its addresses; `began` gets the socket before it waits. Raises OSError."""
        # Asked with the address, because getaddrinfo alone knows the scope of a link-local one.
        info = socket.getaddrinfo(address, self.url.port, type=socket.SOCK_STREAM, flags=socket.AI_NUMERICHOST)
        sock = socket.socket(info[0][0], socket.SOCK_STREAM)
        try:
            began(sock)
            sock.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, RECEIVE_BUFFER)
            sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
            sock.settimeout(CONNECT_TIMEOUT_S)
            try:
                sock.connect(info[0][4])
                if self.url.secure:
                    sock = self.ssl_context.wrap_socket(sock, server_hostname=self.url.host)
            except TimeoutError:
                raise TimeoutError(f"no connection within {CONNECT_TIMEOUT_S:g} s") from None
            sock.settimeout(ANSWER_TIMEOUT_S)
        except BaseException:
            sock.close()
            raise
        return sock

    def ask(self, connection: http.client.HTTPConnection, path: str, accept: str, last_event_id: str = "") -> None:
        """Send a request."""
        connection.putrequest("GET", self.url.path + path, skip_accept_encoding=True)
        connection.putheader("Accept", accept)
        connection.putheader("Accept-Encoding", "identity")
        connection.putheader("Cache-Control", "no-cache")
        connection.putheader("User-Agent", f"engine_table/{VERSION}")
        token = self._table._token()
        if token:
            connection.putheader("Authorization", f"Bearer {token}")
        if last_event_id:
            connection.putheader("Last-Event-ID", last_event_id.encode())
        connection.endheaders()

    def document(self, path: str) -> Any:
        """A JSON document of the first gateway of this name that is followed, or None."""
        with self._lock:
            addresses = [follower.gateway.address for follower in self._followers if follower.gateway.connected]
        if not addresses:
            return None
        connection = self.connection()
        try:
            connection.sock = self.connect(addresses[0])
            self.ask(connection, path, "application/json")
            response = _Received(connection.sock).answer()
            return _parse_json(response.read(MAX_EVENT_CHARS).decode()) if response.status == 200 else None
        except (OSError, http.client.HTTPException, ValueError, _Refused):
            return None
        finally:
            connection.close()

    def start(self) -> None:
        """Begin to follow."""
        self.thread.start()

    def retry_now(self) -> None:
        """Try again at once if a gateway is not followed."""
        with self._lock:
            followers = list(self._followers)
        for follower in followers:
            follower.retry_now()

    def stop(self) -> list[threading.Thread]:
        """Make every thread end soon; returns them."""
        self._stop.set()
        self._look.set()
        with self._lock:
            followers = list(self._followers)
        for follower in followers:
            follower.stop()
        return [self.thread, *(follower.thread for follower in followers)]

    def abandon(self) -> None:
        """In a forked child: let go of the parent's connections, without a word to the gateway."""
        for follower in self._followers:
            follower.close_socket(shut_down=False)

    def say(self, text: str, address: str = "") -> None:
        """Log what is wrong, one line a minute."""
        if self._stop.is_set():
            return
        with self._lock:
            now = time.monotonic()
            if now - self._notice_at < NOTICE_S:
                self._not_said += 1
                return
            more = f" ({self._not_said} such lines were not shown)" if self._not_said else ""
            self._notice_at, self._not_said, self._said = now, 0, True
        at = f" at {address}" if address not in ("", self.url.host) else ""
        logger.warning("gateway %s%s: %s%s", self.url.text, at, text, more)

    def say_well(self, address: str) -> None:
        """Log that a gateway is followed, where something else was said last."""
        with self._lock:
            said, self._said = self._said, False
        if said:
            at = f" at {address}" if address != self.url.host else ""
            logger.info("gateway %s%s: followed again", self.url.text, at)

    def look_again(self) -> None:
        """Look the name up again soon: a connection broke."""
        self._look.set()

    def wants(self, follower: _Follower) -> bool:
        """Whether the name still has this follower's address."""
        with self._lock:
            return follower.gateway.address in self._addresses

    def _run(self) -> None:
        while not self._stop.is_set():
            self._look.clear()
            try:
                self._follow(self.url.addresses())
                self.problem = ""
            except OSError as error:
                self._could_not_look(error)
            except RuntimeError as error:  # no thread can be started now
                self.problem = f"it cannot be followed: {error}"
                self.say(f"{self.problem}; tried again and again")
            if self._look.wait(LOOKUP_S):
                self._stop.wait(FIRST_RETRY_S)  # for others that break at the same time

    def _could_not_look(self, error: OSError) -> None:
        self.problem = f"its name cannot be looked up: {error}"
        known = ", ".join(self._addresses)
        if not known:
            self._table._set_unknown(self.url.text, self.problem)
        self.say(f"{self.problem}; {f'still at {known}' if known else 'tried again and again'}")

    def _follow(self, groups: list[list[str]]) -> None:
        with self._lock:
            if self._stop.is_set():
                return
            running = [follower for follower in self._followers if follower.thread.is_alive()]
            if running and all(f.failed_to_connect and not f.gateway.connected for f in running):
                self._group += 1  # nobody there by this family of addresses
            self._addresses = groups[self._group % len(groups)]
            known = {follower.gateway.address for follower in running}
            new = [
                _Follower(self._table, self, self._table._gateway(self.url, address))
                for address in self._addresses
                if address not in known
            ]
            self._followers = running + new
        for follower in new:
            follower.thread.start()


# -- the table ---------------------------------------------------------------------------------------------------------


class _Subscription:
    """Ids of engines that changed and are still to be told; its lock guards them."""

    def __init__(self, wake: Callable[[], None], callback: Callable[[frozenset[str]], object] | None = None) -> None:
        self._wake = wake
        self._callback = callback
        self._lock = threading.RLock()
        self._ids: set[str] = set()

    def add(self, engine_ids: Any) -> None:
        with self._lock:
            was_empty = not self._ids
            self._ids.update(engine_ids)
        if was_empty:
            self._wake()

    def take(self) -> frozenset[str]:
        with self._lock:
            taken, self._ids = frozenset(self._ids), set()
        return taken

    def call(self) -> None:
        if self._callback is not None:
            changed = self.take()
            if changed:
                self._callback(changed)


class _Changes:
    """Who waits for changes, or is to be told of them; its condition guards them."""

    def __init__(self) -> None:
        self.condition = threading.Condition(threading.RLock())
        self.version = 0  # of the table
        self.subscriptions: list[_Subscription] = []
        self.is_to_be_told = threading.Event()  # wakes the thread that calls the callbacks

    def tell(self, engine_ids: Container[str] | list[str]) -> None:
        """Something changed: whoever waits is woken."""
        with self.condition:
            self.version += 1
            self.condition.notify_all()
            for subscription in self.subscriptions:
                subscription.add(engine_ids)

    def wait(self, timeout: float | None, after: int | None, is_over: Callable[[], bool]) -> int:
        """Wait until the version is another one than `after`, for `timeout` s at most; returns it."""
        with self.condition:
            seen = self.version if after is None else after
            self.condition.wait_for(lambda: self.version != seen or is_over(), timeout)
            return self.version

    def subscribe(self, subscription: _Subscription) -> Callable[[], None]:
        """Tell it from now on; returns what ends that."""
        with self.condition:
            self.subscriptions.append(subscription)

        def end() -> None:
            with self.condition:
                if subscription in self.subscriptions:
                    self.subscriptions.remove(subscription)

        return end


class _Pool:
    """Engine ids to draw from at random; the table's lock guards changes, a look at `order` needs none."""

    def __init__(self) -> None:
        self.order: list[str] = []
        self.place: dict[str, int] = {}

    def add(self, engine_id: str) -> None:
        self.place[engine_id] = len(self.order)
        self.order.append(engine_id)

    def discard(self, engine_id: str) -> None:
        place = self.place.pop(engine_id, None)
        if place is None:
            return
        last = self.order.pop()
        if last != engine_id:
            self.order[place] = last
            self.place[last] = place


class _Pools:
    """Engines to draw from; the table's lock guards changes."""

    def __init__(self) -> None:
        self.live = _Pool()
        self.known = _Pool()  # those of them whose load is known

    def add(self, engine_id: str, entry: Entry) -> None:
        """Let it be drawn, if it can be; what turns out not to be live is taken out when it is drawn."""
        if entry._available:
            if engine_id not in self.live.place:
                self.live.add(engine_id)
            if entry._load_known and engine_id not in self.known.place:
                self.known.add(engine_id)

    def discard(self, engine_id: str) -> None:
        self.live.discard(engine_id)
        self.known.discard(engine_id)


class EngineTable:
    """What a router knows of every engine, and how old that is; every method may be called from any thread.

    `urls` are gateways' base URLs: http or https, with a base path if a proxy has one. A name that has several
    addresses is several gateways. `token` is what they want as `Authorization: Bearer`, or a function that is asked for
    it at each connection; `ssl_context` is for https. `expire_after_ms` is how long an engine that no gateway is there
    to speak of stays in the table (default: three times the gateway's threshold).

    Raises ValueError if a URL or token cannot be used, and nothing later: that a gateway cannot be followed is
    logged once a minute, it is tried again, and what it told grows old.
    """

    def __init__(
        self,
        *urls: str,
        token: str | Callable[[], str] | None = None,
        ssl_context: ssl.SSLContext | None = None,
        expire_after_ms: float | None = None,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        if not urls:
            raise ValueError("an EngineTable needs the URL of at least one gateway, as in http://gateway.example:9999")
        if token is not None and not callable(token):
            _check_token(token)
        if expire_after_ms is not None and not expire_after_ms > 0:
            raise ValueError(f"expire_after_ms={expire_after_ms!r} is not above 0")
        parsed = list({(url := _Url(text)).text: url for text in urls}.values())
        self._new_names: Callable[[], list[_Name]] = lambda: [_Name(self, url, ssl_context) for url in parsed]
        self._ask_token = token
        self._expire_s = None if expire_after_ms is None else expire_after_ms / 1000
        self._clock = clock
        self._engines: dict[str, Entry] = {}
        self._usual: float | None = None
        self._closed = False
        self._forked = False
        self._gateways: list[_Gateway] = []
        self._unknown: dict[str, str] = {}
        self._gone: dict[str, tuple[float, Entry]] = {}  # when a gateway removed it, and what it knew then
        self._pools = _Pools()
        self._make_locks()
        self._start_threads()
        _tables.add(self)

    def _make_locks(self) -> None:
        # Guards what is known of engines and gateways; nothing slow happens under it. A look at one engine needs none:
        # it is a single look-up in a dictionary, and entries do not change. A thread may take any lock of this file
        # again: a signal's handler asks in the middle of a question of its own thread.
        self._lock = threading.RLock()
        self._changes = _Changes()

    def _start_threads(self) -> None:
        self._names = self._new_names()
        self._keeper = threading.Thread(target=self._keep, name="engine-table keeper", daemon=True)
        for name in self._names:
            name.start()
        self._keeper.start()

    # -- what a router asks

    def get(self, engine_id: str) -> Entry | None:
        """What is known of an engine, or None."""
        self._use()
        return self._engines.get(engine_id)

    def entries(self) -> list[Entry]:
        """Every engine that is known, however old that is."""
        self._use()
        with self._lock:
            return list(self._engines.values())

    def live(self) -> list[Entry]:
        """The engines that were heard from within the gateway's threshold and take requests, load known or not."""
        now = self._clock()
        return [entry for entry in self.entries() if entry._is_live(now)]

    def usable(self) -> list[Entry]:
        """The live engines whose load is known.

        It leaves out engines of which heartbeats only are heard: idle engines of the first agent (a fork of vLLM) are
        such. A router that has those uses live() or choose(), which take unknown for usual.
        """
        now = self._clock()
        return [entry for entry in self.entries() if entry._load_known and entry._is_live(now)]

    def choose(
        self,
        *,
        usable: bool = False,
        exclude: Container[str] = (),
        where: Callable[[Entry], bool] | None = None,
    ) -> Entry | None:
        """The engine for the next request: of two live ones at random the one with fewer seconds of work, or None.

        One whose load or capacity is not known counts as loaded as the usual one, never as idle; `usable` leaves those
        without a known load out. `exclude` has the ids of engines that were tried already; `where` says of an entry
        whether it may be taken. Two at random: the least loaded one of all would get what all routers have at once.
        """
        self._use()
        now, pool = self._clock(), self._pools.known if usable else self._pools.live
        first: Entry | None = None
        tries = 0
        while tries < 16:
            entry = self._draw(pool, now, usable)
            if entry is None:
                return None
            tries += 1
            if where is not None and not where(entry):
                continue
            engine_id = entry._fields["engine_id"]
            if engine_id in exclude:
                continue
            if first is None:
                first = entry
                if len(pool.order) == 1:
                    return first
            elif engine_id != first._fields["engine_id"]:
                return self._better(first, entry)
        # Few may be taken: look at them all.
        those = [
            entry
            for entry in (self.usable() if usable else self.live())
            if entry._fields["engine_id"] not in exclude and (where is None or where(entry))
        ]
        return self._better(*random.sample(those, 2)) if len(those) > 1 else those[0] if those else None

    def _draw(self, pool: _Pool, now: float, usable: bool) -> Entry | None:
        """A live engine at random; one that turns out not to be is taken out of the pool until it is heard from."""
        engines, order = self._engines, pool.order
        while order:
            try:
                engine_id = order[int(random.random() * len(order))]
            except IndexError:
                continue  # it became shorter between the two
            entry = engines.get(engine_id)
            if entry is not None and entry._is_live(now) and (entry._load_known or not usable):
                return entry
            with self._lock:
                if engines.get(engine_id) is entry:
                    pool.discard(engine_id)
        return None

    def _better(self, one: Entry, other: Entry) -> Entry:
        work, other_work = one.seconds_of_work, other.seconds_of_work
        if work is None or other_work is None:
            usual = self._usual if self._usual is not None else self._look_for_usual()
            work = usual if work is None else work
            other_work = usual if other_work is None else other_work
        return other if other_work < work else one

    def _look_for_usual(self) -> float:
        """The median of the seconds of work that are known, of some of the live engines."""
        now = self._clock()
        with self._lock:
            order = self._pools.live.order
            some = random.sample(order, USUAL_OF) if len(order) > USUAL_OF else list(order)
        entries = [entry for entry in map(self._engines.get, some) if entry is not None and entry._is_live(now)]
        known = [work for work in (entry.seconds_of_work for entry in entries) if work is not None]
        usual = statistics.median(known) if known else 0.0
        self._usual = usual if entries else None  # of nobody nothing is usual: the first ones are looked at at once
        return usual

    def __iter__(self) -> Iterator[Entry]:
        return iter(self.entries())

    def __len__(self) -> int:
        self._use()
        return len(self._engines)

    def __contains__(self, engine_id: object) -> bool:
        self._use()
        return engine_id in self._engines

    def fleet(self) -> dict[str, Any]:
        """How many engines are live, stale, unavailable and usable, and sums over the usable ones, as /engines has it.

        Unknown values (-1, capacity 0) are left out of the sums; `engines` is the number behind each. Modes and phases
        are of those that are not stale; no phase counts as serving.
        """
        now = self._clock()
        counts = {LIVE: 0, UNAVAILABLE: 0, STALE: 0, "usable": 0}
        sums = {field: {"sum": 0, "engines": 0} for field in SUMMED}
        modes: dict[str, int] = {}
        phases: dict[str, int] = {}
        for entry in self.entries():
            fields = entry._fields
            if now - entry._heard_at > entry._gateway.stale_s:
                counts[STALE] += 1
                continue
            counts[LIVE if entry._available else UNAVAILABLE] += 1
            phase = fields.get("phase") or "serving"
            phases[phase] = phases.get(phase, 0) + 1
            modes[fields["scheduling_mode"]] = modes.get(fields["scheduling_mode"], 0) + 1
            if not (entry._available and entry._load_known):
                continue
            counts["usable"] += 1
            for field, total in sums.items():
                if fields[field] > 0 or (fields[field] == 0 and field != "engine_capacity"):
                    total["sum"] += fields[field]
                    total["engines"] += 1
        return {**counts, "sums": sums, "scheduling_modes": modes, "phases": phases}

    def gateways(self) -> list[GatewayStatus]:
        """How each gateway address is doing, also those whose name could not be looked up."""
        self._use()
        with self._lock:
            unknown = [
                GatewayStatus(url, "", False, problem, "", 0, 0, 0, 0.0) for url, problem in self._unknown.items()
            ]
            return [gateway.status() for gateway in self._gateways] + unknown

    # -- being told of changes

    def wait(self, timeout: float | None = None, after: int | None = None) -> int:
        """Wait until something changed after that version (default: now), or the timeout (s); returns the version.

        `version = table.wait(1.0, version)` in a loop misses nothing.
        """
        self._use()
        return self._changes.wait(timeout, after, lambda: self._closed)

    def wait_until_known(self, timeout: float | None = None) -> bool:
        """Wait until a gateway has told which engines there are; returns whether one has, within the timeout (s)."""
        deadline = None if timeout is None else time.monotonic() + timeout
        version = 0
        while not any(gateway.known for gateway in self._gateways):
            left = None if deadline is None else deadline - time.monotonic()
            if self._closed or (left is not None and left <= 0):
                return False
            version = self.wait(left, version)
        return True

    def on_change(self, callback: Callable[[frozenset[str]], object]) -> Callable[[], None]:
        """Have `callback` called with the ids of engines that changed, came, went or grew stale.

        Returns a function that ends it. It is called in a thread of the table's, one call at a time; what changes
        meanwhile is in the next call. What it raises is logged. A slow one holds up nobody but the other callbacks. A
        forked child calls those only that it asked for itself.
        """
        self._use()
        return self._changes.subscribe(_Subscription(self._changes.is_to_be_told.set, callback))

    async def changes(self) -> AsyncIterator[frozenset[str]]:
        """For asyncio: first all ids that are known, then those of engines that changed, came, went or grew stale.

        No thread waits meanwhile. It ends when the table is closed. What changes between two looks comes in one.
        """
        import asyncio  # here, because it takes longer to import than all else

        loop, happened = asyncio.get_running_loop(), asyncio.Event()

        def wake() -> None:
            with contextlib.suppress(RuntimeError):  # the loop is closed, and nobody waits any more
                loop.call_soon_threadsafe(happened.set)

        subscription = _Subscription(wake)
        self._use()
        end = self._changes.subscribe(subscription)
        subscription.add([entry.engine_id for entry in self.entries()])
        try:
            while not self._closed:
                await happened.wait()
                happened.clear()
                changed = subscription.take()
                if changed:
                    yield changed
        finally:
            end()

    def retry_now(self) -> None:
        """Try at once to follow the gateways that are not followed, for callers that know one to be there again."""
        self._use()
        for name in self._names:
            name.retry_now()

    # -- the end

    def close(self) -> None:
        """End every thread; what is known stays, and grows old. Twice is harmless."""
        self._closed = True
        self._use()
        threads = [thread for name in self._names for thread in name.stop()]
        self._changes.tell(())
        self._changes.is_to_be_told.set()
        for thread in (*threads, self._keeper):
            if thread is not threading.current_thread() and thread.is_alive():
                thread.join(1.0)

    def __enter__(self) -> EngineTable:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _use(self) -> None:
        """Of every question: a forked child's first one begins anew there."""
        if self._forked:
            self._begin_in_child()

    def _begin_in_child(self) -> None:
        """Locks and threads of the child's own; what the parent knew stays, and grows old."""
        with _fork_lock:
            if not self._forked:
                return
            for gateway in self._gateways:
                gateway.connected = False
            self._pools = _Pools()  # the parent's may have been copied in the middle of a change
            for engine_id, entry in self._engines.items():
                self._pools.add(engine_id, entry)
            self._make_locks()
            if self._closed:
                self._names = []  # they have locks that a thread of the parent may have held
            else:
                self._start_threads()
            self._forked = False

    # -- what the threads do

    def _token(self) -> str:
        if not callable(self._ask_token):
            return self._ask_token or ""
        try:
            token = self._ask_token()
        except BaseException as error:
            raise _Refused(f"the function that is asked for the token raised {error!r}") from error
        if not token:
            return ""
        try:
            _check_token(token)
        except ValueError as error:
            raise _Refused(str(error)) from None
        return token

    def _gateway(self, url: _Url, address: str) -> _Gateway:
        """The gateway at an address, as known or new."""
        with self._lock:
            self._unknown.pop(url.text, None)
            for gateway in self._gateways:
                if (gateway.url, gateway.address) == (url.text, address):
                    return gateway
            gateway = _Gateway(url, address, self._clock)
            self._gateways = [*self._gateways, gateway]
            return gateway

    def _set_unknown(self, url: str, problem: str) -> None:
        with self._lock:
            self._unknown[url] = problem

    def _set_connected(self, gateway: _Gateway, connected: bool) -> None:
        with self._lock:
            gateway.connected = connected
            gateway.followed = True
            gateway.known |= connected
        if connected:
            self._changes.tell(())
        else:
            gateway.live_until = float("-inf")

    def _begin_anew(self, gateway: _Gateway, instance: str, stale_s: float, engine_ids: Container[str]) -> None:
        """A gateway told all that it knows: what it does not know any more is gone, unless it has just been started."""
        changed = []
        with self._lock:
            missing = [engine_id for engine_id in gateway.view if engine_id not in engine_ids]
            gateway.stale_s = stale_s
            if gateway.instance and gateway.instance != instance:
                gateway.carried.update(missing)
            else:
                for engine_id in missing:
                    if engine_id not in gateway.carried:
                        del gateway.view[engine_id]
                        self._merge(engine_id)
                        changed.append(engine_id)
            gateway.instance = instance
        self._changes.tell(changed)

    def _apply(self, gateway: _Gateway, changes: list[_Change]) -> None:
        """Take entries from a gateway."""
        for start in range(0, len(changes), 256):
            self._apply_some(gateway, changes[start : start + 256])
        if changes:
            if any(gone_at is not None for _, gone_at in changes):
                heard_at = max((entry._heard_at for entry in list(gateway.view.values())), default=float("-inf"))
                gateway.live_until = heard_at + gateway.stale_s
            self._changes.tell([entry._fields["engine_id"] for entry, _ in changes])

    def _apply_some(self, gateway: _Gateway, changes: list[_Change]) -> None:
        engines, view, carried = self._engines, gateway.view, gateway.carried
        live, known = self._pools.live, self._pools.known
        newest = gateway.live_until - gateway.stale_s
        with self._lock:
            alone = len(self._gateways) == 1
            for entry, gone_at in changes:
                engine_id = entry._fields["engine_id"]
                if carried:
                    carried.discard(engine_id)
                if gone_at is not None:
                    view.pop(engine_id, None)
                    if not alone:
                        self._gone[engine_id] = gone_at, entry
                    self._merge(engine_id)
                    continue
                if len(view) >= MAX_ENGINES and engine_id not in view:
                    continue
                view[engine_id] = entry
                if entry._heard_at > newest:
                    newest = entry._heard_at
                if not alone:
                    self._merge(engine_id)
                    continue
                engines[engine_id] = entry
                if engine_id not in live.place or engine_id not in known.place:
                    self._pools.add(engine_id, entry)
            gateway.live_until = newest + gateway.stale_s

    def _merge(self, engine_id: str) -> None:
        """Put together what all gateways told of an engine; under the lock."""
        told = [entry for gateway in self._gateways if (entry := gateway.view.get(engine_id)) is not None]
        past = []
        if engine_id in self._gone:
            gone_at, last = self._gone[engine_id]
            if any(entry._gateway is last._gateway for entry in told):
                del self._gone[engine_id]  # that gateway knows it again
            else:
                past.append(last)
                if gone_at - last._heard_at <= last._gateway.stale_s:
                    # A farewell, for nobody is removed so soon otherwise: what was said before it does not count.
                    told = [entry for entry in told if entry._heard_at > gone_at + FAREWELL_S]
        if not told:
            if self._engines.pop(engine_id, None) is not None:
                self._pools.discard(engine_id)
            return
        best = told[0] if len(told) + len(past) == 1 else self._freshest(told, past)
        self._engines[engine_id] = best
        self._pools.add(engine_id, best)

    def _freshest(self, told: list[Entry], past: list[Entry]) -> Entry:
        """Of what several gateways told of one engine, what counts; `past` is what one knew that has removed it."""
        now = self._clock()
        witnesses = told + past
        bounded = [self._bounded(entry, witnesses, now) for entry in told]
        best = max(bounded, key=lambda entry: entry._heard_at)
        if best._load_known or not best._available:
            return best
        loads = [
            entry
            for entry in bounded
            if entry._load_known and entry._available and now - entry._shown_at <= entry._gateway.stale_s
        ]
        if not loads:
            return best
        load = max(loads, key=lambda entry: entry._shown_at)
        return Entry(load._fields, load._gateway, best._heard_at, load._shown_at, True, True)

    @staticmethod
    def _bounded(entry: Entry, witnesses: list[Entry], now: float) -> Entry:
        """An entry, no younger than what another gateway knows of the same state allows, but for a round trip.

        It is older than a state that the engine said later, which one gateway knows while another takes what waited.
        """
        shown_at = entry._shown_at
        for other in witnesses:
            limit = other._shown_at + min(entry._gateway.round_trip_s, CONFIDENCE_S)
            if limit < shown_at and (
                now - other._gateway.arrived_at <= REACHABLE_S
                and other._fields["timestamp_ms"] == entry._fields["timestamp_ms"]
                and _state_of(other._fields) == _state_of(entry._fields)
            ):
                shown_at = limit
            elif other._shown_at <= entry._shown_at:
                # By the engine's clock the other state is newer. If that clock was set back, the other gateway will
                # hear of it with the next state; if it hears nothing any more, it says nothing of what is said now.
                ahead_s = (other._fields["timestamp_ms"] - entry._fields["timestamp_ms"]) / 1000
                if ahead_s > 0.0 and now - other._heard_at <= other._gateway.stale_s:
                    shown_at = min(shown_at, other._shown_at - ahead_s)
        if shown_at == entry._shown_at:
            return entry
        is_sign = abs(entry._heard_at - entry._shown_at) <= SAME_SIGN_S  # it was heard from by this very state
        heard_at = shown_at if is_sign else entry._heard_at
        return Entry(entry._fields, entry._gateway, heard_at, shown_at, entry._available, entry._load_known)

    def _keep(self) -> None:
        """Look for what grew old, and call the callbacks, until the table is closed."""
        notice_at = float("-inf")
        changes, last = self._changes, float("-inf")  # this thread may begin late, when something is old already
        while not self._closed:
            if changes.is_to_be_told.wait(KEEPER_S):
                changes.is_to_be_told.clear()
            now = self._clock()
            if now - last >= KEEPER_S:
                self._look_for_old(last, now)
                self._look_for_usual()
                last = now
            for subscription in list(changes.subscriptions):
                try:
                    subscription.call()
                except BaseException:  # nor does it end this thread, which makes engines grow old, with sys.exit()
                    if time.monotonic() - notice_at >= NOTICE_S:
                        notice_at = time.monotonic()
                        logger.exception("a callback that on_change() was given raised")

    def _look_for_old(self, last: float, now: float) -> None:
        """Remove what no gateway is there to speak of and is too old; tell who grew stale since the last look."""
        changed = [
            entry._fields["engine_id"]
            for entry in self.entries()
            if last - entry._heard_at <= entry._gateway.stale_s < now - entry._heard_at
        ]
        for gateway in self._gateways:
            expire_s = 3 * gateway.stale_s if self._expire_s is None else self._expire_s
            with self._lock:
                doubtful = gateway.carried if gateway.connected else gateway.view
                old = [
                    engine_id
                    for engine_id in doubtful
                    if (entry := gateway.view.get(engine_id)) is None or now - entry._heard_at > expire_s
                ]
                for engine_id in old:
                    gateway.view.pop(engine_id, None)
                    gateway.carried.discard(engine_id)
                    self._merge(engine_id)
                if not (gateway.followed or gateway.view):
                    self._gateways = [other for other in self._gateways if other is not gateway]
            changed.extend(old)
        if self._gone:
            with self._lock:
                for engine_id, (gone_at, _) in list(self._gone.items()):
                    if now - gone_at > GONE_S:
                        del self._gone[engine_id]
        if changed:
            self._changes.tell(changed)


def _check_token(token: object) -> None:
    """Raise ValueError for what cannot be sent as a token; the token is not shown."""
    if not isinstance(token, str):
        raise ValueError(f"the token is a string, and not of type {type(token).__name__}")
    if not (token and token.isascii() and token.isprintable() and " " not in token):
        raise ValueError("the token has characters that none has: it is printable ASCII without spaces")


_fork_lock = threading.Lock()
_tables: weakref.WeakSet[EngineTable] = weakref.WeakSet()


def _after_fork() -> None:
    global _fork_lock
    _fork_lock = threading.Lock()
    for table in _tables:
        table._forked = True
        for name in table._names:
            name.abandon()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_after_fork)


# -- the program -------------------------------------------------------------------------------------------------------

USUAL_WIDTH, USUAL_HEIGHT = 80, 24
LEAST_ENGINE_WIDTH = 16
WRONG_S = 60.0  # for how long what a gateway lost is shown
KEYS_HELP = {
    "q, Ctrl-C": "quit",
    "< >, left, right": "sort by the column before or after",
    "r": "reverse the order",
    "/": "filter by words in id, status, phase, mode and extra; Enter keeps it, Esc ends it",
    "up, down, PgUp, PgDn, Home, End": "select an engine",
    "Enter": "all that is known of it, and back",
    "p": "pause",
    "h": "this help, and back",
}

Styled = tuple[str, str]  # a text and its style: "", bold, reverse, dim, green, yellow, red


def _printable(text: str) -> str:
    """A stranger's text as it can do no harm to a terminal."""
    return "".join(character if character.isprintable() else "?" for character in text)


def _cell_width(text: str) -> int:
    """The columns that a text takes in a terminal."""
    if text.isascii():
        return len(text)
    wide = sum(unicodedata.east_asian_width(character) in "WF" for character in text)
    return len(text) + wide - sum(unicodedata.combining(character) != 0 for character in text)


def _fit(text: str, width: int, *, right: bool = False) -> str:
    """A text in exactly so many columns; of what is too long the end is shown, where engines differ."""
    taken = _cell_width(text)
    if taken > width:
        while _cell_width(text) > width - 1:
            text = text[1:]
        text = "~" + text
        taken = _cell_width(text)
    return " " * (width - taken) + text if right else text + " " * (width - taken)


def _age(ms: int) -> str:
    if ms < 10_000:
        return f"{ms}ms"
    seconds = ms // 1000
    for unit, size in (("s", 1), ("m", 60), ("h", 3600)):
        if seconds < 600 * size or unit == "h":
            return f"{seconds // size}{unit}"
    return ""


def _number(value: float) -> str:
    """A number in six columns at most."""
    if value < 10_000:
        return f"{value:.0f}" if value >= 100 or value == int(value) else f"{value:.1f}"
    for unit, size in (("k", 1e3), ("M", 1e6), ("G", 1e9), ("T", 1e12), ("P", 1e15)):
        if value < 1000 * size:
            return f"{value / size:.1f}{unit}"
    return "many"


def _kv_used(entry: Entry) -> float | None:
    """The part of the KV cache that is in use, 0 to 1; None if it is not known."""
    total, free = entry.kv_cache_total_blocks, entry.kv_cache_free_blocks
    return None if total <= 0 or free < 0 else max(0.0, 1 - free / total)


def _load(entry: Entry, value: float | None) -> float | None:
    return value if entry.load_known else None


def _extra(name: str) -> Callable[[Entry], Any]:
    return lambda entry: entry.extra.get(name)


@dataclass(frozen=True)
class _Column:
    title: str
    width: int
    value: Callable[[Entry], Any]  # what it is sorted by; None = not known, at the end whatever the direction
    text: Callable[[Any], str] = str
    right: bool = True
    descends: bool = True  # when it is chosen


# From the left; those that do not fit are left out from the right.
_COLUMNS = (
    _Column("ENGINE", LEAST_ENGINE_WIDTH, lambda e: e.engine_id, _printable, right=False, descends=False),
    _Column("STATUS", 7, lambda e: e.status, lambda status: status[:7], right=False),
    _Column("AGE", 6, lambda e: e.age_ms, _age),
    _Column(
        "WORK", 7, lambda e: e.seconds_of_work, lambda work: f"{work:.2f}s" if work < 1000 else _number(work) + "s"
    ),
    _Column("PENDING", 8, lambda e: _load(e, e.pending_tokens_total), _number),
    _Column("KV", 4, lambda e: _load(e, _kv_used(e)), lambda used: f"{100 * used:.0f}%"),
    _Column("LATENCY", 8, lambda e: _load(e, e.latency_pred_ms), lambda ms: _number(ms) + "ms"),
    _Column("TOK/S", 6, lambda e: _load(e, e.engine_capacity or None), _number),
    _Column("LOAD AGE", 9, lambda e: e.state_age_ms, _age),
    _Column("PHASE", 9, lambda e: e.phase, _printable, right=False, descends=False),
    _Column("RUN", 5, _extra("num_requests_running"), str),
    _Column("WAIT", 5, _extra("num_requests_waiting"), str),
    _Column("LOST", 6, lambda e: e.lost, _number),
    _Column("RESTARTS", 9, lambda e: e.restarts, _number),
    _Column("MODEL", 20, _extra("model"), lambda model: _printable(str(model)), right=False, descends=False),
    _Column("MODE", 20, lambda e: e.scheduling_mode if e.load_known else None, _printable, right=False),
)
_FIRST_SORT = 3
_STATUS_STYLES = {LIVE: "", STALE: "yellow", UNAVAILABLE: "dim"}


def _columns_that_fit(width: int) -> tuple[_Column, ...]:
    count, taken = 1, _COLUMNS[0].width
    for column in _COLUMNS[1:]:
        # The engine's id has 22 columns before a ninth column is shown, and 40 before a twelfth.
        spare = 6 if count >= 8 else 0
        if taken + 1 + column.width + spare > width:
            break
        taken += 1 + column.width
        count += 1
    return _COLUMNS[:count]


# Counters of /stats that say of a loss, and the words for them.
_LOSSES = {
    "kernel_dropped": "datagrams dropped by the kernel",
    "invalid_states": "invalid",
    "rejected_signature": "rejected: signature",
    "rejected_source": "rejected: source",
    "rejected_capacity": "rejected: capacity",
    "log.dropped": "log lines dropped",
    "log.errors": "log errors",
}


class _Gauge:
    """What gateways say of themselves at /stats, asked every two seconds in a thread of its own."""

    INTERVAL_S = 2.0

    def __init__(self, table: EngineTable) -> None:
        self._table = table
        self._lock = threading.Lock()  # guards the samples
        self._samples: dict[str, list[tuple[float, dict[str, Any]]]] = {}
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._run, name="engine-table stats", daemon=True)
        self._thread.start()

    def _run(self) -> None:
        interval_s = self.INTERVAL_S / 8  # the first rate is shown soon
        while not self._stop.is_set():
            for name in self._table._names:
                stats = name.document("/stats")
                if isinstance(stats, dict):
                    self.add(name.url.text, time.monotonic(), stats)
            self._stop.wait(interval_s)
            interval_s = min(self.INTERVAL_S, 2 * interval_s)

    def add(self, url: str, now: float, stats: dict[str, Any]) -> None:
        """Take what a gateway said; another instance begins anew."""
        with self._lock:
            samples = self._samples.setdefault(url, [])
            if samples and samples[-1][1].get("instance") != stats.get("instance"):
                samples.clear()
            samples.append((now, stats))
            while len(samples) > 2 and now - samples[1][0] > WRONG_S:
                del samples[0]

    def stop(self) -> None:
        self._stop.set()

    @property
    def has_answers(self) -> bool:
        """Whether a gateway has told its counters."""
        with self._lock:
            return bool(self._samples)

    @staticmethod
    def _count(stats: dict[str, Any], name: str) -> float:
        value: Any = stats
        for part in name.split("."):
            value = value.get(part) if isinstance(value, dict) else None
        return value if isinstance(value, (int, float)) else 0

    def states_per_second(self) -> float | None:
        """Of the gateway that takes the most, over some seconds; None if none says."""
        rates = []
        with self._lock:
            for samples in self._samples.values():
                (now, last), (before, first) = samples[-1], samples[max(0, len(samples) - 4)]
                if now > before and time.monotonic() - now < 3 * self.INTERVAL_S:
                    count = self._count(last, "valid_states") - self._count(first, "valid_states")
                    rates.append(max(0.0, count / (now - before)))
        return max(rates, default=None)

    def wrong(self) -> list[str]:
        """What was lost within the last minute, or is wrong now."""
        found = []
        with self._lock:
            for url, samples in self._samples.items():
                first, last = samples[0][1], samples[-1][1]
                at = f"{url}: " if len(self._samples) > 1 else ""
                for name, words in _LOSSES.items():
                    lost = self._count(last, name) - self._count(first, name)
                    if lost > 0:
                        found.append(f"{at}{_number(lost)} {words} within a minute")
                conflicting = self._count(last, "conflicting_ids")
                if conflicting:
                    found.append(f"{at}{_number(conflicting)} ids with several senders")
        return found


class _View:
    """What is shown, and what keys do to it; knows nothing of terminals."""

    def __init__(self, table: EngineTable, gauge: _Gauge | None, sort: int = _FIRST_SORT, words: str = "") -> None:
        self._table = table
        self._gauge = gauge
        self.sort = sort
        self.descends = _COLUMNS[sort].descends
        self.filter = words
        self.selected = ""  # an engine's id
        self.is_typing = self.shows_details = self.shows_help = self.is_over = self.is_paused = False
        self._first = 0  # row shown
        self._page = 1  # rows that fit
        self._columns = len(_COLUMNS)
        self._entries: list[Entry] = []

    # -- keys

    def press(self, key: str) -> None:
        """A key: one character, or the name of another."""
        if self.is_typing:
            self._type(key)
        elif key in ("q", "Q"):
            self.is_over = True
        elif self.shows_help:
            self.shows_help = False
        elif key in ("h", "?"):
            self.shows_help = True
        elif key == "enter":
            self.shows_details = not self.shows_details and bool(self.selected)
        elif key == "escape":
            if self.shows_details:
                self.shows_details = False
            else:
                self.filter = ""
        elif key in ("<", "left", ">", "right"):
            self.sort = (self.sort + (1 if key in (">", "right") else -1)) % self._columns
            self.descends = _COLUMNS[self.sort].descends
        elif key == "r":
            self.descends = not self.descends
        elif key == "p":
            self.is_paused = not self.is_paused
        elif key == "/":
            self.is_typing, self.shows_details = True, False
        else:
            self._select(key)

    def _type(self, key: str) -> None:
        if key == "enter":
            self.is_typing = False
        elif key == "escape":
            self.is_typing, self.filter = False, ""
        elif key == "backspace":
            self.filter = self.filter[:-1]
        elif len(key) == 1 and key.isprintable():
            self.filter += key

    def _select(self, key: str) -> None:
        steps = {"up": -1, "k": -1, "down": 1, "j": 1, "page up": -self._page, "page down": self._page, " ": self._page}
        ids = [entry.engine_id for entry in self._entries]
        if not ids:
            return
        if key in ("home", "g", "end", "G"):
            place = 0 if key in ("home", "g") else len(ids) - 1
        elif key not in steps:
            return
        elif self.selected in ids:
            place = min(max(ids.index(self.selected) + steps[key], 0), len(ids) - 1)
        else:
            place = self._first if steps[key] > 0 else 0
        self.selected = ids[place]

    # -- what is shown

    def lines(self, width: int, height: int) -> list[list[Styled]]:
        """As many lines as there is room for; each is texts with their styles, in `width` columns at most."""
        if not self.is_paused or not self._entries:
            self._entries = self._sorted(self._table.entries())
        head = self.head(width)
        if self.shows_help:
            longest = max(map(len, KEYS_HELP))
            body = [_cut([(keys.ljust(longest) + "  ", "bold"), (does, "")], width) for keys, does in KEYS_HELP.items()]
        elif self.shows_details and (entry := self._table.get(self.selected)) is not None:
            body = self.details(entry, width)
        else:
            self.shows_details = False
            body = self._rows(width, max(1, height - len(head) - 1))
        room = max(0, height - len(head) - 1)
        lines = [*head, *body[:room], *([] for _ in range(room - len(body)))][: height - 1]
        return [*lines, [self._foot(width)]]

    def _sorted(self, entries: list[Entry]) -> list[Entry]:
        words = self.filter.casefold().split()
        if words:
            entries = [entry for entry in entries if all(word in self._text_of(entry) for word in words)]
        column = _COLUMNS[self.sort]
        entries.sort(key=lambda entry: entry.engine_id)
        known, unknown = [], []
        for entry in entries:
            value = column.value(entry)
            if value is None or isinstance(value, (dict, list)):
                unknown.append(entry)
            else:
                known.append((str(value) if column.right is False or isinstance(value, str) else value, entry))
        with contextlib.suppress(TypeError):  # what agents send under one name may be of several types
            known.sort(key=lambda pair: pair[0], reverse=self.descends)
        return [entry for _, entry in known] + unknown

    @staticmethod
    def _text_of(entry: Entry) -> str:
        extra = " ".join(map(str, entry.extra.values()))
        return f"{entry.engine_id} {entry.status} {entry.phase} {entry.scheduling_mode} {extra}".casefold()

    def head(self, width: int) -> list[list[Styled]]:
        """The fleet in a line, the gateways in another, and what is wrong."""
        fleet = self._table.fleet()
        sums = fleet["sums"]
        free, total = sums["kv_cache_free_blocks"], sums["kv_cache_total_blocks"]
        kv = f"{100 * (1 - free['sum'] / total['sum']):.0f}%" if total["sum"] > 0 and free["engines"] else "-"
        rate = self._gauge.states_per_second() if self._gauge else None
        texts: list[Styled] = [(f"{fleet[LIVE]} live, {fleet['usable']} usable", "bold")]
        texts += [(f", {fleet[name]} {name}", _STATUS_STYLES[name]) for name in (STALE, UNAVAILABLE) if fleet[name]]
        texts.append((f"  pending {_number(sums['pending_tokens_total']['sum'])}  KV {kv}", ""))
        if rate is not None:
            texts.append((f"  {rate:,.0f} states/s", ""))
        gateways = self._table.gateways()
        names = ", ".join(f"{one.url}{'' if one.connected else ' (not followed)'}" for one in gateways)
        lines = [_cut(texts, width), _cut([(names, "" if any(g.connected for g in gateways) else "red")], width)]
        wrong = self.wrong(gateways, fleet)
        if wrong:
            return [*lines, _cut([("! " + "; ".join(wrong), "red")], width)]
        is_known = self._gauge is not None and self._gauge.has_answers  # else a loss would not have been heard of
        return [*lines, _cut([("nothing is wrong", "dim")] if is_known else [], width)]

    def wrong(self, gateways: list[GatewayStatus], fleet: dict[str, Any]) -> list[str]:
        """What an operator should know."""
        found = [f"{one.url} {one.address}: {_printable(one.problem)}" for one in gateways if one.problem]
        if not fleet[LIVE] and fleet[STALE] + fleet[UNAVAILABLE]:
            found.append("no engine is live")
        if self._gauge:
            found += self._gauge.wrong()
        else:
            conflicting = sum(entry.conflict for entry in self._table.entries())
            if conflicting:
                found.append(f"{_number(conflicting)} ids with several senders")
        return found

    def _rows(self, width: int, room: int) -> list[list[Styled]]:
        columns = _columns_that_fit(width)
        self._columns, self._page = len(columns), max(1, room - 1)
        ids = [entry.engine_id for entry in self._entries]
        if self.selected in ids:
            place = ids.index(self.selected)
            self._first = min(max(self._first, place - self._page + 1), place)
        self._first = max(0, min(self._first, len(ids) - self._page))
        shown = self._entries[self._first : self._first + self._page]
        lines: list[list[Styled]] = [[(self._titles(columns, width), "reverse")]]
        for entry in shown:
            style = "reverse" if entry.engine_id == self.selected else _STATUS_STYLES[entry.status]
            lines.append([(row(entry, columns, width), style)])
        if not shown:
            lines.append([("no engine" + (" matches" if self.filter else " is known"), "dim")])
        return lines

    def _titles(self, columns: tuple[_Column, ...], width: int) -> str:
        titles = []
        for number, column in enumerate(columns):
            title = column.title + (("v" if self.descends else "^") if number == self.sort else "")
            titles.append(_fit(title, _width_of(columns, number, width), right=column.right))
        return " ".join(titles)

    def details(self, entry: Entry, width: int) -> list[list[Styled]]:
        """Everything that is known of one engine."""
        fields = entry.as_dict()
        fields["extra"] = None
        known = {name: value for name, value in fields.items() if value is not None}
        known["gateway"] = entry.gateway
        work, used = entry.seconds_of_work, _kv_used(entry)
        known["seconds_of_work"] = "not known" if work is None else f"{work:.3f}"
        known["kv_cache_in_use"] = "not known" if used is None or not entry.load_known else f"{100 * used:.1f} %"
        known.update({f"extra.{name}": value for name, value in entry.extra.items()})
        longest = max(map(len, known))
        lines: list[list[Styled]] = [[(_fit(_printable(entry.engine_id), width), "reverse")]]
        for name, value in known.items():
            text = json.dumps(value, ensure_ascii=False) if isinstance(value, bool) else str(value)
            lines.append(_cut([(_printable(name).ljust(longest) + "  ", "dim"), (_printable(text), "")], width))
        return lines

    def _foot(self, width: int) -> Styled:
        if self.is_typing:
            return _cut([(f"filter: {self.filter}_", "bold")], width)[0]
        text = "q quit  <> sort  r reverse  / filter  arrows select  Enter details  h help"
        if self.is_paused:
            text = "PAUSED (p)  " + text
        if self.filter:
            text = f"filter: {_printable(self.filter)} (Esc)  " + text
        return _cut([(text, "dim")], width)[0]


def _cut(texts: list[Styled], width: int) -> list[Styled]:
    """Texts in so many columns at most."""
    kept = []
    for text, style in texts:
        if _cell_width(text) > width:
            while _cell_width(text) > width - 1:
                text = text[:-1]  # noqa: PLW2901
            kept.append((text + ("~" if width else ""), style))
            break
        kept.append((text, style))
        width -= _cell_width(text)
    return kept


def _width_of(columns: tuple[_Column, ...], number: int, width: int) -> int:
    """The width of a column; the engine's id has what the others leave."""
    if number:
        return columns[number].width
    return max(LEAST_ENGINE_WIDTH, width - sum(column.width + 1 for column in columns[1:]))


def row(entry: Entry, columns: tuple[_Column, ...], width: int) -> str:
    """An engine in a line."""
    cells = []
    for number, column in enumerate(columns):
        value = column.value(entry)
        text = "-" if value is None else column.text(value)
        cells.append(_fit(text, _width_of(columns, number, width), right=column.right))
    return " ".join(cells)


_STYLES = {"bold": "1", "dim": "2", "reverse": "7", "green": "32", "yellow": "33", "red": "31"}
_KEYS = {
    "[A": "up", "[B": "down", "[C": "right", "[D": "left", "OA": "up", "OB": "down", "OC": "right", "OD": "left",
    "[5~": "page up", "[6~": "page down", "[H": "home", "[F": "end", "[1~": "home", "[4~": "end", "OH": "home",
    "OF": "end",
}  # fmt: skip
_NAMED = {"\r": "enter", "\n": "enter", "\x7f": "backspace", "\x08": "backspace"}
_WITHOUT_COLOUR = ("vt", "xterm-mono", "linux-m")
_KEY = re.compile(r"\x1b(\[[0-9;]*[A-Za-z~]|O[A-Za-z])")


class _Terminal:
    """A terminal in full-screen mode, left as it was however this ends; plain ANSI: curses is not everywhere."""

    def __init__(self, colour: bool) -> None:
        self._colour = colour
        self._before: Any = None
        self._shown: list[str] = []
        self._pending = b""
        self._wake_read, self._wake_write = os.pipe()
        os.set_blocking(self._wake_write, False)
        os.set_blocking(self._wake_read, False)

    @staticmethod
    def is_one() -> bool:
        """Whether standard input and output are a terminal that can be drawn on."""
        return (
            termios is not None
            and sys.stdin.isatty()
            and sys.stdout.isatty()
            and os.environ.get("TERM", "dumb") not in ("dumb", "unknown", "")
        )

    @classmethod
    def has_colour(cls) -> bool:
        """Whether colours are wanted and there."""
        return not os.environ.get("NO_COLOR") and not os.environ.get("TERM", "").startswith(_WITHOUT_COLOUR)

    def __enter__(self) -> _Terminal:
        self._before = termios.tcgetattr(0)
        self._handlers = {
            number: signal.signal(number, handler)
            for number, handler in (
                (signal.SIGWINCH, self._resized),
                (signal.SIGCONT, self._resized),
                (signal.SIGTSTP, self._suspend),
                (signal.SIGTERM, self._end),
                (signal.SIGQUIT, self._end),
                (signal.SIGHUP, self._end),
            )
        }
        self._enter()
        return self

    def __exit__(self, *_: object) -> None:
        for number, handler in self._handlers.items():
            signal.signal(number, handler)
        self._leave()
        os.close(self._wake_read)
        os.close(self._wake_write)

    def _enter(self) -> None:
        mode = termios.tcgetattr(0)
        mode[3] &= ~(termios.ECHO | termios.ICANON)
        mode[6][termios.VMIN], mode[6][termios.VTIME] = 1, 0
        termios.tcsetattr(0, termios.TCSADRAIN, mode)
        self._shown = []
        self._write("\x1b[?1049h\x1b[?25l\x1b[2J")

    def _leave(self) -> None:
        with contextlib.suppress(OSError):  # the terminal may be gone
            self._write("\x1b[0m\x1b[2J\x1b[H\x1b[?25h\x1b[?1049l")
        with contextlib.suppress(termios.error):
            termios.tcsetattr(0, termios.TCSADRAIN, self._before)

    def _resized(self, *_: object) -> None:
        self._shown = []
        with contextlib.suppress(OSError):
            os.write(self._wake_write, b"r")

    def _suspend(self, *_: object) -> None:
        self._leave()
        os.kill(os.getpid(), signal.SIGSTOP)
        self._enter()

    @staticmethod
    def _end(number: int, _: object) -> None:
        raise SystemExit(128 + number)

    @staticmethod
    def _write(text: str) -> None:
        unsent = text.encode(sys.stdout.encoding or "utf-8", "replace")
        while unsent:
            unsent = unsent[os.write(1, unsent) :]

    def size(self) -> tuple[int, int]:
        """Columns and rows."""
        size = shutil.get_terminal_size((USUAL_WIDTH, USUAL_HEIGHT))
        return max(20, size.columns), max(4, size.lines)

    def draw(self, lines: list[list[Styled]]) -> None:
        """Write the lines that are not as they were."""
        if not self._shown:
            self._write("\x1b[0m\x1b[2J")
        width, _ = self.size()
        texts = []
        for line in lines:
            text = "".join(self._styled(text, style) for text, style in line)
            # In the last column this would erase what has just been written there.
            ends_before = sum(_cell_width(text) for text, _ in line) < width
            texts.append(text + "\x1b[K" if ends_before else text)
        changed = [
            f"\x1b[{number + 1};1H{text}"
            for number, text in enumerate(texts)
            if number >= len(self._shown) or self._shown[number] != text
        ]
        self._shown = texts
        self._write("".join(changed))

    def _styled(self, text: str, style: str) -> str:
        code = _STYLES.get(style)
        if code is None or (not self._colour and style in ("green", "yellow", "red", "dim")):
            return text
        return f"\x1b[{code}m{text}\x1b[0m"

    def keys(self, wait_s: float) -> list[str] | None:
        """The keys that were pressed within that time, as soon as there are any; None if the terminal is gone."""
        readable, _, _ = select.select([0, self._wake_read], [], [], wait_s)
        if self._wake_read in readable:
            with contextlib.suppress(OSError):
                os.read(self._wake_read, 1024)
        if 0 not in readable:
            lonely, self._pending = self._pending == b"\x1b", b""
            return ["escape"] if lonely else []
        received = os.read(0, 4096)
        if not received:
            return None
        keys, text = [], (self._pending + received).decode("utf-8", "ignore")
        self._pending = b""
        while text:
            if text == "\x1b":
                self._pending = b"\x1b"  # Esc by itself, or the beginning of another key
                break
            sequence = _KEY.match(text)
            taken = sequence[0] if sequence else text[0]
            if sequence:
                keys.append(_KEYS.get(taken[1:], ""))
            else:
                keys.append(_NAMED.get(taken, taken if taken != "\x1b" else "escape"))
            text = text[len(taken) :]
        return [key for key in keys if key]

    @property
    def is_in_key(self) -> bool:
        """Whether an Esc came that may be the beginning of another key."""
        return bool(self._pending)


def _show(table: EngineTable, gauge: _Gauge, options: argparse.Namespace) -> int:
    """The live view, until it is quit."""
    view = _View(table, gauge, options.sort, options.filter)
    with _Terminal(not options.no_color and _Terminal.has_colour()) as terminal:
        draw_at = float("-inf")
        while not view.is_over:
            now = time.monotonic()
            if now >= draw_at:
                terminal.draw(view.lines(*terminal.size()))
                draw_at = now + (options.interval if len(table) else 0.2)
            keys = terminal.keys(0.05 if terminal.is_in_key else max(0.0, draw_at - now))
            if keys is None:
                return 1
            for key in keys:
                view.press(key)
            if keys or not terminal._shown:
                draw_at = float("-inf")
    return 0


def _print_once(table: EngineTable, options: argparse.Namespace) -> int:
    """The fleet and its engines once, as text."""
    view = _View(table, None, options.sort, options.filter)
    entries = view._sorted(table.entries())
    longest = max((_cell_width(_printable(entry.engine_id)) for entry in entries), default=0)
    width = shutil.get_terminal_size((USUAL_WIDTH, USUAL_HEIGHT)).columns
    columns = _columns_that_fit(width)
    if not sys.stdout.isatty():  # nothing is cut off what is read by a program
        width = max(width, longest + sum(column.width + 1 for column in columns[1:]))
    for line in filter(None, view.head(width)):
        print("".join(text for text, _ in line))
    print(" ".join(_fit(c.title, _width_of(columns, n, width), right=c.right) for n, c in enumerate(columns)).rstrip())
    for entry in entries:
        print(row(entry, columns, width).rstrip())
    return 0


def _print_json(table: EngineTable, options: argparse.Namespace) -> int:
    """An engine's entry a line; without --once then one for each change."""
    view = _View(table, None, options.sort, options.filter)
    if options.once:
        for entry in view._sorted(table.entries()):
            print(json.dumps(entry.as_dict(), ensure_ascii=False))
        return 0
    changed: queue.SimpleQueue[frozenset[str]] = queue.SimpleQueue()
    table.on_change(changed.put)
    engine_ids = frozenset(entry.engine_id for entry in table)
    words = options.filter.casefold().split()
    while True:
        for engine_id in sorted(engine_ids):
            known = table.get(engine_id)
            if known is None:
                print(json.dumps({"engine_id": engine_id, "status": "removed"}, ensure_ascii=False))
            elif all(word in view._text_of(known) for word in words):
                print(json.dumps(known.as_dict(), ensure_ascii=False))
        sys.stdout.flush()
        engine_ids = _next_of(changed)


def _next_of(changed: queue.SimpleQueue[frozenset[str]]) -> frozenset[str]:
    """The next change; raises BrokenPipeError once nobody reads what is printed, also while nothing changes."""
    while True:
        with contextlib.suppress(queue.Empty):
            return changed.get(timeout=0.5)
        if not hasattr(select, "poll"):  # Windows: it is found with the next line
            continue
        output = select.poll()
        output.register(sys.stdout, 0)
        if output.poll(0):  # POLLERR, POLLHUP or POLLNVAL, which are always looked for
            raise BrokenPipeError


def _arguments(arguments: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="engine_table.py",
        description="Shows the engines that state gateways know, live in a terminal, as top does.",
        epilog="keys: " + "; ".join(f"{keys}: {does}" for keys, does in KEYS_HELP.items()),
    )
    parser.add_argument("--version", action="version", version=f"engine_table {VERSION}")
    parser.add_argument("url", nargs="+", help="a gateway's base URL, as in http://gateway.example:9999; or several")
    parser.add_argument("--once", action="store_true", help="print it once, and end; so, too, without a terminal")
    parser.add_argument("--json", action="store_true", help="a line of JSON an engine; without --once then each change")
    names = [column.title.lower().replace(" ", "-") for column in _COLUMNS]
    parser.add_argument("--sort", choices=names, default=names[_FIRST_SORT], help="by which column (%(default)s)")
    parser.add_argument(
        "--filter", default="", help="only engines with these words in id, status, phase, mode or extra"
    )
    parser.add_argument("--interval", type=float, default=1.0, help="seconds between two looks (%(default)s)")
    parser.add_argument("--timeout", type=float, default=5.0, help="seconds to wait for a gateway (%(default)s)")
    parser.add_argument("--token-file", help="a file whose first line is the readers' token")
    parser.add_argument("--ca-file", help="certificates to trust, for https")
    parser.add_argument("--no-color", action="store_true", help="no colours; so, too, where NO_COLOR is set")
    options = parser.parse_args(arguments)
    options.sort = names.index(options.sort)
    if not 0.05 <= options.interval <= 3600:
        parser.error("--interval is from 0.05 to 3600 seconds")
    if not 0 <= options.timeout <= 3600:
        parser.error("--timeout is from 0 to 3600 seconds")
    options.token = options.context = None
    try:
        if options.token_file:
            token = _token_in(options.token_file)
            if not token:
                parser.error(f"--token-file {options.token_file}: it has no token")
            _check_token(token)
            options.token = functools.partial(_token_in, options.token_file)  # it may be replaced meanwhile
        if options.ca_file:
            options.context = ssl.create_default_context(cafile=options.ca_file)
    except (OSError, ValueError) as error:
        parser.error(f"{error}")
    return options


def _token_in(path: str) -> str:
    """The first token of a file; raises OSError or UnicodeError."""
    with open(path, encoding="ascii") as file:
        return next((line.strip() for line in file if line.strip() and not line.startswith("#")), "")


def main(arguments: list[str] | None = None) -> int:
    """The program; returns its exit status."""
    options = _arguments(arguments)
    if sys.stdout is None:  # a shell's >&-
        print("engine_table.py: there is no standard output to print it to", file=sys.stderr)
        return 1
    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(errors="backslashreplace")
    logger.setLevel(logging.CRITICAL)  # what is wrong is shown instead
    try:
        table = EngineTable(*options.url, token=options.token, ssl_context=options.context)
    except ValueError as error:
        print(f"engine_table.py: {error}", file=sys.stderr)
        return 2
    try:
        with table:
            if not (options.once or options.json) and _Terminal.is_one():
                gauge = _Gauge(table)
                try:
                    return _show(table, gauge, options)
                finally:
                    gauge.stop()
            if not table.wait_until_known(options.timeout):
                for one in table.gateways():
                    print(f"engine_table.py: {one.url}: {_printable(one.problem)}", file=sys.stderr)
                return 1
            status = _print_json(table, options) if options.json else _print_once(table, options)
            sys.stdout.flush()
            return status
    except KeyboardInterrupt:
        return 130
    except OSError:  # who read it has gone, or the terminal
        with contextlib.suppress(OSError):
            os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
        return 1


if __name__ == "__main__":
    sys.exit(main())
