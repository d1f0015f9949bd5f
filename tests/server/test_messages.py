"""Anthropic's Messages API: blocks in and out, the order of a stream's events, tools, thinking, and its errors."""

import json

import httpx
import jsonschema
import pytest
from fake_api import api
from turns_api import CALL, PLAIN, PORT, THINK, TURNS, Json, named_events

ROUTE = "/v1/messages"
TEMPLATE = TURNS + (
    "{% if add_generation_prompt %}{{ '[thinks]' if enable_thinking }}"
    "{{ '[' ~ reasoning_effort ~ ']' if reasoning_effort and reasoning_effort != 'none' }}?{% endif %}"
)
TIDE: Json = {"name": "tide", "input_schema": PORT}
USER: Json = {"role": "user", "content": "Tide in Hull"}
ASK: Json = {"model": "claude-x", "messages": [USER], "max_tokens": 200, "temperature": 0}
ON: Json = {"thinking": {"type": "adaptive"}}


def joined(told: list[Json]) -> tuple[list[Json], Json]:
    """The blocks that a stream's events make, and its end; checks that blocks come one after the other."""
    assert [event["type"] for event in told[:2]] == ["message_start", "ping"]
    assert [event["type"] for event in told[-2:]] == ["message_delta", "message_stop"]
    blocks: list[Json] = []
    is_open = False
    for event in told[2:-2]:
        assert is_open is (event["type"] != "content_block_start")
        is_open = event["type"] != "content_block_stop"
        if event["type"] == "content_block_start":
            blocks.append({**event["content_block"]})
            if "input" in blocks[-1]:
                blocks[-1]["input"] = ""
        assert event["index"] == len(blocks) - 1
        if event["type"] == "content_block_delta":
            key = {"input_json_delta": "partial_json"}.get(event["delta"]["type"], event["delta"]["type"][:-6])
            name = "input" if key == "partial_json" else key
            blocks[-1][name] += event["delta"][key]
    for block in blocks:
        if "input" in block:
            block["input"] = json.loads(block["input"])
    return blocks, told[-2]


async def both(http: httpx.AsyncClient, body: Json) -> tuple[Json, list[Json]]:
    """The whole answer and the events of the same one streamed, which have to make the same."""
    reply = await http.post(ROUTE, json=body)
    assert reply.status_code == 200, reply.text
    whole = reply.json()
    told = named_events(await http.post(ROUTE, json=body | {"stream": True}))
    blocks, end = joined(told)
    for block, other in zip(whole["content"], blocks, strict=True):
        assert block | {"id": ""} == other | {"id": ""}
    assert end["delta"] == {name: whole[name] for name in ("stop_reason", "stop_sequence")}
    assert end["usage"]["output_tokens"] == whole["usage"]["output_tokens"]
    return whole, told


async def prompt_of(http: httpx.AsyncClient, body: Json) -> str:
    reply = await http.post(ROUTE, json=ASK | body | {"explain": True})
    assert reply.status_code == 200, reply.text
    text: str = reply.json()["explain"]["prompts"][0]["text"]
    return text.removeprefix("<s>")


async def test_a_text_comes_as_a_block_whole_and_in_events() -> None:
    async with api("fine", chat_template=TEMPLATE) as http:
        whole, told = await both(http, ASK | {"system": "Be brief.", "metadata": {"user_id": "me"}})
    assert whole["content"] == [{"type": "text", "text": "fine"}]
    assert (whole["type"], whole["role"], whole["stop_reason"]) == ("message", "assistant", "end_turn")
    assert whole["usage"]["output_tokens"] == len("fine") + 1
    start, again = told[0]["message"], told[-2]["usage"]
    assert (start["content"], start["stop_reason"], start["model"]) == ([], None, "fake")
    assert start["usage"]["input_tokens"] == again["input_tokens"] == 1
    assert again["cache_read_input_tokens"] + 1 == whole["usage"]["input_tokens"], "the prompt is both together"


async def test_thinking_comes_in_a_block_of_its_own_where_it_is_asked_for() -> None:
    async with api("<think>\nHm.\n</think>\n\nYes.", chat_template=TEMPLATE, special=THINK) as http:
        whole, told = await both(http, ASK | ON)
        silent, _ = await both(http, ASK | {"thinking": {"type": "disabled"}})
        unasked, _ = await both(http, ASK)
        between, _ = await both(http, ASK | {"thinking": {"type": "between_tools"}})
        hidden, _ = await both(http, ASK | {"thinking": {"type": "adaptive", "display": "omitted"}})
    thought, text = whole["content"]
    assert (thought["type"], thought["thinking"], text) == ("thinking", "Hm.", {"type": "text", "text": "Yes."})
    assert thought["signature"]
    deltas = [event["delta"]["type"] for event in told if event["type"] == "content_block_delta"]
    assert deltas[:3] == ["thinking_delta"] * 3
    assert deltas[3] == "signature_delta"
    assert silent["content"] == between["content"] == [text]
    assert unasked["content"] == whole["content"]
    assert whole["usage"]["output_tokens_details"]["thinking_tokens"] == len("\nHm.") + 1
    assert hidden["content"][0]["thinking"] == ""
    assert hidden["content"][0]["signature"] != thought["signature"]


