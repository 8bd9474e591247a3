"""An entry of /engines: what it says of an engine, as JSON text and from Python."""

from __future__ import annotations

import unittest

from state_entry import entry
from tests.test_numbered_states import AGENT, NumberedCase


class Entry(NumberedCase):
    """An entry says all of it, in both ways in which it is written."""

    def test_the_entry_of_an_agent(self) -> None:
        self.send(seq=1)
        self.send(seq=4, phase="draining")
        written = entry(self.view())
        extra = {name: value for name, value in AGENT.items() if name not in ("boot", "seq", "phase")}
        expected = {"phase": "draining", "restarts": 0, "lost": 2, "conflict": False, "load_known": True,
                    "usable": False, "status": "unavailable", "extra": extra}  # fmt: skip
        self.assertEqual({name: written[name] for name in expected}, expected)

    def test_the_entry_of_the_first_edition(self) -> None:
        self.plain()
        written = entry(self.view())
        expected = {"phase": None, "restarts": 0, "lost": None, "conflict": False, "load_known": True, "usable": True}
        self.assertEqual({name: written[name] for name in expected}, expected)
        self.assertNotIn("extra", written)


if __name__ == "__main__":
    unittest.main()
