"""What the OpenAI API takes, what it refuses, and what the engine is asked for."""

import json
from typing import Any

import pytest
from fake_api import api
from msgspec.structs import replace
from pydantic import ValidationError

from tightrope.engine.errors import InvalidRequest, ModelNotFound
from tightrope.engine.sampler.steps import SamplingParams
from tightrope.engine.settings import LimitSettings
from tightrope.engine.types import (
    GenerateRequest,
    LogprobRequest,
    ModelInfo,
    Span,
    StopRules,
    TextPrompt,
    TokenPrompt,
)
from tightrope.server.asking import Asked
from tightrope.server.chats.messages import template_messages
from tightrope.server.chats.offers import offer_of
from tightrope.server.chats.rendering import RenderedChat
from tightrope.server.chats.requests import Message
from tightrope.server.chats.tools import tool_use
from tightrope.server.dialects.openai.reading import chat_asked, check_chat, completion_asked, template_variables
from tightrope.server.dialects.openai.requests import ChatRequest, CompletionRequest
from tightrope.server.http.body import ignored_fields, parse_json, refuse_unread
from tightrope.server.prompts.templates import RenderedPrompt
from tightrope.server.served import Served

pytestmark = pytest.mark.quick

INFO = ModelInfo("m", "rules", "fake", 259, 1024, 1024, 4096, "f16", 8, "<s>", "</s>", (), None, ())
SERVED = Served("m", INFO, LimitSettings(), max_prompts=4)
USER = [{"role": "user", "content": "hi"}]


TOOL = {"type": "function", "function": {"name": "f", "parameters": {"type": "object"}}}


def tool(**function: object) -> dict[str, Any]:
    return {"tools": [{"type": "function", "function": TOOL["function"] | function}]}


def chat(**fields: object) -> GenerateRequest:
    body = ChatRequest.model_validate({"messages": USER, **fields})
    refuse_unread(body)  # as the route does
    check_chat(body, SERVED)
    (request,) = without_id(chat_asked(body, RenderedChat(RenderedPrompt((Span("prompt"),))), SERVED))
    return request


def completion(**fields: object) -> list[GenerateRequest]:
    return without_id(completion_asked(CompletionRequest.model_validate({"prompt": "p", **fields}), SERVED))


def without_id(asked: Asked) -> list[GenerateRequest]:
    """The engine's requests, with "id" in place of what is new each time."""
    return [replace(r, request_id=r.request_id.replace(asked.id, "id")) for r in asked.requests]


def test_a_chat_without_options_asks_for_neutral_sampling_to_the_end_of_the_window() -> None:
    assert chat() == GenerateRequest("id", TextPrompt((Span("prompt"),)))


def test_a_completion_without_options_asks_for_sixteen_tokens() -> None:
    assert completion() == [GenerateRequest("id", TextPrompt((Span("p"),)), stop=StopRules(max_tokens=16))]


def test_null_means_absent_in_every_field() -> None:
    names = ChatRequest.model_fields.keys() - {"messages"}
    message = dict.fromkeys(Message.model_fields) | USER[0]
    assert chat(**dict.fromkeys(names), messages=[message]) == chat()
    names = CompletionRequest.model_fields.keys() - {"prompt"}
    assert completion(**dict.fromkeys(names)) == completion()


def test_sampling_fields_reach_the_engine() -> None:
    asked = chat(
        temperature=0,
        top_k=5,
        top_p=0.5,
        min_p=0.1,
        typical_p=0.9,
        repetition_penalty=1.2,
        frequency_penalty=-1,
        presence_penalty=2,
        logit_bias={"7": -100, "8": 1.5},
        seed=3,
    )
    assert asked.sampling == SamplingParams(
        temperature=0.0,
        top_k=5,
        top_p=0.5,
        min_p=0.1,
        typical_p=0.9,
        repetition_penalty=1.2,
        frequency_penalty=-1.0,
        presence_penalty=2.0,
        logit_bias={7: -100.0, 8: 1.5},
        seed=3,
    )


