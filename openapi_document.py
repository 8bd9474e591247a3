"""The query interface as machines read it: OpenAPI 3.1, made from the tables that make the answers.

Fields, counters, outcomes, reasons and paths come from their own tables; what is declared here is what no table has,
and a test holds it against real answers, so that it cannot lag behind.
"""

from __future__ import annotations

import re
from collections.abc import Iterable
from typing import Any

from config import MODES
from datagram_signature import SIGNATURE_REASONS
from engine_state import FIELDS, REASONS, Field
from fleet_events import EVENT_KINDS
from gateway_counters import COUNTERS, OUTCOMES, Counter
from http_message import JSON_TYPE
from query_route import MAX_INTERVAL_MS, MAX_TIME_MS, Parameter, Route
from query_server import REJECTIONS
from staleness import STATUSES

Schema = dict[str, Any]

EVENT_STREAM = "text/event-stream"


def _integer(meaning: str, minimum: int | None = 0) -> Schema:
    return {"type": "integer", "description": meaning, **({} if minimum is None else {"minimum": minimum})}


def _number(meaning: str) -> Schema:
    return {"type": "number", "description": meaning, "minimum": 0}


def _string(meaning: str, **more: Any) -> Schema:
    return {"type": "string", "description": meaning, **more}


def _boolean(meaning: str) -> Schema:
    return {"type": "boolean", "description": meaning}


def _or_null(schema: Schema) -> Schema:
    return {**schema, "type": [schema["type"], "null"]}


def _object(properties: dict[str, Schema], description: str = "", *, optional: Iterable[str] = ()) -> Schema:
    """An object that has these and nothing else; a later version may have more, so that readers pass over those."""
    required = [name for name in properties if name not in set(optional)]
    about = {"description": description} if description else {}
    return {"type": "object", **about, "properties": properties, "required": required}


def _map(values: Schema, description: str) -> Schema:
    return {"type": "object", "description": description, "additionalProperties": values}


def _list(items: Schema, description: str) -> Schema:
    return {"type": "array", "description": description, "items": items}


def _reference(name: str) -> Schema:
    return {"$ref": f"#/components/schemas/{name}"}


def _plain(text: str) -> str:
    return text.replace("`", "")


# -- schemas from the tables -------------------------------------------------------------------------------------------

_LENGTHS = re.compile(r"([0-9]+) to ([0-9]+) printable")
_MINIMUM = re.compile(r">= (-?[0-9]+)|, (0) to 2\^53")


def _field(field: Field) -> Schema:
    """A field's schema; the bounds are those that its row names in these words."""
    schema: Schema = {"type": field.json_type, "description": f"{_plain(field.meaning)} ({field.accepts})"}
    lengths, minimum = _LENGTHS.search(field.accepts), _MINIMUM.search(field.accepts)
    if lengths:
        schema.update(minLength=int(lengths[1]), maxLength=int(lengths[2]))
    if minimum:
        schema["minimum"] = int(minimum[1] or minimum[2])
    if schema["type"] == "integer":
        schema["maximum"] = 2**53
    return schema


def _state_properties() -> dict[str, Schema]:
    return {field.name: _field(field) for field in FIELDS}


_SCALAR: Schema = {"type": ["string", "number", "boolean", "null"], "description": "a further field"}


def _entry() -> Schema:
    return _object(
        {
            **_state_properties(),
            "heartbeat": _boolean("the state shown is a heartbeat, whose load fields are placeholders and say nothing"),
            "load_known": _boolean("the state shown is no heartbeat"),
            "usable": _boolean("live, and the load is known: safe to send requests to by these numbers"),
            "received_ms": _integer("when the state shown was received, ms since the epoch by the gateway's clock"),
            "clock_offset_ms": _integer("receipt minus timestamp_ms, ms: the error of the engine's clock", None),
            "source": _string("address and port that the state shown came from"),
            "status": _string("by the time since it was last heard from, and its phase", enum=list(STATUSES)),
            "phase": _or_null(_string("what the engine is up to; null if it never said, which counts as serving")),
            "restarts": _integer("restarts that were noticed"),
            "lost": _or_null(_integer("datagrams of it that did not arrive; null if it does not number them")),
            "conflict": _boolean("several senders use this engine_id"),
            "extra": _map(_SCALAR, "further fields that it sent, by name"),
            "age_ms": _integer("ms since the engine was last heard from"),
            "state_age_ms": _integer("ms since the load state shown was received"),
        },
        "One engine: what it sent, and how fresh that is.",
        optional=("extra",),
    )


