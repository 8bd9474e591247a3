"""An engine as a reader sees it at one moment."""

from __future__ import annotations

import unittest
from typing import Any

from engine_view import EngineView, status_of
from staleness import LIVE, STALE, UNAVAILABLE
from state_store import StateStore
from tests.harness import PLACEHOLDERS, FakeClock, batch, datagram


class View(unittest.TestCase):
    """What is shown follows from the newest datagram, and from when it came."""

    def setUp(self) -> None:
        self.clock = FakeClock()
        self.store = StateStore(2000, 6000, 10, 10, clock=self.clock)

    def view(self, **changes: Any) -> EngineView:
        self.store.apply(batch(self.clock(), 1_755_532_567.5, datagram(**changes), canonical=False))
        view = self.store.view("test")
        assert view is not None
        return view

    def test_status(self) -> None:
        """Who is heard from and does not serve is unavailable; who is not heard from is stale, whatever it said."""
        for live, phase, status in (
            (True, None, LIVE),
            (True, b'"serving"', LIVE),
            (True, b'"draining"', UNAVAILABLE),
            (False, b'"draining"', STALE),
            (False, None, STALE),
        ):
            with self.subTest(live=live, phase=phase):
                self.assertEqual(status_of(live, phase), status)

    def test_a_plain_state(self) -> None:
        view = self.view()
        self.assertEqual((view.engine_id, view.state.as_dict()["engine_id"]), ("test", "test"))
        self.assertEqual((view.usable, view.load_known, view.heartbeat, view.conflict), (True, True, False, False))
        self.assertEqual((view.phase, view.restarts, view.lost, view.extra), (None, 0, None, {}))
        self.assertEqual(view.received_ms, 1_755_532_567_500)
        self.assertEqual(view.clock_offset_ms, 1_755_532_567_500 - view.state.timestamp_ms)
        self.assertEqual(view.source, "10.0.0.1:5000")

    def test_what_is_not_to_be_sent_requests(self) -> None:
        """A heartbeat's load is not known; an engine that drains says so itself."""
        view = self.view(**PLACEHOLDERS)
        self.assertEqual((view.status, view.usable, view.load_known), (LIVE, False, False))
        self.clock.move(1.0)
        view = self.view(timestamp_ms=1234567999, boot="ab", seq=1, phase="draining", note="é")
        self.assertEqual((view.status, view.usable, view.phase), (UNAVAILABLE, False, "draining"))
        self.assertEqual((view.lost, view.extra), (0, {"note": "é"}))

    def test_ages(self) -> None:
        self.view()
        self.clock.move(2.5)
        view = self.store.view("test")
        assert view is not None
        self.assertEqual((view.status, view.usable, view.age_ms, view.state_age_ms), (STALE, False, 2500, 2500))


if __name__ == "__main__":
    unittest.main()
