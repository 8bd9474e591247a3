"""The sockets that are listened on. UDP and TCP of one address are bound by the same rules.

If the gateway listens on the IPv4 loopback, it listens on [::1] too: `localhost` is ::1 first on many hosts, and a
sender of datagrams does not learn that nobody listens there.
"""

from __future__ import annotations

import array
import errno
import logging
import os
import socket
import struct
import sys
from typing import Any

from config import MODES

try:
    import fcntl
except ImportError:  # not a Unix
    fcntl = None  # type: ignore[assignment]

logger = logging.getLogger("elrar.sockets")

TCP_BACKLOG = 512
_WITH_IPV6_LOOPBACK = ("0.0.0.0", "127.0.0.1")
_SO_RCVBUFFORCE = 33  # Linux; not in the socket module
_SIOCGIFCONF = 0x8912  # Linux: the IPv4 addresses of all interfaces
_IFREQ_BYTES = 16 + max(16, struct.calcsize("2LH3B0L"))
_MAX_IFREQS = 1024
_IPV6_LOOPBACK = "1".zfill(32)


class SocketLost(Exception):
    """A socket was destroyed from outside and cannot be bound anew; the text says what, why, and what to do."""

    def __init__(self, protocol: str, name: Any, error: OSError) -> None:
        host, port = name[:2]
        super().__init__(
            f"cannot listen on {protocol} {format_address(host, port)} any more: {error.strerror}. Something on this"
            " host has destroyed the socket, perhaps `ss -K`, and it could not be bound anew within a second: see"
            f" who has the port with `ss -l{protocol[0].lower()}np 'sport = :{port}'`, and start the gateway again"
        )


def format_address(host: str, port: int) -> str:
    """`<ip>:<port>`, with the brackets that an IPv6 address needs."""
    return f"[{host}]:{port}" if ":" in host else f"{host}:{port}"


def format_peer(name: Any) -> str:
    """The same of a peer's socket address; an IPv4 peer of an IPv6 socket is shown by its IPv4 address."""
    host, port = name[:2]
    mapped = host.removeprefix("::ffff:")
    return format_address(mapped if "." in mapped and ":" not in mapped else host, port)


def listen_address(network_mode: str, bind_address: str) -> str:
    """The address that is really listened on: broadcasts arrive only if it listens on all interfaces."""
    if MODES[network_mode].on_all_interfaces:
        return "::" if ":" in bind_address else "0.0.0.0"
    return bind_address


def open_udp_sockets(address: str, port: int, receive_buffer: int) -> list[socket.socket]:
    """Bind the UDP sockets to listen on, the main one first; raises OSError if that one cannot be bound."""
    return _open_sockets(socket.SOCK_DGRAM, address, port, receive_buffer)


def open_tcp_sockets(address: str, port: int) -> list[socket.socket]:
    """The same for TCP; they listen."""
    return _open_sockets(socket.SOCK_STREAM, address, port, 0)


def _open_sockets(kind: int, address: str, port: int, receive_buffer: int) -> list[socket.socket]:
    family = socket.AF_INET6 if ":" in address else socket.AF_INET
    main = _bind(_make(family, kind, address != "::", receive_buffer), address, port)
    opened = [main]
    if address in _WITH_IPV6_LOOPBACK:
        port = main.getsockname()[1]
        try:
            opened.append(_bind(_make(socket.AF_INET6, kind, True, receive_buffer), "::1", port))
        except OSError as error:
            level = logging.WARNING if error.errno == errno.EADDRINUSE else logging.DEBUG  # else: no IPv6 here
            protocol = "UDP" if kind == socket.SOCK_DGRAM else "TCP"
            logger.log(level, "not listening on %s [::1] port=%d error=%s", protocol, port, error)
    return opened


def _make(family: int, kind: int, ipv6_only: bool, receive_buffer: int) -> socket.socket:
    sock = socket.socket(family, kind)
    try:
        if family == socket.AF_INET6:
            sock.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_V6ONLY, ipv6_only)
        if kind == socket.SOCK_STREAM:
            # For TCP this lets a restart bind while old connections time out; two listeners are still impossible. For
            # UDP a second process would silently take over the port and all its datagrams.
            sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        else:
            _set_receive_buffer(sock, receive_buffer)
        sock.setblocking(False)
    except BaseException:
        sock.close()
        raise
    return sock


def _bind(sock: socket.socket, address: str, port: int) -> socket.socket:
    try:
        found = socket.getaddrinfo(address, port, sock.family, sock.type, 0, socket.AI_NUMERICHOST)
        sock.bind(found[0][4])
        if sock.type == socket.SOCK_STREAM:
            sock.listen(TCP_BACKLOG)
    except BaseException:
        sock.close()
        raise
    return sock


def bind_anew(sock: socket.socket, name: Any) -> None:
    """Replace a socket that was destroyed (`ss -K`) by a new one with the same descriptor, options and address `name`.

    Raises OSError if the address cannot be had; then it can be tried again. Whoever waits for the descriptor with a
    poll object goes on; an epoll object has to be told.
    """
    receive_buffer = granted_receive_buffer(sock) if sock.type == socket.SOCK_DGRAM else 0
    ipv6_only = sock.family == socket.AF_INET6 and bool(sock.getsockopt(socket.IPPROTO_IPV6, socket.IPV6_V6ONLY))
    with _make(sock.family, sock.type, ipv6_only, receive_buffer) as new:
        os.dup2(new.fileno(), sock.fileno(), inheritable=False)  # which closes the old one, so that its port is free
    sock.bind(name)
    if sock.type == socket.SOCK_STREAM:
        sock.listen(TCP_BACKLOG)


def _set_receive_buffer(sock: socket.socket, size: int) -> None:
    if sys.platform == "linux":
        try:
            sock.setsockopt(socket.SOL_SOCKET, _SO_RCVBUFFORCE, size)  # beyond net.core.rmem_max, if we may
            return
        except PermissionError:
            pass
    sock.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, size)


def granted_receive_buffer(sock: socket.socket) -> int:
    """Bytes of receive buffer that the kernel granted, in the unit in which they were asked for."""
    size = sock.getsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF)
    return size // 2 if sys.platform == "linux" else size  # Linux doubles it, for its own bookkeeping


def is_ipv6_only() -> bool:
    """Whether this host has IPv6 addresses and, but for the loopback's, no IPv4 one; False if that cannot be found out.

    A host that has nothing but its loopbacks is not meant: nobody else reaches it, whatever it listens on.
    """
    try:
        return bool(_ipv6_addresses() - {_IPV6_LOOPBACK}) and all(one[0] == 127 for one in _ipv4_addresses())
    except OSError:
        return False


def _ipv4_addresses() -> set[bytes]:
    """The IPv4 addresses of this host; raises OSError if they cannot be found out."""
    if sys.platform != "linux" or fcntl is None:
        raise OSError(errno.ENOSYS, "not known how")
    found = array.array("B", bytes(_MAX_IFREQS * _IFREQ_BYTES))
    request = struct.pack("iP", len(found), found.buffer_info()[0])
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as sock:
        (size, _) = struct.unpack("iP", fcntl.ioctl(sock, _SIOCGIFCONF, request))
    return {found[start + 20 : start + 24].tobytes() for start in range(0, size, _IFREQ_BYTES)}


def _ipv6_addresses() -> set[str]:
    """The IPv6 addresses of this host as 32 hex digits; raises OSError if they cannot be found out."""
    with open("/proc/net/if_inet6", encoding="ascii") as lines:
        return {line.split()[0] for line in lines}
