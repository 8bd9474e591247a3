"""The packed form of a state, and the history of an engine."""

from __future__ import annotations

import unittest

from engine_state import FIELDS
from state_record import (
    History,
    decode_record,
    decode_state,
    encode_receipt,
    encode_record,
    received_ms,
    same_state,
    timestamp_ms,
)
from tests.harness import datagram, parse_datagram
from tests.test_engine_state import VALID

RECEIVED_S = 1_755_532_567.5


def record_of(one: bytes) -> bytes:
    return encode_record(parse_datagram(one).texts()[1:] + encode_receipt(RECEIVED_S))


class Records(unittest.TestCase):
    """What is encoded comes back exactly, whatever an engine may send."""

    def test_every_valid_state_comes_back(self) -> None:
        for name, one in VALID.items():
            with self.subTest(name):
                state, record = parse_datagram(one), record_of(one)
                self.assertEqual(decode_state(state.engine_id, record), state)
                self.assertEqual(decode_record(record), [*state.texts()[1:], b"1755532567500"])
                self.assertEqual((timestamp_ms(record), received_ms(record)), (state.timestamp_ms, 1755532567500))

    def test_the_layout_is_the_table_of_fields(self) -> None:
        self.assertEqual([field.name for field in FIELDS[:2]], ["engine_id", "timestamp_ms"])
        self.assertEqual(len(decode_record(record_of(datagram()))), len(FIELDS))

    def test_equal_states_are_the_same_however_they_were_written(self) -> None:
        record = record_of(datagram(latency_pred_ms=100.0))
        self.assertTrue(same_state(record, record_of(datagram(latency_pred_ms=100))))
        self.assertFalse(same_state(record, record_of(datagram(latency_pred_ms=100.5))))


class Histories(unittest.TestCase):
    """A history has the latest records, the oldest first, and knows how many bytes it takes."""

    def records(self, count: int) -> list[bytes]:
        return [record_of(datagram(timestamp_ms=number)) for number in range(count)]

    def test_the_latest_are_kept_and_every_byte_is_accounted_for(self) -> None:
        records = self.records(200)
        for limit in (1, 7, 8, 9, 100):
            history, nbytes = History(), 0
            for number, record in enumerate(records, 1):
                nbytes += history.add(record, limit, False)
                self.assertEqual(nbytes, history.nbytes)
                kept = history.records()
                self.assertEqual(kept, records[number - len(kept) : number])
                self.assertGreaterEqual(len(kept), min(limit, number))
                self.assertLess(len(kept), limit + 16)

    def test_a_crowded_one_shrinks_to_its_newest_record(self) -> None:
        records = self.records(200)
        history = History()
        nbytes = sum(history.add(record, 100, False) for record in records[:100])
        for number, record in enumerate(records[100:], 101):
            nbytes += history.add(record, 100, True)
            self.assertEqual((nbytes, history.records()[-1]), (history.nbytes, record))
            kept = history.records()
            self.assertEqual(kept, records[number - len(kept) : number])
        self.assertEqual(history.records(), records[-1:])

    def test_a_copy_does_not_change(self) -> None:
        records = self.records(30)
        history = History()
        for record in records:
            history.add(record, 100, False)
        copy = history.copy()
        for record in records:
            history.add(record, 1, True)
        self.assertEqual(copy.records(), records)


if __name__ == "__main__":
    unittest.main()
