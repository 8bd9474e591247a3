"""The state log: whole lines, every state once, and a disk that may fail without anybody waiting (contract, 5)."""

from __future__ import annotations

import errno
import json
import os
import tempfile
import threading
import tracemalloc
import unittest
from collections.abc import Callable, Mapping
from pathlib import Path
from unittest import mock

import log_file
from engine_state import FIELDS_JSON
from state_log import FLUSH_BYTES, MAX_PIECES_PER_WRITE, LineBuffer, Lines, StateLog
from tests.harness import (
    DEADLINE_S,
    FakeClock,
    FolderCase,
    datagram,
    fields,
    logged_states,
    parse_datagram,
    read_log,
    wait_until,
)

WALL_S = 1755532567.5028431


def append(log: StateLog, *states: Mapping[str, object]) -> None:
    """Append states, each with these changes, as the listener does."""
    texts = [b"{%b}" % (FIELDS_JSON % parse_datagram(datagram(**changes)).texts()) for changes in states]
    log.append(WALL_S, texts, [b'"172.17.0.3:40000"'] * len(texts))


class LogCase(FolderCase):
    def setUp(self) -> None:
        super().setUp()
        self.path = self.folder / "states.jsonl"
        self.clock = FakeClock()

    def make_log(
        self, path: Path | None = None, *, max_bytes: int = 0, backups: int = 3, buffer_bytes: int = 1 << 20
    ) -> StateLog:
        log = StateLog(
            str(path or self.path),
            max_bytes,
            backups,
            buffer_bytes=buffer_bytes,
            clock=self.clock,
            wall_clock=lambda: WALL_S,
        )
        log.open("gateway_started", "network mode: unicast, test", version="1")
        self.addCleanup(log.close_descriptors)
        return log

    def write(self, log: StateLog, *numbers: int) -> None:
        """Append states with these pending tokens, and have the writer's turn."""
        for number in numbers:
            append(log, {"pending_tokens_total": number})
        log.step()

    def numbers(self, *paths: Path) -> list[int]:
        return [state["pending_tokens_total"] for path in paths for state in logged_states(path)]


class WrittenLines(LogCase):
    """One whole JSON document a line, in the shape that people have tools for."""

    def test_a_state_is_a_line_with_receipt_and_source(self) -> None:
        log = self.make_log()
        append(log, {})
        log.step()
        line = self.path.read_text().splitlines()[1]
        expected = {"timestamp": WALL_S, "state": fields(), "source": "172.17.0.3:40000"}
        self.assertEqual(json.loads(line), expected)
        self.assertEqual(line, json.dumps(expected))

    def test_first_and_last_line(self) -> None:
        """The first line says the network mode, and the last one has the counters."""
        log = self.make_log()
        self.write(log, 1, 2)
        self.assertEqual(log.end("gateway_stopped", "network mode: unicast, stopped", total_received=2), 0)
        first, *_, last = read_log(self.path)
        self.assertEqual(
            first,
            {
                "timestamp": WALL_S,
                "event": "gateway_started",
                "message": "network mode: unicast, test",
                "version": "1",
            },
        )
        self.assertEqual((last["event"], last["total_received"], last["log_written"]), ("gateway_stopped", 2, 2))

    def test_any_printable_text_stays_one_valid_line_in_utf8(self) -> None:
        log = self.make_log()
        for engine_id in ("引擎-é-😀", "'\"\\<script>%2e/?#"):
            append(log, {"engine_id": engine_id})
        log.step()
        self.assertEqual(
            [state["engine_id"] for state in logged_states(self.path)], ["引擎-é-😀", "'\"\\<script>%2e/?#"]
        )
        self.assertIn("引擎", self.path.read_text(encoding="utf-8"))

    def test_nothing_is_written_by_the_one_who_appends(self) -> None:
        log = self.make_log()
        append(log, {})
        self.assertEqual(logged_states(self.path), [])
        log.step()
        self.assertEqual(len(logged_states(self.path)), 1)

    def test_many_batches_are_written_together_and_in_order(self) -> None:
        log = self.make_log()
        with mock.patch("log_file.os.writev", wraps=os.writev) as write:
            self.write(log, *range(500))
        self.assertEqual(write.call_count, 1)
        self.assertEqual(self.numbers(self.path), list(range(500)))
        self.assertEqual(log.counters().written, 500)

    def test_order_over_system_calls(self) -> None:
        """More batches than one system call takes are written in order."""
        log = self.make_log()
        count = 2 * MAX_PIECES_PER_WRITE + 1
        with mock.patch("log_file.os.writev", wraps=os.writev) as write:
            self.write(log, *range(count))
        self.assertEqual(
            [len(call.args[1]) for call in write.call_args_list], [MAX_PIECES_PER_WRITE, MAX_PIECES_PER_WRITE, 1]
        )
        self.assertEqual(self.numbers(self.path), list(range(count)))

    def test_what_comes_fast_is_not_left_to_wait(self) -> None:
        log = self.make_log()
        with mock.patch("state_log.FLUSH_INTERVAL_S", 3600.0):
            writer = threading.Thread(target=log.run, daemon=True)
            writer.start()
            self.addCleanup(writer.join, DEADLINE_S)
            self.addCleanup(log.stop)
            many = FLUSH_BYTES // 300
            append(log, *({"pending_tokens_total": number} for number in range(many)))
            wait_until("it to be written", lambda: log.counters().written == many)
        self.assertEqual(self.numbers(self.path), list(range(many)))

    def test_a_log_that_was_there_is_continued(self) -> None:
        log = self.make_log()
        self.write(log, 1)
        log.close_descriptors()
        self.write(self.make_log(), 2)
        self.assertEqual(self.numbers(self.path), [1, 2])

    def test_a_torn_last_line_is_closed_off_and_spoils_no_other(self) -> None:
        self.path.write_bytes(b'{"timestamp": 1, "state": {"engi')
        self.write(self.make_log(), 1)
        torn, *whole = self.path.read_bytes().splitlines()
        self.assertEqual(torn, b'{"timestamp": 1, "state": {"engi')
        self.assertEqual([json.loads(line).get("event", "state") for line in whole], ["gateway_started", "state"])

    def test_missing_folders_are_made(self) -> None:
        self.write(self.make_log(self.folder / "a" / "b" / "states.jsonl"), 1)
        self.assertEqual(self.numbers(self.folder / "a" / "b" / "states.jsonl"), [1])


