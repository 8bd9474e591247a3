"""HTTP as strangers speak it: one thread, bounded connections, deadlines; on real sockets, by a clock moved by hand."""

from __future__ import annotations

import contextlib
import gzip
import http.client
import json
import re
import socket
import struct
import threading
import unittest
from dataclasses import replace
from typing import Any
from unittest import mock

import query_connection
import query_server
from http_message import MAX_REQUEST_LINE_BYTES, Answer, Request, Stream, StreamsFull, error_answer
from query_connection import Connection
from query_server import QueryServer, StreamTurns
from tests.harness import DEADLINE_S, FakeClock, wait_until

BIG = b'"' + b"x" * (6 << 20) + b'"'  # more than the sockets' buffers hold for a reader with a small one


class LargeStream:
    """A stream that begins with something large, and has nothing after it."""

    content_type = "text/event-stream"
    pause_s = 0.0

    def __init__(self) -> None:
        self.is_large = True
        self.is_open = True

    def read(self) -> bytes:
        is_first, self.is_large = self.is_large, False
        return BIG if is_first else b""

    def close(self) -> None:
        self.is_open = False


STREAMS: list[LargeStream] = []


class AnyApplication:
    """Answers a few paths, and whatever else with its own target."""

    def headers_for(self, request: Request) -> tuple[str, ...]:
        return ("Vary: Origin",) if request.header("origin") else ()

    def respond(self, request: Request, network: str) -> Answer | Stream:
        if request.target == "/wrong":
            return replace(error_answer(401, network), held_back_s=1.0)
        if request.target == "/big":
            return Answer(200, BIG)
        if request.target == "/error":
            return error_answer(404, "<b>no</b>")
        if request.target == "/nothing":
            return Answer(204, b"")
        if request.target == "/stream":
            STREAMS.append(LargeStream())
            return STREAMS[-1]
        if request.target == "/bug":
            raise ZeroDivisionError("a bug")
        if request.target == "/memory":
            raise MemoryError
        return Answer(200, json.dumps({"target": request.target}).encode())

    def is_probe(self, request: Request) -> bool:
        return request.target in ("/livez", "/readyz")

    def may_go_on(self, request: Request) -> bool:
        return True


class Client:
    """A connection that sends what it is told, to the letter."""

    def __init__(self, port: int, host: str = "127.0.0.1") -> None:
        self.sock = socket.socket()
        self.sock.bind((host, 0))
        self.sock.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 65536)
        self.sock.settimeout(DEADLINE_S)
        self.sock.connect(("127.0.0.1", port))
        self.file = self.sock.makefile("rb")

    def send(self, data: bytes) -> Client:
        self.sock.sendall(data)
        return self

    def response(self, *, head_only: bool = False) -> tuple[int, dict[str, str], bytes]:
        status_line = self.file.readline()
        match = re.fullmatch(rb"HTTP/1\.1 ([0-9]{3}) [A-Za-z -]+\r\n", status_line)
        assert match, f"no status line: {status_line!r}"
        headers = {}
        while (line := self.file.readline()) != b"\r\n":
            assert line, "the connection ended within the headers"
            name, _, value = line.decode().partition(":")
            headers[name.lower()] = value.strip()
        body = b"" if head_only else self.file.read(int(headers["content-length"]))
        return int(match[1]), headers, body

    def at_end(self) -> bool:
        """Whether the server has closed the connection; waits for that."""
        try:
            return self.file.read(1) == b""
        except ConnectionResetError:
            return True

    def close(self) -> None:
        self.file.close()
        self.sock.close()


class ServerCase(unittest.TestCase):
    max_connections = 64

    def setUp(self) -> None:
        self.clock = FakeClock()
        self.connections: list[Client] = []
        listener = socket.create_server(("127.0.0.1", 0), backlog=512)
        listener.setblocking(False)
        self.port = listener.getsockname()[1]
        self.server = QueryServer([listener], AnyApplication(), max_connections=self.max_connections, clock=self.clock)
        thread = threading.Thread(target=self.server.run, daemon=True)
        thread.start()

        def stop() -> None:
            self.server.stop()
            self.clock.move(1.0)
            thread.join(DEADLINE_S)
            self.assertFalse(thread.is_alive())
            self.server.close()

        self.addCleanup(stop)

    def connect(self, host: str = "127.0.0.1") -> Client:
        client = Client(self.port, host)
        self.addCleanup(client.close)
        self.connections.append(client)
        return client

    def ask(self, request: bytes) -> tuple[int, dict[str, str], Any]:
        """One request on a connection of its own; the body must be JSON."""
        status, headers, body = self.connect().send(request).response()
        return status, headers, json.loads(body)

    def wait_connections(self, count: int) -> None:
        wait_until(f"{count} connections", lambda: self.server.connections == count)

    def rejected(self) -> int:
        return int(self.server.counters()["rejected_connections"])

    def rejections(self) -> dict[str, int]:
        """The reasons that occurred, and how often."""
        return {reason: count for reason, count in self.server.counters()["rejections"].items() if count}

    def wait_requests(self, count: int) -> None:
        wait_until(f"{count} answers to be made", lambda: self.server.counters()["requests"] == count)