def test_stop_fields_reach_the_engine() -> None:
    asked = chat(
        stop=["a", "b", "a"],
        stop_token_ids=[1],
        min_tokens=2,
        max_tokens=9,
        ignore_eos=True,
        include_stop_str_in_output=True,
    )
    assert asked.stop == StopRules(
        max_tokens=9, min_tokens=2, strings=("a", "b"), token_ids=(1,), ignore_eos=True, keep_stop_text=True
    )


def test_other_fields_reach_the_engine() -> None:
    asked = chat(
        n=2,
        logprobs=True,
        top_logprobs=3,
        cache_salt="s",
        truncate_prompt_tokens=5,
        skip_special_tokens=False,
        cache_reuse="exact",
    )
    assert asked.n == 2
    assert asked.logprobs == LogprobRequest(processed=False, top=3)
    assert (asked.namespace, asked.truncate_to, asked.skip_special_tokens) == ("s", 5, False)
    assert (asked.cache_reuse, chat().cache_reuse) == ("exact", "moved")


@pytest.mark.parametrize(
    ("fields", "expected"),
    [
        ({"top_k": -1}, SamplingParams()),
        ({"top_k": 10**6}, SamplingParams(top_k=259)),
        ({"top_p": 1.0}, SamplingParams()),
        ({"seed": -1}, SamplingParams()),
        ({"seed": 2**64 - 1}, SamplingParams(seed=2**64 - 1)),
        ({"temperature": 1e6}, SamplingParams(temperature=1e6)),
        ({"logit_bias": {}}, SamplingParams()),
        ({"logit_bias": [[5, 1]]}, SamplingParams(logit_bias={5: 1.0})),
    ],
)
def test_edge_values_mean_what_the_neighbours_mean(fields: dict[str, Any], expected: SamplingParams) -> None:
    assert chat(**fields).sampling == expected


def test_max_completion_tokens_wins_over_its_older_name() -> None:
    assert chat(max_completion_tokens=3, max_tokens=5).stop.max_tokens == 3
    assert chat(max_tokens=5).stop.max_tokens == 5


@pytest.mark.parametrize("name", [None, "", "tgi", "dummy", "m"])
def test_names_for_whatever_is_served_are_taken(name: str | None) -> None:
    assert chat(model=name) == chat()


def test_another_model_is_not_found() -> None:
    with pytest.raises(ModelNotFound, match=r"^The model `gpt-4` does not exist\.$"):
        chat(model="gpt-4")


@pytest.mark.parametrize(
    ("prompt", "expected"),
    [
        ("a", [TextPrompt((Span("a"),))]),
        (["a", "b"], [TextPrompt((Span("a"),)), TextPrompt((Span("b"),))]),
        ([1, 2], [TokenPrompt((1, 2))]),
        ([[1], [2, 3]], [TokenPrompt((1,)), TokenPrompt((2, 3))]),
    ],
)
def test_prompts_come_as_text_or_ids_alone_or_in_batches(prompt: object, expected: list[Any]) -> None:
    asked = completion(prompt=prompt)
    assert [request.prompt for request in asked] == expected
    assert len({request.request_id for request in asked}) == len(asked)


def test_best_of_writes_more_answers_and_scores_them() -> None:
    (asked,) = completion(n=1, best_of=3)
    assert asked.n == 3
    assert asked.logprobs == LogprobRequest(processed=False)


def test_echo_with_logprobs_asks_for_the_prompts_too() -> None:
    assert completion(echo=True, logprobs=2)[0].prompt_logprobs == 2
    assert completion(logprobs=2)[0].prompt_logprobs is None


