"""More requests than find a place: they are refused by their heads alone, and nobody else notices them."""

import asyncio
from collections.abc import AsyncIterator, Mapping
from contextlib import asynccontextmanager
from types import MappingProxyType

import httpx
import msgspec
import pytest
from fake_api import api, application
from fastapi import Request
from served_app import PATIENCE_S, reply_to, request, serving
from test_waiting import Gate, metric

from tightrope.server.http import body, guards
from tightrope.server.http.queue_guard import QUEUEING_ROUTES

PLACES = 8  # of the model made of rules
ASKED = {"prompt": "a", "max_tokens": 1}
TGI_ROUTES = {"/", "/generate", "/generate_stream"}
OLLAMA_ROUTES = {"/api/generate", "/api/chat"}
ANTHROPIC_ROUTES = {"/v1/messages", "/messages"}
OVERLOADED = {"error": "Model is overloaded", "error_type": "overloaded"}


async def until(http: httpx.AsyncClient, name: str, value: float) -> None:
    async with asyncio.timeout(PATIENCE_S):
        while await metric(http, name) != value:
            await asyncio.sleep(0.005)


@asynccontextmanager
async def full(
    asked: Mapping[str, object] = MappingProxyType(ASKED), **settings: object
) -> AsyncIterator[tuple[int, httpx.AsyncClient]]:
    """A server on a real port whose places are all taken, and in which two requests wait."""
    gate = Gate()
    async with (
        serving(gate, limits={"max_waiting": 2}, **settings) as port,
        httpx.AsyncClient(base_url=f"http://127.0.0.1:{port}", timeout=PATIENCE_S) as http,
    ):
        waiting = [asyncio.create_task(http.post("/v1/completions", json=dict(asked)))]
        try:
            await asyncio.to_thread(gate.begun.wait, PATIENCE_S)
            waiting += [asyncio.create_task(http.post("/v1/completions", json=dict(asked))) for _ in range(PLACES + 1)]
            await until(http, "tgi_queue_size", PLACES + 1)  # none but the first has been seen by a step
            yield port, http
        finally:
            gate.opened.set()
            replies = await asyncio.gather(*waiting)
        assert [reply.status_code for reply in replies] == [200] * (PLACES + 2)


async def refusal(port: int, head: bytes, rest: bytes = b"") -> tuple[bytes, object]:
    """The head and the JSON of the answer to a request's head, and to the end of the connection when `rest` follows."""
    reader, writer = await asyncio.open_connection("127.0.0.1", port)
    try:
        async with asyncio.timeout(PATIENCE_S):
            writer.write(head)
            found = await reader.readuntil(b"\r\n\r\n")
            length = int(found.split(b"content-length: ")[1].split(b"\r\n")[0])
            said = msgspec.json.decode(await reader.readexactly(length))
            writer.write(rest)
            await writer.drain()
            assert await reader.read() == b"", "nothing is taken for another request"
    finally:
        writer.close()
    return found, said


async def test_a_request_that_finds_no_place_is_refused_before_its_body_is_sent() -> None:
    async with full() as (port, http):
        for path in sorted(QUEUEING_ROUTES):
            head, said = await refusal(port, request(path, b"", "content-length: 1000"), b"x" * 1000)
            assert head.startswith(b"HTTP/1.1 429 "), path
            assert b"\r\nretry-after: " in head
            assert b"\r\nconnection: close\r\n" in head
            if path in TGI_ROUTES:
                assert said == OVERLOADED
            elif path in OLLAMA_ROUTES:
                assert isinstance(said, dict)
                assert list(said) == ["error"]
                assert "are waiting already" in said["error"], path
            elif path in ANTHROPIC_ROUTES:
                assert isinstance(said, dict)
                assert said["error"]["type"] == "rate_limit_error", path
            else:
                assert isinstance(said, dict)
                assert said["error"]["code"] == "rate_limit_exceeded", path
        assert await metric(http, 'tgi_request_failure{err="overloaded"}') == len(QUEUEING_ROUTES)


async def test_one_whose_body_only_names_its_dialect_is_refused_in_that() -> None:
    async with full() as (_, http):
        reply = await http.post("/invocations", json={"inputs": "a"})
        assert (reply.status_code, reply.json()) == (429, OVERLOADED)
        reply = await http.post("/invocations", json=ASKED)
        assert (reply.status_code, reply.json()["error"]["code"]) == (429, "rate_limit_exceeded")


async def test_what_does_not_queue_is_served_while_the_queue_is_full() -> None:
    async with full() as (_, http):
        for path in ("/health", "/metrics", "/v1/models", "/info", "/"):
            assert (await http.get(path)).status_code == 200, path
        assert (await http.post("/tokenize", json={"prompt": "abc"})).json()["tokens"] == [256, 97, 98, 99]
        assert (await http.post("/api/extra/abort", json={"genkey": "x"})).status_code == 200


