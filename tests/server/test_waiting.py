"""Requests that wait for their turn: how many there are, what they may weigh, and what a newcomer is told."""

import asyncio
import os
import signal
import threading
from collections.abc import AsyncIterator, Callable, Sequence
from contextlib import asynccontextmanager

import httpx
import pytest
from engine_clients import answer, ask, expected, fake_process, settings
from fake_api import api
from fakes import letters
from hypothesis import given
from hypothesis import strategies as st
from served_app import PATIENCE_S

from tightrope.engine.errors import BackendFailed, InvalidRequest, Overloaded
from tightrope.engine.process.client import EngineClient
from tightrope.engine.process.launch import ProcessHandle
from tightrope.engine.queueing import LONGEST_S, QueueTimes
from tightrope.engine.types import Finish, GenerateRequest, Span, TextPrompt, Timings, TokenPrompt


class Gate:
    """A model whose first step stands still until it is opened."""

    def __init__(self) -> None:
        self.begun, self.opened = threading.Event(), threading.Event()

    def __call__(self, token_ids: Sequence[int]) -> int:
        self.begun.set()
        assert self.opened.wait(PATIENCE_S)
        return letters(token_ids)


async def metric(http: httpx.AsyncClient, name: str) -> float:
    lines = (await http.get("/metrics")).text.splitlines()
    return next(float(line.split()[1]) for line in lines if line.startswith(f"{name} "))


async def wait_until(holds: Callable[[], bool]) -> None:
    async with asyncio.timeout(PATIENCE_S):
        while not holds():
            await asyncio.sleep(0.005)


async def test_gauges_are_those_of_now_and_not_of_the_last_step() -> None:
    gate = Gate()
    async with api(gate) as http:
        body = {"prompt": "a", "max_tokens": 2}
        asked = [asyncio.create_task(http.post("/v1/completions", json=body))]
        await asyncio.to_thread(gate.begun.wait, PATIENCE_S)
        asked += [asyncio.create_task(http.post("/v1/completions", json={**body, "n": 2})) for _ in range(20)]
        async with asyncio.timeout(PATIENCE_S):
            while await metric(http, "tgi_queue_size") < 40:
                await asyncio.sleep(0.005)
        assert await metric(http, "tgi_queue_size") == 40
        assert await metric(http, "tgi_batch_current_size") == 1
        for task in asked[1:11]:
            task.cancel()
        await asyncio.gather(*asked[1:11], return_exceptions=True)
        assert await metric(http, "tgi_queue_size") == 20, "half of them have left, while the step stands still"
        gate.opened.set()
        assert [reply.status_code for reply in await asyncio.gather(asked[0], *asked[11:])] == [200] * 11
        assert await metric(http, "tgi_queue_size") == await metric(http, "tgi_batch_current_size") == 0


async def test_one_who_is_refused_is_told_how_long_the_queue_really_is() -> None:
    now_s, gate = 1000.0, Gate()
    async with api(gate, limits={"max_waiting": 2}, clock=lambda: now_s) as http:
        body = {"prompt": "a", "max_tokens": 1}
        waiting: list[asyncio.Task[httpx.Response]] = []
        replies = []
        while not replies:
            waiting.append(asyncio.create_task(http.post("/v1/completions", json=body)))
            await asyncio.sleep(0)
            replies = [task.result() for task in waiting if task.done()]
        assert [(reply.status_code, reply.headers["retry-after"]) for reply in replies] == [(429, "1")]
        now_s += 20
        for path, asked in (("/v1/completions", body), ("/generate", {"inputs": "a"}), ("/completion", body)):
            reply = await http.post(path, json=asked)
            assert (reply.status_code, reply.headers["retry-after"]) == (429, "20")
        gate.opened.set()
        await asyncio.gather(*waiting)


def finished(prefill_s: float, decode_s: float) -> Finish:
    return Finish("length", 1, Timings(9e9, prefill_s, decode_s))


def test_the_length_of_a_queue_is_what_answers_take_times_those_in_front_by_the_places() -> None:
    times = QueueTimes()
    assert times.wait_s(100, 4, 0.0) == 1, "nothing is known yet"
    times.observe(finished(2.0, 8.0))
    times.observe(finished(0.0, 10.0))
    assert times.wait_s(7, 4, 0.0) == 20
    assert times.wait_s(0, 4, 0.0) == 3
    assert times.wait_s(7, 4, 30.5) == 31, "those in front have waited for longer than that already"
    for _ in range(32):
        times.observe(finished(0.0, 1.0))
    assert times.wait_s(7, 4, 0.0) == 2, "lately answers were short"


