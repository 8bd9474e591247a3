"""HTTP/1.1 for the query interface: one thread that never blocks, and the place where connections are bounded.

http.server was measured and left: it takes a thread a connection, has no absolute deadline a request, and writes head
and body apart, which meets Nagle's algorithm and delayed acknowledgement: 93 requests/s of 44 ms, here over 5,000.

One turn of the loop: read what has come, answer whole requests network by network, send what streams have, then look
for who is late. Nobody is called late for what had arrived by then: deadlines are held against the moment before the
sockets were looked at, so that a pause of this process is not blamed on its readers.
"""

from __future__ import annotations

import errno
import logging
import resource
import selectors
import socket
import time
import traceback
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any, Protocol

from gzip_answers import MIN_GZIP_BYTES, GzipQueue
from http_message import Answer, BadRequest, Request, ResponseHeads, Stream, StreamsFull, accepts_gzip, error_answer
from log_throttle import LogThrottle
from query_connection import RESERVE_CONNECTIONS, RESPONSE_DEADLINE_S, Connection, Phase, Places, TurnQueue
from sockets import SocketLost, bind_anew, format_address
from wake_up import WakeUp

logger = logging.getLogger("elrar.http")

MAX_CONNECTIONS = 512
MAX_UNSENT_BYTES = 64 * 1024 * 1024  # of answers that slow readers have not read yet
TICK_S = 0.2
MEND_TIMEOUT_S = 1.0  # for a listening socket that was destroyed to be bound anew
TURN_S = 0.05  # of answering, before new connections and probes are looked for again
CONNECTION_TURN_S = 0.005  # of answering one connection that pipelines
MAX_REQUESTS_PER_TURN = 16  # of one connection
MAX_ACCEPTED_PER_TURN = 64
STUCK_S = 2.0  # of taking nothing of a stream, if others wait for room
LATE_READER_S = 1.0  # for one that is late and goes on taking: so much more, again and again
STREAM_SEND_BUFFER = 128 * 1024  # bytes: what the kernel has of a stream cannot be replaced by newer; 4 MB are a minute
STREAM_TICK_S = 0.002  # between two looks whether a stream has something to send

# Why connections are turned away or cut off: each reason is a counter of /stats.
REJECTIONS = {
    "slow_request": "a request was not whole 10 s after its first byte",
    "slow_reader": "nothing of a stream, or not the whole of an answer, was taken for 30 s",
    "no_place": "every place for a connection was taken by others that were being answered",
    "made_room": "a request that had begun, or a stream of who has most, ended because another needed the place",
    "unread_answers": "more than 64 MiB of answers waited for slow readers, and this was the oldest",
    "unread_stream": "nothing of a stream was taken for 2 s while others waited for room",
    "no_descriptor": "the process or the system has no more descriptors or memory for connections",
}


class Application(Protocol):
    """What the server serves."""

    def respond(self, request: Request, network: str) -> Answer | Stream:
        """Answer a request of that network, also one that cannot be answered; for one thread at a time.

        Raises StreamsFull if a stream would have to end for it.
        """

    def headers_for(self, request: Request) -> tuple[str, ...]:
        """Header lines that any answer to this request has, one that the server makes too."""

    def is_probe(self, request: Request) -> bool:
        """Whether it is answered before all others, and also if there is no place for more connections."""

    def may_go_on(self, request: Request) -> bool:
        """Whether the reader of the stream that this request was answered with may still read."""


class Counters:
    """Counts what was answered and who was turned away, and says what is wrong, each once a minute.

    Written by the server's thread only; who reads them from another may be a request behind.
    """

    def __init__(self, clock: Callable[[], float]) -> None:
        self.requests = 0
        self.closed_idle = 0  # connections that asked nothing, closed to make room
        self.unauthorized = 0  # requests without a token that may read
        self.rejections = dict.fromkeys(REJECTIONS, 0)
        self._notice = LogThrottle(logger, logging.WARNING, "turned away or cut off connections", clock=clock)
        self._bugs = LogThrottle(logger, logging.ERROR, "could not answer requests", clock=clock)
        self._destroyed = LogThrottle(
            logger, logging.WARNING, "listening sockets were destroyed, and are bound anew", clock=clock
        )

    def reject(self, reason: str, what: str) -> None:
        """Count a connection that was turned away or cut off; `what` says who, or why."""
        self.rejections[reason] += 1
        self._notice.record("%s %s", reason, what)
        self.flush()

    def record_bug(self, what: str) -> None:
        """Keep the traceback of the exception that is being handled."""
        self._bugs.record("%s\n%s", what, traceback.format_exc())
        self.flush()

    def record_destroyed(self, what: str) -> None:
        """Note a listening socket that was destroyed from outside."""
        self._destroyed.record("%s", what)
        self.flush()

    def flush(self) -> None:
        """Log what is due."""
        for notice in (self._notice, self._bugs, self._destroyed):
            notice.flush()


