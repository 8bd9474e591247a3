"""The HTTP/1.1 message: what a request says, and how an answer is written. No socket here, and no application.

Whatever a stranger sends is bounded and takes linear time: each byte of a head is searched once, however it drips in,
and no pattern here can match one text in two ways.
"""

from __future__ import annotations

import email.utils
import functools
import json
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Protocol

MAX_REQUEST_LINE_BYTES = 8192
MAX_HEAD_BYTES = 16384  # request line and headers
MAX_HEADERS = 100
MAX_LIST_BYTES = 1000  # of a header that is a list, such as Connection

METHODS = ("GET", "HEAD", "OPTIONS")
JSON_TYPE = "application/json"
REASON_PHRASES = {
    200: "OK",
    204: "No Content",
    400: "Bad Request",
    401: "Unauthorized",
    404: "Not Found",
    405: "Method Not Allowed",
    414: "URI Too Long",
    431: "Request Header Fields Too Large",
    500: "Internal Server Error",
    503: "Service Unavailable",
    505: "HTTP Version Not Supported",
}

_TOKEN = rb"[!#$%&'*+.^_`|~0-9A-Za-z-]+"
_HEADER_NAME = re.compile(_TOKEN)
_REQUEST_LINE = re.compile(rb"(%b) ([\x21-\x7e\x80-\xff]+) HTTP/([0-9])\.([0-9])" % _TOKEN)
_LENGTH = re.compile(rb"[0-9]{1,15}")
_ZERO_WEIGHT = re.compile(rb"q[ \t]*=[ \t]*0(\.0*)?")
_SCHEME_AND_HOST = re.compile(r"https?://[^/?#]*", re.IGNORECASE)


class QueryError(Exception):
    """A question that has no answer; becomes a JSON error with this status."""

    def __init__(self, status: int, message: str) -> None:
        super().__init__(message)
        self.status = status


class StreamsFull(QueryError):
    """There are as many readers of the stream as there may be; one who leaves makes room."""


class BadRequest(QueryError):
    """A head that is no request that can be answered: the connection is closed after the error."""


@dataclass(frozen=True)
class Request:
    """A request's head, as far as a read-only server needs it."""

    method: str
    target: str  # from the path on, whatever form it came in; or `*`
    keep_alive: bool  # whether the connection may be used again afterwards
    http_1_0: bool = False
    headers: Mapping[bytes, list[bytes]] = field(default_factory=dict)  # by lower-case name

    def header(self, name: str) -> str:
        """The last value of a header, its name in lower case, or nothing if it was not sent."""
        values = self.headers.get(name.encode())
        return values[-1].decode("latin-1") if values else ""


@dataclass(frozen=True)
class Answer:
    """One response: status, body and the media type of the body."""

    status: int
    body: bytes
    content_type: str = JSON_TYPE
    headers: tuple[str, ...] = ()  # further ones, whole lines
    held_back_s: float = 0.0  # it is sent so much later, and the connection ends with it


class Stream(Protocol):
    """An answer that goes on until its reader leaves."""

    content_type: str

    @property
    def is_large(self) -> bool:
        """Whether what is to be sent next is large, and can wait for room."""

    @property
    def pause_s(self) -> float:
        """How long to wait before the next `read`, as of the last one; less than the server can wait is at once."""

    def read(self) -> bytes:
        """What is to be sent next, or nothing if there is nothing yet; called once all before has been sent."""

    def close(self) -> None:
        """The reader is gone; twice is harmless."""


_encode_json = json.JSONEncoder(ensure_ascii=False).encode  # json.dumps would make an encoder for each answer


def json_answer(document: object, status: int = 200) -> Answer:
    """A JSON document, with a newline at its end for those who read it in a terminal."""
    return Answer(status, _encode_json(document).encode("utf-8", "replace") + b"\n")


def error_answer(status: int, message: str) -> Answer:
    """`{"error": message}`."""
    return json_answer({"error": message}, status)


