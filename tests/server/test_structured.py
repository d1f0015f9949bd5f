"""The names under which clients ask for a shape, and what comes of them over HTTP."""

import json
import re
from typing import Any

import msgspec
import pytest
from fake_api import api, events

from tightrope.engine.errors import InvalidRequest
from tightrope.engine.types import Grammar
from tightrope.server.fields.structured import read_grammar, read_tgi_grammar

SCHEMA = {"type": "object", "properties": {"a": {"type": "integer"}}, "required": ["a"], "additionalProperties": False}
NEUTRAL: dict[str, Any] = {
    "json_schema": {},
    "guided_json": {},
    "guided_regex": "",
    "guided_choice": [],
    "guided_grammar": "",
    "regex_pattern": "",
    "grammar": "",
    "grammar_string": "",
    "structured_outputs": {},
    "response_format": {"type": "text"},
}
ASK = {"messages": [{"role": "user", "content": "?"}], "temperature": 0}


def schema_of(grammar: Grammar | None) -> object:
    assert grammar is not None
    assert grammar.kind == "json_schema"
    return msgspec.json.decode(grammar.text)


@pytest.mark.parametrize(
    "given",
    [
        {"response_format": {"type": "json_schema", "json_schema": {"name": "x", "strict": True, "schema": SCHEMA}}},
        {"response_format": {"type": "json_schema", "schema": SCHEMA}},
        {"response_format": {"type": "json_object", "schema": SCHEMA}},
        {"response_format": {"type": "json_object", "value": SCHEMA}},
        {"response_format": {"type": "json_object", "value": json.dumps(SCHEMA)}},
        {"response_format": {"type": "json", "value": SCHEMA}},
        {"response_format": {"type": "json", "value": json.dumps(SCHEMA)}},
        {"response_format": {"type": "json_schema", "value": {"name": "x", "schema": SCHEMA}}},
        {"grammar": {"type": "json", "value": SCHEMA}},
        {"grammar": {"type": "json_schema", "value": {"schema": SCHEMA}}},
        {"format": SCHEMA},
        {"json_schema": SCHEMA},
        {"guided_json": SCHEMA},
        {"guided_json": json.dumps(SCHEMA)},
        {"structured_outputs": {"json": SCHEMA}},
        NEUTRAL | {"json_schema": SCHEMA, "guided_json": SCHEMA},
    ],
)
def test_a_schema_is_read_under_every_name(given: dict[str, Any]) -> None:
    assert schema_of(read_grammar(given)) == SCHEMA
    assert schema_of(read_tgi_grammar({"type": "json", "value": SCHEMA})) == SCHEMA


@pytest.mark.parametrize(
    "given",
    [
        {"response_format": {"type": "json_object"}},
        {"response_format": {"type": "json"}},
        {"response_format": {"type": "json_object", "value": {}}},
        {"structured_outputs": {"json_object": True}},
        {"format": "json"},
    ],
)
def test_a_json_object_is_any_object(given: dict[str, Any]) -> None:
    assert schema_of(read_grammar(NEUTRAL | given)) == {"type": "object"}


@pytest.mark.parametrize(
    ("given", "grammar"),
    [
        ({"guided_regex": "a+"}, Grammar("regex", "a+", "guided_regex")),
        ({"response_format": {"type": "regex", "value": "a+"}}, Grammar("regex", "a+", "response_format")),
        ({"grammar": {"type": "regex", "value": "a+"}}, Grammar("regex", "a+", "grammar")),
        ({"regex_pattern": "a+"}, Grammar("regex", "a+", "regex_pattern")),
        ({"structured_outputs": {"regex": "a+"}}, Grammar("regex", "a+", "structured_outputs.regex")),
        ({"guided_choice": ["a", "b"]}, Grammar("choice", '["a","b"]', "guided_choice")),
        ({"structured_outputs": {"choice": ["a"]}}, Grammar("choice", '["a"]', "structured_outputs.choice")),
        ({"guided_grammar": "start: /a/"}, Grammar("grammar", "start: /a/", "guided_grammar")),
        ({"grammar": 'root ::= "a"', "grammar_string": 'root ::= "a"'}, Grammar("grammar", 'root ::= "a"', "grammar")),
    ],
)
def test_other_grammars_keep_the_name_they_came_under(given: dict[str, Any], grammar: Grammar) -> None:
    assert read_grammar(NEUTRAL | given) == grammar


def test_neutral_values_ask_for_nothing() -> None:
    assert read_grammar(NEUTRAL) is None
    assert read_grammar(dict.fromkeys(NEUTRAL)) is None
    assert read_grammar({}) is None
    assert read_tgi_grammar(None) is None