class Acceptor:
    """The listening sockets; they are not looked at for a while if no more connections can be accepted."""

    def __init__(self, listeners: Sequence[socket.socket], selector: selectors.BaseSelector) -> None:
        self.listeners = {listener: listener.getsockname() for listener in listeners}  # and what each is bound to
        self._selector = selector
        self._is_registered = False
        self._register()
        self._again_at = 0.0
        self.is_closed = False

    def _register(self) -> None:
        for listener in self.listeners:
            self._selector.register(listener, selectors.EVENT_READ)
        self._is_registered = True

    def pause(self, until: float) -> None:
        """Leave connections in the kernel's queue for a while; to look at a readable socket would be a busy loop."""
        if self._is_registered:
            for listener in self.listeners:
                self._selector.unregister(listener)
            self._is_registered = False
        self._again_at = until

    def resume(self, now: float) -> None:
        """Accept again, if it is time."""
        if not self._is_registered and not self.is_closed and now >= self._again_at:
            self._register()

    def bind_anew(self, listener: socket.socket) -> str:
        """Have a socket that was destroyed (`ss -K`) listen again, and return its address; raises SocketLost."""
        name = self.listeners[listener]
        self.pause(0.0)  # the selector has to let go of what is replaced
        give_up_at = time.monotonic() + MEND_TIMEOUT_S
        while True:
            try:
                bind_anew(listener, name)
                break
            except OSError as failed:
                if time.monotonic() > give_up_at:
                    raise SocketLost("TCP", name, failed) from failed
                time.sleep(0.02)
        self._register()
        return f"TCP {format_address(*name[:2])}"

    def close(self) -> None:
        """Let go of the port; twice is harmless."""
        self.pause(float("inf"))
        self.is_closed = True
        self.close_descriptors()

    def close_descriptors(self) -> None:
        """Close the sockets and nothing else."""
        for listener in self.listeners:
            listener.close()


class StreamTurns:
    """The connections that stream, in the order of their turns."""

    def __init__(self) -> None:
        self._connections: dict[Connection, float] = {}  # and when to look again whether it has something to send
        self._requests: dict[Connection, Request] = {}  # what each was asked with
        self.next_at = 0.0  # monotonic; when to look at the first of them again

    def __bool__(self) -> bool:
        return bool(self._connections)

    def __iter__(self) -> Iterator[Connection]:
        return iter(list(self._connections))

    def add(self, connection: Connection, request: Request) -> None:
        """Add one, whose turn comes at once."""
        self._connections[connection] = 0.0
        self._requests[connection] = request
        self.next_at = 0.0

    def due(self, now: float) -> list[Connection]:
        """Those whose time has come."""
        return [connection for connection, again_at in self._connections.items() if again_at <= now]

    def put_last(self, connection: Connection, again_at: float) -> None:
        """Have the others come first next time, and this one not before then."""
        if self._connections.pop(connection, None) is not None:  # it may have been closed
            self._connections[connection] = again_at

    def find_next(self, earliest: float) -> None:
        """Look at the first of them again when its time comes, but not before `earliest`."""
        self.next_at = max(earliest, min(self._connections.values(), default=0.0))

    def discard(self, connection: Connection) -> None:
        """Remove one, if it is there."""
        self._connections.pop(connection, None)
        self._requests.pop(connection, None)

    def find_refused(self, may_go_on: Callable[[Request], bool]) -> list[Connection]:
        """Those whose requests would be refused now."""
        return [connection for connection, request in self._requests.items() if not may_go_on(request)]

    def find_spare(self, network: str) -> Connection | None:
        """The stream that ends for a new one of that network: of the network with most, if that has two more."""
        counts = Counter(connection.network for connection in self._connections)
        most = max(counts, key=lambda name: counts[name], default=network)
        if counts[most] < counts[network] + 2:
            return None
        return next(connection for connection in self._connections if connection.network == most)


