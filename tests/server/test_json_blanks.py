"""JSON under a schema: no tokens for blanks, and what becomes of constraints that can't be enforced."""

import json
import re
from collections.abc import AsyncIterator
from typing import Any

import httpx
import pytest
from fake_api import api
from fakes import ByteTokenizer

from tightrope.engine.errors import InvalidRequest
from tightrope.engine.guided.grammar import Grammars
from tightrope.engine.guided.json_schema import lark_of_schema
from tightrope.engine.guided.loosening import loosened
from tightrope.engine.types import Grammar

GRAMMARS = Grammars(ByteTokenizer())
SCHEMA = {
    "type": "object",
    "properties": {"a": {"type": "integer"}, "b": {"type": "array", "items": {"type": "integer"}}},
    "required": ["a", "b"],
    "additionalProperties": False,
}
DECIMAL = r"^(?!^[-+.]*$)[+-]?0*\d*\.?\d*$"
UNENFORCED: dict[str, dict[str, Any]] = {
    "uniqueItems": {"type": "array", "items": {"type": "integer"}, "uniqueItems": True},
    "format": {"type": "string", "format": "binary"},
    "pattern": {"type": "string", "pattern": DECIMAL},
    "not": {"type": "integer", "not": {"const": 7}},
}
CHAT = {"messages": [{"role": "user", "content": "A number"}], "max_tokens": 60, "temperature": 1.0, "seed": 3}


def of(field: dict[str, Any]) -> dict[str, Any]:
    return {"type": "object", "properties": {"a": field}, "required": ["a"], "additionalProperties": False}


@pytest.fixture
async def http() -> AsyncIterator[httpx.AsyncClient]:
    async with api(chat_template="{{ messages[0].content }}?") as http:
        yield http


def takes(text: str, *, is_compact: bool) -> bool:
    """Whether a whole text may be written under the schema."""
    matcher = GRAMMARS.matcher(Grammar("json_schema", json.dumps(SCHEMA), "format", is_compact))
    for byte in text.encode():
        matcher.append(byte)
    return matcher.error is None and matcher.native.is_accepting()


@pytest.mark.parametrize(
    ("text", "by_default"),
    [
        ('{"a":1,"b":[1,2]}', True),
        ('{"a": 1, "b": [1, 2]}', True),
        ('{ "a": 1, "b": [ 1, 2 ] }', True),
        ('{\n  "a": 1,\n  "b": [\n    1,\n    2\n  ]\n}', True),
        ('{\n\t"a": 1,\n\t"b": []\n}', True),
        ('{  "a":1,"b":[]}', False),
        ('{"a":1,"b":[  ]}', False),
        ('{"a":1,\n\n"b":[]}', False),
        ('{"a":1,\n  \n"b":[]}', False),
        ('{"a":1, \n"b":[]}', False),
        ('{"a":1,"b":[]} ', False),
        (' {"a":1,"b":[]}', False),
    ],
)
def test_a_place_between_parts_has_one_blank_or_one_indented_line_at_most(text: str, by_default: bool) -> None:
    assert takes(text, is_compact=False) == by_default
    assert takes(text, is_compact=True) == (" " not in text and "\n" not in text)


@pytest.mark.parametrize(
    "fields",
    [
        {"response_format": {"type": "json_schema", "json_schema": {"name": "n", "schema": SCHEMA}}},
        {"guided_json": SCHEMA},
        {"json_schema": SCHEMA},
        {"structured_outputs": {"json": SCHEMA}},
    ],
    ids=lambda fields: next(iter(fields)),
)
async def test_the_compact_form_is_to_be_had_by_every_name(http: httpx.AsyncClient, fields: dict[str, Any]) -> None:
    bias = {str(ord(blank)): 90 for blank in " \n"} | {"98": 30, "49": 20, "44": -5}
    for compact in (False, True):
        body = CHAT | {"temperature": 0, "logit_bias": bias, "disable_any_whitespace": compact} | fields
        text = (await http.post("/v1/chat/completions", json=body)).json()["choices"][0]["message"]["content"]
        assert (" " in text or "\n" in text) != compact, text
        assert re.search(r"[ \n][ \n]{2}|  ", re.sub(r"\n[ \t]*", "", text)) is None
    inside = {"structured_outputs": {"json": SCHEMA, "disable_any_whitespace": True}}
    body = CHAT | {"temperature": 0, "logit_bias": bias} | inside
    reply = (await http.post("/v1/chat/completions", json=body)).json()
    assert " " not in reply["choices"][0]["message"]["content"]


