"""The front's view of an engine, held against the same core in a thread and in a process of its own."""

import asyncio
import errno
import os
import re
import signal
import socket
import sys
import threading
from collections.abc import AsyncIterator, Callable, Sequence
from contextlib import asynccontextmanager
from pathlib import Path

import pytest
from checkout import SUPPORT
from fake_engine import TURN, open_fake
from fakes import BOS, VOCAB_SIZE, FakeBackend, letters
from msgspec import structs

from tightrope.backends.settings import ModelSettings
from tightrope.engine.errors import (
    BackendFailed,
    ContextLengthExceeded,
    EngineUnavailable,
    InvalidRequest,
    ModelNotFound,
    Overloaded,
)
from tightrope.engine.process import supervisor
from tightrope.engine.process.client import STUCK_S, EngineClient
from tightrope.engine.process.launch import (
    EngineHandle,
    Launcher,
    ProcessHandle,
    ThreadHandle,
    run_process,
    thread_launcher,
)
from tightrope.engine.sampler.steps import SamplingParams
from tightrope.engine.settings import EngineSettings, LifeSettings, LimitSettings
from tightrope.engine.types import GenerateRequest, ModelInfo, Span, StopRules, TextPrompt, TokenPrompt, TurnMarks
from tightrope.kernels import dispatch

PATIENCE_S = 60.0  # a busy machine starts a process in some seconds
FAKE_ENGINE = SUPPORT / "fake_engine.py"


def fake_process(sock: socket.socket) -> ProcessHandle:
    return run_process([sys.executable, str(FAKE_ENGINE), str(sock.fileno())], sock)


fake_thread = thread_launcher(open_fake)


def settings(**limits: int) -> EngineSettings:
    return EngineSettings(model=ModelSettings(max_num_seqs=4), limits=LimitSettings(**limits))


def short_lived(**life: float) -> EngineSettings:
    return EngineSettings(model=ModelSettings(max_num_seqs=1), life=LifeSettings(**life))


@asynccontextmanager
async def running(settings: EngineSettings, launch: Launcher = fake_process) -> AsyncIterator[EngineClient]:
    client = EngineClient(settings, launch)
    await client.start()
    try:
        await client.wait_ready()
        yield client
    finally:
        await client.close()


def send_to_engine(client: EngineClient, number: signal.Signals) -> None:
    assert isinstance(client.engine, ProcessHandle)
    os.kill(client.engine.pid, number)


async def ended(handle: EngineHandle) -> str:
    while (how := handle.poll()) is None:
        await asyncio.sleep(0)
    return how


async def until(holds: Callable[[], bool]) -> None:
    async with asyncio.timeout(PATIENCE_S):
        while not holds():
            await asyncio.sleep(0)


@pytest.fixture(params=[fake_thread, fake_process], ids=["thread", "process"])
async def client(request: pytest.FixtureRequest) -> AsyncIterator[EngineClient]:
    client = EngineClient(settings(max_waiting=6), request.param)
    await client.start()
    await client.wait_ready()
    yield client
    await client.close()


@pytest.fixture
async def process_client() -> AsyncIterator[EngineClient]:
    client = EngineClient(settings(), fake_process)
    await client.start()
    await client.wait_ready()
    yield client
    await client.close()


def ask(request_id: str, prompt: str, max_tokens: int = 10, n: int = 1) -> GenerateRequest:
    stop = StopRules(max_tokens=max_tokens)
    return GenerateRequest(request_id, TextPrompt((Span(prompt),)), SamplingParams(temperature=0.0), stop, n=n)


async def answer(client: EngineClient, request: GenerateRequest) -> str:
    return "".join([delta.text async for delta in client.generate(request)])


def expected(prompt: str, num_tokens: int = 10) -> str:
    token_ids = [BOS, *prompt.encode()]
    for _ in range(num_tokens):
        token_ids.append(letters(token_ids))
    return bytes(token_ids[-num_tokens:]).decode()


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
    assert caught.value.details() == {"prompt_tokens": 2001, "new_tokens": 5, "max_model_len": 1024}


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


