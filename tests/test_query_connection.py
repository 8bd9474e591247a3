"""Places and turns of connections, shared out by network; without a socket."""

from __future__ import annotations

import unittest
from typing import Any
from unittest import mock

from query_connection import (
    MAX_RESERVE_PER_NETWORK,
    RESERVE_CONNECTIONS,
    Connection,
    Outbox,
    Phase,
    Places,
    TurnQueue,
    UnsentBytes,
    network_of,
)
from tests.harness import FakeClock


class Networks(unittest.TestCase):
    """An IPv4 address is a network, however it is written; of IPv6 it is the /64 that one customer has."""

    def test_what_is_one(self) -> None:
        self.assertEqual(network_of("::ffff:10.0.0.1"), network_of("10.0.0.1"))
        self.assertEqual(network_of("2001:db8::1"), network_of("2001:db8:0:0:ffff::2%eth0"))
        self.assertNotEqual(network_of("2001:db8::1"), network_of("2001:db8:0:1::1"))
        self.assertNotEqual(network_of("10.0.0.1"), network_of("10.0.0.2"))


class Sending(unittest.TestCase):
    """What waits for a reader counts whole until the last byte is taken."""

    def test_in_pieces(self) -> None:
        unsent = UnsentBytes()
        outbox, taken = Outbox(unsent), bytearray()
        limit = 3

        def sendmsg(parts: list[memoryview]) -> int:
            nonlocal limit
            if not limit:
                raise BlockingIOError
            piece = b"".join(parts)[:limit]
            limit = 0
            taken.extend(piece)
            return len(piece)

        sock: Any = mock.Mock(sendmsg=sendmsg)
        outbox.put(b"head", b"", b"body")
        self.assertEqual(outbox.send(sock), 3)
        self.assertEqual((bool(outbox), unsent.total), (True, 8))
        limit = 99
        self.assertEqual(outbox.send(sock), 5)
        self.assertEqual((bool(outbox), unsent.total, bytes(taken)), (False, 0, b"headbody"))
        outbox.put(b"more")
        outbox.clear()
        self.assertEqual((bool(outbox), unsent.total), (False, 0))


class PlacesCase(unittest.TestCase):
    """Connections in the phases that a test gives them."""

    def setUp(self) -> None:
        self.clock = FakeClock()
        self.places = Places(8, 650.0)

    def add(self, host: str, phase: Phase = Phase.IDLE, *, reserve: bool = False, begun_s: float = 5.0) -> Connection:
        sock: Any = mock.Mock()
        connection = Connection(sock, (host, 1), unsent=self.places.unsent, idle_timeout_s=650.0, clock=self.clock)
        if reserve:
            connection.use_reserve()
        connection.phase = phase
        if phase is Phase.READING:
            connection.deadline = self.clock() + 10.0 - begun_s
        self.places.add(connection)
        self.places.forget_ranking()
        return connection

    def spare(self, host: str, *, reserve: bool = False) -> Connection | None:
        return self.places.find_spare(host, self.clock(), reserve=reserve)


class WhoHasToGo(PlacesCase):
    """First who asks nothing, in the network that has most; never who is being answered."""

    def test_idle_before_begun_and_large_before_small(self) -> None:
        small = self.add("10.0.0.1")
        begun = [self.add("10.0.0.2", Phase.READING, begun_s=9.0 - number) for number in range(5)]
        idle = self.add("10.0.0.2")
        self.add("10.0.0.2", Phase.WRITING)
        self.assertTrue(self.places.are_taken())
        for expected in (idle, begun[0]):
            self.assertIs(self.spare("10.0.0.3"), expected)
            self.places.discard(expected)
            expected.close()
        self.places.discard(small)
        self.places.discard(small)
        self.assertEqual(len(self.places), 5)

    def test_nobody_who_is_being_answered(self) -> None:
        for phase in (Phase.WAITING, Phase.WRITING, Phase.STREAMING):
            self.add("10.0.0.1", phase)
        self.assertIsNone(self.spare("10.0.0.2"))

    def test_what_a_smaller_network_has_begun_stays(self) -> None:
        self.add("10.0.0.1", Phase.READING)
        self.add("10.0.0.2", Phase.WRITING)
        self.add("10.0.0.2", Phase.WRITING)
        self.assertIsNone(self.spare("10.0.0.2"))
        self.assertIsNotNone(self.spare("10.0.0.3"))


class Reserve(PlacesCase):
    """It is for those who have few places while another network has most; no network ever gets all of it."""

    def test_half_of_it_is_the_most(self) -> None:
        for _ in range(MAX_RESERVE_PER_NETWORK):
            self.assertFalse(self.places.is_reserve_taken("10.0.0.1"))
            self.add("10.0.0.1", Phase.WAITING, reserve=True)
        self.assertTrue(self.places.is_reserve_taken("10.0.0.1"))
        self.assertFalse(self.places.is_reserve_taken("10.0.0.2"))
        for _ in range(RESERVE_CONNECTIONS - MAX_RESERVE_PER_NETWORK):
            self.add("10.0.0.2", Phase.WAITING, reserve=True)
        self.assertTrue(self.places.is_reserve_taken("10.0.0.3"))

    def test_a_network_with_its_share_makes_room_itself(self) -> None:
        """And nothing of a smaller network has to go for it, whatever that is doing."""
        honest = self.add("10.0.0.2", reserve=True)
        greedy = [self.add("10.0.0.1", Phase.WAITING, reserve=True) for _ in range(MAX_RESERVE_PER_NETWORK)]
        self.assertIsNone(self.spare("10.0.0.1", reserve=True))
        greedy[0].phase = Phase.LINGERING
        self.places.forget_ranking()
        self.assertIs(self.spare("10.0.0.1", reserve=True), greedy[0])
        self.assertIsNotNone(self.spare("10.0.0.3", reserve=True))
        self.assertIn(honest, self.places)

    def test_who_may_ask_anything(self) -> None:
        for _ in range(8):
            self.add("10.0.0.1", Phase.WRITING)
        self.assertTrue(self.places.may_use_reserve("10.0.0.2"))
        self.assertFalse(self.places.may_use_reserve("10.0.0.1"))

    def test_a_place_that_becomes_a_usual_one(self) -> None:
        connection = self.add("10.0.0.1", reserve=True)
        self.assertFalse(self.places.are_taken())
        for _ in range(7):
            self.add("10.0.0.2")
        self.places.promote(connection)
        self.assertTrue(self.places.are_taken())
        self.places.discard(connection)
        self.assertFalse(self.places.are_taken())


class Turns(PlacesCase):
    """Networks take turns, and in each the first to come is first."""

    def test_in_turn(self) -> None:
        queue = TurnQueue()
        greedy = [self.add("10.0.0.1") for _ in range(3)]
        other = self.add("10.0.0.2")
        for connection in (*greedy, other):
            queue.push(connection)
        self.assertEqual([queue.pop() for _ in range(4)], [greedy[0], other, greedy[1], greedy[2]])
        self.assertFalse(queue)
        self.assertRaises(StopIteration, queue.pop)


if __name__ == "__main__":
    unittest.main()
