"""Waiting that another thread ends."""

from __future__ import annotations

import os
import select
import threading
import unittest
from unittest import mock

from tests.harness import DEADLINE_S
from wake_up import WakeUp


class Waiting(unittest.TestCase):
    """`set` ends the waiting, whichever of the two comes first; nothing else does but the time."""

    def test_wait_ends_with_the_time(self) -> None:
        self.assertFalse(WakeUp().wait(0.0))

    def test_set_before_ends_the_next_wait_only(self) -> None:
        wake_up = WakeUp()
        wake_up.set()
        wake_up.set()
        self.assertTrue(wake_up.wait(DEADLINE_S))
        self.assertFalse(wake_up.wait(0.001))

    def test_set_meanwhile_ends_the_wait(self) -> None:
        wake_up, ended = WakeUp(), []
        waiting = threading.Thread(target=lambda: ended.append(wake_up.wait(DEADLINE_S)), daemon=True)
        waiting.start()
        wake_up.set()
        waiting.join(DEADLINE_S)
        self.assertEqual(ended, [True])

    def test_can_be_polled_with_others(self) -> None:
        wake_up, poll = WakeUp(), select.poll()
        poll.register(wake_up, select.POLLIN)
        self.assertEqual(poll.poll(0), [])
        wake_up.set()
        self.assertEqual(poll.poll(0), [(wake_up.fileno(), select.POLLIN)])
        wake_up.clear()
        self.assertEqual(poll.poll(0), [])
        wake_up.clear()  # nothing is there, and nobody waits

    def test_set_never_blocks(self) -> None:
        wake_up = WakeUp()
        for _ in range(100_000):  # more than a pipe holds
            wake_up.set()
        self.assertTrue(wake_up.wait(DEADLINE_S))

    def test_descriptors_are_closed_with_it(self) -> None:
        for let_go in (WakeUp.close, lambda _: None):
            wake_up = WakeUp()
            pipe = wake_up._pipe
            assert pipe is not None
            descriptors = (pipe.reader, pipe.writer)
            del pipe
            let_go(wake_up)
            del wake_up
            for descriptor in descriptors:
                with self.assertRaises(OSError):
                    os.fstat(descriptor)

    def test_nothing_happens_once_it_is_closed(self) -> None:
        """A number of a descriptor may belong to something else by then."""
        wake_up = WakeUp()
        wake_up.close()
        wake_up.close()
        with mock.patch("wake_up.os.write") as write, mock.patch("wake_up.os.read") as read:
            wake_up.set()
            wake_up.clear()
            self.assertFalse(wake_up.wait(DEADLINE_S))
        self.assertEqual((write.called, read.called), (False, False))


if __name__ == "__main__":
    unittest.main()
