"""Who may read: tokens that are right are answered at once, wrong ones are counted, and none is shown anywhere."""

from __future__ import annotations

import base64
import contextlib
import functools
import http.client
import os
import signal
import stat
import tempfile
import unittest
from pathlib import Path

from config import ConfigError
from http_message import Request
from reader_access import GUESSES_S, MAX_GUESSERS, MAX_GUESSES, ReaderAccess, TokensError, load_tokens, read_tokens
from tests.harness import DEADLINE_S, Daemon, FakeClock, daemon, datagram, wait_until
from tests.test_status_page import Browser, why_no_browser

TOKEN = b"a-right-token-of-28-letters!"
OTHER = b"#".join((b"another-right-token", b"with-everything!\"$%&'()*+,-./:;<=>?@[\\]^_`{|}~"))
WRONG = b"b-right-token-of-28-letters!"


def request(authorization: str | None = None, method: str = "GET", **headers: str) -> Request:
    values = {name.encode(): [value.encode("latin-1")] for name, value in headers.items()}
    if authorization is not None:
        values[b"authorization"] = [authorization.encode("latin-1")]
    return Request(method, "/engines", keep_alive=True, headers=values)


def bearer(token: bytes) -> str:
    return f"Bearer {token.decode('latin-1')}"


def basic(user_and_password: bytes) -> str:
    return f"Basic {base64.b64encode(user_and_password).decode()}"


class Tokens(unittest.TestCase):
    def setUp(self) -> None:
        self.clock = FakeClock()
        self.access = ReaderAccess([TOKEN, OTHER], clock=self.clock)

    def status(self, authorization: str | None, network: str = "10.0.0.1") -> int:
        refusal = self.access.refusal(request(authorization), network)
        return 200 if refusal is None else refusal.status

    def held_back_s(self, authorization: str | None, network: str = "10.0.0.1") -> float:
        refusal = self.access.refusal(request(authorization), network)
        assert refusal is not None
        return refusal.held_back_s

    def test_right_tokens(self) -> None:
        """As Bearer, or as the password of any user, so that a browser can."""
        for token in (TOKEN, OTHER):
            for authorization in (
                bearer(token), f"bearer   {token.decode()}", basic(b":" + token), basic(b"me:" + token),
            ):  # fmt: skip
                with self.subTest(authorization):
                    self.assertEqual(self.status(authorization), 200)

    def test_wrong_ones(self) -> None:
        """Are told what is needed, and nothing of what was sent."""
        for authorization in (
            None, "", "Bearer", "Bearer ", bearer(WRONG), bearer(TOKEN[:-1]), bearer(TOKEN + b"!"),
            bearer(TOKEN.upper()),
            f"Digest {TOKEN.decode()}", TOKEN.decode(), basic(TOKEN), basic(TOKEN + b":"), basic(b"me:" + WRONG),
            "Basic !", "Basic ä", "Basic YQ", "Bearer \xff\xfe", bearer(TOKEN + b"," + OTHER), bearer(b"x" * 16000),
        ):  # fmt: skip
            with self.subTest(authorization):
                refusal = self.access.refusal(request(authorization), "10.0.0.1")
                assert refusal is not None
                self.assertEqual(refusal.status, 401)
                self.assertEqual([line.split(" ")[1] for line in refusal.headers], ["Bearer", "Basic"])
                for token in (TOKEN, OTHER, WRONG):
                    self.assertNotIn(token[:8], refusal.body)

    def test_two_at_once(self) -> None:
        """What is before the gateway may go by the other one."""
        for one, other in ((TOKEN, TOKEN), (TOKEN, WRONG), (WRONG, TOKEN)):
            asked = request(bearer(one))
            asked.headers[b"authorization"].append(bearer(other).encode())
            refusal = self.access.refusal(asked, "10.0.0.1")
            self.assertEqual(refusal and refusal.status, 401)

    def test_without_a_file_everybody_reads(self) -> None:
        self.assertIsNone(ReaderAccess().refusal(request(), "10.0.0.1"))
        self.assertIsNone(ReaderAccess().refusal(request(bearer(WRONG)), "10.0.0.1"))

    def test_guesses_are_held_back(self) -> None:
        """After 20 in a minute of one network; a right token is answered at once all the same."""
        self.assertEqual([self.held_back_s(bearer(WRONG)) for _ in range(MAX_GUESSES)], [0.0] * MAX_GUESSES)
        self.assertEqual(self.held_back_s(bearer(WRONG)), 1.0)
        self.assertEqual(self.held_back_s(basic(b":" + WRONG)), 1.0)
        self.assertEqual(self.status(bearer(TOKEN)), 200)
        self.assertEqual(self.held_back_s(bearer(WRONG), "10.0.0.2"), 0.0)
        self.assertEqual(self.held_back_s(None), 0.0)
        self.clock.move(GUESSES_S + 1)
        self.assertEqual(self.held_back_s(bearer(WRONG)), 0.0)

    def test_no_token_is_no_guess(self) -> None:
        """A browser that has not asked its user yet, or a load balancer."""
        for _ in range(3 * MAX_GUESSES):
            self.assertEqual(self.held_back_s(None), 0.0)
        self.assertEqual(self.held_back_s(bearer(WRONG)), 0.0)

    def test_guessers_are_bounded(self) -> None:
        """Those that were quiet for longest are forgotten first."""
        for _ in range(MAX_GUESSES):
            self.held_back_s(bearer(WRONG), "guesser")
        for number in range(MAX_GUESSERS + 10):
            self.held_back_s(bearer(WRONG), f"network-{number}")
            if number % 1000 == 0:
                self.assertEqual(self.held_back_s(bearer(WRONG), "guesser"), 1.0)
        self.assertLessEqual(len(self.access._guesses), MAX_GUESSERS)


