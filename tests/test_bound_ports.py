"""The ports of a gateway: which numbers are bound, and what becomes of one that is taken."""

from __future__ import annotations

import socket
import unittest
from collections.abc import Callable
from typing import Any
from unittest import mock

import bound_ports
from bound_ports import BoundPorts
from config import read_config
from start_errors import StartError
from tests.harness import free_port


def taken(kind: socket.SocketKind) -> socket.socket:
    """A socket that has a port of the loopback, of a number that no client is given once it is free again."""
    sock = socket.socket(socket.AF_INET, kind)
    sock.bind(("127.0.0.1", free_port()))
    if kind is socket.SOCK_STREAM:
        sock.listen()
    return sock


class Ports(unittest.TestCase):
    """UDP and HTTP have one number unless a setting says otherwise; nobody else's port is taken."""

    def ports(self, *, embedded: bool = False, **settings: object) -> BoundPorts:
        merged = {"BIND_ADDRESS": "127.0.0.1", "UDP_PORT": 0, "RECEIVE_BUFFER": 1, **settings}
        config = read_config({f"VLLM_STATE_GATEWAY_{name}": str(value) for name, value in merged.items()})
        ports = BoundPorts(config, embedded=embedded)
        self.addCleanup(ports.close)
        return ports

    def test_any_number_is_one_for_both(self) -> None:
        ports = self.ports()
        ports.bind()
        self.assertEqual(ports.http_port, ports.udp_port)
        self.assertIn(f"UDP 127.0.0.1:{ports.udp_port}", ports.describe())
        self.assertIn(f"HTTP http://127.0.0.1:{ports.udp_port}", ports.describe())
        self.assertGreaterEqual(ports.receive_buffer_bytes, 1)
        ports.close()
        ports.close()

    def test_no_http(self) -> None:
        ports = self.ports(HTTP_PORT="off")
        ports.bind()
        self.assertEqual((ports.http_port, ports.http_sockets), (None, []))
        self.assertIn("HTTP off", ports.describe())

    def test_what_is_bound_is_let_go_if_the_rest_cannot_be_had(self) -> None:
        with taken(socket.SOCK_STREAM) as other, mock.patch.object(bound_ports, "BIND_PATIENCE_S", 0.0):
            ports = self.ports(HTTP_PORT=other.getsockname()[1])
            with self.assertRaisesRegex(StartError, "TCP 127.0.0.1"):
                ports.bind()
            self.assertEqual({sock.fileno() for sock in ports.udp_sockets}, {-1})

    def test_in_a_routers_process_http_may_come_later(self) -> None:
        """States are received meanwhile, and the error is said once."""
        with taken(socket.SOCK_STREAM) as other:
            ports = self.ports(embedded=True, HTTP_PORT=other.getsockname()[1])
            with self.assertLogs("elrar.gateway", "ERROR") as said:
                ports.bind()
            self.assertEqual((len(said.output), ports.http_sockets), (1, []))
            self.assertIn("as soon as that port is free", ports.describe())
            self.assertRaises(OSError, ports.bind_http)
        ports.bind_http()
        self.assertNotIn("as soon as", ports.describe())

    def waits(self, *, embedded: bool, until: Callable[[], None]) -> int:
        """How often it waits for a port that another process lets go of in `until`."""
        with mock.patch("bound_ports.time.sleep", side_effect=lambda _: until()) as sleep:
            self.ports(embedded=embedded, UDP_PORT=self.number).bind()
            return int(sleep.call_count)

    def test_only_the_daemon_waits_for_one_that_is_just_stopping(self) -> None:
        other: Any = taken(socket.SOCK_DGRAM)
        self.addCleanup(other.close)
        self.number = other.getsockname()[1]
        with self.assertRaisesRegex(StartError, "UDP 127.0.0.1"):
            self.waits(embedded=True, until=self.fail)
        self.assertEqual(self.waits(embedded=False, until=other.close), 1)


if __name__ == "__main__":
    unittest.main()
