"""Errors leave the server through one table, in the shape of the API that was spoken; and what stands before routes."""

from collections.abc import AsyncIterator
from typing import Any

import httpx
import msgspec
import pytest
from fake_api import api
from fastapi import FastAPI

from tightrope.engine.errors import (
    BackendFailed,
    ContextLengthExceeded,
    EngineError,
    EngineUnavailable,
    InvalidRequest,
    ModelNotFound,
    Overloaded,
)
from tightrope.server.http.errors import TABLE, Unauthorized, error_reply, install_handlers
from tightrope.server.http.guards import BodyLimit

KEY = {"authorization": "Bearer secret"}


@pytest.mark.parametrize(
    ("error", "openai", "tgi"),
    [
        (
            InvalidRequest("bad", "n"),
            (400, {"error": {"message": "bad", "type": "invalid_request_error", "param": "n", "code": None}}),
            (422, {"error": "Input validation error: bad", "error_type": "validation"}),
        ),
        (
            ModelNotFound("no", "model"),
            (
                404,
                {
                    "error": {
                        "message": "no",
                        "type": "invalid_request_error",
                        "param": "model",
                        "code": "model_not_found",
                    }
                },
            ),
            (422, {"error": "Input validation error: no", "error_type": "validation"}),
        ),
        (
            Overloaded("full"),
            (
                429,
                {
                    "error": {
                        "message": "full",
                        "type": "rate_limit_exceeded",
                        "param": None,
                        "code": "rate_limit_exceeded",
                    }
                },
            ),
            (429, {"error": "Model is overloaded", "error_type": "overloaded"}),
        ),
        (
            EngineUnavailable("loading"),
            (
                503,
                {"error": {"message": "loading", "type": "server_error", "param": None, "code": "engine_unavailable"}},
            ),
            (424, {"error": "Request failed during generation: loading", "error_type": "generation"}),
        ),
        (
            BackendFailed("broke"),
            (500, {"error": {"message": "broke", "type": "server_error", "param": None, "code": "server_error"}}),
            (424, {"error": "Request failed during generation: broke", "error_type": "generation"}),
        ),
    ],
)
def test_an_error_has_its_status_and_body_in_each_dialect(
    error: EngineError, openai: tuple[int, object], tgi: tuple[int, object]
) -> None:
    reply = error_reply(error, "openai")
    assert (reply.status_code, msgspec.json.decode(reply.body)) == openai
    reply = error_reply(error, "tgi")
    assert (reply.status_code, msgspec.json.decode(reply.body)) == tgi


@pytest.mark.parametrize("error", [Overloaded("full"), EngineUnavailable("loading")])
def test_what_passes_by_itself_tells_when_to_try_again(error: EngineError) -> None:
    assert int(error_reply(error, "openai").headers["retry-after"]) >= 1
    assert int(error_reply(error, "tgi").headers["retry-after"]) >= 1


def test_every_error_has_a_row_of_its_own_or_its_parents() -> None:
    def subclasses(cls: type[EngineError]) -> set[type[EngineError]]:
        return set(cls.__subclasses__()).union(*map(subclasses, cls.__subclasses__()))

    for cls in subclasses(EngineError):
        assert TABLE.keys() & set(cls.__mro__), cls
    error = ContextLengthExceeded(5, 1, 4)
    assert b"context_length_exceeded" in bytes(error_reply(error, "openai").body)


def test_a_wrong_key_is_an_empty_401_on_tgi_routes() -> None:
    reply = error_reply(Unauthorized("no"), "tgi")
    assert (reply.status_code, bytes(reply.body)) == (401, b"")


@pytest.mark.parametrize(
    ("method", "path", "status", "keys"),
    [
        ("GET", "/nothing", 404, ["error"]),
        ("GET", "/v1/nothing", 404, ["error"]),
        ("POST", "/v1/responses/a/cancel", 405, ["error"]),
        ("GET", "/v1/chat/completions", 405, ["error"]),
        ("DELETE", "/generate", 405, ["error", "error_type"]),
        ("PUT", "/", 405, ["error", "error_type"]),
    ],
)
async def test_wrong_paths_and_methods_are_told_as_json(method: str, path: str, status: int, keys: list[str]) -> None:
    async with api() as http:
        reply = await http.request(method, path)
    assert reply.status_code == status
    assert list(reply.json()) == keys


@pytest.mark.parametrize(
    ("method", "path"),
    [
        ("GET", "/v1/models"),
        ("POST", "/v1/chat/completions"),
        ("POST", "/v1/completions"),
        ("POST", "/generate"),
        ("POST", "/generate_stream"),
        ("POST", "/"),
        ("POST", "/tokenize"),
        ("POST", "/detokenize"),
        ("GET", "/a-route-that-may-come-later"),
    ],
)
@pytest.mark.parametrize("header", [None, "", "Bearer", "Bearer wrong", "Bearer secre", "Basic secret", "Bearer é"])
async def test_without_the_key_every_route_that_reads_or_runs_is_closed(
    method: str, path: str, header: str | None
) -> None:
    async with api(api_key="secret") as http:
        headers = {} if header is None else {"authorization": header.encode("latin-1")}
        reply = await http.request(method, path, headers=headers, content=b"not even read")
    assert reply.status_code == 401
    if path in ("/generate", "/generate_stream", "/"):
        assert reply.content == b""
    else:
        assert reply.json()["error"]["code"] == "invalid_api_key"