class Origins(unittest.TestCase):
    """Only pages of origins that are allowed may read, and a cache is told that it depends."""

    def test_allowed_and_others(self) -> None:
        access = ReaderAccess(allowed_origins=("https://a.example", "http://b:8080"))
        self.assertEqual(
            access.headers_for(request(origin="http://b:8080")),
            ("Vary: Origin", "Access-Control-Allow-Origin: http://b:8080"),
        )
        for headers in ({}, {"origin": "http://b"}, {"origin": "https://a.example.evil"}, {"origin": "null"}):
            self.assertEqual(access.headers_for(request(**headers)), ("Vary: Origin",))

    def test_preflight(self) -> None:
        lines = ReaderAccess(allowed_origins=("*",)).headers_for(request(method="OPTIONS", origin="null"))
        self.assertIn("Access-Control-Allow-Origin: *", lines)
        self.assertIn("Access-Control-Allow-Headers: Authorization, Last-Event-ID", lines)
        self.assertIn("Access-Control-Allow-Methods: GET, HEAD, OPTIONS", lines)

    def test_none_are_allowed_by_default(self) -> None:
        self.assertEqual(ReaderAccess().headers_for(request(origin="https://a.example")), ())


class Files(unittest.TestCase):
    """A file that cannot be used is told by line and fault, and never by what is in it."""

    def setUp(self) -> None:
        folder = tempfile.TemporaryDirectory()
        self.addCleanup(folder.cleanup)
        self.path = Path(folder.name) / "tokens"

    def write(self, content: bytes, mode: int = 0o600) -> str:
        self.path.write_bytes(content)
        self.path.chmod(mode)
        return str(self.path)

    def test_tokens_comments_and_empty_lines(self) -> None:
        content = b"# for the router\n" + TOKEN + b"\n\n#" + WRONG + b"\r\n" + OTHER + b"\r\n" + b"x" * 256
        self.assertEqual(read_tokens(self.write(content)), ([TOKEN, OTHER, b"x" * 256], ""))

    def test_what_cannot_be_used(self) -> None:
        for content, words in (
            (b"", "no token"),
            (b"# none\n\n", "no token"),
            (TOKEN + b"\nshort\n", "line 2: a token has 16 to 256 characters, and this one has 5"),
            (b"x" * 257, "line 1"),
            (b"\n" + b"a token in two words" + b"\n", "line 2"),
            (b" " + TOKEN, "line 1"),
            (TOKEN + b" ", "line 1"),
            (TOKEN + b"\t# a comment", "line 1"),
            ("ein-schlüssel-mit-umlaut".encode(), "line 1"),
            (b"\xef\xbb\xbf" + TOKEN, "line 1"),
            (b"\0" * 20, "line 1"),
            (TOKEN + b"\x0b" + OTHER, "line 1"),
        ):
            with self.subTest(content[:40]):
                with self.assertRaises(TokensError) as refused:
                    read_tokens(self.write(content))
                self.assertIn(words, str(refused.exception))
                for secret in (TOKEN.decode(), "short", "two words", "umlaut"):
                    self.assertNotIn(secret, str(refused.exception))

    def test_no_file(self) -> None:
        for path in (str(self.path), str(self.path.parent), "/dev/null"):
            with self.subTest(path), self.assertRaises(ConfigError) as refused:
                load_tokens(path)
            self.assertIn("HTTP_TOKENS_FILE=", str(refused.exception))

    def test_a_file_that_others_can_read(self) -> None:
        path = self.write(TOKEN, 0o644)
        self.assertIn("chmod", read_tokens(path)[1])
        os.chmod(path, stat.S_IRUSR | stat.S_IRGRP)
        self.assertEqual(read_tokens(path)[1], "")


