"""Gzip for large answers: a piece at a time, so that nothing waits long for it, and once for all who ask for a page.

A snapshot of 10,000 engines is 4.6 MB and takes 20 ms at level 1, which makes a sixth of it; level 6 takes three times
as long for an eighth. zlib lets other threads run meanwhile. Everything here belongs to the query server's thread.
"""

from __future__ import annotations

import zlib
from collections import deque
from typing import Generic, TypeVar

MIN_GZIP_BYTES = 4096  # smaller answers are sent as they are
PIECE_BYTES = 128 * 1024  # take about half a millisecond
MAX_PENDING_BYTES = 32 * 1024 * 1024  # of pages that wait to be compressed; beyond that they are sent as they are
MAX_KEPT = 4  # compressed pages, for who asks for the same one again
_LEVEL = 1
_GZIP_WINDOW = 31  # zlib's number for a gzip header and the largest window

Reader = TypeVar("Reader")


class _Page(Generic[Reader]):
    def __init__(self, body: bytes) -> None:
        self.body = body
        self.readers: list[Reader] = []
        self._compressor = zlib.compressobj(_LEVEL, zlib.DEFLATED, _GZIP_WINDOW)
        self._position = 0
        self._pieces: list[bytes] = []

    def compress_piece(self) -> bytes | None:
        """Compress the next piece; the whole gzip file once it was the last."""
        piece = memoryview(self.body)[self._position : self._position + PIECE_BYTES]
        self._pieces.append(self._compressor.compress(piece))
        self._position += len(piece)
        if self._position < len(self.body):
            return None
        return b"".join((*self._pieces, self._compressor.flush()))


class GzipQueue(Generic[Reader]):
    """Pages that wait to be compressed, and who waits for them."""

    def __init__(self) -> None:
        self._pages: dict[int, _Page[Reader]] = {}  # by the identity of the body, which the page keeps alive
        self._kept: deque[tuple[bytes, bytes]] = deque(maxlen=MAX_KEPT)  # body and gzip file
        self._pending_bytes = 0

    def __bool__(self) -> bool:
        return bool(self._pages)

    def find(self, body: bytes) -> bytes | None:
        """The gzip file of a body, if this very object was compressed lately."""
        return next((gzipped for kept, gzipped in self._kept if kept is body), None)

    def add(self, body: bytes, reader: Reader) -> bool:
        """Have a body compressed for a reader; False if too much waits already."""
        page = self._pages.get(id(body))
        if page is None:
            if self._pending_bytes + len(body) > MAX_PENDING_BYTES:
                return False
            page = self._pages[id(body)] = _Page(body)
            self._pending_bytes += len(body)
        page.readers.append(reader)
        return True

    def step(self) -> tuple[bytes, list[Reader]]:
        """Compress one piece of the page that is next; its gzip file and its readers once it is whole."""
        key, page = next(iter(self._pages.items()))
        gzipped = page.compress_piece()
        if gzipped is None:
            return b"", []
        del self._pages[key]
        self._pending_bytes -= len(page.body)
        self._kept.append((page.body, gzipped))
        return gzipped, page.readers
