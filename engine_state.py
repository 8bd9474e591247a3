"""What an engine says of itself: the datagram's format, its checks, and the EngineState it becomes.

This is the one place where bytes become a state. Everything here is a pure function, safe in any thread.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from itertools import accumulate
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
DUPLICATE_FIELD = "duplicate_field"
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
    DUPLICATE_FIELD: "a name given twice at the top level, whatever its values",
    MISSING_FIELD: "one of the eight fields is missing",
    WRONG_TYPE: "a field of the wrong type: a string or boolean as a number, a fraction as an integer, null",
    OUT_OF_RANGE: "a number or a text's length outside the field's range; NaN and infinities; integers above 2^53",
    NOT_PRINTABLE: "engine_id or scheduling_mode with unprintable characters, or engine_id with space at an end",
}

quote_json: Callable[[str], str] = encode_basestring  # a JSON string literal, with printable text kept as it is


def unquote_json(literal: bytes) -> str:
    """The text of a JSON string literal; json.loads takes five times as long where nothing is escaped."""
    return str(json.loads(literal)) if b"\\" in literal else literal[1:-1].decode()


class InvalidDatagram(ValueError):
    """A datagram that is no valid state: InvalidDatagram(reason), or InvalidDatagram(reason, field).

    It has no constructor of its own, because junk comes as fast as states do and each is refused with one of these.
    """

    @property
    def reason(self) -> str:
        """A key of REASONS."""
        return str(self.args[0])

    @property
    def field(self) -> str | None:
        """The field at fault, or None."""
        return self.args[1] if len(self.args) > 1 else None

    def __str__(self) -> str:
        return ": ".join(filter(None, self.args))


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
        return dict(zip(FIELD_NAMES, self.values(), strict=True))

    def texts(self) -> FieldTexts:
        """The eight fields as JSON text."""
        return (
            quote_json(self.engine_id).encode(),
            b"%d" % self.timestamp_ms,
            repr(self.latency_pred_ms).encode(),
            quote_json(self.scheduling_mode).encode(),
            b"%d" % self.pending_tokens_total,
            b"%d" % self.kv_cache_free_blocks,
            b"%d" % self.kv_cache_total_blocks,
            repr(self.engine_capacity).encode(),
        )


FIELD_NAMES = tuple(EngineState.__dataclass_fields__)

# The eight fields of a valid state, in the datagram's order, each as the JSON text that stands for its value. This is
# the form in which a state goes from the listener to the store: only a reader needs numbers, and making them takes six
# times as long as cutting their text out.
FieldTexts = tuple[bytes, ...]


# How they are written, as the inside of a JSON object without its braces; json.dumps takes four times as long.
FIELDS_JSON = b", ".join(b'"%b": %%b' % name.encode() for name in FIELD_NAMES)


def is_heartbeat(fields: FieldTexts) -> bool:
    """Whether all five load fields are the placeholders of an agent's heartbeat, which says nothing of load."""
    _, _, latency, _, pending, free, total, capacity = fields
    return free == b"-1" and total == b"-1" and pending == b"0" and float(latency) == 0 and float(capacity) == 0


# The canonical datagram, as an agent's `json.dumps` writes it, with the eight fields as groups. It matches only what
# parse_datagram takes, and a test holds the two together on hundreds of thousands of datagrams. Every repetition is
# bounded, so that nothing is looked at for long. It takes 0.8 microseconds, and parse_datagram 4.3.
_CANONICAL = re.compile(
    rb'\{"engine_id": ("[!#-\[\]-~]{1,256}"), "timestamp_ms": (0|[1-9][0-9]{0,14}), '
    rb'"latency_pred_ms": ((?:0|[1-9][0-9]{0,14})\.[0-9]{1,17}), '
    rb'"scheduling_mode": ("(?:latency_optimized|throughput_optimized|balanced)"), '
    rb'"pending_tokens_total": (0|[1-9][0-9]{0,14}), "kv_cache_free_blocks": (-1|0|[1-9][0-9]{0,14}), '
    rb'"kv_cache_total_blocks": (-1|0|[1-9][0-9]{0,14}), "engine_capacity": ((?:0|[1-9][0-9]{0,14})\.[0-9]{1,17})\}'
)


