"""Answers that a request of its own stops, wherever they are."""

import asyncio
import json

import pytest
from fake_api import api

from tightrope.engine.types import Delta
from tightrope.server.deltas.aborts import Aborts
from tightrope.server.deltas.side_by_side import Deltas

pytestmark = pytest.mark.quick


class Work:
    """Deltas of which the second never comes."""

    def __init__(self) -> None:
        self.is_closed = False

    async def deltas(self) -> Deltas:
        try:
            yield 0, Delta("r", 0, "a", ())
            await asyncio.Event().wait()
        finally:
            self.is_closed = True


async def texts(deltas: Deltas) -> list[str]:
    return [delta.text async for _, delta in deltas]


async def waiting(aborts: Aborts, work: Work) -> asyncio.Task[list[str]]:
    task = asyncio.create_task(texts(aborts.until_aborted(work.deltas(), "key")))
    for _ in range(5):
        await asyncio.sleep(0)
    return task


async def test_an_abort_ends_the_deltas_and_cancels_the_work() -> None:
    aborts, work = Aborts(), Work()
    task = await waiting(aborts, work)
    assert not aborts.abort("another key")
    assert aborts.abort("key")
    assert await task == ["a"]
    assert work.is_closed
    assert not aborts.abort("key")


async def test_a_task_that_is_cancelled_from_outside_stays_cancelled() -> None:
    aborts, work = Aborts(), Work()
    task = await waiting(aborts, work)
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task
    assert work.is_closed
    assert not aborts.abort("key")


async def test_a_task_that_is_cancelled_together_with_an_abort_stays_cancelled() -> None:
    aborts, work = Aborts(), Work()
    task = await waiting(aborts, work)
    aborts.abort("key")
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task


async def test_an_abort_between_two_deltas_ends_them_before_the_next() -> None:
    aborts = Aborts()
    deltas = aborts.until_aborted(Work().deltas(), "key")
    assert (await anext(deltas))[1].text == "a"
    assert aborts.abort("key")
    assert await anext(deltas, None) is None


async def test_an_aborted_stream_ends_without_an_error() -> None:
    body = {"prompt": "Well?", "max_length": 900, "genkey": "KCPP1", "ignore_eos": True}
    async with api("so ", max_body_bytes=10_000) as http:
        stream = asyncio.create_task(http.post("/api/extra/generate/stream", json=body))
        while not (await http.post("/api/extra/abort", json={"genkey": "KCPP1"})).json()["success"]:
            await asyncio.sleep(0)
        reply = await stream
    pieces = [json.loads(event.removeprefix("event: message\ndata: ")) for event in reply.text.split("\n\n")[:-1]]
    assert reply.status_code == 200
    assert [piece["finish_reason"] for piece in pieces] == [None] * len(pieces)