class Rotation(LogCase):
    """The log is bounded by LOG_MAX_BYTES and LOG_BACKUPS, and no state is lost by that."""

    def rotated(self) -> list[Path]:
        """All files of the log, oldest first."""
        numbered = sorted(self.folder.glob("states.jsonl.*"), key=lambda path: -int(path.suffix[1:]))
        return [*numbered, self.path]

    def test_bound_on_files(self) -> None:
        """Every file stays below the limit, and every state is kept."""
        log = self.make_log(max_bytes=2000, backups=100)
        for first in range(0, 200, 50):
            self.write(log, *range(first, first + 50))
        files = self.rotated()
        self.assertGreater(len(files), 10)
        self.assertLessEqual(max(path.stat().st_size for path in files), 2000)
        self.assertEqual(self.numbers(*files), list(range(200)))
        self.assertEqual(log.counters().rotations, len(files) - 1)

    def test_the_oldest_go_first(self) -> None:
        log = self.make_log(max_bytes=2000, backups=2)
        self.write(log, *range(100))
        self.assertEqual([path.name for path in self.rotated()], ["states.jsonl.2", "states.jsonl.1", "states.jsonl"])
        kept = self.numbers(*self.rotated())
        self.assertEqual(kept, list(range(100))[-len(kept) :])

    def test_without_backups_only_the_file_itself_is_kept(self) -> None:
        log = self.make_log(max_bytes=2000, backups=0)
        self.write(log, *range(100))
        self.assertEqual(os.listdir(self.folder), ["states.jsonl"])
        self.assertLessEqual(self.path.stat().st_size, 2000)
        self.assertEqual(self.numbers(self.path)[-1], 99)

    def test_a_line_that_is_larger_than_the_limit_is_still_whole(self) -> None:
        log = self.make_log(max_bytes=10, backups=100)
        self.write(log, 1, 2, 3)
        self.assertEqual(self.numbers(*self.rotated()), [1, 2, 3])

    def test_a_symbolic_link_stays_and_what_it_leads_to_is_rotated(self) -> None:
        other = self.folder / "other"
        other.mkdir()
        self.path.symlink_to(other / "real.jsonl")
        log = self.make_log(max_bytes=2000, backups=100)
        self.write(log, *range(30))
        self.assertTrue(self.path.is_symlink())
        files = sorted(other.glob("real.jsonl.*"), key=lambda path: -int(path.suffix[1:]))
        self.assertEqual(self.numbers(*files, other / "real.jsonl"), list(range(30)))

    @unittest.skipUnless(os.access("/dev/shm", os.W_OK), "no /dev/shm on this machine")
    def test_a_file_below_dev_is_rotated_too(self) -> None:
        with tempfile.TemporaryDirectory(dir="/dev/shm") as folder:
            log = self.make_log(Path(folder) / "states.jsonl", max_bytes=2000, backups=1)
            self.write(log, *range(100))
            self.assertLessEqual(max(path.stat().st_size for path in Path(folder).iterdir()), 2000)

    def test_zero_is_never(self) -> None:
        log = self.make_log(max_bytes=0)
        self.write(log, *range(1000))
        self.assertEqual(os.listdir(self.folder), ["states.jsonl"])

    def test_a_rotation_that_fails_loses_nothing(self) -> None:
        log = self.make_log(max_bytes=2000)
        with (
            mock.patch("log_file.os.replace", side_effect=PermissionError(errno.EACCES, "denied")),
            self.assertLogs("elrar.log", "ERROR") as logged,
        ):
            self.write(log, *range(50))
            self.write(log, *range(50, 100))
        self.assertEqual(len(logged.records), 1)
        self.assertEqual(self.numbers(self.path), list(range(100)))
        self.assertEqual((log.counters().errors, log.counters().dropped), (1, 0))


