"""Calls over HTTP in the families' own forms: whole, in a stream, forced, cut, and in the history."""

import json
from typing import Any

import pytest
from fake_api import api, events
from test_reply_calls import FORCED, PLANS, TEMPLATES

ROUTE = "/v1/chat/completions"
ADD: dict[str, Any] = {
    "type": "function",
    "function": {
        "name": "add",
        "parameters": {
            "properties": {"a": {"type": "integer"}, "b": {"enum": ["x", "y"]}, "t": {"type": "string"}},
            "required": ["a", "b"],
            "additionalProperties": False,
        },
    },
}
ASK: dict[str, Any] = {"messages": [{"role": "user", "content": "?"}], "tools": [ADD], "max_tokens": 300}
ARGUMENTS = {"a": 12, "b": "x", "t": "z"}


def template(family: str) -> str:
    """One that speaks of the family's marks and ends in a question."""
    return (
        "{#"
        + TEMPLATES[family].replace("#}", "").replace("{{", "").replace("}}", "")
        + " tools #}{{ messages[-1].content }}"
    )


def called(choice: dict[str, Any]) -> list[tuple[str, Any]]:
    calls = choice["message"].get("tool_calls", [])
    return [(call["function"]["name"], json.loads(call["function"]["arguments"])) for call in calls]


@pytest.mark.parametrize("family", FORCED)
async def test_a_call_is_found_whole_and_joined_from_a_stream(family: str) -> None:
    marks = PLANS[family].form.calls.marks
    async with api(FORCED[family], chat_template=template(family), special=marks) as http:
        whole = (await http.post(ROUTE, json=ASK)).json()["choices"][0]
        stream = events((await http.post(ROUTE, json=ASK | {"stream": True})).text)
        forced = (await http.post(ROUTE, json=ASK | {"tool_choice": "required", "temperature": 0})).json()["choices"][0]
        cut = (await http.post(ROUTE, json=ASK | {"tool_choice": "required", "max_tokens": 3})).json()["choices"][0]
    assert called(whole) == called(forced) == [("add", ARGUMENTS)]
    assert (whole["finish_reason"], forced["finish_reason"]) == ("tool_calls", "tool_calls")
    assert (whole["message"]["content"], forced["message"]["content"]) == (None, None)
    assert (cut["finish_reason"], cut["message"]["content"] or "") == ("length", "")
    pieces = [call for chunk in stream[:-1] for call in chunk["choices"][0]["delta"].get("tool_calls", [])]
    joined = "".join(piece["function"]["arguments"] for piece in pieces)
    assert joined == whole["message"]["tool_calls"][0]["function"]["arguments"]
    assert [piece["function"]["name"] for piece in pieces if "name" in piece["function"]] == ["add"]
    assert {piece["index"] for piece in pieces} == {0}
    assert not any(chunk["choices"][0]["delta"].get("content") for chunk in stream[:-1])


async def test_templates_that_want_ids_of_nine_letters_get_them_in_the_history_too() -> None:
    source = (
        "[TOOL_CALLS] tools {% for m in messages %}{% for c in m.tool_calls or [] %}"
        "{% if c.id | length != 9 %}{{ raise_exception('nine letters') }}{% endif %}{{ c.id }}{% endfor %}"
        "{% if m.tool_call_id %}={{ m.tool_call_id }}{% endif %}{{ m.content }}{% endfor %}"
    )
    call = {"id": "call_0123456789abcdef", "type": "function", "function": {"name": "add", "arguments": "{}"}}
    history = [
        {"role": "assistant", "content": "", "tool_calls": [call]},
        {"role": "tool", "tool_call_id": call["id"], "content": "5"},
        {"role": "user", "content": "?"},
    ]
    async with api('[TOOL_CALLS] [{"name": "add", "arguments": {}}]', chat_template=source) as http:
        answer = (await http.post(ROUTE, json=ASK | {"messages": history, "explain": True})).json()
    made = answer["choices"][0]["message"]["tool_calls"][0]["id"]
    assert len(made) == 9
    assert made.isalnum()
    before, after = answer["explain"]["prompts"][0]["text"].removeprefix("[TOOL_CALLS] tools ").split("=")
    assert after == f"{before}5?"


async def test_a_schema_that_the_form_cannot_hold_is_refused_by_its_field() -> None:
    tool = {"type": "function", "function": {"name": "add", "parameters": {"anyOf": [{"required": ["a"]}]}}}
    async with api("?", chat_template=template("glm")) as http:
        answer = await http.post(ROUTE, json=ASK | {"tools": [tool], "tool_choice": "required"})
    assert answer.status_code == 400
    assert answer.json()["error"]["param"] == "tools"