class Process(unittest.TestCase):
    """The daemon with tokens, as it is started and told to read them again."""

    def setUp(self) -> None:
        folder = tempfile.TemporaryDirectory()
        self.addCleanup(folder.cleanup)
        self.folder = Path(folder.name)
        self.path = self.folder / "tokens"

    def write(self, content: bytes) -> None:
        self.path.write_bytes(content)
        self.path.chmod(0o600)

    def status(self, running: Daemon, path: str, token: bytes | None = None) -> int:
        connection = http.client.HTTPConnection("127.0.0.1", running.http_port, timeout=DEADLINE_S)
        try:
            connection.request("GET", path, headers={} if token is None else {"Authorization": bearer(token)})
            return connection.getresponse().status
        finally:
            connection.close()

    def test_read_again_at_sighup(self) -> None:
        """A file that cannot be used leaves the old tokens, and nothing of any token is in the log."""
        self.write(TOKEN)
        with daemon(self.folder, HTTP_TOKENS_FILE=self.path, BIND_ADDRESS="127.0.0.1") as running:
            for path in ("/", "/engines", "/watch", "/version", "/nowhere", "/metrics", "/livez/"):
                self.assertEqual(self.status(running, path), 401, path)
            for path in ("/livez", "/health", "/readyz"):
                self.assertEqual(self.status(running, path), 200, path)
            self.assertEqual(self.status(running, "/engines", TOKEN), 200)
            self.write(OTHER[:5])
            running.signal(signal.SIGHUP)
            self.assertIn("line 1", running.wait_for_line("the readers' tokens stay"))
            self.assertEqual(self.status(running, "/engines", TOKEN), 200)
            self.write(OTHER)
            running.signal(signal.SIGHUP)
            wait_until("the new token to be known", lambda: self.status(running, "/engines", OTHER) == 200)
            self.assertEqual(self.status(running, "/engines", TOKEN), 401)
            self.assertEqual(running.stop(), 0)
            for token in (TOKEN, OTHER):
                self.assertNotIn(token.decode()[:5], "".join(running.lines))

    def has_ended(self, stream: http.client.HTTPResponse) -> bool:
        return not stream.read1(65536)

    def test_a_stream_ends_with_its_token(self) -> None:
        """Whoever stole a token reads nothing more after SIGHUP; streams of tokens that stay go on."""
        self.write(TOKEN + b"\n" + OTHER)
        with daemon(self.folder, HTTP_TOKENS_FILE=self.path, BIND_ADDRESS="127.0.0.1") as running:
            streams = []
            for authorization in (bearer(TOKEN), basic(b"me:" + TOKEN), bearer(OTHER)):
                connection = http.client.HTTPConnection("127.0.0.1", running.http_port, timeout=DEADLINE_S)
                self.addCleanup(connection.close)
                connection.request("GET", "/watch", headers={"Authorization": authorization})
                streams.append(connection.getresponse())
            self.write(OTHER)
            running.signal(signal.SIGHUP)
            for number in (0, 1):
                wait_until("a stream of the old token to end", functools.partial(self.has_ended, streams[number]))
            running.send(datagram(engine_id="after"))
            wait_until("the other one to go on", lambda: b"after" in streams[2].readline())

    def test_a_wrong_file_is_a_wrong_setting(self) -> None:
        self.write(b"short")
        running = Daemon(self.folder, {"HTTP_TOKENS_FILE": self.path})
        self.addCleanup(running.close)
        self.assertEqual(running.wait_exit(), 2)
        self.assertRegex("".join(running.lines), "HTTP_TOKENS_FILE=.* line 1: .* this one has 5")


@unittest.skipIf(why_no_browser(), why_no_browser())
class InABrowser(unittest.TestCase):
    """A token as the password of Basic opens the page in a real browser, and all that the page asks for itself."""

    def test_the_page_and_its_events(self) -> None:
        with contextlib.ExitStack() as stack:
            folder = Path(stack.enter_context(tempfile.TemporaryDirectory()))
            path = folder / "tokens"
            path.write_bytes(TOKEN)
            path.chmod(0o600)
            settings: dict[str, object] = {"HTTP_TOKENS_FILE": path, "BIND_ADDRESS": "127.0.0.1", "ENABLE_LOG": "false"}
            running = stack.enter_context(daemon(folder, **settings))
            browser = stack.enter_context(contextlib.closing(Browser("en-US")))
            running.send(datagram(engine_id="before"))
            browser.open(f"http://127.0.0.1:{running.http_port}/")
            self.assertNotIn("before", browser.text("body") or "")
            browser.open(f"http://anybody:{TOKEN.decode()}@127.0.0.1:{running.http_port}/")
            wait_until("the engine to be shown", lambda: "before" in (browser.text("body") or ""))
            running.send(datagram(engine_id="after"))  # by /watch
            wait_until("the other one to be shown", lambda: "after" in (browser.text("body") or ""))
            # What a page of somebody's own does, of the same origin.
            events = """
                window.heard = [];
                new EventSource("/watch").addEventListener("snapshot", (event) => window.heard.push(event.data.length));
            """
            browser.run(events)
            wait_until("its events", lambda: browser.run("return window.heard.length"))


if __name__ == "__main__":
    unittest.main()
