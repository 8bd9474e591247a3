"""A file of secrets: what is read of it, and that nothing of it is ever told."""

from __future__ import annotations

import os
import unittest
from unittest import mock

import secret_file
from secret_file import SecretFileError, read_secret_lines
from tests.harness import FolderCase


class Lines(FolderCase):
    """Comments and empty lines are left out, and the numbers are those that an editor shows."""

    def read(self, text: bytes, mode: int = 0o600) -> tuple[list[tuple[int, bytes]], str]:
        path = self.folder / "secrets"
        path.write_bytes(text)
        path.chmod(mode)
        return read_secret_lines(str(path))

    def test_numbers(self) -> None:
        lines, warning = self.read(b"# a comment\r\n\nfirst\r\n  second \n#x\n\r\nlast")
        self.assertEqual(lines, [(3, b"first"), (4, b"  second "), (7, b"last")])
        self.assertEqual(warning, "")

    def test_a_file_that_all_can_read_is_warned_about(self) -> None:
        for mode, warned in ((0o600, False), (0o640, False), (0o644, True), (0o602, True)):
            with self.subTest(oct(mode)):
                self.assertIs(bool(self.read(b"a", mode)[1]), warned)

    def test_what_cannot_be_read(self) -> None:
        for path in (str(self.folder / "none"), str(self.folder), "a\0b"):
            with self.subTest(path), self.assertRaisesRegex(SecretFileError, "cannot be read"):
                read_secret_lines(path)

    def test_a_pipe_is_read_and_not_warned_about(self) -> None:
        """As a shell's <(command) is."""
        reader, writer = os.pipe()
        os.write(writer, b"secret\n")
        os.close(writer)
        self.addCleanup(os.close, reader)
        self.assertEqual(read_secret_lines(f"/dev/fd/{reader}"), ([(1, b"secret")], ""))

    def test_a_pipe_is_waited_for_but_not_for_ever(self) -> None:
        """Signals wait while the file is read: a FIFO whose writer says nothing must not make SIGTERM do nothing."""
        path = self.folder / "fifo"
        os.mkfifo(path)
        self.assertEqual(read_secret_lines(str(path)), ([], ""))  # nobody writes
        reader, writer = os.pipe()
        for descriptor in (reader, writer):
            self.addCleanup(os.close, descriptor)
        with mock.patch.object(secret_file, "PIPE_TIMEOUT_S", 0.01):
            os.write(writer, b"half a secret")
            with self.assertRaisesRegex(SecretFileError, "cannot be read: it is a pipe that did not end") as raised:
                read_secret_lines(f"/dev/fd/{reader}")
        self.assertNotIn("half", str(raised.exception))

    def test_what_a_pipe_has_later_is_read_too(self) -> None:
        reader, writer = os.pipe()
        self.addCleanup(os.close, reader)

        def write_late(*_: object) -> tuple[list[int], list[int], list[int]]:
            os.write(writer, b"late\n")
            os.close(writer)
            return [reader], [], []

        with mock.patch("secret_file.select.select", side_effect=write_late):
            self.assertEqual(read_secret_lines(f"/dev/fd/{reader}"), ([(1, b"late")], ""))

    def test_what_is_no_such_file_is_not_read_whole(self) -> None:
        with mock.patch.object(secret_file, "MAX_BYTES", 10), self.assertRaisesRegex(SecretFileError, "larger"):
            self.read(b"x" * 11)


if __name__ == "__main__":
    unittest.main()