@dataclass
class _Answered:
    """A connection and the answer that it gets."""

    connection: Connection
    answer: Answer
    keep_alive: bool
    head_only: bool

    def use_gzip(self, gzipped: bytes) -> None:
        """Have the compressed body sent instead."""
        headers = (*self.answer.headers, "Content-Encoding: gzip")
        self.answer = replace(self.answer, body=gzipped, headers=headers)


class QueryServer:
    """Answers until it is stopped; the gateway gives it its thread.

    `run` and `step` belong to that thread; `stop` and reading the counters may be done from any.
    """

    def __init__(
        self,
        listeners: Sequence[socket.socket],
        application: Application,
        *,
        max_connections: int | None = None,
        idle_timeout_s: float = 650.0,
        clock: Callable[[], float] = time.monotonic,
        wall_clock: Callable[[], float] = time.time,
    ) -> None:
        self._application = application
        self._clock = clock
        self._heads = ResponseHeads(wall_clock, idle_timeout_s)
        self._selector = selectors.DefaultSelector()
        self._wakeup = WakeUp()
        self._selector.register(self._wakeup, selectors.EVENT_READ)
        self._acceptor = Acceptor(listeners, self._selector)
        self._places = Places(max_connections or _connections_that_fit(), idle_timeout_s)
        self._queue = TurnQueue()
        self._gzip_queue: GzipQueue[_Answered] = GzipQueue()
        self._streams = StreamTurns()
        self._judge_at = 0.0  # monotonic; when to look for who is late
        self._refusing = self._stopping = False
        self._counters = Counters(clock)
        self.last_progress_at = clock()

    @property
    def connections(self) -> int:
        """How many connections are open; from any thread."""
        return len(self._places)

    def counters(self) -> dict[str, Any]:
        """What /stats says of it; from any thread."""
        counters = self._counters
        return counters_document(
            self.connections,
            counters.requests,
            counters.unauthorized,
            counters.closed_idle,
            counters.rejections.copy(),
        )

    def run(self) -> None:
        """Answer until `stop` is called, then finish the answers that were begun, for half a second at most."""
        while not self._stopping:
            self.step(TICK_S)
        self._acceptor.close()
        deadline = self._clock() + 0.5
        for connection in list(self._places):
            if connection.phase not in (Phase.WAITING, Phase.WRITING):
                self._close(connection)
        while self._places and self._clock() < deadline:
            self.step(0.05)

    def refuse_new(self) -> None:
        """Let go of the port, and go on answering those who are connected; from any thread, twice is harmless."""
        self._refusing = True
        self._wakeup.set()

    def stop(self) -> None:
        """Make `run` return; from any thread, twice is harmless."""
        self._stopping = True
        self._wakeup.set()

    def close(self) -> None:
        """Close every socket; only after `run` has returned."""
        for connection in list(self._places):
            self._close(connection)
        self.close_descriptors()

    def close_descriptors(self) -> None:
        """Close the descriptors and nothing else: in a forked child, where the connections are its parent's."""
        self._selector.close()
        for connection in self._places:
            connection.sock.close()
        self._acceptor.close_descriptors()
        self._wakeup.close()

    # -- the loop ------------------------------------------------------------------------------------------------------

    def step(self, wait_s: float) -> None:
        """One turn: wait for at most `wait_s`, and do what can be done without waiting."""
        began_at = self._clock()
        events = self._wait(wait_s, began_at)
        self._handle_events(events)
        self._answer_requests()
        self._compress_piece()
        self._pump_streams()
        if began_at >= self._judge_at:
            self._judge_at = began_at + TICK_S
            self._close_late(began_at, {key.data for key, _ in events})

    def _wait(self, wait_s: float, now: float) -> list[tuple[selectors.SelectorKey, int]]:
        if self._streams:
            wait_s = min(wait_s, max(0.0, self._streams.next_at - now))
        events = self._selector.select(0 if self._queue or self._gzip_queue else wait_s)
        self.last_progress_at = self._clock()
        return events

    def _handle_events(self, events: list[tuple[selectors.SelectorKey, int]]) -> None:
        for key, _ in events:
            if isinstance(key.fileobj, socket.socket) and key.fileobj in self._acceptor.listeners:
                self._accept(key.fileobj)
            elif key.fileobj is self._wakeup:
                self._wakeup.clear()
                if self._refusing:
                    self._acceptor.close()
                    for connection in self._streams:
                        self._end_stream(connection)
            elif key.data.phase is not Phase.CLOSED:  # it may have been closed to make room, in this very turn
                self._handle_io(key.data)

    def _answer_requests(self) -> None:
        ends_at = self._clock() + TURN_S
        while self._queue:
            self._serve(self._queue.pop())
            if self._clock() > ends_at:
                break

    def _pump_streams(self) -> None:
        """Send what streams have, if their readers have taken all before and there is room for it."""
        if not self._streams:
            return
        now = self._clock()
        if now < self._streams.next_at:
            return
        is_crowded = self._places.unsent.total > MAX_UNSENT_BYTES // 2
        for connection in self._streams.due(now):
            stream = connection.stream
            if stream is None or connection.outbox or (stream.is_large and is_crowded):
                continue
            try:
                has_more = connection.pump()
            except MemoryError:
                self._counters.reject("no_descriptor", f"no memory for a stream peer={connection.peer}")
                self._close(connection)
                continue
            except Exception:
                self._counters.record_bug("a stream")
                self._close(connection)
                continue
            self._streams.put_last(connection, now + stream.pause_s)
            if has_more:
                self._send(connection)
                is_crowded = is_crowded or self._places.unsent.total > MAX_UNSENT_BYTES // 2
            if self._clock() > now + TURN_S:
                self._streams.find_next(now)  # the others' turn comes right after new requests
                return
        self._streams.find_next(now + STREAM_TICK_S)

    def _close_late(self, judged_at: float, active: set[object]) -> None:
        """Close whose deadline had passed before the sockets were looked at, and who has not moved since."""
        for connection in [connection for connection in self._places if connection.deadline <= judged_at]:
            if connection.held is not None:
                send, connection.held = connection.held, None
                send()
                continue
            if connection.phase is Phase.READING:
                self._counters.reject("slow_request", f"peer={connection.peer}")
            elif connection.phase in (Phase.WRITING, Phase.STREAMING):
                if connection in active:  # it takes something; a pause of this process may have kept it from that
                    connection.deadline = judged_at + LATE_READER_S
                    continue
                self._counters.reject("slow_reader", f"peer={connection.peer}")
            self._close(connection)
        for connection in self._streams.find_refused(self._application.may_go_on):
            self._end_stream(connection)
        if self._places.unsent.total > MAX_UNSENT_BYTES // 2:
            self._close_stuck_streams(judged_at)
        self._counters.flush()
        if not self._refusing and not self._stopping:
            self._acceptor.resume(judged_at)

    def _close_stuck_streams(self, now: float) -> None:
        """Others wait for the room that these take: they are not given the whole RESPONSE_DEADLINE_S."""
        for connection in self._streams:
            if connection.outbox and connection.deadline < now + RESPONSE_DEADLINE_S - STUCK_S:
                self._counters.reject("unread_stream", f"peer={connection.peer}")
                self._close(connection)

    # -- connections ---------------------------------------------------------------------------------------------------

    def _accept(self, listener: socket.socket) -> None:
        self._places.forget_ranking()
        for _ in range(MAX_ACCEPTED_PER_TURN):
            try:
                sock, peer = listener.accept()
            except BlockingIOError:
                return
            except OSError as error:
                if error.errno in (errno.EMFILE, errno.ENFILE, errno.ENOBUFS, errno.ENOMEM):
                    self._counters.reject("no_descriptor", str(error.strerror))
                    if not self._make_room(None, reserve=False):
                        self._acceptor.pause(self._clock() + TICK_S)
                    return
                if not listener.getsockopt(socket.SOL_SOCKET, socket.SO_ACCEPTCONN):
                    address = self._acceptor.bind_anew(listener)
                    self._counters.record_destroyed(f"{address}: {error.strerror}")
                    return
                continue  # the peer was gone before it was accepted
            self._give_place(sock, peer)

    def _give_place(self, sock: socket.socket, peer: Any) -> None:
        sock.setblocking(False)
        sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        connection = Connection(
            sock, peer, unsent=self._places.unsent, idle_timeout_s=self._places.idle_timeout_s, clock=self._clock
        )
        network = connection.network
        if self._places.are_taken() and not self._make_room(network, reserve=False):
            if self._places.is_reserve_taken(network) and not self._make_room(network, reserve=True):
                self._counters.reject("no_place", f"peer={connection.peer}")
                connection.close()
                return
            connection.use_reserve()
        self._places.add(connection)
        self._selector.register(sock, selectors.EVENT_READ, connection)
        self._handle_io(connection)  # its request has often come with it

    def _make_room(self, network: str | None, *, reserve: bool, now: float | None = None) -> bool:
        """Close a connection that nobody is waiting to have answered; False if there is none."""
        spare = self._places.find_spare(network, self._clock() if now is None else now, reserve=reserve)
        if spare is None:
            return False
        if spare.phase is not Phase.READING:
            self._counters.closed_idle += 1
        else:
            self._counters.reject("made_room", f"peer={spare.peer}")
        self._close(spare)
        return True

    def _handle_io(self, connection: Connection) -> None:
        if connection.outbox:
            self._send(connection)
            if connection.waits_for_turn():
                self._await_turn(connection)
            return
        if connection.phase is Phase.WAITING:
            return  # it pipelines: its turn comes before more is read
        try:
            is_open = connection.receive()
        except BlockingIOError:
            return
        except BadRequest as error:
            self._refuse(connection, error)
            return
        except OSError:
            is_open = False
        if connection.waits_for_turn():
            self._await_turn(connection)
        elif not is_open:
            self._close(connection)

    def _await_turn(self, connection: Connection) -> None:
        request = connection.request
        if request is not None and self._application.is_probe(request):
            self._answer(connection)
        if connection.waits_for_turn():
            self._queue.push(connection)

    def _send(self, connection: Connection) -> None:
        try:
            is_done = connection.send()
        except BadRequest as error:
            self._refuse(connection, error)
            return
        except OSError:
            self._close(connection)
            return
        event = selectors.EVENT_READ if is_done else selectors.EVENT_WRITE
        if self._selector.get_key(connection.sock).events != event:
            self._selector.modify(connection.sock, event, connection)

    def _end_stream(self, connection: Connection) -> None:
        connection.end_stream()
        self._close(connection)

    def _close(self, connection: Connection) -> None:
        self._places.discard(connection)
        self._streams.discard(connection)
        self._selector.unregister(connection.sock)
        connection.close()

    # -- answers -------------------------------------------------------------------------------------------------------

    def _serve(self, connection: Connection) -> None:
        """Answer the whole requests of a connection whose turn it is, as long as their answers are taken."""
        ends_at = self._clock() + CONNECTION_TURN_S
        for _ in range(MAX_REQUESTS_PER_TURN):
            if not connection.waits_for_turn():
                return
            self._answer(connection)
            if self._clock() > ends_at:
                break
        if connection.waits_for_turn():
            self._queue.push(connection)

    def _answer(self, connection: Connection) -> None:
        request = connection.take_request()
        answer = self._answer_to(request, connection)
        if not isinstance(answer, Answer):
            self._begin_stream(connection, request, answer)
            return
        keep_alive = request.keep_alive and not connection.is_reserve and not self._stopping
        if answer.status == 401:
            self._counters.unauthorized += 1
        more = self._application.headers_for(request)
        if more:
            answer = replace(answer, headers=(*answer.headers, *more))
        answered = _Answered(connection, answer, keep_alive, head_only=request.method == "HEAD")
        if answer.held_back_s:
            answered.keep_alive = False
            connection.hold_back(answer.held_back_s, lambda: self._respond(answered))
            return
        if len(answer.body) > MIN_GZIP_BYTES:
            answered.answer = replace(answer, headers=(*answer.headers, "Vary: Accept-Encoding"))
            if accepts_gzip(request):
                gzipped = self._gzip_queue.find(answer.body)
                if gzipped is None and self._gzip_queue.add(answer.body, answered):
                    return
                if gzipped is not None:
                    answered.use_gzip(gzipped)
        self._respond(answered)

    def _compress_piece(self) -> None:
        if not self._gzip_queue:
            return
        gzipped, waiting = self._gzip_queue.step()
        for answered in waiting:
            connection = answered.connection
            if connection.phase is not Phase.CLOSED:
                answered.use_gzip(gzipped)
                self._respond(answered)
                if connection.waits_for_turn():
                    self._queue.push(connection)

    def _answer_to(self, request: Request, connection: Connection) -> Answer | Stream:
        is_crowded = connection.is_reserve or self._places.unsent.total > MAX_UNSENT_BYTES
        if is_crowded and not self._application.is_probe(request):
            if not self._has_right_to_answer(connection):
                self._counters.reject("no_place", f"peer={connection.peer}")
                return error_answer(503, f"more than {self._places.max_connections} connections")
            while self._places.unsent.total > MAX_UNSENT_BYTES:
                slowest = self._places.find_slowest_reader()
                if slowest is None:
                    break
                self._counters.reject("unread_answers", f"peer={slowest.peer}")
                self._close(slowest)
        try:
            try:
                return self._application.respond(request, connection.network)
            except StreamsFull as error:
                spare = self._streams.find_spare(connection.network)
                if spare is None:
                    return error_answer(error.status, str(error))
                self._counters.reject("made_room", f"peer={spare.peer} for another address")
                self._close(spare)
                return self._application.respond(request, connection.network)
        except MemoryError:
            self._counters.reject("no_descriptor", f"no memory for the answer target={request.target!r}")
            return error_answer(503, "the gateway has no memory left for this answer")
        except Exception:
            self._counters.record_bug(f"target={request.target!r}")
            return error_answer(500, "this question met an error in the gateway, which is in its log")

    def _has_right_to_answer(self, connection: Connection) -> bool:
        """Whether it has a usual place, or one of the reserve by right, or gets one now.

        A whole request is worth more than one that has only begun, however lately.
        """
        if not connection.is_reserve or self._places.may_use_reserve(connection.network):
            return True
        self._places.forget_ranking()
        if self._make_room(connection.network, reserve=False, now=float("inf")):
            self._places.promote(connection)
            return True
        return False

    def _refuse(self, connection: Connection, error: BadRequest) -> None:
        """Say what is wrong, and close: where the next request would begin is not known."""
        self._respond(_Answered(connection, error_answer(error.status, str(error)), keep_alive=False, head_only=False))

    def _respond(self, answered: _Answered) -> None:
        self._counters.requests += 1
        connection, answer = answered.connection, answered.answer
        head = self._heads.of_answer(answer, len(answer.body), keep_alive=answered.keep_alive)
        body = b"" if answered.head_only else answer.body
        connection.begin_answer(head, body, keep_alive=answered.keep_alive)
        self._send(connection)

    def _begin_stream(self, connection: Connection, request: Request, stream: Stream) -> None:
        """Send the head; the rest follows for as long as the reader stays, and the connection ends with it."""
        self._counters.requests += 1
        # If nothing says how much has come, urllib3 and requests wait until their buffers are full: up to 64 KiB.
        is_chunked = not request.http_1_0
        head = self._heads.of_stream(stream, self._application.headers_for(request), is_chunked=is_chunked)
        if request.method == "HEAD":
            stream.close()
            connection.begin_answer(head, keep_alive=False)
        else:
            connection.begin_stream(stream, head, is_chunked=is_chunked, send_buffer_bytes=STREAM_SEND_BUFFER)
            self._streams.add(connection, request)
        self._send(connection)


def counters_document(
    connections: int = 0,
    requests: int = 0,
    unauthorized: int = 0,
    closed_idle: int = 0,
    rejections: dict[str, int] | None = None,
) -> dict[str, Any]:
    """The part of /stats that is about HTTP, all zero if there is no server."""
    counts = rejections or dict.fromkeys(REJECTIONS, 0)
    return {
        "connections": connections,
        "requests": requests,
        "unauthorized": unauthorized,
        "closed_idle": closed_idle,
        "rejected_connections": sum(counts.values()),
        "rejections": counts,
    }


def _connections_that_fit() -> int:
    """MAX_CONNECTIONS, or fewer if the process may not open so many files."""
    files, _ = resource.getrlimit(resource.RLIMIT_NOFILE)
    if files == resource.RLIM_INFINITY:
        return MAX_CONNECTIONS
    return max(8, min(MAX_CONNECTIONS, files - RESERVE_CONNECTIONS - 32))
