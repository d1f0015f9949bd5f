"""OpenAI's Responses API: items in and out, the order of a stream's events, tools, shapes, and what is refused."""

import json
from collections.abc import Mapping
from typing import Any

import httpx
import jsonschema
import pytest
from fake_api import api
from fakes import VOCAB_SIZE
from turns_api import CALL, PLAIN, PORT, THINK, TURNS, Json, named_events

ROUTE = "/v1/responses"
TEMPLATE = f"{TURNS}{{{{ '[' ~ reasoning_effort ~ ']' if reasoning_effort }}}}?"
VOLATILE = ("id", "created_at", "completed_at", "usage", "explain")
TIDE: Json = {"type": "function", "name": "tide", "parameters": PORT}
LAMP: Json = {"type": "function", "name": "lamp", "description": "Puts it out."}
ASK: Json = {"input": "Tide in Hull", "max_output_tokens": 200, "temperature": 0}


def events(reply: httpx.Response) -> list[Json]:
    """The events of a stream, numbered from 0."""
    told = named_events(reply)
    assert [event["sequence_number"] for event in told] == list(range(len(told)))
    return told


def shown(response: Mapping[str, Any]) -> Json:
    """A response without what is new each time."""
    items = [{k: v for k, v in item.items() if k not in ("id", "call_id")} for item in response["output"]]
    return {k: v for k, v in response.items() if k not in VOLATILE} | {"output": items}


async def both(http: httpx.AsyncClient, body: Json) -> tuple[Json, list[Json]]:
    """The whole answer and the events of the same one streamed, whose last response has to be the whole answer."""
    whole = await http.post(ROUTE, json=body)
    assert whole.status_code == 200, whole.text
    told = events(await http.post(ROUTE, json=body | {"stream": True}))
    assert shown(told[-1]["response"]) == shown(whole.json())
    return whole.json(), told


async def prompt_of(http: httpx.AsyncClient, body: Json) -> str:
    reply = await http.post(ROUTE, json=ASK | body | {"explain": True})
    assert reply.status_code == 200, reply.text
    text: str = reply.json()["explain"]["prompts"][0]["text"]
    return text.removeprefix("<s>")


def kinds(told: list[Json]) -> list[str]:
    """The kinds of events in order; of deltas in a row there is one."""
    names = [event["type"].removeprefix("response.") for event in told]
    return [name for place, name in enumerate(names) if not name.endswith("delta") or names[place - 1] != name]


TEXT_EVENTS = [
    "output_item.added",
    "content_part.added",
    "output_text.delta",
    "output_text.done",
    "content_part.done",
    "output_item.done",
]
CALL_EVENTS = [
    "output_item.added",
    "function_call_arguments.delta",
    "function_call_arguments.done",
    "output_item.done",
]
THOUGHT_EVENTS = [
    "output_item.added",
    "content_part.added",
    "reasoning_text.delta",
    "reasoning_text.done",
    "content_part.done",
    "output_item.done",
]
SUMMARY_EVENTS = [
    "output_item.added",
    "reasoning_summary_part.added",
    "reasoning_summary_text.delta",
    "reasoning_summary_text.done",
    "reasoning_summary_part.done",
    "output_item.done",
]


async def test_a_text_comes_as_a_message_whole_and_in_events() -> None:
    async with api("fine", chat_template=TEMPLATE) as http:
        whole, told = await both(http, ASK | {"metadata": {"who": "me"}, "instructions": "Be brief.", "store": True})
    (item,) = whole["output"]
    assert item["type"], item["status"] == ("message", "completed")
    assert item["content"] == [{"type": "output_text", "text": "fine", "annotations": [], "logprobs": []}]
    assert (whole["object"], whole["status"], whole["store"]) == ("response", "completed", False)
    assert (whole["metadata"], whole["instructions"]) == ({"who": "me"}, "Be brief.")
    assert whole["usage"]["output_tokens"] == len("fine") + 1
    assert whole["usage"]["output_tokens_details"] == {"reasoning_tokens": 0}
    assert kinds(told) == ["created", "in_progress", *TEXT_EVENTS, "completed"]
    added, done = told[2], told[-2]
    assert (added["item"]["content"], done["item"]["content"][0]["text"]) == ([], "fine")
    assert {event["item_id"] for event in told if "item_id" in event} == {added["item"]["id"]}
    assert "".join(event["delta"] for event in told if event["type"].endswith("delta")) == "fine"
    again = told[-1]["response"]["usage"]
    assert again["input_tokens_details"]["cached_tokens"] == again["input_tokens"] - 1


