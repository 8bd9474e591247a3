"""Nothing that was signed is taken twice, and no honest engine pays for it; all of it with clocks moved by hand."""

from __future__ import annotations

import random
import unittest

from boot_memory import (
    BOOTS_PER_ENGINE,
    COPY,
    LATE,
    MAX_BOOTS,
    MAX_LOOKED_AT,
    MIN_TAKEN_BACK,
    TAKEN,
    BootMemory,
)
from datagram_signature import CLOCK, REPLAYED, TOO_MANY_BOOTS
from staleness import Freshness

E, A, B, C = b'"e"', b'"a"', b'"b"', b'"c"'
DAY_MS = 1_795_000_000_000


class Memory(unittest.TestCase):
    """`at` and `wall_ms` are the gateway's clocks."""

    max_engines = 10

    def setUp(self) -> None:
        self.at = 1000.0
        self.wall_ms = DAY_MS
        self.memory = BootMemory(self.max_engines, Freshness(2000, 6000))
        self.move(0)

    def move(self, ms: int, *, wall_ms: int | None = None) -> None:
        """Move both clocks, or the host's by something else, as when it is set."""
        self.at += ms / 1000
        self.wall_ms += ms if wall_ms is None else wall_ms
        self.memory.begin(self.at, self.wall_ms / 1000)

    def hear(
        self,
        boot: bytes,
        seq: int,
        off_ms: int = 0,
        *,
        of: bytes = E,
        signature: bytes | None = None,
        gone: bool = False,
    ) -> str:
        """A datagram whose timestamp is off by so much."""
        if signature is None:
            signature = b"%b %b %d %d" % (of, boot, seq, self.wall_ms + off_ms)
        return self.memory.judge(of, boot, seq, self.wall_ms + off_ms, signature, is_farewell=gone)

    def forget_due(self) -> None:
        for _ in range(len(self.memory) // MAX_LOOKED_AT + 2):
            self.move(0)


class Numbers(Memory):
    def test_a_number_is_taken_once(self) -> None:
        """Whatever comes first, in whatever order."""
        chance = random.Random(16)
        taken: list[int] = []
        for _ in range(2000):
            seq = chance.randrange(500)
            if self.hear(A, seq, signature=b"%d" % chance.randrange(10**9)) is TAKEN:
                taken.append(seq)
        self.assertEqual(taken, sorted(set(taken)))
        self.assertGreater(len(taken), 1)

    def test_gaps_are_no_matter(self) -> None:
        for seq in (0, 1, 5, 5000, 2**53 - 1, 2**53):
            self.assertEqual(self.hear(A, seq), TAKEN)
        self.assertEqual(self.hear(A, 2**53, signature=b"another"), REPLAYED)
        self.assertEqual(self.hear(A, 5001), REPLAYED)  # far below: it does not begin again

    def test_the_same_again(self) -> None:
        """An exact copy of the last one is a duplicate; of an earlier one, or the same number otherwise, a replay."""
        self.assertEqual(self.hear(A, 1, signature=b"one"), TAKEN)
        self.assertEqual(self.hear(A, 1, signature=b"one"), COPY)
        self.assertEqual(self.hear(A, 1, signature=b"one too"), REPLAYED)
        self.assertEqual(self.hear(A, 2, signature=b"two"), TAKEN)
        self.assertEqual(self.hear(A, 1, signature=b"one"), REPLAYED)
        self.assertEqual(self.hear(A, 2, signature=b"two"), COPY)

    def test_copies_and_replays_are_not_heard(self) -> None:
        """The engine is silent all the same: another boot takes over."""
        self.hear(A, 1, signature=b"one")
        for _ in range(30):
            self.move(100)
            self.assertEqual(self.memory.judge(E, A, 1, self.wall_ms, b"one"), COPY)
        self.assertEqual(self.hear(B, 1, -10_000), TAKEN)

    def test_engines_do_not_know_each_other(self) -> None:
        self.assertEqual(self.hear(A, 7), TAKEN)
        self.assertEqual(self.hear(A, 1, of=b'"f"'), TAKEN)


class Clocks(Memory):
    def test_300_s(self) -> None:
        for off_ms, outcome in (
            (-300_001, CLOCK), (-300_000, TAKEN), (-299_000, TAKEN), (0, TAKEN), (299_000, TAKEN), (300_000, TAKEN),
            (300_001, CLOCK), (301_000, CLOCK), (2**53 - DAY_MS, CLOCK), (-DAY_MS, CLOCK),
        ):  # fmt: skip
            with self.subTest(off_ms):
                self.assertEqual(self.hear(A, 1, off_ms, of=b'"%d"' % off_ms), outcome)

    def test_a_refused_one_is_not_remembered(self) -> None:
        self.assertEqual(self.hear(A, 100, 301_000), CLOCK)
        self.assertEqual(self.hear(A, 1), TAKEN)

    def test_within_a_boot_the_number_counts(self) -> None:
        """An engine's clock may be set back while it runs."""
        self.assertEqual(self.hear(A, 1, 200_000), TAKEN)
        self.assertEqual(self.hear(A, 2, -200_000), TAKEN)


class Boots(Memory):
    def test_a_restart(self) -> None:
        """It takes over at once, having a later timestamp."""
        self.assertEqual(self.hear(A, 100), TAKEN)
        self.move(1)
        self.assertEqual(self.hear(B, 1), TAKEN)
        self.assertEqual(self.hear(B, 2), TAKEN)

    def test_a_boot_never_heard(self) -> None:
        """Captured and held back, it does not take over from a live one; from a silent one it can."""
        self.hear(A, 1)
        self.move(2000)
        self.assertEqual(self.hear(B, 1, -2000), REPLAYED)  # no later than the newest
        self.assertEqual(self.hear(B, 1, -1999), TAKEN)
        self.move(2001)
        self.assertEqual(self.hear(C, 1, -100_000), TAKEN)

    def test_an_earlier_boot(self) -> None:
        """What is late of it is out of order; what was taken of it is a replay, and remains one."""
        self.hear(A, 5)
        self.move(10)
        self.hear(B, 1)
        self.assertEqual(self.hear(A, 5), REPLAYED)
        self.assertEqual(self.hear(A, 6), LATE)
        self.assertEqual(self.hear(A, 6, signature=b"6"), REPLAYED)
        self.assertEqual(self.hear(B, 2), TAKEN)
        self.move(2001)
        self.assertEqual(self.hear(A, 6), REPLAYED)
        self.assertEqual(self.hear(A, 7), TAKEN)  # the other has been silent

    def test_late_ones_do_not_keep_the_current_boot_live(self) -> None:
        self.hear(A, 1)
        self.move(10)
        self.hear(B, 1)
        outcomes = []
        for seq in range(2, 23):
            self.move(100)
            outcomes.append(self.hear(A, seq))
        self.assertEqual(outcomes, [LATE] * 20 + [TAKEN])

    def test_after_a_farewell(self) -> None:
        """It is silent from then on: a new life begins at once, whatever its clock; the old one stays replayed."""
        self.hear(A, 1)
        self.assertEqual(self.hear(A, 2, gone=True), TAKEN)
        self.assertEqual(self.hear(A, 3, gone=True), TAKEN)
        self.assertEqual(self.hear(A, 2), REPLAYED)
        self.assertEqual(self.hear(B, 1, -5000), TAKEN)
        self.assertEqual(self.hear(A, 3), REPLAYED)

    def test_replays_over_many_restarts(self) -> None:
        """Everything that 16 boots said, again, at any later time: nothing is taken, until the clock refuses it."""
        said = []
        for life in range(MAX_BOOTS):
            for seq in range(3):
                self.move(100)
                said.append((b'"%d"' % life, seq, self.wall_ms))
                self.assertEqual(self.hear(b'"%d"' % life, seq), TAKEN)
        for _ in range(70):
            for boot, seq, stamp_ms in said:
                outcome = self.memory.judge(E, boot, seq, stamp_ms, b"%b %b %d %d" % (E, boot, seq, stamp_ms))
                expected = {COPY} if (boot, seq, stamp_ms) == said[-1] else {REPLAYED}
                self.assertIn(outcome, expected if stamp_ms >= self.wall_ms - 300_000 else {CLOCK})
            self.move(5000)
        self.assertEqual(len(self.memory), 0)


class Bounds(Memory):
    def test_of_an_engine(self) -> None:
        """The 17th boot within 300 s is refused; those that are known go on."""
        for life in range(MAX_BOOTS):
            self.move(1000)
            self.assertEqual(self.hear(b"%d" % life, 1), TAKEN)
        self.move(1000)
        self.assertEqual(self.hear(C, 1), TOO_MANY_BOOTS)
        self.assertEqual(self.hear(b"15", 2), TAKEN)
        self.assertEqual(self.hear(A, 1, of=b'"f"'), TAKEN)
        self.move(285_000)  # the first has been silent for 301 s, the second for 300
        self.assertEqual(self.hear(b"15", 3), TAKEN)
        self.assertEqual(self.hear(C, 1, 1), TAKEN)
        self.assertEqual(self.hear(A, 1, 2), TOO_MANY_BOOTS)

    def test_of_all(self) -> None:
        """A flood from a stolen key fills the memory, and costs nobody who is known a place in it."""
        self.assertEqual(self.hear(A, 1), TAKEN)
        outcomes = [self.hear(A, 1, of=b'"%d"' % number) for number in range(1000)]
        room = BOOTS_PER_ENGINE * self.max_engines - 1
        self.assertEqual(outcomes, [TAKEN] * room + [TOO_MANY_BOOTS] * (1000 - room))
        self.assertEqual(self.hear(A, 2), TAKEN)
        self.assertEqual(self.hear(A, 1), REPLAYED)
        self.move(300_001)
        self.assertEqual(self.hear(B, 1), TAKEN)
        self.assertEqual(len(self.memory), 1)

    def test_a_future_timestamp_is_remembered_for_longer(self) -> None:
        """Until 300 s after it, and no longer."""
        self.hear(A, 1, 200_000)
        self.move(499_000)
        self.assertEqual(len(self.memory), 1)
        self.assertEqual(self.hear(A, 1, -299_000, signature=b"another"), REPLAYED)
        self.move(1001)
        self.assertEqual(len(self.memory), 0)
        self.hear(A, 1, -299_000)
        self.move(1001)
        self.assertEqual(len(self.memory), 0)

    def test_what_found_no_place_in_the_table(self) -> None:
        """It was not taken: it is not remembered, and a flood of it takes no memory."""
        for number in range(100 * self.max_engines + 3 * MIN_TAKEN_BACK):
            engine_id = b'"%d"' % number
            self.assertEqual(self.hear(A, 1, of=engine_id), TAKEN)
            self.memory.take_back(engine_id, A)
            self.memory.take_back(engine_id, A)  # two datagrams of it in one go
        self.assertEqual(len(self.memory), 0)
        self.assertLessEqual(len(self.memory._due), MIN_TAKEN_BACK + 1)
        self.assertEqual(self.memory._engines, {})
        self.hear(A, 1)
        self.move(1)
        self.memory.take_back(E, A)  # taken before: it stays
        self.assertEqual(self.hear(A, 1), REPLAYED)

    def test_the_host_s_clock_is_set(self) -> None:
        """Forward, and back again: what was taken stays taken."""
        self.hear(A, 1)
        said_at_ms = self.wall_ms
        self.move(10, wall_ms=3_600_000)
        self.move(10, wall_ms=-3_600_000)
        self.assertEqual(self.memory.judge(E, A, 1, said_at_ms, b"x"), REPLAYED)
        self.move(
            400_000, wall_ms=200_000
        )  # set back while it was to be remembered: remembered for as long as it counts
        self.assertEqual(self.memory.judge(E, A, 1, said_at_ms, b"x"), REPLAYED)
        self.move(101_000)
        self.assertEqual(self.memory.judge(E, A, 1, said_at_ms, b"x"), CLOCK)
        self.assertEqual(len(self.memory), 0)


class Fleet(Memory):
    max_engines = 2000

    def test_forgetting_is_bounded_in_one_go(self) -> None:
        """Thousands whose time is over at once are forgotten a few hundred at a time."""
        for number in range(self.max_engines):
            self.hear(A, 1, of=b'"%d"' % number)
        self.move(300_001)
        self.assertEqual(len(self.memory), self.max_engines - MAX_LOOKED_AT)
        self.forget_due()
        self.assertEqual((len(self.memory), self.memory._due, self.memory._engines), (0, [], {}))

    def test_live_engines_are_looked_at_once_in_300_s(self) -> None:
        """Each stays remembered, with one place in the heap, however often it is heard from."""
        for second in range(400):
            self.move(1000)
            for number in range(20):
                self.assertEqual(self.hear(A, second, of=b'"%d"' % number), TAKEN)
        self.assertEqual((len(self.memory), len(self.memory._due)), (20, 20))
        self.assertLess(self.memory._pushed, 20 * 3)


if __name__ == "__main__":
    unittest.main()