async def test_thinking_and_effort_reach_the_template_and_a_budget_bounds_them() -> None:
    async with api("<think>" + "Hm. " * 20 + "</think>Yes.", chat_template=TEMPLATE, special=THINK) as http:
        assert await prompt_of(http, {}) == "[user]Tide in Hull?"
        assert await prompt_of(http, ON) == "[user]Tide in Hull[thinks]?"
        effort = {"output_config": {"effort": "high"}}
        assert await prompt_of(http, ON | effort) == "[user]Tide in Hull[thinks][high]?"
        budget = {"thinking": {"type": "enabled", "budget_tokens": 7}}
        bounded = (await http.post(ROUTE, json=ASK | budget)).json()
    assert bounded["content"][0]["thinking"] == "Hm. Hm."
    async with api("Yes.", chat_template="{{ messages[-1].content }}?") as http:
        reply = (await http.post(ROUTE, json=ASK | budget | effort | {"explain": True})).json()
    assert [one["field"] for one in reply["explain"]["ignored"]] == ["output_config.effort", "thinking"]


async def test_thoughts_go_back_into_the_history() -> None:
    hide = {"thinking": {"type": "adaptive", "display": "omitted"}}
    async with api("<think>Hé.</think>Yes.", chat_template=TEMPLATE, special=THINK) as http:
        for body in (ON, hide):
            content = (await http.post(ROUTE, json=ASK | body)).json()["content"]
            turns = [USER, {"role": "assistant", "content": content}, {"role": "user", "content": "So"}]
            told = await prompt_of(http, {"messages": turns})
            assert told == "[user]Tide in Hull[assistant]<think>Hé.</think>Yes.[user]So?"
        turns[1]["content"] = [{"type": "redacted_thinking", "data": "x"}, {"type": "text", "text": "Yes."}]
        assert await prompt_of(http, {"messages": turns}) == "[user]Tide in Hull[assistant]Yes.[user]So?"


async def test_tools_are_used_whole_and_in_events() -> None:
    async with api(f"Let me look.\n{CALL}\n{CALL}", chat_template=TEMPLATE) as http:
        whole, told = await both(http, ASK | {"tools": [TIDE]})
        choice = {"tool_choice": {"type": "auto", "disable_parallel_tool_use": True}}
        one = (await http.post(ROUTE, json=ASK | {"tools": [TIDE]} | choice)).json()
        none = (await http.post(ROUTE, json=ASK | {"tools": [TIDE], "tool_choice": {"type": "none"}})).json()
    text, use, _ = whole["content"]
    assert text == {"type": "text", "text": "Let me look.\n"}
    assert (use["type"], use["name"], use["input"]) == ("tool_use", "tide", {"port": "Hull"})
    assert whole["stop_reason"] == "tool_use"
    pieces = [event for event in told if event.get("delta", {}).get("type") == "input_json_delta"]
    assert len(pieces) > 10, "arguments come while they are written"
    assert [block["type"] for block in one["content"]] == ["text", "tool_use"]
    assert [block["type"] for block in none["content"]] == ["text"]


@pytest.mark.parametrize("choice", [{"type": "any"}, {"type": "tool", "name": "tide"}])
async def test_a_tool_has_to_be_used_where_that_is_asked_for(choice: Json) -> None:
    async with api("no calls from me", chat_template=PLAIN, max_model_len=4096) as http:
        body = ASK | {"tools": [TIDE], "tool_choice": choice, "max_tokens": 2000, "temperature": 1, "seed": 3}
        reply = (await http.post(ROUTE, json=body)).json()
    assert {block["type"] for block in reply["content"]} == {"tool_use"}
    for block in reply["content"]:
        jsonschema.validate(block["input"], TIDE["input_schema"])


