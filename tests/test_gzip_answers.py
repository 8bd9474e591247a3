"""Gzip a piece at a time: what comes out is the page, once for all who ask for it, and bounded."""

from __future__ import annotations

import gzip
import unittest
import zlib
from unittest import mock

import gzip_answers
from gzip_answers import PIECE_BYTES, GzipQueue

PAGE = b"".join(b'"engine-%d": {"pending_tokens_total": %d}, ' % (number, number**3) for number in range(20_000))


class Pages(unittest.TestCase):
    def setUp(self) -> None:
        self.queue: GzipQueue[str] = GzipQueue()

    def compress(self) -> tuple[bytes, list[str], int]:
        """The next page's gzip file, who waits for it, and in how many steps."""
        steps = 0
        while True:
            steps += 1
            gzipped, readers = self.queue.step()
            if gzipped:
                return gzipped, readers, steps

    def test_a_page_comes_out_as_it_went_in(self) -> None:
        """Of any size, in pieces."""
        for body in (PAGE, PAGE[:PIECE_BYTES], PAGE[: PIECE_BYTES + 1], PAGE[:5000]):
            self.assertTrue(self.queue.add(body, "reader"))
            gzipped, readers, steps = self.compress()
            self.assertEqual((gzip.decompress(gzipped), readers), (body, ["reader"]))
            self.assertEqual(steps, -(-len(body) // PIECE_BYTES))
            self.assertFalse(self.queue)

    def test_once_for_all_who_ask(self) -> None:
        """While it is made and afterwards; another page of the same text is another one."""
        with mock.patch("gzip_answers.zlib.compressobj", wraps=zlib.compressobj) as made:
            for number in range(10):
                self.queue.add(PAGE, f"reader-{number}")
                if number < 3:
                    self.queue.step()
            gzipped, readers, _ = self.compress()
            self.assertEqual(len(readers), 10)
            self.assertIs(self.queue.find(PAGE), gzipped)
            self.assertEqual(made.call_count, 1)
        self.assertIsNone(self.queue.find(PAGE[:-1]))

    def test_what_waits_and_what_is_kept_is_bounded(self) -> None:
        pages = [PAGE[number:] for number in range(100)]
        added = [self.queue.add(page, "reader") for page in pages]
        self.assertTrue(added[0])
        self.assertFalse(added[-1])
        self.assertLessEqual(sum(len(page) for page, wanted in zip(pages, added, strict=True) if wanted), 32 << 20)
        while self.queue:
            self.compress()
        self.assertEqual(sum(self.queue.find(page) is not None for page in pages), gzip_answers.MAX_KEPT)
        self.assertTrue(self.queue.add(pages[-1], "reader"))


if __name__ == "__main__":
    unittest.main()