@pytest.mark.parametrize("path", ["/health", "/ping", "/", "/info", "/metrics", "/docs", "/openapi.json"])
async def test_probes_and_api_pages_need_no_key(path: str) -> None:
    async with api(api_key="secret") as http:
        assert (await http.get(path)).status_code == 200


async def test_with_the_key_routes_are_open() -> None:
    async with api(api_key="secret") as http:
        assert (await http.get("/v1/models", headers=KEY)).status_code == 200
        reply = await http.post("/generate", json={"inputs": "a?"}, headers=KEY)
        assert reply.json() == {"generated_text": "fine"}


async def test_a_body_that_says_it_is_too_long_is_refused_before_it_is_read() -> None:
    answers: list[bytes] = []

    async def inner(scope: object, receive: object, send: object) -> None:
        raise AssertionError("nothing is to be called")

    async def receive() -> dict[str, object]:
        assert b"".join(answers)  # what comes behind the answer is thrown away
        return {"type": "http.request", "body": b"x" * 101, "more_body": False}

    async def send(message: dict[str, Any]) -> None:
        if message["type"] == "http.response.start":
            assert message["status"] == 413
        else:
            answers.append(bytes(message.get("body", b"")))

    headers = [(b"content-type", b"application/json"), (b"content-length", b"101")]
    for path, answer in (
        ("/v1/completions", b'"code":"body_too_large"'),
        ("/generate", b"the body is longer than 100 bytes"),
    ):
        answers.clear()
        scope = {"type": "http", "method": "POST", "path": path, "headers": headers, "query_string": b""}
        await BodyLimit(inner, 100, 1000, lambda: 1, lambda error: None)(scope, receive, send)
        assert answer in b"".join(answers)


async def test_a_body_that_does_not_say_its_length_is_cut_off_at_the_limit() -> None:
    num_read = 0

    async def chunks() -> AsyncIterator[bytes]:
        nonlocal num_read
        for _ in range(1000):
            num_read += 1
            yield b"x" * 30

    async with api(max_body_bytes=100) as http:
        reply = await http.post("/v1/completions", content=chunks(), headers={"content-type": "application/json"})
    assert reply.status_code == 413
    assert num_read == 4


async def test_a_body_of_exactly_the_limit_passes() -> None:
    body = msgspec.json.encode({"prompt": "a?", "max_tokens": 1})
    async with api(max_body_bytes=len(body)) as http:
        reply = await http.post("/v1/completions", content=body, headers={"content-type": "application/json"})
    assert reply.status_code == 200


async def test_routes_of_the_openai_api_want_json_too() -> None:
    async with api() as http:
        reply = await http.post("/v1/completions", content=b"{}", headers={"content-type": "text/plain"})
        assert (reply.status_code, reply.json()["error"]["code"]) == (415, "unsupported_media_type")
        reply = await http.post(
            "/v1/completions", content=b'{"prompt": "a?"}', headers={"content-type": "Application/JSON; charset=utf-8"}
        )
        assert reply.status_code == 200


async def test_the_body_limit_leaves_other_kinds_of_connections_alone() -> None:
    seen: list[str] = []

    async def inner(scope: object, receive: object, send: object) -> None:
        seen.append("called")

    async def never() -> dict[str, object]:
        raise AssertionError("nothing is to be received")

    async def ignore(message: object) -> None:
        raise AssertionError("nothing is to be sent")

    await BodyLimit(inner, 1, 1, lambda: 1, lambda error: None)({"type": "lifespan"}, never, ignore)
    assert seen == ["called"]


async def test_the_api_page_documents_every_route_in_its_own_dialect() -> None:
    async with api() as http:
        page = (await http.get("/openapi.json")).json()
        assert (await http.get("/api-doc/openapi.json")).json() == page
    for path, operations in page["paths"].items():
        for method, operation in operations.items():
            replies = operation["responses"]
            assert operation.get("description") or operation.get("summary"), path
            if path.startswith("/v1"):
                assert "422" not in replies, "the OpenAI API has no such status"
                for status in replies.keys() - {"200", "204"}:
                    schema = replies[status]["content"]["application/json"]["schema"]
                    shape = "AnthropicError" if path.startswith("/v1/messages") else "ErrorAnswer"
                    assert schema == {"$ref": f"#/components/schemas/{shape}"}
            if method == "post":
                assert "requestBody" in operation or path.endswith("/unload"), path
                assert {"200", "401"} <= replies.keys(), path
                assert "413" in replies or "requestBody" not in operation, path
    assert "HTTPValidationError" not in page["components"]["schemas"]
    generate = page["paths"]["/generate"]["post"]["responses"]
    assert generate["422"]["content"]["application/json"]["schema"] == {"$ref": "#/components/schemas/ErrorText"}
    chat = page["paths"]["/v1/chat/completions"]["post"]["responses"]["200"]["content"]
    assert chat["application/json"]["schema"] == {"$ref": "#/components/schemas/ChatAnswer"}
    assert "text/event-stream" in chat


async def test_a_mistake_of_our_own_is_a_500_that_tells_nothing_of_the_inside(
    caplog: pytest.LogCaptureFixture,
) -> None:
    app = FastAPI()
    install_handlers(app, lambda _: None)

    @app.get("/v1/broken")
    async def broken() -> None:
        raise KeyError("the inside")

    transport = httpx.ASGITransport(app, raise_app_exceptions=False)
    async with httpx.AsyncClient(transport=transport, base_url="http://localhost") as http:
        reply = await http.get("/v1/broken")
    assert (reply.status_code, reply.json()["error"]["message"]) == (500, "internal server error")
    assert "the inside" in caplog.text
