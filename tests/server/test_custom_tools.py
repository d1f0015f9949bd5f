"""Custom tools, which are called with a text: shown as functions, told in OpenAI's form, and back in the history."""

import json
from typing import Any

import httpx
import pytest
from fake_api import api, events

from tightrope.server.replies.input_text import InputText

TEXT = 'print("naïve")\n# a \\ and 😀'
CALL = f'<tool_call>\n{{"name": "run", "arguments": {json.dumps({"input": TEXT})}}}\n</tool_call>'
SHOWS = (
    "{{ tools | tojson }}{% for m in messages %}[{{ m.role }}]{{ m.content }}{% for c in m.tool_calls or [] %}"
    "({{ c.function.name }} {{ c.function.arguments | tojson }}){% endfor %}{% endfor %}?"
)
RUN: dict[str, Any] = {"name": "run", "description": "Runs Python."}
DIGITS = {"syntax": "regex", "definition": "[0-9]{3,5}"}
IN_CHATS = {"type": "custom", "custom": RUN}
IN_RESPONSES = {"type": "custom", **RUN}
PLACE = {"type": "function", "function": {"name": "place", "parameters": {"type": "object", "properties": {"x": {}}}}}
CHAT: dict[str, Any] = {"messages": [{"role": "user", "content": "Go"}], "tools": [IN_CHATS, PLACE], "max_tokens": 300}
RESPONSE: dict[str, Any] = {"input": "Go", "tools": [IN_RESPONSES], "max_output_tokens": 300}


@pytest.mark.parametrize("size", [1, 2, 3, 5, 1000])
def test_the_input_is_taken_out_of_arguments_however_they_are_cut(size: int) -> None:
    arguments = json.dumps({"input": TEXT}).replace("\\u00ef", "ï")
    reader = InputText()
    pieces = [reader.feed(arguments[start : start + size]) for start in range(0, len(arguments), size)]
    assert "".join(pieces) + reader.finish() == TEXT
    other = InputText()
    assert other.feed('{"code": 1}') + other.finish() == '{"code": 1}'


async def test_a_chat_is_told_of_a_custom_call_whole_and_in_a_stream() -> None:
    async with api(f"So.{CALL}", chat_template=SHOWS) as http:
        whole = (await http.post("/v1/chat/completions", json=CHAT | {"explain": True})).json()
        stream = events((await http.post("/v1/chat/completions", json=CHAT | {"stream": True})).text)
    (shown, *_) = json.JSONDecoder().raw_decode(whole["explain"]["prompts"][0]["text"])[0]
    assert (shown["type"], shown["function"]["name"]) == ("function", "run")
    assert list(shown["function"]["parameters"]["properties"]) == ["input"]
    (call,) = whole["choices"][0]["message"]["tool_calls"]
    assert (call["type"], call["custom"]) == ("custom", {"name": "run", "input": TEXT})
    assert whole["choices"][0]["finish_reason"] == "tool_calls"
    deltas = [chunk["choices"][0]["delta"] for chunk in stream[:-1]]
    first, *rest = [delta["tool_calls"][0] for delta in deltas if "tool_calls" in delta]
    assert (first["type"], first["custom"]) == ("custom", {"name": "run", "input": ""})
    assert len(rest) > 5
    assert all(piece.keys() == {"index", "custom"} for piece in rest)
    assert "".join(piece["custom"]["input"] for piece in rest) == TEXT


async def test_a_response_is_told_of_a_custom_call_whole_and_in_a_stream() -> None:
    async with api(CALL, chat_template=SHOWS) as http:
        whole = (await http.post("/v1/responses", json=RESPONSE)).json()
        text = (await http.post("/v1/responses", json=RESPONSE | {"stream": True})).text
    (item,) = whole["output"]
    assert (item["type"], item["name"], item["input"], item["status"]) == ("custom_tool_call", "run", TEXT, "completed")
    assert whole["tools"] == [IN_RESPONSES]
    stream = [json.loads(line.removeprefix("data: ")) for line in text.splitlines() if line.startswith("data: ")]
    added = next(event["item"] for event in stream if event["type"] == "response.output_item.added")
    assert (added["type"], added["input"], added["status"]) == ("custom_tool_call", "", "in_progress")
    grown = [event for event in stream if event["type"] == "response.custom_tool_call_input.delta"]
    assert len(grown) > 5
    assert "".join(event["delta"] for event in grown) == TEXT
    (done,) = [event for event in stream if event["type"] == "response.custom_tool_call_input.done"]
    assert (done["input"], done["item_id"], done["output_index"]) == (TEXT, added["id"], 0)
    assert stream[-1]["response"]["output"][0] == item | {"id": added["id"], "call_id": added["call_id"]}


