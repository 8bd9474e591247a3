"""The file of keys: what is in it is used to the letter, and what cannot be used is told without showing a key."""

from __future__ import annotations

import hmac
import random
import re
import tempfile
import unittest
from pathlib import Path

from config import ConfigError
from signing_keys import IdPattern, KeysError, SigningKey, load_keys, read_keys

SECRET = "00112233445566778899aabbccddeeff"
OTHER = "ffeeddccbbaa99887766554433221100f0e1d2c3"
GOOD = f"good {OTHER}\n"

# Each with the line at fault, and words of what is said of it.
WRONG_FILES: tuple[tuple[bytes | str, int | None, str], ...] = (
    ("", None, "has no key"),
    ("\n\r\n  \n\t\n", None, "has no key"),
    (f"# none {SECRET}\n", None, "has no key"),
    (f" # not a comment {SECRET}\n", 1, "begins with a space"),
    (f"\ta {SECRET}\n", 1, "begins with a space"),
    ("a", 1, "the key is missing"),
    ("a ", 1, "the key is missing"),
    ("a \t ", 1, "the key is missing"),
    (f"{SECRET}", 1, "the key is missing"),
    (f"{SECRET} a", 1, "hex"),
    (f"{SECRET} {SECRET[:30]}", 1, "this one has 30"),
    (f"a {SECRET[:31]}", 1, "this one has 31"),
    (f"a {SECRET}a", 1, "an even number of hex digits, and this one has 33"),
    (f"a {SECRET * 4}ab", 1, "this one has 130"),
    (f"a {SECRET * 100}", 1, "this one has 3200"),
    (f"a {SECRET[:-1]}g", 1, "something else than hex digits"),
    (f"a 0x{SECRET}", 1, "something else than hex digits"),
    (f"a {SECRET[:16]}-{SECRET[16:]}", 1, "something else than hex digits"),
    (f"a {SECRET[:16]}:{SECRET[16:]}", 1, "something else than hex digits"),
    (f"a {SECRET[:16]} {SECRET[16:]}", 1, "this one has 16"),
    (f'a "{SECRET}"', 1, "something else than hex digits"),
    (f"a key={SECRET}", 1, "something else than hex digits"),
    (f"a={SECRET}", 1, "a key id is"),
    (f"a:{SECRET}", 1, "a key id is"),
    (f"a,{SECRET}", 1, "a key id is"),
    (f"a.b {SECRET}", 1, "a key id is"),
    (f"a/b {SECRET}", 1, "a key id is"),
    (f"a* {SECRET}", 1, "a key id is"),
    (f"{'a' * 33} {SECRET}", 1, "a key id is"),
    (f"ключ {SECRET}", 1, "a key id is"),
    (f"ａ {SECRET}", 1, "a key id is"),
    (f"a\0 {SECRET}", 1, "a key id is"),
    (f"a\u00a0{SECRET}", 1, "a key id is"),
    (f"a\u3000b {SECRET}", 1, "a key id is"),
    (f"a\v{SECRET}", 1, "a key id is"),
    (f"a {'０' * 32}", 1, "something else than hex digits"),
    (f"a {SECRET}\r\r", 1, "something else than hex digits"),
    (f"a {SECRET}\rb {OTHER}", 1, "something else than hex digits"),
    (f"a {SECRET}\0", 1, "something else than hex digits"),
    (f"a {SECRET} ", 1, "the pattern is empty"),
    (f"a {SECRET}\t \t", 1, "the pattern is empty"),
    (f"a {SECRET} http://a ", 1, "a space at an end"),
    (f"a {SECRET} http://a:*\t", 1, "not printable"),
    (f"a {SECRET} http://a\u200b", 1, "not printable"),
    (f"a {SECRET} http://\x1b[31m", 1, "not printable"),
    (f"a {SECRET} http://a\r\r\n", 1, "not printable"),
    (f"a {SECRET} {'x' * 257}", 1, "longer than an engine_id"),
    (f"a {SECRET} {'?' * 257}*", 1, "longer than an engine_id"),
    (f"a {SECRET} ".encode() + b"\xff\xfe", 1, "not UTF-8"),
    (f"a {SECRET}\n".encode("utf-16"), 1, "a key id is"),
    (f"a {SECRET}\n".encode("utf-8-sig"), 1, "byte-order mark"),
    (f"{GOOD}a {SECRET}\n\ngood {SECRET} b*", 4, "that of line 1 already"),
    (f"{GOOD}# good\ngood {OTHER}", 3, "that of line 1 already"),
    (f"{GOOD}\n\n# {SECRET}\n{SECRET}\n", 5, "the key is missing"),
    (f"{GOOD}{GOOD.upper()}a words {SECRET}\n", 3, "something else than hex digits"),
    (f"-----BEGIN PRIVATE KEY-----\n{SECRET}\n", 1, "something else than hex digits"),
    (f'{{"a": "{SECRET}"}}', 1, "a key id is"),
    (f"VLLM_STATE_GATEWAY_KEY={SECRET} *", 1, "a key id is"),
)


