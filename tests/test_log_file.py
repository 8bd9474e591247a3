"""Where the state log's lines go: one writer a file, no file too many, and others' streams (contract, 5)."""

from __future__ import annotations

import errno
import fcntl
import multiprocessing
import os
import pty
import select
import socket
import subprocess
import sys
import tempfile
import termios
import threading
import unittest
from pathlib import Path
from typing import Any
from unittest import mock

from log_file import LogFile, LogInUse, LogTarget, StandardStream, standard_stream
from tests.harness import DEADLINE_S, TOP, FakeClock, FolderCase, wait_until


class FileCase(FolderCase):
    def setUp(self) -> None:
        super().setUp()
        self.path = self.folder / "states.jsonl"
        self.clock = FakeClock()

    def make(self, *, max_bytes: int = 0, backups: int = 3, path: Path | None = None) -> LogFile:
        file = LogFile(str(path or self.path), max_bytes, backups, clock=self.clock)
        self.addCleanup(file.close)
        return file

    def open(self, *, max_bytes: int = 0, backups: int = 3, path: Path | None = None) -> LogFile:
        file = self.make(max_bytes=max_bytes, backups=backups, path=path)
        file.open(0)
        return file

    def names(self) -> list[str]:
        return sorted(os.listdir(self.folder))


def is_locked(path: Path) -> bool:
    """Whether somebody has the file locked."""
    with path.open("rb") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            return True
        return False


