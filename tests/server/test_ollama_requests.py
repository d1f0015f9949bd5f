"""Ollama's contract: bodies of any type, errors as text, tools and their turns, what is loaded and what it can do."""

import asyncio
import json
from collections.abc import AsyncGenerator, Callable
from contextlib import aclosing
from functools import partial
from typing import Any

import httpx
import pytest
from engine_clients import until
from fake_api import api
from fake_models import Gate, several
from vector_api import vector_api

from tightrope.server import answering
from tightrope.server.http import sse

TEMPLATE = (
    "{% for t in tools or [] %}<{{ t.type }} {{ t.function.name }}>{% endfor %}"
    "{% for m in messages %}[{{ m.role }}{{ ' ' ~ m.name if m.name }}{{ ' ' ~ m.tool_call_id if m.tool_call_id }}]"
    "{{ m.content }}{% for c in m.tool_calls or [] %}({{ c.id }} {{ c.function.name }} "
    "{{ c.function.arguments.port }}){% endfor %}{% endfor %}?"
)
TIDE = {"function": {"name": "tide.table", "parameters": {"type": "object", "properties": {"port": {}}}}}
USER = {"role": "user", "content": "Tide in Hull"}
CALL = '<tool_call>\n{"name": "tide.table", "arguments": {"port": "Hull"}}\n</tool_call>'


def lines(reply: httpx.Response) -> list[dict[str, Any]]:
    return [json.loads(line) for line in reply.text.splitlines()]


@pytest.mark.parametrize("headers", [{}, {"content-type": "text/plain"}, {"content-type": "application/json"}], ids=str)
async def test_a_body_is_json_whatever_its_content_type(headers: dict[str, str]) -> None:
    async with api(chat_template=TEMPLATE) as http:
        for path, body in (
            ("/api/chat", {"messages": [USER], "stream": False}),
            ("/api/generate", {"prompt": "Hi", "stream": False}),
            ("/api/show", {"model": "fake"}),
        ):
            reply = await http.post(path, content=json.dumps(body).encode(), headers=headers)
            assert reply.status_code == 200, reply.text
        refused = await http.post("/v1/completions", content=b'{"prompt": "a?"}')
        assert refused.status_code == 415


async def test_every_error_is_text() -> None:
    async with api(chat_template=TEMPLATE, any_model_name=False, api_key="secret") as http:
        keyed = {"authorization": "Bearer secret"}
        for path, content, headers, status in (
            ("/api/chat", b"{", keyed, 400),
            ("/api/chat", b'{"messages": 1}', keyed, 400),
            ("/api/generate", b'{"prompt": "a", "options": {"top_p": 7}}', keyed, 400),
            ("/api/generate", b'{"prompt": "a", "model": "other"}', keyed, 404),
            ("/api/show", b'{"model": "other"}', keyed, 404),
            ("/api/chat", b"{}", {}, 401),
        ):
            reply = await http.post(path, content=content, headers=headers)
            assert reply.status_code == status
            assert list(reply.json()) == ["error"]
            assert isinstance(reply.json()["error"], str)
        assert isinstance((await http.get("/api/chat", headers=keyed)).json()["error"], str)


async def test_tools_are_shown_and_calls_come_back_as_objects() -> None:
    async with api(f"Well.{CALL}", chat_template=TEMPLATE) as http:
        body = {"messages": [USER], "tools": [TIDE], "options": {"temperature": 0}, "explain": True}
        whole = (await http.post("/api/chat", json=body | {"stream": False})).json()
        streamed = lines(await http.post("/api/chat", json=body))
        plain = lines(await http.post("/api/chat", json=body | {"tools": []}))
    assert "<function tide.table>[user]Tide in Hull?" in whole["explain"]["prompts"][0]["text"]
    (call,) = whole["message"]["tool_calls"]
    assert call["function"] == {"name": "tide.table", "arguments": {"port": "Hull"}}
    assert (whole["message"]["content"], whole["done_reason"]) == ("Well.", "stop")
    calls = [call for line in streamed for call in line["message"].get("tool_calls", ())]
    assert [call["function"] for call in calls] == [call["function"]]
    assert "".join(line["message"]["content"] for line in streamed) == "Well."
    assert [line["done"] for line in streamed] == [False] * (len(streamed) - 1) + [True]
    assert "".join(line["message"]["content"] for line in plain) == f"Well.{CALL}"


async def test_a_call_that_is_cut_leaks_no_mark() -> None:
    async with api(CALL, chat_template=TEMPLATE) as http:
        for num_tokens in range(8, len(CALL), 3):
            options = {"num_predict": num_tokens, "temperature": 0}
            body = {"messages": [USER], "tools": [TIDE], "options": options}
            streamed = lines(await http.post("/api/chat", json=body))
            assert "".join(line["message"]["content"] for line in streamed) == ""
            assert streamed[-1]["done_reason"] == "length"


