"""Which JSON schemas can be enforced: checked before they become grammars, and light enough for the front.

llguidance itself refuses the keywords of the standard that it can't enforce (`not`, `if`, `uniqueItems`, ...), but
passes over words that it doesn't know, as the standard allows. Here those are refused as well: a misspelt `maxLenght`,
or an assertion of an older draft, would otherwise be dropped without a word.
"""

import json
import re
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

from tightrope.engine.guided.regex_limits import repeat_fault

MAX_NODES = 1000  # Compile time grows with the square of their number, 0.2 s here, and references nest as deep.
WHITE_SPACE = r" |\n[ \t]{0,16}"  # This regular expression stands between the parts of JSON, or nothing.
COMPACT = {"whitespace_flexible": False, "item_separator": ",", "key_separator": ":"}
FORMATS = frozenset(  # What stands in texts of these is known to the library.
    {
        *("date-time", "date", "time", "duration", "email", "hostname", "ipv4", "ipv6", "uuid", "uri", "unknown"),
    }
)
_PIECES = re.compile(r"\\.|\[\^?\]?(?:\\.|[^\]\\])*\]|\(\?<?[=!]|\(\?P=|.", re.DOTALL)  # Of a pattern.
_IRREGULAR = re.compile(r"\(\?<?[=!]|\(\?P=|\\[1-9bBkG]")
MAX_BYTES = 256 << 10  # A schema's text may be long: enumerations are, without having subschemas.

TYPES = ("null", "boolean", "integer", "number", "string", "array", "object")
_ONE = frozenset({"items", "additionalProperties", "additionalItems"})  # The value of these keywords is a schema.
_LISTS = frozenset({"anyOf", "allOf", "oneOf", "prefixItems"})
_NAMED = frozenset({"properties", "patternProperties", "$defs", "definitions"})
_COUNTS = frozenset({"minLength", "maxLength", "minItems", "maxItems", "minProperties", "maxProperties"})
_NUMBERS = frozenset({"minimum", "maximum", "exclusiveMinimum", "exclusiveMaximum", "multipleOf"})
_PLAIN = frozenset({"type", "enum", "const", "pattern", "format", "required", "$ref", "uniqueItems"})
_NOTES = frozenset(  # These say something of a value, and nothing about which values there are.
    {
        *("$schema", "$id", "$anchor", "$comment", "$vocabulary", "id", "title", "description", "default", "examples"),
        *("deprecated", "readOnly", "writeOnly", "contentEncoding", "contentMediaType", "contentSchema"),
        *("example", "nullable", "discriminator", "externalDocs", "xml", "markdownDescription", "enumNames"),
        *("enumDescriptions", "propertyOrdering", "strict"),
    }
)
_KNOWN = _ONE | _LISTS | _NAMED | _COUNTS | _NUMBERS | _PLAIN | _NOTES

Json = Any  # It is a value of JSON.
ALLOWED = 'with "lenient_schema": true it is left out'


def layout(*, is_compact: bool) -> dict[str, Json]:
    """The library's options for what stands between the parts of JSON."""
    return dict(COMPACT) if is_compact else {"whitespace_pattern": WHITE_SPACE}


def lark_of_schema(schema: Mapping[str, Json], *, is_compact: bool) -> str:
    """A schema as a part of a Lark grammar."""
    return "%json " + json.dumps({**without_idle(schema), "x-guidance": layout(is_compact=is_compact)})


def without_idle(node: Json) -> Json:
    """The schema without a uniqueItems of false, which asks for nothing and is no word of the library's."""
    if isinstance(node, list):
        return [without_idle(item) for item in node]
    if not isinstance(node, dict):
        return node
    return {
        key: value if key in ("enum", "const") else without_idle(value)
        for key, value in node.items()
        if not (key == "uniqueItems" and value is False)
    }


def malformed(schema: Json) -> str | None:
    """Whether a schema is none at all: as `schema_fault`, but for one that shapes nothing and is shown to a model."""
    for num_seen, (place, node) in enumerate(_nodes(schema)):
        fault = f"there are more than {MAX_NODES} subschemas" if num_seen == MAX_NODES else _form_fault(node)
        if fault is not None:
            return f"{place}: {fault}"
    return None