class Lock(FileCase):
    """Two never write to one log."""

    def test_a_second_writer_is_refused(self) -> None:
        self.open()
        with self.assertRaises(LogInUse):
            self.open()

    def test_a_second_writer_is_refused_by_whatever_name(self) -> None:
        self.open()
        link, same = self.folder / "link", self.folder / "same"
        link.symlink_to(self.path)
        same.hardlink_to(self.path)
        for name in (link, same, self.folder / ".." / self.folder.name / self.path.name):
            with self.subTest(name.name), self.assertRaises(LogInUse):
                self.open(path=name)

    def test_who_waits_gets_the_log_when_it_is_free(self) -> None:
        first, second = self.open(), self.make()
        waiting = threading.Event()
        with mock.patch("log_file.time.sleep", side_effect=lambda _: waiting.set()):
            opening = threading.Thread(target=second.open, args=(DEADLINE_S,), daemon=True)
            opening.start()
            self.assertTrue(waiting.wait(DEADLINE_S))
            first.close()
            opening.join(DEADLINE_S)
        second.write([b"line\n"])
        self.assertEqual(self.path.read_bytes(), b"line\n")

    def test_a_refused_writer_leaves_the_file_as_it_is(self) -> None:
        """It may be in the middle of a line, which is not torn."""
        self.open().write([b"half a li"])
        with self.assertRaises(LogInUse):
            self.open()
        self.assertEqual(self.path.read_bytes(), b"half a li")

    def test_the_file_is_locked_after_everything_that_changes_it(self) -> None:
        file = self.open(max_bytes=10)
        aside = self.folder / "aside"
        for what in ("opened", "rotated", "reopened", "followed"):
            if what == "rotated":
                file.write([b"line\n"])
                self.assertTrue(file.rotate())
            elif what == "reopened":
                self.assertFalse(file.follow(reopen=True))
            elif what == "followed":
                self.path.rename(aside)
                self.assertTrue(file.follow(reopen=False))
            with self.subTest(what):
                self.assertTrue(is_locked(self.path))
        self.assertFalse(is_locked(aside))
        self.assertFalse(is_locked(self.folder / "states.jsonl.1"))

    def test_follow_to_a_file_of_others(self) -> None:
        """A file that somebody else has locked meanwhile is not written."""
        ours = self.open()
        self.path.rename(self.folder / "aside")
        theirs = self.open()
        with self.assertRaises(LogInUse):
            ours.follow(reopen=False)
        theirs.close()
        self.assertTrue(ours.follow(reopen=False))

    def test_rotation_while_another_opens(self) -> None:
        """Whoever waited for the lock of the old file gets it, and must not write to what is `.1` by now."""
        ours = self.open(max_bytes=10)
        ours.write([b"line\n"])
        real_flock = fcntl.flock

        def rotated_just_before(fd: int, how: int) -> None:
            with mock.patch("log_file.fcntl.flock", real_flock):
                ours.rotate()
            real_flock(fd, how)

        with (
            mock.patch("log_file.fcntl.flock", side_effect=rotated_just_before),
            self.assertRaises(LogInUse) as refused,
        ):
            self.open()
        self.assertIn("rotating", str(refused.exception))
        with self.assertRaises(LogInUse):
            self.open()

    def test_at_every_moment_of_a_rotation_the_log_is_locked(self) -> None:
        file = self.open(max_bytes=10, backups=2)
        moments = 0

        def look() -> None:
            nonlocal moments
            moments += 1
            self.assertTrue(is_locked(self.path))

        def watched(real: Any) -> Any:
            def call(*arguments: Any, **options: Any) -> Any:
                look()
                try:
                    return real(*arguments, **options)
                finally:
                    look()

            return call

        for name in ("replace", "link", "unlink", "open"):
            patched = mock.patch(f"log_file.os.{name}", watched(getattr(os, name)))
            patched.start()
            self.addCleanup(patched.stop)
        for _ in range(4):
            file.write([b"line\n"])
            self.assertTrue(file.rotate())
        self.assertGreater(moments, 20)

    def test_a_forked_child_that_closes_its_copy_leaves_the_lock(self) -> None:
        file = self.open()
        child = multiprocessing.get_context("fork").Process(target=file.close)
        child.start()
        child.join(DEADLINE_S)
        self.assertEqual(child.exitcode, 0)
        self.assertTrue(is_locked(self.path))

    def test_without_locks_there_is_one_warning(self) -> None:
        for number in (errno.ENOLCK, errno.EOPNOTSUPP, errno.ENOSYS):
            with (
                self.subTest(errno.errorcode[number]),
                mock.patch("log_file.fcntl.flock", side_effect=OSError(number, os.strerror(number))),
                self.assertLogs("elrar.log", "WARNING") as logged,
            ):
                file = self.open(max_bytes=10)
                for _ in range(3):
                    file.write([b"line\n"])
                    file.rotate()
                self.assertEqual(len(logged.records), 1)
                self.assertIn("no locks", logged.output[0])
                file.close()

    def test_what_is_no_regular_file_is_not_locked(self) -> None:
        self.open(path=Path("/dev/null"))
        self.open(path=Path("/dev/null"))


