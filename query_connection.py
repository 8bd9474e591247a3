"""One reader's connection, who gets a place for one, and whose turn it is to be answered.

Places and turns are shared out by network - an IPv4 address, or an IPv6 /64, which is what one customer has - because
whoever has one address can open any number of connections from it. Behind a proxy all readers are one network: as long
as nobody else wants its places, it may have them all.

Everything here belongs to the query server's thread.
"""

from __future__ import annotations

import contextlib
import enum
import ipaddress
import socket
from collections import Counter, deque
from collections.abc import Callable, Iterator
from typing import Any

from http_message import Request, RequestBuffer, Stream, parse_request
from sockets import format_peer

RESERVE_CONNECTIONS = 32  # beyond the others: for probes, and for networks that have few if another one has most
MAX_RESERVE_PER_NETWORK = RESERVE_CONNECTIONS // 2
MAX_SMALL_NETWORK = 8  # places of a network whose every question is answered from the reserve
REQUEST_DEADLINE_S = 10.0  # from the first byte of a request to its last
RESPONSE_DEADLINE_S = 30.0  # from the answer to the last byte that the reader took
LINGER_S = 1.0  # for a refused request's bytes, so that the reader sees the answer and no reset
BEGUN_IS_SPARED_S = 0.5  # a request that was begun so recently is not given up for another one of the same network


class Phase(enum.IntEnum):
    """What a connection is doing."""

    IDLE = 0  # nothing of a request has come since the connection was made, or since the last answer
    READING = 1  # a part of a request has come
    WAITING = 2  # a whole request waits for its turn, or for its answer to be compressed
    WRITING = 3  # an answer is on its way
    STREAMING = 4  # an answer that goes on until the reader leaves
    LINGERING = 5  # all is said; what the peer still sends is passed over
    HELD = 6  # an answer is held back, and what comes meanwhile is passed over
    CLOSED = 7


_UNFINISHED = (Phase.IDLE, Phase.READING, Phase.LINGERING, Phase.HELD)


def network_of(host: str) -> str:
    """The network that an address stands for: itself, or the /64 around an IPv6 address."""
    if ":" not in host:
        return host
    address = ipaddress.IPv6Address(host.partition("%")[0])
    mapped = address.ipv4_mapped
    return str(mapped) if mapped else address.packed[:8].hex()


class UnsentBytes:
    """How many bytes of answers wait for their readers, on all connections together."""

    def __init__(self) -> None:
        self.total = 0


class Outbox:
    """What is on its way to one reader. It counts whole until the last byte is taken, because it is held so long."""

    __slots__ = ("_parts", "_unsent", "size")

    def __init__(self, unsent: UnsentBytes) -> None:
        self._unsent = unsent
        self._parts: list[memoryview] = []
        self.size = 0  # bytes, of all that was put in last

    def __bool__(self) -> bool:
        return bool(self._parts)

    def put(self, *parts: bytes) -> None:
        """Have these sent next, as one message."""
        self._parts = [memoryview(part) for part in parts if part]
        self._count(sum(map(len, parts)))

    def send(self, sock: socket.socket) -> int:
        """Hand the socket what it takes, and return how many bytes that was; raises OSError."""
        parts, total = self._parts, 0
        try:
            while parts:
                sent = sock.sendmsg(parts)
                total += sent
                while parts and sent >= len(parts[0]):
                    sent -= len(parts[0])
                    del parts[0]
                if parts:
                    parts[0] = parts[0][sent:]
        except BlockingIOError:
            return total
        self._count(0)
        return total

    def clear(self) -> None:
        """Let go of everything."""
        self._parts = []
        self._count(0)

    def _count(self, size: int) -> None:
        self._unsent.total += size - self.size
        self.size = size


