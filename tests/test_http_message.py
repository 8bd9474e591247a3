"""The HTTP message without a socket: whatever comes is a request, refused with the right status, or waited for."""

from __future__ import annotations

import json
import random
import time
import unittest
from collections.abc import Callable, Iterator

import http_message
from http_message import MAX_HEAD_BYTES, Answer, BadRequest, Request, RequestBuffer, ResponseHeads, parse_request
from query_route import parse_query
from state_query import ROUTES, find_route

HEAD = b"GET /x HTTP/1.1\r\nHost: a\r\n"
PRINTABLE = bytes(range(0x20, 0x7F))


def extract(received: bytes) -> bytes | None:
    """The first head in what was received, all of it at once."""
    buffer = RequestBuffer()
    buffer.append(received)
    return buffer.extract_head()


def request_of(received: bytes) -> Request:
    head = extract(received)
    assert head is not None
    return parse_request(head)


class Heads(unittest.TestCase):
    """A head is found however it is cut, and read as it was meant."""

    def assert_refused(self, received: bytes, status: int, *words: str) -> None:
        with self.assertRaises(BadRequest) as refused:
            request_of(received)
        self.assertEqual(refused.exception.status, status)
        for word in words:
            self.assertIn(word, str(refused.exception))

    def test_cut_at_any_byte(self) -> None:
        """What is cut is waited for, never taken for a whole."""
        whole = HEAD + b"X-Long: yes\r\n\r\n"
        for end in range(len(whole)):
            self.assertIsNone(extract(whole[:end]))
        buffer = RequestBuffer()
        buffer.append(whole + b"GET")
        head = buffer.extract_head()
        assert head is not None
        self.assertEqual(len(buffer), 3)
        self.assertEqual(parse_request(head).target, "/x")

    def test_byte_by_byte(self) -> None:
        """However it drips in, it is what it would be at once."""
        for newline in (b"\r\n", b"\n"):
            received = newline.join((b"", b"", b"GET /x HTTP/1.1", b"Host: a", b"Connection: close", b"", b""))
            buffer, found = RequestBuffer(), []
            for byte in received * 3:
                buffer.append(bytes([byte]))
                head = buffer.extract_head()
                if head is not None:
                    found.append(parse_request(head))
            self.assertEqual(found, [request_of(received)] * 3)
            self.assertFalse(found[0].keep_alive)

    def test_exact_bounds(self) -> None:
        """A head of exactly the bound is taken, one byte more is not, whether or not it is cut before its end."""
        for newline in (b"\r\n", b"\n"):
            start = b"GET /x HTTP/1.1" + newline + b"Host: a" + newline + b"X: "
            largest = start + b"x" * (MAX_HEAD_BYTES - len(start))
            for cut in range(len(largest), len(largest) + 2 * len(newline)):
                self.assertIsNone(extract((largest + newline * 2)[:cut]))
            self.assertEqual(extract(largest + newline * 2), largest)
            self.assert_refused(largest + b"x" + newline * 2, 431)
            most = b"GET /x HTTP/1.1" + newline + b"Host: a" + newline
            self.assertIsNotNone(extract(most + (b"X: x" + newline) * (http_message.MAX_HEADERS - 1) + newline))
            self.assert_refused(most + (b"X: x" + newline) * http_message.MAX_HEADERS, 431)

    def test_what_is_wrong_is_said(self) -> None:
        """Not only that it is no request: what, and what to do."""
        for line, words in (
            (b"hello", ("no HTTP request",)),
            (b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03", ("TLS",)),
            (b"GET /engines?engine_id=a b HTTP/1.1", ("space", "%20")),
            (b"GET /engines?engine_id=\xff\xfe HTTP/1.1", ("UTF-8", "percent-encode")),
            (b"GET /a\x01b HTTP/1.1", ("character", "percent-encode")),
        ):
            with self.subTest(line):
                self.assert_refused(line + b"\r\nHost: a\r\n\r\n", 400, *words)

    def test_raw_utf_8_in_the_target(self) -> None:
        """Is what it says, as curl and people send it."""
        received = "GET /engines?engine_id=引擎 HTTP/1.1\r\nHost: a\r\n\r\n".encode()
        target = request_of(received).target
        self.assertEqual(target, "/engines?engine_id=引擎")
        route, _ = find_route("/engines")
        self.assertEqual(parse_query(target.partition("?")[2], route), {"engine_id": ["引擎"]})

    def test_header_values(self) -> None:
        """White space around a value is not part of it; the last value counts; names are of any case."""
        request = request_of(HEAD + b"x-A: \t b c \t\r\nX-a: \xe9:d\r\nEmpty:\r\n\r\n")
        self.assertEqual([request.header(name) for name in ("x-a", "empty", "none")], ["\xe9:d", "", ""])

    def test_connection_tokens(self) -> None:
        for value, http_1_1, http_1_0 in (
            (b"close", False, False),
            (b"Keep-Alive", True, True),
            (b"upgrade , CLOSE\t", False, False),
            (b"closed, not-close", True, False),
        ):
            with self.subTest(value):
                self.assertIs(request_of(HEAD + b"Connection: " + value + b"\r\n\r\n").keep_alive, http_1_1)
                old = b"GET / HTTP/1.0\r\nConnection: " + value + b"\r\n\r\n"
                self.assertIs(request_of(old).keep_alive, http_1_0)

    def test_accepted_encodings(self) -> None:
        """Gzip is sent to those who say that they take it, and to nobody else."""
        for value, accepted in (
            (b"gzip, deflate, br", True),
            (b"GZip;q=0.5", True),
            (b"br;q=1.0, *", True),
            (b"x-gzip", True),
            (b"", False),
            (b"identity", False),
            (b"gzip;q=0", False),
            (b"gzip ; Q = 0.000, *", False),
            (b"*;q=0", False),
            (b"gzipped", False),
            (b"," * 2000 + b"gzip", False),
        ):
            with self.subTest(value[:30]):
                request = request_of(HEAD + b"Accept-Encoding: " + value + b"\r\n\r\n")
                self.assertIs(http_message.accepts_gzip(request), accepted)
        self.assertFalse(http_message.accepts_gzip(request_of(HEAD + b"\r\n")))

    def test_options(self) -> None:
        """`*` is a target of OPTIONS only, and HAProxy's check has no Host."""
        self.assertEqual(request_of(b"OPTIONS * HTTP/1.1\r\nHost: a\r\n\r\n").target, "*")
        self.assertEqual(request_of(b"OPTIONS / HTTP/1.0\r\n\r\n").method, "OPTIONS")
        self.assert_refused(b"GET * HTTP/1.1\r\nHost: a\r\n\r\n", 400)
        self.assert_refused(b"OPTIONS x HTTP/1.1\r\nHost: a\r\n\r\n", 400)

    def test_random_bytes(self) -> None:
        """Are refused or waited for."""
        rng = random.Random(20261122)
        for _ in range(5000):
            received = rng.randbytes(rng.randrange(200)) + rng.choice([b"", b"\r\n\r\n", b"\n"])
            try:
                head = extract(received)
                if head is not None:
                    parse_request(head)
            except BadRequest as error:
                self.assertIn(error.status, http_message.REASON_PHRASES)


class Responses(unittest.TestCase):
    """The head of a response says what a client has to know, and nothing that it may not."""

    def setUp(self) -> None:
        self.heads = ResponseHeads(lambda: 1755532567.5, 650.0)

    def lines(self, answer: Answer, *, keep_alive: bool = True) -> list[str]:
        head = self.heads.of_answer(answer, len(answer.body), keep_alive=keep_alive)
        self.assertTrue(head.endswith(b"\r\n\r\n"))
        return head.decode().split("\r\n")[:-2]

    def test_an_answer(self) -> None:
        self.assertEqual(
            self.lines(Answer(200, b"{}\n", headers=("X: y",))),
            [
                "HTTP/1.1 200 OK",
                "Date: Mon, 18 Aug 2025 15:56:07 GMT",
                "Cache-Control: no-store, no-transform",
                "X-Content-Type-Options: nosniff",
                "Content-Type: application/json",
                "Content-Length: 3",
                "X: y",
                "Connection: keep-alive",
                "Keep-Alive: timeout=650",
            ],
        )

    def test_no_content(self) -> None:
        """204 says nothing of a body, which some clients would wait for."""
        names = [line.partition(":")[0] for line in self.lines(Answer(204, b""), keep_alive=False)]
        self.assertNotIn("Content-Length", names)
        self.assertNotIn("Content-Type", names)
        self.assertNotIn("Keep-Alive", names)

    def test_an_error_is_json(self) -> None:
        self.assertEqual(json.loads(http_message.error_answer(404, '"<\ud800').body), {"error": '"<?'})


def parse_all(received: bytes) -> None:
    """Everything that is done with a request before it is answered."""
    try:
        head = extract(received)
        if head is None:
            return
        request = parse_request(head)
        http_message.accepts_gzip(request)
        path, _, query = request.target.partition("?")
        route, _ = find_route(path)
        parse_query(query, route)
    except http_message.QueryError:
        pass


def drip(received: bytes) -> None:
    """The same, byte by byte."""
    buffer = RequestBuffer()
    try:
        for byte in received:
            buffer.append(bytes([byte]))
            if buffer.extract_head() is not None:
                return
    except BadRequest:
        pass


def families() -> Iterator[tuple[str, Callable[[int], bytes]]]:
    """What strangers may send, of about any number of bytes: runs of each kind, nested and repeated tokens."""
    runs = [bytes([byte]) for byte in (*range(0x21), *b'"%&+,-./0:;=?@A[\\]^_`a{|}~', 0x7F, 0x80, 0xC3, 0xFF)]
    tokens = [b"%41", b"%", b"%e5%bc%95", b"a=b&", b"&&", b"=&", b"a,", b" ,", b"close,", b"\r\n", b" \t", b"a:b\n"]
    tokens += [b"engine_id=%41&", b"engine_id=a+b&", "é%41".encode(), b"[{", b'{"', b"((", b"../", b"http://", b"a:"]
    for one in runs + tokens:
        for name, before, after in (
            ("line", b"", b""),
            ("method", b"", b" / HTTP/1.1\r\nHost: a\r\n\r\n"),
            ("target", b"GET /", b" HTTP/1.1\r\nHost: a\r\n\r\n"),
            ("engine_id", b"GET /engines/", b"/history HTTP/1.1\r\nHost: a\r\n\r\n"),
            ("query", b"GET /engines?engine_id=", b" HTTP/1.1\r\nHost: a\r\n\r\n"),
            ("value", HEAD + b"X: a", b"b\r\n\r\n"),
            ("name", HEAD, b": b\r\n\r\n"),
            ("list", HEAD + b"Connection: ", b"\r\n\r\n"),
            ("encodings", HEAD + b"Accept-Encoding: ", b"\r\n\r\n"),
            ("length", HEAD + b"Content-Length: ", b"\r\n\r\n"),
            ("headers", HEAD, b""),
        ):

            def build(size: int, one: bytes = one, before: bytes = before, after: bytes = after) -> bytes:
                return before + one * (size // len(one)) + after

            yield f"{name}: {one!r}", build


class Cost(unittest.TestCase):
    """Whatever a stranger sends takes time in proportion to its bytes: eight times as much of it at most about eight
    times as long, and no byte of a head dearer than some thirty of a plain one."""

    def seconds(self, do: Callable[[bytes], None], received: bytes) -> float:
        best = float("inf")
        for _ in range(3):
            begin = time.thread_time()
            do(received)
            best = min(best, time.thread_time() - begin)
        return best

    def assert_linear(self, do: Callable[[bytes], None], build: Callable[[int], bytes], small: int) -> None:
        for attempt in range(4):  # the machine may have been busy elsewhere
            once, eight = self.seconds(do, build(small)), self.seconds(do, build(8 * small))
            if eight < 24 * max(once, 5e-6) * (attempt + 1) / 2:  # quadratic time is 64 times as long
                return
        self.fail(f"{once * 1e6:.0f} us for {small} bytes, {eight * 1e6:.0f} us for {8 * small}")

    def test_at_once(self) -> None:
        for name, build in families():
            with self.subTest(name):
                self.assert_linear(parse_all, build, 1000)

    def test_byte_by_byte(self) -> None:
        for name, build in families():
            if name.startswith(("line", "target", "value", "headers")):
                with self.subTest(name):
                    self.assert_linear(drip, build, 250)

    def test_many_small_requests(self) -> None:
        """Pipelined: the rest of the buffer is not touched again for each."""

        def extract_all(received: bytes) -> None:
            buffer = RequestBuffer()
            buffer.append(received)
            while buffer.extract_head() is not None:
                pass

        for one in (b"GET / HTTP/1.0\n\n", b"\r\n\nGET / HTTP/1.0\r\n\r\n"):
            with self.subTest(one):
                self.assert_linear(extract_all, lambda size, one=one: one * (size // len(one)), 8000)  # type: ignore[misc]

    def test_no_head_is_dear(self) -> None:
        """Compared with a plain head of that size; one that backtracks is thousands of times dearer."""
        size = 8000
        plain = self.seconds(parse_all, HEAD + b"X: x\r\n" * 90 + b"Y: " + b"x" * size + b"\r\n\r\n")
        for name, build in families():
            with self.subTest(name):
                self.assertLess(min(self.seconds(parse_all, build(size)) for _ in range(3)), 30 * plain)


class Table(unittest.TestCase):
    """Every route's own path is found."""

    def test_each_path_finds_its_route(self) -> None:
        for route in ROUTES:
            self.assertEqual(find_route(route.path.replace("<engine_id>", "a%2Fb"))[0], route)


if __name__ == "__main__":
    unittest.main()