class Surplus(FileCase):
    """The bound on disk holds, also after LOG_BACKUPS was lowered; what is not a rotated file stays."""

    KEPT = ("states.jsonl.0", "states.jsonl.01", "states.jsonl.10000", "states.jsonl.5.gz", "states.jsonl.x",
            "states.jsonl.-5", "states.jsonl.5 ", "other.jsonl.5", "xstates.jsonl.5", "states.jsonl.٥")  # fmt: skip
    REMOVED = ("states.jsonl.3", "states.jsonl.4", "states.jsonl.17", "states.jsonl.9999")

    def make_files(self) -> None:
        for name in (*self.KEPT, *self.REMOVED, "states.jsonl.1", "states.jsonl.2"):
            (self.folder / name).touch()
        (self.folder / "states.jsonl.8").mkdir()

    def test_at_the_start(self) -> None:
        self.make_files()
        self.open(max_bytes=1000, backups=2)
        expected = sorted((*self.KEPT, "states.jsonl", "states.jsonl.1", "states.jsonl.2", "states.jsonl.8"))
        self.assertEqual(self.names(), expected)

    def test_at_a_rotation(self) -> None:
        file = self.open(max_bytes=1000, backups=2)
        self.make_files()
        file.write([b"line\n"])
        self.assertTrue(file.rotate())
        self.assertEqual([name for name in self.REMOVED if name in self.names()], [])
        self.assertTrue(set(self.KEPT) < set(self.names()))

    def test_with_no_backups_all_go(self) -> None:
        self.make_files()
        self.open(max_bytes=1000, backups=0)
        self.assertEqual(self.names(), sorted((*self.KEPT, "states.jsonl", "states.jsonl.8")))

    def test_where_somebody_else_rotates_nothing_goes(self) -> None:
        self.make_files()
        before = self.names()
        self.open(max_bytes=0, backups=0)
        self.assertEqual(self.names(), sorted((*before, "states.jsonl")))

    def test_not_before_the_log_is_ours(self) -> None:
        self.open(max_bytes=0)
        self.make_files()
        before = self.names()
        with self.assertRaises(LogInUse):
            self.open(max_bytes=1000, backups=0)
        self.assertEqual(self.names(), before)

    def test_behind_a_symbolic_link(self) -> None:
        there = self.folder / "there"
        there.mkdir()
        self.path.symlink_to(there / "real.jsonl")
        for name in ("real.jsonl.7", "states.jsonl.7"):
            (there / name).touch()
            (self.folder / name).touch()
        self.open(max_bytes=1000, backups=2)
        self.assertEqual(sorted(os.listdir(there)), ["real.jsonl", "states.jsonl.7"])
        self.assertEqual(self.names(), ["real.jsonl.7", "states.jsonl", "states.jsonl.7", "there"])

    def test_what_a_rotation_left_when_it_was_killed_goes(self) -> None:
        (self.folder / "states.jsonl.new").touch()
        self.open(max_bytes=1000)
        self.assertEqual(self.names(), ["states.jsonl"])

    def test_what_cannot_be_removed_is_said_once_and_stops_nothing(self) -> None:
        self.make_files()
        refused = PermissionError(errno.EACCES, "denied")
        with (
            mock.patch("log_file.os.unlink", side_effect=refused),
            self.assertLogs("elrar.log", "ERROR") as logged,
        ):
            file = self.open(max_bytes=1000, backups=2)
            file._remove_surplus()
        self.assertEqual(len(logged.records), 1)
        self.assertIn("LOG_BACKUPS", logged.output[0])


class Rotation(FileCase):
    """A rotation keeps every line, wherever the file system allows less than usual."""

    def test_on_a_file_system_without_links(self) -> None:
        file = self.open(max_bytes=10, backups=2)
        with mock.patch("log_file.os.link", side_effect=PermissionError(errno.EPERM, "no links")):
            for number in range(3):
                file.write([b"%d\n" % number])
                self.assertTrue(file.rotate())
        self.assertEqual(
            [(self.folder / name).read_bytes() for name in self.names()], [b"", b"2\n", b"1\n"], self.names()
        )

    def test_a_file_that_was_moved_just_before_is_not_rotated(self) -> None:
        file = self.open(max_bytes=10, backups=2)
        file.write([b"line\n"])
        self.path.rename(self.folder / "aside")
        file.rotate()
        self.assertEqual(self.names(), ["aside", "states.jsonl"])
        self.assertEqual(file.rotations, 0)

    def test_an_empty_file_is_not_rotated(self) -> None:
        self.assertFalse(self.open(max_bytes=10).rotate())
        self.assertEqual(self.names(), ["states.jsonl"])

    def test_a_rotation_that_fails_leaves_no_other_file(self) -> None:
        file = self.open(max_bytes=10, backups=1)
        file.write([b"line\n"])
        with (
            mock.patch("log_file.os.replace", side_effect=PermissionError(errno.EACCES, "denied")),
            self.assertLogs("elrar.log", "ERROR"),
        ):
            self.assertFalse(file.rotate())
        self.assertEqual(self.names(), ["states.jsonl"])
        file.write([b"more\n"])
        self.assertEqual(self.path.read_bytes(), b"line\nmore\n")

    def test_killed_in_the_middle_of_it(self) -> None:
        """The file has both names then: the next start goes on with it, and nothing is there twice."""
        file = self.open(max_bytes=10, backups=2)
        file.write([b"1\n"])
        file.rotate()
        file.write([b"2\n"])
        with (
            mock.patch("log_file.os.replace", side_effect=KeyboardInterrupt),
            mock.patch.object(file, "_undo_rotation"),  # for the dead undo nothing
            self.assertRaises(KeyboardInterrupt),
        ):
            (self.folder / "states.jsonl.1").rename(self.folder / "states.jsonl.2")
            file.rotate()
        file.close()
        self.assertEqual(self.names(), ["states.jsonl", *(f"states.jsonl.{end}" for end in ("1", "2", "new"))])
        again = self.open(max_bytes=10, backups=2)
        self.assertEqual(self.names(), ["states.jsonl", "states.jsonl.2"])
        again.write([b"3\n"])
        again.rotate()
        self.assertEqual(
            [(self.folder / name).read_bytes() for name in self.names()], [b"", b"2\n3\n", b"1\n"], self.names()
        )


