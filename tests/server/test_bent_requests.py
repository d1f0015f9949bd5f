"""What clients send in another form than the contract's, and plainly mean: it is served, and `explain` lists it."""

import json
from collections.abc import AsyncIterator, Mapping
from typing import Any

import httpx
import pytest
from fake_api import api, events
from fakes import EOS

TEMPLATE = (
    "{% for m in messages %}[{{ m.role }}]{% if m.content is string %}{{ m.content }}{% else %}"
    "{% for p in m.content %}({{ p.type }}:{{ p.text }}){% endfor %}{% endif %}"
    "{% for c in m.tool_calls or [] %}{{ c.function.arguments.port }}{% endfor %}{% endfor %}?"
)
WINDOW = 1024
GOOD = {"prompt": "a?", "max_tokens": 8, "temperature": 0}
USER = {"role": "user", "content": "Hi"}
CHAT = {"messages": [USER], "max_tokens": 8, "temperature": 0}


def tool(name: str) -> dict[str, Any]:
    return {"type": "function", "function": {"name": name, "parameters": {"type": "object", "properties": {}}}}


@pytest.fixture
async def http() -> AsyncIterator[httpx.AsyncClient]:
    """A model that answers "fine"."""
    async with api(chat_template=TEMPLATE) as http:
        yield http


async def chat_prompt(http: httpx.AsyncClient, *messages: object) -> tuple[str, list[str]]:
    """What becomes of messages, and the names of the fields that were bent."""
    reply = await http.post("/v1/chat/completions", json={**CHAT, "messages": messages, "explain": True})
    assert reply.status_code == 200, reply.text
    told = reply.json()["explain"]
    return told["prompts"][0]["text"].removeprefix("<s>"), [bent["field"] for bent in told["bent"]]


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
    "arguments",
    [{"port": "Hull"}, '{"port": "Hull"}', '{"port": "Hull\\ud83d"}', "", None, {}, []],
    ids=str,
)
async def test_arguments_of_an_earlier_call_are_an_object_or_its_text(
    http: httpx.AsyncClient, arguments: object
) -> None:
    call = {"id": "c1", "type": "function", "function": {"name": "tide", "arguments": arguments}}
    turn = {"role": "assistant", "content": None, "tool_calls": [call]}
    reply = {"role": "tool", "tool_call_id": "c1", "content": "High"}
    text, bent = await chat_prompt(http, USER, turn, reply)
    assert ("Hull" in text) == ("Hull" in json.dumps(arguments))
    place = ["messages[1].tool_calls[0].function.arguments"]
    assert bent == (place if isinstance(arguments, dict | list) else [])


@pytest.mark.parametrize(
    ("result", "told"),
    [
        ({"tide": "High", "at": 9.5, "é": None}, '{"tide": "High", "at": 9.5, "é": null}'),
        ([{"at": 9}, {"at": 21}], '[{"at": 9}, {"at": 21}]'),
        ([1, "High"], '[1, "High"]'),
        ({"type": "Feature", "text": 1}, '{"type": "Feature", "text": 1}'),
        ({"text": "High", "at": 9}, '{"text": "High", "at": 9}'),
        ({}, "{}"),
        (9, "9"),
        (False, "false"),
    ],
    ids=str,
)
async def test_a_tools_result_of_any_json_is_its_text(http: httpx.AsyncClient, result: object, told: str) -> None:
    call = {"id": "c1", "type": "function", "function": {"name": "tide", "arguments": "{}"}}
    turn = {"role": "assistant", "content": None, "tool_calls": [call]}
    text, bent = await chat_prompt(http, USER, turn, {"role": "tool", "tool_call_id": "c1", "content": result})
    assert text.endswith(f"<tool_response>\n{told}\n</tool_response>?")
    assert bent == ["messages[2].content"]
    items = [
        {"role": "user", "content": "Hi"},
        {"type": "function_call", "call_id": "c1", "name": "tide", "arguments": "{}"},
        {"type": "function_call_output", "call_id": "c1", "output": result},
    ]
    reply = await http.post("/v1/responses", json={"input": items, "max_output_tokens": 8, "explain": True})
    assert reply.status_code == 200, reply.text
    explained = reply.json()["explain"]
    assert explained["prompts"][0]["text"].removeprefix("<s>") == text
    assert [bent["field"] for bent in explained["bent"]] == ["input[2].output"]


