"""Receives datagrams from a socket, many at a time, with the address of each.

Two ways with the same results. The portable one calls `recvfrom` for each datagram, and gives the interpreter's lock
away each time: beside a CPU-bound thread it gets it back only every 5 ms, and takes in 20 % of 20,000/s. Where there is
`recvmmsg`, one call takes a batch without giving the lock away, and everything is taken in; it costs half as much, too.
"""

from __future__ import annotations

import errno
import os
import socket
import struct
import sys
from collections.abc import Sequence
from typing import Protocol

try:
    import ctypes
except ImportError:  # a Python that was built without it
    ctypes = None  # type: ignore[assignment]

from engine_state import MAX_DATAGRAM_BYTES

MAX_BATCH_DATAGRAMS = 128  # the store's lock is held for 0.3 ms at most
_SLOT_BYTES = MAX_DATAGRAM_BYTES + 1  # one more, so that a longer datagram is seen to be longer
_STRIDE = MAX_DATAGRAM_BYTES + 320  # bytes: at a power of two they would push each other out of the processor's cache


class Receiver(Protocol):
    """Takes datagrams from one socket; for one thread."""

    def receive(self) -> tuple[list[bytes], Sequence[bytes]]:
        """Up to MAX_BATCH_DATAGRAMS that wait in the socket, without waiting; fewer only if no more wait.

        What was sent, and for each datagram the sender's socket address as the kernel writes it.
        """


def make_receiver(sock: socket.socket) -> Receiver:
    """The fastest receiver that works here for a non-blocking UDP socket."""
    if sys.platform == "linux" and ctypes is not None and hasattr(ctypes.PyDLL(None), "recvmmsg"):
        receiver = BatchReceiver(sock)
        if receiver.is_allowed():
            return receiver
    return PortableReceiver(sock)


class PortableReceiver:
    """With the socket module's calls alone."""

    def __init__(self, sock: socket.socket) -> None:
        self._recvfrom = sock.recvfrom
        self._pack = _pack_ipv6 if sock.family == socket.AF_INET6 else _pack_ipv4

    def receive(self) -> tuple[list[bytes], Sequence[bytes]]:
        """See Receiver."""
        datagrams: list[bytes] = []
        addresses: list[bytes] = []
        recvfrom, pack = self._recvfrom, self._pack
        try:
            for _ in range(MAX_BATCH_DATAGRAMS):
                datagram, address = recvfrom(_SLOT_BYTES)
                datagrams.append(datagram)
                addresses.append(pack(address))
        except BlockingIOError:
            pass
        return datagrams, addresses


def _pack_ipv4(address: tuple[str, int]) -> bytes:
    return struct.pack("=H", socket.AF_INET) + struct.pack("!H4s8x", address[1], socket.inet_aton(address[0]))


def _pack_ipv6(address: tuple[str, int, int, int]) -> bytes:
    host = socket.inet_pton(socket.AF_INET6, address[0].partition("%")[0])
    family, scope = struct.pack("=H", socket.AF_INET6), struct.pack("=I", address[3])
    return family + struct.pack("!HI16s", address[1], address[2], host) + scope


if ctypes is not None:

    class _IoVec(ctypes.Structure):
        _fields_ = (("base", ctypes.c_void_p), ("length", ctypes.c_size_t))

    class _MsgHdr(ctypes.Structure):
        _fields_ = (
            ("name", ctypes.c_void_p),
            ("name_length", ctypes.c_uint32),
            ("iov", ctypes.c_void_p),
            ("iov_length", ctypes.c_size_t),
            ("control", ctypes.c_void_p),
            ("control_length", ctypes.c_size_t),
            ("flags", ctypes.c_int),
        )

    class _MMsgHdr(ctypes.Structure):
        _fields_ = (("header", _MsgHdr), ("length", ctypes.c_uint32))


class BatchReceiver:
    """With `recvmmsg`, called through ctypes.PyDLL, which keeps the interpreter's lock during the call.

    The call never waits: the lock is kept for the copying of a batch, a tenth of a millisecond.
    """

    def __init__(self, sock: socket.socket) -> None:
        count = MAX_BATCH_DATAGRAMS
        self._fd = sock.fileno()
        self._recvmmsg = ctypes.PyDLL(None, use_errno=True).recvmmsg
        self._recvmmsg.argtypes = (ctypes.c_int, ctypes.c_void_p, ctypes.c_uint, ctypes.c_int, ctypes.c_void_p)
        name_size = 28 if sock.family == socket.AF_INET6 else 16
        # The kernel writes into these; they live as long as the receiver does.
        self._slots = list((ctypes.c_char * _STRIDE * count)())
        self._names = (ctypes.c_char * (count * name_size))()
        self._iovs = (_IoVec * count)()
        self._messages = (_MMsgHdr * count)()
        for number in range(count):
            self._iovs[number] = _IoVec(ctypes.addressof(self._slots[number]), _SLOT_BYTES)
            header = self._messages[number].header
            header.name = ctypes.addressof(self._names) + number * name_size
            header.name_length = name_size
            header.iov = ctypes.addressof(self._iovs[number])
            header.iov_length = 1
        self._unpack_names = [struct.Struct(f"{name_size}s" * number).unpack_from for number in range(count + 1)]
        self._address = ctypes.addressof(self._messages)
        words = ctypes.sizeof(_MMsgHdr) // 4
        self._lengths = memoryview(self._messages).cast("B").cast("I")[_MMsgHdr.length.offset // 4 :: words]

    def is_allowed(self) -> bool:
        """Whether the kernel lets this process call it, which a filter of system calls may not; nothing is taken."""
        return int(self._recvmmsg(self._fd, self._address, 0, socket.MSG_DONTWAIT, None)) == 0

    def receive(self) -> tuple[list[bytes], Sequence[bytes]]:
        """See Receiver; raises OSError, among others if the socket is no more."""
        while (count := self._recvmmsg(self._fd, self._address, MAX_BATCH_DATAGRAMS, socket.MSG_DONTWAIT, None)) < 0:
            number = ctypes.get_errno()
            if number == errno.EAGAIN:
                return [], ()
            if number != errno.EINTR:
                raise OSError(number, os.strerror(number))
        # A slice of an array of c_char is bytes, in half the time that a memoryview's takes. Each datagram has an array
        # of its own: places within a larger one would have to be worked out. Unpacking all addresses at once takes a
        # fifth of slicing each.
        lengths = self._lengths[:count].tolist()
        datagrams = [slot[:length] for slot, length in zip(self._slots, lengths, strict=False)]
        return datagrams, self._unpack_names[count](self._names)


def unpack_address(packed: bytes) -> tuple[str, int]:
    """Host and port of a socket address; a link-local IPv6 host has its scope, `%eth0`, behind it.

    An IPv4 sender on an IPv6 socket is given by its IPv4 address.
    """
    (port,) = struct.unpack_from("!H", packed, 2)
    if len(packed) == 16:
        return socket.inet_ntoa(packed[4:8]), port
    if packed[8:20] == bytes(10) + b"\xff\xff":
        return socket.inet_ntoa(packed[20:24]), port
    host = socket.inet_ntop(socket.AF_INET6, packed[8:24])
    (scope,) = struct.unpack_from("=I", packed, 24)
    if scope:
        try:
            host += f"%{socket.if_indextoname(scope)}"
        except OSError:
            host += f"%{scope}"
    return host, port
