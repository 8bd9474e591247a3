"""Every counter there is, declared once: its name at /stats, what it counts, and its name at /metrics.

From these tables come the counting, /stats, the last line of the state log, /metrics and the table in docs/engines.md.
To add a counter, add a row, and count it where it happens; to add an outcome of a datagram, add a row, and decide it
in the store.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

from datagram_signature import SIGNATURE_REASONS
from engine_state import REASONS

ACCEPTED = "accepted"
HEARTBEAT = "heartbeat"
DUPLICATE = "duplicate"
OUT_OF_ORDER = "out_of_order"
REJECTED_CAPACITY = "rejected_capacity"
REJECTED_SOURCE = "rejected_source"
REJECTED_SIGNATURE = "rejected_signature"
INVALID = "invalid"
FAREWELL = "farewell"


@dataclass(frozen=True)
class Outcome:
    """What may become of a datagram; each becomes exactly one of them."""

    name: str  # at /metrics
    counter: str | None  # at /stats; None: it is what is left of valid_states
    when: str  # as in docs/engines.md's table, as the next three are
    shown: str  # whether it is shown at /engines
    logged: bool  # whether it is written to the state log
    heard: bool  # whether the engine counts as heard from

    @property
    def is_valid(self) -> bool:
        """Whether it is counted in `valid_states`."""
        return self.heard or self.name == FAREWELL


# In the order in which they are asked.
OUTCOMES = (
    Outcome(REJECTED_SOURCE, "rejected_source", "the sender is not in `ALLOWED_SOURCES`", "no", False, False),
    Outcome(
        REJECTED_SIGNATURE, "rejected_signature",
        "`KEYS_FILE` is set and it is not signed, or may not be taken for its signature; `signature_reasons` says why",
        "no", False, False,
    ),
    Outcome(INVALID, "invalid_states", "it is no valid state; `invalid_reasons` says why", "no", False, False),
    Outcome(
        FAREWELL, "farewells", "its `phase` is `gone`, and it is not late", "the engine is removed at once", True, False
    ),
    Outcome(
        REJECTED_CAPACITY, "rejected_capacity",
        "a new engine, and `MAX_ENGINES` are known, or `ulimit -v` leaves no memory for more", "no", False, False
    ),
    Outcome(
        DUPLICATE, "duplicates",
        "the same again from this live engine: the eight fields, `phase` and further ones, or `boot` and `seq`",
        "unchanged", False, True,
    ),
    Outcome(
        OUT_OF_ORDER, "out_of_order",
        "older than the newest of this live engine: by its `seq`, or by its timestamp, by up to the stale threshold",
        "unchanged", True, True,
    ),
    Outcome(
        HEARTBEAT, "heartbeats", "all five load fields are placeholders", "only if no fresh load state is there",
        True, True,
    ),
    Outcome(ACCEPTED, None, "everything else", "replaces what was there", True, True),
)  # fmt: skip
UNLOGGED = frozenset(outcome.name for outcome in OUTCOMES if not outcome.logged)


@dataclass(frozen=True)
class Counter:
    """One number of /stats besides the outcomes, and how /metrics shows it."""

    path: str  # at /stats, `section.name` or `name`
    family: str  # at /metrics
    help: str
    kind: str = "counter"
    scale: float = 1.0  # from the unit of /stats to the one of /metrics

    @property
    def name(self) -> str:
        """Its name within its section of /stats."""
        return self.path.rpartition(".")[2]


# What the store counts besides outcomes.
ENGINE_COUNTERS = (
    Counter("conflicting_ids", "conflicting_ids", "Engine ids that several senders use now", "gauge"),
    Counter("expired_engines", "engines_expired_total", "Engines removed because they fell silent"),
    Counter("restarts", "restarts_total", "Restarts: a boot never seen before of an engine that is known, or,"
            " without one, a timestamp lower by more than the stale threshold"),
    Counter("sequence_gap_states", "sequence_gap_states_total", "Datagrams that were missing when a later one came"),
    Counter("late_states", "late_states_total", "Datagrams of those that came after all"),
    Counter("ignored_fields", "ignored_fields_datagrams_total", "Datagrams with a field that is not kept"),
)  # fmt: skip
COUNTERS = (
    Counter("uptime_s", "uptime_seconds", "Time since the gateway started", "gauge"),
    Counter("stale_threshold_ms", "stale_threshold_seconds", "Silence after which an engine is stale", "gauge", 1e-3),
    *ENGINE_COUNTERS,
    Counter("last_received", "last_received_timestamp_seconds",
            "When a datagram was last received, since the epoch", "gauge"),
    Counter("receive_buffer_bytes", "receive_buffer_bytes", "Kernel receive buffer that was granted", "gauge"),
    Counter("kernel_dropped", "kernel_dropped_datagrams_total", "Datagrams the kernel dropped, its buffer being full"),
    Counter("log.enabled", "log_enabled", "1 if the state log is written", "gauge"),
    Counter("log.written", "log_states_written_total", "States written to the state log"),
    Counter("log.dropped", "log_states_dropped_total", "States that the state log had no room for"),
    Counter("log.errors", "log_errors_total", "Attempts to write the state log that failed"),
    Counter("log.rotations", "log_rotations_total", "Rotations of the state log"),
    Counter("http.connections", "http_connections", "Open connections to the query interface", "gauge"),
    Counter("http.requests", "http_requests_total", "Requests answered by the query interface"),
    Counter("http.unauthorized", "http_unauthorized_requests_total", "Requests without a token that may read"),
    Counter("http.closed_idle", "http_closed_idle_connections_total",
            "Connections that asked nothing, closed to make room"),
    Counter("http.rejected_connections", "http_rejected_connections_total",
            "Connections turned away or cut off at a limit"),
    Counter("watch.readers", "watch_readers", "Readers of /watch", "gauge"),
    Counter("watch.events", "watch_events_total", "Events sent to the readers of /watch"),
    Counter("watch.merged_events", "watch_merged_events_total",
            "Events not sent, a newer one of the same engine taking their place"),
    Counter("watch.rejected_readers", "watch_rejected_readers_total",
            "Readers of /watch turned away because there are too many"),
    Counter("held_up_ms", "held_up_seconds_total",
            "Time in which the gateway did not run: stopped, its machine moved, or without CPU", scale=1e-3),
    Counter("own_log_dropped", "own_log_lines_dropped_total",
            "Lines of the daemon's own log that stderr did not take"),
)  # fmt: skip

# What the last line of the state log says.
FINAL_COUNTERS = (
    "uptime_s",
    "total_engines",
    "total_received",
    "valid_states",
    *(outcome.counter for outcome in OUTCOMES if outcome.counter is not None),
    *(counter.name for counter in ENGINE_COUNTERS),
    "lost_states",
    "invalid_reasons",
    "signature_reasons",
    "kernel_dropped",
)


def section(name: str, owner: object) -> dict[str, Any]:
    """A section of /stats: the counters that `owner` has, by their names; 0 each if there is no owner."""
    names = [counter.name for counter in COUNTERS if counter.path == f"{name}.{counter.name}"]
    if owner is None:
        return dict.fromkeys(names, 0)
    return {name: getattr(owner, name) for name in names if hasattr(owner, name)}


class DatagramCounters:
    """What became of every datagram. `total_received` is always the sum of the outcomes.

    Not locked: it belongs to the store, and is used under its lock.
    """

    def __init__(self) -> None:
        self._outcomes = {outcome.name: 0 for outcome in OUTCOMES}
        self._rare = tuple(
            name for name in self._outcomes if name not in (ACCEPTED, INVALID, REJECTED_SOURCE, REJECTED_SIGNATURE)
        )
        self._invalid = dict.fromkeys(REASONS, 0)
        self._signature = dict.fromkeys(SIGNATURE_REASONS, 0)
        self._engines = {counter.name: 0 for counter in ENGINE_COUNTERS}
        self._last_received_s: float | None = None  # since the epoch

    def count(self, received_s: float, outcomes: Sequence[str], invalid: Iterable[str], rejected_source: int) -> None:
        """Count a batch: the outcomes of its valid states, and the reasons of the invalid datagrams."""
        counts = self._outcomes
        accepted = outcomes.count(ACCEPTED)
        counts[ACCEPTED] += accepted
        if accepted < len(outcomes):  # looking for what is hardly ever there takes a tenth of a microsecond a state
            for name in self._rare:
                counts[name] += outcomes.count(name)
        counts[REJECTED_SOURCE] += rejected_source
        for reason in invalid:
            self._invalid[reason] += 1
            counts[INVALID] += 1
        self._last_received_s = received_s

    def count_signed(self, outcomes: Iterable[str], copies: int, rejected: Iterable[str]) -> None:
        """Count what only keys bring about in a batch: states of earlier boots, copies, and reasons of rejections."""
        counts = self._outcomes
        for outcome in outcomes:
            counts[outcome] += 1
        counts[DUPLICATE] += copies
        for reason in rejected:
            self._signature[reason] += 1
            counts[REJECTED_SIGNATURE] += 1

    def add(self, name: str, count: int = 1) -> None:
        """Count something of ENGINE_COUNTERS."""
        self._engines[name] += count

    def document(self) -> dict[str, Any]:
        """The part of /stats that these counters are, and `accepted`; a copy of this moment."""
        counts = self._outcomes
        received = sum(counts.values())
        valid = sum(counts[outcome.name] for outcome in OUTCOMES if outcome.is_valid)
        return {
            "accepted": counts[ACCEPTED],
            "total_received": received,
            "valid_states": valid,
            "valid_rate": valid / received if received else 0.0,
            **{outcome.counter: counts[outcome.name] for outcome in OUTCOMES if outcome.counter is not None},
            **self._engines,
            "lost_states": self._engines["sequence_gap_states"] - self._engines["late_states"],
            "invalid_reasons": self._invalid.copy(),
            "signature_reasons": self._signature.copy(),
            "last_received": self._last_received_s,
        }