class Followed(LogCase):
    """A file that is moved, removed, replaced or truncated under the gateway is opened anew at the next turn."""

    def lost_and_found(self, trouble: Callable[[], object]) -> StateLog:
        log = self.make_log()
        self.write(log, 1)
        trouble()
        self.write(log, 2)
        return log

    def test_moved(self) -> None:
        aside = self.folder / "aside"
        self.lost_and_found(lambda: self.path.rename(aside))
        self.assertEqual((self.numbers(aside), self.numbers(self.path)), ([1], [2]))

    def test_removed(self) -> None:
        self.lost_and_found(self.path.unlink)
        self.assertEqual(self.numbers(self.path), [2])

    def test_removed_while_nothing_is_to_be_written(self) -> None:
        log = self.lost_and_found(lambda: None)
        self.path.unlink()
        log.step()
        self.assertEqual(self.path.read_bytes(), b"")

    def test_replaced_as_logrotate_create_does(self) -> None:
        aside = self.folder / "states.jsonl.1"

        def create() -> None:
            self.path.rename(aside)
            self.path.touch(0o600)

        self.lost_and_found(create)
        self.assertEqual((self.numbers(aside), self.numbers(self.path)), ([1], [2]))

    def test_truncated_as_logrotate_copytruncate_does(self) -> None:
        self.lost_and_found(lambda: os.truncate(self.path, 0))
        self.assertNotIn(b"\0", self.path.read_bytes())
        self.assertEqual(self.numbers(self.path), [2])

    def test_the_whole_folder_removed(self) -> None:
        folder = self.folder / "sub"
        log = self.make_log(folder / "states.jsonl")
        (folder / "states.jsonl").unlink()
        folder.rmdir()
        self.write(log, 1)
        self.assertEqual(self.numbers(folder / "states.jsonl"), [1])

    def test_a_reopening_that_fails_is_tried_again(self) -> None:
        log = self.make_log()
        log.reopen()
        with (
            mock.patch("log_file._open_for_append", side_effect=OSError(errno.EMFILE, "too many")),
            self.assertLogs("elrar.log"),
        ):
            log.step()
        self.clock.move(1.0)
        with mock.patch("log_file._open_for_append", wraps=log_file._open_for_append) as opened, self.assertLogs():
            log.step()
        self.assertEqual(opened.call_count, 1)

    def test_reopened_when_asked(self) -> None:
        log = self.make_log()
        with mock.patch("log_file._open_for_append", wraps=log_file._open_for_append) as opened:
            log.step()
            self.assertEqual(opened.call_count, 0)
            log.reopen()
            log.step()
            log.step()
        self.assertEqual(opened.call_count, 1)


