"""The last datagram that was rejected for each reason."""

from __future__ import annotations

import json
import unittest

from engine_state import REASONS
from rejected_samples import MAX_DETAIL_CHARS, RejectedSamples


class Samples(unittest.TestCase):
    """One of each reason that occurred, the last; put together when it is read."""

    def setUp(self) -> None:
        self.samples = RejectedSamples()

    def test_nothing_until_it_occurs(self) -> None:
        self.assertEqual(self.samples.document(), {})

    def test_the_last_of_each_reason(self) -> None:
        self.samples.keep("not_json", 1.0, b'"10.0.0.1:1"', "%s, in %d bytes", "not_json", 5)
        self.samples.keep("not_json", 2.5, b'"10.0.0.2:2"', "%s, in %d bytes", "not_json", 7)
        self.samples.keep("rejected_capacity", 3.0, b'"[::1]:3"', "engine_id=%r", '"a\\"引"'.encode())
        self.assertEqual(
            self.samples.document(),
            {
                "not_json": {"time_ms": 2500, "source": "10.0.0.2:2", "detail": "not_json, in 7 bytes"},
                "rejected_capacity": {"time_ms": 3000, "source": "[::1]:3", "detail": "engine_id='a\"引'"},
            },
        )

    def test_bounded_whatever_strangers_send(self) -> None:
        for reason in REASONS:
            self.samples.keep(reason, 1.0, b'"10.0.0.1:1"', "%s", "x" * 9000)
        document = self.samples.document()
        self.assertEqual(set(document), set(REASONS))
        self.assertEqual({len(one["detail"]) for one in document.values()}, {MAX_DETAIL_CHARS})
        json.dumps(document)


if __name__ == "__main__":
    unittest.main()
