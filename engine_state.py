"""What an engine says of itself: the datagram's fields, their checks, and the EngineState that they become.

This is the one place where bytes become a state. Everything here is a pure function, safe in any thread.

`FIELDS` is the table of a state's fields. The parser, the canonical form, the heartbeat rule, the record, the entries
of /engines, the metrics and docs/engines.md's table come from it: a new field is a row of it, and a line of
`EngineState`.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from itertools import accumulate
from json.encoder import encode_basestring
from operator import attrgetter, itemgetter
from typing import Any, NoReturn

MAX_DATAGRAM_BYTES = 8192
MAX_INTEGER = 2**53
MAX_ENGINE_ID_CHARS = 256
MAX_MODE_CHARS = 64
MAX_NESTING = 500  # of unknown fields; the JSON module of Python 3.10 gives up at 1000 levels, that of 3.13 at 10000

# Why a datagram is invalid. The same words are the counters, the tests' names and docs/engines.md's rows.
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
    """The text of a JSON string literal; json.loads takes five times as long if nothing is escaped."""
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


# -- checks: each takes a value out of a JSON document and the field's name, and returns the value of the state -------

_MISSING = object()


def _missing_or_wrong_type(value: object, field: str) -> InvalidDatagram:
    return InvalidDatagram(MISSING_FIELD if value is _MISSING else WRONG_TYPE, field)


def _text(max_chars: int) -> Callable[[Any, str], str]:
    def check(value: Any, field: str) -> str:
        if type(value) is not str:
            raise _missing_or_wrong_type(value, field)
        if not 0 < len(value) <= max_chars:
            raise InvalidDatagram(OUT_OF_RANGE, field)
        if not value.isprintable():
            raise InvalidDatagram(NOT_PRINTABLE, field)
        return value

    return check


_printable_id = _text(MAX_ENGINE_ID_CHARS)


def _engine_id(value: Any, field: str) -> str:
    engine_id = _printable_id(value, field)
    if engine_id[0] == " " or engine_id[-1] == " ":  # the only printable white space
        raise InvalidDatagram(NOT_PRINTABLE, field)
    return engine_id


def _integer(low: int) -> Callable[[Any, str], int]:
    def check(value: Any, field: str) -> int:
        if type(value) is int:
            number: int = value
        else:
            if type(value) is not float:
                raise _missing_or_wrong_type(value, field)
            if not math.isfinite(value):
                raise InvalidDatagram(OUT_OF_RANGE, field)
            if not value.is_integer():
                raise InvalidDatagram(WRONG_TYPE, field)
            number = int(value)
        if not low <= number <= MAX_INTEGER:
            raise InvalidDatagram(OUT_OF_RANGE, field)
        return number

    return check


def _number(value: Any, field: str) -> float:
    if type(value) is float:
        if not 0.0 <= value < math.inf:  # false for NaN too
            raise InvalidDatagram(OUT_OF_RANGE, field)
        return value
    if type(value) is not int:
        raise _missing_or_wrong_type(value, field)
    if not 0 <= value <= MAX_INTEGER:
        raise InvalidDatagram(OUT_OF_RANGE, field)
    return value


# -- decoding: from a value's JSON text --------------------------------------------------------------------------------

# Kept once however many states name them.
_MODES = {b'"%b"' % mode.encode(): mode for mode in ("latency_optimized", "throughput_optimized", "balanced")}


def _decode_mode(text: bytes) -> str:
    return _MODES.get(text) or unquote_json(text)


def _decode_number(text: bytes) -> float:
    return int(text) if text.isdigit() else float(text)  # an int if the engine wrote one


# -- the pieces of the canonical form, as regular expressions; every repetition is bounded -----------------------------

_SPACELESS_TEXT = rb'"[!#-\[\]-~]{1,256}"'  # ASCII, nothing escaped
_KNOWN_MODE = rb'"(?:latency_optimized|throughput_optimized|balanced)"'
_WHOLE = rb"(?:0|[1-9][0-9]{0,14})"
_WHOLE_OR_UNKNOWN = rb"(?:-1|0|[1-9][0-9]{0,14})"
_DECIMAL = _WHOLE + rb"\.[0-9]{1,17}"


@dataclass(frozen=True)
class Metric:
    """How a field is shown at /metrics: a gauge, the value times `scale`; or, if `info`, a series with it as label."""

    family: str
    help: str
    scale: float = 1.0
    info: bool = False


@dataclass(frozen=True)
class Field:
    """One field of a state."""

    name: str
    accepts: str  # type and range, as in docs/engines.md's table
    meaning: str  # unit and meaning, the same
    check: Callable[[Any, str], Any]
    canonical: bytes  # what its JSON text looks like in a canonical datagram; matches nothing that `check` refuses
    decode: Callable[[bytes], Any]  # from its JSON text
    metric: Metric | None = None
    placeholder: int | None = None  # what a heartbeat has there; None: no field of the load
    unknown: int | None = None  # the value that says that an engine does not know it
    summed: bool = False  # whether the fleet's sum of it means something

    @property
    def json_type(self) -> str:
        """What its value is in JSON, by the words of JSON Schema."""
        return {int: "integer", _decode_number: "number"}.get(self.decode, "string")


FIELDS = (
    Field(
        "engine_id", "string, 1 to 256 printable characters, no space at either end", "usually the engine's URL",
        _engine_id, _SPACELESS_TEXT, unquote_json,
    ),
    Field(
        "timestamp_ms", "integer, 0 to 2^53", "ms since the epoch, by the engine's clock",
        _integer(0), _WHOLE, int,
        Metric("engine_timestamp_seconds", "Timestamp of the state shown, by the engine's clock, since the epoch",
               1e-3),
    ),
    Field(
        "latency_pred_ms", "finite number >= 0", "ms, predicted latency of the next scheduling step",
        _number, _DECIMAL, _decode_number,
        Metric("engine_latency_pred_seconds", "Predicted latency of the next scheduling step", 1e-3),
        placeholder=0,
    ),
    Field(
        "scheduling_mode", "string, 1 to 64 printable characters",
        "today `latency_optimized`, `throughput_optimized`, `balanced`",
        _text(MAX_MODE_CHARS), _KNOWN_MODE, _decode_mode,
        Metric("engine_scheduling_mode_info", "The engine's scheduling mode, as a label", info=True),
    ),
    Field(
        "pending_tokens_total", "integer >= 0", "tokens waiting",
        _integer(0), _WHOLE, int,
        Metric("engine_pending_tokens", "Tokens waiting"),
        placeholder=0, summed=True,
    ),
    Field(
        "kv_cache_free_blocks", "integer >= -1", "KV-cache blocks, -1 = unknown",
        _integer(-1), _WHOLE_OR_UNKNOWN, int,
        Metric("engine_kv_cache_free_blocks", "Free KV-cache blocks, -1 = unknown"),
        placeholder=-1, unknown=-1, summed=True,
    ),
    Field(
        "kv_cache_total_blocks", "integer >= -1", "KV-cache blocks, -1 = unknown",
        _integer(-1), _WHOLE_OR_UNKNOWN, int,
        Metric("engine_kv_cache_total_blocks", "KV-cache blocks, -1 = unknown"),
        placeholder=-1, unknown=-1, summed=True,
    ),
    Field(
        "engine_capacity", "finite number >= 0", "tokens/s, 0 = unknown",
        _number, _DECIMAL, _decode_number,
        Metric("engine_capacity_tokens_per_second", "Capacity, 0 = unknown"),
        placeholder=0, unknown=0, summed=True,
    ),
)  # fmt: skip
FIELD_NAMES = tuple(field.name for field in FIELDS)


@dataclass(slots=True)
class EngineState:
    """One state as an engine sent it. Not frozen because that makes creating one five times dearer; never changed.

    The attributes are the rows of FIELDS, in their order. `latency_pred_ms` and `engine_capacity` keep the number as it
    was written: an int if the engine wrote one.
    """

    engine_id: str
    timestamp_ms: int  # ms since the epoch by the engine's clock
    latency_pred_ms: float
    scheduling_mode: str
    pending_tokens_total: int
    kv_cache_free_blocks: int  # -1 = unknown
    kv_cache_total_blocks: int  # -1 = unknown
    engine_capacity: float  # tokens/s, 0 = unknown

    def as_dict(self) -> dict[str, Any]:
        """The fields, in the datagram's order, as a dictionary of the caller's own."""
        return dict(zip(FIELD_NAMES, _values(self), strict=True))

    def texts(self) -> FieldTexts:
        """The fields as JSON texts."""
        return tuple((quote_json(value) if type(value) is str else repr(value)).encode() for value in _values(self))


_values: Callable[[EngineState], tuple[Any, ...]] = attrgetter(*FIELD_NAMES)

# The fields of a valid state, in the table's order, each as the JSON text that stands for its value. In this form a
# state goes from the listener to the store: only a reader needs numbers, and making them takes six times as long as
# cutting their text out.
FieldTexts = tuple[bytes, ...]

# How they are written, as the inside of a JSON object without its braces; json.dumps takes four times as long.
FIELDS_JSON = b", ".join(b'"%b": %%b' % name.encode() for name in FIELD_NAMES)


# -- heartbeats --------------------------------------------------------------------------------------------------------

_PLACEHOLDERS = {at: field.placeholder for at, field in enumerate(FIELDS) if field.placeholder is not None}
_load_texts = itemgetter(*_PLACEHOLDERS)
_AS_AGENTS_WRITE_THEM = tuple(
    b"%d.0" % placeholder if FIELDS[at].check is _number else b"%d" % placeholder
    for at, placeholder in _PLACEHOLDERS.items()
)
# An integer has one text only, so that no text but this one in this place can be a heartbeat's; few others have it.
HEARTBEAT_MARK, MARK_TEXT = next((at, b"-1") for at, placeholder in _PLACEHOLDERS.items() if placeholder == -1)


def is_heartbeat(texts: FieldTexts) -> bool:
    """Whether all load fields are the placeholders of an agent's heartbeat, which says nothing of load."""
    load = _load_texts(texts)
    return load == _AS_AGENTS_WRITE_THEM or all(map(_is_placeholder, load, _PLACEHOLDERS.values()))


