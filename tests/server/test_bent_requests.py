"""What clients send in another form than the contract's, and plainly mean: it is served, and `explain` lists it."""

from collections.abc import AsyncIterator, Mapping
from typing import Any

import httpx
import pytest
from fake_api import api, events
from fakes import EOS
from plain_chats import CHAT, TEMPLATE, USER, chat_prompt

WINDOW = 1024
GOOD = {"prompt": "a?", "max_tokens": 8, "temperature": 0}


@pytest.fixture
async def http() -> AsyncIterator[httpx.AsyncClient]:
    """A model that answers "fine"."""
    async with api(chat_template=TEMPLATE) as http:
        yield http


ENDLESS: Mapping[str, tuple[str, dict[str, Any]]] = {
    "chat": ("/v1/chat/completions", {"messages": [USER], "ignore_eos": True}),
    "completions": ("/v1/completions", {"prompt": "a?", "ignore_eos": True}),
    "llama.cpp": ("/completion", {"prompt": "a?", "ignore_eos": True}),
    "koboldcpp": ("/api/v1/generate", {"prompt": "a?", "ban_eos_token": True}),
    "ollama": ("/api/generate", {"prompt": "a?", "raw": True, "stream": False, "options": {"ignore_eos": True}}),
}
NAMES = {"chat": "max_completion_tokens", "llama.cpp": "n_predict", "koboldcpp": "max_length", "ollama": "num_predict"}


def num_written(answer: Mapping[str, Any]) -> int:
    """Tokens of an answer of any dialect."""
    found = answer.get("usage") or (answer.get("results") or [answer])[0]
    return int(next(found[name] for name in ("completion_tokens", "tokens_predicted", "eval_count") if name in found))


@pytest.mark.parametrize("value", [WINDOW, 32_000, 2**31, 2**63, 10**30, 5e9, -1])
@pytest.mark.parametrize("dialect", ENDLESS)
async def test_an_answer_that_may_be_longer_than_the_window_ends_with_it(dialect: str, value: float) -> None:
    path, body = ENDLESS[dialect]
    name = NAMES.get(dialect, "max_tokens")
    body = {**body, "explain": True} | ({"options": {"ignore_eos": True, name: value}} if dialect == "ollama" else {})
    async with api("x" * 2000, chat_template="{{ messages[0].content }}?") as http:
        reply = await http.post(path, json={**body, name: value} if dialect != "ollama" else body)
    assert reply.status_code == 200, reply.text
    room = WINDOW - 1 - len("Hi?" if dialect == "chat" else "a?")  # A BOS stands in front.
    assert num_written(reply.json()) == room
    cut = [{"field": "max_tokens", "how": f"up to the window's end: {room}"}]
    assert reply.json()["explain"]["bent"] == (cut if WINDOW <= value <= 2**62 else []) or value == 5e9


async def test_the_end_of_the_window_is_streamed_too() -> None:
    async with api("x" * 2000) as http:
        body = {**GOOD, "max_tokens": 10**9, "ignore_eos": True, "stream": True}
        streamed = events((await http.post("/v1/completions", json=body)).text)
    assert streamed[-2]["choices"][0]["finish_reason"] == "length"


async def test_ollama_takes_0_for_no_bound_and_the_others_for_no_token() -> None:
    async with api(chat_template=TEMPLATE) as http:
        raw = {"prompt": "a?", "raw": True, "stream": False, "options": {"num_predict": 0}}
        assert (await http.post("/api/generate", json=raw)).json()["response"] == "fine"
        for path, body in (
            ("/v1/completions", {**GOOD, "max_tokens": 0}),
            ("/v1/chat/completions", {**CHAT, "max_tokens": 0}),
            ("/completion", {"prompt": "a?", "n_predict": 0}),
            ("/api/v1/generate", {"prompt": "a?", "max_length": 0}),
        ):
            reply = await http.post(path, json=body)
            assert reply.status_code == 200
            assert "fine" not in reply.text


@pytest.mark.parametrize("name", ["top_p", "typical_p", "tfs"])
async def test_a_share_of_zero_keeps_one_token(http: httpx.AsyncClient, name: str) -> None:
    for path, body in (
        ("/v1/completions", {"prompt": "a?", "max_tokens": 8, name: 0}),
        ("/v1/chat/completions", {"messages": [USER], "max_tokens": 8, name: 0.0}),
        ("/completion", {"prompt": "a?", "n_predict": 8, name: 0}),
        ("/api/v1/generate", {"prompt": "a?", "max_length": 8, name: 0}),
        ("/api/generate", {"prompt": "a?", "raw": True, "stream": False, "options": {"num_predict": 8, name: 0}}),
    ):
        reply = await http.post(path, json=body)
        assert reply.status_code == 200, reply.text
        assert "fine" in reply.text
    refused = await http.post("/generate", json={"inputs": "a?", "parameters": {"top_p": 0}})
    assert refused.status_code == 422