class RequestBuffer:
    """Bytes go in as they come; whole heads come out.

    Lines are found one after another, from where the last search ended, so that a head that drips in byte by byte costs
    no more than one that comes at once.
    """

    def __init__(self) -> None:
        self._received = bytearray()
        self._begin_anew()

    def _begin_anew(self) -> None:
        self._lines = 0  # of the head, that have ended
        self._line_start = 0  # of the first line that has not
        self._searched = 0  # no line ends between _line_start and here

    def __len__(self) -> int:
        return len(self._received)

    def append(self, data: bytes) -> None:
        """Add what was received."""
        self._received += data

    def clear(self) -> None:
        """Forget everything."""
        self._received.clear()
        self._begin_anew()

    def extract_head(self) -> bytes | None:
        """Take the next whole head off the front, without its empty line; None if there is none yet.

        Raises BadRequest as soon as it is clear that no request comes.
        """
        received = self._received
        if not self._lines and received.startswith((b"\r", b"\n")):  # empty lines before a request are passed over
            del received[: len(received) - len(received.lstrip(b"\r\n"))]
            self._begin_anew()
        while (end := received.find(b"\n", self._searched)) >= 0:
            line = bytes(received[self._line_start : end]).removesuffix(b"\r")
            if not line:
                head = bytes(received[: self._line_start]).removesuffix(b"\n").removesuffix(b"\r")
                if len(head) > MAX_HEAD_BYTES:
                    raise _too_large_a_head()
                del received[: end + 1]
                self._begin_anew()
                return head
            if not self._lines:
                _parse_request_line(line)  # a peer that speaks no HTTP is told so at once
            elif self._lines > MAX_HEADERS:
                raise BadRequest(431, f"more than {MAX_HEADERS} headers")
            self._lines += 1
            self._line_start = self._searched = end + 1
        self._searched = len(received)
        if not self._lines and len(received) > MAX_REQUEST_LINE_BYTES + len(b"\r"):
            raise _too_long_a_line()
        if self._line_start > MAX_HEAD_BYTES + len(b"\r\n") or len(received) > MAX_HEAD_BYTES + len(b"\r\n\r\n"):
            raise _too_large_a_head()
        return None


def _too_large_a_head() -> BadRequest:
    return BadRequest(431, f"the head is larger than {MAX_HEAD_BYTES} bytes")


def _too_long_a_line() -> BadRequest:
    return BadRequest(414, f"the request line is longer than {MAX_REQUEST_LINE_BYTES} bytes")


@functools.lru_cache(64)  # each is looked at twice, and readers ask the same again and again
def _parse_request_line(line: bytes) -> tuple[str, str, bool]:
    """Method, target, and whether it is HTTP/1.0."""
    if len(line) > MAX_REQUEST_LINE_BYTES:
        raise _too_long_a_line()
    match = _REQUEST_LINE.fullmatch(line)
    if match is None:
        raise BadRequest(400, _what_is_wrong(line))
    if match[3] != b"1":
        raise BadRequest(505, "HTTP/1.1 and HTTP/1.0 are spoken here")
    try:
        target = match[2].decode()
    except UnicodeDecodeError:
        raise BadRequest(400, "the request target is no UTF-8; percent-encode it") from None
    return match[1].decode(), target, match[4] == b"0"


def _what_is_wrong(line: bytes) -> str:
    if line.startswith(b"\x16\x03"):
        return "this is TLS; only plain HTTP is spoken here"
    if not line.rpartition(b" ")[2].startswith(b"HTTP/"):
        return "this is no HTTP request"
    if line.count(b" ") > 2:
        return "a space in the request target; percent-encode it, as %20"
    return "a character in the request line that may not be there; percent-encode it"


def parse_request(head: bytes) -> Request:
    """The request in a whole head, without its empty line; raises BadRequest."""
    if head.count(b"\n") > MAX_HEADERS:
        raise BadRequest(431, f"more than {MAX_HEADERS} headers")
    line, *header_lines = head.split(b"\n")
    method, target, http_1_0 = _parse_request_line(line.removesuffix(b"\r"))
    headers: dict[bytes, list[bytes]] = {}
    for header_line in header_lines:
        name, colon, value = header_line.removesuffix(b"\r").partition(b":")
        if not colon or not _HEADER_NAME.fullmatch(name) or b"\0" in value or b"\r" in value:
            raise BadRequest(400, "a line among the headers that is no header")
        headers.setdefault(name.lower(), []).append(value.strip(b" \t"))
    if len(headers.get(b"host", ())) != 1 and not (http_1_0 and b"host" not in headers):
        raise BadRequest(400, "HTTP/1.1 needs exactly one Host header")
    # A body is not read, so that what follows on such a connection cannot be told from it.
    keep_alive = _keeps_alive(headers, http_1_0) and not _has_body(headers)
    return Request(method, _path_of(method, target), keep_alive, http_1_0, headers)