def _is_placeholder(text: bytes, placeholder: int) -> bool:
    return float(text) == placeholder


# -- what else an engine may say: the optional fields, and further ones ------------------------------------------------

MAX_BOOT_CHARS = 64
MAX_EXTRA_FIELDS = 16
MAX_EXTRA_BYTES = 1024  # of all of them, as a JSON object
MAX_EXTRA_TEXT_CHARS = 256
MAX_NAMES_LOOKED_AT = 64

OPTIONAL_NAMES = ("boot", "seq", "phase", "sig")
SERVING, GONE = b'"serving"', b'"gone"'  # phases, as JSON texts
_RUNNING = b', "num_requests_running": '
_PHASE = re.compile("[a-z_]{1,32}")
_EXTRA_NAME = re.compile("[a-z][a-z0-9_]{0,63}")
_KNOWN_NAMES = frozenset((*FIELD_NAMES, *OPTIONAL_NAMES))

# The places of a datagram's further texts, behind those of the fields: `boot`, `seq` (both or neither) and `phase`,
# each a JSON text or None, and `extra`: the further fields as `, "name": value` each, None if the datagram has nothing
# but the fields. A first edition's datagram has None four times.
BOOT, SEQ, PHASE, EXTRA = range(len(FIELDS), len(FIELDS) + 4)
NOTHING_FURTHER = (None, None, None, None)
DatagramTexts = tuple[Any, ...]


