"""What is a valid state, and why a datagram is not one (the contract's section 1)."""

from __future__ import annotations

import contextlib
import functools
import itertools
import json
import math
import random
import sys
import time
import unittest
from collections.abc import Callable, Iterator
from typing import Any

from engine_state import (
    FIELD_NAMES,
    FIELDS_JSON,
    MAX_DATAGRAM_BYTES,
    MAX_NESTING,
    REASONS,
    InvalidDatagram,
    is_heartbeat,
    match_labelled,
    quote_json,
    unquote_json,
)
from tests.harness import CAPTURED, GUIDE_EXAMPLE, PLACEHOLDERS, datagram, fields, match_canonical, parse_datagram


def without(field: str) -> bytes:
    return json.dumps({name: value for name, value in GUIDE_EXAMPLE.items() if name != field}).encode()


def raw(field: str, text: str, **changes: object) -> bytes:
    """A state whose `field` has `text` as its value, to the letter."""
    return datagram(**{**changes, field: "@@"}).replace(b'"@@"', text.encode())


def padded(size: int) -> bytes:
    """A valid state of exactly `size` bytes."""
    bare = len(datagram(filler=""))
    return datagram(filler="x" * (size - bare))


def twice(field: str) -> list[bytes]:
    """A state with `field` given twice: with one value and with two, the second first, its name escaped, compact."""
    one = datagram()
    again = json.dumps({field: GUIDE_EXAMPLE[field]}).encode()[1:-1]
    other = json.dumps({field: "another"}).encode()[1:-1]
    escaped = again.replace(b'"' + field[:1].encode(), b'"\\u%04x' % ord(field[0]), 1)
    return [
        one[:-1] + b", " + again + b"}",
        one[:-1] + b", " + other + b"}",
        b"{" + other + b", " + one[1:],
        one[:-1] + b", " + escaped + b"}",
        (one[:-1] + b", " + again + b"}").replace(b" ", b""),
        one.replace(again, again + b", " + again),
    ]


INTEGERS = ("timestamp_ms", "pending_tokens_total", "kv_cache_free_blocks", "kv_cache_total_blocks")
NUMBERS = ("latency_pred_ms", "engine_capacity")
TEXTS = ("engine_id", "scheduling_mode")

VALID: dict[str, bytes] = {
    "the guide's example": datagram(),
    "white space around": b" \r\n\t" + datagram() + b"\n \r\t",
    "8192 bytes": padded(8192),
    "unknown fields": datagram(newer={"nested": [1, {"a": None}]}, flag=True),
    "a large unknown field": datagram(newer="x" * 7000),
    "an unknown integer of 5000 digits": raw("newer", "7" * 5000),
    "an unknown field nested deep": raw("newer", "[" * (MAX_NESTING - 1) + "]" * (MAX_NESTING - 1)),
    "brackets in a string are no nesting": datagram(newer='["{' * 1000),
    "a name twice, but not at the top": raw("newer", '{"a": 1, "a": 2, "engine_id": [{"b": 1, "b": 1}]}'),
    "NaN in the text of an unknown field": datagram(newer="NaN and -Infinity"),
    "an unknown field beyond all numbers": raw("newer", "1e999"),
    "an unknown field with a lone surrogate": raw("newer", r'"\ud800"'),
    "fields in another order": json.dumps(dict(reversed(GUIDE_EXAMPLE.items()))).encode(),
    "escaped text": raw("engine_id", r'"\u0068ttp:\/\/a"'),
    "text beyond ASCII": json.dumps(fields(engine_id="引擎-é-😀"), ensure_ascii=False).encode(),
    "256 characters of four bytes": json.dumps(fields(engine_id="😀" * 256), ensure_ascii=False).encode(),
    "a mode of 64 characters": datagram(scheduling_mode="m" * 64),
    "a mode that is new": datagram(scheduling_mode="round robin"),
    "timestamp 0": datagram(timestamp_ms=0),
    "timestamp 2^53": datagram(timestamp_ms=2**53),
    "a number of 1e300": raw("latency_pred_ms", "1e300"),
    "a number of -0.0": raw("latency_pred_ms", "-0.0"),
    "integers as numbers": datagram(latency_pred_ms=100, engine_capacity=0),
    "all unknown": datagram(**PLACEHOLDERS),
    "free above total": datagram(kv_cache_free_blocks=2000),
    **{f"a whole-number float as {name}": raw(name, "10.0") for name in INTEGERS},
    "a whole-number float with an exponent": raw("pending_tokens_total", "1e3"),
    "nasty but printable": datagram(engine_id="""'"\\<script>../..%2e/?#"""),
}