class Connection:
    """A connection and what has come and has to go; acts for itself, and never waits."""

    __slots__ = (
        "_buffer", "_clock", "_idle_timeout_s", "answers", "deadline", "held", "is_chunked", "is_reserve", "keep_alive",
        "network", "outbox", "peer", "phase", "request", "sock", "stream",
    )  # fmt: skip

    def __init__(
        self,
        sock: socket.socket,
        peer: Any,
        *,
        unsent: UnsentBytes,
        idle_timeout_s: float,
        clock: Callable[[], float],
    ) -> None:
        self.sock = sock
        self.peer = format_peer(peer)
        self.network = network_of(peer[0])
        self.is_reserve = False
        self._idle_timeout_s = idle_timeout_s
        self._clock = clock
        self.phase = Phase.IDLE
        self.deadline = clock() + self._idle_timeout_s  # monotonic, of the present phase
        self.answers = 0  # that were sent whole
        self.keep_alive = True  # after the present answer
        self.request: Request | None = None  # the one that waits for its turn
        self.stream: Stream | None = None
        self.is_chunked = False  # the stream goes out in chunks
        self._buffer = RequestBuffer()
        self.held: Callable[[], None] | None = None  # sends the answer that is held back
        self.outbox = Outbox(unsent)

    def use_reserve(self) -> None:
        """Take one of the reserve's places: for one answer, and not for long."""
        self.is_reserve = True
        self.deadline = self._clock() + LINGER_S

    def waits_for_turn(self) -> bool:
        """Whether a whole request is there and has not had its turn yet."""
        return self.request is not None and self.phase is Phase.WAITING

    def receive(self) -> bool:
        """Read what has come; False if the peer has closed its side. Raises BlockingIOError or OSError, BadRequest.

        The phase is WAITING afterwards if a whole request is there.
        """
        data = self.sock.recv(65536)
        if self.phase in (Phase.IDLE, Phase.READING):
            self._buffer.append(data)
            self.find_request()
        return bool(data)

    def find_request(self) -> None:
        """Look for a whole request in what has come; raises BadRequest."""
        if not self._buffer:
            return
        head = self._buffer.extract_head()
        if head is not None:
            self.request = parse_request(head)
            self.phase = Phase.WAITING
            self.deadline = float("inf")  # from now on it is not the peer that is waited for
        elif self._buffer and self.phase is not Phase.READING:
            self.phase = Phase.READING
            if not self.is_reserve:
                self.deadline = self._clock() + REQUEST_DEADLINE_S

    def take_request(self) -> Request:
        """The request whose turn it is."""
        assert self.request is not None
        request, self.request = self.request, None
        return request

    def hold_back(self, seconds: float, send: Callable[[], None]) -> None:
        """Have an answer sent when the deadline is over, which is in so many seconds."""
        self.phase = Phase.HELD
        self.deadline = self._clock() + seconds
        self.held = send

    def begin_answer(self, *parts: bytes, keep_alive: bool) -> None:
        """Have an answer sent, as one message."""
        self.keep_alive = keep_alive
        self.phase = Phase.WRITING
        self._begin_sending(*parts)

    def begin_stream(self, stream: Stream, head: bytes, *, is_chunked: bool, send_buffer_bytes: int) -> None:
        """Have a stream's head sent; what the stream has follows with `pump`."""
        self.stream = stream
        self.is_chunked = is_chunked
        self.keep_alive = False
        self.phase = Phase.STREAMING
        self._buffer.clear()
        with contextlib.suppress(OSError):  # the reader may be gone, which some systems tell here already
            self.sock.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, send_buffer_bytes)
        self._begin_sending(head)

    def pump(self) -> bool:
        """Take what the stream has next and begin to send it; returns whether there was anything."""
        assert self.stream is not None
        text = self.stream.read()
        if text and self.is_chunked:
            self._begin_sending(b"%x\r\n" % len(text), text, b"\r\n")
        elif text:
            self._begin_sending(text)
        return bool(text)

    def end_stream(self) -> None:
        """Tell the reader that nothing follows, if that can be told now; without it the stream breaks off."""
        if self.is_chunked and not self.outbox:
            with contextlib.suppress(OSError):
                self.sock.send(b"0\r\n\r\n")

    def _begin_sending(self, *parts: bytes) -> None:
        self.outbox.put(*parts)
        self.deadline = self._clock() + RESPONSE_DEADLINE_S

    def send(self) -> bool:
        """Send what the socket takes, head and body in one write; True once nothing is left. Raises OSError.

        After an answer the phase is IDLE, READING or WAITING again, or LINGERING; raises BadRequest if what follows in
        the buffer is no request.
        """
        has_moved = self.outbox.send(self.sock) > 0
        if self.outbox:
            if has_moved and self.phase is Phase.STREAMING:
                self.deadline = self._clock() + RESPONSE_DEADLINE_S  # it reads, however slowly
            return False
        if self.phase is Phase.STREAMING:
            self.deadline = float("inf")
        else:
            self._after_answer()
        return True

    def _after_answer(self) -> None:
        self.answers += 1
        if self.keep_alive:
            self.phase = Phase.IDLE
            self.deadline = self._clock() + self._idle_timeout_s
            self.find_request()
        else:
            # Closing with bytes unread would reset the connection and could take the answer from the reader.
            self.phase = Phase.LINGERING
            self.deadline = self._clock() + LINGER_S
            self._buffer.clear()
            self.sock.shutdown(socket.SHUT_WR)

    def close(self) -> None:
        """Close the socket and the stream; twice is harmless."""
        self.phase = Phase.CLOSED
        self.held = None
        self.outbox.clear()
        if self.stream is not None:
            self.stream.close()
        self.sock.close()


