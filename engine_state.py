"""What an engine says of itself: the datagram's format, its checks, and the EngineState it becomes.

This is the one place where bytes become a state. Everything here is a pure function, safe in any thread.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Callable
from dataclasses import dataclass
from json.encoder import encode_basestring
from typing import Any, NoReturn

MAX_DATAGRAM_BYTES = 8192
MAX_INTEGER = 2**53
MAX_ENGINE_ID_CHARS = 256
MAX_MODE_CHARS = 64
MAX_NESTING = 500  # of unknown fields; the JSON module of Python 3.10 gives up at 1000 levels, that of 3.13 at 10000

# Why a datagram is invalid. The same words are the counters, the tests' names and the README's rows.
TOO_LARGE = "too_large"
NOT_UTF8 = "not_utf8"
NOT_JSON = "not_json"
TOO_DEEP = "too_deep"
NOT_AN_OBJECT = "not_an_object"
MISSING_FIELD = "missing_field"
WRONG_TYPE = "wrong_type"
OUT_OF_RANGE = "out_of_range"
NOT_PRINTABLE = "not_printable"
REASONS = {
    TOO_LARGE: "more than 8192 bytes",
    NOT_UTF8: "not UTF-8",
    NOT_JSON: "not one JSON document: cut, followed by something, with a byte-order mark, or no JSON at all",
    TOO_DEEP: "nested more than 500 levels deep",
    NOT_AN_OBJECT: "JSON, but not an object",
    MISSING_FIELD: "one of the eight fields is missing",
    WRONG_TYPE: "a field of the wrong type: a string or boolean as a number, a fraction as an integer, null",
    OUT_OF_RANGE: "a number or a text's length outside the field's range; NaN and infinities; integers above 2^53",
    NOT_PRINTABLE: "engine_id or scheduling_mode with unprintable characters, or engine_id with space at an end",
}

# Kept once however many states name them, because every decoded datagram brings a string of its own.
_KNOWN_MODES = {mode: mode for mode in ("latency_optimized", "throughput_optimized", "balanced")}


quote_json: Callable[[str], str] = encode_basestring  # a JSON string literal, with printable text kept as it is


class InvalidDatagram(ValueError):
    """A datagram that is no valid state: `reason` is a key of REASONS, `field` the field at fault, or None."""

    def __init__(self, reason: str, field: str | None = None) -> None:
        super().__init__(reason if field is None else f"{reason}: {field}")
        self.reason = reason
        self.field = field


@dataclass(slots=True)
class EngineState:
    """One state as an engine sent it. Not frozen because that makes creating one five times dearer; never changed.

    `latency_pred_ms` and `engine_capacity` keep the number as it was written: an int where the engine wrote one.
    """

    engine_id: str
    timestamp_ms: int  # ms since the epoch by the engine's clock
    latency_pred_ms: float
    scheduling_mode: str
    pending_tokens_total: int
    kv_cache_free_blocks: int  # -1 = unknown
    kv_cache_total_blocks: int  # -1 = unknown
    engine_capacity: float  # tokens/s, 0 = unknown

    @property
    def is_heartbeat(self) -> bool:
        """Whether all five load fields are the placeholders of an agent's heartbeat, which says nothing of load."""
        return (
            self.kv_cache_free_blocks == -1
            and self.kv_cache_total_blocks == -1
            and self.pending_tokens_total == 0
            and self.latency_pred_ms == 0
            and self.engine_capacity == 0
        )

    def values(self) -> tuple[str, int, float, str, int, int, int, float]:
        """The eight fields, in the datagram's order."""
        return (
            self.engine_id,
            self.timestamp_ms,
            self.latency_pred_ms,
            self.scheduling_mode,
            self.pending_tokens_total,
            self.kv_cache_free_blocks,
            self.kv_cache_total_blocks,
            self.engine_capacity,
        )

    def as_dict(self) -> dict[str, Any]:
        """The eight fields, in the datagram's order, as a dictionary of the caller's own."""
        return dict(zip(FIELDS, self.values(), strict=True))

    def json_fields(self) -> str:
        """The eight fields as the inside of a JSON object, without its braces."""
        return _json_fields(*self.values())


FIELDS = tuple(EngineState.__dataclass_fields__)