@pytest.mark.parametrize(
    "fields",
    [
        {"max_tokens": 16.0},
        {"top_k": 40.0, "seed": 42.0, "n": 1.0, "min_tokens": 1.0},
        {"stop_token_ids": [1.0, 2], "prompt_logprobs": 0.0, "truncate_prompt_tokens": 5.0},
        {"repetition_penalty_range": 4.0, "mirostat_mode": 0.0},
    ],
    ids=str,
)
async def test_a_whole_number_may_be_written_as_a_float(http: httpx.AsyncClient, fields: dict[str, Any]) -> None:
    for path, body in (("/v1/completions", GOOD), ("/v1/chat/completions", CHAT)):
        reply = await http.post(path, json={**body, **fields, "explain": True})
        assert reply.status_code == 200, reply.text
        bent = {told["field"] for told in reply.json()["explain"]["bent"]}
        assert bent == {*fields} - {"repetition_penalty_range", "mirostat_mode"}
    for path, body in (
        ("/v1/completions", {**GOOD, "prompt": [97.0, 63.0]}),
        ("/generate", {"inputs": "a?", "parameters": {"max_new_tokens": 8.0, "seed": 1.0}}),
        ("/api/v1/generate", {"prompt": "a?", "max_length": 8.0, "top_k": 3.0}),
        ("/api/generate", {"prompt": "a?", "raw": True, "stream": False, "options": {"num_predict": 8.0}}),
        ("/completion", {"prompt": "a?", "n_predict": 8.0, "n_probs": 1.0}),
    ):
        reply = await http.post(path, json=body)
        assert reply.status_code == 200, reply.text
    half = await http.post("/v1/completions", json={**GOOD, "max_tokens": 16.5})
    assert (half.status_code, half.json()["error"]["param"]) == (400, "max_tokens")


@pytest.mark.parametrize("stops", [[""], ["", "n"], [None, "n", ""], "", []], ids=str)
async def test_empty_stop_strings_are_passed_over(http: httpx.AsyncClient, stops: object) -> None:
    wanted = "fi" if "n" in (stops or ()) else "fine"
    for path, body, name in (
        ("/v1/completions", GOOD, "stop"),
        ("/v1/chat/completions", CHAT, "stop"),
        ("/completion", {"prompt": "a?", "n_predict": 8}, "stop"),
        ("/api/v1/generate", {"prompt": "a?", "max_length": 8}, "stop_sequence"),
        ("/v1/completions", GOOD, "stopping_strings"),
    ):
        reply = await http.post(path, json={**body, name: stops})
        assert reply.status_code == 200, reply.text
        assert f'"{wanted}"' in reply.text
    options = {"num_predict": 8, "stop": stops}
    reply = await http.post("/api/generate", json={"prompt": "a?", "raw": True, "stream": False, "options": options})
    assert reply.json()["response"] == wanted
    if isinstance(stops, list):
        tgi = await http.post("/generate", json={"inputs": "a?", "parameters": {"stop": stops}})
        assert tgi.json()["generated_text"] == ("fin" if "n" in stops else "fine")


@pytest.mark.parametrize(
    ("text", "wanted"),
    [
        ('"nice \\ud83d"', "nice \ufffd"),
        ('"\\udc00\\ud83d\\ude00"', "\ufffd\U0001f600"),
        ('"\\\\ud83d"', "\\ud83d"),
        ('"\\\\\\ud83d\\u0041"', "\\\ufffdA"),
        ('"\\ud83d\\ud83d\\ude00"', "\ufffd\U0001f600"),
    ],
)
async def test_half_a_character_becomes_the_replacement_character(
    http: httpx.AsyncClient, text: str, wanted: str
) -> None:
    headers = {"content-type": "application/json"}
    raw = b'{"echo": true, "max_tokens": 0, "explain": true, "prompt": %b}' % text.encode()
    reply = await http.post("/v1/completions", content=raw, headers=headers)
    assert reply.json()["choices"][0]["text"] == wanted
    bent = [told["field"] for told in reply.json()["explain"]["bent"]]
    assert bent == (["body"] if "\ufffd" in wanted else [])
    places = {
        "/v1/chat/completions": '{"messages":[{"role":"user","content":%s},{"role":"user","content":"?"}]}',
        "/generate": '{"inputs":%s}',
        "/api/chat": '{"messages":[{"role":"user","content":%s}],"stream":false}',
        "/api/v1/generate": '{"prompt":"a?","stop_sequence":[%s]}',
        "/tokenize": '{"prompt":%s}',
        "/v1/token/encode": '{"text":%s}',
        "/api/extra/tokencount": '{"prompt":%s}',
    }
    for path, body in places.items():
        reply = await http.post(path, content=(body % text).encode(), headers=headers)
        assert reply.status_code == 200, (path, reply.text)