class Requests(ServerCase):
    """Plain requests, one after another on a connection."""

    def test_pipelining(self) -> None:
        """Answers come in the order of the requests, on a connection that stays."""
        client = self.connect()
        client.send(b"".join(b"GET /%d HTTP/1.1\r\nHost: a\r\n\r\n" % number for number in range(200)))
        for number in range(200):
            status, headers, body = client.response()
            self.assertEqual((status, json.loads(body)), (200, {"target": f"/{number}"}))
            self.assertEqual((headers["connection"], headers["keep-alive"]), ("keep-alive", "timeout=650"))

    def test_half_close(self) -> None:
        """Whole requests are answered although the client has closed its side."""
        client = self.connect()
        client.send(b"GET /x HTTP/1.1\r\nHost: a\r\n\r\n" * 100)
        client.sock.shutdown(socket.SHUT_WR)
        for _ in range(100):
            self.assertEqual(client.response()[0], 200)
        self.assertTrue(client.at_end())

    def test_byte_by_byte(self) -> None:
        """A request that drips in is answered."""
        client = self.connect()
        for byte in b"GET /slow HTTP/1.1\r\nHost: a\r\n\r\n":
            client.send(bytes([byte]))
        self.assertEqual(json.loads(client.response()[2]), {"target": "/slow"})

    def test_head(self) -> None:
        """HEAD is GET without the body."""
        client = self.connect()
        client.send(b"HEAD /x HTTP/1.1\r\nHost: a\r\n\r\nGET /x HTTP/1.1\r\nHost: a\r\n\r\n")
        _, head_headers, _ = client.response(head_only=True)
        _, get_headers, body = client.response()
        self.assertEqual(head_headers, get_headers)
        self.assertEqual(int(head_headers["content-length"]), len(body))

    def test_http_1_0(self) -> None:
        """The connection is closed unless the reader asks otherwise."""
        client = self.connect().send(b"GET /x HTTP/1.0\r\n\r\n")
        self.assertEqual(client.response()[1]["connection"], "close")
        self.assertTrue(client.at_end())
        client = self.connect().send(b"GET /x HTTP/1.0\r\nConnection: keep-alive\r\n\r\n" * 2)
        self.assertEqual([client.response()[1]["connection"] for _ in range(2)], ["keep-alive"] * 2)

    def test_connection_close(self) -> None:
        """A reader that says it wants no more is believed."""
        client = self.connect().send(b"GET /x HTTP/1.1\r\nHost: a\r\nConnection: close\r\n\r\n")
        self.assertEqual(client.response()[1]["connection"], "close")
        self.assertTrue(client.at_end())

    def test_other_forms(self) -> None:
        """Absolute targets, bare newlines and empty lines before a request are understood."""
        for request, target in (
            (b"GET http://host:1/x?y=1 HTTP/1.1\r\nHost: a\r\n\r\n", "/x?y=1"),
            (b"GET HTTP://host HTTP/1.1\r\nHost: a\r\n\r\n", "/"),
            (b"GET /x HTTP/1.1\nHost: a\n\n", "/x"),
            (b"\r\n\r\nGET /x HTTP/1.1\r\nHost: a\r\n\r\n", "/x"),
            (b"GET // HTTP/1.1\r\nHost:\r\n\r\n", "//"),
            (b"GET /../%00 HTTP/1.1\r\nhOST:a\r\n\r\n", "/../%00"),
        ):
            with self.subTest(request):
                self.assertEqual(self.ask(request)[2], {"target": target})

    def test_large_answer(self) -> None:
        """However little the sockets take at a time, all of it arrives."""
        status, _, body = self.connect().send(b"GET /big HTTP/1.1\r\nHost: a\r\n\r\n").response()
        self.assertEqual((status, body), (200, BIG))


