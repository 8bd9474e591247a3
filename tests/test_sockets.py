"""The sockets that are listened on: which addresses, who else has them, and one that is destroyed (contract, 3)."""

from __future__ import annotations

import contextlib
import errno
import logging
import select
import shutil
import socket
import subprocess
import unittest
from collections.abc import Sequence
from unittest import mock

from sockets import (
    SocketLost,
    bind_anew,
    format_address,
    format_peer,
    granted_receive_buffer,
    is_ipv6_only,
    listen_address,
    open_tcp_sockets,
    open_udp_sockets,
)
from tests.harness import (
    DEADLINE_S,
    Daemon,
    FolderCase,
    Namespace,
    datagram,
    free_port,
    gateway_command,
    ipv6_works,
    wait_until,
)


class Names(unittest.TestCase):
    """Addresses are written as a URL has them."""

    def test_ipv6_has_brackets(self) -> None:
        self.assertEqual(format_address("::1", 9999), "[::1]:9999")
        self.assertEqual(format_address("10.0.0.1", 9999), "10.0.0.1:9999")

    def test_peers(self) -> None:
        for name, text in (
            (("10.0.0.1", 5), "10.0.0.1:5"),
            (("::1", 48650, 0, 0), "[::1]:48650"),
            (("::ffff:10.0.0.1", 5, 0, 0), "10.0.0.1:5"),
            (("fe80::1%eth0", 5, 0, 2), "[fe80::1%eth0]:5"),
            (("::ffff:1:2", 5, 0, 0), "[::ffff:1:2]:5"),
        ):
            self.assertEqual(format_peer(name), text)

    def test_broadcast_mode_listens_on_all_interfaces(self) -> None:
        self.assertEqual(listen_address("broadcast", "127.0.0.1"), "0.0.0.0")
        self.assertEqual(listen_address("broadcast", "::1"), "::")
        self.assertEqual(listen_address("unicast", "127.0.0.1"), "127.0.0.1")


class Opening(unittest.TestCase):
    """UDP and TCP of an address are listened on at the same places."""

    def open(self, address: str) -> list[list[socket.socket]]:
        udp = open_udp_sockets(address, free_port(), 100_000)
        self.addCleanup(close_all, udp)
        tcp = open_tcp_sockets(address, udp[0].getsockname()[1])
        self.addCleanup(close_all, tcp)
        return [udp, tcp]

    @unittest.skipUnless(ipv6_works(), "no IPv6 on this machine")
    def test_the_ipv6_loopback_goes_with_the_ipv4_one(self) -> None:
        for address, expected in (
            ("0.0.0.0", ["0.0.0.0", "::1"]),
            ("127.0.0.1", ["127.0.0.1", "::1"]),
            ("127.0.0.2", ["127.0.0.2"]),
            ("::", ["::"]),
            ("::1", ["::1"]),
        ):
            for opened in self.open(address):
                with self.subTest(address, type=opened[0].type):
                    self.assertEqual([sock.getsockname()[0] for sock in opened], expected)
                    self.assertEqual(len({sock.getsockname()[1] for sock in opened}), 1)

    @unittest.skipUnless(ipv6_works(), "no IPv6 on this machine")
    def test_both_loopbacks_answer(self) -> None:
        for address in ("0.0.0.0", "127.0.0.1", "::"):
            udp, tcp = self.open(address)
            port = udp[0].getsockname()[1]
            for family, host in ((socket.AF_INET, "127.0.0.1"), (socket.AF_INET6, "::1")):
                with self.subTest(address, host=host):
                    with socket.socket(family, socket.SOCK_DGRAM) as sender:
                        sender.sendto(b"x", (host, port))
                    self.assertTrue(select.select(udp, [], [], DEADLINE_S)[0][0].recv(10))
                    with socket.create_connection((host, port), DEADLINE_S):
                        select.select(tcp, [], [], DEADLINE_S)[0][0].accept()[0].close()

    def test_two_never_share_a_port(self) -> None:
        udp, _ = self.open("127.0.0.1")
        for address in ("127.0.0.1", "0.0.0.0"):
            with self.subTest(address):
                with self.assertRaises(OSError) as udp_refused:
                    open_udp_sockets(address, udp[0].getsockname()[1], 1)
                with self.assertRaises(OSError) as tcp_refused:
                    open_tcp_sockets(address, udp[0].getsockname()[1])
                self.assertEqual({udp_refused.exception.errno, tcp_refused.exception.errno}, {errno.EADDRINUSE})

    @unittest.skipUnless(ipv6_works(), "no IPv6 on this machine")
    def test_ipv6_loopback_of_others(self) -> None:
        """An IPv6 loopback that somebody else has is warned about."""
        with (
            socket.create_server(("::1", free_port()), family=socket.AF_INET6) as other,
            self.assertLogs("elrar.sockets", "WARNING") as logged,
        ):
            close_all(open_tcp_sockets("127.0.0.1", other.getsockname()[1]))
        self.assertIn("TCP [::1]", logged.output[0])

    def test_without_ipv6_nothing_is_said(self) -> None:
        real = socket.socket

        def without(family: int, *arguments: int) -> socket.socket:
            if family == socket.AF_INET6:
                raise OSError(errno.EAFNOSUPPORT, "not here")
            return real(family, *arguments)

        with mock.patch("sockets.socket.socket", without), self.assertNoLogs("elrar.sockets", logging.INFO):
            self.assertEqual([len(opened) for opened in self.open("127.0.0.1")], [1, 1])

    def test_the_granted_buffer_is_in_the_unit_that_was_asked_for(self) -> None:
        for sock in self.open("127.0.0.1")[0]:
            self.assertEqual(granted_receive_buffer(sock), 100_000)