@pytest.mark.parametrize(
    ("fields", "param"),
    [
        ({"n": 9}, "n"),
        ({"logit_bias": {"x": 1}}, "logit_bias"),
        ({"logit_bias": {"1": 101}}, "logit_bias"),
        ({"stop": [str(i) for i in range(1025)]}, "stop"),
        ({"min_tokens": 3, "max_tokens": 2}, "min_tokens"),
        ({"logprobs": True, "top_logprobs": 21}, "top_logprobs"),
        ({"top_logprobs": 1}, "top_logprobs"),
        ({"stream_options": {"include_usage": True}}, "stream_options"),
        ({"prompt_logprobs": 21}, "prompt_logprobs"),
        ({"prompt_logprobs": 0, "stream": True}, "prompt_logprobs"),
        ({"response_format": {"type": "json_schema"}}, "response_format.json_schema"),
        ({"guided_json": 5}, "guided_json"),
        ({"grammar": {"type": "regex"}}, "grammar.value"),
        ({"chat_template": "{{ 1 }}"}, "chat_template"),
        ({"continue_final_message": True, "add_generation_prompt": True}, "continue_final_message"),
        ({"tool_choice": "required"}, "tool_choice"),
        ({"tools": [TOOL], "tool_choice": "sometimes"}, "tool_choice"),
        ({"tools": [TOOL], "tool_choice": {"type": "function"}}, "tool_choice"),
        ({"tools": [TOOL], "tool_choice": {"type": "function", "function": {"name": "g"}}}, "tool_choice"),
        ({"tools": [TOOL, TOOL]}, "tools"),
        ({"tools": [TOOL] * 129}, "tools"),
        (tool(name="a b"), "tools[0].function.name"),
        (tool(name="a" * 129), "tools[0].function.name"),
        (tool(parameters={"type": "array"}), "tools[0].function.parameters"),
        (tool(parameters={"properties": {"a": {"type": "strin"}}}), "tools[0].function.parameters"),
        (tool(parameters={"properties": {"a": {"pattern": "(a"}}}), "tools[0].function.parameters"),
        (tool(parameters={"not": {}}, strict=True), "tools[0].function.parameters"),
        (tool(parameters={"not": {}}) | {"tool_choice": "required"}, "tools[0].function.parameters"),
    ],
)
def test_what_a_chat_cannot_have_is_refused_with_the_fields_name(fields: dict[str, Any], param: str) -> None:
    with pytest.raises(InvalidRequest) as caught:
        chat(**fields)
    assert caught.value.param == param
    assert param in caught.value.message


@pytest.mark.parametrize(
    ("fields", "param"),
    [
        ({"best_of": 1, "n": 2}, "best_of"),
        ({"best_of": 9}, "best_of"),
        ({"best_of": 2, "stream": True}, "best_of"),
        ({"logprobs": 21}, "logprobs"),
        ({"suffix": "end"}, "suffix"),
        ({"prompt": ""}, "prompt"),
        ({"prompt": []}, "prompt"),
        ({"prompt": ["a", ""]}, "prompt"),
        ({"prompt": [[]]}, "prompt"),
        ({"prompt": [259]}, "prompt"),
        ({"prompt": [-1]}, "prompt"),
        ({"prompt": ["a"] * 5}, "prompt: the number of prompts"),
    ],
)
def test_what_a_completion_cannot_have_is_refused_with_the_fields_name(fields: dict[str, Any], param: str) -> None:
    with pytest.raises(InvalidRequest) as caught:
        completion(**fields)
    assert caught.value.param == param


@pytest.mark.parametrize(
    "fields",
    [
        {"response_format": {"type": "text"}},
        {"grammar": "", "guided_json": None, "structured_outputs": {}, "json_schema": {}},
        {"tools": [], "tool_choice": "none"},
        {"top_logprobs": 0},
        {"stop": []},
        {"user": "u", "store": True, "metadata": {"a": "b"}, "service_tier": "auto", "tfs": 1, "mirostat_mode": 0},
    ],
)
def test_neutral_values_of_what_is_not_supported_change_nothing(fields: dict[str, Any]) -> None:
    assert chat(**fields) == chat()


@pytest.mark.parametrize(
    "fields",
    [
        {"temperature": -1},
        {"temperature": "0.7"},
        {"temperature": True},
        {"top_p": -0.1},
        {"top_p": 1.0000001},
        {"top_k": -2},
        {"top_k": 1.5},
        {"min_p": 1.1},
        {"typical_p": -1},
        {"repetition_penalty": 0},
        {"presence_penalty": 2.1},
        {"frequency_penalty": -2.1},
        {"n": 0},
        {"n": True},
        {"seed": -2},
        {"seed": 2**64},
        {"seed": "7"},
        {"max_tokens": -2},
        {"max_tokens": 1.5},
        {"logprobs": 1},
        {"top_logprobs": -1},
        {"messages": []},
        {"messages": "hi"},
        {"messages": [{"role": "wizard", "content": "hi"}]},
        {"messages": [{"content": "hi"}]},
        {"messages": [{"role": "user", "content": 7}]},
        {"response_format": {"type": "xml"}},
        {"stream": "yes"},
    ],
)
def test_types_and_ranges_are_strict(fields: dict[str, Any]) -> None:
    with pytest.raises(ValidationError):
        ChatRequest.model_validate({"messages": USER, **fields})


