"""A server that is told to end: answers under way go on to their end, and newcomers are told so."""

import asyncio
from collections.abc import Sequence

import pytest
from fake_api import api
from served_app import PATIENCE_S
from test_waiting import Gate

from tightrope.server.http.draining import Drain

pytestmark = pytest.mark.quick

ROUTES = {
    "/v1/chat/completions": {"messages": [{"role": "user", "content": "a"}]},
    "/v1/completions": {"prompt": "a"},
    "/generate": {"inputs": "a"},
    "/generate_stream": {"inputs": "a"},
    "/": {"inputs": "a"},
    "/invocations": {"inputs": "a"},
    "/completion": {"prompt": "a"},
    "/api/chat": {"messages": [{"role": "user", "content": "a"}]},
    "/api/v1/generate": {"prompt": "a"},
    "/tokenize": {"prompt": "a"},
}


async def test_while_draining_newcomers_get_503_on_every_dialect_and_what_is_under_way_ends_well() -> None:
    gate, drain = Gate(), Drain(60)
    over = asyncio.create_task(drain.over())
    async with api(gate, drain=drain) as http:
        under_way = asyncio.create_task(http.post("/v1/completions", json={"prompt": "a", "max_tokens": 2}))
        await asyncio.to_thread(gate.begun.wait, PATIENCE_S)
        assert (await http.get("/health")).status_code == 200
        drain.begin()
        for path, body in ROUTES.items():
            reply = await http.post(path, json=body)
            assert (reply.status_code, reply.headers["connection"]) == (503, "close"), path
            assert 1 <= int(reply.headers["retry-after"]) <= 60
            assert "shutting down" in reply.text
        for path in ("/health", "/ping", "/v1/models"):
            assert (await http.get(path)).status_code == 503
        assert (await http.get("/metrics")).status_code == 200
        assert not over.done()
        assert not under_way.done()
        gate.opened.set()
        assert (await under_way).status_code == 200
        await asyncio.wait_for(over, PATIENCE_S)


async def test_a_page_that_is_let_in_can_read_that_the_server_ends() -> None:
    drain = Drain(60)
    drain.begin()
    async with api(drain=drain, cors_origins="https://a.example", api_key="secret") as http:
        reply = await http.post("/v1/completions", json={}, headers={"origin": "https://a.example"})
    assert (reply.status_code, reply.headers["access-control-allow-origin"]) == (503, "https://a.example")


async def test_a_server_that_owes_nothing_is_over_at_once_and_one_that_never_ends_after_its_time() -> None:
    idle, never = Drain(60), Drain(0.01)
    idle.begin()
    await asyncio.wait_for(idle.over(), PATIENCE_S)
    with never.owing():
        never.begin()
        await asyncio.wait_for(never.over(), PATIENCE_S)
        assert never.num_open == 1


def endless(token_ids: Sequence[int]) -> int:
    return ord("a")


@pytest.mark.parametrize("stream", [False, True])
async def test_an_answer_that_its_client_leaves_is_not_waited_for(stream: bool) -> None:
    drain = Drain(60)
    async with api(endless, drain=drain) as http:
        body = {"prompt": "a", "max_tokens": 900, "stream": stream}
        leaving = asyncio.create_task(http.post("/v1/completions", json=body))
        while not drain.num_open:
            await asyncio.sleep(0)
        drain.begin()
        leaving.cancel()
        await asyncio.gather(leaving, return_exceptions=True)
        await asyncio.wait_for(drain.over(), PATIENCE_S)
        assert drain.num_open == 0
