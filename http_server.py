"""HTTP/1.1 for the query interface: one thread that never blocks, and the place where connections are bounded.

http.server was measured and left: it takes a thread a connection, has no absolute deadline a request, and writes head
and body apart, which meets Nagle's algorithm and delayed acknowledgement: 93 requests/s of 44 ms, here over 5,000.
"""

from __future__ import annotations

import contextlib
import email.utils
import errno
import logging
import re
import resource
import selectors
import socket
import time
import traceback
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Protocol

from daemon_log import OncePerMinute
from sockets import SocketLost, bind_anew, format_address, format_peer
from state_query import Answer, QueryError, error_answer
from wake_up import WakeUp

logger = logging.getLogger("elrar.http")

MAX_REQUEST_LINE_BYTES = 8192
MAX_HEAD_BYTES = 16384  # request line and headers
MAX_HEADERS = 100
MAX_CONNECTIONS = 512
RESERVE_CONNECTIONS = 32  # beyond those, for /livez, /health and /readyz only; every other request gets 503
MAX_UNSENT_BYTES = 64 * 1024 * 1024  # of answers that slow readers have not read yet
REQUEST_DEADLINE_S = 10.0  # from the first byte of a request to its last, or from connecting to the first
RESPONSE_DEADLINE_S = 30.0  # from the answer to the last byte that the reader took
LINGER_S = 1.0  # for a refused request's bytes, so that the reader sees the answer and no reset
TICK_S = 0.2
MEND_TIMEOUT_S = 1.0  # for a listening socket that was destroyed to be bound anew
TURN_S = 0.05  # of answering, before it is looked who else has come
PAUSED_AFTER_S = 2.0  # a wait for a tick that takes ten
STUCK_S = 2.0  # of taking nothing of a stream, where others wait for room
STREAM_SEND_BUFFER = 128 * 1024  # bytes that are on their way to a reader of a stream
STREAM_TICK_S = 0.002  # between two looks whether a stream has something to send
REQUESTS_A_TURN = 16  # of one connection that pipelines, before the others have their turn

HEALTH_PATHS = ("/livez", "/health", "/readyz")
_HEALTH_REQUESTS = tuple(f"{method} {path}".encode() for method in ("GET", "HEAD") for path in HEALTH_PATHS)

REASON_PHRASES = {
    200: "OK",
    204: "No Content",
    400: "Bad Request",
    404: "Not Found",
    405: "Method Not Allowed",
    414: "URI Too Long",
    431: "Request Header Fields Too Large",
    500: "Internal Server Error",
    503: "Service Unavailable",
    505: "HTTP Version Not Supported",
}

_REQUEST_LINE = re.compile(rb"([!#$%&'*+.^_`|~0-9A-Za-z-]+) ([\x21-\x7e]+) HTTP/([0-9])\.([0-9])")
_HEADER = re.compile(rb"([!#$%&'*+.^_`|~0-9A-Za-z-]+):[ \t]*([^\x00\r\n]*?)[ \t]*")
_END_OF_HEAD = re.compile(rb"\r?\n\r?\n")
_SCHEME_AND_HOST = re.compile(r"https?://[^/?#]*", re.IGNORECASE)


@dataclass(frozen=True)
class Request:
    """A request's head, as far as a read-only server needs it."""

    method: str
    target: str  # from the path on, whatever form it came in
    keep_alive: bool  # whether the connection may be used again afterwards
    http_1_0: bool = False
    last_event_id: str = ""  # where a reader of server-sent events left off


class Stream(Protocol):
    """An answer that goes on until its reader leaves."""

    content_type: str

    @property
    def is_large(self) -> bool:
        """Whether what is to be sent next is large, and can wait for room."""

    def read(self) -> bytes:
        """What is to be sent next, or nothing where there is nothing yet; asked once all before has been sent."""

    def close(self) -> None:
        """The reader is gone; twice is harmless."""


