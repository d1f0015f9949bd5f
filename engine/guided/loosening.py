"""JSON schemas without what can't be enforced of them, where a client allows that, and without what says nothing."""

from collections.abc import Callable
from typing import Any

from tightrope.engine.guided.json_schema import node_faults

Json = Any  # It is a value of JSON.
_VALUES = frozenset({"enum", "const", "default", "example", "examples", "required"})  # No schemas are in these.
_NAMED = frozenset({"properties", "patternProperties", "$defs", "definitions"})


def without_nulls(schema: Json) -> Json:
    """The schema without keywords that are null, as programs write what they leave out. The given one isn't changed."""
    if isinstance(schema, list):
        return [without_nulls(item) for item in schema]
    if not isinstance(schema, dict):
        return schema
    made: dict[str, Json] = {}
    for key, value in schema.items():
        if value is None and key not in ("const", "default", "example"):
            continue
        if key in _NAMED and isinstance(value, dict):
            made[key] = {name: without_nulls(item) for name, item in value.items()}
        else:
            made[key] = value if key in _VALUES else without_nulls(value)
    return made


def loosened(schema: Json) -> tuple[Json, list[str]]:
    """The schema without the keywords that can't be enforced, and their places as JSON pointers.

    A oneOf becomes an anyOf: that exactly one alternative holds can't be enforced. The given schema is not changed.
    """
    left_out: list[str] = []
    return _copied(schema, "#", left_out.append), left_out


def _copied(node: Json, place: str, left_out: Callable[[str], None]) -> Json:
    if isinstance(node, list):
        return [_copied(item, f"{place}/{index}", left_out) for index, item in enumerate(node)]
    if not isinstance(node, dict):
        return node
    faulty = {key for key, _ in node_faults(node)} - {"x-guidance"}  # The last one is refused whatever is allowed.
    made: dict[str, Json] = {}
    for key, value in node.items():
        where = f"{place}/{key}"
        if key in _VALUES:
            made[key] = value
        elif key in _NAMED and isinstance(value, dict):
            if key in faulty:
                left_out(where)
            else:
                made[key] = {name: _copied(item, f"{where}/{name}", left_out) for name, item in value.items()}
        elif key in faulty:
            left_out(where)
        elif key == "oneOf" and "anyOf" not in node:
            left_out(where)
            made["anyOf"] = _copied(value, where, left_out)
        else:
            made[key] = _copied(value, where, left_out)
    return made
