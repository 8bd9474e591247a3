"""Receiving a batch: both ways give the same datagrams with the same addresses."""

from __future__ import annotations

import contextlib
import errno
import os
import socket
import struct
import sys
import unittest
from unittest import mock

from engine_state import MAX_DATAGRAM_BYTES
from sockets import open_udp_sockets
from tests.harness import ipv6_works
from udp_receiver import MAX_BATCH_DATAGRAMS, BatchReceiver, PortableReceiver, make_receiver, unpack_address


class Receivers(unittest.TestCase):
    """Both ways of receiving give the same datagrams with the same addresses."""

    def test_both_take_the_same(self) -> None:
        sizes = [0, 1, 270, MAX_DATAGRAM_BYTES, MAX_DATAGRAM_BYTES + 1, 30_000, *range(MAX_BATCH_DATAGRAMS)]
        hosts = {"127.0.0.1": ("127.0.0.1",), "::1": ("::1",), "::": ("::1", "127.0.0.1")}
        for address in hosts if ipv6_works() else ("127.0.0.1",):
            for host in hosts[address]:
                with self.subTest(address=address, host=host), contextlib.ExitStack() as stack:
                    sock = (
                        open_udp_sockets(address, 0, 8 << 20)[0] if address != "127.0.0.1" else self.ipv4_alone(stack)
                    )
                    stack.enter_context(sock)
                    fast = make_receiver(sock)
                    self.assertIsInstance(fast, BatchReceiver if sys.platform == "linux" else PortableReceiver)
                    sender = stack.enter_context(
                        socket.socket(socket.AF_INET6 if ":" in host else socket.AF_INET, socket.SOCK_DGRAM)
                    )
                    taken = []
                    for receiver in (fast, PortableReceiver(sock)):
                        for size in sizes:
                            sender.sendto(bytes([size % 256]) * size, (host, sock.getsockname()[1]))
                        batches = [receiver.receive() for _ in range(3)]
                        self.assertEqual([len(datagrams) for datagrams, _ in batches], [MAX_BATCH_DATAGRAMS, 6, 0])
                        self.assertEqual([len(addresses) for _, addresses in batches], [MAX_BATCH_DATAGRAMS, 6, 0])
                        taken.append([(datagrams, list(addresses)) for datagrams, addresses in batches])
                    self.assertEqual(taken[0], taken[1])
                    datagrams, addresses = taken[0][0]
                    self.assertEqual([len(one) for one in datagrams][:6], [0, 1, 270, 8192, 8193, 8193])
                    self.assertEqual(unpack_address(addresses[0]), (host, sender.getsockname()[1]))

    def ipv4_alone(self, stack: contextlib.ExitStack) -> socket.socket:
        sock, *others = open_udp_sockets("127.0.0.1", 0, 8 << 20)
        for other in others:
            stack.enter_context(other)
        return sock

    def test_errors_are_the_systems(self) -> None:
        for make in (make_receiver, PortableReceiver):
            with contextlib.ExitStack() as stack:
                sock = self.ipv4_alone(stack)
                receiver = make(sock)
                sock.close()
                with self.assertRaises(OSError) as raised:
                    receiver.receive()
                self.assertEqual(raised.exception.strerror, os.strerror(errno.EBADF))

    def test_a_link_local_sender_keeps_its_scope(self) -> None:
        packed = struct.pack("=H", socket.AF_INET6) + struct.pack("!HI16s", 5000, 0, b"\xfe\x80" + bytes(13) + b"\x01")
        host, port = unpack_address(packed + struct.pack("=I", 1))
        self.assertEqual((host, port), (f"fe80::1%{socket.if_indextoname(1)}", 5000))
        self.assertEqual(unpack_address(packed + struct.pack("=I", 99999))[0], "fe80::1%99999")

    def test_without_recvmmsg_the_portable_one_is_made(self) -> None:
        with contextlib.ExitStack() as stack:
            sock = stack.enter_context(self.ipv4_alone(stack))
            with mock.patch("udp_receiver.ctypes", None):
                self.assertIsInstance(make_receiver(sock), PortableReceiver)
            with mock.patch("udp_receiver.sys.platform", "darwin"):
                self.assertIsInstance(make_receiver(sock), PortableReceiver)
            with mock.patch.object(BatchReceiver, "is_allowed", return_value=False):
                self.assertIsInstance(make_receiver(sock), PortableReceiver)

    @unittest.skipUnless(sys.platform == "linux", "recvmmsg is Linux's")
    def test_asking_whether_recvmmsg_is_allowed_takes_nothing(self) -> None:
        with contextlib.ExitStack() as stack:
            sock = stack.enter_context(self.ipv4_alone(stack))
            with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as sending:
                sending.sendto(b"waits", sock.getsockname())
            receiver = BatchReceiver(sock)
            self.assertTrue(receiver.is_allowed())
            self.assertEqual(receiver.receive()[0], [b"waits"])
            with mock.patch.object(receiver, "_recvmmsg", return_value=-1):
                self.assertFalse(receiver.is_allowed())


if __name__ == "__main__":
    unittest.main()