INVALID: dict[str, tuple[str, bytes]] = {
    "nothing": ("not_json", b""),
    "white space only": ("not_json", b" \n"),
    "random bytes": ("not_utf8", bytes(range(128, 256))),
    "a statsd line": ("not_json", b"requests:1|c"),
    "a DNS query": ("not_json", b"\x12\x34\x01\x00\x00\x01\x00\x00\x00\x00\x00\x00\x03www\x00\x00\x01\x00\x01"),
    "a TLS hello": ("not_json", b"\x16\x03\x01\x00\x05\x01\x00\x00\x01\x03"),
    "two objects": ("not_json", datagram() + datagram()),
    "text after it": ("not_json", datagram() + b"x"),
    "single quotes": ("not_json", b"{'engine_id': 'a'}"),
    "an array": ("not_an_object", b"[" + datagram() + b"]"),
    "null": ("not_an_object", b"null"),
    "a string": ("not_an_object", b'"engine_id"'),
    "a number": ("not_an_object", b"7"),
    "an empty object": ("missing_field", b"{}"),
    "white space and a cut state": ("not_json", b" \n" + datagram()[:-1] + b" \n"),
    "a word that begins as JSON does": ("not_json", b"nginx.requests_total"),
    "a number and more": ("not_json", b"1:2|c0"),
    "a word of JSON's": ("not_an_object", b" true\n"),
    "an infinity": ("not_json", b"Infinity"),
    "-Infinity": ("not_json", b"-Infinity"),
    **{f"{name} twice, {at}": ("duplicate_field", one) for name in FIELD_NAMES for at, one in enumerate(twice(name))},
    "an unknown field twice": ("duplicate_field", datagram()[:-1] + b', "newer": 1, "newer": 1}'),
    "an unknown field twice, once escaped": ("duplicate_field", datagram()[:-1] + b', "newer": 1, "new\\u0065r": 2}'),
    "an empty name twice": ("duplicate_field", datagram()[:-1] + b', "": 1, "": 2}'),
    "a field twice and the others missing": ("duplicate_field", b'{"engine_id": "a", "engine_id": "a"}'),
    "a field twice, once NaN": ("duplicate_field", datagram()[:-1] + b', "engine_capacity": NaN}'),
    "invalid UTF-8": ("not_utf8", datagram().replace(b"test", b"te\xffst")),
    "an overlong encoding": ("not_utf8", datagram().replace(b"test", b"te\xc0\xafst")),
    "a surrogate in UTF-8": ("not_utf8", datagram().replace(b"test", b"te\xed\xa0\x80st")),
    "a byte-order mark": ("not_json", b"\xef\xbb\xbf" + datagram()),
    "UTF-16": ("not_utf8", datagram().decode().encode("utf-16")),
    "UTF-16 without a mark": ("not_json", datagram().decode().encode("utf-16-le")),
    "8193 bytes": ("too_large", padded(8193)),
    "65507 bytes that begin like a valid state": ("too_large", datagram() + b" " * (65507 - len(datagram()))),
    "nested too deep": ("too_deep", raw("newer", "[" * MAX_NESTING + "]" * MAX_NESTING)),
    "nested too deep and never closed": ("too_deep", b"[" * 8192),
    "objects nested too deep": ("too_deep", b'{"a":' * 1600),
    # Each of these took 0.2 s where the strings in it were looked for again from each of their quotes.
    "escaped quotes that never end": ("too_deep", b"[" * (MAX_NESTING + 1) + b'"' + b'\\"' * 3500),
    "escaped quotes before brackets": ("not_json", b'"' + b'\\"' * 3840 + b"[" * (MAX_NESTING + 1)),
    "a backslash at the end": ("not_json", b'"' + b'\\"' * 3500 + b"[" * (MAX_NESTING + 1) + b"\\"),
    "NaN in an unknown field": ("not_json", datagram(newer=float("nan"))),
    "a raw newline in a string": ("not_json", datagram(engine_id="@").replace(b"@", b"a\nb")),
    **{f"without {name}": ("missing_field", without(name)) for name in FIELD_NAMES},
    **{f"null as {name}": ("wrong_type", datagram(**{name: None})) for name in FIELD_NAMES},
    **{f"an array as {name}": ("wrong_type", datagram(**{name: []})) for name in FIELD_NAMES},
    **{f"true as {name}": ("wrong_type", datagram(**{name: True})) for name in FIELD_NAMES},
    **{f"a numeric string as {name}": ("wrong_type", datagram(**{name: "1"})) for name in INTEGERS + NUMBERS},
    **{f"a number as {name}": ("wrong_type", datagram(**{name: 1})) for name in TEXTS},
    **{f"a fraction as {name}": ("wrong_type", datagram(**{name: 1.5})) for name in INTEGERS},
    **{f"NaN as {name}": ("out_of_range", raw(name, "NaN")) for name in INTEGERS + NUMBERS},
    **{f"Infinity as {name}": ("out_of_range", raw(name, "Infinity")) for name in INTEGERS + NUMBERS},
    **{f"-Infinity as {name}": ("out_of_range", raw(name, "-Infinity")) for name in INTEGERS + NUMBERS},
    **{f"1e999 as {name}": ("out_of_range", raw(name, "1e999")) for name in INTEGERS + NUMBERS},
    **{f"2^53 + 1 as {name}": ("out_of_range", raw(name, str(2**53 + 1))) for name in INTEGERS + NUMBERS},
    **{f"17 digits as {name}": ("out_of_range", raw(name, "9" * 17)) for name in INTEGERS + NUMBERS},
    **{f"5000 digits as {name}": ("out_of_range", raw(name, "9" * 5000)) for name in INTEGERS + NUMBERS},
    **{f"minus 5000 digits as {name}": ("out_of_range", raw(name, "-" + "9" * 5000)) for name in INTEGERS + NUMBERS},
    **{f"-2 as {name}": ("out_of_range", datagram(**{name: -2})) for name in INTEGERS + NUMBERS},
    **{f"1e300 as {name}": ("out_of_range", raw(name, "1e300")) for name in INTEGERS},
    "-1 as timestamp_ms": ("out_of_range", datagram(timestamp_ms=-1)),
    "-1 as pending_tokens_total": ("out_of_range", datagram(pending_tokens_total=-1)),
    "a tiny negative latency": ("out_of_range", datagram(latency_pred_ms=-1e-300)),
    **{f"an empty {name}": ("out_of_range", datagram(**{name: ""})) for name in TEXTS},
    "an engine_id of 257 characters": ("out_of_range", datagram(engine_id="e" * 257)),
    "a mode of 65 characters": ("out_of_range", datagram(scheduling_mode="m" * 65)),
    **{
        f"{name} with {what}": ("not_printable", datagram(**{name: f"a{character}b"}))
        for name in TEXTS
        for what, character in {
            "a newline": "\n",
            "NUL": "\0",
            "ESC": "\x1b",
            "a bidirectional override": "\u202e",
            "a zero-width space": "\u200b",
            "a line separator": "\u2028",
            "a no-break space": "\u00a0",
            "a lone surrogate": "\ud800",
            "a private character": "\ue000",
        }.items()
    },
    "a space before engine_id": ("not_printable", datagram(engine_id=" a")),
    "a space after engine_id": ("not_printable", datagram(engine_id="a ")),
    "a space as engine_id": ("not_printable", datagram(engine_id=" ")),
}


