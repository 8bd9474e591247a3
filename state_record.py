"""The packed form of a state, in which the table and the histories keep it, and a history of such records.

A record is one bytes object, the JSON texts of a state's fields from `timestamp_ms` on, in the order of FIELDS, and
then when it was received, in ms since the epoch by the gateway's clock, each but the last followed by a newline:

    timestamp_ms \\n latency_pred_ms \\n scheduling_mode \\n ... \\n engine_capacity \\n received_ms

The engine_id is not in it, because the table has it once for each engine. No JSON text of a field has a newline in it.
A record takes 130 bytes where an EngineState takes 340 and a datagram 300, so that intake meets less cold memory.
Nothing outside this module looks into a record.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import Any

from engine_state import FIELD_NAMES, FIELDS, EngineState

Record = bytes

RECORDED = slice(1, len(FIELDS))  # of a datagram's texts, what is in a record; a slice made each time costs 10 ns more
# A record of these texts, as a tuple, and behind them what encode_receipt gives.
encode_record: Callable[[Sequence[bytes]], Record] = b"\n".join
LINE_END = ord("\n")  # which follows timestamp_ms in a record

_DECODERS = tuple(field.decode for field in FIELDS[1:])
_LINES = len(FIELDS)  # of a record: all fields but engine_id, and received_ms


def encode_receipt(received_s: float) -> tuple[bytes]:
    """The end of all records that are received at a moment, in s since the epoch."""
    return (b"%d" % (received_s * 1000),)


def decode_record(record: Record) -> list[bytes]:
    """What a record was encoded of: the texts of the fields from timestamp_ms on, the last being received_ms."""
    return record.split(b"\n")


def decode_state(engine_id: str, record: Record) -> EngineState:
    """The state that an engine's record holds."""
    return EngineState(
        engine_id, *[decode(text) for decode, text in zip(_DECODERS, decode_record(record), strict=False)]
    )


def timestamp_ms(record: Record) -> int:
    """The timestamp_ms of the state, by the engine's clock."""
    return int(record[: record.index(b"\n")])


def received_ms(record: Record) -> int:
    """When the state was received, by the gateway's clock, in ms since the epoch."""
    return int(record[record.rindex(b"\n") + 1 :])


def same_state(record: Record, other: Record) -> bool:
    """Whether all fields are equal, however they were written and whenever they were received."""
    return timestamp_ms(record) == timestamp_ms(other) and decode_state("", record) == decode_state("", other)


JOINED = 8  # records in one object of a history
OVERHEAD = 48  # bytes of memory of an object besides its characters


def decode_columns(records: Sequence[Record], names: Iterable[str]) -> list[list[Any]]:
    """The values of some fields of many records: a list for each field; `engine_id` is not in a record."""
    lines = b"\n".join(records).split(b"\n") if records else []
    places = [FIELD_NAMES.index(name) - 1 for name in names]
    return [list(map(_DECODERS[place], lines[place::_LINES])) for place in places]


_LOAD = tuple(at - 1 for at, field in enumerate(FIELDS) if field.placeholder is not None)


def says_nothing_new(record: Record, other: Record) -> bool:
    """Whether timestamp_ms and the fields of the load are equal, however they were written."""
    if timestamp_ms(record) != timestamp_ms(other):
        return False
    texts, others = decode_record(record), decode_record(other)
    return all(_DECODERS[at](texts[at]) == _DECODERS[at](others[at]) for at in _LOAD)


def with_receipt_of(record: Record, other: Record) -> Record:
    """The state of a record, as if it had been received when another was."""
    return record[: record.rindex(b"\n")] + other[other.rindex(b"\n") :]


class History(list[Record]):
    """The latest records of one engine, the oldest first.

    Most are kept eight in one bytes object, joined by newlines, which takes a third less memory than an object each.
    What follows them, fewer than JOINED records, is in the list that the history itself is: with 10,000 engines each
    object that a state touches is one that the processor has to fetch from memory.
    The methods that change it tell how many bytes of memory that takes or frees. Not locked: it belongs to one engine
    of the table, and is changed under the table's lock.
    """

    __slots__ = ("_joined",)

    def __init__(self) -> None:
        super().__init__()
        self._joined: list[bytes] = []  # JOINED records each, the oldest first

    def add(self, record: Record, limit: int, crowded: bool) -> int:
        """Add the newest record; the latest `limit` are kept at least, or fewer and fewer while it is `crowded`.

        Returns by how many bytes it grew or, below 0, shrank. The store does these three steps itself for what is
        usual, because a call takes a tenth of them.
        """
        self.append(record)
        freed = self.make_room(limit, crowded) if crowded or len(self) >= JOINED else 0
        return len(record) + OVERHEAD - freed

    def make_room(self, limit: int, crowded: bool) -> int:
        """Join the recent records if they are enough, forget what is too old, and more if it is `crowded`.

        Returns the bytes freed.
        """
        freed, joined = self._shrink() if crowded else 0, self._joined
        if len(self) < JOINED:
            return freed
        joined.append(b"\n".join(self))
        self.clear()
        freed += (JOINED - 1) * (OVERHEAD - 1)  # of each but one the object, less the newline in its place
        return freed + len(joined.pop(0)) + OVERHEAD if (len(joined) - 1) * JOINED >= limit else freed

    def _shrink(self) -> int:
        """Forget what is oldest, but not the newest record; returns the bytes freed."""
        if self._joined:
            return len(self._joined.pop(0)) + OVERHEAD
        forgotten = self[: min(2, len(self) - 1)]
        del self[: len(forgotten)]
        return sum(map(len, forgotten)) + len(forgotten) * OVERHEAD

    @property
    def nbytes(self) -> int:
        """The bytes of memory that it takes, besides the two lists."""
        texts = self._joined + self
        return sum(map(len, texts)) + OVERHEAD * len(texts)

    def copy(self) -> History:
        """A copy that nobody changes; takes a microsecond or two."""
        copy = History()
        copy.extend(self)
        copy._joined = self._joined.copy()
        return copy

    def records(self) -> list[Record]:
        """All records, the oldest first."""
        lines = [line for text in self._joined for line in text.split(b"\n")]
        joined = [encode_record(lines[first : first + _LINES]) for first in range(0, len(lines), _LINES)]
        return joined + self
