"""Tools and calls that clients send in another form than the contract's: served, and `explain` lists it."""

import json
from collections.abc import AsyncIterator
from typing import Any

import httpx
import pytest
from fake_api import api, events
from plain_chats import CHAT, TEMPLATE, USER, chat_prompt, tool


@pytest.fixture
async def http() -> AsyncIterator[httpx.AsyncClient]:
    """A model that answers "fine"."""
    async with api(chat_template=TEMPLATE) as http:
        yield http


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
