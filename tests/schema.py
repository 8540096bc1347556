"""Whether JSON has the shape that docs/json.schema.json promises: the part of
JSON Schema that it uses, and every object complete and without a name more."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

SCHEMA = json.loads(
    (Path(__file__).parents[1] / "docs/json.schema.json").read_text()
)
_KNOWN = {"$ref", "anyOf", "enum", "items", "properties", "required", "type"}
_TYPES: dict[str, Any] = {
    "array": list,
    "boolean": bool,
    "integer": int,
    "null": type(None),
    "number": (int, float),
    "object": dict,
    "string": str,
}


def problems(value: Any, name: str) -> list[str]:
    """What is wrong with the output of a command."""
    return list(_problems(value, SCHEMA["$defs"][name], name))


def _problems(value: Any, schema: dict[str, Any], at: str) -> Iterator[str]:
    assert schema.keys() <= _KNOWN, f"{at}: cannot check {schema.keys()}"
    if "$ref" in schema:
        target = SCHEMA["$defs"][schema["$ref"].removeprefix("#/$defs/")]
        yield from _problems(value, target, at)
        return
    if "anyOf" in schema:
        found = [list(_problems(value, one, at)) for one in schema["anyOf"]]
        if all(found):
            yield from found[0]
        return
    if "enum" in schema:
        if value not in schema["enum"]:
            yield f"{at} is {value!r}, none of {schema['enum']}"
        return
    types = schema["type"]
    types = types if isinstance(types, list) else [types]
    is_number = isinstance(value, bool) and "boolean" not in types
    if is_number or not any(isinstance(value, _TYPES[one]) for one in types):
        yield f"{at} is {value!r}, no {' or '.join(types)}"
    elif isinstance(value, dict):
        assert schema["required"] == list(schema["properties"]), at
        for key in value.keys() ^ schema["properties"].keys():
            yield f"{at}: {key} is {'new' if key in value else 'missing'}"
        for key in value.keys() & schema["properties"].keys():
            yield from _problems(
                value[key], schema["properties"][key], f"{at}.{key}"
            )
    elif isinstance(value, list):
        for number, item in enumerate(value):
            yield from _problems(item, schema["items"], f"{at}[{number}]")