class StandardStreams(unittest.TestCase):
    """LOG_FILE=- and its like are written to the descriptor that is there, whatever it is, and changed in nothing."""

    def stream(self, fd: int) -> LogTarget:
        stream = StandardStream(fd)
        stream.open(0)
        self.addCleanup(stream.close)
        return stream

    def test_what_means_a_standard_stream(self) -> None:
        for path, fd in (
            ("-", 1), ("/dev/stdout", 1), ("/dev/stderr", 2), ("/dev/fd/1", 1), ("/proc/self/fd/2", 2),
            (f"/proc/{os.getpid()}/fd/1", 1), ("//dev/./stdout", 1),
        ):  # fmt: skip
            self.assertEqual(standard_stream(path), fd, path)
        for path in (
            "engine_states.jsonl",
            "./-",
            "/dev/null",
            "/dev/stdout.jsonl",
            "/dev/fd/3",
            "",
            f"/proc/{os.getppid()}/fd/1",
        ):
            self.assertIsNone(standard_stream(path), path)

    def test_a_symbolic_link_to_a_standard_stream_is_one(self) -> None:
        with tempfile.TemporaryDirectory() as folder:
            (Path(folder) / "states.jsonl").symlink_to("/dev/stdout")
            (Path(folder) / "round").symlink_to("round")
            self.assertEqual(standard_stream(f"{folder}/states.jsonl"), 1)
            self.assertIsNone(standard_stream(f"{folder}/round"))

    def test_a_pipe(self) -> None:
        reader, writer = os.pipe()
        self.addCleanup(os.close, reader)
        stream = self.stream(writer)
        os.close(writer)
        self.assertEqual(stream.write([b"a\n", b"b\n"]), 4)
        self.assertEqual(os.read(reader, 10), b"a\nb\n")
        self.assertTrue(os.get_blocking(stream._fd))  # type: ignore[attr-defined]

    def test_a_full_pipe_never_blocks(self) -> None:
        reader, writer = os.pipe()
        self.addCleanup(os.close, reader)
        self.addCleanup(os.close, writer)
        stream = self.stream(writer)
        line = b"x" * (stream.max_write_bytes - 1) + b"\n"
        with self.assertRaises(BlockingIOError):
            while True:
                stream.write([line])
        self.assertFalse(stream.wait_for_room(0))
        os.read(reader, 2 * len(line))
        self.assertTrue(stream.wait_for_room(0))

    def test_a_pipe_whose_reader_is_gone_is_an_error(self) -> None:
        reader, writer = os.pipe()
        stream = self.stream(writer)
        os.close(writer)
        os.close(reader)
        with self.assertRaises(BrokenPipeError):
            stream.write([b"a\n"])

    def test_a_socket(self) -> None:
        """As systemd's journal gives it, which nobody can open by a path."""
        ours, theirs = socket.socketpair()
        with ours, theirs:
            stream = self.stream(ours.fileno())
            self.assertEqual(stream.write([b"a\n", b"b\n"]), 4)
            self.assertEqual(theirs.recv(10), b"a\nb\n")
            with self.assertRaises(BlockingIOError):
                while True:
                    stream.write([b"x" * 4095 + b"\n"])
            self.assertTrue(ours.getblocking())
            theirs.close()
            with self.assertRaises((BrokenPipeError, ConnectionResetError)):
                stream.write([b"a\n"])

    def test_a_file_that_others_write_to_as_well(self) -> None:
        with tempfile.TemporaryFile() as file:
            stream = self.stream(file.fileno())
            os.write(file.fileno(), b"theirs\n")
            stream.write([b"ours\n"])
            os.write(file.fileno(), b"theirs\n")
            self.assertEqual(os.pread(file.fileno(), 100, 0), b"theirs\nours\ntheirs\n")
            self.assertFalse(is_locked(Path(f"/proc/self/fd/{file.fileno()}")))
            self.assertFalse(stream.take_back(1))
            self.assertIsNone(stream.room())

    def test_a_terminal_that_was_stopped(self) -> None:
        master, slave = pty.openpty()
        self.addCleanup(os.close, master)
        self.addCleanup(os.close, slave)
        stream = self.stream(slave)
        stream.write([b"a\n"])
        self.assertEqual(os.read(master, 10), b"a\r\n")
        termios.tcflow(slave, termios.TCOOFF)
        with self.assertRaises(BlockingIOError):
            stream.write([b"b\n"])
        termios.tcflow(slave, termios.TCOON)
        wait_until("room", lambda: stream.wait_for_room(0))
        stream.write([b"b\n"])

    def test_what_it_writes_is_never_torn_by_what_another_writes(self) -> None:
        """The daemon's own log in the same pipe: a line is one write, of a size that the system keeps together."""
        reader, writer = os.pipe()
        self.addCleanup(os.close, reader)
        stream = self.stream(writer)
        self.assertLessEqual(stream.max_write_bytes, select.PIPE_BUF)
        os.close(writer)