def match_canonical(datagram: bytes) -> FieldTexts | None:
    """The fields of a canonical datagram, or None if it is not one: it may still be valid."""
    match = _CANONICAL.fullmatch(datagram)
    fields: FieldTexts | None = match and match.groups()
    return fields


def match_all_canonical(datagrams: Sequence[bytes]) -> list[FieldTexts | None]:
    """The same of each datagram of a batch; a call for each would take half as long again."""
    return [match and match.groups() for match in map(_CANONICAL.fullmatch, datagrams)]


# A state as the table and the histories hold it: the text of all fields but the engine_id, timestamp_ms first, and then
# when it was received, in ms since the epoch, a line each. That takes 130 bytes where an EngineState takes 340 and a
# datagram 300, so that intake meets less cold memory.
Record = bytes

# A state to be held, of its fields from timestamp_ms on and received_ms; decode_record gives these back.
encode_record: Callable[[Sequence[bytes]], Record] = b"\n".join


def decode_record(held: Record) -> list[bytes]:
    """What a state was held of: its fields from timestamp_ms on, and received_ms."""
    return held.split(b"\n")


# Some of them as one text, which takes two thirds of the memory that they take as an object each.
pack: Callable[[Sequence[Record]], bytes] = b"\n".join


def unpack(packed: bytes) -> list[Record]:
    """The states that were packed."""
    lines = packed.split(b"\n")
    return [encode_record(lines[first : first + len(FIELD_NAMES)]) for first in range(0, len(lines), len(FIELD_NAMES))]


def decode_state(engine_id: str, held: Record) -> EngineState:
    """The state that is held of an engine."""
    timestamp, latency, mode, pending, free, total, capacity, _ = decode_record(held)
    return EngineState(
        engine_id,
        int(timestamp),
        _float(latency),
        _mode(mode),
        int(pending),
        int(free),
        int(total),
        _float(capacity),
    )


def same_state(held: Record, other: Record) -> bool:
    """Whether all fields that are held are equal, however they were written and whenever they were received."""
    return timestamp_ms(held) == timestamp_ms(other) and decode_state("", held) == decode_state("", other)


def mode_of(held: Record) -> str:
    """The scheduling_mode of the state that is held."""
    return _mode(decode_record(held)[2])


def timestamp_ms(held: Record) -> int:
    """The timestamp_ms of the state that is held."""
    return int(held[: held.index(b"\n")])


def received_ms(held: Record) -> int:
    """When the state that is held was received, by the gateway's clock, in ms since the epoch."""
    return int(held[held.rindex(b"\n") + 1 :])


# Kept once however many states name them.
_MODES = {b'"%b"' % mode.encode(): mode for mode in ("latency_optimized", "throughput_optimized", "balanced")}


def _mode(text: bytes) -> str:
    return _MODES.get(text) or unquote_json(text)


def _float(text: bytes) -> float:
    return int(text) if text.isdigit() else float(text)  # an int where the engine wrote one


def parse_datagram(datagram: bytes) -> EngineState:
    """The state that a datagram holds; raises InvalidDatagram with the reason where it holds none.

    The time it takes grows with the datagram's size, and no datagram takes more than a few times as long a byte as a
    usual one: it is decoded once, or twice if it has a NaN or an integer of thousands of digits in it.
    """
    if len(datagram) > MAX_DATAGRAM_BYTES:
        raise InvalidDatagram(TOO_LARGE)
    try:
        text = datagram.decode("utf-8")
    except UnicodeDecodeError:
        raise InvalidDatagram(NOT_UTF8) from None
    if len(datagram) > MAX_NESTING and _nesting(datagram) > MAX_NESTING:
        raise InvalidDatagram(TOO_DEEP)
    # Most junk shows at its two ends. A failing json.loads takes longer than all that a valid state costs.
    text = text.strip(_WHITE_SPACE)
    if not text or text[-1] not in _LAST_OF.get(text[0], ""):
        raise InvalidDatagram(NOT_JSON)
    return _state(_decoded(text))


