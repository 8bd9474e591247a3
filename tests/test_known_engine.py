"""One engine of the table: where its next datagram stands, and who sends for it."""

from __future__ import annotations

import unittest
from typing import Any

from boot_sequence import LATE, NEWER, REPEATED, RESTARTED
from engine_state import BOOT, DatagramTexts, is_heartbeat, parse
from engine_view import NOTHING
from known_engine import CONFLICT_CHANGES, KnownEngine
from staleness import Freshness
from state_record import encode_receipt, encode_record
from tests.harness import datagram

FRESHNESS = Freshness(2000, 6000)
SOURCE, OTHER = b'"10.0.0.1:5000"', b'"10.0.0.2:5000"'


def texts_of(**changes: Any) -> DatagramTexts:
    return parse(datagram(**changes)).texts()


def record_of(texts: DatagramTexts) -> bytes:
    return encode_record(texts[1:BOOT] + encode_receipt(1.5))


def engine_of(now: float, **changes: Any) -> KnownEngine:
    texts = texts_of(**changes)
    return KnownEngine(texts, (record_of(texts), is_heartbeat(texts), now, SOURCE, NOTHING))


class Place(unittest.TestCase):
    """Numbers decide where there are any, timestamps where there are none."""

    def place(self, engine: KnownEngine, now: float, **changes: Any) -> str:
        texts = texts_of(**changes)
        return engine.place(texts, record_of(texts), now, FRESHNESS)

    def test_by_time(self) -> None:
        engine = engine_of(100.0, timestamp_ms=10_000)
        for changes, place in (
            ({"timestamp_ms": 10_001}, NEWER),
            ({"timestamp_ms": 10_000}, REPEATED),
            ({"timestamp_ms": 10_000, "pending_tokens_total": 7}, NEWER),
            ({"timestamp_ms": 8000}, LATE),
            ({"timestamp_ms": 7999}, RESTARTED),
        ):
            with self.subTest(changes):
                self.assertEqual(self.place(engine, 100.1, **changes), place)
        self.assertEqual(self.place(engine, 103.0, timestamp_ms=9000), NEWER, "after a silence any time is new")

    def test_by_number(self) -> None:
        engine = engine_of(100.0, boot="x", seq=5, timestamp_ms=10_000)
        self.assertEqual(self.place(engine, 100.1, boot="x", seq=6, timestamp_ms=1), NEWER)
        self.assertEqual(self.place(engine, 100.1, boot="x", seq=6, timestamp_ms=99_999), REPEATED)
        self.assertEqual(self.place(engine, 100.1, boot="y", seq=1, timestamp_ms=1), RESTARTED)
        self.assertEqual(self.place(engine, 100.2, boot="x", seq=7, timestamp_ms=99_999), LATE)

    def test_the_usual_one_is_taken_without_being_placed(self) -> None:
        engine = engine_of(100.0, boot="x", seq=5, phase="serving")
        self.assertIsNotNone(engine.advance(texts_of(boot="x", seq=6, phase="serving"), 100.1))
        for changes in ({"seq": 6}, {"seq": 8}, {"boot": "y", "seq": 7}, {"seq": 7, "phase": "gone"}):
            with self.subTest(changes):
                self.assertIsNone(engine.advance(texts_of(**{"boot": "x", "phase": "serving", **changes}), 100.2))


class Senders(unittest.TestCase):
    """A, B, A, B within the threshold are a conflict; a move from A to B is none."""

    def test_in_turn(self) -> None:
        engine = engine_of(100.0)
        found = [engine.note_sender((OTHER, SOURCE)[turn % 2], 100.0 + turn, FRESHNESS) for turn in range(5)]
        self.assertEqual(found, [False] * (CONFLICT_CHANGES - 1) + [True] * (6 - CONFLICT_CHANGES))
        self.assertGreater(engine.visible[4][4], 104.0)

    def test_now_and_then(self) -> None:
        engine = engine_of(100.0)
        turns = [engine.note_sender((OTHER, SOURCE)[turn % 2], 100.0 + 3 * turn, FRESHNESS) for turn in range(9)]
        self.assertNotIn(True, turns)

    def test_a_move(self) -> None:
        engine = engine_of(100.0)
        self.assertEqual([engine.note_sender(OTHER, 100.0 + turn, FRESHNESS) for turn in range(9)], [False] * 9)


if __name__ == "__main__":
    unittest.main()