class Files(unittest.TestCase):
    def setUp(self) -> None:
        folder = tempfile.TemporaryDirectory()
        self.addCleanup(folder.cleanup)
        self.path = Path(folder.name) / "keys"

    def write(self, content: bytes | str, mode: int = 0o600) -> str:
        self.path.write_bytes(content.encode() if isinstance(content, str) else content)
        self.path.chmod(mode)
        return str(self.path)

    def test_keys_comments_empty_lines_and_spaces(self) -> None:
        keys, warnings = read_keys(
            self.write(
                f"# rotated in spring\nk1 {SECRET}\r\n\n  \t\nA-Z_0\t {OTHER.upper()}   http://10.0.0.*:80?0\n"
                f"#k1 {OTHER}\n{'x' * 32} {SECRET * 4} * a \u00e4 #?"
            )
        )
        self.assertEqual(list(keys), [b"k1", b"A-Z_0", b"x" * 32])
        self.assertEqual(warnings, [])
        self.assertTrue(keys[b"k1"].speaks_for(b'"anything"'))
        for quoted_id, spoken_for in (
            ('"http://10.0.0.7:8000"', True), ('"http://10.0.0.7:8001"', False), ('"http://10.0.1.7:8000"', False),
            ('"http://10.0.0.7:8000/"', False), ('"xhttp://10.0.0.7:8000"', False),
        ):  # fmt: skip
            for _ in range(2):  # looked up, and remembered
                self.assertIs(keys[b"A-Z_0"].speaks_for(quoted_id.encode()), spoken_for)
        self.assertTrue(keys[b"x" * 32].speaks_for('"\\" a \u00e4 #x"'.encode()))

    def test_what_cannot_be_used(self) -> None:
        """Each is refused, with its line and what is wrong with it; nothing that the file has is shown."""
        self.assertGreaterEqual(len(WRONG_FILES), 50)
        for content, line, words in WRONG_FILES:
            with self.subTest(content):
                path = self.write(content)
                with self.assertRaises(KeysError) as refused:
                    read_keys(path)
                text = str(refused.exception)
                self.assertIn(words, text)
                self.assertTrue(text.startswith(f"{path} line {line}: " if line else path), text)
                for secret in (SECRET[:8], OTHER[:8], OTHER[:8].upper(), "http://", "\x1b", "PRIVATE"):
                    self.assertNotIn(secret, text)
                with self.assertRaises(ConfigError) as error:
                    load_keys(path)
                self.assertEqual(
                    error.exception.errors, [f"VLLM_STATE_GATEWAY_KEYS_FILE={path!r} cannot be used: {text}"]
                )

    def test_no_file(self) -> None:
        for path in (str(self.path), str(self.path.parent), "/dev/null", "/dev/zero", ""):
            with self.subTest(path), self.assertRaises(ConfigError) as refused:
                load_keys(path)
            self.assertIn("VLLM_STATE_GATEWAY_KEYS_FILE=", str(refused.exception))
        self.assertIsNone(load_keys(None))

    def test_what_is_warned_about(self) -> None:
        """A file that everybody can read, and a key that stands there twice; neither is shown."""
        _, warnings = read_keys(self.write(f"a {SECRET}", 0o644))
        self.assertEqual(warnings, [f"others than its owner and group can read {self.path}: `chmod o= {self.path}`"])
        with self.assertLogs("elrar.keys", "WARNING") as logged:
            load_keys(str(self.path))
        self.assertEqual(len(logged.records), 1)
        _, warnings = read_keys(self.write(f"a {SECRET} a*\nb {OTHER}\nc {SECRET.upper()} c*", 0o640))
        self.assertEqual(warnings, [f"{self.path}: lines 1 and 3 have the same key, so that who has one has both"])

    def test_many_keys(self) -> None:
        """One an engine, in thousands."""
        content = "".join(f"k{number} {number:064x} engine-{number}\n" for number in range(5000))
        keys, warnings = read_keys(self.write(content))
        self.assertEqual((len(keys), warnings), (5000, []))
        self.assertTrue(keys[b"k4999"].speaks_for(b'"engine-4999"'))
        self.assertFalse(keys[b"k4999"].speaks_for(b'"engine-499"'))