class Validity(unittest.TestCase):
    """Every datagram is a state with the very values that were sent, or is refused with one reason."""

    def test_valid_datagrams_are_taken(self) -> None:
        for name, one in VALID.items():
            with self.subTest(name):
                state = parse_datagram(one)
                sent = json.loads(one, parse_int=lambda digits: int(digits[:20]))
                self.assertEqual(state.as_dict(), {field: sent[field] for field in FIELD_NAMES})

    def test_invalid_datagrams_are_refused_with_their_reason(self) -> None:
        for name, (reason, one) in INVALID.items():
            with self.subTest(name), self.assertRaises(InvalidDatagram) as refused:
                parse_datagram(one)
            self.assertEqual(refused.exception.reason, reason, name)

    def test_every_reason_is_met_and_explained(self) -> None:
        self.assertEqual({reason for reason, _ in INVALID.values()}, set(REASONS))

    def test_the_refusal_names_a_known_field_that_is_given_twice_and_no_other_text(self) -> None:
        for name, expected in (("engine_id", "engine_id"), ("newer\n", None)):
            with self.subTest(name), self.assertRaises(InvalidDatagram) as refused:
                parse_datagram(datagram()[:-1] + b", %b: 1, %b: 2}" % ((json.dumps(name).encode(),) * 2))
            self.assertEqual(refused.exception.field, expected)

    def test_the_refusal_names_the_field(self) -> None:
        for name in FIELD_NAMES:
            with self.subTest(name), self.assertRaises(InvalidDatagram) as refused:
                parse_datagram(datagram(**{name: None}))
            self.assertEqual(refused.exception.field, name)
            self.assertIn(name, str(refused.exception))

    def test_a_state_cut_at_any_byte_is_refused(self) -> None:
        whole = datagram(engine_id="引擎")
        for end in range(len(whole)):
            with self.subTest(end=end), self.assertRaises(InvalidDatagram):
                parse_datagram(whole[:end])

    def test_integers_are_integers_and_numbers_stay_as_written(self) -> None:
        state = parse_datagram(raw("pending_tokens_total", "10.0"))
        self.assertIs(type(state.pending_tokens_total), int)
        self.assertEqual(repr(parse_datagram(raw("latency_pred_ms", "100")).latency_pred_ms), "100")
        self.assertEqual(
            repr(parse_datagram(raw("latency_pred_ms", "16.11793779048644")).latency_pred_ms), "16.11793779048644"
        )