@pytest.mark.parametrize("role", ["system", "user", "assistant", "tool"])
async def test_content_that_is_null_or_absent_is_an_empty_text(http: httpx.AsyncClient, role: str) -> None:
    for empty in ({"content": None}, {}, {"content": None, "tool_calls": []}, {"content": None, "tool_calls": None}):
        text, bent = await chat_prompt(http, USER, {"role": role, **empty}, {"role": "user", "content": "Still there"})
        shown = "[user]<tool_response>\n\n</tool_response>" if role == "tool" else f"[{role}]"
        assert text == f"[user]Hi{shown}[user]Still there?"
        assert bent == ["messages[1].content"]
    text, _ = await chat_prompt(http, USER, {"role": "assistant", "content": None, "reasoning_content": "Hm."}, USER)
    assert text == "[user]Hi[assistant][user]Hi?"


@pytest.mark.parametrize(
    ("content", "wanted"),
    [
        ([{"type": "input_text", "text": "a"}], "(text:a)"),
        ([{"type": "output_text", "text": "a", "annotations": []}], "(text:a)"),
        ([{"type": "refusal", "refusal": "no"}], "(text:no)"),
        ({"type": "text", "text": "a"}, "(text:a)"),
        (["a", "b"], "(text:a)(text:b)"),
        (["a", {"type": "text", "text": "b"}, None], "(text:a)(text:b)"),
        ([{"text": "a"}], "(text:a)"),
        ([{"type": "text", "text": None}], "(text:)"),
        ([], ""),
    ],
    ids=str,
)
async def test_content_is_taken_in_every_form_that_text_has(
    http: httpx.AsyncClient, content: object, wanted: str
) -> None:
    text, bent = await chat_prompt(http, {"role": "user", "content": content})
    assert text == f"[user]{wanted}?"
    assert all(name.startswith("messages[0].content") for name in bent)
    assert bent or content == [] or (isinstance(content, list) and content[0] == {"type": "text", "text": None})


async def test_a_part_that_is_no_text_is_refused_by_its_place(http: httpx.AsyncClient) -> None:
    for part in ({"type": "input_image", "image_url": "x"}, {"type": "text"}, {"type": "tool_use"}, 7):
        body = {**CHAT, "messages": [USER, {"role": "user", "content": ["a", part]}]}
        reply = await http.post("/v1/chat/completions", json=body)
        assert reply.status_code == 400
        assert reply.json()["error"]["param"].startswith("messages[1].content")


@pytest.mark.parametrize(
    "part",
    [
        {"type": "thinking", "thinking": "Hm."},
        {"type": "thinking", "thinking": "Hm.", "signature": "x"},
        {"type": "thinking", "thinking": [{"type": "text", "text": "Hm."}]},
        {"type": "reasoning", "text": "Hm."},
        {"type": "reasoning", "reasoning": "Hm."},
    ],
    ids=str,
)
async def test_a_part_of_thoughts_is_what_the_assistant_thought(part: dict[str, Any]) -> None:
    template = "{% for m in messages %}[{{ m.role }}]({{ m.reasoning_content }}){{ m.content }}{% endfor %}?"
    async with api(chat_template=template) as http:
        turn = {"role": "assistant", "content": [part, {"type": "text", "text": "Yes"}]}
        text, bent = await chat_prompt(http, USER, turn, USER)
        assert text == "[user]()Hi[assistant](Hm.)Yes[user]()Hi?"
        assert bent == ["messages[1].content[0]"]
        of_user = await http.post(
            "/v1/chat/completions", json={**CHAT, "messages": [{"role": "user", "content": [part]}]}
        )
        assert (of_user.status_code, of_user.json()["error"]["param"]) == (400, "messages[0].content[0]")


ROUTES: Mapping[str, dict[str, Any]] = {
    "/v1/completions": GOOD,
    "/v1/chat/completions": CHAT,
    "/completion": {"prompt": "a?", "n_predict": 8},
    "/api/v1/generate": {"prompt": "a?", "max_length": 8},
    "/api/generate": {"prompt": "a?", "raw": True, "stream": False},
    "/api/chat": {"messages": [USER], "stream": False},
    "/tokenize": {"prompt": "a?"},
}