class Buffers(unittest.TestCase):
    """The buffer is bounded, counts what it drops, and says when it is time to write."""

    LINES = b"x" * 999 + b"\n"

    def test_full_buffer_drops_and_counts(self) -> None:
        buffer = LineBuffer(3000)
        for _ in range(5):
            buffer.append(Lines(self.LINES, 7))
        self.assertEqual((len(buffer.remove_waiting()), buffer.dropped), (2, 21))

    def test_room_comes_back_when_lines_are_written_and_not_before(self) -> None:
        buffer = LineBuffer(3000)
        first, second = Lines(self.LINES, 1), Lines(self.LINES, 1)
        buffer.append(first)
        buffer.append(second)
        buffer.remove_waiting()
        buffer.append(Lines(self.LINES, 1))
        self.assertEqual(buffer.dropped, 1)
        buffer.note_written(first.memory, 1)
        buffer.append(Lines(self.LINES, 1))
        self.assertEqual(buffer.dropped, 1)

    def test_event_is_never_dropped(self) -> None:
        buffer = LineBuffer(0)
        buffer.append(Lines(self.LINES, 0))
        self.assertEqual((len(buffer.remove_waiting()), buffer.dropped), (1, 0))

    def test_due_once_per_flush(self) -> None:
        buffer = LineBuffer(1 << 30)
        due = [buffer.append(Lines(b"x" * (FLUSH_BYTES // 2), 1)) for _ in range(5)]
        self.assertEqual(due, [False, True, False, False, False])
        buffer.remove_waiting()
        self.assertEqual([buffer.append(Lines(b"x" * (FLUSH_BYTES // 2), 1)) for _ in range(2)], [False, True])

    def test_closed_buffer_counts_the_rest(self) -> None:
        buffer = LineBuffer(1 << 20)
        buffer.append(Lines(self.LINES, 5))
        buffer.note_written(0, 2)
        self.assertEqual(buffer.close(), 3)
        buffer.append(Lines(self.LINES, 4))
        self.assertEqual(buffer.dropped, 7)
        self.assertEqual(buffer.close(), 0)

    def test_unfinished_line_begins_again(self) -> None:
        lines = Lines(b"abc\ndef\nghi\n", 3, offset=6)
        self.assertEqual(lines.begun, 2)
        lines.back_to_line_start()
        self.assertEqual((lines.offset, lines.begun), (4, 0))


class FullDisk:
    """A disk that takes `room` more bytes, and then none."""

    def __init__(self, room: int) -> None:
        self.room = room

    def writev(self, fd: int, pieces: list[bytes]) -> int:
        if not self.room:
            raise OSError(errno.ENOSPC, "No space left on device")
        wrote = os.write(fd, b"".join(pieces)[: self.room])
        self.room -= wrote
        return wrote


class Failing(LogCase):
    """A log that cannot be written: lines wait, then are dropped and counted; said once, and when it is over."""

    def test_a_disk_that_fills_up_in_mid_line_and_is_freed(self) -> None:
        log = self.make_log()
        self.write(log, 1)
        disk = FullDisk(room=400)
        with mock.patch("log_file.os.writev", disk.writev), self.assertLogs("elrar.log") as logged:
            self.write(log, 2, 3)
            self.assertEqual(self.numbers(self.path), [1, 2])
            self.assertTrue(self.path.read_bytes().endswith(b"\n"), "half a line is left in the file")
            for number in range(4, 10):
                self.write(log, number)
                self.clock.move(1.0)
            self.assertEqual(log.counters().dropped, 0)
            disk.room = 1 << 20
            self.write(log, 10)
        self.assertEqual(self.numbers(self.path), list(range(1, 11)))
        self.assertEqual([record.levelname for record in logged.records], ["ERROR", "WARNING"])
        counters = log.counters()
        self.assertEqual((counters.written, counters.dropped), (10, 0))
        self.assertGreater(counters.errors, 1)

    def test_flapping_disk(self) -> None:
        """A disk that fails and works by turns is not logged at every turn."""
        log = self.make_log()
        with self.assertLogs("elrar.log") as logged:
            for number in range(45):  # seconds
                with mock.patch("log_file.os.writev", FullDisk(room=0 if number % 2 else 1 << 20).writev):
                    self.write(log, number)
                    self.clock.move(1.1)
        self.assertEqual([record.levelname for record in logged.records], ["ERROR", "WARNING"])
        self.assertEqual(self.numbers(self.path), list(range(45)))

    def test_lasting_trouble(self) -> None:
        """Trouble that was not logged at first is logged if it lasts."""
        log = self.make_log()
        with self.assertLogs("elrar.log") as logged:
            for room in (0, 1 << 20, *([0] * 70)):
                with mock.patch("log_file.os.writev", FullDisk(room).writev):
                    self.write(log, 1)
                    self.clock.move(1.1)
        self.assertEqual([record.levelname for record in logged.records], ["ERROR", "WARNING", "ERROR"])

    def test_beyond_the_buffer_lines_are_dropped_and_counted(self) -> None:
        log = self.make_log(buffer_bytes=2000)
        disk = FullDisk(room=0)
        with mock.patch("log_file.os.writev", disk.writev), self.assertLogs("elrar.log"):
            for number in range(100):
                self.write(log, number)
                self.clock.move(1.0)
            dropped = log.counters().dropped
            self.assertGreater(dropped, 80)
            disk.room = 1 << 20
            self.write(log)
        self.assertEqual(self.numbers(self.path), list(range(100 - dropped)))
        self.assertEqual(log.counters().written, 100 - dropped)
        self.write(log, 1000)
        self.assertEqual(self.numbers(self.path)[-1], 1000)

    def test_it_is_tried_again_every_second_and_not_at_every_turn(self) -> None:
        log = self.make_log()
        disk = FullDisk(room=0)
        with mock.patch("log_file.os.writev", side_effect=disk.writev) as write, self.assertLogs("elrar.log"):
            for _ in range(40):
                self.write(log, 1)
                self.clock.move(0.1)
        self.assertEqual(write.call_count, 4)

    def test_given_up_at_stop(self) -> None:
        """What cannot be written at stop is given up and counted."""
        log = self.make_log()
        self.write(log, 1)
        with mock.patch("log_file.os.writev", FullDisk(room=0).writev), self.assertLogs("elrar.log"):
            self.write(log, 2, 3)
            self.assertEqual(log.end("gateway_stopped", "stopped"), 2)
        self.assertEqual(log.counters().dropped, 2)
        self.assertEqual(self.numbers(self.path), [1])

    def test_what_comes_after_the_end_is_counted_as_dropped(self) -> None:
        log = self.make_log()
        self.write(log, 1)
        self.assertEqual(log.end("gateway_stopped", "stopped"), 0)
        append(log, {}, {})
        self.assertEqual((log.counters().written, log.counters().dropped), (1, 2))

    def test_memory_of_small_pieces(self) -> None:
        """Python's objects are in the account, too: 10,000 states that come one by one."""
        log = self.make_log(buffer_bytes=1 << 20)
        tracemalloc.start()
        self.addCleanup(tracemalloc.stop)
        before, _ = tracemalloc.get_traced_memory()
        for number in range(10_000):
            append(log, {"pending_tokens_total": number})
        after, _ = tracemalloc.get_traced_memory()
        self.assertGreater(log.counters().dropped, 5000)
        self.assertLess(after - before, 1.1 * (1 << 20))

    def test_a_fifo_whose_reader_stops_reading_stops_nobody(self) -> None:
        os.mkfifo(self.path)
        reader = os.open(self.path, os.O_RDONLY | os.O_NONBLOCK)
        self.addCleanup(os.close, reader)
        log = self.make_log(max_bytes=1000)
        text = b""
        with self.assertLogs("elrar.log"):
            self.write(log, *range(1000))
            while len(text.splitlines()) < 1001:
                self.clock.move(1.0)
                log.step()
                text += os.read(reader, 1 << 20)
        lines = [json.loads(line) for line in text.splitlines()]
        self.assertEqual([line["state"]["pending_tokens_total"] for line in lines[1:]], list(range(1000)))
        self.assertEqual((log.counters().dropped, log.counters().rotations), (0, 0))


class CannotStart(LogCase):
    """What cannot be opened at the start is an error at once."""

    def test_a_first_line_that_does_not_fit_is_taken_back(self) -> None:
        with mock.patch("log_file.os.writev", FullDisk(room=20).writev), self.assertRaises(OSError):
            self.make_log()
        self.assertEqual(self.path.read_bytes(), b"")

    def test_errors_at_the_start(self) -> None:
        fifo = self.folder / "fifo"
        os.mkfifo(fifo)
        blocked = self.folder / "file"
        blocked.touch()
        for path, number in (
            (self.folder, errno.EISDIR),
            (Path("/dev/full"), errno.ENOSPC),
            (fifo, errno.ENXIO),
            (blocked / "states.jsonl", errno.ENOTDIR),
        ):
            with self.subTest(str(path)):
                with self.assertRaises(OSError) as refused:
                    self.make_log(path)
                self.assertIn(refused.exception.errno, (number, errno.EEXIST))


if __name__ == "__main__":
    unittest.main()