async def test_a_request_can_be_cancelled_while_bodies_have_all_the_room_there_is() -> None:
    large = {**ASKED, "metadata": "x" * 10_000}
    most = (PLACES + 2) * len(msgspec.json.encode(large)) + 1000
    async with full(large, max_held_bytes=most) as (port, http):
        assert (await http.post("/tokenize", json={"prompt": "a" * 2000})).status_code == 429
        assert (await http.post("/api/extra/abort", json={"genkey": "x"})).status_code == 200
        head, said = await refusal(port, request("/tokenize", b"", "content-length: 20000"))
        assert head.startswith(b"HTTP/1.1 429 "), "by the length alone"
        assert isinstance(said, dict)
        assert "the bodies of requests under way have" in said["error"]["message"]


async def test_of_many_that_come_at_once_no_more_are_read_than_find_a_place(monkeypatch: pytest.MonkeyPatch) -> None:
    parsed: list[bytes] = []
    read = body.JsonRequest.read

    async def parse(request: Request, *, takes_any_type: bool) -> body.JsonRequest:
        made = await read(request, takes_any_type=takes_any_type)
        parsed.append(made.raw)
        return made

    monkeypatch.setattr(body.JsonRequest, "read", parse)
    gate = Gate()
    async with api(gate, limits={"max_waiting": 2}) as http:
        asked = [asyncio.create_task(http.post("/v1/completions", json=ASKED)) for _ in range(50)]
        async with asyncio.timeout(PATIENCE_S):
            while sum(task.done() for task in asked) < 50 - PLACES - 2:
                await asyncio.sleep(0.005)
        assert len(parsed) == PLACES + 2
        gate.opened.set()
        replies = await asyncio.gather(*asked)
        assert sorted(reply.status_code for reply in replies) == [200] * (PLACES + 2) + [429] * (50 - PLACES - 2)
        assert (await http.post("/v1/completions", json=ASKED)).status_code == 200


async def test_bodies_that_are_still_being_sent_take_nobodys_place() -> None:
    async with serving(limits={"max_waiting": 0}) as port:
        slow = []
        for _ in range(PLACES + 1):
            _, writer = await asyncio.open_connection("127.0.0.1", port)
            writer.write(request("/v1/completions", b'{"pro', "content-length: 100"))
            await writer.drain()
            slow.append(writer)
        reply = await reply_to(port, request("/generate", {"inputs": "a?"}, "connection: close"))
        assert reply.endswith(b'{"generated_text":"fine"}')
        for writer in slow:
            writer.close()


async def test_requests_that_are_wrong_leave_no_place_taken() -> None:
    async with api(limits={"max_waiting": 0}) as http:
        for _ in range(PLACES + 1):
            assert (await http.post("/v1/completions", json={"prompt": "a", "max_tokens": -2})).status_code == 400
        assert (await http.post("/v1/completions", json=ASKED)).status_code == 200


async def test_the_answer_to_a_refused_request_is_not_lost_while_its_body_is_sent() -> None:
    async with full() as (port, _):
        length = guards.LINGER_BYTES // 2
        reply = await reply_to(port, request("/generate", b"x" * length))
    assert reply.startswith(b"HTTP/1.1 429 ")
    assert msgspec.json.decode(reply.partition(b"\r\n\r\n")[2]) == OVERLOADED


async def send_on(writer: asyncio.StreamWriter) -> None:
    while True:
        writer.write(b"x" * 10_000)
        await writer.drain()
        await asyncio.sleep(0)


async def test_a_refused_body_that_does_not_end_is_cut_off(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(guards, "LINGER_BYTES", 100_000)
    async with full() as (port, _):
        _, writer = await asyncio.open_connection("127.0.0.1", port)
        writer.write(request("/generate", b"", f"content-length: {10**9}"))
        async with asyncio.timeout(PATIENCE_S):
            with pytest.raises(ConnectionError):
                await send_on(writer)
        writer.close()


async def test_a_refused_body_that_does_not_come_holds_its_connection_for_a_moment_alone(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(guards, "LINGER_S", 0.05)
    async with full() as (port, _):
        reply = await reply_to(port, request("/generate", b"", "content-length: 1000"))  # up to the connection's end
    assert reply.startswith(b"HTTP/1.1 429 ")


async def test_a_client_that_waits_with_its_body_is_told_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(guards, "LINGER_S", PATIENCE_S)
    async with full() as (port, _):
        reply = await reply_to(port, request("/generate", b"", "content-length: 1000", "expect: 100-continue"))
    assert reply.startswith(b"HTTP/1.1 429 "), "no 100 Continue comes first"


async def test_every_route_that_may_say_429_for_its_queue_is_known_to_be_one() -> None:
    async with application() as app:
        paths = app.openapi()["paths"]
    queueing = {path for path, how in paths.items() if "429" in how.get("post", {}).get("responses", {})}
    without_prefix = {path.removeprefix("/v1") for path in QUEUEING_ROUTES if path.startswith("/v1/")}
    # texts to embed or rank, and models to load, wait in queues of their own
    queueing = {path for path in queueing if not any(word in path for word in ("embed", "rerank", "load"))}
    # the first shows its queue by its body alone, the second has no queue but that for the bytes of all bodies
    assert queueing - {"/invocations", "/chat_tokenize"} == QUEUEING_ROUTES - without_prefix