@pytest.mark.parametrize(
    ("result", "place"),
    [
        ({"type": "input_image", "image_url": "x"}, "[0]"),
        ([{"at": 9}, {"type": "file", "file": {}}], "[0].text"),
    ],
    ids=str,
)
async def test_a_tools_result_of_parts_that_are_no_text_is_refused(
    http: httpx.AsyncClient, result: object, place: str
) -> None:
    answer = {"role": "tool", "tool_call_id": "c1", "content": result}
    reply = await http.post("/v1/chat/completions", json={**CHAT, "messages": [USER, answer]})
    assert (reply.status_code, reply.json()["error"]["param"]) == (400, f"messages[1].content{place}")
    item = {"type": "function_call_output", "call_id": "c1", "output": result}
    reply = await http.post("/v1/responses", json={"input": [item]})
    assert (reply.status_code, reply.json()["error"]["param"]) == (400, f"input[0].output{place}")


SHOWS_CALLS = (
    "{% for m in messages %}[{{ m.role }} {{ m.name }} {{ m.tool_call_id }}]{{ m.content or '' }}"
    "{% for c in m.tool_calls or [] %}({{ c.type }} {{ c.id }} {{ c.function.name }} {{ c.function.arguments.port }})"
    "{% endfor %}{% endfor %}{{ tools | map(attribute='function.name') | join('+') if tools }}?"
)


async def test_calls_of_functions_and_their_results_are_those_of_tools() -> None:
    def called(name: str, port: str, **more: object) -> dict[str, Any]:
        return {"role": "assistant", "function_call": {"name": name, "arguments": json.dumps({"port": port})}, **more}

    turns: list[dict[str, Any]] = [
        USER,
        called("tide", "Hull", content=None),
        {"role": "function", "name": "tide", "content": "High"},
        called("lamp", "Rome", content="Look."),
        called("tide", "Rome"),
        {"role": "function", "name": "lamp", "content": {"lit": True}},
        {"role": "function", "name": "tide", "content": "None"},
        {"role": "function", "name": "other", "content": "?"},
        {"role": "assistant", "content": "Well", "function_call": None},
    ]
    async with api(chat_template=SHOWS_CALLS) as http:
        text, bent = await chat_prompt(http, *turns)
        both = {**called("tide", "Hull"), "tool_calls": [{"function": {"name": "tide"}}]}
        refused = await http.post("/v1/chat/completions", json={**CHAT, "messages": [both]})
        broken = {"role": "assistant", "function_call": {"arguments": "{}"}}
        nameless = await http.post("/v1/chat/completions", json={**CHAT, "messages": [broken]})
    assert text == (
        "[user  ]Hi[assistant  ](function call00001 tide Hull)[tool tide call00001]High"
        "[assistant  ]Look.(function call00003 lamp Rome)[assistant  ](function call00004 tide Rome)"
        '[tool lamp call00003]{"lit": true}[tool tide call00004]None[tool other ]?[assistant  ]Well?'
    )
    calls = [f"messages[{place}].function_call" for place in (1, 3, 4)]
    results = [f"messages[{place}].role" for place in (2, 5, 6, 7)]
    assert sorted(bent) == sorted([*calls, *results, "messages[5].content"])
    assert (refused.status_code, refused.json()["error"]["param"]) == (400, "messages[0].function_call")
    assert (nameless.status_code, nameless.json()["error"]["param"]) == (400, "messages[0].function_call.name")


@pytest.mark.parametrize(
    ("choice", "called", "bent"),
    [
        ({}, "tide", ["functions"]),
        ({"function_call": None}, "tide", ["functions"]),
        ({"function_call": "auto"}, "tide", ["functions", "function_call"]),
        ({"function_call": {"name": "lamp"}}, "lamp", ["functions", "function_call"]),
        ({"function_call": "none"}, None, ["functions", "function_call"]),
    ],
    ids=str,
)
async def test_functions_are_tools_whose_one_call_is_told_in_their_form(
    choice: dict[str, Any], called: str | None, bent: list[str]
) -> None:
    call = '<tool_call>\n{"name": "tide", "arguments": {"port": "Hull"}}\n</tool_call>'
    lamp = {"name": "lamp", "parameters": {"type": "object", "properties": {}, "additionalProperties": False}}
    body = {**CHAT, "functions": [{"name": "tide"}, lamp], "max_tokens": 300, **choice}
    async with api(call * 2, chat_template=SHOWS_CALLS) as http:
        whole = (await http.post("/v1/chat/completions", json={**body, "explain": True})).json()
        streamed = events((await http.post("/v1/chat/completions", json={**body, "stream": True})).text)
    assert [told["field"] for told in whole["explain"]["bent"]] == bent
    assert ("tide+lamp" in whole["explain"]["prompts"][0]["text"]) == (called is not None)
    (answer,) = whole["choices"]
    ends = [chunk["choices"][0]["finish_reason"] for chunk in streamed[:-1]]
    assert answer["finish_reason"] == ends[-1] == ("stop" if called is None else "function_call")
    assert "tool_calls" not in answer["message"]
    deltas = [chunk["choices"][0]["delta"] for chunk in streamed[:-1]]
    told = [delta["function_call"] for delta in deltas if "function_call" in delta]
    if called is None:
        assert (told, answer["message"]["content"]) == ([], call * 2)
        return
    made = answer["message"]["function_call"]
    assert (made["name"], answer["message"]["content"]) == (called, None)
    assert isinstance(json.loads(made["arguments"]), dict)
    assert [piece["name"] for piece in told if "name" in piece] == [called]
    assert isinstance(json.loads("".join(piece["arguments"] for piece in told)), dict)