@given(st.lists(st.floats(0, 1e6)), st.integers(0, 10**6), st.integers(1, 64), st.floats(0, 1e9))
def test_a_pause_is_always_a_number_of_seconds_that_a_client_can_wait(
    took: list[float], num_waiting: int, num_places: int, oldest_s: float
) -> None:
    times = QueueTimes()
    for seconds in took:
        times.observe(finished(seconds, 0.0))
    assert 1 <= times.wait_s(num_waiting, num_places, oldest_s) <= LONGEST_S


@asynccontextmanager
async def stopped_engine() -> AsyncIterator[tuple[EngineClient, int]]:
    """A client whose engine process has been stopped by a signal, and the process' id."""
    client = EngineClient(settings(max_waiting=6), fake_process)
    await client.start()
    await client.wait_ready()
    assert isinstance(client.engine, ProcessHandle)
    os.kill(client.engine.pid, signal.SIGSTOP)
    try:
        yield client, client.engine.pid
    finally:
        os.kill(client.engine.pid, signal.SIGCONT)
        await client.close()


async def test_what_waits_for_an_engine_that_stands_still_is_counted_and_goes_when_its_clients_go() -> None:
    async with stopped_engine() as (client, pid):
        long = "x" * 1_000_000
        tasks = [asyncio.create_task(answer(client, ask(f"r{i}", long))) for i in range(40)]
        calls = [asyncio.create_task(client.tokenize(TextPrompt((Span(long),)))) for _ in range(5)]
        await wait_until(lambda: sum(task.done() for task in tasks) == 30)
        refused = [task.exception() for task in tasks if task.done()]
        assert all(isinstance(error, Overloaded) for error in refused)
        assert (client._exchange.num_open, client.num_waiting) == (10, 10), "four places, and six that may wait"
        for task in (*tasks, *calls):
            task.cancel()
        await asyncio.gather(*tasks, *calls, return_exceptions=True)
        assert client._exchange.num_open == 0
        assert client._supervisor._outbox is not None
        assert len(client._supervisor._outbox._messages) <= 1, "at most the cancel of the one that was on its way"
        assert len(client._exchange.calls) == 0
        waits = asyncio.create_task(answer(client, ask("last", "patient")))
        os.kill(pid, signal.SIGCONT)
        assert await waits == expected("patient")


async def test_a_message_that_is_too_long_for_the_engine_is_an_answer_to_its_request_alone(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    client = EngineClient(settings(), fake_process)
    await client.start()
    await client.wait_ready()
    monkeypatch.setattr("tightrope.engine.process.wire.MAX_FRAME_BYTES", 1000)
    for work in (answer(client, ask("r", "x" * 2000)), client.tokenize(TextPrompt((Span("x" * 2000),)))):
        with pytest.raises(InvalidRequest, match=r"a message of \d+ bytes"):
            await work
    assert await answer(client, ask("s", "hello")) == expected("hello")
    await client.close()


async def test_what_makes_no_frame_for_any_other_reason_holds_nobody_up(caplog: pytest.LogCaptureFixture) -> None:
    client = EngineClient(settings(), fake_process)
    await client.start()
    await client.wait_ready()
    beyond_msgpack = GenerateRequest("r", TokenPrompt((1 << 70,)))
    neighbour = asyncio.create_task(answer(client, ask("s", "hello")))
    with pytest.raises(BackendFailed, match="can't be sent"):
        await answer(client, beyond_msgpack)
    with pytest.raises(BackendFailed, match="can't be sent"):
        await client.detokenize([1 << 70])
    assert await neighbour == expected("hello")
    assert client.restarts == 0
    assert caplog.text.count("a message can't be sent") == 2
    await client.close()


async def test_bodies_that_wait_are_counted_by_their_bytes() -> None:
    gate = Gate()
    async with api(gate, max_held_bytes=100_000) as http:
        body = {"prompt": "a", "max_tokens": 1, "metadata": {"padding": "x" * 30_000}}
        asked = [asyncio.create_task(http.post("/v1/completions", json=body)) for _ in range(10)]
        await wait_until(lambda: sum(task.done() for task in asked) == 7)
        for task in asked:
            if task.done():
                assert (task.result().status_code, int(task.result().headers["retry-after"]) >= 1) == (429, True)
        for path in ("/tokenize", "/generate"):
            refused = await http.post(path, json={"prompt": "a", "inputs": "a", "metadata": "x" * 30_000})
            assert refused.status_code == 429, "whatever the route is"
        assert (await http.post("/tokenize", json={"prompt": "a"})).status_code == 200, "a small one finds room"
        assert (await http.get("/metrics")).text.count('err="overloaded"} 9.0') == 1
        gate.opened.set()
        assert sorted(reply.status_code for reply in await asyncio.gather(*asked)) == [200] * 3 + [429] * 7
        assert (await http.post("/v1/completions", json=body)).status_code == 200
        alone = {**body, "metadata": {"padding": "x" * 300_000}}
        assert (await http.post("/v1/completions", json=alone)).status_code == 200, "it has no others beside it"
