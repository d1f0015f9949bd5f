"""Engines that end, hang or can't be started again, and what the front makes of it."""

import asyncio
import errno
import re
import signal
import socket
import threading
from collections.abc import AsyncIterator
from pathlib import Path

import pytest
from engine_clients import (
    PATIENCE_S,
    answer,
    ask,
    ended,
    expected,
    fake_process,
    fake_thread,
    kill_engine,
    running,
    send_to_engine,
    settings,
    short_lived,
    until,
)
from fake_engine import TURN
from msgspec import structs

from tightrope.backends.settings import ModelSettings
from tightrope.engine.errors import BackendFailed, EngineUnavailable, InvalidRequest, ModelNotFound
from tightrope.engine.process import supervisor
from tightrope.engine.process.client import EngineClient
from tightrope.engine.process.launch import EngineHandle, Launcher, ThreadHandle
from tightrope.engine.settings import EngineSettings, LifeSettings
from tightrope.engine.types import ModelInfo, Span, TextPrompt, TurnMarks


@pytest.fixture
async def process_client() -> AsyncIterator[EngineClient]:
    client = EngineClient(settings(), fake_process)
    await client.start()
    await client.wait_ready()
    yield client
    await client.close()


async def test_an_engine_that_dies_is_back_for_the_next_request(process_client: EngineClient):
    client = process_client
    await kill_engine(client)
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


async def test_an_engine_is_not_used_without_its_marks(caplog: pytest.LogCaptureFixture):
    fails = [False, True, False]

    async def find_marks(info: ModelInfo) -> TurnMarks:
        if fails.pop(0):
            raise TimeoutError
        return TurnMarks((TURN,), (TURN,))

    client = EngineClient(settings(), fake_process)
    await client.start(find_marks)
    await client.wait_ready()
    await kill_engine(client)
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
    await kill_engine(client)
    await client.wait_ready()

    assert client.adapters == {"kept": str(tmp_path / "kept")}
    assert await answer(client, structs.replace(ask("s", "hello"), adapter="kept")) == expected("hello")
    with pytest.raises(ModelNotFound):
        await answer(client, structs.replace(ask("t", "hello"), adapter="deleted"))
    await client.close()


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
        first = await anext(busy)
        waiting = asyncio.create_task(answer(client, ask("waiting", "patient")))
        await asyncio.sleep(0)
        send_to_engine(client, signal.SIGKILL)
        text = "".join([delta.text async for delta in busy])
        assert (first.text + text, await waiting) == (expected("busy", 900), expected("patient"))
    assert (launches, client.restarts) == ([], 3)


@pytest.mark.slow
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


async def test_a_stop_of_all_processes_is_no_time_that_requests_wait(monkeypatch: pytest.MonkeyPatch):
    async with running(settings()) as client:
        busy = client.generate(ask("busy", "busy", 900))
        first = await anext(busy)
        send_to_engine(client, signal.SIGKILL)
        await until(lambda: client.state == "restarting")
        loop = asyncio.get_running_loop()
        now = loop.time
        monkeypatch.setattr(loop, "time", lambda: now() + 3600)
        assert first.text + "".join([delta.text async for delta in busy]) == expected("busy", 900)


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


async def test_a_stopped_engine_is_killed_and_what_waited_is_answered(caplog: pytest.LogCaptureFixture):
    async with running(short_lived(stuck_s=2.0)) as client:
        send_to_engine(client, signal.SIGSTOP)
        assert await asyncio.wait_for(answer(client, ask("r", "hello")), PATIENCE_S) == expected("hello")
        assert client.restarts == 1
    assert "how=killed by SIGKILL, by this server: it gave no sign of life for " in caplog.text


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


def has_begun(client: EngineClient, name: str) -> bool:
    return name in client._exchange.streams and client._exchange.streams[name].has_begun


@pytest.mark.slow
async def test_requests_that_only_waited_outlive_any_number_of_engines():
    async with running(short_lived()) as client:
        writing = [asyncio.create_task(answer(client, ask(name, name, 900))) for name in "ab"]
        waiting = [asyncio.create_task(answer(client, ask(f"w{i}", f"wait {i}"))) for i in range(8)]
        for task, name in zip(writing, "ab", strict=True):  # one at a time: its prompt is the shortest
            for _ in range(2):
                await until(lambda name=name: client.state == "ready" and has_begun(client, name))  # type: ignore[misc]
                await kill_engine(client)
            with pytest.raises(BackendFailed, match="died 2 times"):
                await task
        assert await asyncio.gather(*waiting) == [expected(f"wait {i}") for i in range(8)]
        assert client.restarts == 4


@pytest.mark.slow
async def test_a_request_that_ends_every_engine_is_tried_twice():
    async with running(settings()) as client:
        with pytest.raises(BackendFailed, match="died"):
            await answer(client, ask("r", "crash"))
        await client.wait_ready()
        assert client.restarts == 2


async def test_a_fault_of_ours_before_a_step_is_told_and_its_request_is_tried_twice(capfd: pytest.CaptureFixture[str]):
    async with running(settings()) as client:
        with pytest.raises(BackendFailed, match="died"):
            await asyncio.wait_for(answer(client, ask("r", "fault")), PATIENCE_S)
        await client.wait_ready()
        assert client.restarts == 2
        assert await answer(client, ask("s", "hello")) == expected("hello")
    assert capfd.readouterr().err.count("ZeroDivisionError: a fault of ours") == 2