def schema_fault(schema: Json) -> str | None:
    """What is wrong with a schema, with the place as a JSON pointer; None where nothing is.

    Too many subschemas are wrong, and so are references round in a circle from which no finite value leads out.
    """
    if (fault := malformed(schema)) is not None:
        return fault
    nodes: list[Json] = []
    for place, node in _nodes(schema):
        nodes.append(node)
        fault = _keyword_fault(node)
        if fault is not None:
            return f"{place}: {fault}"
    known = {id(node) for node in nodes}
    targets: dict[int, Json] = {}
    for node in nodes:
        if isinstance(node, dict) and "$ref" in node:
            target = _resolve(node["$ref"], schema)
            if not isinstance(target, bool) and id(target) not in known:
                return f"$ref {node['$ref']!r:.80} leads to no schema inside this one"
            targets[id(node)] = target
    return None if _has_finite_value(schema, nodes, targets) else "no finite value satisfies it"


def _nodes(root: Json) -> Iterator[tuple[str, Json]]:
    """The schema and all inside it, each with its place."""
    stack = [("#", root)]
    while stack:
        place, node = stack.pop()
        yield place, node
        if not isinstance(node, dict):
            continue
        for key, value in reversed(node.items()):
            if key in _ONE and not isinstance(value, list):
                stack.append((f"{place}/{key}", value))
            elif (key in _LISTS or key == "items") and isinstance(value, list):
                stack += [(f"{place}/{key}/{index}", item) for index, item in reversed([*enumerate(value)])]
            elif key in _NAMED and isinstance(value, dict):
                stack += [(f"{place}/{key}/{name}", item) for name, item in reversed(value.items())]


def _form_fault(node: Json) -> str | None:
    if isinstance(node, bool):
        return None
    if not isinstance(node, dict):
        return f"a schema is an object, true or false, not {node!r:.40}"
    return next((fault for key, value in node.items() if (fault := _value_fault(key, value)) is not None), None)


def _keyword_fault(node: Json) -> str | None:
    return next((fault for _, fault in node_faults(node)), None)


def node_faults(node: Json) -> Iterator[tuple[str, str]]:
    """The keywords of one schema that can't be enforced, each with the reason."""
    for key, value in node.items() if isinstance(node, dict) else ():
        if key == "x-guidance":
            yield key, "'x-guidance' can't be set by a request"
        elif (key not in _KNOWN and not key.startswith("x-")) or (key == "uniqueItems" and value is not False):
            yield key, f"the keyword {key!r:.60} can't be enforced; {ALLOWED}"
        elif key == "format" and isinstance(value, str) and value not in FORMATS and _may_be_text(node):
            yield key, f"the format {value!r:.60} can't be enforced; {ALLOWED}"
        elif key == "pattern" and isinstance(value, str) and _is_irregular(value):
            yield key, f"the pattern {value!r:.60} looks around or back, which can't be enforced; {ALLOWED}"
        elif key == "patternProperties" and isinstance(value, dict) and any(map(_is_irregular, value)):
            yield key, f"a pattern of patternProperties looks around or back, which can't be enforced; {ALLOWED}"


def _may_be_text(node: Mapping[str, Json]) -> bool:
    kinds = node.get("type", "string")
    return "string" in (kinds if isinstance(kinds, list) else [kinds])


def _is_irregular(pattern: str) -> bool:
    """Whether a pattern has more than regular expressions have in theory: lookarounds, backreferences, boundaries."""
    return any(_IRREGULAR.fullmatch(piece) for piece in _PIECES.findall(pattern))