async def test_thoughts_come_as_reasoning_in_front_of_the_message() -> None:
    async with api("<think>\nHm.\n</think>\n\nYes.", chat_template=TEMPLATE, special=THINK) as http:
        whole, told = await both(http, ASK)
    thought, message = whole["output"]
    assert (thought["type"], thought["summary"]) == ("reasoning", [])
    assert thought["content"] == [{"type": "reasoning_text", "text": "Hm."}]
    assert message["content"][0]["text"] == "Yes."
    assert whole["usage"]["output_tokens_details"]["reasoning_tokens"] == len("\nHm.") + 1
    assert kinds(told) == ["created", "in_progress", *THOUGHT_EVENTS, *TEXT_EVENTS, "completed"]
    assert [event["output_index"] for event in told if event["type"].endswith("item.done")] == [0, 1]


async def test_a_summary_of_thoughts_is_all_of_them() -> None:
    body = ASK | {"reasoning": {"summary": "auto"}, "explain": True}
    async with api("<think>Hm.</think>Yes.", chat_template=TEMPLATE, special=THINK) as http:
        whole, told = await both(http, body)
    assert whole["output"][0]["summary"] == [{"type": "summary_text", "text": "Hm."}]
    assert "content" not in whole["output"][0]
    assert kinds(told) == ["created", "in_progress", *SUMMARY_EVENTS, *TEXT_EVENTS, "completed"]
    assert [bent["field"] for bent in whole["explain"]["bent"]] == ["reasoning.summary"]


async def test_thoughts_go_back_into_the_history_from_any_place_of_their_item() -> None:
    body = ASK | {"include": ["reasoning.encrypted_content"]}
    async with api("<think>Hé.</think>Yes.", chat_template=TEMPLATE, special=THINK) as http:
        thought, message = (await http.post(ROUTE, json=body)).json()["output"]
        items = [{"role": "user", "content": "Why"}, thought, message, {"role": "user", "content": "So"}]
        wanted = "[user]Why[assistant]<think>Hé.</think>Yes.[user]So?"
        assert await prompt_of(http, {"input": items}) == wanted
        bare = {"type": "reasoning", "id": "rs_1", "summary": []}
        items[1] = bare | {"encrypted_content": thought["encrypted_content"]}
        assert await prompt_of(http, {"input": items}) == wanted
        items[1] = bare | {"summary": [{"type": "summary_text", "text": "Hé."}]}
        assert await prompt_of(http, {"input": items}) == wanted
        items[1] = bare | {"encrypted_content": "gAAAAA"}
        reply = await http.post(ROUTE, json=ASK | {"input": items, "explain": True})
    assert [bent["field"] for bent in reply.json()["explain"]["bent"]] == ["input[1].encrypted_content"]


async def test_calls_are_items_whole_and_in_events() -> None:
    async with api(f"Let me look.\n{CALL}\n{CALL}", chat_template=TEMPLATE) as http:
        whole, told = await both(http, ASK | {"tools": [TIDE, LAMP]})
        one = (await http.post(ROUTE, json=ASK | {"tools": [TIDE], "parallel_tool_calls": False})).json()
        alone, _ = await both(http, ASK | {"tools": [TIDE], "tool_choice": "none"})
    message, call, other = whole["output"]
    assert message["content"][0]["text"] == "Let me look.\n"
    assert (call["name"], call["arguments"], call["status"]) == ("tide", '{"port": "Hull"}', "completed")
    assert call["call_id"] != other["call_id"]
    assert kinds(told) == ["created", "in_progress", *TEXT_EVENTS, *CALL_EVENTS, *CALL_EVENTS, "completed"]
    pieces = [
        event["delta"] for event in told if event["type"].endswith("arguments.delta") and event["output_index"] == 1
    ]
    assert len(pieces) > 5, "arguments come while they are written"
    assert "".join(pieces) == call["arguments"]
    assert [item["type"] for item in one["output"]] == ["message", "function_call"]
    assert [item["type"] for item in alone["output"]] == ["message"]


async def test_blanks_before_a_call_are_no_message() -> None:
    async with api(f"\n\n{CALL}", chat_template=TEMPLATE) as http:
        whole, _ = await both(http, ASK | {"tools": [TIDE]})
    assert [item["type"] for item in whole["output"]] == ["function_call"]


@pytest.mark.parametrize(
    "choice",
    [
        "required",
        {"type": "function", "name": "tide"},
        {"type": "allowed_tools", "mode": "required", "tools": [{"type": "function", "name": "tide"}]},
    ],
)
async def test_a_call_is_forced_by_every_form_of_the_choice(choice: object) -> None:
    async with api("no calls from me", chat_template=PLAIN, max_model_len=4096) as http:
        body = ASK | {"tools": [TIDE, LAMP] if choice != "required" else [TIDE], "tool_choice": choice}
        reply = await http.post(ROUTE, json=body | {"max_output_tokens": 2000, "temperature": 1, "seed": 3})
    calls = reply.json()["output"]
    assert {call["name"] for call in calls} == {"tide"}
    for call in calls:
        jsonschema.validate(json.loads(call["arguments"]), TIDE["parameters"])


