"""Signed datagrams on their way into the table: what is refused, and what is let through as it came."""

from __future__ import annotations

import unittest
from typing import Any

from engine_state import parse
from signed_intake import SignedIntake
from signing_keys import IdPattern, SigningKey
from staleness import Freshness
from state_store import Batch
from tests.harness import FakeClock, datagram

WALL_S = 1_755_532_567.5
KEY = SigningKey(b"a", bytes(range(16)), None)
ITS_OWN = SigningKey(b"own", bytes(range(1, 17)), IdPattern("mine*"))
SOURCE = b'"10.0.0.1:5000"'


def signed(key: SigningKey = KEY, **changes: Any) -> bytes:
    said = {"timestamp_ms": int(WALL_S * 1000), "boot": "x", "seq": 1, **changes}
    text = datagram(**{name: value for name, value in said.items() if value is not None})[:-1]
    return b'%b, "sig": "%b%b"}' % (text, key.key_id, key.code(text))


class Intake(unittest.TestCase):
    """Each datagram has one verdict, and what is left in the batch is what may be taken."""

    def setUp(self) -> None:
        self.clock = FakeClock()
        keys = {key.key_id: key for key in (KEY, ITS_OWN)}
        self.intake = SignedIntake(keys, 100, Freshness(2000, 6000), clock=self.clock)

    def take(self, *datagrams: bytes) -> tuple[list[bytes], Batch]:
        batch = Batch(self.clock(), WALL_S)
        taken, batch.sources = self.intake.verify(batch, list(datagrams), [SOURCE] * len(datagrams))
        batch.states = [parse(one).texts() for one in taken]
        return self.intake.admit(batch, taken), batch

    def test_what_is_signed_is_let_through_byte_for_byte(self) -> None:
        one, other = signed(), signed(engine_id="b", seq=7)
        texts, batch = self.take(one, other)
        self.assertEqual((texts, len(batch.states), batch.rejected_signature), ([one, other], 2, []))

    def test_the_reasons(self) -> None:
        stranger = SigningKey(b"z", bytes(16), None)
        liar = SigningKey(b"a", bytes(16), None)
        for one, reason in (
            (datagram(), "unsigned"),
            (signed(stranger), "unknown_key"),
            (signed(liar), "bad_signature"),
            (signed(ITS_OWN), "not_its_engine"),
            (signed(boot=None), "no_sequence"),
            (signed(timestamp_ms=1), "clock"),
        ):
            with self.subTest(reason):
                texts, batch = self.take(one)
                self.assertEqual((texts, list(batch.states), batch.rejected_signature), ([], [], [reason]))
                self.assertEqual(self.intake.samples.document()[reason]["source"], "10.0.0.1:5000")

    def test_one_bad_one_harms_no_other_of_its_batch(self) -> None:
        good = [signed(seq=1), signed(ITS_OWN, engine_id="mine 1")]
        texts, batch = self.take(datagram(), good[0], signed(ITS_OWN), good[1], signed(timestamp_ms=1))
        self.assertEqual((texts, len(batch.states), len(batch.sources)), (good, 2, 2))
        self.assertEqual(sorted(batch.rejected_signature), ["clock", "not_its_engine", "unsigned"])

    def test_again_is_a_copy_and_older_is_a_replay(self) -> None:
        first, second = signed(seq=1), signed(seq=2)
        self.take(first)
        texts, batch = self.take(second)
        self.assertEqual(texts, [second])
        _, batch = self.take(second)
        self.assertEqual((batch.copies, batch.rejected_signature), (1, []))
        _, batch = self.take(first)
        self.assertEqual((batch.copies, batch.rejected_signature), (0, ["replayed"]))

    def test_other_keys_from_the_next_batch_on(self) -> None:
        new = SigningKey(b"new", bytes(range(2, 18)), None)
        self.intake.set_keys({new.key_id: new})
        texts, batch = self.take(signed(new), signed())
        self.assertEqual((len(texts), batch.rejected_signature), (1, ["unknown_key"]))


if __name__ == "__main__":
    unittest.main()
