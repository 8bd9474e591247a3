"""Waiting that another thread ends."""

from __future__ import annotations

import os
import select
import threading
import unittest

from tests.harness import DEADLINE_S
from wake_up import WakeUp


class Waiting(unittest.TestCase):
    """`ring` ends the waiting, whichever of the two comes first; nothing else does but the time."""

    def test_without_a_ring_it_is_waited_for_the_time(self) -> None:
        self.assertFalse(WakeUp().wait(0.0))

    def test_a_ring_before_ends_the_next_waiting_and_no_other(self) -> None:
        wake_up = WakeUp()
        wake_up.ring()
        wake_up.ring()
        self.assertTrue(wake_up.wait(DEADLINE_S))
        self.assertFalse(wake_up.wait(0.001))

    def test_a_ring_meanwhile_ends_it(self) -> None:
        wake_up, ended = WakeUp(), []
        waiting = threading.Thread(target=lambda: ended.append(wake_up.wait(DEADLINE_S)))
        waiting.start()
        wake_up.ring()
        waiting.join()
        self.assertEqual(ended, [True])

    def test_it_can_be_waited_for_together_with_other_things(self) -> None:
        wake_up, poll = WakeUp(), select.poll()
        poll.register(wake_up, select.POLLIN)
        self.assertEqual(poll.poll(0), [])
        wake_up.ring()
        self.assertEqual(poll.poll(0), [(wake_up.fileno(), select.POLLIN)])
        wake_up.take()
        self.assertEqual(poll.poll(0), [])
        wake_up.take()  # nothing is there, and nobody waits

    def test_ringing_never_waits(self) -> None:
        wake_up = WakeUp()
        for _ in range(100_000):  # more than a pipe holds
            wake_up.ring()
        self.assertTrue(wake_up.wait(DEADLINE_S))

    def test_its_descriptors_go_with_it(self) -> None:
        wake_up = WakeUp()
        descriptors = wake_up._descriptors
        del wake_up
        for descriptor in descriptors:
            with self.assertRaises(OSError):
                os.fstat(descriptor)


if __name__ == "__main__":
    unittest.main()
