"""The front's view of an engine, held against the same core in a thread and in a process of its own."""

import asyncio
import socket
import threading
from collections.abc import AsyncIterator, Sequence

import pytest
from engine_clients import (
    FAKE_ENGINE,
    PATIENCE_S,
    answer,
    ask,
    ended,
    expected,
    fake_process,
    fake_thread,
    kill_engine,
    settings,
    short_lived,
    until,
)
from fake_engine import TURN
from fakes import BOS, VOCAB_SIZE, FakeBackend

from tightrope.backends.settings import ModelSettings
from tightrope.engine.errors import (
    BackendFailed,
    ContextLengthExceeded,
    EngineUnavailable,
    Overloaded,
)
from tightrope.engine.process.client import EngineClient
from tightrope.engine.process.exchange import STUCK_S
from tightrope.engine.process.launch import EngineHandle, Launcher, ProcessHandle, thread_launcher
from tightrope.engine.settings import EngineSettings
from tightrope.engine.types import ModelInfo, Span, TextPrompt, TokenPrompt, TurnMarks
from tightrope.kernels import dispatch


@pytest.fixture(params=[fake_thread, fake_process], ids=["thread", "process"])
async def client(request: pytest.FixtureRequest) -> AsyncIterator[EngineClient]:
    client = EngineClient(settings(max_waiting=6), request.param)
    await client.start()
    await client.wait_ready()
    yield client
    await client.close()


async def wait_until_idle(client: EngineClient) -> None:
    """A request that runs alone ends after all the work before it has gone."""
    while client.stats.num_running or client.stats.num_waiting:
        await answer(client, ask(f"probe {client.stats.steps}", "probe", 1))


async def test_many_requests_at_once_get_their_own_answers(client: EngineClient):
    prompts = [f"prompt {i}" for i in range(8)]
    answers = await asyncio.gather(*(answer(client, ask(p, p)) for p in prompts))
    assert answers == [expected(p) for p in prompts]


async def test_the_choices_of_a_request_end_together(client: EngineClient):
    deltas = [delta async for delta in client.generate(ask("r", "choose", n=3))]
    assert sorted(d.index for d in deltas if d.finish is not None) == [0, 1, 2]


async def test_a_refused_request_raises_at_once_with_its_numbers(client: EngineClient):
    with pytest.raises(ContextLengthExceeded) as caught:
        await answer(client, ask("r", "x" * 2000, 5))
    assert caught.value.details() == {"prompt_tokens": 2001, "new_tokens": 1, "max_model_len": 1024}


async def test_a_closed_iterator_stops_the_work(client: EngineClient):
    deltas = client.generate(ask("gone", "long", 900))
    await anext(deltas)
    await deltas.aclose()
    await wait_until_idle(client)
    assert client.stats.cancelled == 1
    assert client.stats.cache_used == 0
    assert client.stats.generated_tokens < 900


async def test_requests_beyond_the_queue_are_refused_and_the_rest_served(client: EngineClient):
    results = await asyncio.gather(
        *(answer(client, ask(f"r{i}", f"p{i}", 50)) for i in range(40)), return_exceptions=True
    )
    refused = [r for r in results if isinstance(r, Overloaded)]
    served = [r for r in results if isinstance(r, str)]
    assert len(refused) + len(served) == 40
    assert len(served) >= 10  # four run and six wait
    assert refused


async def test_text_goes_to_tokens_and_back(client: EngineClient):
    tokens = await client.tokenize(TextPrompt((Span("hé"),)))
    assert [t.raw for t in tokens] == [b"<s>", b"h", b"\xc3", b"\xa9"]
    assert await client.detokenize(tokens.ids[1:]) == "hé"
    assert (await client.tokenize(TokenPrompt((1, 2)))).ids == [1, 2]


@pytest.mark.parametrize("launch", [fake_thread, fake_process], ids=["thread", "process"])
async def test_marks_of_the_chat_template_are_special_in_every_engine(launch: Launcher):
    asked: list[tuple[str, ...]] = []

    async def find_marks(info: ModelInfo) -> TurnMarks:
        asked.append(info.added_texts)
        return TurnMarks((TURN,), (TURN,))

    prompt = TextPrompt((Span(TURN), Span(TURN, parse_special=False)))
    client = EngineClient(settings(), launch)
    await client.start(find_marks)
    for num_engines in (1, 2) if launch is fake_process else (1,):
        info = await client.wait_ready()
        assert asked == [(TURN,)] * num_engines
        assert (info.added_texts, TURN in info.special_texts, TURN in info.end_texts) == ((), True, True)
        assert [token.token_id for token in await client.tokenize(prompt)] == [BOS, VOCAB_SIZE, *TURN.encode()]
        if isinstance(client.engine, ProcessHandle):
            await kill_engine(client)
    await client.close()


async def test_without_a_word_about_marks_nothing_becomes_special(client: EngineClient):
    info = await client.wait_ready()
    assert (info.added_texts, info.end_texts) == ((TURN,), ("</s>", "<|im_end|>"))
    typed = await client.tokenize(TextPrompt((Span(TURN, parse_special=False),)))
    assert [token.token_id for token in typed] == [BOS, VOCAB_SIZE]


async def test_a_model_that_cannot_be_loaded_is_not_tried_again():
    launches: list[EngineHandle] = []

    def launch(sock: socket.socket) -> EngineHandle:
        launches.append(fake_process(sock))
        return launches[-1]

    client = EngineClient(EngineSettings(model=ModelSettings(model=str(FAKE_ENGINE))), launch)
    await client.start()
    with pytest.raises(BackendFailed, match="not a model"):
        await client.wait_ready()
    assert client.state == "failed"
    with pytest.raises(EngineUnavailable, match="not a model"):
        await answer(client, ask("r", "hello"))
    await client.close()
    assert len(launches) == 1


async def test_an_engine_ends_when_its_front_does():
    ours, theirs = socket.socketpair()
    handle = fake_process(theirs)
    theirs.close()
    ours.close()
    assert await ended(handle) == "exit status 0"


async def test_a_step_that_waits_for_a_compiler_is_healthy_however_long_it_takes():
    begun, go_on = threading.Event(), threading.Event()

    def compiles(token_ids: Sequence[int]) -> int:
        dispatch.compiling.begin()
        begun.set()
        assert go_on.wait(PATIENCE_S)
        dispatch.compiling.end()
        return ord("a")

    now_s = 0.0
    launch = thread_launcher(lambda settings, progress: FakeBackend(compiles))
    client = EngineClient(short_lived(stuck_s=PATIENCE_S / 100), launch, clock=lambda: now_s)
    await client.start()
    try:
        await client.wait_ready()
        asked = asyncio.create_task(answer(client, ask("r", "hi", 1)))
        await asyncio.to_thread(begun.wait, PATIENCE_S)
        for _ in range(3):  # each sign of life tells it again
            now_s += STUCK_S + 1
            await until(lambda: client.is_healthy)
        go_on.set()
        assert await asked == "a"
        assert client.restarts == 0
    finally:
        go_on.set()
        await client.close()