class Processes(FileCase):
    """Several processes that rotate and start at the same time."""

    PROGRAM = """
import sys, time
from log_file import LogFile, LogInUse
path, name, count = sys.argv[1], sys.argv[2], int(sys.argv[3])
opened = 0
for number in range(count):
    file = LogFile(path, 100, 9000)
    try:
        file.open(0)
    except LogInUse:
        continue
    opened += 1
    for line in range(5):
        file.write([b"%s %d %d ------------------------\\n" % (name.encode(), number, line)])
        if not file.room():
            file.rotate()
        elif file.room() < 60:
            file.rotate()
    file.close()
print(opened)
"""

    def test_no_line_is_lost_or_written_into_a_rotated_file(self) -> None:
        processes = [
            subprocess.Popen(
                [sys.executable, "-c", self.PROGRAM, str(self.path), f"p{number}", "100"],
                cwd=TOP,
                stdout=subprocess.PIPE,
                text=True,
            )
            for number in range(3)
        ]
        opened = sum(int(process.communicate(timeout=DEADLINE_S)[0]) for process in processes)
        self.assertGreater(opened, 0)
        lines = [line for path in self.folder.iterdir() for line in path.read_bytes().splitlines()]
        self.assertEqual(len(lines), 5 * opened)
        self.assertNotIn("states.jsonl.new", self.names())
        self.assertEqual(len(set(lines)), len(lines))
        for path in self.folder.iterdir():
            self.assertLessEqual(path.stat().st_size, 100 + 60)


if __name__ == "__main__":
    unittest.main()
