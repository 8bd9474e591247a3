"""Whether two sources are one sender of this host: a broadcast's copies come from each of its addresses."""

from __future__ import annotations

import functools
import socket

from engine_state import unquote_json


def is_one_sender(source: bytes, other: bytes) -> bool:
    """Whether two sources, `<ip>:<port>` as JSON texts, are the same port of addresses of this host."""
    (host, _, port), (other_host, _, other_port) = (unquote_json(one).rpartition(":") for one in (source, other))
    return port == other_port and is_own_address(host.strip("[]")) and is_own_address(other_host.strip("[]"))


@functools.lru_cache(maxsize=1024)
def is_own_address(host: str) -> bool:
    """Whether an IP address is one of this host's: only then can a socket be bound to it."""
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    try:
        with socket.socket(family, socket.SOCK_DGRAM) as sock:
            sock.bind((host, 0))
    except (OSError, OverflowError):
        return False
    return True
