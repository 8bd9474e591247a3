"""Farewells: what comes late behind one revives nobody."""

from __future__ import annotations

import unittest

from boot_sequence import BootSequence
from farewells import Farewells
from staleness import Freshness


class Late(unittest.TestCase):
    """Whether a datagram was sent before its engine's farewell is told by numbers, or, without them, by timestamps."""

    def setUp(self) -> None:
        self.farewells = Farewells(3, Freshness(2000, 6000))

    def overtook(self, quoted_id: bytes = b'"a"', *, boot: bytes | None = None, seq: int = 0, timestamp_ms: int = 0,
                 now: float = 100.0, is_farewell: bool = False) -> bool:  # fmt: skip
        return self.farewells.overtook(quoted_id, boot, seq, timestamp_ms, now, is_farewell=is_farewell)

    def test_with_numbers(self) -> None:
        self.farewells.remember(b'"a"', 100.0, BootSequence(b'"x"', 5, 100.0), 1000)
        self.assertTrue(self.overtook(boot=b'"x"', seq=4))
        self.assertFalse(self.overtook(boot=b'"x"', seq=5), "it again")
        self.assertFalse(self.overtook(boot=b'"x"', seq=6))
        self.assertFalse(self.overtook(boot=b'"new"', seq=1))
        self.assertFalse(self.overtook(b'"b"', boot=b'"x"', seq=4), "another engine")

    def test_without_numbers(self) -> None:
        self.farewells.remember(b'"a"', 100.0, None, 10_000)
        for timestamp_ms, late in ((10_000, True), (8000, True), (7999, False), (10_001, False)):
            self.assertIs(self.overtook(timestamp_ms=timestamp_ms), late, timestamp_ms)
        self.assertFalse(self.overtook(timestamp_ms=10_000, is_farewell=True), "it again")

    def test_for_as_long_as_an_engine_would_be_known(self) -> None:
        self.farewells.remember(b'"a"', 100.0, None, 10_000)
        self.assertTrue(self.overtook(timestamp_ms=10_000, now=106.0))
        self.assertFalse(self.overtook(timestamp_ms=10_000, now=106.01))
        self.farewells.expire(106.0)
        self.assertEqual(len(self.farewells), 1)
        self.farewells.expire(106.01)
        self.assertEqual(len(self.farewells), 0)

    def test_the_oldest_makes_room_and_who_speaks_again_is_forgotten(self) -> None:
        for number in range(5):
            self.farewells.remember(b"%d" % number, 100.0 + number, None, 10_000)
        self.assertEqual(len(self.farewells), 3)
        self.assertFalse(self.overtook(b"1", timestamp_ms=10_000, now=105.0))
        self.assertTrue(self.overtook(b"2", timestamp_ms=10_000, now=105.0))
        self.assertIsNone(self.farewells.forget(b"2", 105.0))
        self.assertFalse(self.overtook(b"2", timestamp_ms=10_000, now=105.0))

    def test_who_speaks_again_has_the_numbers_of_its_life_before_until_the_expiry(self) -> None:
        sequence = BootSequence(b'"x"', 5, 100.0)
        for now, known in ((106.0, sequence), (106.01, None)):
            self.farewells.remember(b'"a"', 100.0, sequence, 1000)
            self.assertIs(self.farewells.forget(b'"a"', now), known)

    def test_its_repetitions_are_counted_as_any_numbers(self) -> None:
        self.farewells.remember(b'"a"', 100.0, BootSequence(b'"x"', 5, 100.0), 1000)
        self.assertEqual(self.farewells.place(b'"a"', b'"x"', 8, 100.1), (2, 0))
        self.assertEqual(self.farewells.place(b'"a"', b'"x"', 7, 100.1), (0, 1))
        self.assertEqual(self.farewells.place(b'"a"', b'"y"', 9, 100.1), (0, 0))
        self.assertEqual(self.farewells.place(b'"a"', b'"x"', 5000, 100.1), (0, 0))


if __name__ == "__main__":
    unittest.main()