async def test_an_engine_that_dies_fails_open_answers_and_is_back_for_the_next(process_client: EngineClient):
    client = process_client
    with pytest.raises(BackendFailed, match="died"):
        await answer(client, ask("r", "crash", 20))
    assert client.state == "restarting"
    with pytest.raises(EngineUnavailable, match="restarting"):
        await answer(client, ask("s", "hello"))
    await client.wait_ready()
    assert await answer(client, ask("t", "hello")) == expected("hello")


async def test_an_engine_whose_device_is_lost_ends_with_one_line_and_another_serves(capfd: pytest.CaptureFixture[str]):
    async with running(settings()) as client:
        lost = client.engine
        assert lost is not None
        with pytest.raises(BackendFailed, match="died"):
            await answer(client, ask("r", "lose", 20))
        assert await ended(lost) == "exit status 1"
        await client.wait_ready()
        assert client.engine is not lost
        assert await answer(client, ask("s", "hello")) == expected("hello")
    assert "engine ends: cuda:0 is lost after a step of 1 tokens" in capfd.readouterr().err


async def test_an_engine_in_a_thread_ends_alike_when_its_device_is_lost():
    async with running(settings(), fake_thread) as client:
        with pytest.raises(BackendFailed, match="died"):
            await answer(client, ask("r", "lose", 20))
        await client.wait_ready()
        assert await answer(client, ask("s", "hello")) == expected("hello")


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
            with pytest.raises(BackendFailed, match="died"):
                await answer(client, ask("r", "crash", 20))
    await client.close()


async def test_an_engine_is_not_used_without_its_marks(caplog: pytest.LogCaptureFixture):
    fails = [False, True, False]

    async def find_marks(info: ModelInfo) -> TurnMarks:
        if fails.pop(0):
            raise TimeoutError
        return TurnMarks((TURN,), (TURN,))

    client = EngineClient(settings(), fake_process)
    await client.start(find_marks)
    await client.wait_ready()
    with pytest.raises(BackendFailed, match="died"):
        await answer(client, ask("r", "crash", 20))
    assert TURN in (await client.wait_ready()).end_texts
    assert (fails, client.restarts) == ([], 2)
    assert "did not answer in time" in caplog.text
    await client.close()

    fails = [True]
    client = EngineClient(settings(), fake_thread)
    await client.start(find_marks)
    with pytest.raises(BackendFailed, match="the chat template can't be asked what ends a turn"):
        await client.wait_ready()
    await client.close()


async def test_without_a_word_about_marks_nothing_becomes_special(client: EngineClient):
    info = await client.wait_ready()
    assert (info.added_texts, info.end_texts) == ((TURN,), ("</s>", "<|im_end|>"))
    typed = await client.tokenize(TextPrompt((Span(TURN, parse_special=False),)))
    assert [token.token_id for token in typed] == [BOS, VOCAB_SIZE]


async def test_requests_without_output_outlive_the_engine(process_client: EngineClient):
    client = process_client
    busy = [client.generate(ask(f"busy{i}", f"busy {i}", 900)) for i in range(4)]
    for deltas in busy:
        await anext(deltas)
    queued = asyncio.create_task(answer(client, ask("queued", "patient")))
    await asyncio.sleep(0)  # lets the task send its request
    send_to_engine(client, signal.SIGKILL)
    for deltas in busy:
        with pytest.raises(BackendFailed):
            async for _ in deltas:
                pass
    assert await queued == expected("patient")