_WHITE_SPACE = " \t\n\r"
_DIGITS = "0123456789"
# The characters that a JSON document may end with, for each that it may begin with.
_LAST_OF = {"{": "}", "[": "]", '"': '"', "t": "e", "f": "e", "n": "l", **dict.fromkeys("-" + _DIGITS, _DIGITS)}


def _refuse_constant(name: str) -> NoReturn:
    raise InvalidDatagram(NOT_JSON)


def _bounded_integer(digits: str) -> int:
    return int(digits) if len(digits) < 20 else 2 * MAX_INTEGER


# An object is decoded as the tuple of its pairs, so that a name that is given twice can be seen; `tuple` and `float`
# are called from C, which takes a tenth of what a function in Python would for each of hundreds of objects.
_decode = json.JSONDecoder(object_pairs_hook=tuple, parse_constant=float).raw_decode
# int() refuses more than 4300 digits; an unknown field may have them, and in a known one they are out of range.
_decode_long_integers = json.JSONDecoder(
    object_pairs_hook=tuple, parse_constant=float, parse_int=_bounded_integer
).raw_decode
_decode_strictly = json.JSONDecoder(parse_constant=_refuse_constant, parse_int=_bounded_integer).raw_decode


def _decoded(text: str) -> dict[str, Any]:
    """The object in a text without white space around it, as a dictionary; objects in it are tuples of pairs."""
    try:
        document, end = _decode(text)
    except json.JSONDecodeError:
        raise InvalidDatagram(NOT_JSON) from None
    except ValueError:
        try:
            document, end = _decode_long_integers(text)
        except ValueError:
            raise InvalidDatagram(NOT_JSON) from None
    if end < len(text):
        raise InvalidDatagram(NOT_JSON)
    if type(document) is not tuple:
        raise InvalidDatagram(NOT_AN_OBJECT)
    fields = dict(document)
    if len(fields) < len(document):
        raise InvalidDatagram(DUPLICATE_FIELD, *_first_repeated(document))
    if "NaN" in text or "Infinity" in text:
        _state(fields)  # a known field that has it is out of range
        _decode_strictly(text)
    return fields


def _first_repeated(pairs: Iterable[tuple[str, Any]]) -> tuple[str, ...]:
    """The first name that stands there again, if it is a known one; other names are a stranger's text."""
    seen: set[str] = set()
    for name, _ in pairs:
        if name in seen:
            return (name,) if name in FIELD_NAMES else ()
        seen.add(name)
    return ()


def _state(document: dict[str, Any]) -> EngineState:
    engine_id = _text(document, "engine_id", MAX_ENGINE_ID_CHARS)
    if engine_id[0] == " " or engine_id[-1] == " ":  # the only printable white space
        raise InvalidDatagram(NOT_PRINTABLE, "engine_id")
    return EngineState(
        engine_id,
        _integer(document, "timestamp_ms", 0),
        _number(document, "latency_pred_ms"),
        _text(document, "scheduling_mode", MAX_MODE_CHARS),
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


_OUTSIDE_BRACKETS = bytes(set(range(256)) - set(b"[]{}"))
_STEPS = bytes.maketrans(b"[{]}", b"\x01\x01\xff\xff")  # +1 and -1 as signed bytes


def _nesting(datagram: bytes) -> int:
    """How deep the brackets nest outside strings, or 0 if they are too few to be too deep.

    A string that never ends goes to the end. These are a few passes over all bytes, whatever they are; looking at one
    token after another took 200 ns for each.
    """
    if datagram.count(b"[") + datagram.count(b"{") <= MAX_NESTING:
        return 0
    # Escapes that hide a quote or another escape first: what is left between two quotes is then a string.
    unescaped = datagram.replace(b"\\\\", b"").replace(b'\\"', b"")
    outside = b"".join(unescaped.split(b'"')[::2]).translate(_STEPS, _OUTSIDE_BRACKETS)
    return max(accumulate(memoryview(outside).cast("b")), default=0)
