"""One engine of the table: what was heard from it, how its next datagram stands to that, and who sends for it."""

from __future__ import annotations

from boot_sequence import LATE, NEWER, REPEATED, RESTARTED, BootSequence
from engine_state import BOOT, EXTRA, GONE, NOTHING_FURTHER, PHASE, SEQ, SERVING, DatagramTexts, unquote_json
from engine_view import NOTHING, About, Visible
from staleness import Freshness
from state_record import History, Record, same_state, timestamp_ms

# A, B, A, B: so many changes of sender, each within the stale threshold of the one before, are a conflict.
CONFLICT_CHANGES = 3


def _kept_phase(phase: bytes | None) -> bytes | None:
    """A phase that most engines have is one object for all of them."""
    return SERVING if phase == SERVING else phase


class _SenderChanges:
    """How often the sender of an engine changed of late. Most engines have one sender for all their life, and none."""

    __slots__ = ("_at", "_in_a_row")

    def __init__(self) -> None:
        self._in_a_row = 0  # each within the stale threshold of the one before
        self._at = float("-inf")  # of the last one, monotonic s

    def conflict(self, now: float, freshness: Freshness) -> bool:
        """Note one more; returns whether several senders take turns."""
        self._in_a_row = self._in_a_row + 1 if self._at > freshness.live_since(now) else 1
        self._at = now
        return self._in_a_row >= CONFLICT_CHANGES