class Destroyed(unittest.TestCase):
    """A socket that the system has destroyed is bound anew under its descriptor."""

    def test_everything_stays_but_the_socket(self) -> None:
        for opened in (open_udp_sockets("127.0.0.1", 0, 50_000), open_tcp_sockets("127.0.0.1", 0)):
            for sock in opened:
                with sock, self.subTest(sock.type, family=sock.family):
                    fd, name = sock.fileno(), sock.getsockname()
                    options = [(socket.SOL_SOCKET, socket.SO_RCVBUF)] * (sock.type == socket.SOCK_DGRAM)
                    options += [(socket.IPPROTO_IPV6, socket.IPV6_V6ONLY)] * (sock.family == socket.AF_INET6)
                    before = [sock.getsockopt(*option) for option in options]
                    bind_anew(sock, name)
                    self.assertEqual((sock.fileno(), sock.getsockname(), sock.getblocking()), (fd, name, False))
                    self.assertEqual([sock.getsockopt(*option) for option in options], before)
                    self.assertFalse(sock.get_inheritable())
                    if sock.type == socket.SOCK_STREAM:
                        socket.create_connection(name[:2], DEADLINE_S).close()

    def test_a_port_that_cannot_be_had_again(self) -> None:
        (sock, *others) = open_udp_sockets("127.0.0.1", 0, 50_000)
        name = sock.getsockname()
        with contextlib.closing(sock):
            close_all(others)
            in_use = OSError(errno.EADDRINUSE, "Address already in use")
            with mock.patch("sockets.socket.socket.bind", side_effect=in_use), self.assertRaises(OSError):
                bind_anew(sock, name)
            bind_anew(sock, name)
            self.assertEqual(sock.getsockname(), name)

    def test_what_is_said_in_the_end(self) -> None:
        text = str(SocketLost("UDP", ("::1", 9999, 0, 0), OSError(errno.EADDRINUSE, "Address already in use")))
        for word in ("UDP [::1]:9999", "Address already in use", "ss -K", "ss -lunp 'sport = :9999'"):
            self.assertIn(word, text)


