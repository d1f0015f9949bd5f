"""Cached tokens are shared within a key and within no key, never between keys: their number tells what others wrote."""

from collections.abc import AsyncGenerator, Mapping
from typing import Any

import httpx
import pytest
from fake_api import api

from tightrope.engine.process.client import EngineClient
from tightrope.engine.types import Delta, GenerateRequest

USER = [{"role": "user", "content": "Well"}]
ROUTES: Mapping[str, Mapping[str, Any]] = {  # all that write answers
    "/v1/chat/completions": {"messages": USER, "max_tokens": 4},
    "/v1/responses": {"input": "Well?", "max_output_tokens": 16},
    "/v1/messages": {"messages": USER, "max_tokens": 4},
    "/v1/completions": {"prompt": ["Well?", "Well??"], "max_tokens": 4},
    "/generate": {"inputs": "Well?"},
    "/generate_stream": {"inputs": "Well?"},
    "/": {"inputs": "Well?"},
    "/invocations": {"inputs": "Well?"},
    "/completion": {"prompt": "Well?", "n_predict": 4},
    "/api/generate": {"prompt": "Well"},
    "/api/chat": {"messages": USER},
    "/api/v1/generate": {"prompt": "Well?", "max_length": 4},
    "/api/extra/generate/stream": {"prompt": "Well?", "max_length": 4},
}
ONE, OTHER, ADMIN = {"authorization": "Bearer one"}, {"authorization": "Bearer other"}, {"x-admin-key": "admin"}
PROMPT = {"prompt": "the secret word is plum, or so they say", "max_tokens": 1}


async def num_cached(http: httpx.AsyncClient, headers: Mapping[str, str], **fields: object) -> int:
    reply = await http.post("/v1/completions", json={**PROMPT, **fields}, headers=headers)
    assert reply.status_code == 200, reply.text
    return int(reply.json()["usage"]["prompt_tokens_details"]["cached_tokens"])


async def test_the_admin_key_and_the_api_key_find_nothing_of_each_other() -> None:
    async with api(api_key="one", admin_key="admin") as http:
        assert await num_cached(http, ONE) == 0
        assert await num_cached(http, ONE) > 0
        assert await num_cached(http, {"x-api-key": "one"}) > 0, "the same key in another header"
        assert await num_cached(http, {"authorization": "Bearer one", "x-admin-key": "wrong"}) > 0
        assert await num_cached(http, ADMIN) == 0
        assert await num_cached(http, ADMIN) > 0
        assert await num_cached(http, {"authorization": "Bearer made up", "x-api-key": "one"}) > 0


async def test_where_no_key_is_asked_for_those_that_clients_send_keep_them_apart() -> None:
    async with api() as http:
        assert await num_cached(http, {}) == 0
        assert await num_cached(http, {}) > 0
        assert await num_cached(http, ONE) == 0
        assert await num_cached(http, OTHER) == 0
        assert await num_cached(http, ONE) > 0
        assert await num_cached(http, {"authorization": "Basic x"}) > 0, "no key of ours"


async def test_a_salt_parts_what_a_key_shares_and_can_not_name_what_is_another_ones() -> None:
    namespaces: list[str] = []

    async with api() as http:
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(EngineClient, "generate", recording(namespaces))
            for headers, salt in [
                ({}, ""),
                ({}, "salt"),
                ({}, "other"),
                (ONE, ""),
                (ONE, "salt"),
                ({"authorization": "Bearer onesalt"}, ""),
                ({}, "onesalt"),
                ({}, "\0adapter\x001.0"),
            ]:
                await num_cached(http, headers, cache_salt=salt)
            assert len(set(namespaces)) == 8
            for namespace in namespaces[1:-1]:
                await num_cached(http, {}, cache_salt=namespace)
            assert len(set(namespaces)) == 14
    assert not any("\0" in namespace or "one" in namespace for namespace in namespaces)


def recording(namespaces: list[str]) -> object:
    """The client's `generate`, which writes down whose tokens each request may share."""
    generate = EngineClient.generate

    def recorded(client: EngineClient, request: GenerateRequest) -> AsyncGenerator[Delta, None]:
        namespaces.append(request.namespace)
        return generate(client, request)

    return recorded


@pytest.mark.parametrize("path", ROUTES)
async def test_every_route_that_writes_answers_keeps_keys_apart(path: str, monkeypatch: pytest.MonkeyPatch) -> None:
    namespaces: list[str] = []
    monkeypatch.setattr(EngineClient, "generate", recording(namespaces))
    async with api(chat_template="{{ messages[0].content }}?") as http:
        for headers in ({}, {}, ONE, ONE, OTHER):
            reply = await http.post(path, json=ROUTES[path], headers=headers)
            assert reply.status_code == 200, reply.text
    num_prompts = len(namespaces) // 5
    none, none_again, one, one_again, other = (
        {*namespaces[start : start + num_prompts]} for start in range(0, len(namespaces), num_prompts)
    )
    assert none == none_again == {""}
    assert one == one_again
    assert len(none | one | other) == 3


async def test_all_routes_that_write_answers_are_among_these() -> None:
    async with api() as http:
        page = (await http.get("/openapi.json")).json()
    posts = {path for path, operations in page["paths"].items() if "post" in operations}
    others = ("token", "internal", "show", "abort", "lora", "lookup", "embed", "rerank", "load", "check")
    assert {path for path in posts if not any(word in path for word in others)} == {*ROUTES}