@pytest.mark.parametrize(
    ("fields", "param"),
    [
        ({"functions": [{"name": "tide"}], "tools": [tool("lamp")]}, "functions"),
        ({"functions": [{"name": "tide"}], "function_call": {"name": "lamp"}}, "tool_choice"),
        ({"functions": {"name": "tide"}}, "functions"),
        ({"function_call": {"name": "tide"}}, "function_call"),
    ],
    ids=str,
)
async def test_functions_of_which_no_sense_can_be_made_are_refused(
    http: httpx.AsyncClient, fields: dict[str, Any], param: str
) -> None:
    reply = await http.post("/v1/chat/completions", json={**CHAT, **fields})
    assert (reply.status_code, reply.json()["error"]["param"]) == (400, param)


@pytest.mark.parametrize("kind", ["", None])
async def test_a_tool_without_a_type_is_a_function(kind: str | None) -> None:
    template = "{% for t in tools or [] %}{{ t.type }} {{ t.function.name }}{% endfor %}" + TEMPLATE
    bare = {"type": kind, "name": "tide"}
    asks: list[tuple[str, dict[str, Any]]] = [
        ("/v1/chat/completions", {**CHAT, "tools": [{**tool("tide"), "type": kind}]}),
        ("/api/chat", {"messages": [USER], "stream": False, "tools": [{**tool("tide"), "type": kind}]}),
        ("/v1/responses", {"input": "Hi", "tools": [bare]}),
        ("/v1/messages", {"messages": [USER], "max_tokens": 8, "tools": [{**bare, "input_schema": {}}]}),
    ]
    async with api(chat_template=template) as http:
        for path, body in asks:
            reply = await http.post(path, json={**body, "explain": True})
            assert reply.status_code == 200, (path, reply.text)
            told = reply.json()["explain"]
            assert told["prompts"][0]["text"].removeprefix("<s>") == "function tide[user]Hi?"
            assert [bent["field"] for bent in told["bent"]] == ["tools[0]"] * (kind == "")
        call = {"id": "c1", "type": kind, "function": {"name": "tide", "arguments": "{}"}}
        _, bent = await chat_prompt(http, USER, {"role": "assistant", "tool_calls": [call]})
    assert bent == ["messages[1].tool_calls[0].type"] * (kind == "")


@pytest.mark.parametrize("tools", [{}, {"tools": []}, {"tools": None}], ids=str)
async def test_a_choice_among_no_tools_changes_nothing_unless_one_is_to_be_called(
    http: httpx.AsyncClient, tools: dict[str, Any]
) -> None:
    for choice in ("auto", "none", None):
        reply = await http.post("/v1/chat/completions", json={**CHAT, **tools, "tool_choice": choice})
        assert reply.json()["choices"][0]["message"]["content"] == "fine"
    for choice in ("required", {"type": "function", "function": {"name": "f"}}):
        reply = await http.post("/v1/chat/completions", json={**CHAT, **tools, "tool_choice": choice})
        assert (reply.status_code, reply.json()["error"]["param"]) == (400, "tool_choice")


@pytest.mark.parametrize(
    ("choice", "called", "bent"),
    [
        ("any", ["tide", "lamp"], ["tool_choice"]),
        ({"type": "any"}, ["tide", "lamp"], ["tool_choice"]),
        ({"type": "required"}, ["tide", "lamp"], ["tool_choice"]),
        ({"type": "function", "name": "lamp"}, ["lamp"], []),
        ({"function": {"name": "lamp"}}, ["lamp"], []),
        ({"type": "allowed_tools", "mode": "required", "tools": [{"name": "lamp"}]}, ["lamp"], []),
        ({"type": "allowed_tools", "allowed_tools": {"mode": "required", "tools": [tool("lamp")]}}, ["lamp"], []),
        ({"type": "auto"}, [], ["tool_choice"]),
        ({"type": "none"}, [], ["tool_choice"]),
        ({"type": "allowed_tools", "allowed_tools": {"mode": "auto", "tools": [tool("lamp")]}}, [], []),
    ],
    ids=str,
)
async def test_a_choice_among_tools_is_taken_in_every_form(choice: object, called: list[str], bent: list[str]) -> None:
    body = {**CHAT, "tools": [tool("tide"), tool("lamp")], "tool_choice": choice, "max_tokens": 500, "explain": True}
    async with api(chat_template=TEMPLATE) as http:
        reply = await http.post("/v1/chat/completions", json={**body, "temperature": 1, "seed": 4})
    assert reply.status_code == 200, reply.text
    names = {call["function"]["name"] for call in reply.json()["choices"][0]["message"].get("tool_calls", ())}
    assert names <= set(called)
    assert bool(names) == bool(called)
    assert [told["field"] for told in reply.json()["explain"]["bent"]] == bent