async def test_what_one_turn_of_the_model_was_is_one_message_again() -> None:
    items: list[Json] = [
        {"role": "developer", "content": "Brief."},
        {"type": "message", "role": "user", "content": [{"type": "input_text", "text": "Tides"}]},
        {"type": "reasoning", "id": "r", "summary": [], "content": [{"type": "reasoning_text", "text": "Hm."}]},
        {"type": "message", "role": "assistant", "content": [{"type": "output_text", "text": "Look."}], "phase": None},
        {"type": "function_call", "call_id": "c1", "name": "tide", "arguments": '{"port": "Hull"}', "id": "fc_1"},
        {"type": "function_call", "call_id": "c2", "name": "tide", "arguments": '{"port": "Rome"}'},
        {"type": "function_call_output", "call_id": "c1", "output": "High at 9"},
        {"type": "function_call_output", "call_id": "c2", "output": [{"type": "input_text", "text": "None"}]},
        {"role": "assistant", "content": [{"type": "refusal", "refusal": "No."}]},
    ]
    async with api("fine", chat_template=TEMPLATE) as http:
        told = await prompt_of(http, {"input": items, "instructions": "Kind."})
    assert told == (
        "[system]Kind.[system]Brief.[user]Tides[assistant]<think>Hm.</think>Look.(c1 tide Hull)(c2 tide Rome)"
        "[tool tide c1]High at 9[tool tide c2]None[assistant]No.?"
    )


async def test_the_answer_keeps_to_a_schema() -> None:
    schema = {"type": "object", "properties": {"a": {"enum": [7]}}, "required": ["a"], "additionalProperties": False}
    shape = {"type": "json_schema", "name": "n", "schema": schema, "strict": True}
    async with api("no", chat_template=PLAIN) as http:
        whole, _ = await both(http, ASK | {"text": {"format": shape}})
        loose = await http.post(ROUTE, json=ASK | {"text": {"format": {"type": "json_object"}}})
        bad = await http.post(ROUTE, json=ASK | {"text": {"format": {"type": "json_schema", "name": "n"}}})
    assert json.loads(whole["output"][0]["content"][0]["text"]) == {"a": 7}
    assert whole["text"]["format"] == shape
    assert loose.json()["output"][0]["content"][0]["text"].startswith("{")
    assert (bad.status_code, bad.json()["error"]["param"]) == (400, "text.format")
    assert bad.json()["error"]["message"] == "text.format.schema: field required"


async def test_an_answer_that_is_cut_is_incomplete() -> None:
    async with api("x" * 50, chat_template=TEMPLATE) as http:
        whole, told = await both(http, ASK | {"max_output_tokens": 5})
    assert (whole["status"], whole["incomplete_details"]) == ("incomplete", {"reason": "max_output_tokens"})
    assert whole["output"][0]["status"] == "incomplete"
    assert (told[-1]["type"], told[-2]["item"]["status"]) == ("response.incomplete", "incomplete")
    async with api(CALL, chat_template=TEMPLATE) as http:
        whole, told = await both(http, ASK | {"max_output_tokens": 55, "tools": [TIDE]})
    (call,) = whole["output"]
    assert (call["status"], call["arguments"]) == ("incomplete", '{"port": "Hul')


async def test_an_answer_that_fails_says_so() -> None:
    async with api("fine", chat_template=TEMPLATE) as http:
        whole, told = await both(http, ASK | {"custom_token_bans": list(range(VOCAB_SIZE))})
    assert (whole["status"], whole["error"]["code"]) == ("failed", "server_error")
    assert told[-1]["type"] == "response.failed"


async def test_a_chat_that_is_too_long_loses_its_oldest_messages_where_that_is_asked_for() -> None:
    turns = [
        {"role": role, "content": f"{number} " + "x" * 90} for number in range(8) for role in ("user", "assistant")
    ]
    items = [{"role": "system", "content": "Kind."}, *turns, {"role": "user", "content": "So"}]
    async with api("fine", chat_template=TEMPLATE) as http:
        refused = await http.post(ROUTE, json=ASK | {"input": items})
        reply = await http.post(ROUTE, json=ASK | {"input": items, "truncation": "auto", "explain": True})
    assert (refused.status_code, refused.json()["error"]["code"]) == (400, "context_length_exceeded")
    assert refused.json()["error"]["param"] == "input"
    told = reply.json()["explain"]
    text = told["prompts"][0]["text"]
    assert text.startswith("[system]Kind.[user]")
    assert text.endswith("[user]So?")
    assert 500 < len(told["prompts"][0]["token_ids"]) <= 1024 - 200
    assert told["bent"] == [{"field": "input", "how": told["bent"][0]["how"]}]
    assert "messages were left out" in told["bent"][0]["how"]