# The datagram of a busy engine as `json.dumps` writes it, with the eight fields as groups. Recognising it takes 1.0
# microsecond where parse_datagram takes 4.6. It matches only what parse_datagram takes, and what `json_fields` writes
# back to the letter but for the digits of floats; never a heartbeat, for its capacity is not 0. A test holds the two
# together on hundreds of thousands of datagrams.
_USUAL = re.compile(
    rb'\{"engine_id": "([!#-\[\]-~]{1,256})", "timestamp_ms": (0|[1-9][0-9]{0,14}), '
    rb'"latency_pred_ms": ((?:0|[1-9][0-9]{0,14})\.[0-9]{1,17}), '
    rb'"scheduling_mode": "(latency_optimized|throughput_optimized|balanced)", '
    rb'"pending_tokens_total": (0|[1-9][0-9]{0,14}), "kv_cache_free_blocks": (-1|0|[1-9][0-9]{0,14}), '
    rb'"kv_cache_total_blocks": (-1|0|[1-9][0-9]{0,14}), "engine_capacity": ([1-9][0-9]{0,14}\.[0-9]{1,17})\}'
)
recognise_usual = _USUAL.fullmatch

# A state as the table and the histories hold it: when it was received, in ms since the epoch, and all fields but the
# engine_id, as text, a line each; no printable text has the character between them. That takes 130 bytes where an
# EngineState takes 340 and a datagram 300, so that intake meets less cold memory. It is made of a usual datagram's
# fields as they came: turning them into numbers takes six times as long, and only a reader needs them.
HeldState = bytes


def hold_state(received_ms: bytes, state: EngineState) -> HeldState:
    """A state to be held; of a usual datagram the store makes the same of its fields."""
    return b"\n".join((received_ms, *(str(value).encode() for value in state.values()[1:])))


def as_state(engine_id: str, held: HeldState) -> EngineState:
    """The state that is held of an engine."""
    _, timestamp, latency, mode, pending, free, total, capacity = held.decode().split("\n")
    mode = _KNOWN_MODES.get(mode, mode)
    return EngineState(
        engine_id, int(timestamp), _float(latency), mode, int(pending), int(free), int(total), _float(capacity)
    )


def as_json_fields(engine_id: str, held: HeldState) -> str:
    """The eight fields of the state that is held, as the inside of a JSON object; see EngineState.json_fields."""
    _, timestamp, latency, mode, pending, free, total, capacity = held.decode().split("\n")
    return _json_fields(engine_id, timestamp, latency, mode, pending, free, total, capacity)


def _json_fields(
    engine_id: str,
    timestamp: int | str,
    latency: float | str,
    mode: str,
    pending: int | str,
    free: int | str,
    total: int | str,
    capacity: float | str,
) -> str:
    """Written by hand because json.dumps takes twice as long; every number is finite, and may be text already."""
    return (
        f'"engine_id": {quote_json(engine_id)}, "timestamp_ms": {timestamp}, "latency_pred_ms": {latency}, '
        f'"scheduling_mode": {quote_json(mode)}, "pending_tokens_total": {pending}, "kv_cache_free_blocks": {free}, '
        f'"kv_cache_total_blocks": {total}, "engine_capacity": {capacity}'
    )


def times_ms(held: HeldState) -> tuple[int, int]:
    """When the state that is held was received by the gateway's clock, and its timestamp_ms by the engine's."""
    received, timestamp, _ = held.split(b"\n", 2)
    return int(received), int(timestamp)


def _float(text: str) -> float:
    return int(text) if text.isdigit() else float(text)  # an int where the engine wrote one


def parse_datagram(datagram: bytes) -> EngineState:
    """The state that a datagram holds; raises InvalidDatagram with the reason where it holds none."""
    if len(datagram) > MAX_DATAGRAM_BYTES:
        raise InvalidDatagram(TOO_LARGE)
    try:
        text = datagram.decode("utf-8")
    except UnicodeDecodeError:
        raise InvalidDatagram(NOT_UTF8) from None
    if datagram.count(b"[") + datagram.count(b"{") > MAX_NESTING and _nesting(text) > MAX_NESTING:
        raise InvalidDatagram(TOO_DEEP)
    try:
        document = _decode(text)
    except ValueError:
        document = _decode_unusual(text)
    return _state(document)


def _refuse_constant(name: str) -> NoReturn:
    raise ValueError(f"{name} is not JSON")