def is_idle(texts: DatagramTexts) -> bool:
    """Whether what looks like a heartbeat is the real state of an idle engine whose KV cache is unknown."""
    return texts[SEQ] is not None and texts[PHASE] == SERVING and _RUNNING in texts[EXTRA]


def datagram_json(texts: DatagramTexts) -> bytes:
    """The fields, and behind them the optional and further ones that were taken, as a JSON object."""
    boot, seq, phase, extra = texts[BOOT : EXTRA + 1]
    numbered = b"" if boot is None else b', "boot": %b, "seq": %b' % (boot, seq)
    phased = b"" if phase is None else b', "phase": %b' % phase
    return b"{%b%b%b%b}" % (FIELDS_JSON % texts[:BOOT], numbered, phased, extra or b"")


def _further(document: dict[str, Any]) -> tuple[DatagramTexts, bool]:
    """The further texts of a datagram, and whether something in it was passed over, which is no reason to refuse it."""
    boot, seq, phase = (document.get(name, _MISSING) for name in OPTIONAL_NAMES[:3])
    has_boot = type(boot) is str and 0 < len(boot) <= MAX_BOOT_CHARS and boot.isprintable()
    has_seq = type(seq) in (int, float) and 0 <= seq <= MAX_INTEGER and int(seq) == seq
    has_phase = type(phase) is str and _PHASE.fullmatch(phase) is not None
    passed_over = (
        has_boot is not has_seq
        or not (has_boot or boot is _MISSING)
        or not (has_seq or seq is _MISSING)
        or not (has_phase or phase is _MISSING)
        or type(document.get("sig", "")) is not str
    )
    extra, passed_over_extra = _extra(document)
    if not (has_boot and has_seq) and not has_phase and not extra:
        return NOTHING_FURTHER, passed_over or passed_over_extra
    numbered = (quote_json(boot).encode(), b"%d" % seq) if has_boot and has_seq else (None, None)
    return (*numbered, b'"%b"' % phase.encode() if has_phase else None, extra), passed_over or passed_over_extra


