"""As much of JSON Schema as /openapi.json uses, to hold answers against it with the standard library alone."""

from __future__ import annotations

from typing import Any

_TYPES: dict[str, tuple[type, ...]] = {
    "object": (dict,),
    "array": (list,),
    "string": (str,),
    "integer": (int,),
    "number": (int, float),
    "boolean": (bool,),
    "null": (type(None),),
}
_KNOWN = {
    "$ref", "type", "description", "properties", "required", "additionalProperties", "items", "enum", "minimum",
    "maximum", "minLength", "maxLength", "default",
}  # fmt: skip


def faults(value: Any, schema: dict[str, Any], document: dict[str, Any], where: str = "") -> list[str]:
    """What of a value is not as its schema says, and what of it the schema does not describe at all."""
    if "$ref" in schema:
        target: Any = document
        for name in schema["$ref"].removeprefix("#/").split("/"):
            target = target[name]
        return faults(value, target, document, where)
    unknown = set(schema) - _KNOWN
    assert not unknown, f"this validator does not know {unknown}"
    types = schema.get("type", list(_TYPES))
    allowed = [types] if isinstance(types, str) else types
    if not any(_is(value, name) for name in allowed):
        return [f"{where}: {value!r} is no {types}"]
    found = _bound_faults(value, schema, where)
    if isinstance(value, dict):
        properties = schema.get("properties", {})
        more = schema.get("additionalProperties")
        found += [f"{where}: {name} is missing" for name in schema.get("required", ()) if name not in value]
        for name, member in value.items():
            if name in properties:
                found += faults(member, properties[name], document, f"{where}.{name}")
            elif isinstance(more, dict):
                found += faults(member, more, document, f"{where}.{name}")
            elif "properties" in schema:
                found.append(f"{where}: {name} is not described")
    if isinstance(value, list) and "items" in schema:
        for number, item in enumerate(value):
            found += faults(item, schema["items"], document, f"{where}[{number}]")
    return found


def _is(value: Any, name: str) -> bool:
    return isinstance(value, _TYPES[name]) and (not isinstance(value, bool) or name == "boolean")


def _bound_faults(value: Any, schema: dict[str, Any], where: str) -> list[str]:
    size = len(value) if isinstance(value, str) else 0
    is_number = isinstance(value, int | float)
    wrong = {
        "enum": "enum" in schema and value not in schema["enum"],
        "minimum": is_number and value < schema.get("minimum", value),
        "maximum": is_number and value > schema.get("maximum", value),
        "minLength": isinstance(value, str) and size < schema.get("minLength", size),
        "maxLength": isinstance(value, str) and size > schema.get("maxLength", size),
    }
    return [f"{where}: {value!r} is against {name}" for name, is_wrong in wrong.items() if is_wrong]
