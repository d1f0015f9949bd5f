"""Every name under which clients ask for an answer of a certain shape, and the grammar that it comes to.

The dialects: OpenAI's response_format; vLLM's structured_outputs and its older guided_*; TabbyAPI's json_schema,
regex_pattern and grammar_string; llama.cpp's json_schema and grammar; Ollama's format; TGI's object of a type and a
value, as its grammar or as a response_format. Clients send most of them at once with nothing in them: null, "", {} and
[] ask for nothing. Those that ask must agree. Whether a grammar can be enforced is the engine's to say; here its form
is checked.
"""

from collections.abc import Iterator, Mapping
from typing import Any

import msgspec

from tightrope.engine.errors import InvalidRequest
from tightrope.engine.guided.loosening import loosened, without_nulls
from tightrope.engine.types import Grammar, GrammarKind

ANY_OBJECT = {"type": "object"}
KINDS: Mapping[str, GrammarKind] = {
    "json_schema": "json_schema",
    "guided_json": "json_schema",
    "regex_pattern": "regex",
    "guided_regex": "regex",
    "guided_choice": "choice",
    "format": "json_schema",
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
OVERRULED = {"grammar_string": "json_schema"}  # TabbyAPI's clients have a box for each, and send both.
COMPACT = "disable_any_whitespace"  # vLLM has it among its structured_outputs.
LENIENT = "lenient_schema"  # It is this server's own.
NAMES = frozenset({*KINDS, "structured_outputs", "response_format", COMPACT, LENIENT})
PLACES: Mapping[str, tuple[str, ...]] = {  # By its type, an object may have its shape in these places.
    "text": (),
    "json_object": ("schema", "value"),  # The names are llama.cpp's and TGI's.
    "json": ("schema", "value"),
    "json_schema": ("json_schema", "schema", "value"),
    "regex": ("value",),
}

Fields = Mapping[str, Any]  # A request's JSON may hold anything, and its types are checked here.


def read_grammar(given: Fields) -> Grammar | None:
    """The one grammar that a request asks for, by whatever names.

    Raises InvalidRequest with the field's name for values of a wrong form, and for two grammars that differ.
    """
    grammar = _one_grammar(given)
    is_compact, is_lenient = _flag(given, COMPACT) or _of_outputs(given), _flag(given, LENIENT)
    if grammar is None or grammar.kind != "json_schema":
        return grammar
    text = _loosened_text(grammar.text) if is_lenient else grammar.text
    return Grammar(grammar.kind, text, grammar.field, is_compact)


def left_out(given: Fields) -> list[tuple[str, str]]:
    """What of a schema isn't enforced, as its client allows: to be told."""
    grammar = _one_grammar(given, keeps_strict=True)
    allows = _flag(given, LENIENT) or _is_loose(given.get("response_format"))
    if grammar is None or grammar.kind != "json_schema" or not allows:
        return []
    return [(grammar.field, f"served without {place}") for place in loosened(msgspec.json.decode(grammar.text))[1]]


def _flag(given: Fields, name: str) -> bool:
    value = given.get(name)
    if not isinstance(value, bool | None):
        raise InvalidRequest(f"{name} must be true or false", name)
    return bool(value)


def _of_outputs(given: Fields) -> bool:
    outputs = given.get("structured_outputs")
    return isinstance(outputs, dict) and _flag(outputs, COMPACT)


def _is_loose(response_format: object) -> bool:
    """Whether OpenAI's form of a schema says that it needn't be kept to the letter."""
    wrapped = response_format.get("json_schema") if isinstance(response_format, dict) else None
    return isinstance(wrapped, dict) and wrapped.get("strict") is False


def _loosened_text(text: str) -> str:
    return msgspec.json.encode(loosened(msgspec.json.decode(text))[0]).decode()


def _one_grammar(given: Fields, *, keeps_strict: bool = False) -> Grammar | None:
    found: Grammar | None = None
    for grammar in _grammars(given):
        if found is not None and (found.kind, found.text) != (grammar.kind, grammar.text):
            raise InvalidRequest(
                f"{grammar.field}: {found.field} asks for another shape of the answer already; send one of them",
                grammar.field,
            )
        found = found or grammar
    if found is not None and found.field == "response_format" and not keeps_strict and _is_loose(given[found.field]):
        return Grammar(found.kind, _loosened_text(found.text), found.field)
    return found


def overruled(given: Fields) -> list[tuple[str, str]]:
    """Fields that ask for a shape of the answer while another that counts more does so, and why they change nothing."""
    grammar = _one_grammar(given)
    idle = [] if grammar is not None and grammar.kind == "json_schema" else [COMPACT, LENIENT]
    return [*_named_twice(given), *((name, "no JSON schema came") for name in idle if given.get(name))]


def _named_twice(given: Fields) -> list[tuple[str, str]]:
    return [
        (name, f"{other} came too, and counts")
        for name, other in OVERRULED.items()
        if not (_is_empty(given.get(name)) or _is_empty(given.get(other)))
    ]


def _grammars(given: Fields) -> Iterator[Grammar]:
    if (response_format := given.get("response_format")) is not None:
        if not isinstance(response_format, dict):
            raise InvalidRequest("response_format must be an object with a type", "response_format")
        if (grammar := _typed("response_format", response_format)) is not None:
            yield grammar
    passed_over = dict(_named_twice(given))
    for name, kind in KINDS.items():
        value = given.get(name)
        if _is_empty(value) or name in passed_over:
            continue
        if kind == "grammar" and isinstance(value, dict):
            if (grammar := _typed(name, value)) is not None:
                yield grammar
        else:
            yield _grammar(name, kind, ANY_OBJECT if (name, value) == ("format", "json") else value)
    outputs = given.get("structured_outputs")
    if _is_empty(outputs):
        return
    if not isinstance(outputs, dict):
        raise InvalidRequest(
            f"structured_outputs must be an object with one of {', '.join(OUTPUTS)}", "structured_outputs"
        )
    for name, value in outputs.items():
        field = f"structured_outputs.{name}"
        if _is_empty(value) or value is False or name == COMPACT:
            continue
        if name == "json_object":
            yield _grammar(field, "json_schema", ANY_OBJECT)
        elif name in OUTPUTS:
            yield _grammar(field, OUTPUTS[name], value)
        else:
            raise InvalidRequest(f"{field} can't be honoured; {', '.join(OUTPUTS)} and json_object can", field)


def _is_empty(value: object) -> bool:
    return value is None or value == "" or value == {} or value == []


def _typed(field: str, given: Fields) -> Grammar | None:
    """What an object with a type asks for; None for plain text. Its shape stands where one of the dialects has it."""
    kind = given.get("type", "text")
    if not isinstance(kind, str) or kind not in PLACES:
        raise InvalidRequest(f"{field}.type must be one of {', '.join(PLACES)}, not {kind!r:.40}", field)
    places = PLACES[kind]
    for name in PLACES["json_schema"]:
        if name not in places and not _is_empty(given.get(name)):
            raise InvalidRequest(f"{field}.{name} does not go with the type {kind}", f"{field}.{name}")
    there = [name for name in places if given.get(name) is not None]
    asking = [name for name in there if not _is_empty(given[name])]
    if len(asking) > 1:
        raise InvalidRequest(f"{field}.{asking[1]}: {asking[0]} came too; send one of them", f"{field}.{asking[1]}")
    if kind == "text":
        return None
    if kind in ("json_object", "json"):
        return _grammar(field, "json_schema", given[asking[0]] if asking else ANY_OBJECT)
    if kind == "regex":
        if not asking:
            raise InvalidRequest(f"{field}.value: field required", f"{field}.value")
        return _grammar(field, "regex", given["value"])
    place = (asking or there or ["json_schema"])[0]
    wrapped = given if place == "schema" else given.get(place)
    if not isinstance(wrapped, dict) or "schema" not in wrapped:
        raise InvalidRequest(f"{field}.{place}.schema: field required", f"{field}.{place}")
    return _grammar(field, "json_schema", wrapped["schema"])


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
    """A schema as canonical JSON, given as an object or as its text.

    One that lists properties and names no type means an object, as TGI, vLLM and llama.cpp take it; by the letter of
    JSON Schema a number would do as well.
    """
    if isinstance(value, str):
        try:
            value = msgspec.json.decode(value)
        except (msgspec.MsgspecError, RecursionError) as error:
            raise InvalidRequest(f"{field}: the schema is no JSON: {error}", field) from None
    if not isinstance(value, dict | bool):
        raise InvalidRequest(f"{field}: a schema is an object, true or false", field)
    value = without_nulls(value)
    if isinstance(value, dict) and "properties" in value and "type" not in value:
        value = ANY_OBJECT | value
    return msgspec.json.encode(value).decode()


# ---- TGI ----


def read_tgi_grammar(given: Fields | None) -> Grammar | None:
    """TGI's form: {"type": "json", "json_object", "regex" or "json_schema", "value": ...}, refused in its words."""
    if not given:
        return None
    if given.get("value") is None:
        raise _tgi_fault("Grammar must have a 'value' field")
    if given.get("type") not in ("json", "json_object", "json_schema", "regex"):
        kind = given.get("type")
        raise _tgi_fault(f"its type must be json, json_object, json_schema or regex, not {kind!r:.40}")
    try:
        grammar = _typed("grammar", given)
    except InvalidRequest as error:
        raise _tgi_fault(error.message.removeprefix("grammar: ")) from None
    if grammar is None or grammar.kind == "regex":
        return grammar
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