def _extra(document: dict[str, Any]) -> tuple[bytes, bool]:
    further = [(name, value) for name, value in document.items() if name not in _KNOWN_NAMES]
    texts: list[bytes] = []
    room = MAX_EXTRA_BYTES
    for name, value in further[:MAX_NAMES_LOOKED_AT]:
        text = _extra_text(name, value) if len(texts) < MAX_EXTRA_FIELDS else None
        if text is not None and len(text) <= room:  # the two bytes of the braces are those of the first comma
            room -= len(text)
            texts.append(text)
    return b"".join(texts), len(texts) < len(further)


def _extra_text(name: str, value: Any) -> bytes | None:
    """A further field as `, "name": value`, or None if it is none that is kept."""
    if _EXTRA_NAME.fullmatch(name) is None:
        return None
    kind = type(value)
    if kind is str:
        text = quote_json(value) if len(value) <= MAX_EXTRA_TEXT_CHARS and value.isprintable() else None
    elif kind is int:
        text = repr(value) if abs(value) <= MAX_INTEGER else None
    elif kind is float:
        text = repr(value) if math.isfinite(value) else None
    else:
        text = {True: "true", False: "false", None: "null"}.get(value) if kind in (bool, type(None)) else None
    return None if text is None else f', "{name}": {text}'.encode()


# -- the canonical form ------------------------------------------------------------------------------------------------

