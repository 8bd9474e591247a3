"""Prometheus' text format (0.0.4) of the counters and of every engine.

To add a counter, add it where it is counted, to `StateGateway.get_stats`, and here.
"""

from __future__ import annotations

import contextlib
import resource
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from engine_state import decode_record, mode_of
from state_store import LIVE, STALE, EngineView

PREFIX = "elrar_state_gateway_"
CONTENT_TYPE = "text/plain; version=0.0.4; charset=utf-8"

Labels = dict[str, str]

_ESCAPES = str.maketrans({"\\": "\\\\", '"': '\\"', "\n": "\\n"})


def _label(name: str, value: str) -> str:
    return f'{name}="{value.translate(_ESCAPES)}"'


def _labels(labels: Labels) -> str:
    inside = ",".join(_label(name, value) for name, value in labels.items())
    return f"{{{inside}}}" if inside else ""


def _family(
    name: str, kind: str, meaning: str, samples: Iterable[tuple[Labels, float]], *, prefix: str = PREFIX
) -> str:
    name = prefix + name
    return _page(name, kind, meaning, [f"{name}{_labels(labels)} {+value!r}" for labels, value in samples])


def _page(name: str, kind: str, meaning: str, lines: list[str]) -> str:
    return "\n".join((f"# HELP {name} {meaning}", f"# TYPE {name} {kind}", *lines, ""))


def _counter(name: str, meaning: str, value: float) -> str:
    return _family(name, "counter", meaning, [({}, value)])


def _gauge(name: str, meaning: str, value: float) -> str:
    return _family(name, "gauge", meaning, [({}, value)])


# One series an engine and field, in the order of `_values`; durations in seconds, as Prometheus wants its base units.
_ENGINE_FAMILIES = (
    ("engine_live", "1 while the engine was heard from within the stale threshold, 0 while it is stale"),
    ("engine_heartbeat", "1 where the state shown is a heartbeat, whose load fields say nothing"),
    ("engine_age_seconds", "Time since the engine was last heard from"),
    ("engine_state_age_seconds", "Time since the state shown was received"),
    ("engine_clock_offset_seconds", "Receipt minus the engine's own timestamp: the error of its clock"),
    ("engine_timestamp_seconds", "Timestamp of the state shown, by the engine's clock, since the epoch"),
    ("engine_latency_pred_seconds", "Predicted latency of the next scheduling step"),
    ("engine_pending_tokens", "Tokens waiting"),
    ("engine_kv_cache_free_blocks", "Free KV-cache blocks, -1 = unknown"),
    ("engine_kv_cache_total_blocks", "KV-cache blocks, -1 = unknown"),
    ("engine_capacity_tokens_per_second", "Capacity, 0 = unknown"),
)


def _values(view: EngineView) -> tuple[float | str, ...]:
    """The values of an engine's series. A number in JSON is one in this format too, which spares making it."""
    timestamp, latency, _, pending, free, total, capacity, received = decode_record(view.visible[0])
    timestamp_ms = int(timestamp)
    return (
        int(view.status == LIVE),
        int(view.heartbeat),
        view.age_ms / 1000,
        view.state_age_ms / 1000,
        (int(received) - timestamp_ms) / 1000,
        timestamp_ms / 1000,
        float(latency) / 1000,
        pending.decode(),
        free.decode(),
        total.decode(),
        capacity.decode(),
    )


def engine_metrics(views: list[EngineView]) -> bytes:
    """One series an engine and field, for the engines that are known now.

    Encoded family by family, because one string of all takes four bytes a character where a single name needs them.
    """
    ids = [_label("engine_id", view.engine_id) for view in views]
    columns = zip(*map(_values, views), strict=True) if views else [()] * len(_ENGINE_FAMILIES)
    parts = []
    for (family, meaning), column in zip(_ENGINE_FAMILIES, columns, strict=True):
        name = PREFIX + family
        lines = [f"{name}{{{id_}}} {value}" for id_, value in zip(ids, column, strict=True)]
        parts.append(_page(name, "gauge", meaning, lines).encode())
    name = PREFIX + "engine_scheduling_mode_info"
    modes = (_label("scheduling_mode", mode_of(view.visible[0])) for view in views)
    lines = [f"{name}{{{id_},{mode}}} 1" for id_, mode in zip(ids, modes, strict=True)]
    parts.append(_page(name, "gauge", "The engine's scheduling mode, as a label", lines).encode())
    return b"".join(parts)


