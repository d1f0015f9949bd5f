"""Two engines over one folder of chats: each goes on with what the other has written, and tells that it has it."""

import asyncio
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from pathlib import Path

import pytest
from engine_clients import kill_engine, until
from hf_models import smollm2_bf16

from tightrope.backends.sessions import folder as folder_module
from tightrope.backends.settings import CacheSettings, ModelSettings
from tightrope.engine.process.client import EngineClient
from tightrope.engine.process.wire import Held, TellHeld, ToFront
from tightrope.engine.sampler.steps import SamplingParams
from tightrope.engine.settings import EngineSettings
from tightrope.engine.types import GenerateRequest, Span, StopRules, TextPrompt, TokenPrompt
from tightrope.server.cluster.digests import DigestIndex, ReplicaHoldings

pytestmark = pytest.mark.slow

MODELS: dict[str, Callable[[], ModelSettings]] = {
    "torch": lambda: ModelSettings(model=str(smollm2_bf16())),
    "llama.cpp": lambda: ModelSettings(gguf_engine="llama.cpp"),
}
TEXT = "Once upon a time there was a ferry that went over a grey harbour. " * 12
KEY = b"k" * 32
FOUND = 120  # Of some 195; llama.cpp reads as many as fit in a step of 64 again for a greedy answer.


class Told(EngineClient):
    """A client that listens to what its engine holds."""

    def __init__(self, settings: EngineSettings) -> None:
        super().__init__(settings)
        self.relay, self.index = ReplicaHoldings(), DigestIndex(KEY)

    async def listen(self) -> None:
        await self.wait_ready()
        self._send(TellHeld())

    def on_message(self, message: ToFront) -> None:
        super().on_message(message)
        if isinstance(message, Held):
            assert self.relay.apply(message)
            assert self.index.apply("it", self.relay.changes(message, KEY))

    def held(self, token_ids: list[int]) -> tuple[int, int]:
        found = self.index.find([*token_ids, 0]).get("it")
        return (0, 0) if found is None else (found.cached, found.stored)

    async def answer(self, token_ids: list[int], number: int) -> tuple[str, int]:
        """A greedy answer, and how many tokens of the prompt were found."""
        stop = StopRules(max_tokens=16, ignore_eos=True)
        sampling = SamplingParams(temperature=0.0)
        request = GenerateRequest(f"r{number}", TokenPrompt(tuple(token_ids)), sampling, stop)
        text, num_cached = "", 0
        async for delta in self.generate(request):
            text += delta.text
            num_cached = delta.prompt.num_cached if delta.prompt is not None else num_cached
        return text, num_cached


@asynccontextmanager
async def two(model: ModelSettings, path: Path) -> AsyncIterator[tuple[Told, Told]]:
    cache = CacheSettings(session_dir=str(path / "chats"), tokens=1024)
    settings = EngineSettings(
        model=model.model_copy(update={"cache": cache, "max_model_len": 512, "max_num_seqs": 2, "threads": 1})
    )
    clients = Told(settings), Told(settings)
    try:
        for client in clients:
            await client.start()
        for client in clients:
            await client.listen()
        yield clients
    finally:
        for client in clients:
            await client.close()


@pytest.mark.parametrize("engine", MODELS)
async def test_a_chat_that_one_has_written_goes_on_at_the_other_from_disk(engine: str, tmp_path: Path) -> None:
    async with two(MODELS[engine](), tmp_path) as (one, other):
        prompt = (await one.tokenize(TextPrompt((Span(TEXT),)))).ids
        text, num_cached = await one.answer(prompt, 1)
        assert num_cached == 0
        assert one.held(prompt)[0] >= len(prompt) - 16
        await until(lambda: sum(other.held(prompt)) >= len(prompt) - 16)
        assert other.held(prompt)[0] == 0
        going_on = [*prompt, *(await one.tokenize(TextPrompt((Span(text),), add_bos=False))).ids]
        there, num_cached = await other.answer(going_on, 2)
        assert num_cached >= FOUND
        here, _ = await one.answer(going_on, 3)
        assert there == here


async def test_an_engine_that_is_killed_while_it_writes_takes_nothing_from_the_other(tmp_path: Path) -> None:
    async with two(MODELS["torch"](), tmp_path) as (one, other):
        prompt = (await one.tokenize(TextPrompt((Span(TEXT),)))).ids
        for number in range(3):
            own = [*prompt[number + 1 :], *prompt]
            await one.answer(own, number)
            going_on = asyncio.create_task(one.answer(own[1:], 10 + number))
            await kill_engine(one)
            await going_on
            await one.listen()
            await until(lambda own=own: sum(other.held(own)) >= 256)
            _, num_cached = await other.answer(own, 20 + number)
            assert num_cached >= FOUND
        files = [file.name for file in (tmp_path / "chats").iterdir()]
        assert all(name.endswith(folder_module.SUFFIX) or name.startswith((".", "tightrope-")) for name in files)