class Refusals(ServerCase):
    """Whatever is no request that can be answered gets the right status as JSON, and the connection is closed."""

    def test_statuses(self) -> None:
        host = b"\r\nHost: a\r\n\r\n"
        cases: tuple[tuple[int, bytes], ...] = (
            (400, b"GET /\r\n\r\n"),
            (400, b"hello\r\n\r\n"),
            (400, b"hello\n"),
            (400, b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03\n"),
            (400, b"GET / HTTP/1.1\r\n\r\n"),
            (400, b"GET / HTTP/1.1\r\nHost: a\r\nHost: b\r\n\r\n"),
            (400, b"GET x HTTP/1.1" + host),
            (400, b"GET /a b HTTP/1.1" + host),
            (400, b"GET /\xff HTTP/1.1" + host),
            (400, b"GET / HTTP/1.1\r\nHost : a\r\n\r\n"),
            (400, b"GET / HTTP/1.1\r\nHost: a\r\n folded\r\n\r\n"),
            (400, b"GET / HTTP/1.1\r\nHost: a\r\nX: \0\r\n\r\n"),
            (400, b"GET / HTTP/1.1\r\nHost: a\r\nContent-Length: x\r\n\r\n"),
            (400, b"GET / HTTP/1.1\r\nHost: a\r\nContent-Length: 1\r\nContent-Length: 2\r\n\r\n"),
            (414, b"GET /" + b"x" * 70_000 + b" HTTP/1.1" + host),
            (414, b"GET /" + b"x" * (MAX_REQUEST_LINE_BYTES - 13) + b" HTTP/1.1" + host),
            (414, b"GET /" + b"x" * (MAX_REQUEST_LINE_BYTES - 13) + b" HTTP/1.1\nHost: a\n\n"),
            (414, b"x" * 70_000),
            (431, b"GET / HTTP/1.1\r\nHost: a\r\nX: " + b"x" * 70_000 + b"\r\n\r\n"),
            (431, b"GET / HTTP/1.1\r\nHost: a\r\n" + b"X: x\r\n" * 101 + b"\r\n"),
            (431, b"GET / HTTP/1.1\r\n" + b"X: x\r\n" * 10_000),
            (505, b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n"),
            (505, b"GET / HTTP/9.9" + host),
        )
        for expected, request in cases:
            with self.subTest(request=request[:60]):
                client = self.connect().send(request)
                status, headers, body = client.response()
                self.assertEqual(status, expected)
                self.assertEqual(list(json.loads(body)), ["error"])
                self.assertEqual(headers["content-type"], "application/json")
        self.assertEqual(self.ask(b"GET /fine HTTP/1.1\r\nHost: a\r\n\r\n")[0], 200)

    def test_longest_request_line(self) -> None:
        """It may be as long as the error says."""
        line = b"GET /" + b"x" * (MAX_REQUEST_LINE_BYTES - 14) + b" HTTP/1.1"
        self.assertEqual(len(line), MAX_REQUEST_LINE_BYTES)
        for end in (b"\r\n", b"\n"):
            self.assertEqual(self.ask(line + end + b"Host: a" + end + end)[0], 200)

    def test_smuggled_request(self) -> None:
        """What is in a body is never taken for a request."""
        smuggled = b"GET /smuggled HTTP/1.1\r\nHost: a\r\n\r\n"
        for head in (b"Content-Length: %d" % len(smuggled), b"Transfer-Encoding: chunked"):
            client = self.connect().send(b"GET /x HTTP/1.1\r\nHost: a\r\n" + head + b"\r\n\r\n" + smuggled)
            self.assertEqual(json.loads(client.response()[2]), {"target": "/x"})
            self.assertTrue(client.at_end())

    def test_error_status(self) -> None:
        """An error of the application is its status."""
        status, headers, body = self.ask(b"GET /error HTTP/1.1\r\nHost: a\r\n\r\n")
        self.assertEqual((status, body), (404, {"error": "<b>no</b>"}))
        self.assertEqual(headers["x-content-type-options"], "nosniff")

    def test_bug(self) -> None:
        """An unexpected error is 500, and its traceback is in the log."""
        with self.assertLogs("elrar.http", "ERROR") as logged:
            self.assertEqual(self.ask(b"GET /bug HTTP/1.1\r\nHost: a\r\n\r\n")[0], 500)
        self.assertIn("ZeroDivisionError", logged.output[0])

    def test_no_memory(self) -> None:
        """An answer that has no room in memory is 503, is counted, and has no traceback: it is no bug."""
        with self.assertLogs("elrar.http", "WARNING") as logged:
            self.assertEqual(self.ask(b"GET /memory HTTP/1.1\r\nHost: a\r\n\r\n")[0], 503)
        self.assertIn("no memory for the answer target='/memory'", logged.output[0])
        self.assertNotIn("Traceback", logged.output[0])


class Deadlines(ServerCase):
    """A slow client has an absolute deadline, whatever it sends now and then."""

    def test_stuck_reader(self) -> None:
        """A reader that takes nothing more is cut off."""
        client = self.connect().send(b"GET /big HTTP/1.1\r\nHost: a\r\n\r\n")
        self.wait_requests(1)
        with self.assertLogs("elrar.http", "WARNING"):
            self.clock.move(query_connection.RESPONSE_DEADLINE_S + 1)
            self.wait_connections(0)
        self.assertLess(len(client.file.read()), len(BIG))

    def test_idle_timeout(self) -> None:
        """An idle connection is closed when its time is over, without a warning."""
        client = self.connect().send(b"GET /x HTTP/1.1\r\nHost: a\r\n\r\n")
        client.response()
        self.ask(b"GET /x HTTP/1.1\r\nHost: a\r\n\r\n")  # the turn in which the first was answered is over now
        with self.assertNoLogs("elrar.http"):
            self.clock.move(650 + 1)
            self.assertTrue(client.at_end())
        self.assertEqual(self.rejected(), 0)

    def test_a_connection_that_asks_nothing_is_closed_in_silence(self) -> None:
        """As a browser's preconnect, or a balancer's spare connection; it is kept as long as an idle one."""
        client = self.connect()
        self.wait_connections(1)
        with self.assertNoLogs("elrar.http"):
            self.clock.move(640)
            self.ask(b"GET /x HTTP/1.1\r\nHost: a\r\n\r\n")
            client.send(b"\r\n")  # which is no beginning of a request
            self.clock.move(11)
            self.assertTrue(client.at_end())
        self.assertEqual((self.rejected(), self.server.counters()["closed_idle"]), (0, 0))


class SteppedCase(unittest.TestCase):
    """A server without a thread: the test makes its turns."""

    max_connections = 64

    def setUp(self) -> None:
        self.clock = FakeClock()
        listener = socket.create_server(("127.0.0.1", 0))
        listener.setblocking(False)
        self.port = listener.getsockname()[1]
        self.server = QueryServer([listener], AnyApplication(), max_connections=self.max_connections, clock=self.clock)
        self.addCleanup(self.server.close)

    def connect(self, host: str = "127.0.0.1") -> Client:
        client = Client(self.port, host)
        self.addCleanup(client.close)
        return client

    def steps(self, number: int = 5) -> None:
        for _ in range(number):
            self.server.step(0.02)


class SteppedDeadlines(SteppedCase):
    """The same, turn by turn."""

    def test_slow_request(self) -> None:
        """A header byte now and then does not move the deadline."""
        client = self.connect().send(b"GET / HTTP/1.1\r\n")
        self.steps()
        with self.assertLogs("elrar.http", "WARNING"):
            for _ in range(int(query_connection.REQUEST_DEADLINE_S) + 1):
                self.clock.move(1.0)
                with contextlib.suppress(OSError):
                    client.send(b"X")
                self.steps(2)
        self.assertTrue(client.at_end())
        self.assertEqual(self.server.counters()["rejections"]["slow_request"], 1)


class AfterAPause(SteppedCase):
    """What arrived before a deadline is taken before the deadline is judged, however late the process gets to it."""

    def test_a_request_that_came_in_time_is_answered(self) -> None:
        begun = self.connect().send(b"GET /x HTTP/1.1\r\n")
        idle = self.connect()
        self.steps()
        begun.send(b"Host: a\r\n\r\n")
        idle.send(b"GET /x HTTP/1.1\r\nHost: a\r\n\r\n")
        self.clock.move(1000)
        with self.assertNoLogs("elrar.http"):
            self.steps()
        self.assertEqual([client.response()[0] for client in (begun, idle)], [200, 200])

    def test_a_pause_in_the_middle_of_a_turn_is_not_blamed_on_the_readers(self) -> None:
        """Whoever is answered just before the pause, and those who ask meanwhile."""
        clients = [self.connect().send(b"GET /x HTTP/1.1\r\n") for _ in range(9)]
        self.steps()
        respond = self.server._application.respond

        def paused(request: Request, network: str) -> Answer | Stream:
            for client in clients[1:]:
                client.send(b"Host: a\r\n\r\n")
            self.clock.move(1000)
            self.server._application.respond = respond  # type: ignore[method-assign]
            return respond(request, network)

        self.server._application.respond = paused  # type: ignore[method-assign]
        clients[0].send(b"Host: a\r\n\r\n")
        with self.assertNoLogs("elrar.http"):
            self.steps()
        self.assertEqual([client.response()[0] for client in clients], [200] * 9)

    def test_a_reader_that_takes_something_is_not_cut_off(self) -> None:
        client = self.connect().send(b"GET /big HTTP/1.1\r\nHost: a\r\n\r\n")
        self.steps()
        self.clock.move(1000)
        taken = bytearray()
        client.sock.setblocking(False)
        with self.assertNoLogs("elrar.http"):
            while not taken.endswith(BIG):
                with contextlib.suppress(BlockingIOError):
                    while True:
                        data = client.sock.recv(1 << 20)
                        self.assertTrue(data, "the connection was closed")
                        taken += data
                self.clock.move(0.1)
                self.server.step(0.02)

    def test_who_is_late_even_so_is_closed(self) -> None:
        client = self.connect().send(b"GET /x HTTP/1.1\r\n")
        self.steps()
        self.clock.move(11)
        with self.assertLogs("elrar.http", "WARNING"):
            self.steps()
        self.assertTrue(client.at_end())
        self.assertEqual(self.server.counters()["rejections"]["slow_request"], 1)


class Bounds(ServerCase):
    """Connections are bounded; who asks nothing makes room, and health is answered to the last."""

    max_connections = 8

    def test_idle_connections_make_room(self) -> None:
        """Those that have been idle for longest go first."""
        idle = [self.connect() for _ in range(8)]
        for client in idle:
            client.send(b"GET /x HTTP/1.1\r\nHost: a\r\n\r\n").response()
            self.clock.move(0.01)
        for number in range(20):
            self.assertEqual(self.ask(b"GET /%d HTTP/1.1\r\nHost: a\r\n\r\n" % number)[0], 200)
        self.assertLessEqual(self.server.connections, 8)
        self.assertTrue(idle[0].at_end())

    def test_slow_requests_make_room(self) -> None:
        """A request that was begun is given up, half a second later, for a new connection."""
        for _ in range(8):
            self.connect().send(b"GET / HTT")
        self.wait_connections(8)
        self.clock.move(0.6)
        with self.assertLogs("elrar.http", "WARNING") as said:
            self.assertEqual(self.ask(b"GET /x HTTP/1.1\r\nHost: a\r\n\r\n")[0], 200)
        self.assertRegex(said.output[0], r"peer=127\.0\.0\.1:[0-9]+")

    def test_probes_behind_slow_readers(self) -> None:
        """If every place is taken, others get 503, and probes are answered."""
        for number in range(8):
            self.connect().send(b"GET /big HTTP/1.1\r\nHost: a\r\n\r\n")
            self.wait_requests(number + 1)
        with self.assertLogs("elrar.http", "WARNING"):
            status, headers, body = self.ask(b"GET /x HTTP/1.1\r\nHost: a\r\n\r\n")
            self.assertEqual((status, headers["connection"]), (503, "close"))
            self.assertIn("8 connections", body["error"])
            for path in (b"/livez", b"/readyz"):
                self.assertEqual(self.ask(b"GET " + path + b" HTTP/1.1\r\nHost: a\r\n\r\n")[0], 200)

    def test_unread_answers(self) -> None:
        """Answers that nobody reads are bounded in bytes."""
        with mock.patch("query_server.MAX_UNSENT_BYTES", 3 * len(BIG)), self.assertLogs("elrar.http", "WARNING"):
            for number in range(4):
                self.connect().send(b"GET /big HTTP/1.1\r\nHost: a\r\n\r\n")
                self.wait_requests(number + 1)
                self.clock.move(0.01)
            first = self.connections[0]
            self.assertEqual(self.ask(b"GET /x HTTP/1.1\r\nHost: a\r\n\r\n")[0], 200)
            self.assertLess(len(first.file.read()), len(BIG))

    def test_flood_of_idle_connections(self) -> None:
        """They make room for each other without a warning, and none counts as a rejection."""
        for _ in range(8):
            self.connect().send(b"GET /big HTTP/1.1\r\nHost: a\r\n\r\n")
        self.wait_requests(8)
        reserve = query_connection.MAX_RESERVE_PER_NETWORK
        with self.assertNoLogs("elrar.http"):
            for _ in range(200):
                self.connect()
            wait_until("them to make room", lambda: self.server.counters()["closed_idle"] == 200 - reserve)
        self.assertLessEqual(self.server.connections, 8 + reserve)
        self.assertEqual(self.rejected(), 0)


class Networks(ServerCase):
    """One address cannot take what others need; behind a proxy, where all come from one, nothing is lost by that."""

    max_connections = 8

    def ask_from(self, host: str, target: bytes = b"/x") -> int:
        client = self.connect(host).send(b"GET " + target + b" HTTP/1.1\r\nHost: a\r\n\r\n")
        return client.response()[0]

    def test_half_requests_of_one_address(self) -> None:
        """They make room at once for another address."""
        with self.assertLogs("elrar.http", "WARNING"):
            for _ in range(8):
                self.connect("127.0.0.2").send(b"GET / HTT")
            self.wait_connections(8)
            for _ in range(5):
                self.assertEqual(self.ask_from("127.0.0.3"), 200)
                self.connect("127.0.0.2").send(b"GET / HTT")
        self.assertEqual(set(self.rejections()), {"made_room"})

    def test_slow_readers_of_one_address(self) -> None:
        """They leave the reserve to others."""
        for number in range(8):
            self.connect("127.0.0.2").send(b"GET /big HTTP/1.1\r\nHost: a\r\n\r\n")
            self.wait_requests(number + 1)
        for _ in range(5):
            self.assertEqual(self.ask_from("127.0.0.3"), 200)
        with self.assertLogs("elrar.http", "WARNING"):
            self.assertEqual(self.ask_from("127.0.0.2"), 503)
        self.assertEqual(self.rejections(), {"no_place": 1})

    def test_a_proxy_may_have_every_place(self) -> None:
        """As a proxy's connections have, of which most are idle."""
        with self.assertNoLogs("elrar.http"):
            clients = [self.connect("127.0.0.2") for _ in range(8)]
            for _ in range(5):
                for client in clients:
                    client.send(b"GET /x HTTP/1.1\r\nHost: a\r\n\r\n")
                self.assertEqual([client.response()[0] for client in clients], [200] * 8)


class SteppedNetworks(SteppedCase):
    """The same, turn by turn."""

    max_connections = 8

    def test_a_whole_request_is_worth_more_than_half_ones(self) -> None:
        """Even of the same address, and even if they began just now."""
        half = [self.connect().send(b"GET / HTT") for _ in range(8)]
        self.steps()
        with self.assertLogs("elrar.http", "WARNING"):
            for _ in range(4):
                client = self.connect().send(b"GET /x HTTP/1.1\r\nHost: a\r\n\r\n")
                self.steps()
                self.assertEqual(client.response()[0], 200)
        self.assertEqual(self.server.counters()["rejections"]["no_place"], 0)
        self.assertEqual(len(half), 8)

    def test_requests_of_small_networks_stay(self) -> None:
        """What others begin is not given up for who has most."""
        honest = [self.connect("127.0.0.3").send(b"GET /honest HTTP/1.1\r\n") for _ in range(2)]
        self.steps()
        with self.assertLogs("elrar.http", "WARNING"):
            for _ in range(40):
                self.connect("127.0.0.2").send(b"GET / HTT")
                self.clock.move(0.2)
                self.server.step(0.02)
        self.assertGreater(self.server.counters()["rejections"]["made_room"], 20)
        for client in honest:
            client.send(b"Host: a\r\n\r\n")
            self.steps()
            self.assertEqual(client.response()[0], 200)

    def test_streams_of_one_address_make_room_for_another(self) -> None:
        """Until both have as many; and not for one more of its own."""
        respond = self.server._application.respond

        def at_most_four(request: Request, network: str) -> Answer | Stream:
            if request.target == "/stream" and sum(stream.is_open for stream in STREAMS) >= 4:
                raise StreamsFull(503, "full")
            return respond(request, network)

        STREAMS.clear()
        self.server._application.respond = at_most_four  # type: ignore[method-assign]
        statuses = []
        with self.assertLogs("elrar.http", "WARNING"):
            for host in ("127.0.0.2",) * 5 + ("127.0.0.3",) * 3 + ("127.0.0.2",):
                client = self.connect(host).send(b"GET /stream HTTP/1.1\r\nHost: a\r\n\r\n")
                self.steps(1)
                statuses.append((host[-1], client.response(head_only=True)[0]))
        expected = [("2", 200)] * 4 + [("2", 503)] + [("3", 200)] * 2 + [("3", 503), ("2", 503)]
        self.assertEqual(statuses, expected)
        self.assertEqual(self.server.counters()["rejections"]["made_room"], 2)

    def test_small_networks_are_not_robbed(self) -> None:
        """A request that a small network has begun stays, however many whole ones a large network has."""
        slow = self.connect("127.0.0.3").send(b"GET /x HTTP/1.1\r\n")
        for _ in range(7):
            self.connect("127.0.0.2").send(b"GET /big HTTP/1.1\r\nHost: a\r\n\r\n")
        self.steps()
        with self.assertLogs("elrar.http", "WARNING"):
            for _ in range(5):
                self.clock.move(1.0)
                client = self.connect("127.0.0.2").send(b"GET /x HTTP/1.1\r\nHost: a\r\n\r\n")
                self.steps()
                self.assertEqual(client.response()[0], 503)
        slow.send(b"Host: a\r\n\r\n")
        self.steps()
        self.assertEqual(slow.response()[0], 200)

    def test_the_reserve_is_never_all_of_one_network(self) -> None:
        """However many of one address come at once, all with whole requests: another's is answered, early or late."""
        for _ in range(8):
            self.connect("127.0.0.2").send(b"GET /big HTTP/1.1\r\nHost: a\r\n\r\n")
        self.steps()
        early = self.connect("127.0.0.3")  # which asks nothing yet
        self.steps()
        with self.assertLogs("elrar.http", "WARNING"):
            for number in range(3 * query_connection.RESERVE_CONNECTIONS):
                self.connect("127.0.0.2").send(b"GET /%d HTTP/1.1\r\nHost: a\r\n\r\n" % number)
            late = self.connect("127.0.0.3").send(b"GET /x HTTP/1.1\r\nHost: a\r\n\r\n")
            self.steps()
        early.send(b"GET /x HTTP/1.1\r\nHost: a\r\n\r\n")
        self.steps()
        self.assertEqual([client.response()[0] for client in (early, late)], [200, 200])

    def test_networks_take_turns_in_being_answered(self) -> None:
        """However many connections of one address ask at once, another's question is second."""
        order = []
        respond = self.server._application.respond

        def noted(request: Request, network: str) -> Answer | Stream:
            order.append(request.target)
            return respond(request, network)

        self.server._application.respond = noted  # type: ignore[method-assign]
        greedy = [self.connect("127.0.0.2") for _ in range(6)]
        honest = self.connect("127.0.0.3")
        self.steps()
        for client in (*greedy, honest):
            path = b"/honest" if client is honest else b"/greedy"
            client.send(b"GET " + path + b" HTTP/1.1\r\nHost: a\r\n\r\n")
        self.steps()
        self.assertEqual(len(order), 7)
        self.assertIn("/honest", order[:2])


class HeldBack(SteppedCase):
    """An answer that is held back takes nobody's time and nobody's place."""

    max_connections = 8

    def test_it_comes_later(self) -> None:
        client = self.connect().send(b"GET /wrong HTTP/1.1\r\nHost: a\r\n\r\nGET /x HTTP/1.1\r\nHost: a\r\n\r\n")
        self.steps()
        other = self.connect().send(b"GET /x HTTP/1.1\r\nHost: a\r\n\r\n")
        self.clock.move(0.9)
        self.steps()
        self.assertEqual(other.response()[0], 200)
        client.sock.settimeout(0)
        with self.assertRaises(BlockingIOError):
            client.sock.recv(1, socket.MSG_PEEK)
        client.sock.settimeout(DEADLINE_S)
        self.clock.move(0.2)
        self.steps()
        status, headers, body = client.response()
        self.assertEqual((status, headers["connection"], json.loads(body)), (401, "close", {"error": "127.0.0.1"}))
        self.assertEqual(self.server.counters()["unauthorized"], 1)

    def test_it_makes_room(self) -> None:
        held = [self.connect().send(b"GET /wrong HTTP/1.1\r\nHost: a\r\n\r\n") for _ in range(8)]
        self.steps()
        client = self.connect().send(b"GET /x HTTP/1.1\r\nHost: a\r\n\r\n")
        self.steps()
        self.assertEqual(client.response()[0], 200)
        self.assertEqual(sum(connection.phase is query_connection.Phase.HELD for connection in self.server._places), 7)
        self.assertEqual(len(held), 8)


class Origins(SteppedCase):
    """What the application adds to the head is in every answer, also in a stream's."""

    def test_headers_of_the_application(self) -> None:
        for target in (b"/x", b"/error", b"/bug", b"/stream"):
            client = self.connect().send(b"GET " + target + b" HTTP/1.1\r\nHost: a\r\nOrigin: http://a\r\n\r\n")
            with self.subTest(target), contextlib.ExitStack() as stack:
                if target == b"/bug":
                    stack.enter_context(self.assertLogs("elrar.http", "ERROR"))
                self.steps()
                self.assertEqual(client.response(head_only=True)[1]["vary"], "Origin")


class Gzip(SteppedCase):
    """Large bodies are compressed for those who take it, and nobody waits for that."""

    def ask(self, method: bytes, target: bytes, encoding: bytes = b"gzip") -> Client:
        head = b" HTTP/1.1\r\nHost: a\r\nAccept-Encoding: " + encoding + b"\r\n\r\n"
        return self.connect().send(method + b" " + target + head)

    def test_a_large_body(self) -> None:
        """And HEAD says the same of it."""
        get, head = self.ask(b"GET", b"/big"), self.ask(b"HEAD", b"/big")
        self.steps(100)
        _, headers, body = get.response()
        self.assertEqual(gzip.decompress(body), BIG)
        self.assertEqual((headers["content-encoding"], headers["vary"]), ("gzip", "Accept-Encoding"))
        self.assertEqual(head.response(head_only=True)[1], headers)

    def test_small_bodies_and_other_readers(self) -> None:
        """Are answered as ever; a cache is told where it depends on the reader."""
        small = self.ask(b"GET", b"/x")
        self.steps()
        _, headers, body = small.response()
        self.assertEqual(json.loads(body), {"target": "/x"})
        self.assertNotIn("vary", headers)
        refusing = self.ask(b"HEAD", b"/big", b"gzip;q=0")
        self.steps()
        _, headers, _ = refusing.response(head_only=True)
        self.assertEqual((headers["content-length"], headers["vary"]), (str(len(BIG)), "Accept-Encoding"))
        self.assertNotIn("content-encoding", headers)

    def test_others_do_not_wait_for_it(self) -> None:
        waiting = self.ask(b"GET", b"/big").send(b"GET /next HTTP/1.1\r\nHost: a\r\n\r\n")
        self.steps(2)
        other = self.ask(b"GET", b"/livez")
        self.steps(2)
        self.assertEqual(other.response()[0], 200)
        waiting.sock.settimeout(0)
        with self.assertRaises(BlockingIOError):
            waiting.sock.recv(1, socket.MSG_PEEK)
        waiting.sock.settimeout(DEADLINE_S)
        self.steps(100)
        self.assertEqual(gzip.decompress(waiting.response()[2]), BIG)
        self.assertEqual(json.loads(waiting.response()[2]), {"target": "/next"})

    def test_a_reader_that_leaves_meanwhile(self) -> None:
        """Takes nothing with it, and leaves nothing behind."""
        leaving, staying = self.ask(b"GET", b"/big"), self.ask(b"GET", b"/big")
        self.steps(3)
        leaving.sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        leaving.file.close()
        leaving.sock.close()
        self.steps(100)
        self.assertEqual(gzip.decompress(staying.response()[2]), BIG)
        self.assertEqual(self.server.connections, 1)


class Turns(unittest.TestCase):
    """Streams have their turns one after the other, each when its time has come."""

    def setUp(self) -> None:
        self.turns = StreamTurns()
        self.first, self.second = mock.Mock(Connection), mock.Mock(Connection)
        self.request = Request("GET", "/watch", keep_alive=True)
        self.turns.add(self.first, self.request)
        self.turns.add(self.second, self.request)

    def test_one_that_pauses_for_long_does_not_hold_up_another(self) -> None:
        self.assertEqual(self.turns.due(1.0), [self.first, self.second])
        self.turns.put_last(self.first, 11.0)
        self.turns.put_last(self.second, 1.5)
        self.turns.find_next(1.25)
        self.assertEqual((self.turns.next_at, self.turns.due(1.5)), (1.5, [self.second]))
        self.turns.put_last(self.second, 1.5)
        self.turns.find_next(1.75)
        self.assertEqual((self.turns.next_at, self.turns.due(11.0)), (1.75, [self.first, self.second]))

    def test_one_that_pauses_costs_no_turn_meanwhile(self) -> None:
        self.turns.put_last(self.first, 11.0)
        self.turns.discard(self.second)
        self.turns.find_next(1.25)
        self.assertEqual((self.turns.next_at, self.turns.due(10.9)), (11.0, []))
        self.turns.add(self.second, self.request)
        self.assertEqual((self.turns.next_at, self.turns.due(1.25)), (0.0, [self.second]))

    def test_one_that_was_closed_in_its_turn_has_no_other(self) -> None:
        self.turns.discard(self.first)
        self.turns.put_last(self.first, 0.0)
        self.assertEqual(list(self.turns), [self.second])


class Streams(ServerCase):
    """What readers of streams have not read is bounded, at the cost of those who read nothing."""

    def setUp(self) -> None:
        STREAMS.clear()
        patched = mock.patch.object(query_server, "MAX_UNSENT_BYTES", 2 * len(BIG) + 100)
        patched.start()
        self.addCleanup(patched.stop)
        super().setUp()

    def tick(self) -> None:
        self.clock.move(query_server.STREAM_TICK_S)

    def test_large_snapshots_wait_for_room(self) -> None:
        """They wait until readers that take nothing are cut off."""
        stuck = [self.connect().send(b"GET /stream HTTP/1.1\r\nHost: x\r\n\r\n") for _ in range(2)]
        self.wait_requests(2)
        self.tick()
        wait_until("both to be given what is large", lambda: not any(stream.is_large for stream in STREAMS))
        honest = self.connect().send(b"GET /stream HTTP/1.1\r\nHost: x\r\n\r\n")
        self.wait_requests(3)
        self.tick()
        self.assertEqual(self.ask(b"GET /livez HTTP/1.1\r\nHost: x\r\n\r\n")[0], 200)
        self.assertTrue(STREAMS[2].is_large)
        with self.assertLogs("elrar.http", "WARNING"):
            self.clock.move(query_server.STUCK_S + 0.1)
            wait_until("the stuck ones to be closed", lambda: not any(stream.is_open for stream in STREAMS[:2]))
        self.assertEqual(self.rejected(), 2)
        self.tick()
        wait_until("the third to have its turn", lambda: not STREAMS[2].is_large)
        while (line := honest.file.readline()) != b"\r\n":
            self.assertTrue(line, "the connection ended within the headers")
        self.assertEqual(honest.file.readline(), b"%x\r\n" % len(BIG))
        self.assertEqual(honest.file.read(len(BIG)), BIG)
        self.assertTrue(STREAMS[2].is_open)
        del stuck

    def test_chunks(self) -> None:
        """So that a reader with a buffer is given what has come, and can tell an end from a break."""
        client = self.connect().send(b"GET /stream HTTP/1.1\r\nHost: x\r\n\r\n")
        self.wait_requests(1)
        self.tick()
        response = http.client.HTTPResponse(client.sock)
        response.begin()
        self.assertEqual(response.getheader("transfer-encoding"), "chunked")
        self.assertEqual(response.read(len(BIG)), BIG)
        self.server.refuse_new()
        self.assertEqual(response.read(), b"")

    def test_no_chunks_for_http_1_0(self) -> None:
        """A reader that does not know chunks gets the stream as it is."""
        client = self.connect().send(b"GET /stream HTTP/1.0\r\n\r\n")
        self.wait_requests(1)
        self.tick()
        response = http.client.HTTPResponse(client.sock)
        response.begin()
        self.assertIsNone(response.getheader("transfer-encoding"))
        self.assertEqual(response.read(len(BIG)), BIG)
        self.server.refuse_new()
        self.assertEqual(response.read(), b"")

    def test_slow_reader_of_a_stream(self) -> None:
        """One that goes on reading, however slowly, is not cut off."""
        slow = self.connect().send(b"GET /stream HTTP/1.1\r\nHost: x\r\n\r\n")
        self.wait_requests(1)
        for _ in range(10):
            self.tick()
            self.assertTrue(slow.file.read(len(BIG) // 20))
            self.clock.move(query_connection.RESPONSE_DEADLINE_S / 2)
        self.assertTrue(STREAMS[0].is_open)


if __name__ == "__main__":
    unittest.main()
