"""Datagrams that the kernel dropped because a receive buffer was full, by the sockets' own account."""

from __future__ import annotations

import socket
import struct
import sys
import threading
from collections.abc import Iterable

_SO_MEMINFO = 55  # Linux; not in the socket module
_MEMINFO_BYTES = 36
_DROPS_INDEX = 8  # of the u32 that counts what was dropped


class KernelDrops:
    """The sum over some UDP sockets; any thread may ask."""

    def __init__(self, sockets: Iterable[socket.socket]) -> None:
        self._sockets = tuple(sockets)
        self._lock = threading.Lock()  # guards the two below, which any reader moves on
        self._seen = dict.fromkeys(self._sockets, 0)
        self._total = 0

    def total(self) -> int | None:
        """How many since the start; None if this system keeps no account."""
        if sys.platform != "linux":
            return None
        with self._lock:
            for sock in self._sockets:
                try:
                    meminfo = sock.getsockopt(socket.SOL_SOCKET, _SO_MEMINFO, _MEMINFO_BYTES)
                except OSError:
                    continue  # closed: what was counted last stays
                drops = struct.unpack("=9I", meminfo)[_DROPS_INDEX]
                self._total += (drops - self._seen[sock]) & 0xFFFFFFFF  # a u32 that wraps around
                self._seen[sock] = drops
            return self._total

    def forget(self, sock: socket.socket) -> None:
        """The socket was replaced by a new one, whose account begins at 0."""
        with self._lock:
            self._seen[sock] = 0
