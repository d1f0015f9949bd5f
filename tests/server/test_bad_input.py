"""What people and programs send by mistake or on purpose: each case has its answer, and the next request is fine."""

import asyncio
import json
from collections.abc import AsyncIterator
from typing import Any

import httpx
import pytest
from fake_api import api, events
from fakes import VOCAB_SIZE

WINDOW = 1024
GOOD = {"prompt": "a?", "max_tokens": 8, "temperature": 0}


@pytest.fixture
async def http() -> AsyncIterator[httpx.AsyncClient]:
    """A server that is found well after each case: healthy, with an empty cache in use, and right in its answers."""
    async with api(chat_template="{{ messages[0].content }}") as http:
        yield http
        assert (await http.get("/health")).status_code == 200
        reply = await http.post("/v1/completions", json=GOOD)
        assert reply.json()["choices"][0]["text"] == "fine"
        metrics = (await http.get("/metrics")).text
        assert 'tightrope_cache_tokens{state="used"} 0.0' in metrics
        assert "tgi_batch_current_size 0.0" in metrics


@pytest.mark.parametrize(
    ("fields", "status"),
    [
        ({"prompt": ""}, 400),
        ({"prompt": [63] * WINDOW, "max_tokens": 1}, 200),
        ({"prompt": [63] * WINDOW, "max_tokens": 2}, 200),
        ({"prompt": [63] * (WINDOW + 1), "max_tokens": 1}, 400),
        ({"max_tokens": 0}, 200),
        ({"max_tokens": -1}, 200),
        ({"max_tokens": -2}, 400),
        ({"max_tokens": 2**31}, 200),
        ({"max_tokens": 2**63}, 200),
        ({"prompt": "\x00?"}, 200),
        ({"prompt": [-1]}, 400),
        ({"prompt": [VOCAB_SIZE]}, 400),
        ({"prompt": [2**64]}, 400),
        ({"temperature": -1}, 400),
        ({"temperature": 1e-30}, 200),
        ({"temperature": 1e6}, 200),
        ({"top_p": 0}, 200),
        ({"top_p": 1}, 200),
        ({"top_p": 1.0000001}, 400),
        ({"top_p": -0.1}, 400),
        ({"top_k": 0}, 200),
        ({"top_k": -1}, 200),
        ({"top_k": 10**9}, 200),
        ({"repetition_penalty": 0}, 400),
        ({"repetition_penalty": -1}, 400),
        ({"repetition_penalty": 1e9}, 200),
        ({"min_p": 1.1}, 400),
        ({"logit_bias": {"1": 101}}, 400),
        ({"logit_bias": {str(i): 1 for i in range(100_000)}}, 200),  # a body holds no more than half as many again
        ({"rope_scaling": {"type": "linear", "factor": -1}}, 400),
        ({"n": 0}, 400),
        ({"n": 10**9}, 400),
        ({"n": 2, "best_of": 1}, 400),
        ({"seed": -1}, 200),
        ({"seed": -2}, 400),
        ({"seed": 2**64}, 400),
        ({"seed": "7"}, 400),
        ({"stop": ""}, 200),
        ({"stop": [str(i) + "#" for i in range(1000)]}, 200),
        ({"stop": "x" * 1_000_000}, 200),
        ({"logprobs": 21}, 400),
        ({"suffix": "end"}, 400),
        ({"prompt": [63] * (WINDOW - 1), "max_tokens": 1, "echo": True, "logprobs": 5}, 200),
    ],
)
async def test_each_value_is_taken_or_refused_by_name(
    http: httpx.AsyncClient, fields: dict[str, Any], status: int
) -> None:
    for stream in (False, True):
        reply = await http.post("/v1/completions", json={**GOOD, **fields, "stream": stream})
        assert reply.status_code == status, reply.text
        if status == 400:
            error = reply.json()["error"]
            assert error["param"] in (*fields, "prompt"), "lengths are told of the prompt"
            assert "\n" not in error["message"]
        else:
            assert "error" not in reply.text


async def test_a_batch_larger_than_the_most_is_refused(http: httpx.AsyncClient) -> None:
    reply = await http.post("/v1/completions", json={**GOOD, "prompt": ["a?"] * 129})
    assert (reply.status_code, "at most 128" in reply.text) == (400, True)


@pytest.mark.parametrize("field", ["chat_template_kwargs", "template_vars"])
@pytest.mark.parametrize("name", ["messages", "tokenize", "add_generation_prompt"])
async def test_template_variables_that_are_the_servers_are_refused(
    http: httpx.AsyncClient, name: str, field: str
) -> None:
    body = {"messages": [{"role": "user", "content": "a?"}], field: {name: True}}
    reply = await http.post("/v1/chat/completions", json=body)
    assert (reply.status_code, reply.json()["error"]["param"]) == (400, field)


async def test_two_turns_of_the_user_are_one_for_a_template_that_takes_no_two() -> None:
    refuses = "{% if messages | length > 1 %}{{ raise_exception('one turn alone') }}{% endif %}"
    turns = [{"role": "user", "content": "a?"}] * 2
    answered = [*turns, {"role": "assistant", "content": "b"}]
    async with api(chat_template=refuses + "{{ messages[0].content }}") as http:
        merged = await http.post("/v1/chat/completions", json={"messages": turns, "explain": True})
        here = await http.post("/v1/chat/completions", json={"messages": answered, "stream": True})
        there = await http.post("/chat_tokenize", json={"messages": answered})
    explanation = merged.json()["explain"]
    assert explanation["prompts"][0]["text"].removeprefix("<s>") == "a?\n\na?"
    assert "messages were merged into 1 turn: one turn alone" in str(explanation)
    assert (here.status_code, here.json()["error"]["message"]) == (400, "one turn alone")
    assert (here.json()["error"]["param"], there.status_code) == ("messages", 422)
    assert there.json() == {"error": "Template error: one turn alone", "error_type": "template_error"}