@pytest.mark.parametrize(
    ("given", "field"),
    [
        ({"guided_json": SCHEMA, "guided_regex": "a"}, "guided_regex"),
        ({"response_format": {"type": "json_object"}, "json_schema": SCHEMA}, "json_schema"),
        ({"guided_json": 5}, "guided_json"),
        ({"guided_json": "{"}, "guided_json"),
        ({"guided_json": "5"}, "guided_json"),
        ({"guided_regex": ["a"]}, "guided_regex"),
        ({"guided_choice": "a"}, "guided_choice"),
        ({"guided_choice": [1]}, "guided_choice"),
        ({"structured_outputs": "a"}, "structured_outputs"),
        ({"structured_outputs": {"structural_tag": "a"}}, "structured_outputs.structural_tag"),
        ({"response_format": {"type": "xml"}}, "response_format"),
        ({"response_format": {"type": "json_schema", "json_schema": {"name": "x"}}}, "response_format.json_schema"),
        ({"response_format": "json"}, "response_format"),
        ({"response_format": {"type": "regex"}}, "response_format.value"),
        ({"response_format": {"type": "regex", "value": {"a": 1}}}, "response_format"),
        ({"response_format": {"type": "json", "value": "{"}}, "response_format"),
        ({"response_format": {"type": "json_schema", "value": SCHEMA}}, "response_format.value"),
        ({"response_format": {"type": "json_object", "json_schema": {"schema": {}}}}, "response_format.json_schema"),
        ({"response_format": {"json_schema": {"schema": SCHEMA}}}, "response_format.json_schema"),
        ({"response_format": {"type": "text", "value": SCHEMA}}, "response_format.value"),
        ({"response_format": {"type": "json", "schema": SCHEMA, "value": SCHEMA}}, "response_format.value"),
        ({"grammar": {"type": "xml", "value": "a"}}, "grammar"),
        ({"format": "xml"}, "format"),
    ],
)
def test_values_of_a_wrong_form_are_refused_with_the_fields_name(given: dict[str, Any], field: str) -> None:
    with pytest.raises(InvalidRequest) as caught:
        read_grammar(given)
    assert caught.value.param == field
    assert field in caught.value.message


@pytest.mark.parametrize("kind", ["json", "json_object"])
async def test_tgis_response_format_holds_a_chat_to_its_schema_and_a_completion_to_its_expression(kind: str) -> None:
    seven = {"properties": {"zzz": {"const": 7}}, "required": ["zzz"], "additionalProperties": False}
    async with api("fine") as http:
        shape = {"response_format": {"type": kind, "value": seven}}
        chat = (await http.post("/v1/chat/completions", json=ASK | shape)).json()["choices"][0]
        assert json.loads(chat["message"]["content"]) == {"zzz": 7}
        shape = {"response_format": {"type": "regex", "value": "[0-9]{1,3}"}}
        text = (await http.post("/v1/completions", json={"prompt": "?"} | shape)).json()["choices"][0]["text"]
        assert re.fullmatch("[0-9]{1,3}", text)


async def test_a_chat_a_stream_and_a_completion_follow_the_grammar() -> None:
    async with api("fine") as http:
        chat = (await http.post("/v1/chat/completions", json=ASK | {"json_schema": SCHEMA})).json()["choices"][0]
        assert json.loads(chat["message"]["content"]).keys() == {"a"}
        assert chat["finish_reason"] == "stop"
        body = {"prompt": "?", "guided_choice": ["finer", "finest"], "n": 2, "max_tokens": 50}
        choices = (await http.post("/v1/completions", json=body)).json()["choices"]
        assert {choice["text"] for choice in choices} <= {"finer", "finest"}
        stream = events((await http.post("/v1/completions", json=body | {"n": 1, "stream": True})).text)
        assert "".join(chunk["choices"][0]["text"] for chunk in stream[:-1]) in ("finer", "finest")


async def test_neutral_values_leave_the_answer_as_it_is() -> None:
    async with api("fine", chat_template="{{ messages[0].content }}") as http:
        answer = await http.post("/v1/chat/completions", json=ASK | NEUTRAL)
        assert answer.json()["choices"][0]["message"]["content"] == "fine"


@pytest.mark.parametrize(
    ("fields", "param"),
    [
        ({"guided_regex": "(a"}, "guided_regex"),
        ({"regex_pattern": "(a+)+$"}, "regex_pattern"),
        ({"grammar": 'root ::= root "a" | "b"'}, "grammar"),
        ({"json_schema": {"$ref": "#/$defs/x"}}, "json_schema"),
        ({"response_format": {"type": "json_schema", "json_schema": {"schema": {"not": {}}}}}, "response_format"),
        ({"structured_outputs": {"json": {"type": "array", "uniqueItems": True}}}, "structured_outputs.json"),
    ],
)
async def test_a_grammar_that_cannot_be_enforced_is_refused_in_each_apis_shape(
    fields: dict[str, Any], param: str
) -> None:
    async with api("fine") as http:
        for stream in (False, True):
            answer = await http.post("/v1/chat/completions", json=ASK | fields | {"stream": stream})
            assert answer.status_code == 400
            error = answer.json()["error"]
            assert error["param"] == param
            assert error["message"].startswith(f"{param}: ")
        assert (await http.post("/v1/chat/completions", json=ASK)).status_code == 200


async def test_tgi_refuses_a_grammar_in_its_own_words() -> None:
    async with api("fine") as http:
        body = {"inputs": "?", "parameters": {"grammar": {"type": "regex", "value": "(a"}}}
        answer = await http.post("/generate", json=body)
        assert answer.status_code == 422
        assert answer.json()["error"].startswith("Input validation error: grammar is not valid: ")
        (told,) = events((await http.post("/generate_stream", json=body)).text)
        assert told == answer.json()
        good = {"inputs": "?", "parameters": {"grammar": {"type": "regex", "value": "a{3}"}}}
        assert (await http.post("/generate", json=good)).json() == {"generated_text": "aaa"}