def _path_of(method: str, target: str) -> str:
    if target.startswith("/") or (target == "*" and method == "OPTIONS"):
        return target
    authority = _SCHEME_AND_HOST.match(target)
    if authority is None:
        raise BadRequest(400, "the request target is no path")
    path = target[authority.end() :]
    return path if path.startswith("/") else "/" + path


def _has_body(headers: Mapping[bytes, list[bytes]]) -> bool:
    lengths = headers.get(b"content-length")
    if lengths is None:
        return b"transfer-encoding" in headers
    if not all(map(_LENGTH.fullmatch, lengths)) or len(set(lengths)) > 1:
        raise BadRequest(400, "Content-Length is no number")
    return int(lengths[0]) > 0 or b"transfer-encoding" in headers


def _keeps_alive(headers: Mapping[bytes, list[bytes]], http_1_0: bool) -> bool:
    if b"connection" not in headers:
        return not http_1_0
    listed = b",".join(headers[b"connection"])
    if len(listed) > MAX_LIST_BYTES:
        raise BadRequest(431, f"Connection is longer than {MAX_LIST_BYTES} bytes")
    tokens = [token.strip().lower() for token in listed.split(b",")]
    return b"keep-alive" in tokens if http_1_0 else b"close" not in tokens


def accepts_gzip(request: Request) -> bool:
    """Whether a reader says that it takes a gzip body."""
    listed = b",".join(request.headers.get(b"accept-encoding", ())).lower()
    if len(listed) > MAX_LIST_BYTES:
        return False
    weights: dict[bytes, bool] = {}
    for item in listed.split(b","):
        coding, *parameters = (part.strip() for part in item.split(b";"))
        is_refused = any(_ZERO_WEIGHT.fullmatch(parameter) for parameter in parameters)
        weights[coding] = not is_refused
    return weights.get(b"gzip", weights.get(b"x-gzip", weights.get(b"*", False)))


class ResponseHeads:
    """Writes the heads of responses."""

    def __init__(self, wall_clock: Callable[[], float], idle_timeout_s: float) -> None:
        self._wall_clock = wall_clock
        self._keep_alive = ("Connection: keep-alive", f"Keep-Alive: timeout={max(1, int(idle_timeout_s))}")

    def of_answer(self, answer: Answer, length: int, *, keep_alive: bool) -> bytes:
        """The head of an answer whose body has so many bytes."""
        about_body = [f"Content-Type: {answer.content_type}", f"Content-Length: {length}"]
        connection = self._keep_alive if keep_alive else ("Connection: close",)
        # 204 has no body, and may not say how long it is.
        return self._write(answer.status, *(about_body if answer.status != 204 else ()), *answer.headers, *connection)

    def of_stream(self, stream: Stream, headers: Sequence[str], *, is_chunked: bool) -> bytes:
        """The head of an answer that ends with its connection."""
        about_body = (f"Content-Type: {stream.content_type}", "X-Accel-Buffering: no")
        chunked = ("Transfer-Encoding: chunked",) if is_chunked else ()
        return self._write(200, *about_body, *headers, "Connection: close", *chunked)

    def _write(self, status: int, *lines: str) -> bytes:
        head = (
            f"HTTP/1.1 {status} {REASON_PHRASES[status]}",
            f"Date: {_http_date(int(self._wall_clock()))}",
            "Cache-Control: no-store, no-transform",
            "X-Content-Type-Options: nosniff",
            *lines,
        )
        return ("\r\n".join(head) + "\r\n\r\n").encode("latin-1")


@functools.lru_cache(1)
def _http_date(second: int) -> str:
    return email.utils.formatdate(second, usegmt=True)
