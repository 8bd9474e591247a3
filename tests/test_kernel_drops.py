"""What the kernel dropped, by the sockets' own account."""

from __future__ import annotations

import socket
import struct
import sys
import unittest
from unittest import mock

from kernel_drops import KernelDrops


class Account(unittest.TestCase):
    """Every dropped datagram is counted once, whatever becomes of the sockets."""

    def setUp(self) -> None:
        self.sockets = [mock.Mock(spec=socket.socket), mock.Mock(spec=socket.socket)]
        self.drops = KernelDrops(self.sockets)
        self.account(0, 0)

    def account(self, *drops: int) -> None:
        for sock, count in zip(self.sockets, drops, strict=True):
            sock.getsockopt.return_value = struct.pack("=9I", *[7] * 8, count)

    @unittest.skipUnless(sys.platform == "linux", "Linux keeps this account")
    def test_sum_over_the_sockets(self) -> None:
        self.assertEqual(self.drops.total(), 0)
        self.account(3, 4)
        self.assertEqual([self.drops.total(), self.drops.total()], [7, 7])

    @unittest.skipUnless(sys.platform == "linux", "Linux keeps this account")
    def test_counter_of_32_bits_wraps_around(self) -> None:
        self.account(0xFFFFFFFF, 0)
        self.drops.total()
        self.account(4, 0)
        self.assertEqual(self.drops.total(), 0xFFFFFFFF + 5)

    @unittest.skipUnless(sys.platform == "linux", "Linux keeps this account")
    def test_closed_socket_keeps_what_was_counted(self) -> None:
        self.account(3, 4)
        self.drops.total()
        self.sockets[0].getsockopt.side_effect = OSError
        self.assertEqual(self.drops.total(), 7)

    @unittest.skipUnless(sys.platform == "linux", "Linux keeps this account")
    def test_socket_that_was_replaced_begins_anew(self) -> None:
        self.account(3, 4)
        self.drops.total()
        self.drops.forget(self.sockets[0])
        self.account(1, 4)
        self.assertEqual(self.drops.total(), 8)

    def test_elsewhere_there_is_none(self) -> None:
        with mock.patch("kernel_drops.sys.platform", "darwin"):
            self.assertIsNone(self.drops.total())


if __name__ == "__main__":
    unittest.main()