async def test_what_is_null_in_a_schema_is_absent(http: httpx.AsyncClient) -> None:
    port = {"type": "string", "enum": None, "pattern": None, "maxLength": 3, "title": None}
    schema = {"type": "object", "properties": {"port": port, "enum": {"const": None}}, "required": ["port", "enum"]}
    schema |= {"$defs": None, "additionalProperties": False}
    format_ = {"type": "json_schema", "json_schema": {"name": "x", "schema": schema}}
    reply = await http.post("/v1/chat/completions", json={**CHAT, "response_format": format_, "max_tokens": 300})
    assert reply.status_code == 200, reply.text
    made = json.loads(reply.json()["choices"][0]["message"]["content"])
    assert made["enum"] is None
    assert len(made["port"]) <= 3
    function = {"name": "tide", "parameters": {**schema, "required": None}, "strict": None}
    for choice in ("auto", "required"):
        body = {**CHAT, "tools": [{"type": "function", "function": function}], "tool_choice": choice}
        reply = await http.post("/v1/chat/completions", json=body)
        assert reply.status_code == 200, reply.text
    empty = {"name": "f", "parameters": {"type": "object", "properties": None, "required": None}}
    body = {**CHAT, "tools": [{"type": "function", "function": empty}], "tool_choice": "required"}
    assert (await http.post("/v1/chat/completions", json=body)).status_code == 200


@pytest.mark.parametrize(
    "choice",
    [
        {"type": "function", "function": {"name": "other"}},
        {"type": "allowed_tools", "allowed_tools": {"mode": "auto", "tools": [tool("other")]}},
        {"type": "allowed_tools", "allowed_tools": {"mode": "some", "tools": []}},
        {"type": "allowed_tools", "allowed_tools": {"mode": "required", "tools": []}},
        {"type": "allowed_tools"},
        {"type": "function"},
        {"type": "web_search"},
        {},
        "some",
    ],
    ids=str,
)
async def test_a_choice_that_there_is_not_is_refused_by_its_name(http: httpx.AsyncClient, choice: object) -> None:
    reply = await http.post("/v1/chat/completions", json={**CHAT, "tools": [tool("tide")], "tool_choice": choice})
    assert (reply.status_code, reply.json()["error"]["param"]) == (400, "tool_choice")


@pytest.mark.parametrize(
    "form", [{"type": "function", "parameters": {}}, {"parameters": {}}, {"input_schema": {}}], ids=str
)
async def test_a_function_may_stand_beside_its_type_as_in_other_dialects(form: dict[str, Any]) -> None:
    template = "{% for t in tools %}{{ t.type }} {{ t.function | tojson }}{% endfor %}{{ messages[0].content }}?"
    async with api(chat_template=template) as http:
        body = {**CHAT, "tools": [{"name": "tide", "description": "Tells tides.", **form}], "explain": True}
        reply = await http.post("/v1/chat/completions", json=body)
    assert reply.status_code == 200, reply.text
    told = reply.json()["explain"]
    shown = 'function {"name": "tide", "description": "Tells tides.", "parameters": {}}Hi?'
    assert told["prompts"][0]["text"].removeprefix("<s>") == shown
    assert [bent["field"] for bent in told["bent"]] == ["tools[0]"]


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


@pytest.mark.parametrize("name", ["a.b/c-d_e", "server:tool", "x" * 128])
async def test_functions_may_have_the_names_that_gateways_give_them(name: str) -> None:
    tools = [tool(name)]
    call = f'<tool_call>\n{{"name": "{name}", "arguments": {{}}}}\n</tool_call>'
    async with api(call, chat_template=TEMPLATE) as http:
        body = {**CHAT, "max_tokens": 400, "tools": tools}
        whole = await http.post("/v1/chat/completions", json=body)
        streamed = await http.post("/v1/chat/completions", json={**body, "stream": True})
    assert whole.json()["choices"][0]["message"]["tool_calls"][0]["function"] == {"name": name, "arguments": "{}"}
    assert json.dumps(name).encode() in streamed.content
    for other in ("x" * 129, "a b", "é"):
        tools[0]["function"]["name"] = other
        async with api(chat_template=TEMPLATE) as http:
            reply = await http.post("/v1/chat/completions", json={**CHAT, "tools": tools})
        assert (reply.status_code, reply.json()["error"]["param"]) == (400, "tools[0].function.name")


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
