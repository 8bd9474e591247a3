"""What the table shows of an engine: as plain values that readers share, and as a view of one moment."""

from __future__ import annotations

import json
from typing import Any, NamedTuple

from engine_state import SERVING, EngineState, unquote_json
from staleness import LIVE, STALE, UNAVAILABLE
from state_record import Record, decode_state, received_ms, timestamp_ms

# What the newest datagram taken says besides its state, and what became of the others: `phase` as JSON text or None,
# the further fields as `, "name": value` each, restarts, datagrams lost (None without `seq`), and until when several
# senders count as using the engine_id (monotonic s). A plain tuple, because one is made for each datagram.
About = tuple[bytes | None, bytes, int, int | None, float]
NOTHING: About = (None, b"", 0, None, float("-inf"))

# What the table shows of an engine: the record of a state, whether that is a heartbeat, when it was received
# (monotonic s), its source as JSON text, and the rest. Replaced as a whole and never changed, so that readers need no
# lock to see it whole.
Visible = tuple[Record, bool, float, bytes, About]

# One engine as plain values: engine_id, the same as JSON text, what is shown, and when it was last heard from
# (monotonic s), which is never earlier than the receipt of the state shown.
Row = tuple[str, bytes, Visible, float]


def status_of(live: bool, phase: bytes | None) -> str:
    """LIVE, STALE, or UNAVAILABLE: heard from, and not serving by its own account."""
    if not live:
        return STALE
    return LIVE if phase is None or phase == SERVING else UNAVAILABLE


class EngineView(NamedTuple):
    """One engine as a reader sees it, at the moment that the reader looked."""

    engine_id: str
    status: str  # LIVE, UNAVAILABLE or STALE
    age_ms: int  # since the engine was last heard from
    state_age_ms: int  # since the state shown was received
    visible: Visible
    conflict: bool  # whether several senders use the engine_id now

    @property
    def state(self) -> EngineState:
        """The state shown, made at each call."""
        return decode_state(self.engine_id, self.visible[0])

    @property
    def heartbeat(self) -> bool:
        """Whether the state shown is one."""
        return self.visible[1]

    @property
    def load_known(self) -> bool:
        """Whether the state shown says something of load."""
        return not self.visible[1]

    @property
    def usable(self) -> bool:
        """Whether it is safe to send requests by these numbers."""
        return self.status == LIVE and not self.visible[1]

    @property
    def received_ms(self) -> int:
        """When the state shown was received, in ms since the epoch."""
        return received_ms(self.visible[0])

    @property
    def source(self) -> str:
        """Where the state shown came from, as `<ip>:<port>`."""
        return unquote_json(self.visible[3])

    @property
    def clock_offset_ms(self) -> int:
        """Receipt minus the engine's own timestamp: how far its clock is off, plus the way here."""
        return received_ms(self.visible[0]) - timestamp_ms(self.visible[0])

    @property
    def phase(self) -> str | None:
        """What the engine is up to by its newest datagram, None if that does not say."""
        phase = self.visible[4][0]
        return None if phase is None else unquote_json(phase)

    @property
    def extra(self) -> dict[str, Any]:
        """The further fields of the newest datagram."""
        fields: dict[str, Any] = json.loads(b"{%b}" % self.visible[4][1][2:])
        return fields

    @property
    def restarts(self) -> int:
        """How often the engine restarted."""
        return self.visible[4][2]

    @property
    def lost(self) -> int | None:
        """How many datagrams of it did not arrive; None if it does not number them."""
        return self.visible[4][3]


class PastState(NamedTuple):
    """A state that was shown for an engine, and when it was received, in ms since the epoch."""

    state: EngineState
    received_ms: int