@unittest.skipIf(Namespace.why_not(), Namespace.why_not())
class InANamespace(FolderCase):
    """The daemon on a host of its own."""

    def setUp(self) -> None:
        self.host = Namespace()
        self.addCleanup(self.host.close)
        super().setUp()

    def start(self, **settings: object) -> Daemon:
        merged = {"LOG_FILE": self.folder / "states.jsonl", **settings}
        running = Daemon(self.folder, merged, self.host.command(*gateway_command()))
        self.addCleanup(running.close)
        return running.wait_ready()

    def send(self, host: str, port: int, *datagrams: bytes) -> None:
        program = (
            "import socket, sys; host, port, *texts = sys.argv[1:]\n"
            "sock = socket.socket(socket.AF_INET6 if ':' in host else socket.AF_INET, socket.SOCK_DGRAM)\n"
            "for text in texts: sock.sendto(text.encode(), (host, int(port)))"
        )
        self.host.python(program, host, str(port), *(one.decode() for one in datagrams))

    def give_addresses(self, *addresses: str) -> None:
        self.host.run("ip", "link", "add", "v0", "type", "veth", "peer", "name", "v1")
        for address in addresses:
            self.host.run("ip", "address", "add", address, "dev", "v0", *(["nodad"] if ":" in address else []))
        self.host.run("ip", "link", "set", "v0", "up")

    def test_ipv6_only_with_the_defaults(self) -> None:
        self.give_addresses("fd00::5/64")
        running = self.start()
        warnings = [line for line in running.lines if " WARNING " in line and "IPv4" in line]
        self.assertEqual(len(warnings), 1, running.lines)
        self.assertIn("VLLM_STATE_GATEWAY_BIND_ADDRESS=::", warnings[0])
        self.assertEqual(running.stop(), 0)

    def test_ipv6_only_as_the_warning_says(self) -> None:
        self.give_addresses("fd00::5/64")
        running = self.start(BIND_ADDRESS="::")
        self.assertNotIn("IPv4", "".join(running.lines))
        self.send("fd00::5", running.udp_port, datagram())
        url = f"http://[fd00::5]:{running.http_port}/engines"
        wait_until("the state", lambda: "test" in self.host.get(url)["engines"])
        self.assertEqual(running.stop(), 0)

    def test_a_host_with_an_ipv4_address_is_not_warned(self) -> None:
        self.give_addresses("10.9.8.7/24", "fd00::5/64")
        self.assertNotIn("IPv4", "".join(self.start().lines))

    def test_an_address_under_another_label_counts(self) -> None:
        self.give_addresses("fd00::5/64")
        self.host.run("ip", "address", "add", "10.9.8.7/24", "dev", "v0", "label", "v0:1")
        self.assertNotIn("IPv4", "".join(self.start().lines))

    def destroy(self, *protocols: str) -> None:
        """Let the kernel destroy every socket that listens."""
        self.host.run("ss", "-K", "-l", *protocols)

    @unittest.skipUnless(shutil.which("ss"), "ss is not on this machine")
    def test_sockets_that_the_system_destroys_are_bound_anew(self) -> None:
        self.give_addresses("10.9.8.7/24")
        for port in (0, 8765):
            running = self.start(UDP_PORT=port)
            url = f"http://127.0.0.1:{running.http_port}"
            self.host.get(url + "/stats")
            for number in range(2):
                with self.subTest(port=port, number=number):
                    self.destroy("-t", "-u")
                    if number == 0 and not self.was_destroyed(running):  # it is said once a minute
                        self.skipTest("this kernel destroys no sockets")
                    for host in ("127.0.0.1", "::1"):
                        self.wait_until_shown(running, host, f"{host} {number}")
            self.assertEqual(self.host.get(url + "/stats")["kernel_dropped"], 0)
            self.assertTrue(all(self.host.get(url + "/livez")["threads"].values()))
            self.assertEqual(running.stop(), 0)
            self.assertNotIn("Traceback", "".join(running.lines))

    def was_destroyed(self, running: Daemon) -> bool:
        """Whether it has noticed; with a kernel that does not destroy sockets there is nothing to notice."""
        with contextlib.suppress(AssertionError, Exception):
            return bool(running.wait_for_line("receiving met errors"))
        return False

    def wait_until_shown(self, running: Daemon, host: str, engine_id: str) -> None:
        """Send a state by UDP until it is shown over HTTP, both on this address."""

        def shown() -> bool:
            with contextlib.suppress(subprocess.CalledProcessError):
                self.send(host, running.udp_port, datagram(engine_id=engine_id))
                url = f"http://{format_address(host, running.http_port)}/engines"
                return engine_id in self.host.get(url)["engines"]
            return False

        wait_until(f"{engine_id} to be shown", shown)


def close_all(opened: Sequence[socket.socket]) -> None:
    """Close them."""
    for sock in opened:
        sock.close()


class OwnAddresses(unittest.TestCase):
    """Whether this host can be reached by IPv4."""

    def test_addresses_decide(self) -> None:
        lo4, other4 = b"\x7f\0\0\1", b"\x0a\0\0\1"
        lo6, other6 = "1".zfill(32), "fd00".ljust(32, "0")
        for ipv4, ipv6, only in (
            ({lo4}, {lo6, other6}, True),
            (set(), {lo6, other6}, True),
            ({lo4}, {lo6}, False),
            ({lo4}, set(), False),
            ({lo4, other4}, {lo6, other6}, False),
        ):
            with (
                self.subTest(ipv4=ipv4, ipv6=ipv6),
                mock.patch("sockets._ipv4_addresses", return_value=ipv4),
                mock.patch("sockets._ipv6_addresses", return_value=ipv6),
            ):
                self.assertEqual(is_ipv6_only(), only)

    def test_an_answer_that_cannot_be_had_is_no_warning(self) -> None:
        with mock.patch("sockets.fcntl.ioctl", side_effect=OSError(errno.EPERM, "no")):
            self.assertFalse(is_ipv6_only())
        with mock.patch("sockets.sys.platform", "darwin"):
            self.assertFalse(is_ipv6_only())


if __name__ == "__main__":
    unittest.main()