async def test_results_of_tools_are_messages_of_their_own() -> None:
    turns: list[Json] = [
        USER,
        {
            "role": "assistant",
            "content": [
                {"type": "text", "text": "Look."},
                {"type": "tool_use", "id": "t1", "name": "tide", "input": {"port": "Hull"}},
                {"type": "tool_use", "id": "t2", "name": "tide", "input": {"port": "Rome"}},
            ],
        },
        {
            "role": "user",
            "content": [
                {"type": "tool_result", "tool_use_id": "t1", "content": "High at 9", "cache_control": {"type": "x"}},
                {
                    "type": "tool_result",
                    "tool_use_id": "t2",
                    "is_error": True,
                    "content": [{"type": "text", "text": "?"}],
                },
                {"type": "text", "text": "And"},
            ],
        },
    ]
    system = [
        {"type": "text", "text": "Kind.", "cache_control": {"type": "ephemeral"}},
        {"type": "text", "text": "Brief."},
    ]
    async with api("fine", chat_template=TEMPLATE) as http:
        told = await prompt_of(http, {"messages": turns, "system": system, "tools": [TIDE]})
    assert told == (
        "<tide>[system](Kind.)(Brief.)[user]Tide in Hull[assistant]Look.(t1 tide Hull)(t2 tide Rome)"
        "[tool tide t1]High at 9[tool tide t2]Error: ?[user]And?"
    )


async def test_what_a_client_tells_its_own_server_first_is_no_system_message() -> None:
    system = [{"type": "text", "text": "x-anthropic-billing-header: cch=1;"}, {"type": "text", "text": "Kind."}]
    async with api("fine", chat_template=TEMPLATE) as http:
        assert await prompt_of(http, {"system": system}) == "[system]Kind.[user]Tide in Hull?"


async def test_an_answer_goes_on_with_what_the_client_has_begun() -> None:
    turns = [USER, {"role": "assistant", "content": "It is?"}]
    async with api("fine", chat_template=TEMPLATE) as http:
        whole, _ = await both(http, ASK | {"messages": turns})
        told = await prompt_of(http, {"messages": turns})
    assert told == "[user]Tide in Hull[assistant]It is?"
    assert whole["content"] == [{"type": "text", "text": "fine"}]


@pytest.mark.parametrize(
    ("source", "text"),
    [
        ({"type": "text", "media_type": "text/plain", "data": "High at 9."}, "High at 9."),
        ({"type": "content", "content": "High at 9."}, "High at 9."),
        (
            {"type": "content", "content": [{"type": "text", "text": "High"}, {"type": "text", "text": "at 9."}]},
            "High\nat 9.",
        ),
        ({"type": "base64", "media_type": "application/pdf", "data": "aGk="}, None),
        ({"type": "content", "content": [{"type": "image"}]}, None),
        ({"type": "url", "url": "http://127.0.0.1/x"}, None),
        (None, None),
    ],
    ids=str,
)
async def test_a_document_of_text_is_its_text_behind_its_title(source: object, text: str | None) -> None:
    document = {"type": "document", "source": source, "title": "Tides", "citations": {"enabled": True}}
    body = ASK | {"messages": [{"role": "user", "content": [document, None, {"type": "text", "text": "When"}]}]}
    async with api(chat_template=TEMPLATE) as http:
        if text is not None:
            assert f"Tides\n\n{text}" in await prompt_of(http, body)
            return
        reply = await http.post(ROUTE, json=body)
    assert reply.status_code == 400
    assert "messages[0].content[0]: this model takes text alone" in reply.json()["error"]["message"]


async def test_the_end_of_an_answer_is_told_by_its_reason() -> None:
    async with api("one two three", chat_template=TEMPLATE) as http:
        stopped, _ = await both(http, ASK | {"stop_sequences": ["", " three"]})
        cut, _ = await both(http, ASK | {"max_tokens": 3})
    assert (stopped["stop_reason"], stopped["stop_sequence"]) == ("stop_sequence", " three")
    assert stopped["content"][0]["text"] == "one two"
    assert (cut["stop_reason"], cut["content"][0]["text"]) == ("max_tokens", "one")
    async with api("x" * 2000, chat_template=TEMPLATE) as http:
        full, _ = await both(http, {name: value for name, value in ASK.items() if name != "max_tokens"})
    assert full["stop_reason"] == "model_context_window_exceeded"
    async with api(CALL, chat_template=TEMPLATE) as http:
        half = (await http.post(ROUTE, json=ASK | {"tools": [TIDE], "max_tokens": 55})).json()
    assert (half["content"], half["stop_reason"]) == ([], "max_tokens")


async def test_the_answer_keeps_to_a_schema() -> None:
    schema = {"type": "object", "properties": {"a": {"enum": [7]}}, "required": ["a"], "additionalProperties": False}
    shape = {"type": "json_schema", "schema": schema}
    async with api("no", chat_template=PLAIN) as http:
        for fields in ({"output_config": {"format": shape}}, {"output_format": shape}):
            whole, _ = await both(http, ASK | fields)
            assert json.loads(whole["content"][0]["text"]) == {"a": 7}