def _bounded_integer(digits: str) -> int:
    return int(digits) if len(digits) < 20 else 2 * MAX_INTEGER


_decode: Callable[[str], Any] = json.JSONDecoder(parse_constant=_refuse_constant).decode
# int() refuses more than 4300 digits; an unknown field may have them, and in a known one they are out of range.
_decode_long_integers: Callable[[str], Any] = json.JSONDecoder(
    parse_constant=_refuse_constant, parse_int=_bounded_integer
).decode
_decode_nan: Callable[[str], Any] = json.JSONDecoder(parse_int=_bounded_integer).decode


def _decode_unusual(text: str) -> Any:
    """Decode what `_decode` refuses: very long integers are taken, NaN is rejected with the field that has it."""
    try:
        return _decode_long_integers(text)
    except ValueError:
        pass
    try:
        document = _decode_nan(text)
    except ValueError:
        raise InvalidDatagram(NOT_JSON) from None
    _state(document)
    raise InvalidDatagram(NOT_JSON)


def _state(document: Any) -> EngineState:
    if type(document) is not dict:
        raise InvalidDatagram(NOT_AN_OBJECT)
    mode = _text(document, "scheduling_mode", MAX_MODE_CHARS)
    engine_id = _text(document, "engine_id", MAX_ENGINE_ID_CHARS)
    if engine_id[0] == " " or engine_id[-1] == " ":  # the only printable white space
        raise InvalidDatagram(NOT_PRINTABLE, "engine_id")
    return EngineState(
        engine_id,
        _integer(document, "timestamp_ms", 0),
        _number(document, "latency_pred_ms"),
        _KNOWN_MODES.get(mode, mode),
        _integer(document, "pending_tokens_total", 0),
        _integer(document, "kv_cache_free_blocks", -1),
        _integer(document, "kv_cache_total_blocks", -1),
        _number(document, "engine_capacity"),
    )


def _text(document: dict[str, Any], field: str, max_chars: int) -> str:
    value = document.get(field, _MISSING)
    if type(value) is not str:
        raise _missing_or_wrong_type(value, field)
    if not 0 < len(value) <= max_chars:
        raise InvalidDatagram(OUT_OF_RANGE, field)
    if not value.isprintable():
        raise InvalidDatagram(NOT_PRINTABLE, field)
    return value


def _integer(document: dict[str, Any], field: str, low: int) -> int:
    value = document.get(field, _MISSING)
    if type(value) is not int:
        if type(value) is not float:
            raise _missing_or_wrong_type(value, field)
        if not math.isfinite(value):
            raise InvalidDatagram(OUT_OF_RANGE, field)
        if not value.is_integer():
            raise InvalidDatagram(WRONG_TYPE, field)
        value = int(value)
    if not low <= value <= MAX_INTEGER:
        raise InvalidDatagram(OUT_OF_RANGE, field)
    return value


def _number(document: dict[str, Any], field: str) -> float:
    value = document.get(field, _MISSING)
    if type(value) is float:
        if not 0.0 <= value < math.inf:  # false for NaN too
            raise InvalidDatagram(OUT_OF_RANGE, field)
        return value
    if type(value) is not int:
        raise _missing_or_wrong_type(value, field)
    if not 0 <= value <= MAX_INTEGER:
        raise InvalidDatagram(OUT_OF_RANGE, field)
    return value


_MISSING = object()


def _missing_or_wrong_type(value: object, field: str) -> InvalidDatagram:
    return InvalidDatagram(MISSING_FIELD if value is _MISSING else WRONG_TYPE, field)


# A string that never ends goes to the end of the text: looked for again at each of its quotes, it took 0.2 s.
_BRACKETS_AND_STRINGS = re.compile(r'"[^"\\]*(?:\\.[^"\\]*)*(?:"|\\?\Z)|[\[\]{}]', re.DOTALL)


def _nesting(text: str) -> int:
    """How deep the brackets of a text nest, up to one more than is allowed; brackets in strings do not count."""
    depth = deepest = 0
    for token in _BRACKETS_AND_STRINGS.finditer(text):
        bracket = token[0]
        if bracket in "[{":
            depth += 1
            deepest = max(deepest, depth)
            if deepest > MAX_NESTING:
                break
        elif bracket in "]}":
            depth -= 1
    return deepest