class Places:
    """The connections that there are, and who has to go if there are too many."""

    def __init__(self, max_connections: int, idle_timeout_s: float) -> None:
        self.max_connections = max_connections
        self.idle_timeout_s = idle_timeout_s
        self.unsent = UnsentBytes()
        self._by_network: dict[str, set[Connection]] = {}
        self._in_reserve: Counter[str] = Counter()  # by network
        self._count = 0
        self._ranked: list[Connection] | None = None

    def __len__(self) -> int:
        return self._count

    def __iter__(self) -> Iterator[Connection]:
        return (connection for connections in self._by_network.values() for connection in connections)

    def __contains__(self, connection: Connection) -> bool:
        return connection in self._by_network.get(connection.network, ())

    def add(self, connection: Connection) -> None:
        """Give a place away."""
        self._by_network.setdefault(connection.network, set()).add(connection)
        self._count += 1
        self._in_reserve[connection.network] += connection.is_reserve
        if self._ranked is not None:
            self._ranked.append(connection)

    def discard(self, connection: Connection) -> None:
        """Have a place back; twice is harmless."""
        connections = self._by_network.get(connection.network, set())
        if connection in connections:
            connections.remove(connection)
            self._count -= 1
            self._in_reserve[connection.network] -= connection.is_reserve
            if not connections:
                del self._by_network[connection.network], self._in_reserve[connection.network]

    def are_taken(self) -> bool:
        """Whether all the usual places are taken."""
        return self._count - self._in_reserve.total() >= self.max_connections

    def is_reserve_taken(self, network: str) -> bool:
        """Whether the reserve has no place for a network, which never gets the whole of it."""
        return self._has_its_share_of_reserve(network) or self._in_reserve.total() >= RESERVE_CONNECTIONS

    def _has_its_share_of_reserve(self, network: str | None) -> bool:
        return network is not None and self._in_reserve[network] >= MAX_RESERVE_PER_NETWORK

    def promote(self, connection: Connection) -> None:
        """Give a connection of the reserve a usual place."""
        self._in_reserve[connection.network] -= connection.is_reserve
        connection.is_reserve = False

    def may_use_reserve(self, network: str) -> bool:
        """Whether any question of this network is answered from the reserve: it has few places, another has most."""
        most = max((len(places) for name, places in self._by_network.items() if name != network), default=0)
        own = len(self._by_network.get(network, ()))
        return own <= MAX_SMALL_NETWORK and most > self.max_connections // 2

    def find_spare(self, network: str | None, now: float, *, reserve: bool) -> Connection | None:
        """Which connection has to go for a new one of that network, if it is known: one that waits for its peer.

        First those of networks that have more than an equal share, the largest first. In a network: those that never
        asked anything, then those that have been idle for longest, then the slowest in the middle of asking - but not
        one that began just now, unless its network is larger, and never one of a network that is smaller. In the
        reserve nothing of a smaller network has to go, and a network that has its share makes room itself.
        """
        if self._ranked is None:
            self._ranked = self._rank()
        began_just_now = now + REQUEST_DEADLINE_S - BEGUN_IS_SPARED_S
        own = 0 if network is None else len(self._by_network.get(network, ()))
        for connection in self._ranked:
            if connection.phase not in _UNFINISHED or connection.is_reserve is not reserve:
                continue
            is_begun = connection.phase is Phase.READING
            size = len(self._by_network[connection.network])
            is_larger = network is not None and size > own + 1
            if (
                (size < own and (is_begun or reserve))
                or (is_begun and connection.deadline > began_just_now and not is_larger)
                or (reserve and connection.network != network and self._has_its_share_of_reserve(network))
            ):
                continue
            return connection
        return None

    def forget_ranking(self) -> None:
        """Have `find_spare` look at all connections again; once for each batch of new ones is often enough."""
        self._ranked = None

    def _rank(self) -> list[Connection]:
        share = self.max_connections // max(1, len(self._by_network))

        def key(connection: Connection) -> tuple[int, int, float]:
            size = len(self._by_network[connection.network])
            begun = 2 if connection.phase is Phase.READING else min(connection.answers, 1)
            return (-size if size > share else 0, begun, connection.deadline)

        return sorted((connection for connection in self if connection.phase in _UNFINISHED), key=key)

    def find_slowest_reader(self) -> Connection | None:
        """The connection that has to go if too much is unsent: the oldest answer of the network with most of it."""
        unsent = {name: sum(c.outbox.size for c in connections) for name, connections in self._by_network.items()}
        if not unsent:
            return None
        most = max(unsent, key=lambda name: unsent[name])
        return min(
            (connection for connection in self._by_network[most] if connection.outbox),
            key=lambda connection: connection.deadline,
            default=None,
        )


class TurnQueue:
    """Connections whose requests wait to be answered: networks take turns, and in each the first to come is first."""

    def __init__(self) -> None:
        self._by_network: dict[str, deque[Connection]] = {}

    def __bool__(self) -> bool:
        return bool(self._by_network)

    def push(self, connection: Connection) -> None:
        """Add one at the end."""
        self._by_network.setdefault(connection.network, deque()).append(connection)

    def pop(self) -> Connection:
        """Take the next one; raises StopIteration if there is none."""
        network = next(iter(self._by_network))
        waiting = self._by_network.pop(network)
        connection = waiting.popleft()
        if waiting:
            self._by_network[network] = waiting  # at the end: the other networks come first
        return connection