class BadRequest(Exception):
    """A head that is no request that can be answered: the connection is closed after the error."""

    def __init__(self, status: int, message: str) -> None:
        super().__init__(message)
        self.status = status


def take_head(received: bytearray) -> bytes | None:
    """Take a whole head off the front of what was received, or None where there is none yet; raises BadRequest."""
    start = len(received) - len(received.lstrip(b"\r\n"))  # empty lines before a request are passed over
    del received[:start]
    line_end = received.find(b"\n")
    line = received[: line_end if line_end >= 0 else MAX_REQUEST_LINE_BYTES + 2].removesuffix(b"\r")
    if len(line) > MAX_REQUEST_LINE_BYTES:
        raise BadRequest(414, f"the request line is longer than {MAX_REQUEST_LINE_BYTES} bytes")
    end = _END_OF_HEAD.search(received)
    if (end.start() if end else len(received)) > MAX_HEAD_BYTES:
        raise BadRequest(431, f"the head is larger than {MAX_HEAD_BYTES} bytes")
    if end is None:
        if line_end >= 0:
            _request_line(bytes(line))  # what is no HTTP is told so at once
        return None
    head = bytes(received[: end.start()])
    del received[: end.end()]
    return head


def _request_line(line: bytes) -> tuple[str, str, bool]:
    match = _REQUEST_LINE.fullmatch(line)
    if match is None:
        raise BadRequest(400, "this is no HTTP request")
    if match[3] != b"1":
        raise BadRequest(505, "HTTP/1.1 and HTTP/1.0 are spoken here")
    return match[1].decode(), match[2].decode(), match[4] == b"0"


def parse_head(head: bytes) -> Request:
    """The request in a whole head, without its empty line; raises BadRequest."""
    line, *header_lines = head.split(b"\n")
    method, target, http_1_0 = _request_line(line.removesuffix(b"\r"))
    if len(header_lines) > MAX_HEADERS:
        raise BadRequest(431, f"more than {MAX_HEADERS} headers")
    headers: dict[bytes, list[bytes]] = {}
    for header_line in header_lines:
        match = _HEADER.fullmatch(header_line.removesuffix(b"\r"))
        if match is None:
            raise BadRequest(400, "a header that is none")
        headers.setdefault(match[1].lower(), []).append(match[2])
    if len(headers.get(b"host", [])) != 1 and not (http_1_0 and b"host" not in headers):
        raise BadRequest(400, "HTTP/1.1 needs exactly one Host header")
    if not target.startswith("/") and method != "OPTIONS":
        authority = _SCHEME_AND_HOST.match(target)
        if authority is None:
            raise BadRequest(400, "the request target is no path")
        target = target[authority.end() :]
        if not target.startswith("/"):
            target = "/" + target
    lengths = headers.get(b"content-length", [b"0"])
    if not all(re.fullmatch(rb"[0-9]{1,15}", length) for length in lengths) or len(set(lengths)) > 1:
        raise BadRequest(400, "Content-Length is no number")
    tokens = {token.strip().lower() for value in headers.get(b"connection", []) for token in value.split(b",")}
    # A body is not read, so that what follows on such a connection cannot be told from it.
    has_body = int(lengths[0]) > 0 or b"transfer-encoding" in headers
    keep_alive = not has_body and (b"keep-alive" in tokens if http_1_0 else b"close" not in tokens)
    last_event_id = headers.get(b"last-event-id", [b""])[-1].decode("latin-1")
    return Request(method, target, keep_alive, http_1_0, last_event_id)


_IDLE, _READING, _WRITING, _LINGERING, _STREAMING = range(5)