TOKENS = (
    b" ", b"\n", b"\x00", b"\x7f", b"a", b"_", b"7", b"-", b"+", b".", b"e", b'"', b"\\", b"/", b":", b",",
    b"[", b"]", b"{", b"}", b"[]", b"{}", b'""', b"[[]],", b'{"a":0},', b'{"a":{}},', b'"":0,', b'\\"', b"\\\\",
    b"\\u0041", b"\\ud800", b"0,", b"0.1,", b"1e-400,", b"9e307,", b"null,", b"NaN,", b"-Infinity,", b"\xff",
    "\u00e9".encode(), "\U0001f600".encode(),
)  # fmt: skip
VALUES = (
    b"%b", b'"%b', b'"%b"', b"[%b0]", b'{"a":%b0}', b"[" * MAX_NESTING + b"%b", b'["' + b"[" * MAX_NESTING + b'",%b',
)  # fmt: skip


def families() -> Iterator[tuple[bytes, Callable[[int], bytes]]]:
    """What strangers may send, as functions of the size: each token again and again, in each place where it may be."""
    rng = random.Random(12)
    pairs = [b"".join(rng.sample(TOKENS, rng.randint(2, 3))) for _ in range(60)]
    for token in (*TOKENS, *pairs, b"9" * 4300 + b",", b"0." + b"3" * 1000 + b","):
        for value in VALUES:
            for frame in (b"%b", datagram()[:-1] + b', "newer": %b}'):
                around = frame.replace(b"%b", value)
                yield around.replace(b"%b", token[:20]), functools.partial(repeated, around, token)


