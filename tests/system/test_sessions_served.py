"""A served chat goes on where it was when the server has been stopped, or killed with everything that belongs to it."""

import shutil
import time
from collections.abc import Callable
from pathlib import Path

import httpx
import psutil
import pytest
from hf_models import smollm2_bf16
from real_server import MODULE, RunningServer, run_server

from tightrope.backends.sessions.folder import Folder
from tightrope.backends.sessions.listing import chats_in

pytestmark = pytest.mark.slow

MODELS: dict[str, Callable[[], list[str]]] = {
    "torch": lambda: [str(smollm2_bf16())],
    "llama.cpp": lambda: ["--gguf-engine=llama.cpp"],
    "torch, of a GGUF file": lambda: ["--gguf-engine=own"],
}
PROMPT = "Once upon a time there was a ferry that went over a grey harbour. " * 12
WRITTEN_S = 240
FOUND = 120  # Of some 195; llama.cpp reads as many as fit in a step of 64 again for a greedy answer.


def ask(server: RunningServer, prompt: str) -> tuple[str, int]:
    """A greedy answer, and how many tokens of the prompt were cached."""
    body = {"prompt": prompt, "max_tokens": 16, "temperature": 0, "ignore_eos": True}
    answer = httpx.post(f"{server.url}/v1/completions", json=body, timeout=120).json()
    return answer["choices"][0]["text"], answer["usage"]["prompt_tokens_details"]["cached_tokens"]


def options(engine: str, folder: Path) -> list[str]:
    return [*MODELS[engine](), "--max-model-len", "1024", "--session-dir", str(folder)]


def wait_until_written(folder: Path, num_tokens: int) -> None:
    opened = Folder(folder, create=False)
    deadline = time.monotonic() + WRITTEN_S
    while not any(chat.num_tokens >= num_tokens for chat in chats_in(opened)):
        assert time.monotonic() < deadline, "the chat was never written"
        time.sleep(0.02)
    opened.close()


@pytest.mark.parametrize("engine", MODELS)
def test_a_chat_goes_on_after_everything_was_killed(engine: str, tmp_path: Path) -> None:
    folder = tmp_path / "chats"
    with run_server(*options(engine, folder), status=None) as server:
        first, cached = ask(server, PROMPT)
        assert cached == 0
        wait_until_written(folder, 150)
        shutil.copytree(folder, tmp_path / "then")
        stayed, _ = ask(server, PROMPT + first)
        for process in [
            *psutil.Process(server.process.pid).children(recursive=True),
            psutil.Process(server.process.pid),
        ]:
            process.kill()
    with run_server(*options(engine, tmp_path / "then")) as server:
        assert f"sessions: chats are kept in {tmp_path / 'then'}" in server.output
        came_back, cached = ask(server, PROMPT + first)
        assert cached > FOUND
        assert came_back == stayed


@pytest.mark.parametrize("engine", MODELS)
def test_the_end_by_sigterm_writes_what_rests(engine: str, tmp_path: Path) -> None:
    folder = tmp_path / "chats"
    with run_server(*options(engine, folder)) as server:
        first, _ = ask(server, PROMPT)
    with run_server(*options(engine, folder)) as server:
        assert ask(server, PROMPT + first)[1] > FOUND


def test_a_disk_that_takes_nothing_costs_one_line(tmp_path: Path) -> None:
    folder = tmp_path / "chats"
    limited = ["/bin/sh", "-c", 'ulimit -f 100; exec "$@"', "sh"]  # No file may be larger than some kilobytes.
    program = [*limited, *MODULE]
    with run_server(*options("llama.cpp", folder), program=program) as server:
        first, _ = ask(server, PROMPT)
        assert ask(server, PROMPT + first)[1] > FOUND
        assert ask(server, PROMPT)[0] == first
        lines = [line for line in server.errors().splitlines() if "chats are not kept on disk" in line]
    assert len(lines) == 1
