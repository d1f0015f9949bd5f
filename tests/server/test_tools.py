"""Tools over HTTP, with a model made of rules."""

import json
from typing import Any

import jsonschema
import pytest
from fake_api import api, events

SCHEMA: dict[str, Any] = {
    "type": "object",
    "properties": {"city": {"enum": ["Oslo", "Rome"]}, "days": {"type": "integer", "minimum": 1, "maximum": 9}},
    "required": ["city", "days"],
    "additionalProperties": False,
}
WEATHER: dict[str, Any] = {"type": "function", "function": {"name": "get_weather", "parameters": SCHEMA}}
PING: dict[str, Any] = {"type": "function", "function": {"name": "ping", "description": "Says whether it answers."}}
ASK: dict[str, Any] = {"messages": [{"role": "user", "content": "?"}], "tools": [WEATHER, PING], "max_tokens": 300}
SHOWS_TOOLS = "{{ tools | tojson }}{{ messages[0].content }}"  # ends in "?", after which the fake model answers
PLAIN = "{{ messages[-1].content }}"
ONE = '<tool_call>\n{"name": "get_weather", "arguments": {"city": "Rome", "days": 2}}\n</tool_call>'
NAMED = {"type": "function", "function": {"name": "get_weather"}}


@pytest.mark.parametrize("choice", ["required", NAMED])
@pytest.mark.parametrize("parallel", [True, False])
async def test_a_forced_call_is_made_and_valid_whatever_the_model_wants(choice: object, parallel: bool) -> None:
    fields = {"tool_choice": choice, "parallel_tool_calls": parallel, "n": 2, "seed": 3, "max_tokens": 900}
    async with api("no calls from me", chat_template=PLAIN, max_model_len=4096) as http:
        for choice_ in (await http.post("/v1/chat/completions", json=ASK | fields)).json()["choices"]:
            message = choice_["message"]
            assert choice_["finish_reason"] == "tool_calls"
            assert message["content"] is None
            assert len({call["id"] for call in message["tool_calls"]}) == len(message["tool_calls"])
            for call in message["tool_calls"]:
                assert call["type"] == "function"
                if call["function"]["name"] == "get_weather":
                    jsonschema.validate(json.loads(call["function"]["arguments"]), SCHEMA)
            if choice is NAMED or not parallel:
                assert len(message["tool_calls"]) == 1


async def test_a_call_that_the_model_decides_on_is_found_whole_and_in_a_stream() -> None:
    async with api(f"Let me look.\n{ONE}", chat_template=SHOWS_TOOLS) as http:
        whole = (await http.post("/v1/chat/completions", json=ASK)).json()["choices"][0]
        stream = events((await http.post("/v1/chat/completions", json=ASK | {"stream": True})).text)
    assert whole["finish_reason"] == "tool_calls"
    assert whole["message"]["content"] == "Let me look.\n"
    (call,) = whole["message"]["tool_calls"]
    assert call["function"] == {"name": "get_weather", "arguments": '{"city": "Rome", "days": 2}'}
    deltas = [chunk["choices"][0]["delta"] for chunk in stream[:-1]]
    assert "".join(delta.get("content", "") for delta in deltas) == "Let me look.\n"
    first, *rest = [delta["tool_calls"][0] for delta in deltas if "tool_calls" in delta]
    assert first["function"] == {"name": "get_weather", "arguments": ""}
    assert first["type"] == "function"
    assert first["id"].startswith("call_")
    assert len(rest) > 5, "arguments come while they are written"
    assert all(piece.keys() == {"index", "function"} for piece in rest)
    assert "".join(piece["function"]["arguments"] for piece in rest) == call["function"]["arguments"]
    assert stream[-2]["choices"][0]["finish_reason"] == "tool_calls"


async def test_text_stays_text_and_tools_that_are_off_are_not_shown() -> None:
    async with api(ONE, chat_template=SHOWS_TOOLS) as http:
        off = (await http.post("/v1/chat/completions", json=ASK | {"tool_choice": "none"})).json()
        assert off["choices"][0]["message"] == {"role": "assistant", "content": ONE}
        assert off["choices"][0]["finish_reason"] == "stop"
        shown = (await http.post("/v1/chat/completions", json=ASK)).json()
    assert shown["usage"]["prompt_tokens"] > off["usage"]["prompt_tokens"] + len(json.dumps(WEATHER))
    async with api("It rains.", chat_template=SHOWS_TOOLS) as http:
        free = (await http.post("/v1/chat/completions", json=ASK)).json()["choices"][0]
    assert free["message"] == {"role": "assistant", "content": "It rains."}


async def test_one_call_is_made_where_no_more_are_wanted() -> None:
    async with api(f"{ONE}\n{ONE}", chat_template=SHOWS_TOOLS) as http:
        both = (await http.post("/v1/chat/completions", json=ASK)).json()["choices"][0]["message"]
        one = (await http.post("/v1/chat/completions", json=ASK | {"parallel_tool_calls": False})).json()["choices"][0]
    assert len(both["tool_calls"]) == 2
    assert len(one["message"]["tool_calls"]) == 1
    assert one["finish_reason"] == "tool_calls"


async def test_a_strict_function_gets_valid_arguments_even_when_the_model_is_free() -> None:
    wrong = ONE.replace('"Rome"', '"Paris"')
    strict = {"type": "function", "function": WEATHER["function"] | {"strict": True}}
    async with api(wrong, chat_template=SHOWS_TOOLS) as http:
        free = (await http.post("/v1/chat/completions", json=ASK)).json()["choices"][0]["message"]
        bound = (await http.post("/v1/chat/completions", json=ASK | {"tools": [strict], "temperature": 0})).json()
    assert json.loads(free["tool_calls"][0]["function"]["arguments"])["city"] == "Paris"
    (call,) = bound["choices"][0]["message"]["tool_calls"][:1]
    jsonschema.validate(json.loads(call["function"]["arguments"]), SCHEMA)


@pytest.mark.parametrize(
    ("fields", "param"),
    [
        ({"tools": [{"type": "function"}]}, "tools[0].function"),
        ({"tools": [{"type": "tool", "function": {"name": "f"}}]}, "tools[0].type"),
        ({"tools": [{"type": "function", "function": {"name": 5}}]}, "tools[0].function.name"),
        ({"tools": [{"type": "function", "function": {"name": "a b"}}]}, "tools[0].function.name"),
        ({"tool_choice": "required", "guided_regex": "a"}, "guided_regex"),
        ({"tool_choice": "maybe"}, "tool_choice"),
    ],
)
async def test_a_tool_that_is_none_is_refused_with_its_place(fields: dict[str, Any], param: str) -> None:
    async with api("fine", chat_template=PLAIN) as http:
        answer = await http.post("/v1/chat/completions", json=ASK | fields)
    assert answer.status_code == 400
    assert answer.json()["error"]["param"] == param
