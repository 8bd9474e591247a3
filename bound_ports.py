"""The ports of a gateway: UDP, and HTTP on the same number unless a setting says otherwise."""

from __future__ import annotations

import errno
import logging
import socket
import time

from config import MODES, PREFIX, Config
from sockets import (
    format_address,
    granted_receive_buffer,
    is_ipv6_only,
    listen_address,
    open_tcp_sockets,
    open_udp_sockets,
)
from start_errors import StartError, cannot_listen

BIND_PATIENCE_S = 0.5
MAX_PORT_TRIES = 20  # to find a number that is free for UDP and TCP alike

logger = logging.getLogger("elrar.gateway")


class BoundPorts:
    """Binds the sockets, and knows what was really bound. For one thread at a time; reading is free to all."""

    def __init__(self, config: Config, *, embedded: bool) -> None:
        """`embedded`: wait for no other process, and do without HTTP until its port is free."""
        self._config = config
        self.embedded = embedded
        self.address = listen_address(config.network_mode, config.bind_address)
        self.udp_port = config.udp_port
        self.http_port = config.http_port  # None: no HTTP
        self.udp_sockets: list[socket.socket] = []
        self.http_sockets: list[socket.socket] = []  # empty also while its port is taken
        self.receive_buffer_bytes = 0  # that the kernel granted

    def bind(self) -> None:
        """Bind them all; raises StartError, with everything closed again."""
        if self.address != self._config.bind_address and MODES[self._config.network_mode].on_all_interfaces:
            logger.warning(
                "%s mode listens on all interfaces, %sBIND_ADDRESS=%s is not used",
                self._config.network_mode,
                PREFIX,
                self._config.bind_address,
            )
        self._bind_patiently()
        if self.address == "0.0.0.0" and is_ipv6_only():
            logger.warning(
                "this host has no IPv4 address besides the loopback's, so that no other host reaches 0.0.0.0: set"
                " %sBIND_ADDRESS=::, which takes IPv6 as well",
                PREFIX,
            )
        self._report_receive_buffer()

    def _bind_patiently(self) -> None:
        """Bind them; the daemon gives one that is just stopping half a second to let go of them."""
        deadline = time.monotonic() + (0 if self.embedded else BIND_PATIENCE_S)
        while True:
            try:
                self._bind()
                return
            except StartError as error:
                in_use = isinstance(error.__cause__, OSError) and error.__cause__.errno == errno.EADDRINUSE
                if not in_use or time.monotonic() > deadline:
                    raise
                time.sleep(0.05)

    def _bind(self) -> None:
        config = self._config
        any_number_for_both = config.udp_port == 0 and config.http_follows_udp
        for remaining in range(MAX_PORT_TRIES if any_number_for_both else 1, 0, -1):
            try:
                self.udp_sockets = open_udp_sockets(self.address, config.udp_port, config.receive_buffer)
            except OSError as error:
                raise StartError(cannot_listen("UDP", self.address, config.udp_port, error)) from error
            self.udp_port = self.udp_sockets[0].getsockname()[1]
            if config.http_port is None:
                return
            if config.http_follows_udp:
                self.http_port = self.udp_port
            try:
                self.bind_http()
                return
            except OSError as error:
                assert self.http_port is not None
                text = cannot_listen("TCP", self.address, self.http_port, error)
                if self.embedded and remaining == 1:
                    logger.error("%s. States are received meanwhile, and it is tried again every second", text)
                    return
                self.close()
                if error.errno != errno.EADDRINUSE or remaining == 1:
                    raise StartError(text) from error
        raise AssertionError  # the last try returns or raises

    def bind_http(self) -> list[socket.socket]:
        """Bind the sockets of HTTP alone, and return them; raises OSError."""
        assert self.http_port is not None
        self.http_sockets = open_tcp_sockets(self.address, self.http_port)
        self.http_port = self.http_sockets[0].getsockname()[1]
        return self.http_sockets

    def _report_receive_buffer(self) -> None:
        asked = self._config.receive_buffer
        self.receive_buffer_bytes = granted_receive_buffer(self.udp_sockets[0])
        if self.receive_buffer_bytes < asked:
            logger.warning(
                "the kernel granted a smaller receive buffer asked=%d granted=%d, so that bursts may be lost: raise it"
                " with `sysctl -w net.core.rmem_max=%d`, or set %sRECEIVE_BUFFER to what is granted",
                asked,
                self.receive_buffer_bytes,
                asked,
                PREFIX,
            )

    def describe(self) -> str:
        """What is bound, in words."""
        udp = [format_address(*sock.getsockname()[:2]) for sock in self.udp_sockets]
        http = [f"http://{format_address(*sock.getsockname()[:2])}" for sock in self.http_sockets]
        if self.http_port is None:
            http = ["off"]
        elif not http:
            http = [f"http://{format_address(self.address, self.http_port)} as soon as that port is free"]
        return f"UDP {' and '.join(udp)}, HTTP {' and '.join(http)}"

    def close(self) -> None:
        """Close all sockets; twice is harmless."""
        for sock in (*self.udp_sockets, *self.http_sockets):
            sock.close()
