"""Prometheus' text format (0.0.4) of the counters and of every engine.

What there is comes from the tables: `gateway_counters` for the gateway's own numbers, `engine_state.FIELDS` for what an
engine says.
"""

from __future__ import annotations

import contextlib
import resource
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

from config import MODES
from engine_state import FIELDS, Field
from engine_view import NOTHING, EngineView
from gateway_counters import ACCEPTED, COUNTERS, OUTCOMES
from staleness import STALE, STATUSES
from state_record import decode_record

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


# What the gateway says of an engine, one series an engine each; durations in seconds, Prometheus' base unit.
_ABOUT_ENGINES: tuple[tuple[str, str, Callable[[EngineView], float]], ...] = (
    (
        "engine_live",
        "1 while the engine was heard from within the stale threshold, 0 while it is stale",
        lambda view: int(view.status != STALE),
    ),
    (
        "engine_usable",
        "1 while the engine is live, takes requests, and its load is known",
        lambda view: int(view.usable),
    ),
    ("engine_restarts_total", "Restarts that were noticed", lambda view: view.restarts),
    (
        "engine_heartbeat",
        "1 if the state shown is a heartbeat, whose load fields say nothing",
        lambda view: int(view.heartbeat),
    ),
    ("engine_age_seconds", "Time since the engine was last heard from", lambda view: view.age_ms / 1000),
    ("engine_state_age_seconds", "Time since the state shown was received", lambda view: view.state_age_ms / 1000),
    (
        "engine_clock_offset_seconds",
        "Receipt minus the engine's own timestamp: the error of its clock",
        lambda view: view.clock_offset_ms / 1000,
    ),
)
_SHOWN_FIELDS = tuple((at - 1, field) for at, field in enumerate(FIELDS) if field.metric is not None)


def _samples(field: Field, ids: list[str], texts: Sequence[bytes]) -> list[str]:
    """The lines of a field, given its JSON text for each engine."""
    metric = field.metric
    assert metric is not None
    name = PREFIX + metric.family
    if metric.info:
        labels = {text: _label(field.name, str(field.decode(text))) for text in set(texts)}
        return [f"{name}{{{id_},{labels[text]}}} 1" for id_, text in zip(ids, texts, strict=True)]
    if metric.scale == 1:  # a number in JSON is one in this format too, which spares making it
        return [f"{name}{{{id_}}} {text.decode()}" for id_, text in zip(ids, texts, strict=True)]
    divisor = round(1 / metric.scale)
    return [f"{name}{{{id_}}} {float(text) / divisor!r}" for id_, text in zip(ids, texts, strict=True)]


def engine_metrics(views: list[EngineView]) -> bytes:
    """One series an engine and field, for the engines that are known now.

    Encoded family by family, because one string of all takes four bytes a character if a single name needs them.
    """
    ids = [_label("engine_id", view.engine_id) for view in views]
    parts = []
    for family, meaning, value in _ABOUT_ENGINES:
        name = PREFIX + family
        lines = [f"{name}{{{id_}}} {value(view)}" for id_, view in zip(ids, views, strict=True)]
        kind = "counter" if family.endswith("_total") else "gauge"
        parts.append(_page(name, kind, meaning, lines).encode())
    columns = list(zip(*(decode_record(view.visible[0]) for view in views), strict=True))
    for at, field in _SHOWN_FIELDS:
        assert field.metric is not None
        lines = _samples(field, ids, columns[at] if columns else ())
        parts.append(_page(PREFIX + field.metric.family, "gauge", field.metric.help, lines).encode())
    parts += _further(ids, views)
    return b"".join(parts)


_FURTHER_NUMBERS = (
    ("engine_requests_running", "Requests that run", "num_requests_running"),
    ("engine_requests_waiting", "Requests that wait", "num_requests_waiting"),
)
_INFO_LABELS = ("model", "role")