class KnownEngine:
    """What is held of one engine. Written under the store's lock only.

    With 10,000 engines intake finds each one's objects out of the processor's cache. So an engine has few of them: what
    is the same for most engines is one object for all, and what few engines need is made when it is needed.
    """

    __slots__ = (
        "_sender",
        "_sender_changes",
        "engine_id",
        "heard_at",
        "history",
        "last",
        "last_further",
        "load",
        "newest",
        "plain_source",
        "quoted_id",
        "sequence",
        "source",
        "stale_logged",
        "steady_boot",
        "visible",
    )

    def __init__(self, texts: DatagramTexts, visible: Visible) -> None:
        """The engine appears with a datagram, which shows `visible`, and what it says besides."""
        record, heartbeat, now, source, _ = visible
        self.quoted_id: bytes = texts[0]
        self.engine_id = unquote_json(self.quoted_id)
        self.heard_at = now  # when the last datagram was taken from it, monotonic s
        self.visible = visible
        self.history = History()
        self.stale_logged = False
        # Order by timestamp_ms.
        self.newest = record  # the datagram with the newest one since it last restarted
        self.last = record  # the last datagram taken
        self.load = None if heartbeat else record  # the newest load state since it last restarted or came back
        # Order by seq, and all that datagrams of the first edition do not have.
        self.last_further: tuple[bytes | None, bytes | None] = NOTHING_FURTHER[2:]  # of the last datagram taken
        self.sequence: BootSequence | None = None
        # Who sends for it: a boot, or a source.
        self.source = source  # the last one that was heard
        self.plain_source: bytes | None = source  # the same, None once a datagram had more than the fields
        self.steady_boot: bytes | None = None  # the current boot, if the last datagram was of it
        self._sender = source
        self._sender_changes: _SenderChanges | None = None
        if texts[EXTRA] is not None:
            self._appear_with_further(texts, heartbeat, now)

    def _appear_with_further(self, texts: DatagramTexts, heartbeat: bool, now: float) -> None:
        boot = texts[BOOT]
        if boot is not None:
            seq = int(texts[SEQ])
            self.sequence = BootSequence(boot, seq, now)
            if not heartbeat:
                self.sequence.note_load(seq)
            self.steady_boot = self._sender = boot
        self.note_further(texts)
        self.show_about(self.about(texts))

    @property
    def has_further(self) -> bool:
        """Whether a datagram ever had more than the fields."""
        return self.plain_source is None

    @property
    def is_serving(self) -> bool:
        """Whether it takes requests by its own account; one that says nothing does."""
        phase = self.visible[4][0]
        return phase is None or phase == SERVING

    def about(self, texts: DatagramTexts) -> About:
        """What is to be shown besides the state once this datagram is the newest."""
        _, _, restarts, _, conflict_until = self.visible[4]
        lost = None if self.sequence is None else self.sequence.lost
        about = _kept_phase(texts[PHASE]), texts[EXTRA] or b"", restarts, lost, conflict_until
        return NOTHING if about == NOTHING else about

    def show_about(self, about: About) -> None:
        """Show something else besides the state."""
        self.visible = (*self.visible[:4], about)

    def note_restart(self) -> None:
        """Count a restart."""
        phase, extra, restarts, lost, conflict_until = self.visible[4]
        self.show_about((phase, extra, restarts + 1, lost, conflict_until))

    def note_further(self, texts: DatagramTexts) -> None:
        """Note the phase and the further fields of the last datagram taken."""
        if texts[EXTRA] is not None:
            self.plain_source = None
            self.last_further = _kept_phase(texts[PHASE]), texts[EXTRA]
        elif self.has_further:
            self.last_further = NOTHING_FURTHER[2:]

    # -- order -------------------------------------------------------------------------------------------------------

    def advance(self, texts: DatagramTexts, now: float) -> About | None:
        """Take a load state with a newer timestamp and the next number of the current boot: an agent's usual one.

        Returns what is to be shown besides it; None, and nothing is taken, if it is any other: `place` is for those.
        """
        boot, seq_text, phase, extra = texts[BOOT:]
        sequence = self.sequence
        if (
            sequence is None
            or boot != self.steady_boot
            or boot is None
            or phase == GONE
            or not sequence.advance(seq_text, now)
        ):
            return None
        about = self.visible[4]
        was_phase, was_extra, restarts, lost, conflict_until = about
        if phase == was_phase and extra == was_extra:
            return about
        return _kept_phase(phase), extra, restarts, lost, conflict_until

    def place(self, texts: DatagramTexts, record: Record, now: float, freshness: Freshness) -> str:
        """Where a datagram stands to those that were taken, and take its number; NEWER, RESTARTED, REPEATED or LATE."""
        boot = texts[BOOT]
        if boot is None:
            return self._place_by_time(texts, record, now, freshness)
        seq = int(texts[SEQ])
        if self.sequence is not None:
            return self.sequence.place(boot, seq, now, freshness.live_since(now))
        self.sequence = BootSequence(boot, seq, now)
        return RESTARTED

    def _place_by_time(self, texts: DatagramTexts, record: Record, now: float, freshness: Freshness) -> str:
        behind_ms = timestamp_ms(self.newest) - timestamp_ms(record)
        if self.heard_at <= freshness.live_since(now):
            self.load = None  # what was heard before the silence does not count for order
            return RESTARTED if behind_ms > freshness.stale_ms else NEWER
        if behind_ms < 0:
            return NEWER
        if self.sequence is None and self.last_further == texts[PHASE : EXTRA + 1] and same_state(record, self.last):
            return REPEATED
        if behind_ms > freshness.stale_ms:  # it restarted, or its clock was set
            self.load = None
            return RESTARTED
        return LATE if behind_ms else NEWER

    def uncounted_losses(self) -> tuple[int, int]:
        """The gaps in the numbers, and the late ones that filled some, since the last call."""
        return (0, 0) if self.sequence is None else self.sequence.uncounted_losses()

    def is_newer_load(self, texts: DatagramTexts, record: Record) -> bool:
        """Whether a late load state is newer than any other: only heartbeats overtook it."""
        sequence = self.sequence
        if texts[BOOT] is None or sequence is None:
            return self.load is None or timestamp_ms(self.load) < timestamp_ms(record)
        return bool(texts[BOOT] == sequence.boot) and sequence.is_newer_load(int(texts[SEQ]))

    def note_load(self, texts: DatagramTexts, record: Record) -> None:
        """Note that this is the newest load state."""
        self.load = record
        if texts[BOOT] is not None and self.sequence is not None:
            self.sequence.note_load(int(texts[SEQ]))

    # -- who sends ---------------------------------------------------------------------------------------------------

    def note_sender(self, sender: bytes, now: float, freshness: Freshness) -> bool:
        """Note who sent a datagram; returns whether several senders use this engine_id, as of this datagram."""
        self.steady_boot = sender if self.sequence is not None and sender == self.sequence.boot else None
        if sender == self._sender:
            return False
        self._sender = sender
        if self._sender_changes is None:
            self._sender_changes = _SenderChanges()
        if not self._sender_changes.conflict(now, freshness):
            return False
        phase, extra, restarts, lost, _ = self.visible[4]
        self.show_about((phase, extra, restarts, lost, freshness.stale_at(now)))
        return True
