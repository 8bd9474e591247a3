"""A counter is declared once: what is counted, and that the pages say the same."""

from __future__ import annotations

import unittest

from gateway_counters import COUNTERS, FINAL_COUNTERS, OUTCOMES, DatagramCounters
from tests.harness import TOP


class Counters(unittest.TestCase):
    """A counter is declared once, and is the same number at /stats, at /metrics and in the pages."""

    def test_the_page_s_table_of_outcomes_is_this_one(self) -> None:
        text = (TOP / "docs" / "engines.md").read_text()
        rows = [
            f"| {f'`{outcome.counter}`' if outcome.counter else outcome.name} | {outcome.when} | {outcome.shown} |"
            f" {'yes' if outcome.logged else 'no'} | {'yes' if outcome.heard else 'no'} |"
            for outcome in OUTCOMES
        ]
        self.assertEqual([row for row in rows if row not in text], [])
        self.assertTrue("\n".join(rows) + "\n" in text, "in the order in which they are asked")

    def test_no_name_is_given_twice(self) -> None:
        for names in ([counter.path for counter in COUNTERS], [counter.family for counter in COUNTERS], FINAL_COUNTERS):
            self.assertEqual(len(names), len(set(names)))

    def test_outcomes_are_counted_by_their_names(self) -> None:
        counters = DatagramCounters()
        for outcome in OUTCOMES:
            counters.count(1.5, [outcome.name] * 2, [], 0)
        document = counters.document()
        self.assertEqual(document["accepted"], 2)
        for outcome in OUTCOMES:
            if outcome.counter not in (None, "rejected_source", "rejected_signature", "invalid_states"):
                self.assertEqual(document[outcome.counter], 2, outcome.name)
        counters.count(2.5, [], ["not_json", "not_json", "too_deep"], 4)
        document = counters.document()
        self.assertEqual((document["invalid_states"], document["rejected_source"]), (3, 4))
        self.assertEqual((document["invalid_reasons"]["not_json"], document["last_received"]), (2, 2.5))
        counters.count_signed(["out_of_order"], 3, ["unsigned", "clock", "clock"])
        document = counters.document()
        self.assertEqual((document["rejected_signature"], document["signature_reasons"]["clock"]), (3, 2))
        outcomes = sum(document[outcome.counter] for outcome in OUTCOMES if outcome.counter is not None)
        self.assertEqual(document["total_received"], outcomes + document["accepted"])


if __name__ == "__main__":
    unittest.main()