class Codes(unittest.TestCase):
    def test_it_is_hmac(self) -> None:
        """The first half of HMAC-SHA256, as hex digits, for keys of every length."""
        chance = random.Random(16)
        for size in range(16, 65):
            secret = chance.randbytes(size)
            key = SigningKey(b"k", secret, None)
            for length in (0, 1, 270, 8192):
                text = chance.randbytes(length)
                code = hmac.digest(secret, text, "sha256")[:16].hex().encode()
                self.assertEqual(key.code(text), b":" + code)

    def test_it_is_not_shown(self) -> None:
        self.assertNotIn("secret", repr(SigningKey(b"k", b"secret" * 4, None)))


class Patterns(unittest.TestCase):
    def test_only_star_and_question_mark_are_special(self) -> None:
        for pattern, text, fits in (
            ("*", "", True), ("*", "anything at all", True), ("?", "", False), ("?", "x", True), ("?", "xy", False),
            ("a*", "a", True), ("a*", "ba", False), ("*a", "ba", True), ("*a", "ab", False), ("a*b*c", "abc", True),
            ("a*b*c", "a-b-b-c", True), ("a*b*c", "a-c-b", False), ("a**b", "ab", True), ("*?*", "", False),
            ("a?c", "abc", True), ("a?c", "ac", False), ("A", "a", False), ("[ab]", "a", False),
            ("[ab]", "[ab]", True), ("^a", "a", False), ("a|b", "a", False), ("ä?", "äö", True),
            ("a.c", "abc", False), ("\\*", "*", False), ("\\*", "\\anything", True), ("a$", "a", False),
            ("x*", "x\U0001f600", True), ("x?", "x\U0001f600", True), ("ab*", "aab", False), ("*aab", "aaab", True),
            ("*ab?", "ababx", True), ("http://10.*", "http://101", False),
        ):  # fmt: skip
            with self.subTest(pattern=pattern, text=text):
                self.assertIs(IdPattern(pattern).matches(text), fits)

    def test_it_is_what_a_regular_expression_says(self) -> None:
        """On thousands of patterns and texts of few letters, which are the hard ones."""
        chance = random.Random(16)
        for _ in range(5000):
            pattern = "".join(chance.choices("ab*?", k=chance.randrange(1, 9)))
            text = "".join(chance.choices("ab", k=chance.randrange(9)))
            meant = re.escape(pattern).replace(r"\*", ".*").replace(r"\?", ".")
            self.assertIs(IdPattern(pattern).matches(text), re.fullmatch(meant, text) is not None, (pattern, text))

    def test_the_worst_takes_no_longer_than_others(self) -> None:
        """Stars without end, against an id that nearly fits: a step for each of its characters, none taken twice."""

        class Counted(str):
            steps = 0

            def __iter__(self):  # type: ignore[no-untyped-def]
                for character in str.__iter__(self):
                    Counted.steps += 1
                    yield character

        for pattern in ("*a" * 128 + "b", "*a?" * 80 + "*b", "*" * 100_000 + "b"):
            Counted.steps = 0
            self.assertFalse(IdPattern(pattern).matches(Counted("a" * 256)))
            self.assertLessEqual(Counted.steps, 256)


if __name__ == "__main__":
    unittest.main()
