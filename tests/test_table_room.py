"""Whether the table has room for one engine more."""

from __future__ import annotations

import sys
import unittest
from unittest import mock

import table_room
from table_room import ANSWERS, CHECK_EVERY, MAX_HISTORY_BYTES, RESERVE_BYTES, TableRoom

MIB = 1024 * 1024


class Memory(unittest.TestCase):
    """With a limit of memory the table stops growing while two thirds of what was free are left for answers."""

    def setUp(self) -> None:
        self.used = 100 * MIB
        self.asked = 0

    def use(self) -> int:
        self.asked += 1
        return self.used

    def room(self, limit: int | None, max_engines: int = 1_000_000) -> TableRoom:
        return TableRoom(max_engines, limit_bytes=lambda: limit, used_bytes=self.use)

    def test_without_a_limit_the_system_is_never_asked(self) -> None:
        room = self.room(None)
        self.assertTrue(all(room.for_one_more(number) for number in range(1000)))
        self.assertEqual((self.asked, room.max_history_bytes), (0, MAX_HISTORY_BYTES))

    def test_max_engines(self) -> None:
        for limit in (None, 1000 * MIB):
            with self.subTest(limit):
                room = self.room(limit, max_engines=2)
                self.assertEqual(
                    [room.for_one_more(known) for known in (0, 1, 2, 3, 1)], [True, True, False, False, True]
                )

    def test_a_third_of_what_is_free_is_the_tables(self) -> None:
        free = 90 * MIB
        room = self.room(self.used + RESERVE_BYTES + free)
        self.assertTrue(room.for_one_more(0))
        self.assertEqual(room.max_history_bytes, free // (1 + ANSWERS) // 2)
        self.used += free // (1 + ANSWERS)
        outcomes = [room.for_one_more(number) for number in range(1, CHECK_EVERY + 1)]
        self.assertEqual((outcomes[0], outcomes[-1]), (True, False))

    def test_the_system_is_asked_now_and_then_and_room_comes_back(self) -> None:
        room = self.room(self.used + RESERVE_BYTES + 90 * MIB)
        room.for_one_more(0)
        self.used += 40 * MIB
        self.assertFalse([room.for_one_more(number) for number in range(1, CHECK_EVERY + 1)][-1])
        self.used -= 40 * MIB
        self.assertTrue([room.for_one_more(CHECK_EVERY) for _ in range(CHECK_EVERY)][-1])
        self.assertEqual(self.asked, 3)

    def test_as_many_as_there_were_have_room_again(self) -> None:
        """The system may never get back what they had: a flood of ids must not keep all others out for ever after."""
        room = self.room(self.used + RESERVE_BYTES + 90 * MIB)
        most = sum(room.for_one_more(number) for number in range(500))
        self.used += 40 * MIB
        outcomes = [room.for_one_more(number) for number in range(500, 500 + 2 * CHECK_EVERY)]
        most += sum(outcomes)
        self.assertFalse(outcomes[-1])
        self.assertEqual([room.for_one_more(number) for number in (0, most - 1, most)], [True, True, False])

    def test_no_room_at_all(self) -> None:
        self.assertFalse(self.room(self.used).for_one_more(0))

    def test_a_quarter_of_little(self) -> None:
        room = self.room(self.used + RESERVE_BYTES)
        self.assertTrue(room.for_one_more(0))
        self.used += RESERVE_BYTES // 4
        self.assertFalse([room.for_one_more(number) for number in range(1, CHECK_EVERY + 1)][-1])

    def test_a_system_that_does_not_say_has_room(self) -> None:
        def fail() -> int:
            raise FileNotFoundError

        self.assertTrue(TableRoom(10, limit_bytes=lambda: 5, used_bytes=fail).for_one_more(0))

    @unittest.skipUnless(sys.platform == "linux", "there is no /proc")
    def test_what_the_heap_has_free_is_not_used(self) -> None:
        """A log that waited for its disk has had megabytes, which glibc keeps; without glibc nobody can say."""
        with mock.patch("table_room._mallinfo", None):
            size = table_room._used_bytes()
        with mock.patch("table_room._mallinfo", lambda: table_room._MallocInfo(fordblks=size)):
            self.assertLess(abs(table_room._used_bytes()), size // 2)
        self.assertGreater(table_room._used_bytes(), 0)


if __name__ == "__main__":
    unittest.main()
