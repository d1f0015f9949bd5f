"""Every name under which clients ask for an answer of a certain shape, and the grammar that it comes to.

The dialects: OpenAI's response_format; vLLM's structured_outputs and its older guided_*; TabbyAPI's json_schema,
regex_pattern and grammar_string; llama.cpp's json_schema and grammar; TGI's grammar object. Clients send most of them
at once with nothing in them: null, "", {} and [] ask for nothing. Those that ask must agree. Whether a grammar can be
enforced is the engine's to say; here its form is checked.
"""

from collections.abc import Iterator, Mapping
from typing import Any

import msgspec

from tightrope.engine.errors import InvalidRequest
from tightrope.engine.types import Grammar, GrammarKind

ANY_OBJECT = {"type": "object"}
KINDS: Mapping[str, GrammarKind] = {
    "json_schema": "json_schema",
    "guided_json": "json_schema",
    "regex_pattern": "regex",
    "guided_regex": "regex",
    "guided_choice": "choice",
    "grammar": "grammar",
    "grammar_string": "grammar",
    "guided_grammar": "grammar",
}
OUTPUTS: Mapping[str, GrammarKind] = {
    "json": "json_schema",
    "regex": "regex",
    "choice": "choice",
    "grammar": "grammar",
}
OVERRULED = {"grammar_string": "json_schema"}  # TabbyAPI's clients have a box for each, and send both
NAMES = frozenset({*KINDS, "structured_outputs", "response_format"})

Given = Mapping[str, Any]  # Any: a request's JSON, whose types are checked here


def read_grammar(given: Given) -> Grammar | None:
    """The one grammar that a request asks for, by whatever names.

    Raises InvalidRequest with the field's name for values of a wrong form, and for two grammars that differ.
    """
    found: Grammar | None = None
    for grammar in _grammars(given):
        if found is not None and (found.kind, found.text) != (grammar.kind, grammar.text):
            raise InvalidRequest(
                f"{grammar.field}: {found.field} asks for another shape of the answer already; send one of them",
                grammar.field,
            )
        found = found or grammar
    return found


def overruled(given: Given) -> list[tuple[str, str]]:
    """Fields that ask for a shape of the answer while another that counts more does so, and why they change nothing."""
    return [
        (name, f"{other} came too, and counts")
        for name, other in OVERRULED.items()
        if not (_is_empty(given.get(name)) or _is_empty(given.get(other)))
    ]


def _grammars(given: Given) -> Iterator[Grammar]:
    if (response_format := given.get("response_format")) is not None:
        schema = _response_schema(response_format)
        if schema is not None:
            yield _grammar("response_format", "json_schema", schema)
    passed_over = dict(overruled(given))
    for name, kind in KINDS.items():
        if not _is_empty(given.get(name)) and name not in passed_over:
            yield _grammar(name, kind, given[name])
    outputs = given.get("structured_outputs")
    if _is_empty(outputs):
        return
    if not isinstance(outputs, dict):
        raise InvalidRequest(
            f"structured_outputs must be an object with one of {', '.join(OUTPUTS)}", "structured_outputs"
        )
    for name, value in outputs.items():
        field = f"structured_outputs.{name}"
        if _is_empty(value) or value is False:
            continue
        if name == "json_object":
            yield _grammar(field, "json_schema", ANY_OBJECT)
        elif name in OUTPUTS:
            yield _grammar(field, OUTPUTS[name], value)
        else:
            raise InvalidRequest(f"{field} can't be honoured; {', '.join(OUTPUTS)} and json_object can", field)


def _is_empty(value: object) -> bool:
    return value is None or value == "" or value == {} or value == []


def _response_schema(response_format: object) -> object:
    """The schema that a response_format names; None for plain text."""
    name = "response_format"
    if not isinstance(response_format, dict):
        raise InvalidRequest(f"{name} must be an object with a type", name)
    match response_format.get("type", "text"):
        case "text":
            return None
        case "json_object":
            schema = response_format.get("schema")  # as llama.cpp's server takes it
            return ANY_OBJECT if _is_empty(schema) else schema
        case "json_schema":
            wrapped = response_format.get("json_schema", response_format)
            if not isinstance(wrapped, dict) or "schema" not in wrapped:
                raise InvalidRequest(f"{name}.json_schema.schema: field required", f"{name}.json_schema")
            return wrapped["schema"]
        case other:
            raise InvalidRequest(f"{name}.type must be text, json_object or json_schema, not {other!r:.40}", name)


def _grammar(field: str, kind: GrammarKind, value: object) -> Grammar:
    if kind == "json_schema":
        return Grammar(kind, _schema_text(field, value), field)
    if kind == "choice":
        if not isinstance(value, list) or not all(isinstance(choice, str) for choice in value):
            raise InvalidRequest(f"{field} must be a list of texts", field)
        return Grammar(kind, msgspec.json.encode(value).decode(), field)
    if not isinstance(value, str):
        raise InvalidRequest(f"{field} must be text", field)
    return Grammar(kind, value, field)


def _schema_text(field: str, value: object) -> str:
    """A schema as canonical JSON, given as an object or as its text."""
    if isinstance(value, str):
        try:
            value = msgspec.json.decode(value)
        except (msgspec.MsgspecError, RecursionError) as error:
            raise InvalidRequest(f"{field}: the schema is no JSON: {error}", field) from None
    if not isinstance(value, dict | bool):
        raise InvalidRequest(f"{field}: a schema is an object, true or false", field)
    return msgspec.json.encode(value).decode()


# ---- TGI ----


def read_tgi_grammar(given: Given | None) -> Grammar | None:
    """TGI's form: {"type": "json", "json_object", "regex" or "json_schema", "value": ...}, refused in its words."""
    if not given:
        return None
    kind, value = given.get("type"), given.get("value")
    if value is None:
        raise _tgi_fault("Grammar must have a 'value' field")
    if kind == "regex":
        return _grammar("grammar", "regex", value)
    if kind == "json_schema":
        value = value.get("schema") if isinstance(value, dict) else None
    elif kind not in ("json", "json_object"):
        raise _tgi_fault(f"its type must be json, json_object, json_schema or regex, not {kind!r:.40}")
    try:
        grammar = _grammar("grammar", "json_schema", value)
    except InvalidRequest as error:
        raise _tgi_fault(error.message.removeprefix("grammar: ")) from None
    if not isinstance(schema := msgspec.json.decode(grammar.text), dict) or "properties" not in schema:
        raise _tgi_fault("Grammar must have a 'properties' field")
    return grammar


def _tgi_fault(why: str) -> InvalidRequest:
    return InvalidRequest(f"grammar is not valid: {why}", "grammar")


def in_tgi_words(error: InvalidRequest) -> InvalidRequest:
    """The engine's refusal of a grammar as TGI words it; other refusals as they are."""
    if error.param != "grammar" or not error.message.startswith("grammar: "):
        return error
    return _tgi_fault(error.message.removeprefix("grammar: "))