def _fleet() -> Schema:
    count = _integer("engines")
    sums = {
        field.name: _object({"sum": _number(_plain(field.meaning)), "engines": _integer("engines behind it")})
        for field in FIELDS
        if field.summed
    }
    return _object(
        {
            "live": _integer("live engines"),
            "unavailable": _integer("engines that are there, and are not to be sent requests"),
            "stale": _integer("stale engines"),
            "usable": _integer("live engines whose load is known"),
            "sums": _object(sums, "over usable engines, without what an engine does not know"),
            "scheduling_modes": _map(count, "how many engines have each"),
            "phases": _map(count, "how many engines are in each"),
        },
        "All engines together.",
    )


def _past_state() -> Schema:
    received = _integer("when it was received, ms since the epoch by the gateway's clock")
    return _object({**_state_properties(), "received_ms": received}, "A state that the table showed of an engine.")


_SNAPSHOT_HEAD: dict[str, Schema] = {
    "instance": _string("random, new at each start of the gateway"),
    "uptime_ms": _integer("ms since the gateway started"),
    "time_ms": _integer("the gateway's clock, ms since the epoch"),
    "stale_threshold_ms": _integer("ms of silence after which an engine is stale", 1),
    "active_engines": _integer("live engines of the whole fleet, whatever was asked for"),
    "total_engines": _integer("known engines of the whole fleet, whatever was asked for"),
}


def _snapshot() -> Schema:
    engines = _map(_reference("Entry"), "the engines asked for, by engine_id")
    properties = {**_SNAPSHOT_HEAD, "fleet": _reference("Fleet"), "engines": engines}
    return _object(properties, "The fleet at one moment.")


_STATS: dict[str, Schema] = {
    "version": _string("version of the gateway"),
    "instance": _SNAPSHOT_HEAD["instance"],
    "network_mode": _string("how engines push", enum=list(MODES)),
    "bind_address": _string("address that is listened on"),
    "udp_port": _integer("UDP port"),
    "http_port": _or_null(_integer("TCP port; null if there is none")),
    "active_engines": _integer("live engines"),
    "total_engines": _integer("known engines"),
    "total_received": _integer("datagrams received"),
    "valid_states": _integer("valid datagrams that were taken"),
    "valid_rate": {**_number("valid_states by total_received, 0.0 before the first"), "maximum": 1},
    **{mode.counter: _integer(f"datagrams received in {mode.name} mode") for mode in MODES.values()},
    "log": {"file": _string("path of the state log")},
}
_UNITS = {"_ms": ", ms", "_s": ", s", "_bytes": ", bytes"}
_NULLABLE = ("last_received", "kernel_dropped")
_FRACTIONS = ("uptime_s", "last_received")


def _counter(counter: Counter) -> Schema:
    if counter.name == "enabled":
        return _boolean(counter.help)
    meaning = counter.help + next((unit for end, unit in _UNITS.items() if counter.name.endswith(end)), "")
    schema = _number(meaning) if counter.name in _FRACTIONS else _integer(meaning)
    return _or_null(schema) if counter.name in _NULLABLE else schema