async def test_a_link_in_a_message_is_refused_and_not_fetched(http: httpx.AsyncClient) -> None:
    part = {"type": "image_url", "image_url": {"url": "http://127.0.0.1:1/x.png"}}
    reply = await http.post("/v1/chat/completions", json={"messages": [{"role": "user", "content": [part]}]})
    assert (reply.status_code, reply.json()["error"]["param"]) == (400, "messages[0].content[0]")


async def test_when_every_token_is_banned_the_answer_ends_with_an_error(http: httpx.AsyncClient) -> None:
    banned = {str(i): -100 for i in range(VOCAB_SIZE)}
    reply = await http.post("/v1/completions", json={**GOOD, "custom_token_bans": list(range(VOCAB_SIZE))})
    assert reply.json()["choices"][0]["finish_reason"] == "error"
    reply = await http.post("/v1/completions", json={**GOOD, "logit_bias": banned})
    assert reply.json()["choices"][0]["finish_reason"] in ("error", "stop", "length"), "a bias alone may leave the best"
    others = [
        i for i in range(VOCAB_SIZE) if i != ord("f")
    ]  # the bias and the grammar leave one token, which is banned
    together = {"logit_bias": {"102": 100}, "top_k": 1, "guided_regex": "f+", "custom_token_bans": [ord("f")]}
    for fields in (together, {**together, "custom_token_bans": others, "guided_regex": "[a-e]+"}):
        reply = await http.post("/v1/completions", json={**GOOD, **fields})
        assert reply.json()["choices"][0]["finish_reason"] == "error"


ENDLESS = {"$defs": {"a": {"$ref": "#/$defs/b"}, "b": {"$ref": "#/$defs/a"}}, "$ref": "#/$defs/a"}


@pytest.mark.parametrize(
    "fields",
    [
        {"grammar_string": 'root ::= root "a" | "b"'},
        {"grammar_string": 'root ::= "a" root'},
        {"grammar_string": "root ::= " + " | ".join(f'"{i}"' for i in range(10**5))},
        {"grammar_string": 'root ::= (("a"{1,100000}){1,100000}){1,100000}'},
        {"regex_pattern": "((a{1,100000}){1,100000}){1,100000}"},
        {"regex_pattern": "(a"},
        {"regex_pattern": "(a+)+$"},
        {"regex_pattern": "[^\\s\\S]"},
        {"json_schema": {"type": "object", "properties": {"a": {"$ref": "#/$defs/none"}}}},
        {"json_schema": {"type": "object", "properties": {"a": ENDLESS}, "required": ["a"], "$defs": ENDLESS["$defs"]}},
        {"json_schema": {"type": "object", "properties": {"a": {"not": {"type": "string"}}}}},
        {"json_schema": {"type": "object", "properties": {"a": {"type": "string", "pattern": "(a+)+$"}}}},
    ],
    ids=lambda fields: f"{next(iter(fields))} {str(next(iter(fields.values())))[:40]}",
)
async def test_a_grammar_that_cannot_be_enforced_is_refused_at_once_by_both_apis(
    http: httpx.AsyncClient, fields: dict[str, Any]
) -> None:
    ((name, value),) = fields.items()
    reply = await http.post("/v1/completions", json={**GOOD, **fields})
    assert (reply.status_code, reply.json()["error"]["param"]) == (400, name)
    if name != "grammar_string":  # which TGI has no word for
        kind = "regex" if name == "regex_pattern" else "json"
        tgi = {"inputs": "a?", "parameters": {"grammar": {"type": kind, "value": value}}}
        assert (await http.post("/generate", json=tgi)).status_code == 422


@pytest.mark.parametrize(
    ("prompt", "status"),
    [("a\x00b 😀?", 200), (b'"\xc0\xaf?"', 400), (b'"\xed\xa0\x80?"', 400)],
    ids=["NUL", "overlong", "surrogate"],
)
async def test_odd_text_comes_back_exactly_or_is_refused(
    http: httpx.AsyncClient, prompt: str | bytes, status: int
) -> None:
    raw = prompt if isinstance(prompt, bytes) else json.dumps(prompt).encode()
    content = b'{"echo": true, "max_tokens": 0, "prompt": ' + raw + b"}"
    reply = await http.post("/v1/completions", content=content, headers={"content-type": "application/json"})
    assert reply.status_code == status
    if status == 200:
        assert reply.json()["choices"][0]["text"] == prompt


async def test_requests_of_one_id_are_independent(http: httpx.AsyncClient) -> None:
    body = {**GOOD, "request_id": "the same"}
    replies = await asyncio.gather(*(http.post("/v1/completions", json=body) for _ in range(3)))
    assert [reply.json()["choices"][0]["text"] for reply in replies] == ["fine"] * 3
    assert len({reply.json()["id"] for reply in replies}) == 3


async def test_streamed_usage_counts_exactly_and_tells_what_was_cached(http: httpx.AsyncClient) -> None:
    body = {**GOOD, "prompt": "a long beginning?", "stream": True, "stream_options": {"include_usage": True}}
    usages = [events((await http.post("/v1/completions", json=body)).text)[-2]["usage"] for _ in range(2)]
    num_prompt = 1 + len("a long beginning?")  # BOS, and one token a byte
    assert [usage["prompt_tokens"] for usage in usages] == [num_prompt] * 2
    assert [usage["completion_tokens"] for usage in usages] == [len("fine") + 1] * 2
    assert [usage["prompt_tokens_details"]["cached_tokens"] for usage in usages] == [0, num_prompt - 1]