def _process_metrics() -> list[str]:
    """What the process takes, by the names that Prometheus' own client libraries use."""
    used = resource.getrusage(resource.RUSAGE_SELF)
    cpu_s = used.ru_utime + used.ru_stime
    parts = [_family("cpu_seconds_total", "counter", "CPU time, user and system", [({}, cpu_s)], prefix="process_")]
    with contextlib.suppress(OSError, ValueError, IndexError):  # Linux only
        resident = int(Path("/proc/self/statm").read_text().split()[1]) * resource.getpagesize()
        parts.append(_family("resident_memory_bytes", "gauge", "Resident memory", [({}, resident)], prefix="process_"))
    return parts


def gateway_metrics(stats: dict[str, Any]) -> bytes:
    """The gateway's own counters and settings, from the same numbers as /stats."""
    live, total = stats["active_engines"], stats["total_engines"]
    outcomes = {
        "accepted": stats["valid_states"] - stats["heartbeats"] - stats["duplicates"] - stats["out_of_order"],
        "heartbeat": stats["heartbeats"],
        "duplicate": stats["duplicates"],
        "out_of_order": stats["out_of_order"],
        "invalid": stats["invalid_states"],
        "rejected_capacity": stats["rejected_capacity"],
        "rejected_source": stats["rejected_source"],
    }
    log, http, watch = stats["log"], stats["http"], stats["watch"]
    info = {name: str(stats[name]) for name in ("version", "network_mode", "bind_address", "udp_port")}
    info["gateway_instance"] = stats["instance"]  # Prometheus has an `instance` of its own
    parts = [
        _family("info", "gauge", "What runs, as labels", [(info, 1)]),
        _gauge("uptime_seconds", "Time since the gateway started", stats["uptime_s"]),
        _gauge("stale_threshold_seconds", "Silence after which an engine is stale", stats["stale_threshold_ms"] / 1000),
        _family("engines", "gauge", "Engines known, by status",
                [({"status": LIVE}, live), ({"status": STALE}, total - live)]),
        _family("datagrams_total", "counter", "Datagrams received, by what was made of them",
                [({"outcome": outcome}, count) for outcome, count in outcomes.items()]),
        _family("datagrams_received_total", "counter", "Datagrams received, by network mode",
                [({"network_mode": mode}, stats[f"{mode}_received"]) for mode in ("unicast", "broadcast")]),
        _family("datagrams_invalid_total", "counter", "Datagrams rejected as invalid, by reason",
                [({"reason": reason}, count) for reason, count in stats["invalid_reasons"].items()]),
        _counter("engines_expired_total", "Engines removed because they fell silent", stats["expired_engines"]),
        _gauge("receive_buffer_bytes", "Kernel receive buffer that was granted", stats["receive_buffer_bytes"]),
        _gauge("log_enabled", "1 where the state log is written", log["enabled"]),
        _counter("log_states_written_total", "States written to the state log", log["written"]),
        _counter("log_states_dropped_total", "States that the state log had no room for", log["dropped"]),
        _counter("log_errors_total", "Attempts to write the state log that failed", log["errors"]),
        _counter("log_rotations_total", "Rotations of the state log", log["rotations"]),
        _gauge("http_connections", "Open connections to the query interface", http["connections"]),
        _counter("http_requests_total", "Requests answered by the query interface", http["requests"]),
        _counter("http_rejected_connections_total", "Connections turned away or cut off at a limit",
                 http["rejected_connections"]),
        _gauge("watch_readers", "Readers of /watch", watch["readers"]),
        _counter("watch_events_total", "Events sent to the readers of /watch", watch["events"]),
        _counter("watch_merged_events_total", "Events not sent, a newer one of the same engine taking their place",
                 watch["merged_events"]),
        _counter("watch_rejected_readers_total", "Readers of /watch turned away because there are too many",
                 watch["rejected_readers"]),
        _counter("own_log_lines_dropped_total", "Lines of the daemon's own log that stderr did not take",
                 stats["own_log_dropped"]),
    ]  # fmt: skip
    parts += _process_metrics()
    if stats["kernel_dropped"] is not None:
        parts.append(_counter("kernel_dropped_datagrams_total", "Datagrams the kernel dropped, its buffer being full",
                              stats["kernel_dropped"]))  # fmt: skip
    if stats["last_received"] is not None:
        parts.append(_gauge("last_received_timestamp_seconds", "When a datagram was last received, since the epoch",
                            stats["last_received"]))  # fmt: skip
    return "".join(parts).encode()