@pytest.mark.parametrize(("setting", "refusing"), [(None, 2), (True, 0), (False, len(ROUTES))])
async def test_a_name_that_is_no_models_is_taken_where_the_settings_say_so(setting: bool | None, refusing: int) -> None:
    async with api(chat_template=TEMPLATE, any_model_name=setting) as http:
        for place, (path, body) in enumerate(ROUTES.items()):
            reply = await http.post(path, json={**body, "model": "claude-sonnet-9", "explain": True})
            assert reply.status_code == (404 if place < refusing else 200), (path, reply.text)
            if reply.status_code == 200 and path != "/tokenize":
                assert "model" in [bent["field"] for bent in reply.json()["explain"]["bent"]]
        assert (await http.get("/v1/models/gpt-9")).status_code == (200 if setting else 404)


@pytest.mark.parametrize("choice", ["auto", "required"])
async def test_a_call_that_is_cut_leaks_no_mark_whole_and_streamed(choice: str) -> None:
    call = '<tool_call>\n{"name": "tide", "arguments": {"port":"Hull"}}\n</tool_call>'
    tide = {"name": "tide", "parameters": {"type": "object", "properties": {"port": {"const": "Hull"}}}}
    tools = {"tools": [{"type": "function", "function": tide}], "tool_choice": choice}
    async with api(call, chat_template=TEMPLATE) as http:
        for num_tokens in range(2, len(call) - 1, 5):
            body = {**CHAT, **tools, "max_tokens": num_tokens}
            (whole,) = (await http.post("/v1/chat/completions", json=body)).json()["choices"]
            assert whole["finish_reason"] in ("length", "tool_calls")
            assert not whole["message"]["content"], num_tokens
            reply = await http.post("/v1/chat/completions", json={**body, "stream": True})
            chunks = [chunk["choices"][0]["delta"] for chunk in events(reply.text) if chunk != "[DONE]"]
            assert "".join(delta.get("content") or "" for delta in chunks) == ""
            pieces = [call for delta in chunks for call in delta.get("tool_calls", ())]
            joined = "".join(piece["function"]["arguments"] for piece in pieces)
            calls = whole["message"].get("tool_calls", [])
            assert joined == "".join(call["function"]["arguments"] for call in calls)


@pytest.mark.parametrize(
    ("fields", "wanted"),
    [
        ({"reasoning_effort": "none"}, "none False"),
        ({"reasoning_effort": "high"}, "high True"),
        ({"enable_thinking": False}, " False"),
        ({"reasoning_effort": "high", "enable_thinking": False}, "high False"),
        ({"reasoning_effort": "high", "chat_template_kwargs": {"enable_thinking": False}}, "high False"),
        ({}, " "),
    ],
    ids=str,
)
async def test_an_effort_to_think_reaches_a_template_that_reads_it(fields: dict[str, Any], wanted: str) -> None:
    template = "{{ reasoning_effort }} {{ enable_thinking }}{{ messages[0].content }}?"
    async with api(chat_template=template) as http:
        reply = (await http.post("/v1/chat/completions", json={**CHAT, **fields, "explain": True})).json()["explain"]
        assert reply["prompts"][0]["text"].removeprefix("<s>") == f"{wanted}Hi?"
        assert reply["ignored"] == []
    async with api(chat_template=TEMPLATE) as http:
        reply = (await http.post("/v1/chat/completions", json={**CHAT, **fields, "explain": True})).json()["explain"]
        assert {told["field"] for told in reply["ignored"]} == fields.keys() - {"chat_template_kwargs"}


@pytest.mark.parametrize(("spared", "reason"), [(None, "length"), (True, "stop"), ([EOS], "stop"), (f"{EOS}", "stop")])
async def test_xtc_spares_the_end_token_where_it_is_told_to(spared: object, reason: str) -> None:
    """Two tokens are likely, the end a little more than the other: XTC takes it away."""
    async with api(lambda token_ids: EOS) as http:
        bias = {"logit_bias": {str(ord("x")): 50, str(EOS): 50.5}}
        body = {"prompt": "a?", "max_tokens": 60, "seed": 1, "xtc_probability": 1.0, "xtc_threshold": 0.1, **bias}
        bare = {"top_k": 2, "temperature": 60}
        reply = await http.post("/v1/completions", json={**body, **bare, "xtc_ignore_tokens": spared})
        assert reply.status_code == 200, reply.text
        assert reply.json()["choices"][0]["finish_reason"] == reason
        off = await http.post("/v1/completions", json={**GOOD, "xtc_ignore_tokens": [EOS], "explain": True})
        assert [told["field"] for told in off.json()["explain"]["ignored"]] == ["xtc_ignore_tokens"]
