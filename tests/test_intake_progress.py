"""How far the listener has come, and how soon it goes on: the three rules, without a listener."""

from __future__ import annotations

import socket
import threading
import unittest
from unittest import mock

from intake_progress import (
    COALESCE_ABOVE_PER_S,
    LOW_LATENCY_DELAY_S,
    MAX_DELAY_S,
    MIN_DELAY_S,
    RATE_WINDOW_S,
    Pacing,
    ReadBarrier,
    Watermark,
    coalescing_delay_s,
)
from tests.harness import DEADLINE_S
from udp_listener import MAX_CHARGE_BYTES
from wake_up import WakeUp


class Delays(unittest.TestCase):
    """States that come in rapid succession are left to wait together, and never for long."""

    def test_slow_rates_are_not_delayed(self) -> None:
        for rate in (0.0, 1.0, COALESCE_ABOVE_PER_S - 1):
            self.assertEqual(coalescing_delay_s(rate, MAX_DELAY_S, float("inf")), 0.0)

    def test_delay_falls_with_the_rate_and_is_bounded(self) -> None:
        for longest_s in (MAX_DELAY_S, LOW_LATENCY_DELAY_S):
            rates = (COALESCE_ABOVE_PER_S, 5000, 10_000, 30_000, 100_000, 1_000_000)
            delays = [coalescing_delay_s(rate, longest_s, float("inf")) for rate in rates]
            self.assertEqual(delays, sorted(delays, reverse=True))
            self.assertEqual((delays[0], delays[-1]), (longest_s, MIN_DELAY_S))
        self.assertLess(LOW_LATENCY_DELAY_S, MAX_DELAY_S)

    def test_what_waits_fits_the_receive_buffer(self) -> None:
        for rate in (COALESCE_ABOVE_PER_S, 5000, 100_000, 1_000_000):
            for granted in (2304, 65_536, 212_992, 8 << 20):
                delay_s = coalescing_delay_s(rate, MAX_DELAY_S, granted * 2 / 4 / MAX_CHARGE_BYTES)
                self.assertLessEqual(delay_s * rate * MAX_CHARGE_BYTES, granted * 2 / 4 + 1)

    def test_pacing_follows_the_rate_of_the_last_window(self) -> None:
        pacing = Pacing(float("inf"), 0.0, lambda: False)
        self.assertEqual(pacing.delay_s(1000, RATE_WINDOW_S / 2), 0.0)
        self.assertGreater(pacing.delay_s(0, RATE_WINDOW_S), 0.0)
        self.assertGreater(pacing.delay_s(0, 1.5 * RATE_WINDOW_S), 0.0)
        self.assertEqual(pacing.delay_s(0, 2 * RATE_WINDOW_S), 0.0)

    def test_pacing_keeps_to_the_longest_delay(self) -> None:
        for impatient, longest_s in ((True, LOW_LATENCY_DELAY_S), (False, MAX_DELAY_S)):
            pacing = Pacing(float("inf"), 0.0, lambda answer=impatient: answer)  # type: ignore[misc]
            self.assertEqual(pacing.delay_s(100, 0.05), longest_s)


class Marks(unittest.TestCase):
    """The watermark is never later than the arrival of something that still waits."""

    def test_empty_sockets_move_it_to_the_beginning_of_the_step(self) -> None:
        told: list[float] = []
        watermark = Watermark(1000, 0.0, told.append)
        watermark.advance(5.0, 10, emptied=True)
        self.assertEqual((watermark.at, told), (5.0, [5.0]))

    def test_it_stays_while_something_may_wait(self) -> None:
        told: list[float] = []
        watermark = Watermark(1000, 0.0, told.append)
        watermark.advance(5.0, 1000, emptied=False)
        self.assertEqual((watermark.at, told), (0.0, []))

    def test_never_empty_sockets(self) -> None:
        """More than the buffers hold moves it to the moment at which the counting began."""
        watermark = Watermark(1000, 0.0)
        watermark.advance(5.0, 1, emptied=True)
        marks = []
        for began_at, taken in ((6.0, 600), (7.0, 401), (8.0, 1000), (9.0, 1)):
            watermark.advance(began_at, taken, emptied=False)
            marks.append(watermark.at)
        self.assertEqual(marks, [5.0, 5.0, 5.0, 7.0])


class Barrier(unittest.TestCase):
    """A reader goes on once everything is taken that had arrived when it asked, and never waits for nothing."""

    def setUp(self) -> None:
        self.sock = socket.socket(socket.AF_INET, socket.SOCK_DGRAM)
        self.addCleanup(self.sock.close)
        self.sock.bind(("127.0.0.1", 0))
        self.listener = WakeUp()
        self.barrier = ReadBarrier([self.sock], self.listener)

    def arrive(self) -> None:
        with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as sender:
            sender.sendto(b"x", self.sock.getsockname())

    def is_waited_for(self, timeout_s: float = 0.001) -> bool:
        """Whether a reader asks the listener for something now."""
        self.listener.clear()
        self.barrier.wait(timeout_s)
        return self.listener.wait(0.0)

    def test_empty_sockets_are_not_waited_for(self) -> None:
        self.assertFalse(self.is_waited_for(DEADLINE_S))
        self.assertFalse(self.barrier.is_requested)

    def test_what_waits_in_a_socket_is_waited_for_and_not_for_long(self) -> None:
        self.arrive()
        self.assertTrue(self.is_waited_for())
        self.assertTrue(self.barrier.is_requested)

    def test_what_has_left_the_socket_is_waited_for(self) -> None:
        self.barrier.begin()
        self.assertTrue(self.is_waited_for())

    def test_what_leaves_the_socket_during_the_look_is_waited_for(self) -> None:
        def leave(_timeout_ms: int) -> list[tuple[int, int]]:
            self.barrier.begin()
            return []

        with mock.patch.object(self.barrier, "_sockets") as polled:
            polled.poll.side_effect = leave
            self.assertTrue(self.is_waited_for())

    def test_listener_that_finished_unseen(self) -> None:
        """It has gone to wait for the next datagram, and nobody sends one."""
        self.arrive()

        def finish_unseen() -> None:
            self.sock.recv(10)

        with mock.patch.object(self.listener, "set", finish_unseen):
            self.barrier.wait(DEADLINE_S)

    def test_step_that_began_after(self) -> None:
        """A step that began after the request completes it."""
        self.arrive()
        reader = threading.Thread(target=self.barrier.wait, args=(DEADLINE_S,), daemon=True)
        reader.start()
        self.assertTrue(self.listener.wait(DEADLINE_S))
        ticket = self.barrier.ticket()
        self.barrier.begin()
        self.barrier.end(ticket, emptied=False)
        self.assertTrue(self.barrier.is_requested)
        self.barrier.end(ticket, emptied=True)
        reader.join(DEADLINE_S)
        self.assertFalse(reader.is_alive())
        self.assertFalse(self.barrier.is_requested)

    def test_step_that_began_before(self) -> None:
        """A step that began before the request does not complete it."""
        before = self.barrier.ticket()
        self.arrive()
        self.barrier.wait(0.001)
        self.barrier.end(before, emptied=True)
        self.assertTrue(self.barrier.is_requested)

    def test_nobody_waits_for_a_listener_that_is_told_to_stop(self) -> None:
        self.arrive()
        self.barrier.close()
        self.assertFalse(self.is_waited_for(DEADLINE_S))


if __name__ == "__main__":
    unittest.main()