async def test_probabilities_are_those_of_the_text() -> None:
    body = ASK | {"top_logprobs": 2, "include": ["message.output_text.logprobs"]}
    async with api("<think>Hm.</think>Yes.", chat_template=TEMPLATE, special=THINK) as http:
        whole, told = await both(http, body)
    listed = whole["output"][1]["content"][0]["logprobs"]
    assert "".join(one["token"] for one in listed) == "Yes."
    assert {len(one["top_logprobs"]) for one in listed} == {2}
    assert [one for event in told if "delta" in event for one in event.get("logprobs", ())] == listed


async def test_effort_reaches_the_template_and_counting_counts_the_prompt() -> None:
    body = ASK | {"reasoning": {"effort": "high"}, "tools": [TIDE]}
    async with api("fine", chat_template=TEMPLATE) as http:
        assert await prompt_of(http, {"reasoning": {"effort": "high"}}) == "[user]Tide in Hull[high]?"
        counted = (await http.post(f"{ROUTE}/input_tokens", json=body)).json()
        usage = (await http.post(ROUTE, json=body)).json()["usage"]
    assert counted == {"object": "response.input_tokens", "input_tokens": usage["input_tokens"]}


@pytest.mark.parametrize(
    ("fields", "param", "words"),
    [
        ({"input": []}, "input", "must not be empty"),
        ({"input": None}, "input", "field required"),
        ({"previous_response_id": "resp_1"}, "previous_response_id", "no answer is stored"),
        ({"conversation": {"id": "conv_1"}}, "conversation", "no answer is stored"),
        ({"background": True}, "background", "no answer is stored"),
        ({"input": [{"type": "item_reference", "id": "msg_1"}]}, "input[0]", "store: false"),
        ({"input": [{"type": "web_search_call", "id": "ws"}]}, "input[0]", "'web_search_call'"),
        ({"input": [{"content": "a"}]}, "input[0].role", "field required"),
        ({"input": [{"type": "function_call", "name": "f"}]}, "input[0].call_id", "field required"),
        (
            {"input": [{"role": "user", "content": [{"type": "input_image", "image_url": "x"}]}]},
            "input[0].content[0]",
            "'input_image'",
        ),
        ({"tools": [{"type": "web_search"}]}, "tools[0].type", "web_search is no tool of this server"),
        ({"tools": [{"type": "function"}]}, "tools[0].name", "field required"),
        ({"tools": [{"type": "function", "name": "a b"}]}, "tools[0].name", "1 to 128"),
        ({"tools": [TIDE], "tool_choice": {"type": "web_search"}}, "tool_choice", "should be"),
        ({"tools": [TIDE], "tool_choice": {"type": "function", "name": "x"}}, "tool_choice", "no function 'x'"),
        ({"tool_choice": "required"}, "tool_choice", "only allowed when tools"),
        ({"metadata": {"a": "x" * 513}}, "metadata", "512"),
        ({"top_logprobs": 21}, "top_logprobs", "at most 20"),
        ({"truncation": "middle"}, "truncation", "auto"),
        ({"prompt": {"id": "p"}}, "prompt", "no field of this route"),
    ],
)
async def test_what_cannot_be_honoured_is_refused_by_its_name(fields: Json, param: str, words: str) -> None:
    async with api("fine", chat_template=TEMPLATE) as http:
        for more in ({}, {"stream": True}):
            reply = await http.post(ROUTE, json=ASK | fields | more)
            assert reply.status_code == 400, reply.text
            assert reply.json()["error"]["param"] == param
            assert words in reply.json()["error"]["message"]
        assert (await http.post(ROUTE, json=ASK)).status_code == 200


async def test_nothing_is_stored_and_every_way_to_it_says_so() -> None:
    async with api("fine", chat_template=TEMPLATE) as http:
        made = (await http.post(ROUTE, json=ASK | {"store": True, "explain": True})).json()
        for ask in (http.get, http.delete):
            reply = await ask(f"{ROUTE}/{made['id']}")
            assert (reply.status_code, "no answer is stored" in reply.json()["error"]["message"]) == (404, True)
    assert [one["field"] for one in made["explain"]["ignored"]] == ["store"]


async def test_any_name_of_a_model_is_answered() -> None:
    async with api("fine", chat_template=TEMPLATE) as http:
        reply = await http.post(ROUTE, json=ASK | {"model": "gpt-6-codex"})
        bare = await http.post("/responses", json=ASK)
    assert (reply.status_code, reply.json()["model"], bare.status_code) == (200, "fake", 200)