def _stats() -> Schema:
    properties: dict[str, Any] = {name: value for name, value in _STATS.items() if name != "log"}
    sections: dict[str, dict[str, Schema]] = {"log": dict(_STATS["log"])}
    for outcome in OUTCOMES:
        if outcome.counter is not None:
            properties[outcome.counter] = _integer(f"datagrams: {_plain(outcome.when)}")
    for counter in COUNTERS:
        section, _, name = counter.path.rpartition(".")
        (sections.setdefault(section, {}) if section else properties)[name] = _counter(counter)
    reasons = {name: _integer(_plain(meaning)) for name, meaning in REASONS.items()}
    properties["invalid_reasons"] = _object(reasons, "invalid datagrams by reason")
    reasons = {name: _integer(_plain(meaning)) for name, meaning in SIGNATURE_REASONS.items()}
    properties["signature_reasons"] = _object(reasons, "datagrams refused for their signature, by reason")
    rejections = {name: _integer(meaning) for name, meaning in REJECTIONS.items()}
    sections["http"]["rejections"] = _object(rejections, "connections turned away or cut off, by reason")
    properties.update({name: _object(section) for name, section in sections.items()})
    properties["fleet"] = _reference("Fleet")
    properties["lost_states"] = _integer("datagrams that engines numbered and that did not arrive")
    sample = {
        "time_ms": _integer("when, ms since the epoch"),
        "source": _string("where it came from"),
        "detail": _string("what was wrong with it"),
    }
    properties["rejected_samples"] = _map(_object(sample), "the last datagram rejected for each reason that occurred")
    return _object(properties, "Counters since the start, settings in effect, losses of the log and the kernel.")


def _event() -> Schema:
    return _object(
        {
            "time_ms": _integer("when, ms since the epoch"),
            "event": _string(
                "; ".join(f"{kind}: {_plain(meaning)}" for kind, meaning in EVENT_KINDS.items()), enum=list(EVENT_KINDS)
            ),
            "engine_id": _or_null(_string("which engine; null if it is about the gateway")),
            "message": _string("more about it"),
            "count": _integer("how many of that kind it stands for", 1),
        }
    )


def _schemas() -> dict[str, Schema]:
    moving = _map(_string("ok or stuck", enum=["ok", "stuck"]), "the gateway's threads, by name")
    return {
        "Entry": _entry(),
        "Fleet": _fleet(),
        "PastState": _past_state(),
        "Snapshot": _snapshot(),
        "History": _list(_reference("PastState"), "Its latest states, oldest first."),
        "Stats": _stats(),
        "Events": _list(_event(), "What happened lately, oldest first."),
        "Samples": _list(
            {
                "type": "object",
                "description": "time_ms (ms since the epoch), fleet, and the counters as /stats has them",
                "required": ["time_ms"],
            },
            "The last two hours, a sample every 10 s, oldest first.",
        ),
        "Liveness": _object({"status": _string("ok, or which threads do not move"), "threads": moving}),
        "Readiness": _object({"status": _string("ready, or why not")}),
        "Version": _object(
            {
                "version": _string("version of the gateway"),
                "embedded": _boolean("whether it runs in a router's process, where nobody restarts it"),
            },
            optional=["embedded"],
        ),
        "Error": _object({"error": _string("what is wrong, and what to do")}, "Why there is no answer."),
        "Anything": {"type": "object", "description": "An OpenAPI document."},
    }


# -- paths -------------------------------------------------------------------------------------------------------------

PARAMETERS = {
    parameter.name: parameter
    for parameter in (
        Parameter("engine_id", "an engine's id, usually its URL", {"type": "string", "minLength": 1},
                  is_repeatable=True),
        Parameter("status", "only engines of this status", {"type": "string", "enum": list(STATUSES)},
                  is_repeatable=True),
        Parameter("phase", "only engines in this phase", {"type": "string"}, is_repeatable=True),
        Parameter("since", "only what came from this time on, ms since the epoch",
                  {"type": "integer", "minimum": 0, "maximum": MAX_TIME_MS, "default": 0}),
        Parameter("min_interval_ms", "ms in which the state of one engine is told once at most",
                  {"type": "integer", "minimum": 0, "maximum": MAX_INTERVAL_MS, "default": 0}),
        Parameter("engines", "no: the gateway's own metrics only",
                  {"type": "string", "enum": ["yes", "no"], "default": "yes"}),
    )
}  # fmt: skip

_ERRORS = {
    "400": "the question is wrong: a parameter that the path does not know, a value that it does not accept",
    "401": "HTTP_TOKENS_FILE is set, and the request has none of its tokens",
    "404": "there is no such engine",
    "405": "another method than GET, HEAD and OPTIONS",
    "414": "the request line is too long",
    "431": "the head is too large",
    "500": "an error in the gateway, which is in its log",
    "503": "not ready, not alive, or too many connections or readers",
    "505": "another version than HTTP/1.1 and HTTP/1.0",
}