async def test_adapters_outlive_the_engine_as_far_as_their_files_do(tmp_path: Path):
    for name in ("kept", "unloaded", "deleted"):
        (tmp_path / name).touch()
    client = EngineClient(EngineSettings(model=ModelSettings(adapter_folder=str(tmp_path))), fake_process)
    await client.start()
    await client.wait_ready()
    for name in ("kept", "unloaded", "deleted"):
        await client.load_adapter(name, name)
    with pytest.raises(InvalidRequest, match="no such file"):
        await client.load_adapter("never", "there")
    await client.unload_adapter("unloaded")
    assert client.adapters.keys() == {"kept", "deleted"}
    (tmp_path / "deleted").unlink()
    with pytest.raises(BackendFailed, match="died"):
        await answer(client, ask("r", "crash", 20))
    await client.wait_ready()

    assert client.adapters == {"kept": str(tmp_path / "kept")}
    assert await answer(client, structs.replace(ask("s", "hello"), adapter="kept")) == expected("hello")
    with pytest.raises(ModelNotFound):
        await answer(client, structs.replace(ask("t", "hello"), adapter="deleted"))
    await client.close()


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


# ---- what can go wrong at a restart ----


def refuse(error: Exception) -> Launcher:
    def launch(sock: socket.socket) -> EngineHandle:
        raise error

    return launch


def say(frame: bytes) -> Launcher:
    """An engine that says this, and then nothing."""

    def launch(sock: socket.socket) -> EngineHandle:
        own = sock.dup()

        def speak() -> None:
            with own:
                own.sendall(frame)
                while own.recv(1 << 16):
                    pass

        thread = threading.Thread(target=speak, daemon=True)
        thread.start()
        return ThreadHandle(thread)

    return launch


@pytest.mark.slow
@pytest.mark.parametrize(
    "fault",
    [
        refuse(OSError(errno.EMFILE, "Too many open files")),
        refuse(RuntimeError("can't start new thread")),
        say(b"\x01\0\0\0\xc1"),
        say(b"\xff\xff\xff\xff"),
    ],
    ids=["no descriptor", "no thread", "no message", "too long a frame"],
)
async def test_whatever_goes_wrong_at_a_restart_is_tried_again(fault: Launcher):
    launches: list[Launcher] = [fake_process, fault, fault, fake_process]
    async with running(short_lived(), lambda sock: launches.pop(0)(sock)) as client:
        busy = client.generate(ask("busy", "busy", 900))
        await anext(busy)
        waiting = asyncio.create_task(answer(client, ask("waiting", "patient")))
        await asyncio.sleep(0)
        send_to_engine(client, signal.SIGKILL)
        with pytest.raises(BackendFailed, match="died"):
            await anext(aiter([d async for d in busy]))
        assert await waiting == expected("patient")
    assert (launches, client.restarts) == ([], 3)