def test_unknown_fields_are_listed_wherever_they_stand() -> None:
    body = ChatRequest.model_validate(
        {
            "messages": [{"role": "user", "content": "a", "mood": 1}],
            "mood": 5,
            "tools": [TOOL | {"shown": 1}],
            "stream": True,
            "stream_options": {"x": 1},
        }
    )
    assert sorted(ignored_fields(body)) == ["messages[0].mood", "mood", "stream_options.x"]


def test_messages_become_what_templates_expect() -> None:
    body = ChatRequest.model_validate(
        {
            "messages": [
                {"role": "developer", "content": [{"type": "text", "text": "a"}, {"type": "text", "text": "b"}]},
                {"role": "user", "content": "hi", "name": "Ann"},
                {
                    "role": "assistant",
                    "content": None,
                    "tool_calls": [{"id": "1", "type": "function", "function": {"name": "f", "arguments": '{"x":1}'}}],
                },
                {"role": "tool", "content": "2", "tool_call_id": "1"},
            ]
        }
    )
    assert template_messages(body.messages) == [
        {"role": "system", "content": [{"type": "text", "text": "a"}, {"type": "text", "text": "b"}]},
        {"role": "user", "content": "hi", "name": "Ann"},
        {
            "role": "assistant",
            "tool_calls": [{"id": "1", "type": "function", "function": {"name": "f", "arguments": {"x": 1}}}],
        },
        {"role": "tool", "content": "2", "tool_call_id": "1"},
    ]


def test_templates_are_shown_the_requests_own_json() -> None:
    tool = {"type": "function", "function": {"strict": None, "description": "d", "name": "f", "x": {"max": 10**30}}}
    calls = [{"type": "function", "function": {"arguments": '{"b": 1.0, "a": [null, 1e23]}', "name": "f"}, "id": None}]
    raw = json.dumps(
        {
            "messages": [
                {"content": "hi", "mood": {"z": 1, "a": 10**30}, "role": "user", "name": None},
                {"tool_calls": calls, "role": "assistant", "reasoning": "hm"},
                {"role": "assistant", "content": None, "tool_calls": []},
                {"role": "tool"},
            ],
            "tools": [tool],
        }
    )
    body = ChatRequest.model_validate(parse_json(raw.encode()))
    tools = tool_use(offer_of(body))
    assert tools is not None
    assert json.dumps(tools.shown) == json.dumps([tool])
    function = {"arguments": {"b": 1.0, "a": [None, 1e23]}, "name": "f"}
    assert json.dumps(template_messages(body.messages)) == json.dumps(
        [
            {"content": "hi", "mood": {"z": 1, "a": 10**30}, "role": "user"},
            {
                "thinking": "hm",
                "tool_calls": [{"type": "function", "function": function, "id": None}],
                "role": "assistant",
                "reasoning": "hm",
                "reasoning_content": "hm",
            },
            {"role": "assistant", "content": ""},
            {"role": "tool", "content": ""},
        ]
    )


@pytest.mark.parametrize(
    ("message", "param"),
    [
        ({"role": "user", "content": [{"type": "image_url"}]}, "messages[0].content[0]"),
        ({"role": "user", "content": [{"type": "text"}]}, "messages[0].content[0].text"),
    ],
)
def test_content_that_no_template_can_take_is_refused_with_its_place(message: dict[str, Any], param: str) -> None:
    with pytest.raises(InvalidRequest) as caught:
        template_messages(ChatRequest.model_validate({"messages": [message]}).messages)
    assert caught.value.param == param


@pytest.mark.parametrize("name", ["messages", "tokenize", "bos_token", "add_generation_prompt"])
def test_template_variables_of_a_request_cannot_take_the_place_of_ours(name: str) -> None:
    body = ChatRequest.model_validate({"messages": USER, "chat_template_kwargs": {name: 1}})
    with pytest.raises(InvalidRequest, match=name):
        template_variables(body)


