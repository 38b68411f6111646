"""Checks what `--json` wrote against the JSON Schema of the docs, by the keywords that it uses."""

import json
import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any

PATH = Path(__file__).resolve().parents[2] / "docs" / "reference" / "json-schema.json"
SCHEMA = json.loads(PATH.read_text(encoding="utf-8"))
KNOWN = {"$ref", "anyOf", "type", "enum", "required", "properties", "additionalProperties"}
KNOWN |= {"items", "minimum", "maximum", "title", "description"}
KNOWN |= {"exclusiveMinimum", "exclusiveMaximum"}
TYPES: dict[str, tuple[type, ...]] = {
    "object": (dict,),
    "array": (list,),
    "string": (str,),
    "integer": (int,),
    "number": (int, float),
    "boolean": (bool,),
    "null": (type(None),),
}


def check_json(command: str, value: Any) -> None:
    """Assert that a value is what a command may write, or the object of one that failed."""
    name = "failed" if isinstance(value, dict) and value.get("status") == "failed" else command
    found = list(faults(value, {"$ref": f"#/$defs/{name}"}, name))
    assert not found, f"{PATH.name}: {'; '.join(found)}"


def faults(value: Any, schema: dict[str, Any], place: str) -> Iterator[str]:
    assert set(schema) <= KNOWN, f"{place}: nothing here reads {set(schema) - KNOWN}"
    if "$ref" in schema:
        yield from faults(value, SCHEMA["$defs"][schema["$ref"].removeprefix("#/$defs/")], place)
    if "anyOf" in schema:
        ways = [list(faults(value, way, place)) for way in schema["anyOf"]]
        if all(ways):
            yield min(ways, key=len)[0]
    if "type" in schema:
        names = [schema["type"]] if isinstance(schema["type"], str) else schema["type"]
        if not any(is_a(value, name) for name in names):
            yield f"{place} is {value!r:.50}, not {' or '.join(names)}"
            return
    if "enum" in schema and value not in schema["enum"]:
        yield f"{place} is {value!r:.50}, not one of {schema['enum']}"
    if isinstance(value, int | float) and not (
        schema.get("minimum", value) <= value <= schema.get("maximum", value)
        and schema.get("exclusiveMinimum", -math.inf) < value
        and value < schema.get("exclusiveMaximum", math.inf)
    ):
        yield f"{place} is {value!r}, which is out of range"
    if isinstance(value, dict):
        others = schema.get("additionalProperties", {})
        yield from (f"{place} lacks {k!r}" for k in schema.get("required", ()) if k not in value)
        for key, entry in value.items():
            if key in schema.get("properties", ()):
                yield from faults(entry, schema["properties"][key], f"{place}.{key}")
            elif others is False:
                yield f"{place} has a {key!r}, of which it says nothing"
            else:
                yield from faults(entry, others, f"{place}.{key}")
    if isinstance(value, list):
        for number, entry in enumerate(value):
            yield from faults(entry, schema.get("items", {}), f"{place}[{number}]")


def is_a(value: Any, name: str) -> bool:
    flag = isinstance(value, bool)
    return isinstance(value, TYPES[name]) and (not flag or name == "boolean")