def _further(ids: list[str], views: list[EngineView]) -> list[bytes]:
    """What agents say besides the fields; no series of an engine that does not say it."""
    further = [(id_, view, view.extra) for id_, view in zip(ids, views, strict=True) if view.visible[4] != NOTHING]
    parts: list[tuple[str, str, list[str]]] = []
    for family, meaning, field in _FURTHER_NUMBERS:
        numbers = [(id_, extra.get(field)) for id_, _, extra in further]
        lines = [f"{PREFIX}{family}{{{id_}}} {number!r}" for id_, number in numbers if type(number) in (int, float)]
        parts.append((PREFIX + family, meaning, lines))
    name = PREFIX + "engine_lost_states"
    lines = [f"{name}{{{id_}}} {view.lost}" for id_, view, _ in further if view.lost is not None]
    parts.append((name, "Datagrams of the engine that did not arrive: a late one is taken off again", lines))
    name = PREFIX + "engine_info"
    lines = []
    for id_, view, extra in further:
        said = {"phase": view.phase, **{label: extra.get(label) for label in _INFO_LABELS}}
        labels = "".join(f",{_label(label, text)}" for label, text in said.items() if type(text) is str)
        if labels:
            lines.append(f"{name}{{{id_}{labels}}} 1")
    parts.append((name, "What the engine says that it is, as labels", lines))
    return [_page(name, "gauge", meaning, lines).encode() for name, meaning, lines in parts if lines]


def _fleet_sums(sums: dict[str, dict[str, float]]) -> list[str]:
    """The sums of `fleet`, by the names of the engines' own metrics, and how many engines are behind each."""
    summed = [(field, field.metric) for field in FIELDS if field.summed]
    parts = [
        _gauge(
            metric.family.replace("engine", "fleet", 1),
            f"{metric.help.partition(',')[0]}: the sum over usable engines that know it",
            sums[field.name]["sum"] * metric.scale,
        )
        for field, metric in summed
        if metric is not None
    ]
    known = [({"field": field.name}, sums[field.name]["engines"]) for field, _ in summed]
    return [*parts, _family("fleet_known_engines", "gauge", "Engines behind the sum of a field", known)]


def _gauge(name: str, meaning: str, value: float) -> str:
    return _family(name, "gauge", meaning, [({}, value)])


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
    fleet = stats["fleet"]
    outcomes = {outcome.name: stats[outcome.counter] for outcome in OUTCOMES if outcome.counter is not None}
    outcomes[ACCEPTED] = stats["valid_states"] - sum(
        stats[outcome.counter] for outcome in OUTCOMES if outcome.is_valid and outcome.counter is not None
    )
    info = {name: str(stats[name]) for name in ("version", "network_mode", "bind_address", "udp_port")}
    info["gateway_instance"] = stats["instance"]  # Prometheus has an `instance` of its own
    parts = [
        _family("info", "gauge", "What runs, as labels", [(info, 1)]),
        _family("engines", "gauge", "Engines known, by status",
                [({"status": status}, fleet[status]) for status in STATUSES]),
        _gauge("usable_engines", "Engines that are live and whose load is known", fleet["usable"]),
        *_fleet_sums(fleet["sums"]),
        _family("datagrams_total", "counter", "Datagrams received, by what was made of them",
                [({"outcome": outcome}, count) for outcome, count in outcomes.items()]),
        _family("datagrams_received_total", "counter", "Datagrams received, by network mode",
                [({"network_mode": mode.name}, stats[mode.counter]) for mode in MODES.values()]),
        _family("datagrams_invalid_total", "counter", "Datagrams rejected as invalid, by reason",
                [({"reason": reason}, count) for reason, count in stats["invalid_reasons"].items()]),
        _family("datagrams_unsigned_total", "counter", "Datagrams refused for their signature, by reason",
                [({"reason": reason}, count) for reason, count in stats["signature_reasons"].items()]),
        _family("http_rejections_total", "counter", "Connections turned away or cut off at a limit, by reason",
                [({"reason": reason}, count) for reason, count in stats["http"]["rejections"].items()]),
    ]  # fmt: skip
    for counter in COUNTERS:
        value = _at(stats, counter.path)
        if value is not None:  # there is none here, or nothing was received yet
            value = value if counter.scale == 1 else value / round(1 / counter.scale)
            parts.append(_family(counter.family, counter.kind, counter.help, [({}, value)]))
    return "".join(parts + _process_metrics()).encode()


def _at(stats: dict[str, Any], path: str) -> float | None:
    value: Any = stats
    for name in path.split("."):
        value = value[name]
    assert value is None or isinstance(value, int | float)
    return value