# A canonical datagram is one as an agent's `json.dumps` writes it, with usual values: its fields are cut out by one
# regular expression, which takes 0.8 microseconds, and `parse` 4.3. It matches only what `parse` takes,
# and a test holds the two together on hundreds of thousands of datagrams. `engine_agent.py` writes its own in the one
# order that is here, so that no name can be there twice.
_ASCII_TEXT = rb'"[ !#-\[\]-~]{1,%b}"'
_COUNT_OR_NULL = rb"(?:null|0|[1-9][0-9]{0,8})"
_AGENT_S = (
    rb', "boot": ("[0-9a-f]{1,64}"), "seq": (0|[1-9][0-9]{0,14}), "phase": ("[a-z_]{1,32}")('
    rb', "model": (?:' + _ASCII_TEXT % b"256" + rb"|null)"
    rb', "num_requests_running": ' + _COUNT_OR_NULL + rb', "num_requests_waiting": ' + _COUNT_OR_NULL +
    rb'(?:, "dp_rank": ' + _COUNT_OR_NULL + rb')?(?:, "role": "[a-z_]{1,32}")?'
    rb', "engine": ' + _ASCII_TEXT % b"64" + rb', "agent": ' + _ASCII_TEXT % b"64" + rb"%b)"
    rb'(?:, "sig": "[A-Za-z0-9_-]{1,32}:[0-9a-f]{32}")?'
)  # fmt: skip
_EIGHT = rb"\{" + b", ".join(b'"%b": (%b)' % (field.name.encode(), field.canonical) for field in FIELDS)
_CANONICAL = re.compile(_EIGHT + rb"(?:\}|%b\})" % (_AGENT_S % b""))

# The same with labels that an operator gave the agent behind it, up to 8. Any name can be among them, so that they are
# looked at once more; a pattern of its own, so that others pay nothing for it.
_LABEL = rb', "(?!sig")([a-z][a-z0-9_]{0,63})": "[ !#-\[\]-~]{0,256}"'
_LABELLED = re.compile(_EIGHT + rb"%b\}" % (_AGENT_S % (b"((?:%b){1,8})" % _LABEL.replace(b"([", b"(?:["))))
_label_names = re.compile(_LABEL).findall
_CANONICAL_NAMES = frozenset(re.findall(rb'"([a-z_]+)": ', _EIGHT + _AGENT_S))


def match_labelled(datagram: bytes) -> DatagramTexts | None:
    """The texts of a datagram that is canonical but for labels behind it, or None if it is not one."""
    if b', "agent": "' not in datagram:
        return None
    match = _LABELLED.fullmatch(datagram)
    if match is None:
        return None
    # A label is none of the names of the eight and of the agent's: those are left to the parser.
    *texts, extra, labels = match.groups()
    names = _label_names(labels)
    distinct = set(names)
    if len(distinct) < len(names) or not _CANONICAL_NAMES.isdisjoint(distinct) or len(extra) > MAX_EXTRA_BYTES:
        return None
    return (*texts, extra)


def match_all_canonical(datagrams: Sequence[bytes]) -> list[DatagramTexts | None]:
    """For each datagram of a batch its texts if it is canonical, or None: it may still be valid.

    For a whole batch, because a call for each datagram would take half as long again.
    """
    return [match and match.groups() for match in map(_CANONICAL.fullmatch, datagrams)]


# -- the parser --------------------------------------------------------------------------------------------------------


@dataclass(slots=True)
class ParsedDatagram:
    """What a valid datagram holds."""

    state: EngineState
    further: DatagramTexts  # boot, seq, phase and extra
    passed_over: bool  # whether there was something that is not kept

    def texts(self) -> DatagramTexts:
        """The fields' texts and the further ones, as match_all_canonical gives them."""
        return self.state.texts() + self.further


def parse(datagram: bytes) -> ParsedDatagram:
    """All that a datagram holds; raises InvalidDatagram with the reason if it holds no valid state.

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
    document = _decoded(text)
    state = _state(document)
    if len(document) == len(FIELDS):
        return ParsedDatagram(state, NOTHING_FURTHER, passed_over=False)
    return ParsedDatagram(state, *_further(document))


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


_CHECKS = tuple((field.name, field.check) for field in FIELDS)


def _state(document: dict[str, Any]) -> EngineState:
    return EngineState(*[check(document.get(name, _MISSING), name) for name, check in _CHECKS])


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
