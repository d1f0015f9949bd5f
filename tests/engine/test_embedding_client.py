"""The second engine: its life, what is in line there, and what a death of it costs."""

import asyncio
import os
import signal
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pytest
from engine_clients import until
from vector_api import embedding, in_a_thread

from tightrope.backends.embedding.card import Cut, EmbedderCard
from tightrope.backends.embedding.protocol import Rows, Tokens
from tightrope.backends.errors import BackendError
from tightrope.backends.settings import EmbeddingSettings, ModelSettings
from tightrope.engine.embedding.client import PORTION_TEXTS, EmbeddingClient
from tightrope.engine.embedding.protocol import Wanted
from tightrope.engine.embedding.texts import scaled
from tightrope.engine.errors import BackendFailed, EngineUnavailable, Overloaded
from tightrope.engine.process.launch import ProcessHandle
from tightrope.engine.settings import EngineSettings, LimitSettings


class Scripted:
    """An Embedder whose vectors are their texts' lengths; it keeps what it was asked."""

    def __init__(self) -> None:
        self.card = EmbedderCard("scripted", "embedding", "rules", "rules", 2, 100, 256)
        self.portions: list[int] = []
        self.threads: list[int] = []
        self.value = 1.0
        self.goes_on = asyncio.Event()

    def encode(self, text: str, query: str | None, cut: Cut) -> Tokens:
        return Tokens([ord(letter) for letter in text])

    def run(self, texts: Sequence[Tokens], threads: int) -> Rows:
        self.portions.append(len(texts))
        self.threads.append(threads)
        return np.array([[len(text.ids), self.value] for text in texts], np.float32)

    def close(self) -> None:
        pass


def settings(max_waiting: int = 128) -> EngineSettings:
    model = ModelSettings(embedding=EmbeddingSettings(models=("named",)), threads=2)
    return EngineSettings(model=model, limits=LimitSettings(max_waiting=max_waiting))


async def started(client: EmbeddingClient) -> EmbeddingClient:
    await client.start()
    await client.wait_ready()
    return client


async def test_many_texts_go_in_portions_so_that_others_come_in_between():
    model = Scripted()
    client = await started(EmbeddingClient(settings(), launch=in_a_thread(lambda _: [model])))

    found = await client.embed(["a" * (1 + i % 7) for i in range(100)], Wanted(0, norm=-1))

    assert [found.floats(i)[0] for i in range(100)] == [1 + i % 7 for i in range(100)]
    assert max(model.portions) <= PORTION_TEXTS
    await client.embed(["b" * 5000] * 4, Wanted(0))
    assert model.portions[-4:] == [1, 1, 1, 1]
    await client.close()


async def test_while_answers_are_written_one_thread_computes():
    model, is_busy = Scripted(), False
    client = await started(EmbeddingClient(settings(), lambda: is_busy, in_a_thread(lambda _: [model])))

    await client.embed(["a"], Wanted(0))
    is_busy = True
    await client.embed(["a"], Wanted(0))

    assert model.threads == [2, 1]
    await client.close()


async def test_that_thread_leaves_the_processor_to_whoever_wakes_up():
    is_busy = False
    settings = EngineSettings(model=ModelSettings(embedding=embedding("file.gguf"), threads=2))
    client = await started(EmbeddingClient(settings, lambda: is_busy))
    assert isinstance(client.engine, ProcessHandle)
    tasks = Path(f"/proc/{client.engine.pid}/task")

    def is_there() -> bool:
        return os.SCHED_IDLE in {os.sched_getscheduler(int(task.name)) for task in tasks.iterdir()}

    before = await client.embed(["the cat"], Wanted(0))
    assert not is_there()
    is_busy = True
    assert await client.embed(["the cat"], Wanted(0)) == before
    assert is_there()
    await client.close()


async def test_numbers_that_are_none_are_an_error():
    model = Scripted()
    model.value = float("nan")
    client = await started(EmbeddingClient(settings(), launch=in_a_thread(lambda _: [model])))

    with pytest.raises(BackendFailed, match="numbers that are none"):
        await client.embed(["a"], Wanted(0))
    await client.close()


async def test_more_requests_than_may_wait_are_refused():
    client = await started(EmbeddingClient(settings(1), launch=in_a_thread(lambda _: [Scripted()])))

    asked = [asyncio.ensure_future(client.embed(["a"], Wanted(0))) for _ in range(5)]
    ended = await asyncio.gather(*asked, return_exceptions=True)

    assert [isinstance(one, Overloaded) for one in ended] == [False, False, True, True, True]
    await client.close()


async def test_models_that_cant_be_loaded_are_one_line():
    def refuse(_: ModelSettings) -> list[Scripted]:
        raise BackendError("--embedding-model: x: no such file")

    client = EmbeddingClient(settings(), launch=in_a_thread(refuse))
    await client.start()
    with pytest.raises(BackendFailed, match="--embedding-model: x: no such file"):
        await client.wait_ready()
    with pytest.raises(EngineUnavailable, match="the embedding model is gone"):
        await client.embed(["a"], Wanted(0))
    await client.close()


async def test_a_process_that_is_killed_is_started_again_and_texts_under_way_are_answered():
    client = await started(EmbeddingClient(EngineSettings(model=ModelSettings(embedding=embedding("file.gguf")))))
    assert isinstance(client.engine, ProcessHandle)
    assert os.getpriority(os.PRIO_PROCESS, client.engine.pid) == 19
    before = await client.embed(["the cat"], Wanted(0))

    os.kill(client.engine.pid, signal.SIGSTOP)
    waiting = asyncio.ensure_future(client.embed(["the cat"], Wanted(0)))
    os.kill(client.engine.pid, signal.SIGKILL)
    after = await waiting

    assert after == before
    assert client.restarts == 1
    os.kill(client.engine.pid, signal.SIGKILL)
    await until(lambda: client.state == "restarting")
    assert await client.embed(["the cat"], Wanted(0)) == before  # What comes meanwhile waits.
    await client.close()


def test_rows_are_scaled_by_their_norm_and_zeros_stay():
    rows = np.array([[3, -4], [0, 0]], np.float32)

    assert np.allclose(scaled(rows, 2), [[0.6, -0.8], [0, 0]])
    assert np.allclose(scaled(rows, 1), [[3 / 7, -4 / 7], [0, 0]])
    assert np.allclose(scaled(rows, 0), [[3 * 8190, -32760], [0, 0]])
    assert np.array_equal(scaled(rows, -1), rows)
    assert np.allclose(scaled(np.array([[1e30, 1e30]], np.float32), 3), [[0.5 ** (1 / 3)] * 2])