async def test_a_regex_is_enforced_of_a_forced_call_and_of_a_free_one() -> None:
    form = {"type": "grammar", "grammar": DIGITS}
    tools = [{"type": "custom", "custom": RUN | {"format": form}}]
    choice = {"type": "custom", "custom": {"name": "run"}}
    async with api("no calls from me", chat_template=SHOWS) as http:
        made = (await http.post("/v1/chat/completions", json=CHAT | {"tools": tools, "tool_choice": choice})).json()
        responses_tool = IN_RESPONSES | {"format": {"type": "grammar", **DIGITS}}
        fields = {"tools": [responses_tool], "tool_choice": {"type": "custom", "name": "run"}}
        response = (await http.post("/v1/responses", json=RESPONSE | fields)).json()
    for text in (made["choices"][0]["message"]["tool_calls"][0]["custom"]["input"], response["output"][0]["input"]):
        assert text.isdecimal()
        assert 3 <= len(text) <= 5
    async with api(CALL, chat_template=SHOWS) as http:
        free = (await http.post("/v1/chat/completions", json=CHAT | {"tools": tools})).json()["choices"][0]["message"]
    assert free["tool_calls"][0]["custom"]["input"].isdecimal()


async def test_custom_calls_of_the_history_are_shown_as_their_functions() -> None:
    call = {"id": "call_1", "type": "custom", "custom": {"name": "run", "input": "1 + 1"}}
    turns = [
        {"role": "user", "content": "Go"},
        {"role": "assistant", "content": None, "tool_calls": [call]},
        {"role": "tool", "tool_call_id": "call_1", "content": "2"},
    ]
    items = [
        {"role": "user", "content": "Go"},
        {"type": "custom_tool_call", "id": "ctc_1", "call_id": "call_1", "name": "run", "input": "1 + 1"},
        {"type": "custom_tool_call_output", "call_id": "call_1", "output": "2"},
    ]
    async with api("Two.", chat_template=SHOWS) as http:
        chat = (await http.post("/v1/chat/completions", json=CHAT | {"messages": turns, "explain": True})).json()
        response = (await http.post("/v1/responses", json=RESPONSE | {"input": items, "explain": True})).json()
    for told in (chat, response):
        assert '(run {"input": "1 + 1"})[tool]2?' in told["explain"]["prompts"][0]["text"]


async def refused(http: httpx.AsyncClient, path: str, body: dict[str, Any]) -> str:
    reply = await http.post(path, json=body)
    assert reply.status_code == 400, reply.text
    return str(reply.json()["error"]["message"])


async def test_what_a_custom_tool_cannot_be_is_refused_by_name() -> None:
    lark = {"syntax": "lark", "definition": "start: WORD"}
    async with api(chat_template=SHOWS) as http:
        for form, word in (
            ({"type": "grammar", "grammar": lark}, "Lark"),
            ({"type": "grammar", "grammar": {"syntax": "regex"}}, "definition"),
            ({"type": "grammar", "grammar": {"syntax": "regex", "definition": "(" * 9}}, "tools[0]"),
            ({"type": "json"}, "format"),
        ):
            tool = {"type": "custom", "custom": RUN | {"format": form}}
            told = await refused(http, "/v1/chat/completions", CHAT | {"tools": [tool]})
            assert word in told
            assert "tools[0]" in told
        lark_tool = IN_RESPONSES | {"format": {"type": "grammar", **lark}}
        assert "tools[0]: format: a Lark" in await refused(http, "/v1/responses", RESPONSE | {"tools": [lark_tool]})
        assert "name" in await refused(
            http, "/v1/chat/completions", CHAT | {"tools": [{"type": "custom", "custom": {}}]}
        )
        assert "custom" in await refused(http, "/v1/chat/completions", CHAT | {"tools": [{"type": "custom"}]})
        other = {"type": "namespace", "name": "crm", "tools": []}
        assert "namespace is no tool" in await refused(http, "/v1/responses", RESPONSE | {"tools": [other]})
        assert "tools[0]" in await refused(http, "/v1/chat/completions", CHAT | {"tools": [other]})