async def test_counting_counts_the_prompt() -> None:
    body = ASK | {"system": "Kind.", "tools": [TIDE]}
    async with api("fine", chat_template=TEMPLATE) as http:
        counted = await http.post(f"{ROUTE}/count_tokens", json={k: v for k, v in body.items() if k != "max_tokens"})
        usage = (await http.post(ROUTE, json=body)).json()["usage"]
    assert counted.json() == {"input_tokens": usage["input_tokens"]}


@pytest.mark.parametrize(
    ("fields", "words"),
    [
        ({"messages": []}, "messages: must not be empty"),
        ({"messages": [{"role": "bot", "content": "a"}]}, "messages[0].role: should be"),
        (
            {"messages": [{"role": "user", "content": [{"type": "image"}]}]},
            "messages[0].content[0]: this model takes text",
        ),
        (
            {
                "messages": [
                    {
                        "role": "user",
                        "content": [{"type": "tool_result", "tool_use_id": "a", "content": [{"type": "image"}]}],
                    }
                ]
            },
            "messages[0].content[0].content[0]: this model takes text",
        ),
        ({"messages": [{"role": "assistant", "content": [{"type": "tool_use"}]}]}, "messages[0].content[0].id: field"),
        (
            {"tools": [{"type": "web_search_20250305", "name": "web_search"}]},
            "tools[0].type: web_search_20250305 is no",
        ),
        ({"tools": [{"name": "a"}]}, "tools[0].input_schema: field required"),
        ({"tools": [{"name": "a b", "input_schema": {}}]}, "tools[0].name must be"),
        ({"tools": [TIDE], "tool_choice": {"type": "tool"}}, "tool_choice.name: field required"),
        ({"tools": [TIDE], "tool_choice": {"type": "tool", "name": "x"}}, "tool_choice: there is no function 'x'"),
        ({"tool_choice": {"type": "any"}}, "tool_choice is only allowed"),
        ({"mcp_servers": [{"url": "http://a"}]}, "mcp_servers: "),
        ({"n": 2}, "n: this route gives one answer"),
        ({"messages": [{"role": "user", "content": "x" * 2000}]}, "prompt is too long: 20"),
    ],
)
async def test_what_cannot_be_honoured_is_refused_in_anthropics_shape(fields: Json, words: str) -> None:
    async with api("fine", chat_template=TEMPLATE) as http:
        for more in ({}, {"stream": True}):
            reply = await http.post(ROUTE, json=ASK | fields | more)
            assert reply.status_code == 400, reply.text
            told = reply.json()
            assert (told["type"], told["error"]["type"]) == ("error", "invalid_request_error")
            assert told["error"]["message"].startswith(words), told
        assert (await http.post(ROUTE, json=ASK)).status_code == 200


async def test_keys_come_in_either_header_and_errors_have_anthropics_names() -> None:
    async with api("fine", chat_template=TEMPLATE, api_key="k") as http:
        for headers in ({"x-api-key": "k"}, {"authorization": "Bearer k"}):
            more = {"anthropic-version": "2023-06-01", "anthropic-beta": "a-2025,b"}
            reply = await http.post(f"{ROUTE}?beta=true", json=ASK, headers=headers | more)
            assert reply.status_code == 200
            assert reply.headers["request-id"]
        for path in (ROUTE, f"{ROUTE}/count_tokens", "/messages"):
            reply = await http.post(path, json=ASK, headers={"x-api-key": "other"})
            assert (reply.status_code, reply.json()["error"]["type"]) == (401, "authentication_error")
        reply = await http.post(ROUTE, content=b"{", headers={"x-api-key": "k", "content-type": "application/json"})
        assert (reply.status_code, reply.json()["error"]["type"]) == (400, "invalid_request_error")
        assert (await http.get(ROUTE, headers={"x-api-key": "k"})).json()["type"] == "error"


async def test_an_answer_that_fails_in_a_stream_ends_with_an_event_of_that_name() -> None:
    async with api("fine", chat_template=TEMPLATE) as http:
        body = ASK | {"custom_token_bans": list(range(259))}
        whole = await http.post(ROUTE, json=body)
        told = named_events(await http.post(ROUTE, json=body | {"stream": True}))
    assert (whole.status_code, whole.json()["error"]["type"]) == (500, "api_error")
    assert (told[-1]["type"], told[-1]["error"]["type"]) == ("error", "api_error")
