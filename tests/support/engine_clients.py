"""Engine clients over the fake engine, in a thread or in a process of its own, and what tests ask them."""

import asyncio
import os
import signal
import socket
import sys
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager

from checkout import SUPPORT
from fake_engine import open_fake
from fakes import BOS, letters

from tightrope.backends.settings import ModelSettings
from tightrope.engine.process.client import EngineClient
from tightrope.engine.process.launch import EngineHandle, Launcher, ProcessHandle, run_process, thread_launcher
from tightrope.engine.sampler.steps import SamplingParams
from tightrope.engine.settings import EngineSettings, LifeSettings, LimitSettings
from tightrope.engine.types import GenerateRequest, Span, StopRules, TextPrompt

PATIENCE_S = 240.0  # a busy machine starts a process in some seconds
FAKE_ENGINE = SUPPORT / "fake_engine.py"


def fake_process(sock: socket.socket) -> ProcessHandle:
    return run_process([sys.executable, str(FAKE_ENGINE), str(sock.fileno())], sock)


fake_thread = thread_launcher(open_fake)


def settings(**limits: int) -> EngineSettings:
    return EngineSettings(model=ModelSettings(gguf_engine="llama.cpp", max_num_seqs=4), limits=LimitSettings(**limits))


def short_lived(**life: float) -> EngineSettings:
    return EngineSettings(model=ModelSettings(gguf_engine="llama.cpp", max_num_seqs=1), life=LifeSettings(**life))


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


async def kill_engine(client: EngineClient) -> None:
    """End it with -9; returns when the front knows."""
    num_before = client.restarts
    send_to_engine(client, signal.SIGKILL)
    await until(lambda: client.state == "restarting" or client.restarts > num_before)


async def ended(handle: EngineHandle) -> str:
    while (how := handle.poll()) is None:
        await asyncio.sleep(0)
    return how


async def until(holds: Callable[[], bool]) -> None:
    async with asyncio.timeout(PATIENCE_S):
        while not holds():
            await asyncio.sleep(0)


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
