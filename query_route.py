"""A path of the query interface, the parameters that it knows, and what is asked with them."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

from http_message import JSON_TYPE, QueryError

MAX_PARAMETERS = 1000  # a request line has room for 744 of `engine_id=`
MAX_INTERVAL_MS = 3_600_000
MAX_TIME_MS = 2**53  # since the epoch; as for the times that engines send


@dataclass(frozen=True)
class Question:
    """What is asked of a path: its parameters, decoded, and what a reader of /watch says that it was sent last."""

    parameters: dict[str, list[str]]
    last_event_id: str = ""

    def engine_ids(self) -> tuple[str, ...]:
        """The values of `engine_id`, each once; raises QueryError for an empty one: a script's unset variable."""
        engine_ids = tuple(dict.fromkeys(self.parameters.get("engine_id", ())))
        if "" in engine_ids:
            raise QueryError(400, "engine_id is empty; leave it out to ask for every engine")
        return engine_ids

    def engine_id(self) -> str:
        """The one engine that is asked for; raises QueryError if it is none or several."""
        if len(self.parameters.get("engine_id", ())) != 1:
            raise QueryError(400, "exactly one engine_id is needed, as in ?engine_id=http%3A%2F%2Fhost%3A8000")
        return self.engine_ids()[0]

    def since_ms(self) -> int:
        """The value of `since`, 0 if it is not given; raises QueryError if it is no time."""
        since = self.parameters.get("since", ("0",))
        if len(since) != 1 or not re.fullmatch("[0-9]{1,16}", since[0]) or int(since[0]) > MAX_TIME_MS:
            raise QueryError(
                400, f"since is a time_ms: a whole number of milliseconds since the epoch, {MAX_TIME_MS} at most"
            )
        return int(since[0])

    def among(self, name: str, values: tuple[str, ...]) -> list[str]:
        """The values of a parameter that has to be one of a few; raises QueryError if one is not."""
        wanted = self.parameters.get(name, [])
        if any(value not in values for value in wanted):
            raise QueryError(400, f"{name} is {listed(values, 'or')}")
        return wanted


@dataclass(frozen=True)
class Parameter:
    """What a parameter means, wherever a path knows it."""

    name: str
    meaning: str
    schema: dict[str, Any]
    is_repeatable: bool = False

    def document(self) -> dict[str, Any]:
        """What OpenAPI says of it."""
        return {"name": self.name, "description": self.meaning, "schema": self.schema}


@dataclass(frozen=True)
class Route:
    """One path: what answers it, and the parameters that it knows."""

    path: str  # <engine_id> stands for a percent-encoded id
    function: Callable[[Any, Question], Any]
    answers: str  # what it answers, in one line
    parameters: tuple[str, ...] | None = ()  # None = any, which are passed over
    required: tuple[str, ...] = ()
    schema: str = ""  # of a JSON answer, in openapi_document.py
    media_type: str = JSON_TYPE
    is_probe: bool = False  # answered before everything else, and also if there is no place for more connections


def parse_query(query: str, route: Route) -> dict[str, list[str]]:
    """The decoded values of each parameter; raises QueryError if the route does not know one of them.

    All is decoded at once, because a request line has room for a thousand names and values, and a call for each takes
    over a millisecond. UTF-8 has neither 0xFE nor 0xFF, which stand for the separators meanwhile.
    """
    if query.count("&") >= MAX_PARAMETERS:
        raise QueryError(400, f"more than {MAX_PARAMETERS} parameters")
    if _NEVER_IN_UTF_8.search(query):
        raise _no_utf_8()
    parameters: dict[str, list[str]] = {}
    known = route.parameters or ()
    for part in _percent_decoded(query.replace("+", " ").replace("=", "%FE").replace("&", "%FF")).split(b"\xff"):
        if not part:
            continue
        encoded_name, _, encoded_value = part.partition(b"\xfe")
        name, value = _text(encoded_name), _text(encoded_value.replace(b"\xfe", b"="))
        if name not in known:
            knows = f"the parameters {listed(known)}" if known else "no parameters"
            raise QueryError(400, f"an unknown parameter: {route.path} knows {knows}")
        parameters.setdefault(name, []).append(value)
    return parameters


_NO_ESCAPE = re.compile("%(?![0-9A-Fa-f]{2})")
_NEVER_IN_UTF_8 = re.compile("%[Ff][EFef]")


def decode(text: str) -> str:
    """Percent-decoding, in linear time; raises QueryError."""
    return _text(_percent_decoded(text)) if "%" in text else text


def _percent_decoded(text: str) -> bytes:
    """The bytes that a text with escapes stands for.

    `%41` is written as `\\x41`, which a codec decodes: a fifth of the time that urllib.parse takes for each escape.
    """
    if _NO_ESCAPE.search(text):
        raise QueryError(400, "a % that no two hexadecimal digits follow; a % itself is written %25")
    encoded = text.encode().replace(b"\\", b"%5C").replace(b"%", b"\\x")
    return encoded.decode("unicode_escape").encode("latin-1")


def _text(decoded: bytes) -> str:
    try:
        return decoded.decode()
    except UnicodeDecodeError:
        raise _no_utf_8() from None


def _no_utf_8() -> QueryError:
    return QueryError(400, "what is percent-encoded is no UTF-8")


def listed(names: Iterable[str], word: str = "and") -> str:
    """Names as a sentence has them."""
    *most, last = names
    return f"{', '.join(most)} {word} {last}" if most else last
