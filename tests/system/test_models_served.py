"""Several real models behind one real server: each in a process of its own, by turns or side by side."""

import json
import subprocess
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

import httpx
import psutil
import pytest
from gguf_models import gemma
from hf_models import smollm2_bf16
from real_server import MODULE, RunningServer, clean_environment, run_server

from tightrope.backends.locate import bundled_model
from tightrope.backends.memory import free_memory, private_memory

PROMPT = "Once upon a time there was a ferry that went over a grey harbour. " * 12
PATIENCE_S = 400.0  # A busy machine, that stands still now and then, needs some seconds.
MIB = 1 << 20


def model_list(folder: Path, **more: dict[str, Any]) -> Path:
    """A list of SmolLM2 135M and Gemma 3 270M."""
    own: dict[str, Any] = {"max-model-len": 1024, "max-num-seqs": 2, "threads": 1}
    tables = {
        "smol": {"model": str(bundled_model()), **own},
        "gemma": {"model": str(gemma()), **own},
        **{name: own | table for name, table in more.items()},
    }
    path = folder / "models.json"
    path.write_text(json.dumps(tables))
    return path


def ask(server: RunningServer, model: str, prompt: str = "Once upon a time", **more: object) -> httpx.Response:
    body = {"model": model, "prompt": prompt, "max_tokens": 8, "temperature": 0, "ignore_eos": True, **more}
    return httpx.post(f"{server.url}/v1/completions", json=body, timeout=PATIENCE_S)


def said(server: RunningServer, model: str, prompt: str = "Once upon a time", **more: object) -> str:
    reply = ask(server, model, prompt, **more)
    assert reply.status_code == 200, reply.text
    return str(reply.json()["choices"][0]["text"])


def states(server: RunningServer) -> dict[str, str]:
    cards = httpx.get(f"{server.url}/v1/models", timeout=PATIENCE_S).json()["data"]
    return {card["id"]: card["status"]["value"] for card in cards}


def engines(server: RunningServer) -> list[psutil.Process]:
    """Processes of loaded models, the oldest first."""
    found = []
    for child in psutil.Process(server.process.pid).children(recursive=True):
        with suppress(psutil.NoSuchProcess):  # It ends just now.
            if "tightrope.engine.process.child" in child.cmdline():
                found.append(child)
    return sorted(found, key=lambda engine: engine.create_time())


def until(holds: Callable[[], bool]) -> None:
    deadline_s = time.monotonic() + PATIENCE_S
    while not holds():
        assert time.monotonic() < deadline_s
        time.sleep(0.05)


@pytest.fixture(scope="module")
def both(tmp_path_factory: pytest.TempPathFactory) -> Iterator[RunningServer]:
    """A server of both models, which are loaded side by side, and of a file that is none."""
    folder = tmp_path_factory.mktemp("models")
    (folder / "broken.gguf").write_text("no model")
    with run_server("--models", str(model_list(folder, broken={"model": "broken.gguf"}))) as server:
        yield server


def test_two_models_answer_side_by_side_and_a_broken_one_names_itself(both: RunningServer) -> None:
    assert "models    3 in " in both.output
    assert "names     smol, gemma, broken" in both.output
    first = {name: said(both, name) for name in ("smol", "gemma")}
    assert first["smol"] != first["gemma"]
    reply = ask(both, "broken")
    line = reply.json()["error"]["message"]
    assert reply.status_code == 500
    assert line.startswith("the model `broken` can't be loaded: ")
    assert "broken.gguf: not a GGUF file" in line
    assert line.isprintable()
    assert states(both) == {"smol": "loaded", "gemma": "loaded", "broken": "failed"}
    assert {name: said(both, name) for name in ("smol", "gemma")} == first
    assert len(engines(both)) == 2


def test_the_crash_of_one_engine_does_not_touch_the_other(both: RunningServer) -> None:
    first = {name: said(both, name) for name in ("smol", "gemma")}
    ends: dict[str, str] = {}

    def stream() -> None:
        ends["gemma"] = said(both, "gemma", max_tokens=200)

    other = threading.Thread(target=stream)
    oldest, youngest = engines(both)
    other.start()
    oldest.kill()
    until(lambda: len(engines(both)) == 2 and oldest.pid not in [engine.pid for engine in engines(both)])
    other.join()
    assert ends["gemma"].startswith(first["gemma"])
    assert youngest.is_running()
    until(lambda: ask(both, "smol").status_code == 200)
    assert said(both, "smol") == first["smol"]
    assert httpx.get(f"{both.url}/health", timeout=60).status_code == 200