def repeated(around: bytes, token: bytes, size: int) -> bytes:
    """So many bytes of it."""
    return around.replace(b"%b", token * max(1, (size - len(around)) // len(token)))[:size]


def cpu_time(one: bytes) -> float:
    """Seconds of this thread that the parser takes for a datagram, the shortest of some turns."""
    shortest = math.inf
    for _ in range(3):
        started = time.thread_time_ns()
        for _ in range(4):
            with contextlib.suppress(InvalidDatagram):
                match_canonical(one)
                match_labelled(one)
                parse_datagram(one)
        shortest = min(shortest, (time.thread_time_ns() - started) / 4e9)
    return shortest


class Cost(unittest.TestCase):
    """Nothing that a stranger sends takes more than linear time, or many times as long as a usual state a byte."""

    def steps(self, one: bytes) -> int:
        """How many calls, of Python and of C, the parser makes for a datagram."""
        calls = itertools.count()

        def count(_frame: object, event: str, _argument: object) -> None:
            if event in ("call", "c_call"):
                next(calls)

        sys.setprofile(count)
        try:
            with contextlib.suppress(InvalidDatagram):
                parse_datagram(one)
        finally:
            sys.setprofile(None)
        return next(calls)

    def test_the_parser_takes_no_more_steps_for_what_is_large(self) -> None:
        for name, made in families():
            small, large = self.steps(made(2048)), self.steps(made(MAX_DATAGRAM_BYTES))
            self.assertLess(large, 150, name)
            self.assertLessEqual(large, small + 60, name)

    def test_four_times_the_bytes_take_no_more_than_linear_time(self) -> None:
        usual_s = cpu_time(datagram()) / len(datagram())

        def wrong(made: Callable[[int], bytes]) -> bool:
            small, large = cpu_time(made(2048)), cpu_time(made(MAX_DATAGRAM_BYTES))
            # What is refused at its first or last byte takes next to nothing; a small one may be, and a large one not.
            return large > 10 * max(small, usual_s * 2048) or large > 10 * usual_s * MAX_DATAGRAM_BYTES

        for name, made in families():
            # A machine that is busy makes one measurement wrong, but not three.
            self.assertFalse(all(wrong(made) for _ in range(3)), name)

    def test_what_is_dearest_is_known(self) -> None:
        """Each of these took 30 to 600 times as long a byte as a usual state, in one way of counting or another."""
        for one in (b"[]" * 4096, b"[" + b'{"a":0},' * 1000 + b"0]", b'"' * 8192, b"[" * 501 + b'"' + b'\\"' * 3840):
            self.assertLess(self.steps(one), 40, one[:20])


class Heartbeats(unittest.TestCase):
    """A heartbeat is a state whose five load fields are all placeholders, and nothing else is."""

    def assert_heartbeat(self, one: bytes, expected: bool) -> None:
        self.assertIs(is_heartbeat(parse_datagram(one).texts()), expected)
        matched = match_canonical(one)
        if matched is not None:
            self.assertIs(is_heartbeat(matched), expected)

    def test_all_five_placeholders_are_a_heartbeat(self) -> None:
        self.assert_heartbeat(datagram(**PLACEHOLDERS), True)
        self.assert_heartbeat(datagram(**{name: int(value) for name, value in PLACEHOLDERS.items()}), True)
        for zero in ("-0.0", "0.000", "0e5", "1e-999"):
            self.assert_heartbeat(raw("latency_pred_ms", zero, **PLACEHOLDERS), True)
            self.assert_heartbeat(raw("engine_capacity", zero, **PLACEHOLDERS), True)

    def test_one_real_field_makes_it_a_load_state(self) -> None:
        for name in PLACEHOLDERS:
            with self.subTest(name):
                self.assert_heartbeat(datagram(**{**PLACEHOLDERS, name: 5}), False)
                if name in NUMBERS:
                    self.assert_heartbeat(datagram(**{**PLACEHOLDERS, name: 5e-324}), False)

    def test_an_idle_engine_that_knows_its_capacity_is_no_heartbeat(self) -> None:
        self.assert_heartbeat(datagram(**{**PLACEHOLDERS, "engine_capacity": 59768.27}), False)


class Json(unittest.TestCase):
    """The eight fields are written as valid JSON with the values that were sent, whatever text is in them."""

    def test_what_is_written_is_what_was_sent(self) -> None:
        for name, one in VALID.items():
            with self.subTest(name):
                state = parse_datagram(one)
                written = json.loads(b"{%b}" % (FIELDS_JSON % state.texts()))
                self.assertEqual(written, state.as_dict())
                self.assertEqual(list(written), list(FIELD_NAMES))

    def test_a_text_that_was_quoted_comes_back_and_so_does_one_that_others_wrote(self) -> None:
        texts = [parse_datagram(one).engine_id for one in VALID.values()]
        for text in (*texts, "", '"', "\\", '\\"', "\n"):
            with self.subTest(text):
                self.assertEqual(unquote_json(quote_json(text).encode()), text)
                self.assertEqual(unquote_json(json.dumps(text).encode()), text)

    @unittest.skipUnless(CAPTURED.exists(), "the captured states are not on this machine")
    def test_a_real_engine_s_states_come_out_byte_for_byte(self) -> None:
        for line in CAPTURED.read_text().splitlines():
            sent: dict[str, Any] = json.loads(line)["state"]
            one = json.dumps(sent).encode()
            self.assertEqual(b"{%b}" % (FIELDS_JSON % parse_datagram(one).texts()), one)


if __name__ == "__main__":
    unittest.main()
