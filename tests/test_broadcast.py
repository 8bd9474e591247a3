"""Broadcast mode: datagrams that were really broadcast, on networks that the test makes for itself."""

from __future__ import annotations

import tempfile
import unittest
from pathlib import Path
from typing import Any

from tests.harness import Daemon, Namespace, datagram, gateway_command, logged_states, wait_until

SEND = """
import socket, sys
with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as sock:
    sock.setsockopt(socket.SOL_SOCKET, socket.SO_BROADCAST, 1)
    for host in sys.argv[3:]:
        sock.sendto(sys.argv[1].encode(), (host, int(sys.argv[2])))
"""


@unittest.skipIf(Namespace.why_not(), Namespace.why_not())
class Broadcast(unittest.TestCase):
    """An engine's host and the gateway's host on one segment; each in a network namespace of its own."""

    def setUp(self) -> None:
        folder = tempfile.TemporaryDirectory()
        self.addCleanup(folder.cleanup)
        self.folder = Path(folder.name)
        self.gateway_host, self.engine_host = Namespace(), Namespace()
        self.addCleanup(self.gateway_host.close)
        self.addCleanup(self.engine_host.close)
        peer = ("peer", "name", "segment", "netns", str(self.engine_host.pid))
        self.gateway_host.run("ip", "link", "add", "segment", "type", "veth", *peer)
        for host, address in ((self.gateway_host, "10.77.0.1/24"), (self.engine_host, "10.77.0.2/24")):
            host.run("ip", "addr", "add", address, "broadcast", "10.77.0.255", "dev", "segment")
            host.run("ip", "link", "set", "segment", "up")
            host.run("ip", "route", "add", "default", "dev", "segment")

    def start(self, **settings: object) -> None:
        self.running = Daemon(self.folder, settings, self.gateway_host.command(*gateway_command()))
        self.addCleanup(self.running.close)
        self.running.wait_ready()

    def stats(self) -> Any:
        return self.gateway_host.get(f"http://127.0.0.1:{self.running.http_port}/stats")

    def wait_received(self, count: int) -> Any:
        return wait_until(f"{count} received", lambda: (s := self.stats())["total_received"] >= count and s)

    def test_broadcasts_from_another_host_are_received(self) -> None:
        self.start(NETWORK_MODE="broadcast")
        for number, target in enumerate(("10.77.0.255", "255.255.255.255")):
            sent = datagram(engine_id=target, timestamp_ms=number).decode()
            self.engine_host.python(SEND, sent, str(self.running.udp_port), target)
        stats = self.wait_received(2)
        self.assertEqual(
            (stats["network_mode"], stats["broadcast_received"], stats["unicast_received"]), ("broadcast", 2, 0)
        )
        self.assertEqual(stats["valid_states"], 2)
        engines = self.gateway_host.get(f"http://127.0.0.1:{self.running.http_port}/engines")["engines"]
        self.assertEqual({e["source"].split(":")[0] for e in engines.values()}, {"10.77.0.2"})
        self.assertIn("network mode: broadcast", (self.folder / "engine_states.jsonl").read_text().splitlines()[0])

    def test_three_copies_on_the_gateway_s_own_host_are_one_state(self) -> None:
        self.start(NETWORK_MODE="broadcast")
        copies = ("10.77.0.255", "127.0.0.1", "localhost")
        self.gateway_host.python(SEND, datagram().decode(), str(self.running.udp_port), *copies)
        stats = self.wait_received(3)
        self.assertEqual((stats["valid_states"], stats["duplicates"], stats["invalid_states"]), (3, 2, 0))
        self.assertEqual(self.running.stop(), 0)
        self.assertEqual(len(logged_states(self.folder / "engine_states.jsonl")), 1)

    def test_an_ipv6_gateway_hears_broadcasts_too(self) -> None:
        self.start(NETWORK_MODE="broadcast", BIND_ADDRESS="::")
        self.engine_host.python(SEND, datagram().decode(), str(self.running.udp_port), "10.77.0.255")
        self.assertEqual(self.wait_received(1)["broadcast_received"], 1)

    def test_unicast_on_one_address_does_not_hear_them(self) -> None:
        self.start(NETWORK_MODE="unicast", BIND_ADDRESS="10.77.0.1", HTTP_PORT="off")
        self.engine_host.python(SEND, datagram(engine_id="no").decode(), str(self.running.udp_port), "10.77.0.255")
        self.engine_host.python(SEND, datagram(engine_id="yes").decode(), str(self.running.udp_port), "10.77.0.1")
        log = self.folder / "engine_states.jsonl"
        wait_until("a state to be logged", lambda: logged_states(log))
        self.assertEqual([state["engine_id"] for state in logged_states(log)], ["yes"])


if __name__ == "__main__":
    unittest.main()
