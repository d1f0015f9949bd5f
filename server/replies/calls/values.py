"""Values that stand as plain text in a call: which value a text is, and which texts a schema allows."""

import ast
import json
import re
from collections.abc import Iterator, Mapping
from contextlib import suppress
from typing import Any

from tightrope.engine.errors import InvalidRequest
from tightrope.engine.guided.json_schema import lark_of_schema
from tightrope.server.replies.calls.form import Schema
from tightrope.server.replies.lark import Spelling, literal, quoted

# What a schema may say of a text: of these, the last two can't be enforced of a plain one.
BOUNDS_OF_TEXT = frozenset({"minLength", "maxLength", "pattern", "format", "contentEncoding"})
_OF_JSON = ("contentEncoding", "format")
_WHOLE = frozenset({"allOf", "anyOf", "oneOf", "patternProperties", "minProperties", "maxProperties"})
_MAX_DEPTH = 16


def value_of(text: str, name: str, schema: Schema) -> object:
    """The value of an argument that was written as text."""
    kinds = set(_kinds(_property(name, schema), schema))
    if kinds == {"string"}:
        return text
    for read in (json.loads, ast.literal_eval):
        with suppress(ValueError, SyntaxError, RecursionError, MemoryError, TypeError):
            value: object = read(text.strip())
            json.dumps(value)  # Python has values that JSON lacks.
            if isinstance(value, str) or "string" not in kinds or _kind(value) in kinds:
                return text if isinstance(value, str) and "string" in kinds else value
    return text


def as_json(value: object) -> str:
    """A value as it stands in arguments."""
    return json.dumps(value, ensure_ascii=False)


def may_be_text(schema: Schema, root: Schema) -> bool:
    """Whether a value under the schema is written as a text, and not as JSON."""
    return "string" in _kinds(schema, root)


def named_properties(schema: Schema) -> list[tuple[str, Schema, bool]]:
    """The arguments by name, each with its schema and whether it has to be there.

    Raises InvalidRequest for a schema of all arguments together that can't be enforced one by one.
    """
    if whole := sorted(_WHOLE & schema.keys()):
        raise cannot(whole[0])
    properties: Mapping[str, Any] = schema.get("properties") or {}
    required = schema.get("required") or ()
    names = [*properties, *(name for name in required if name not in properties)]
    return [(name, _property(name, schema), name in required) for name in names]


def text_rule(
    name: str, schema: Schema, closing: str, root: Schema, spelling: Spelling, *, is_compact: bool
) -> tuple[str, str]:
    """Lark's definition of a value written as text up to `closing`: the attributes of its rule, and its body."""
    kinds = set(_kinds(schema, root))
    if "string" not in kinds:
        return "", f"{lark_of_schema(rooted(schema, root), is_compact=is_compact)} {spelling.of(closing)}"
    values = schema.get("enum", [schema["const"]] if "const" in schema else None)
    if values is not None:
        texts = (value if isinstance(value, str) else as_json(value) for value in values)
        return "", f"({' | '.join(map(literal, texts))}) {spelling.of(closing)}"
    if held := [key for key in _OF_JSON if key in schema]:
        raise cannot(f"{held[0]} of {name}")
    least, most = schema.get("minLength", 0), schema.get("maxLength", "")
    text = f"(?s:.{{{least},{most}}})" if least or most != "" else "(?s:.*)"
    if "pattern" in schema:
        pattern = re.sub(r"(?<!\\)/", r"\\/", schema["pattern"])
        head, tail = ("" if pattern.startswith("^") else "(?s:.*)"), ("" if pattern.endswith("$") else "(?s:.*)")
        text = f"{head}(?:{pattern.removeprefix('^').removesuffix('$')}){tail}"
    before, mark = spelling.parted(closing)
    if mark:
        return "", f"/{text}{quoted(before)}/ {spelling.of(mark)}"
    return "[lazy]", f"/{text}{quoted(closing)}/"


def cannot(what: str) -> InvalidRequest:
    """The refusal of a rule of the schema that calls in plain text can't be held to."""
    return InvalidRequest(f"tools: {what} can't be enforced in the form in which this model writes calls", "tools")


def rooted(schema: Schema, root: Schema) -> Schema:
    """The schema of a part with the definitions of the whole, so that its references lead somewhere."""
    return {**{key: root[key] for key in ("$defs", "definitions") if key in root}, **schema}


def resolved(schema: Schema, root: Schema) -> Schema:
    """The schema that a reference leads to, if it is one."""
    for _ in range(_MAX_DEPTH):
        reference = schema.get("$ref")
        if not isinstance(reference, str):
            return schema
        here: Any = root
        for part in reference.split("/")[1:]:
            here = here.get(part) if isinstance(here, dict) else None
        schema = here if isinstance(here, dict) else {}
    return {}


def _property(name: str, schema: Schema) -> Schema:
    found = (schema.get("properties") or {}).get(name, {})
    return found if isinstance(found, dict) else {}


def _kinds(schema: Schema, root: Schema, depth: int = 0) -> Iterator[str]:
    """The types that a value may have; all where nothing is said."""
    schema = resolved(schema, root)
    kinds = schema.get("type")
    if isinstance(kinds, str | list):
        yield from [kinds] if isinstance(kinds, str) else kinds
        return
    values = schema.get("enum", [schema["const"]] if "const" in schema else None)
    if isinstance(values, list):
        yield from map(_kind, values)
        return
    several = [one for key in ("anyOf", "oneOf") for one in schema.get(key, ()) if isinstance(one, dict)]
    if several and depth < _MAX_DEPTH:
        for one in several:
            yield from _kinds(one, root, depth + 1)
        return
    yield from ("string", "number", "integer", "boolean", "null", "array", "object")


def _kind(value: object) -> str:
    match value:
        case None:
            return "null"
        case bool():
            return "boolean"
        case int():
            return "integer"
        case float():
            return "number"
        case str():
            return "string"
        case list():
            return "array"
    return "object"