@pytest.mark.parametrize("keyword", UNENFORCED)
async def test_what_cannot_be_enforced_is_refused_by_its_name_unless_the_client_allows_it(
    http: httpx.AsyncClient, keyword: str
) -> None:
    schema = of(UNENFORCED[keyword])
    wrapped = {"name": "n", "schema": schema}
    tool = {"name": "f", "parameters": schema}
    forced = {"tool_choice": "required"}
    for fields, field, allowed in (
        ({"response_format": {"type": "json_schema", "json_schema": wrapped}}, "response_format", None),
        (
            {"response_format": {"type": "json_schema", "json_schema": wrapped | {"strict": True}}},
            "response_format",
            {"response_format": {"type": "json_schema", "json_schema": wrapped | {"strict": False}}},
        ),
        ({"guided_json": schema}, "guided_json", {"guided_json": schema, "lenient_schema": True}),
        (
            {"tools": [{"type": "function", "function": tool}]} | forced,
            "tools[0].function.parameters",
            {"tools": [{"type": "function", "function": tool | {"strict": False}}]} | forced,
        ),
    ):
        refused = await http.post("/v1/chat/completions", json=CHAT | fields)
        error = refused.json()["error"]
        assert (refused.status_code, error["param"]) == (400, field)
        assert f"#/properties/a: the {'keyword' if keyword in ('uniqueItems', 'not') else keyword}" in error["message"]
        assert "%json" not in error["message"]
        if allowed is not None:
            served = await http.post("/v1/chat/completions", json=CHAT | allowed | {"explain": True, "max_tokens": 200})
            assert served.status_code == 200, served.text
            bent = served.json()["explain"]["bent"]
            wanted = {"field": field, "how": f"served without #/properties/a/{keyword}"}
            assert wanted in bent or field.startswith("tools")


def test_what_is_left_out_of_a_schema_is_told_and_the_rest_stays() -> None:
    schema = {"oneOf": [of(part) for part in UNENFORCED.values()], "enum": [{"uniqueItems": True}]}
    made, places = loosened(schema)
    assert len(places) == 1 + len(UNENFORCED)
    assert made["enum"] == schema["enum"]
    assert [next(iter(part["properties"].values()))["type"] for part in made["anyOf"]] == [
        field["type"] for field in UNENFORCED.values()
    ]
    GRAMMARS.matcher(Grammar("json_schema", json.dumps({"anyOf": made["anyOf"]}), "format"))
    idle = of({"type": "array", "items": {"type": "integer"}, "uniqueItems": False})
    GRAMMARS.matcher(Grammar("json_schema", json.dumps(idle), "format"))


def test_the_library_shows_no_grammar_of_ours_in_its_reasons() -> None:
    overlapping = of({"oneOf": [{"type": "integer"}, {"type": "number"}]})
    for kind, text in (
        ("json_schema", json.dumps(overlapping)),
        ("lark", "start: " + lark_of_schema(overlapping, is_compact=True)),
        ("lark", "start: " + lark_of_schema(of({"type": "string", "format": "binary"}), is_compact=True)),
    ):
        with pytest.raises(InvalidRequest) as caught:
            GRAMMARS.matcher(Grammar(kind, text, "format"))
        assert "%json" not in caught.value.message
        assert "start" not in caught.value.message