async def test_turns_of_tools_are_rendered_with_ids_and_names() -> None:
    turns = [
        USER,
        {
            "role": "assistant",
            "content": "",
            "tool_calls": [{"function": {"name": "f", "arguments": {"port": "Hull"}}}],
        },
        {"role": "tool", "tool_name": "f", "content": "High at 9"},
    ]
    async with api(chat_template=TEMPLATE) as http:
        body = {"messages": turns, "tools": [TIDE], "stream": False, "explain": True}
        reply = (await http.post("/api/chat", json=body)).json()
        prompt = reply["explain"]["prompts"][0]["text"]
    assert "[assistant](call00100 f Hull)[tool f call00100]High at 9?" in prompt


@pytest.mark.parametrize("content", [None, "Hi", {"type": "text", "text": "Hi"}, ["Hi"]], ids=str)
async def test_content_is_taken_in_every_form(content: object) -> None:
    async with api(chat_template="{{ messages[0].content }}?") as http:
        body = {"messages": [{"role": "user", "content": content}], "stream": False, "explain": True}
        reply = await http.post("/api/chat", json=body)
    assert reply.status_code == 200, reply.text
    assert reply.json()["explain"]["bent"] or content == "Hi"


async def test_what_is_loaded_and_what_it_can_do_is_told() -> None:
    async with api(chat_template=TEMPLATE) as http:
        (running,) = (await http.get("/api/ps")).json()["models"]
        (listed,) = (await http.get("/api/tags")).json()["models"]
        assert running["name"] == running["model"] == listed["name"] == "fake"
        assert running["context_length"] == 1024
        assert len(listed["digest"]) == 64
        shown = (await http.post("/api/show", json={"model": "fake"})).json()
        assert shown["capabilities"] == ["completion", "tools"]
        loaded = (await http.post("/api/generate", json={"model": "fake"})).json()
        unloaded = (await http.post("/api/chat", json={"model": "fake", "keep_alive": 0, "stream": False})).json()
        assert (loaded["done_reason"], unloaded["done_reason"]) == ("load", "unload")
    async with api(chat_template="{{ messages[0].content }}") as http:
        assert (await http.post("/api/show", json={})).json()["capabilities"] == ["completion"]


async def test_a_stream_that_waits_for_a_load_says_nothing_now_and_then(monkeypatch: pytest.MonkeyPatch) -> None:
    """Clients give up what is silent for minutes; a line without words adds nothing to any answer."""
    monkeypatch.setattr(answering, "FIRST_DELTA_S", 0.0)
    monkeypatch.setattr(sse, "PING_S", 0.01)
    told, kept_alive = asyncio.Event(), sse.kept_alive

    def silence_that_is_noticed(silence: Callable[[], bytes]) -> bytes:
        told.set()
        return silence()

    def watched(lines: AsyncGenerator[bytes, None], silence: Callable[[], bytes]) -> AsyncGenerator[bytes, None]:
        return kept_alive(lines, partial(silence_that_is_noticed, silence))

    monkeypatch.setattr(answering, "kept_alive", watched)
    body = {"messages": [{"role": "user", "content": "Well?"}], "options": {"num_predict": 8}}
    async with several("a", "b", "bad") as running:
        for name in ("b", "bad"):
            told.clear()
            gate = running.loads[name] = Gate()
            running.broken.add("bad")
            stream = asyncio.create_task(running.http.post("/api/chat", json={"model": name, **body}))
            await until(gate.reached.is_set)
            await told.wait()
            gate.opened.set()
            reply = await stream
            assert (reply.status_code, reply.headers["content-type"]) == (200, "application/x-ndjson")
            first, *_, last = lines(reply)
            assert (first["model"], first["message"]["content"], first["done"]) == (name, "", False)
            if name == "b":
                assert "".join(line["message"]["content"] for line in lines(reply)).endswith("b")
                assert last["done"]
            else:
                assert last["error"] == "the model `bad` can't be loaded: /models/bad.gguf: not a GGUF file"


async def test_a_silent_stream_is_kept_alive_until_it_ends(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sse, "PING_S", 0.01)
    going = asyncio.Event()

    async def words() -> AsyncGenerator[bytes, None]:
        yield b"1"
        await going.wait()
        yield b"2"

    told = list[bytes]()
    async for line in sse.kept_alive(words(), lambda: b"-"):
        told.append(line)
        if told.count(b"-") == 2:
            going.set()
    assert told[:3] == [b"1", b"-", b"-"]
    assert [line for line in told if line != b"-"] == [b"1", b"2"]
    assert told[-1] == b"2"


async def test_a_stream_that_nobody_reads_any_more_is_closed_in_its_silence(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sse, "PING_S", 0.01)
    is_closed = asyncio.Event()

    async def silent() -> AsyncGenerator[bytes, None]:
        try:
            await asyncio.Event().wait()
            yield b""
        finally:
            is_closed.set()

    async with aclosing(sse.kept_alive(silent(), lambda: b"-")) as stream:
        assert await anext(stream) == b"-"
    assert is_closed.is_set()


async def test_models_that_embed_are_listed_as_loaded() -> None:
    async with vector_api("file.gguf") as http:
        chat, beside = (await http.get("/api/ps")).json()["models"]
        assert (chat["name"], beside["name"], beside["context_length"]) == ("fake", "file", 64)
        assert [model["name"] for model in (await http.get("/api/tags")).json()["models"]] == ["fake", "file"]
