"""Structured output and tools from the real server and the real model, as the openai package asks for them."""

import json
import re
from collections.abc import Iterator
from typing import Literal

import jsonschema
import openai
import pytest
from openai.types.chat import ChatCompletionMessageParam, ChatCompletionToolParam
from pydantic import BaseModel

MODEL = "tgi"
ASK: list[ChatCompletionMessageParam] = [{"role": "user", "content": "Describe the weather in Oslo for a day or two."}]
PARAMETERS: dict[str, object] = {
    "type": "object",
    "properties": {
        "city": {"type": "string", "maxLength": 20},
        "days": {"type": "integer", "minimum": 1, "maximum": 9},
    },
    "required": ["city", "days"],
    "additionalProperties": False,
}
WEATHER: ChatCompletionToolParam = {"type": "function", "function": {"name": "get_weather", "parameters": PARAMETERS}}


class Forecast(BaseModel):
    """A pydantic model, from which the package makes a strict schema."""

    sky: Literal["sunny", "cloudy", "rain"]
    warm: bool


@pytest.fixture(scope="module")
def client(server_url: str) -> Iterator[openai.OpenAI]:
    with openai.OpenAI(base_url=f"{server_url}/v1", api_key="none", max_retries=0) as client:
        yield client


def test_the_package_parses_an_answer_into_a_pydantic_model(client: openai.OpenAI) -> None:
    answer = client.chat.completions.parse(
        model=MODEL, messages=ASK, response_format=Forecast, n=2, seed=1, max_tokens=80
    )
    assert all(isinstance(choice.message.parsed, Forecast) for choice in answer.choices)
    assert {choice.finish_reason for choice in answer.choices} == {"stop"}


def test_a_schema_holds_in_a_stream_too(client: openai.OpenAI) -> None:
    stream = client.chat.completions.create(
        model=MODEL,
        messages=ASK,
        response_format={"type": "json_schema", "json_schema": {"name": "call", "schema": PARAMETERS, "strict": True}},
        temperature=1.5,
        seed=2,
        max_tokens=120,
        stream=True,
    )
    text = "".join(chunk.choices[0].delta.content or "" for chunk in stream)
    jsonschema.validate(json.loads(text), PARAMETERS)


def test_the_extensions_of_other_servers_hold(client: openai.OpenAI) -> None:
    def ask(**fields: object) -> str:
        answer = client.completions.create(
            model=MODEL, prompt="My lucky number is", max_tokens=40, temperature=1.3, seed=3, extra_body=fields
        )
        assert answer.choices[0].finish_reason == "stop"
        return answer.choices[0].text

    assert re.fullmatch("[1-9][0-9]{0,2}!", ask(guided_regex="[1-9][0-9]{0,2}!"))
    assert ask(guided_choice=["seven", "eight"]) in ("seven", "eight")
    assert re.fullmatch("(a|bc)-{2}", ask(grammar='root ::= ("a" | "bc") "-"{2}'))
    assert re.fullmatch("(a|bc)--", ask(structured_outputs={"grammar": 'start: ("a" | "bc") "--"'}))


def test_a_required_call_is_made(client: openai.OpenAI) -> None:
    answer = client.chat.completions.create(
        model=MODEL, messages=ASK, tools=[WEATHER], tool_choice="required", parallel_tool_calls=False, seed=4
    )
    (choice,) = answer.choices
    assert choice.finish_reason == "tool_calls"
    (call,) = choice.message.tool_calls or []
    assert call.type == "function"
    assert call.function.name == "get_weather"
    jsonschema.validate(json.loads(call.function.arguments), PARAMETERS)

    result: list[ChatCompletionMessageParam] = [
        *ASK,
        {
            "role": "assistant",
            "tool_calls": [
                {
                    "id": call.id,
                    "type": "function",
                    "function": {"name": "get_weather", "arguments": call.function.arguments},
                }
            ],
        },
        {"role": "tool", "tool_call_id": call.id, "content": "Rain, 9 degrees."},
    ]
    after = client.chat.completions.create(
        model=MODEL, messages=result, tools=[WEATHER], tool_choice="none", max_tokens=20
    )
    assert after.choices[0].message.content


def test_the_packages_stream_helper_rebuilds_a_named_call(client: openai.OpenAI) -> None:
    with client.chat.completions.stream(
        model=MODEL,
        messages=ASK,
        tools=[WEATHER],
        tool_choice={"type": "function", "function": {"name": "get_weather"}},
        seed=5,
    ) as stream:
        pieces = [event for event in stream if event.type == "tool_calls.function.arguments.delta"]
        final = stream.get_final_completion()
    (call,) = final.choices[0].message.tool_calls or []
    assert len(pieces) > 2, "arguments come while they are written"
    assert "".join(piece.arguments_delta for piece in pieces) == call.function.arguments
    jsonschema.validate(json.loads(call.function.arguments), PARAMETERS)
    assert final.choices[0].finish_reason == "tool_calls"


@pytest.mark.parametrize(
    ("schema", "reason"),
    [
        ({"type": "array", "uniqueItems": True}, "the keyword 'uniqueItems' can't be enforced"),
        ({"$ref": "#/$defs/missing"}, "leads to no schema"),
    ],
)
def test_a_schema_that_cannot_be_enforced_is_refused(
    client: openai.OpenAI, schema: dict[str, object], reason: str
) -> None:
    with pytest.raises(openai.BadRequestError, match=reason):
        client.chat.completions.create(
            model=MODEL,
            messages=ASK,
            response_format={"type": "json_schema", "json_schema": {"name": "x", "schema": schema}},
        )
