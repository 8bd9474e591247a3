"""Order by `boot` and `seq`, and what was lost on the way (the contract's section 2)."""

from __future__ import annotations

import random
import unittest

from boot_sequence import EARLIER_BOOTS, LATE, MAX_GAP, NEWER, REPEATED, RESTARTED, WINDOW, BootSequence

LONG_AGO, NEVER = float("-inf"), float("inf")  # what "within the threshold" is measured against


class Numbers(unittest.TestCase):
    """Within a boot the number alone says what is newer, and what was lost."""

    def setUp(self) -> None:
        self.sequence = BootSequence(b'"a"', 100, 0.0)

    def place(self, *numbers: int) -> list[str]:
        return [self.sequence.place(b'"a"', number, 1.0, LONG_AGO) for number in numbers]

    def lost(self) -> tuple[int, int, int]:
        return self.sequence.gap_states, self.sequence.late_states, self.sequence.lost

    def test_a_higher_number_is_newer_and_the_same_again_is_repeated(self) -> None:
        self.assertEqual(self.place(101, 101, 100, 102), [NEWER, REPEATED, REPEATED, NEWER])
        self.assertEqual(self.lost(), (0, 0, 0))

    def test_a_gap_is_lost_until_it_comes_and_is_taken_off_once(self) -> None:
        self.assertEqual(self.place(105), [NEWER])
        self.assertEqual(self.lost(), (4, 0, 4))
        self.assertEqual(self.place(103, 103, 105), [LATE, REPEATED, REPEATED])
        self.assertEqual(self.lost(), (4, 1, 3))

    def test_numbers_before_the_first_one_heard_are_not_counted(self) -> None:
        self.assertEqual(self.place(99, 99, 98), [LATE, REPEATED, LATE])
        self.assertEqual(self.lost(), (0, 0, 0))

    def test_a_late_number_beyond_the_window_is_late_and_stays_lost(self) -> None:
        self.place(102)
        self.place(102 + WINDOW - 1)
        self.assertEqual(self.place(102), [REPEATED], "the last one of the window")
        self.place(102 + WINDOW)
        before = self.lost()
        self.assertEqual(self.place(102, 101), [LATE, LATE])
        self.assertEqual(self.lost(), before)

    def test_gaps_above_the_bound_are_not_counted_and_what_is_in_them_neither(self) -> None:
        self.place(100 + 1 + MAX_GAP)
        self.assertEqual(self.lost(), (MAX_GAP, 0, MAX_GAP))
        self.place(100 + 1 + MAX_GAP + 2 + MAX_GAP)
        self.assertEqual(self.lost(), (MAX_GAP, 0, MAX_GAP))
        self.assertEqual(self.place(100 + 2 * MAX_GAP), [LATE])
        self.assertEqual(self.lost(), (MAX_GAP, 0, MAX_GAP))

    def test_a_number_far_below_is_a_sender_that_began_again(self) -> None:
        self.place(5000)
        self.assertEqual(self.place(4000), [LATE])
        self.assertEqual(self.place(3999, 4000, 4000), [NEWER, NEWER, REPEATED])

    def test_one_wrong_number_silences_nobody(self) -> None:
        self.place(2**53)
        self.assertEqual(self.place(101, 102, 103), [NEWER] * 3)

    def test_what_is_advanced_is_what_is_placed(self) -> None:
        """The short way of the usual number leaves the same behind as the long one."""
        rng = random.Random(3)
        advanced, placed = BootSequence(b'"a"', 0, 0.0), BootSequence(b'"a"', 0, 0.0)
        number = 0
        for at in range(5000):
            number = max(0, number + rng.choice((1, 1, 1, 1, 1, 1, 1, 2, 3, 70, 0, -1, -2, -5)))
            is_next = advanced.advance(b"%d" % number, at)
            self.assertIs(is_next, number == placed.highest + 1)
            where = placed.place(b'"a"', number, at, LONG_AGO)
            if where is NEWER:
                placed.note_load(number)
            if is_next:
                self.assertIs(where, NEWER)
            else:
                self.assertIs(advanced.place(b'"a"', number, at, LONG_AGO), where)
                if where is NEWER:
                    advanced.note_load(number)
            for name in ("highest", "gap_states", "late_states", "heard_at"):
                self.assertEqual(getattr(advanced, name), getattr(placed, name), name)
            for load in (number - 1, number, number + 1):
                self.assertIs(advanced.is_newer_load(load), placed.is_newer_load(load))

    def test_losses_are_counted_exactly_however_datagrams_are_reordered(self) -> None:
        rng = random.Random(4)
        for _ in range(200):
            sent = list(range(101, 101 + rng.randint(1, 300)))
            arrived = [number for number in sent if rng.random() > 0.1]
            order = sorted(arrived, key=lambda number: number + rng.random() * 20)
            self.setUp()
            self.place(*order)
            expected = 0 if not arrived else max(arrived) - 100 - len(arrived)
            self.assertEqual(self.sequence.lost, expected)


class Boots(unittest.TestCase):
    """A boot never seen before is a restart; one seen earlier waits until the current one is silent."""

    def setUp(self) -> None:
        self.sequence = BootSequence(b'"a"', 100, 0.0)

    def test_a_new_boot_is_a_restart_whatever_its_number(self) -> None:
        self.assertEqual(self.sequence.place(b'"b"', 7, 1.0, LONG_AGO), RESTARTED)
        self.assertEqual(self.sequence.place(b'"b"', 8, 1.0, LONG_AGO), NEWER)
        self.assertEqual(self.sequence.lost, 0)

    def test_an_earlier_boot_is_late_while_the_current_one_is_heard(self) -> None:
        self.sequence.place(b'"b"', 7, 1.0, LONG_AGO)
        for number in (50, 100, 101, 2**53):
            self.assertEqual(self.sequence.place(b'"a"', number, 1.5, 0.9), LATE)
        self.assertEqual((self.sequence.boot, self.sequence.heard_at), (b'"b"', 1.0))

    def test_an_earlier_boot_takes_over_where_it_was_once_the_current_one_is_silent(self) -> None:
        self.sequence.place(b'"b"', 7, 1.0, LONG_AGO)
        self.assertEqual(self.sequence.place(b'"a"', 100, 4.0, 2.0), REPEATED)
        self.assertEqual(self.sequence.place(b'"a"', 102, 4.0, 2.0), NEWER)
        self.assertEqual(self.sequence.lost, 1)
        self.assertEqual(self.sequence.place(b'"b"', 9, 4.1, 2.1), LATE)

    def test_so_many_earlier_boots_are_remembered(self) -> None:
        boots = [b'"%d"' % number for number in range(EARLIER_BOOTS + 2)]
        for boot in boots:
            self.assertEqual(self.sequence.place(boot, 1, 1.0, LONG_AGO), RESTARTED)
        for boot in boots[1:-1]:
            self.assertEqual(self.sequence.place(boot, 2, 1.0, LONG_AGO), LATE)
        self.assertEqual([self.sequence.knows(boot) for boot in boots], [False] + [True] * (EARLIER_BOOTS + 1))
        self.assertEqual(self.sequence.place(boots[0], 2, 1.0, LONG_AGO), RESTARTED)


if __name__ == "__main__":
    unittest.main()