def _value_fault(key: str, value: Json) -> str | None:
    """Whether a keyword's value has the wrong form, and which would be right."""
    if key == "type":
        types = value if isinstance(value, list) else [value]
        if not types or any(not isinstance(t, str) or t not in TYPES for t in types):
            return f"type must be of {', '.join(TYPES)}, not {value!r:.60}"
    elif key in _NAMED and not isinstance(value, dict):
        return f"{key} must be an object of schemas"
    elif key in _LISTS | {"enum"} and not (isinstance(value, list) and value):
        return f"{key} must be a list that isn't empty"
    elif key == "required" and not (isinstance(value, list) and all(isinstance(name, str) for name in value)):
        return "required must be a list of names"
    elif key in _COUNTS and (type(value) is not int or value < 0):
        return f"{key} must be a whole number from 0 on, not {value!r:.40}"
    elif key in _NUMBERS and type(value) not in (int, float):
        return f"{key} must be a number, not {value!r:.40}"
    elif key in ("pattern", "format", "$ref") and not isinstance(value, str):
        return f"{key} must be text, not {value!r:.40}"
    elif key in ("pattern", "patternProperties"):
        faults = map(_pattern_fault, [value] if isinstance(value, str) else value)
        return next((fault for fault in faults if fault is not None), None)
    return None


def _pattern_fault(pattern: str) -> str | None:
    """Python's own parser is asked, which lacks some of JavaScript's words for the same things."""
    python = re.sub(r"\\[pP]\{[^}]*\}", r"\\w", pattern).replace("(?<", "(?P<")
    python = python.replace("(?P<=", "(?<=").replace("(?P<!", "(?<!")
    try:
        with warnings.catch_warnings(action="ignore"):  # Python warns of brackets inside brackets.
            re.compile(python)
    except (re.error, RecursionError, OverflowError) as error:
        return f"the pattern {pattern!r:.60} is no regular expression: {error}"
    fault = repeat_fault(pattern)
    return fault and f"the pattern {pattern!r:.60}: {fault}"


def _has_finite_value(root: Json, nodes: Sequence[Json], targets: Mapping[int, Json]) -> bool:
    """Whether some value satisfies the schema as far as references go; `targets` are theirs, by the node's identity."""
    finite: set[int] = set()

    def is_finite(node: Json) -> bool:
        return node is True or id(node) in finite

    def becomes_finite(node: dict[str, Json]) -> bool:
        if "$ref" in node and not is_finite(targets[id(node)]):
            return False
        if not all(map(is_finite, node.get("allOf", ()))):
            return False
        if any(not any(map(is_finite, node[key])) for key in ("anyOf", "oneOf") if key in node):
            return False
        types = node.get("type", "null")
        types = types if isinstance(types, list) else [types]
        return any(t not in ("object", "array") for t in types) or any(_is_finite_as(t, node, is_finite) for t in types)

    while more := {
        id(node) for node in nodes if isinstance(node, dict) and id(node) not in finite and becomes_finite(node)
    }:
        finite |= more
    return is_finite(root)


def _is_finite_as(kind: str, node: dict[str, Json], is_finite: Callable[[Json], bool]) -> bool:
    """Whether an object, or an array, has finite parts where it needs any."""
    if kind == "object":
        properties = node.get("properties", {})
        return all(is_finite(properties[name]) for name in node.get("required", ()) if name in properties)
    first, least = node.get("prefixItems", ()), node.get("minItems", 0)
    rest = node.get("items", True)
    if isinstance(rest, list):  # This is the older form of prefixItems.
        first, rest = rest, node.get("additionalItems", True)
    return all(map(is_finite, first[:least])) and (len(first) >= least or is_finite(rest))


def _resolve(ref: str, root: Json) -> Json:
    """What a reference of the form #/a/b points at; None where nothing is there."""
    if ref != "#" and not ref.startswith("#/"):
        return None
    here = root
    for part in ref.split("/")[1:]:
        name = re.sub("%([0-9A-Fa-f]{2})", lambda m: chr(int(m[1], 16)), part).replace("~1", "/").replace("~0", "~")
        if isinstance(here, list) and name.isdecimal() and int(name) < len(here):
            here = here[int(name)]
        elif isinstance(here, dict) and name in here:
            here = here[name]
        else:
            return None
    return here