@pytest.mark.slow
def test_fifty_requests_by_turns_leave_the_memory_of_one_model(tmp_path: Path) -> None:
    with run_server("--models", str(model_list(tmp_path)), "--models-max", "1") as server:
        front = psutil.Process(server.process.pid)

        def taken() -> int:
            (engine,) = engines(server)
            return private_memory(engine.pid) + private_memory(front.pid)

        first, alone = {}, {}
        for name in ("smol", "gemma"):
            first[name] = said(server, name)
            alone[name] = taken()
        for number in range(50):
            name = ("smol", "gemma")[number % 2]
            assert said(server, name) == first[name]
            assert states(server)[name] == "loaded"
        assert taken() < 1.1 * alone["gemma"]
        assert len(front.children()) <= 2  # The engine, and what writes chats by templates.


@pytest.mark.slow
def test_a_model_gives_way_by_plan_where_memory_has_no_room_for_both(tmp_path: Path) -> None:
    """Each is to have 3 GiB for chats beside its cache: one fits into 6 GiB, and two need 8."""
    kept_mib = max(0, (free_memory() - (6 << 30)) >> 20)
    room = ("--host-cache-mib", "3072", "--keep-free-mib", str(kept_mib))
    with run_server("--models", str(model_list(tmp_path)), *room) as server:
        first = said(server, "smol")
        assert said(server, "gemma")
        assert states(server) == {"smol": "unloaded", "gemma": "loaded"}
        assert said(server, "smol") == first
        assert states(server) == {"smol": "loaded", "gemma": "unloaded"}
        assert len(engines(server)) == 1


@pytest.mark.slow
def test_a_stream_is_finished_before_its_model_makes_room(tmp_path: Path) -> None:
    with run_server("--models", str(model_list(tmp_path)), "--models-max", "1") as server:
        expected = said(server, "smol", max_tokens=300)
        pieces, began = list[str](), threading.Event()

        def stream() -> None:
            body = {"model": "smol", "prompt": "Once upon a time", "max_tokens": 300, "temperature": 0}
            body |= {"stream": True, "ignore_eos": True}
            with httpx.stream("POST", f"{server.url}/v1/completions", json=body, timeout=PATIENCE_S) as r:
                for line in r.iter_lines():
                    if line.startswith("data: {"):
                        pieces.append(json.loads(line.removeprefix("data: "))["choices"][0]["text"])
                        began.set()

        open_stream = threading.Thread(target=stream)
        open_stream.start()
        assert began.wait(PATIENCE_S)
        assert said(server, "gemma")
        open_stream.join()
        assert "".join(pieces) == expected
        assert states(server) == {"smol": "unloaded", "gemma": "loaded"}


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["gguf", "folder"])
def test_a_chat_that_rests_on_disk_survives_the_change(kind: str, tmp_path: Path) -> None:
    model = {"gguf": lambda: str(bundled_model()), "folder": lambda: str(smollm2_bf16())}[kind]()
    path = model_list(tmp_path, chat={"model": model})
    with run_server("--models", str(path), "--models-max", "1", "--session-dir", str(tmp_path / "chats")) as server:
        first = ask(server, "chat", PROMPT).json()
        assert first["usage"]["prompt_tokens_details"]["cached_tokens"] == 0
        assert said(server, "gemma")
        text = first["choices"][0]["text"]
        again = ask(server, "chat", PROMPT + text).json()
        assert again["usage"]["prompt_tokens_details"]["cached_tokens"] > 150


@pytest.mark.slow
def test_the_only_model_sleeps_when_it_idles_and_comes_back() -> None:
    with run_server("--max-model-len", "1024", "--sleep-idle-seconds", "1") as server:
        first = said(server, "")
        until(lambda: not engines(server))
        assert httpx.get(f"{server.url}/health", timeout=60).status_code == 200
        assert said(server, "") == first
        assert len(engines(server)) == 1


@pytest.mark.parametrize(
    ("options", "line"),
    [
        ((), "holds no model: neither a .gguf file nor a folder of a model"),
        (("--lora", "a=b"), "--lora: an adapter belongs to its model"),
        (("--models-max", "0"), "--models-max: input should be greater than or equal to 1, not '0'"),
    ],
)
def test_models_that_cannot_be_end_the_start_with_one_line(tmp_path: Path, options: tuple[str, ...], line: str) -> None:
    command = [*MODULE, "serve", "--port", "0", "--models", str(tmp_path), *options]
    ended = subprocess.run(command, capture_output=True, text=True, env=clean_environment(), timeout=PATIENCE_S)
    assert ended.returncode == 2
    assert ended.stderr.startswith("tightrope: --")
    assert line in ended.stderr
    assert ended.stderr.count("\n") == 1
    assert ended.stdout == ""