class _Connection:
    __slots__ = (
        "chunked", "deadline", "keep_alive", "peer", "phase", "queued", "received", "reserve", "sock", "unsent",
        "unsent_bytes",
    )  # fmt: skip

    def __init__(self, sock: socket.socket, peer: str, deadline: float, reserve: bool) -> None:
        self.sock = sock
        self.peer = peer
        self.deadline = deadline
        self.reserve = reserve  # beyond MAX_CONNECTIONS
        self.phase = _READING
        self.queued = False  # waits for its turn to be answered
        self.keep_alive = True
        self.chunked = False  # a stream goes out in chunks
        self.received = bytearray()
        self.unsent: list[memoryview] = []
        self.unsent_bytes = 0  # of the answer, when it was made


class HttpServer:
    """Answers GET and HEAD until it is stopped; the gateway gives it its thread.

    `run` and `step` belong to that thread; `stop` and reading the counters may be done from any.
    """

    def __init__(
        self,
        listeners: Sequence[socket.socket],
        answer: Callable[[str, str], Answer | Stream],
        *,
        max_connections: int | None = None,
        idle_timeout_s: float = 650.0,
        clock: Callable[[], float] = time.monotonic,
        wall_clock: Callable[[], float] = time.time,
    ) -> None:
        self._listeners = {listener: listener.getsockname() for listener in listeners}  # and what each is bound to
        self._answer_target = answer
        self._idle_timeout_s = idle_timeout_s  # between two requests on a connection
        self._max_connections = max_connections or _connections_that_fit()
        self._clock = clock
        self._wall_clock = wall_clock
        self._selector = selectors.DefaultSelector()
        self._turn = WakeUp()
        self._selector.register(self._turn, selectors.EVENT_READ)
        self._accepting = False
        self._start_accepting()
        self._accept_again_at = 0.0
        self._connections: set[_Connection] = set()
        self._streaming: dict[_Connection, Stream] = {}
        self._stream_at = 0.0
        self._queue: deque[_Connection] = deque()  # have asked something, and wait for their turn
        self._unsent_bytes = 0
        self._look_at_deadlines_at = 0.0
        self._refusing = self._stopping = False
        self._notice = OncePerMinute(clock)
        self._bugs = OncePerMinute(clock)
        self._destroyed = OncePerMinute(clock)
        self._date = (0, "")
        # Written by this thread only; readers may be a request behind.
        self.requests = 0
        self.rejected_connections = 0
        self.moved_at = clock()
        self.resumed_at = float("-inf")  # monotonic; when a wait was much too long: the process was paused

    @property
    def connections(self) -> int:
        """How many connections are open."""
        return len(self._connections)

    def run(self) -> None:
        """Answer until `stop` is called, then finish the answers that were begun, for half a second at most."""
        while not self._stopping:
            self.step(TICK_S)
        self._stop_listening()
        deadline = self._clock() + 0.5
        for connection in list(self._connections):
            if connection.phase != _WRITING:
                self._close(connection)
        while self._connections and self._clock() < deadline:
            self.step(0.05)

    def refuse_new(self) -> None:
        """Let go of the port, and go on answering those who are connected; from any thread, twice is harmless."""
        self._refusing = True
        self._turn.ring()

    def stop(self) -> None:
        """Make `run` return; from any thread, twice is harmless."""
        self._stopping = True
        self._turn.ring()

    def close(self) -> None:
        """Close every socket; only after `run` has returned."""
        for connection in list(self._connections):
            self._close(connection)
        self.abandon()

    def abandon(self) -> None:
        """Close the descriptors and nothing else: in a forked child, where the connections are its parent's."""
        self._selector.close()
        for sock in (*(c.sock for c in self._connections), *self._listeners):
            sock.close()

    def step(self, wait_s: float) -> None:
        """One turn: wait for at most `wait_s`, and do what can be done without waiting."""
        for key, _ in self._wait(wait_s):
            if key.fileobj in self._listeners:
                self._accept(key.fileobj)
            elif key.fileobj is self._turn:
                self._turn.take()
                if self._refusing:
                    self._stop_listening()
                    self._end_streams()
            elif key.data in self._connections:  # it may have been closed to make room, in this very turn
                self._ready(key.data)
        turn_ends_at = self._clock() + TURN_S
        for _ in range(len(self._queue)):
            connection = self._queue.popleft()
            connection.queued = False
            if connection in self._connections:
                self._serve(connection)
            if self._clock() > turn_ends_at:
                break  # see first who else has come, and whether somebody asks for health
        now = self._clock()
        if self._streaming and now >= self._stream_at:
            self._stream_at = now + STREAM_TICK_S
            for connection in list(self._streaming):
                self._go_on(connection)
                if self._clock() > now + TURN_S:
                    self._stream_at = now  # the others' turn comes as soon as it has been looked who else has come
                    break
        if now >= self._look_at_deadlines_at:
            self._look_at_deadlines_at = now + TICK_S
            for connection in [c for c in self._connections if c.deadline <= now]:
                self._overdue(connection)
            if self._unsent_bytes > MAX_UNSENT_BYTES // 2:
                self._cut_off_stuck_streams(now)
            self._say()
            if not self._accepting and not self._refusing and not self._stopping and now >= self._accept_again_at:
                self._start_accepting()

    def _wait(self, wait_s: float) -> list[tuple[selectors.SelectorKey, int]]:
        asked_at = self._clock()
        if self._streaming:
            wait_s = min(wait_s, max(0.0, self._stream_at - asked_at))
        ready = self._selector.select(0 if self._queue else wait_s)
        self.moved_at = self._clock()
        if self.moved_at - asked_at > PAUSED_AFTER_S:
            self.resumed_at = self.moved_at
        return ready

    def _overdue(self, connection: _Connection) -> None:
        if connection.phase in (_READING, _WRITING, _STREAMING):
            self._reject("too slow", connection)
        self._close(connection)

    def _reject(self, why: str, connection: _Connection | None = None) -> None:
        self.rejected_connections += 1
        if self._notice.add():
            self._notice.example(why if connection is None else f"{why} peer={connection.peer}")
        self._say()

    def _say(self) -> None:
        for level, what, notice in (
            (logging.WARNING, "turned away or cut off connections", self._notice),
            (logging.ERROR, "could not answer requests", self._bugs),
            (logging.WARNING, "listening sockets were destroyed, and are bound anew", self._destroyed),
        ):
            said = notice.due()
            if said is not None:
                logger.log(level, "%s %s", what, said)

    def _bug(self, what: str) -> None:
        if self._bugs.add():
            self._bugs.example(f"{what}\n{traceback.format_exc()}")
        self._say()

    def _accept(self, listener: socket.socket) -> None:
        for _ in range(64):
            try:
                sock, peer = listener.accept()
            except BlockingIOError:
                return
            except OSError as error:
                if error.errno in (errno.EMFILE, errno.ENFILE, errno.ENOBUFS, errno.ENOMEM):
                    self._reject(f"cannot accept: {error.strerror}")
                    if not self._make_room(reserve=False):
                        self._stop_accepting()  # the socket stays readable, and this would be a busy loop
                    return
                if not listener.getsockopt(socket.SOL_SOCKET, socket.SO_ACCEPTCONN):
                    self._bind_anew(listener, error)
                    return
                continue  # the peer was gone before it was accepted
            sock.setblocking(False)
            sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
            reserve = len(self._connections) >= self._max_connections and not self._make_room(reserve=False)
            most = self._max_connections + RESERVE_CONNECTIONS
            if len(self._connections) >= most and not self._make_room(reserve=True):
                self._reject("too many connections")
                sock.close()
                continue
            deadline = self._clock() + (LINGER_S if reserve else REQUEST_DEADLINE_S)
            connection = _Connection(sock, format_peer(peer), deadline, reserve)
            self._connections.add(connection)
            self._selector.register(sock, selectors.EVENT_READ, connection)
            self._ready(connection)  # its request has often come with it

    def _bind_anew(self, listener: socket.socket, error: OSError) -> None:
        """Have a listening socket that was destroyed (`ss -K`) listen again; raises SocketLost if it cannot."""
        name = self._listeners[listener]
        self._stop_accepting()  # the selector has to let go of what is replaced
        give_up_at = time.monotonic() + MEND_TIMEOUT_S
        while True:
            try:
                bind_anew(listener, name)
                break
            except OSError as failed:
                if time.monotonic() > give_up_at:
                    raise SocketLost("TCP", name, failed) from failed
                time.sleep(0.02)
        self._start_accepting()
        if self._destroyed.add():
            self._destroyed.example(f"TCP {format_address(*name[:2])}: {error.strerror}")

    def _start_accepting(self) -> None:
        for listener in self._listeners:
            self._selector.register(listener, selectors.EVENT_READ)
        self._accepting = True

    def _stop_accepting(self) -> None:
        if self._accepting:
            for listener in self._listeners:
                self._selector.unregister(listener)
            self._accepting = False
        self._accept_again_at = self._clock() + TICK_S

    def _stop_listening(self) -> None:
        self._refusing = True
        self._stop_accepting()
        for listener in self._listeners:
            listener.close()

    def _make_room(self, *, reserve: bool) -> bool:
        """Close a connection that waits for its reader to ask something; False where none can be spared.

        First the oldest that never asked anything, then the one that has been idle for longest, then the slowest that
        is in the middle of asking, though not within its first half second.
        """
        waiting = [c for c in self._connections if c.phase not in (_WRITING, _STREAMING) and c.reserve == reserve]
        if not waiting:
            return False
        spared = min(waiting, key=lambda c: (bool(c.received), c.phase == _IDLE, c.deadline))
        if spared.received and spared.deadline > self._clock() + REQUEST_DEADLINE_S - 0.5:
            return False
        if spared.phase == _READING:
            self._reject("too many connections, the longest without a whole request was closed", spared)
        self._close(spared)
        return True

    def _ready(self, connection: _Connection) -> None:
        try:
            if connection.phase == _WRITING:
                self._send(connection)
                if connection.phase == _READING:
                    self._enqueue(connection)
                return
            if connection.phase == _STREAMING and connection.unsent:
                self._send(connection)
                return
            if len(connection.received) > 2 * MAX_HEAD_BYTES:
                return  # it pipelines faster than it is answered: its turn comes before more is read
            data = connection.sock.recv(65536)
        except BlockingIOError:
            return
        except OSError:
            self._close(connection)
            return
        if not data:
            self._peer_is_done(connection)
        elif connection.phase not in (_LINGERING, _STREAMING):
            if connection.phase == _IDLE:
                connection.phase = _READING
                connection.deadline = self._clock() + REQUEST_DEADLINE_S
            connection.received += data
            if connection.received.startswith(_HEALTH_REQUESTS):
                self._serve(connection)
            else:
                self._enqueue(connection)

    def _peer_is_done(self, connection: _Connection) -> None:
        """The reader sends no more: answer the whole requests that it has sent, then close."""
        while connection.phase == _READING and connection.received:
            unserved = len(connection.received)
            self._serve(connection)
            if len(connection.received) == unserved:
                break
        if connection.phase != _WRITING and connection in self._connections:
            self._close(connection)

    def _go_on(self, connection: _Connection) -> None:
        """Send what a stream has, where its reader has taken all before, and where there is room for it."""
        stream = self._streaming[connection]
        if connection.unsent or (stream.is_large and self._unsent_bytes > MAX_UNSENT_BYTES // 2):
            return
        self._streaming[connection] = self._streaming.pop(connection)  # to the end: the others come first next time
        try:
            text = stream.read()
        except Exception:
            self._bug("a stream")
            self._close(connection)
            return
        if text:
            connection.deadline = self._clock() + RESPONSE_DEADLINE_S
            self._send_all(connection, [b"%x\r\n" % len(text), text, b"\r\n"] if connection.chunked else [text])

    def _cut_off_stuck_streams(self, now: float) -> None:
        """Others wait for the room that these take: they are not given the whole RESPONSE_DEADLINE_S."""
        for connection in list(self._streaming):
            if connection.unsent and connection.deadline < now + RESPONSE_DEADLINE_S - STUCK_S:
                self._reject("took nothing of its stream while others waited for room", connection)
                self._close(connection)

    def _end_streams(self) -> None:
        for connection in list(self._streaming):
            if connection.chunked and not connection.unsent:
                with contextlib.suppress(OSError):
                    connection.sock.send(b"0\r\n\r\n")  # so that it ends, and does not break off
            self._close(connection)

    def _serve(self, connection: _Connection) -> None:
        """Answer the requests that have been received whole, as long as their answers are taken."""
        for _ in range(REQUESTS_A_TURN):
            if connection.phase not in (_IDLE, _READING):
                return
            try:
                head = take_head(connection.received)
                if head is None:
                    return
                request = parse_head(head)
            except BadRequest as error:
                refusal = error_answer(error.status, str(error))
                self._respond(connection, Request("GET", "", keep_alive=False), refusal)
                return
            answer = self._answer(connection, request)
            if isinstance(answer, Answer):
                self._respond(connection, request, answer)
            else:
                self._begin_stream(connection, request, answer)
        if connection.received and connection in self._connections:
            self._enqueue(connection)

    def _enqueue(self, connection: _Connection) -> None:
        if not connection.queued:
            connection.queued = True
            self._queue.append(connection)

    def _answer(self, connection: _Connection, request: Request) -> Answer | Stream:
        if request.method not in ("GET", "HEAD"):
            refusal = error_answer(405, "this is read-only: GET and HEAD are answered")
            return replace(refusal, headers=("Allow: GET, HEAD",))
        if request.target.partition("?")[0] not in HEALTH_PATHS:
            if connection.reserve:
                self._reject("too many connections")
                return error_answer(503, f"more than {self._max_connections} connections")
            while self._unsent_bytes > MAX_UNSENT_BYTES:
                slowest = min((c for c in self._connections if c.unsent), key=lambda c: c.deadline)
                self._reject("too many answers wait for slow readers, the slowest was cut off", slowest)
                self._close(slowest)
        try:
            return self._answer_target(request.target, request.last_event_id)
        except QueryError as error:
            return error_answer(error.status, str(error))
        except Exception:
            self._bug(f"target={request.target!r}")
            return error_answer(500, "this question met an error in the gateway, which is in its log")

    def _respond(self, connection: _Connection, request: Request, answer: Answer) -> None:
        self.requests += 1
        connection.keep_alive = request.keep_alive and not connection.reserve
        lines = [f"Content-Length: {len(answer.body)}", *answer.headers]
        if not connection.keep_alive:
            lines.append("Connection: close")
        elif request.http_1_0:
            lines.append("Connection: keep-alive")
        head = self._head(answer.status, answer.content_type, lines)
        connection.phase = _WRITING
        connection.deadline = self._clock() + RESPONSE_DEADLINE_S
        self._send_all(connection, [head] if request.method == "HEAD" or not answer.body else [head, answer.body])

    def _begin_stream(self, connection: _Connection, request: Request, stream: Stream) -> None:
        """Send the head; the rest follows for as long as the reader stays, and the connection ends with it."""
        self.requests += 1
        connection.keep_alive = False
        lines = ["Connection: close", "X-Accel-Buffering: no"]
        # Where nothing says how much has come, urllib3 and requests wait until their buffers are full: up to 64 KiB.
        connection.chunked = not request.http_1_0
        if connection.chunked:
            lines.append("Transfer-Encoding: chunked")
        head = self._head(200, stream.content_type, lines)
        if request.method == "HEAD":
            stream.close()
            connection.phase = _WRITING
        else:
            connection.phase = _STREAMING
            connection.received.clear()
            # What has been handed to the kernel cannot be replaced by newer any more: 4 MB of it would be a minute old.
            with contextlib.suppress(OSError):  # the reader may be gone, which some systems tell here already
                connection.sock.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, STREAM_SEND_BUFFER)
            self._streaming[connection] = stream
            self._stream_at = 0.0
        connection.deadline = self._clock() + RESPONSE_DEADLINE_S
        self._send_all(connection, [head])

    def _head(self, status: int, content_type: str, lines: Sequence[str]) -> bytes:
        second = int(self._wall_clock())
        if self._date[0] != second:
            self._date = (second, email.utils.formatdate(second, usegmt=True))
        head = (
            f"HTTP/1.1 {status} {REASON_PHRASES[status]}",
            f"Content-Type: {content_type}",
            f"Date: {self._date[1]}",
            "Cache-Control: no-store, no-transform",
            "X-Content-Type-Options: nosniff",
            *lines,
        )
        return ("\r\n".join(head) + "\r\n\r\n").encode("latin-1")

    def _send_all(self, connection: _Connection, parts: Sequence[bytes]) -> None:
        connection.unsent = [memoryview(part) for part in parts]
        connection.unsent_bytes = sum(map(len, parts))
        self._unsent_bytes += connection.unsent_bytes
        try:
            self._send(connection)
        except OSError:
            self._close(connection)

    def _send(self, connection: _Connection) -> None:
        """Send what the socket takes, head and body in one write; raises OSError where the reader is gone."""
        try:
            while connection.unsent:
                sent = connection.sock.sendmsg(connection.unsent)
                while connection.unsent and sent >= len(connection.unsent[0]):
                    sent -= len(connection.unsent[0])
                    del connection.unsent[0]
                if connection.unsent:
                    connection.unsent[0] = connection.unsent[0][sent:]
                    if connection.phase == _STREAMING:
                        connection.deadline = self._clock() + RESPONSE_DEADLINE_S  # it reads, however slowly
        except BlockingIOError:
            self._wait_for(connection, selectors.EVENT_WRITE)
            return
        self._unsent_bytes -= connection.unsent_bytes
        connection.unsent_bytes = 0
        self._wait_for(connection, selectors.EVENT_READ)
        now = self._clock()
        if connection.phase == _STREAMING:
            connection.deadline = float("inf")
        elif connection.keep_alive and not self._stopping:
            connection.phase = _READING if connection.received else _IDLE
            connection.deadline = now + (REQUEST_DEADLINE_S if connection.received else self._idle_timeout_s)
        else:
            # Closing with bytes unread would reset the connection and could take the answer from the reader.
            connection.phase = _LINGERING
            connection.deadline = now + LINGER_S
            connection.received.clear()
            connection.sock.shutdown(socket.SHUT_WR)

    def _wait_for(self, connection: _Connection, event: int) -> None:
        if self._selector.get_key(connection.sock).events != event:
            self._selector.modify(connection.sock, event, connection)

    def _close(self, connection: _Connection) -> None:
        self._connections.discard(connection)
        stream = self._streaming.pop(connection, None)
        if stream is not None:
            stream.close()
        self._unsent_bytes -= connection.unsent_bytes
        connection.unsent_bytes = 0
        self._selector.unregister(connection.sock)
        connection.sock.close()


def _connections_that_fit() -> int:
    """MAX_CONNECTIONS, or fewer where the process may not open so many files."""
    files, _ = resource.getrlimit(resource.RLIMIT_NOFILE)
    if files == resource.RLIM_INFINITY:
        return MAX_CONNECTIONS
    return max(8, min(MAX_CONNECTIONS, files - RESERVE_CONNECTIONS - 32))