def _content(route: Route) -> dict[str, Any]:
    if route.media_type == JSON_TYPE:
        return {JSON_TYPE: {"schema": _reference(route.schema)}}
    return {route.media_type: {"schema": {"type": "string"}}}


def _responses(route: Route) -> dict[str, Any]:
    answers_by_itself = {"503": _content(route)} if route.is_probe else {}
    statuses = dict(_ERRORS)
    if not any("engine_id" in name for name in (route.path, *(route.parameters or ()))) or route.path == "/engines":
        del statuses["404"]
    if route.is_probe:
        del statuses["401"]
    error = {JSON_TYPE: {"schema": _reference("Error")}}
    responses: dict[str, Any] = {"200": {"description": route.answers, "content": _content(route)}}
    for status, meaning in statuses.items():
        responses[status] = {"description": meaning, "content": answers_by_itself.get(status, error)}
    if "401" in responses:
        challenge = {"description": "the schemes that are taken", "schema": {"type": "string"}}
        responses["401"]["headers"] = {"WWW-Authenticate": challenge}
    return responses


def _parameters(route: Route) -> list[dict[str, Any]]:
    in_path = [{**PARAMETERS["engine_id"].document(), "in": "path", "required": True}] if "<" in route.path else []
    in_query = [
        {**PARAMETERS[name].document(), "in": "query", "required": name in route.required}
        for name in route.parameters or ()
    ]
    for parameter in in_query:
        if PARAMETERS[parameter["name"]].is_repeatable and parameter["name"] not in route.required:
            parameter["schema"] = {"type": "array", "items": parameter["schema"]}
            parameter.update(style="form", explode=True)
    in_header = []
    if route.media_type == EVENT_STREAM:
        meaning = "the id of the last event that was read: what was missed since then comes first"
        in_header = [{"name": "Last-Event-ID", "in": "header", "description": meaning, "schema": {"type": "string"}}]
    return [*in_path, *in_query, *in_header]


def _operation(route: Route) -> dict[str, Any]:
    words = re.findall("[a-z]+", route.path.replace("engine_id", "one"))
    operation: dict[str, Any] = {
        "operationId": "_".join(["get", *words]) if words else "get_status_page",
        "summary": route.answers,
        "parameters": _parameters(route),
        "responses": _responses(route),
    }
    if route.is_probe:
        operation["security"] = []
    if route.media_type == EVENT_STREAM:
        operation["x-events"] = _events()
    return operation


def _events() -> dict[str, Any]:
    """The events of /watch: OpenAPI 3.1 has no word for what is in a stream."""
    entry = {"description": "the engine's entry", "data": _reference("Entry")}
    return {
        "snapshot": {"description": "first, and whenever what was missed is not known", "data": _reference("Snapshot")},
        "state": {**entry, "description": "an engine was heard from: its entry"},
        "stale": {**entry, "description": "it has been silent for longer than the threshold: its entry"},
        "live": {**entry, "description": "it came back: its entry"},
        "removed": {**entry, "description": "it is no more: its last entry"},
    }


def openapi_document(routes: Iterable[Route], version: str) -> dict[str, Any]:
    """The whole description, of these routes."""
    token = "one of the tokens in HTTP_TOKENS_FILE; if that is not set, none is needed"
    return {
        "openapi": "3.1.0",
        "info": {
            "title": "ELRAR state gateway",
            "version": version,
            "description": "The states of LLM engines, and how fresh they are. Read-only: HEAD is GET without the body,"
            " OPTIONS is 204 on any path, everything else 405. Later versions may add members to any object.",
        },
        "servers": [{"url": "/", "description": "the gateway that was asked"}],
        "security": [{}, {"bearer": []}, {"basic": []}],
        "paths": {route.path.replace("<", "{").replace(">", "}"): {"get": _operation(route)} for route in routes},
        "components": {
            "schemas": _schemas(),
            "securitySchemes": {
                "bearer": {"type": "http", "scheme": "bearer", "description": token},
                "basic": {"type": "http", "scheme": "basic", "description": f"any user; the password is {token}"},
            },
        },
    }