async def test_a_load_that_fails_at_a_restart_is_tried_again_and_ends_who_waits(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr(supervisor, "WAITING_S", 1.0)
    away = tmp_path / "away"
    model = EngineSettings(model=ModelSettings(model=str(away), max_num_seqs=1))
    async with running(model) as client:
        busy = client.generate(ask("busy", "busy", 900))
        await anext(busy)
        waiting = asyncio.create_task(answer(client, ask("waiting", "patient")))
        await asyncio.sleep(0)
        away.touch()
        send_to_engine(client, signal.SIGKILL)
        with pytest.raises(EngineUnavailable, match="no other could be started"):
            await waiting
        assert client.state == "restarting"
        away.unlink()
        await client.wait_ready()
        assert await answer(client, ask("later", "hello")) == expected("hello")
        await busy.aclose()


async def test_loads_that_keep_failing_are_given_up_in_the_end(tmp_path: Path):
    away = tmp_path / "away"
    model = EngineSettings(model=ModelSettings(model=str(away)), life=LifeSettings(restart_limit_s=1.0))
    async with running(model) as client:
        away.touch()
        send_to_engine(client, signal.SIGKILL)
        assert "not a model" in await asyncio.wait_for(client.wait_failed(), PATIENCE_S)
        assert client.state == "failed"


@pytest.mark.slow
async def test_the_pause_starts_anew_once_an_engine_has_answered(caplog: pytest.LogCaptureFixture):
    async with running(settings()) as client:
        for place in range(5):
            await client.wait_ready()
            if place != 1:
                assert await answer(client, ask(f"{place}", "hello")) == expected("hello")
            send_to_engine(client, signal.SIGKILL)
            await until(lambda: client.state == "restarting")
        await client.wait_ready()
    pauses = re.findall(r"restart_in_s=([\d.]+)", caplog.text)
    assert pauses == ["0.00", "0.25", "0.00", "0.00", "0.00"]


# ---- engines that stand still ----


async def test_a_stopped_engine_is_killed_and_what_waited_is_answered():
    async with running(short_lived(stuck_s=0.5)) as client:
        send_to_engine(client, signal.SIGSTOP)
        assert await asyncio.wait_for(answer(client, ask("r", "hello")), PATIENCE_S) == expected("hello")
        assert client.restarts == 1


async def test_a_step_that_never_ends_is_ended():
    async with running(short_lived(stuck_s=0.5)) as client:
        with pytest.raises(BackendFailed, match="died"):
            await asyncio.wait_for(answer(client, ask("r", "hang")), PATIENCE_S)
        await client.wait_ready()
        assert await answer(client, ask("s", "hello")) == expected("hello")


# ---- requests that waited ----


async def test_a_text_that_is_being_read_when_an_engine_ends_is_read_by_the_next(process_client: EngineClient):
    client = process_client
    for num_kills in (1, 2):
        send_to_engine(client, signal.SIGSTOP)
        calls = [
            asyncio.ensure_future(client.tokenize(TextPrompt((Span("hi"),)))),
            asyncio.ensure_future(client.detokenize([104, 105])),
        ]
        unrepeatable = asyncio.ensure_future(client.load_adapter("a", "a"))
        await asyncio.sleep(0)  # lets the tasks send their messages
        send_to_engine(client, signal.SIGKILL)
        with pytest.raises(EngineUnavailable, match="ended meanwhile") as refusal:
            await unrepeatable
        assert (refusal.value.retry_after_s or 0) >= 1
        tokens, text = await asyncio.wait_for(asyncio.gather(*calls), PATIENCE_S)
        assert (tokens.ids[1:], text, client.restarts) == ([104, 105], "hi", num_kills)


async def test_a_text_over_which_two_engines_end_is_tried_no_more(process_client: EngineClient):
    client = process_client
    send_to_engine(client, signal.SIGSTOP)
    call = asyncio.ensure_future(client.tokenize(TextPrompt((Span("hi"),))))
    await asyncio.sleep(0)
    send_to_engine(client, signal.SIGKILL)
    client.on_lost()  # as if another had ended before it answered
    with pytest.raises(EngineUnavailable, match="ended meanwhile"):
        await call


@pytest.mark.slow
async def test_requests_that_only_waited_outlive_any_number_of_engines():
    async with running(short_lived()) as client:
        writing = [client.generate(ask(name, name, 900)) for name in "abc"]
        firsts = [asyncio.ensure_future(anext(deltas)) for deltas in writing]
        waiting = [asyncio.create_task(answer(client, ask(f"w{i}", f"wait {i}"))) for i in range(8)]
        for first, deltas in zip(firsts, writing, strict=True):  # one at a time: its prompt is the shortest
            await asyncio.wait_for(first, PATIENCE_S)
            send_to_engine(client, signal.SIGKILL)
            with pytest.raises(BackendFailed, match="died"):
                async for _ in deltas:
                    pass
        assert await asyncio.gather(*waiting) == [expected(f"wait {i}") for i in range(8)]
        assert client.restarts == 3


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


async def test_a_request_that_ends_every_engine_is_tried_twice():
    async with running(settings()) as client:
        with pytest.raises(BackendFailed, match="died"):
            await answer(client, ask("r", "crashabc"))
        await client.wait_ready()
        assert client.restarts == 2