@pytest.mark.parametrize(
    ("body", "status", "param", "text"),
    [
        (b"", 400, None, "the body is empty"),
        (b'{"prompt": ', 400, None, "truncated"),
        (b"\xef\xbb\xbf{}", 400, None, "byte 0"),
        (b'{"prompt": "\xff"}', 400, None, "not UTF-8: invalid start byte (byte 12)"),
        (b'{"prompt": "\\ud800 and more"', 400, None, "truncated"),
        (b'{"prompt": "a", "top_p": NaN}', 400, None, "malformed"),
        (b'{"prompt": "a", "top_p": 1e400}', 400, None, "out of range"),
        (b"[" * 100_000, 400, None, "nested too deeply"),
        (b'{"prompt":' * 100_000, 400, None, "nested too deeply"),
        (b"null", 400, None, "body: "),
        (b"[]", 400, None, "body: "),
        (b"{}", 400, "prompt", "prompt: field required"),
        (b'{"prompt": {"a": 1}}', 400, "prompt", "prompt: should be a valid string or should be a valid list"),
        (b'{"prompt": "a", "n": "2"}', 400, "n", "n: should be a valid integer"),
        (b'{"prompt": "a", "stop": [1]}', 400, "stop", "stop: should be a valid string"),
        (b'{"prompt": "a", "top_p": -1}', 400, "top_p", "top_p: should be greater than or equal to 0"),
        (b'{"prompt": []}', 400, "prompt", "prompt must not be empty"),
        (b'{"prompt": "a", "model": "x"}', 404, "model", "The model `x` does not exist."),
        (b'{"prompt": "a", "prompt": "b", "max_tokens": 1}', 200, None, ""),
    ],
)
async def test_bad_bodies_are_told_in_openais_shape(body: bytes, status: int, param: str | None, text: str) -> None:
    async with api() as http:
        reply = await http.post("/v1/completions", content=body, headers={"content-type": "application/json"})
        assert reply.status_code == status
        if status != 200:
            error = reply.json()["error"]
            assert list(error) == ["message", "type", "param", "code"]
            assert (error["type"], error["param"]) == ("invalid_request_error", param)
            assert text in error["message"]
            assert "\n" not in error["message"]


async def test_a_chat_without_messages_is_told_so_in_plain_words() -> None:
    async with api() as http:
        reply = await http.post("/v1/chat/completions", json={"messages": []})
    assert reply.json()["error"] == {
        "message": "messages: must not be empty",
        "type": "invalid_request_error",
        "param": "messages",
        "code": None,
    }


@pytest.mark.plain
async def test_a_prompt_over_the_window_is_refused_with_both_counts() -> None:
    async with api() as http:
        reply = await http.post("/v1/completions", json={"prompt": "x" * 2000})
        assert reply.status_code == 400
        assert reply.json()["error"] == {
            "message": "This model's maximum context length is 1024 tokens. However, you requested 2002 tokens "
            "(2001 in the prompt, 1 to generate).",
            "type": "invalid_request_error",
            "param": "prompt",
            "code": "context_length_exceeded",
        }
        message = {"role": "user", "content": "x" * 2000}
        reply = await http.post("/v1/chat/completions", json={"messages": [message], "stream": True})
        assert reply.status_code == 400
        assert reply.json()["error"]["param"] == "messages"


async def test_a_prompt_of_exactly_the_window_gets_one_token() -> None:
    async with api() as http:
        reply = await http.post("/v1/completions", json={"prompt": [63] * 1024, "max_tokens": 1})
        assert reply.status_code == 200
        assert reply.json()["usage"]["completion_tokens"] == 1


async def test_one_bad_prompt_of_a_batch_refuses_the_batch_and_cancels_the_rest() -> None:
    async with api() as http:
        reply = await http.post("/v1/completions", json={"prompt": ["a?", "x" * 2000], "stream": True})
        assert reply.status_code == 400
        metrics = (await http.get("/metrics")).text
        assert 'tgi_request_failure{err="dropped"} 1.0' in metrics
