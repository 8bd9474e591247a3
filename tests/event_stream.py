"""Server-sent events, parsed by the letter of the HTML standard (section 9.2.6), with nothing forgiven beyond it.

What a reader may make of a stream differs from library to library; this is what all of them have in common.
"""

from __future__ import annotations

import codecs
import re
from typing import NamedTuple


class StreamEvent(NamedTuple):
    """One event as it is dispatched."""

    kind: str  # "message" where the stream names none
    data: str
    last_event_id: str


class EventStream:
    """Takes a stream in pieces of any size, and gives its events."""

    def __init__(self, max_line_bytes: int | None = None) -> None:
        self.last_event_id = ""
        self.retry_ms: int | None = None
        self.empty_blocks = 0  # that end without data: the standard drops them, some libraries make events of them
        self.longest_line = 0  # bytes, without its end
        self._max_line_bytes = max_line_bytes
        self._decode = codecs.getincrementaldecoder("utf-8")("strict").decode
        self._begun = self._ended_in_cr = False
        self._line = ""
        self._kind = self._data = ""
        self._fields = 0  # of the block so far, whatever they are

    @property
    def is_between_events(self) -> bool:
        """Whether what was fed ends with a whole event."""
        return not self._line and not self._fields

    def feed(self, piece: bytes) -> list[StreamEvent]:
        """The events that end in this piece."""
        text = self._decode(piece)
        if text and not self._begun:
            self._begun = True
            text = text.removeprefix("\ufeff")
        if text and self._ended_in_cr:
            text = text.removeprefix("\n")
        if text:
            self._ended_in_cr = text.endswith("\r")
        first, *others = re.split("\r\n|\n|\r", text)
        lines, self._line = [self._line + first, *others][:-1], (others or [self._line + first])[-1]
        for line in (*lines, self._line):
            self.longest_line = max(self.longest_line, len(line.encode()))
        if self._max_line_bytes is not None and self.longest_line > self._max_line_bytes:
            raise ValueError(f"a line of {self.longest_line} bytes")
        found = (self._take(line) for line in lines)
        return [event for event in found if event is not None]

    def _take(self, line: str) -> StreamEvent | None:
        if not line:
            return self._dispatch()
        if line.startswith(":"):
            return None
        self._fields += 1
        name, _, value = line.partition(":")
        value = value.removeprefix(" ")
        if name == "event":
            self._kind = value
        elif name == "data":
            self._data += value + "\n"
        elif name == "id":
            if "\0" not in value:
                self.last_event_id = value
        elif name == "retry":
            if re.fullmatch("[0-9]+", value, re.ASCII):
                self.retry_ms = int(value)
        else:
            raise ValueError(f"the standard has no field {name!r}")
        return None

    def _dispatch(self) -> StreamEvent | None:
        kind, data, fields = self._kind, self._data, self._fields
        self._kind, self._data, self._fields = "", "", 0
        if not data:
            self.empty_blocks += 1
            return None
        assert fields
        return StreamEvent(kind or "message", data.removesuffix("\n"), self.last_event_id)
