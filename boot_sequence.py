"""The order of one engine's datagrams by `boot` and `seq`, which leans on no clock, and what was lost on the way.

Theory of operation. A sender numbers its datagrams, and begins a new `boot` whenever it starts. Within a boot a number
above the highest taken is newer; any other is late, or a repetition. The last WINDOW numbers are remembered as bits, so
that a repetition is told from a late one, and so that a late one is taken off what was counted as lost, once. What lies
between the highest number and a newer one is lost until it comes; before the first number that was heard of a boot, and
in a gap of more than MAX_GAP, nothing is counted: the gateway was not there, or the number is nonsense.

A boot never seen before is a restart. While the current boot was heard from within the threshold, datagrams of a boot
seen earlier are late, whatever their number: they were under way, or two senders use one engine_id. After that silence
an earlier boot takes over again, where it was. EARLIER_BOOTS of them are remembered.
"""

from __future__ import annotations

from typing import NamedTuple

WINDOW = 64
MAX_GAP = 1000  # numbers; above it a gap is not counted, and a number so far below the highest begins again
EARLIER_BOOTS = 4
_ALL_TAKEN = (1 << WINDOW) - 1

# Where a datagram stands.
NEWER = "newer"
RESTARTED = "restarted"  # newer, and of a boot never seen before
REPEATED = "repeated"  # taken before
LATE = "late"


class _Life(NamedTuple):
    """What is remembered of an earlier boot."""

    boot: bytes
    highest: int
    taken: int
    first: int
    load_seq: int


class BootSequence:
    """The numbers of one engine's sender. Not locked: it belongs to one engine of the table."""

    __slots__ = (
        "_counted", "_earlier", "_first", "_load_seq", "_noted", "_taken",
        "boot", "gap_states", "heard_at", "highest", "late_states",
    )  # fmt: skip

    def __init__(self, boot: bytes, seq: int, now: float) -> None:
        self.boot = boot  # the current one
        self.highest = seq  # the highest number taken of it
        self.heard_at = now  # when the current boot was heard from, monotonic s
        self._load_seq = -1  # the highest number that was no heartbeat, as of `_noted`
        self._taken = 1  # bit n: the number `_noted - n` was taken
        self._noted = seq  # from here to `highest` all were taken, and were load states
        self._first = seq  # numbers below it were never counted as lost
        self._earlier: list[_Life] = []  # the latest at the end
        self.gap_states = 0  # numbers that were passed over
        self.late_states = 0  # those of them that came after all
        self._counted = (0, 0)  # what `uncounted_losses` told already

    @property
    def lost(self) -> int:
        """Datagrams that did not arrive."""
        return self.gap_states - self.late_states

    def uncounted_losses(self) -> tuple[int, int]:
        """How many numbers were passed over, and how many of them came after all, since the last call."""
        gap_states, late_states = self._counted
        self._counted = self.gap_states, self.late_states
        return self.gap_states - gap_states, self.late_states - late_states

    def advance(self, seq_text: bytes, now: float) -> bool:
        """Take the number of a load state of the current boot if it is the next one; returns whether it is.

        That is what nearly all are, so that the bits are noted when they are needed next.
        """
        seq = self.highest + 1
        if int(seq_text) != seq:
            return False
        self.highest = seq
        self.heard_at = now
        return True

    def _note(self) -> None:
        """Note what was only advanced."""
        steps = self.highest - self._noted
        if steps:
            fresh = (1 << min(steps, WINDOW)) - 1
            self._taken = (self._taken << min(steps, WINDOW) | fresh) & _ALL_TAKEN
            self._noted = self._load_seq = self.highest

    def note_load(self, seq: int) -> None:
        """Note that a number that was taken is the one of a load state."""
        self._note()
        self._load_seq = max(self._load_seq, seq)

    def is_newer_load(self, seq: int) -> bool:
        """Whether no load state with this number or a higher one was taken."""
        self._note()
        return seq > self._load_seq

    def place(self, boot: bytes, seq: int, now: float, live_since: float) -> str:
        """Take a number; returns where its datagram stands.

        A boot that was heard from after `live_since` is not replaced by an earlier one. Both in s, monotonic.
        """
        self._note()
        if boot != self.boot:
            for life in self._earlier:
                if life.boot == boot:
                    if self.heard_at > live_since:
                        return LATE
                    self._return_to(life)
                    break
            else:
                self._begin(boot, seq, now)
                return RESTARTED
        self.heard_at = now
        step = seq - self.highest
        if step > 0:
            if step > MAX_GAP + 1:
                self._taken, self._first = 1, seq
            else:
                self._taken = (self._taken << step | 1) & _ALL_TAKEN
                self.gap_states += step - 1
            self.highest = self._noted = seq
            return NEWER
        if step < -MAX_GAP:
            self._restore(_Life(boot, seq, 1, seq, -1))
            return NEWER
        if step <= -WINDOW:
            return LATE
        bit = 1 << -step
        if self._taken & bit:
            return REPEATED
        self._taken |= bit
        if seq > self._first:
            self.late_states += 1
        return LATE

    def knows(self, boot: bytes) -> bool:
        """Whether it is the current boot, or one that is remembered."""
        return boot == self.boot or any(life.boot == boot for life in self._earlier)

    def follow(self, before: BootSequence) -> None:
        """Know the boots of what the engine was before its farewell as earlier ones."""
        before._note()
        self._earlier = [life for life in (*before._earlier, before._life()) if life.boot != self.boot][-EARLIER_BOOTS:]

    def _life(self) -> _Life:
        return _Life(self.boot, self.highest, self._taken, self._first, self._load_seq)

    def _remember(self) -> None:
        self._earlier.append(self._life())
        del self._earlier[:-EARLIER_BOOTS]

    def _restore(self, life: _Life) -> None:
        self.boot, self.highest, self._taken, self._first, self._load_seq = life
        self._noted = self.highest

    def _begin(self, boot: bytes, seq: int, now: float) -> None:
        self._remember()
        self._restore(_Life(boot, seq, 1, seq, -1))
        self.heard_at = now

    def _return_to(self, life: _Life) -> None:
        self._earlier.remove(life)
        self._remember()
        self._restore(life)
