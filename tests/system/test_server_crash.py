"""The engine process is killed in mid-answer: what open streams, /health and later requests see."""

import json
import os
import resource
import shutil
import signal
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path

import httpx
import pytest
from checkout import DATA
from real_server import RunningServer, engine_pid, run_server

pytestmark = pytest.mark.slow

TINY = DATA / "adapters" / "llama-bf16"
BACK_S = 120  # so long is waited for an engine behind one that was killed


@pytest.fixture(scope="module")
def one_server() -> Iterator[RunningServer]:
    with run_server("--gguf-engine=llama.cpp", "--stuck-after=4") as running:
        yield running


@pytest.fixture
def own_server(one_server: RunningServer) -> RunningServer:
    """With an engine, whatever became of the one before."""
    wait_until_healthy(one_server.url)
    return one_server


def events(response: httpx.Response) -> Iterator[str]:
    for line in response.iter_lines():
        if line.startswith("data: "):
            yield line.removeprefix("data: ")


def wait_until_healthy(url: str) -> float:
    """Poll /health until it says 200; return the seconds that took."""
    began = time.monotonic()
    while time.monotonic() - began < BACK_S:
        if httpx.get(f"{url}/health", timeout=60).status_code == 200:
            return time.monotonic() - began
    raise AssertionError(f"the engine was not back after {BACK_S} s")


def kill_engine(server: RunningServer) -> None:
    """End it with -9; returns when the front knows."""
    os.kill(engine_pid(server.process.pid), signal.SIGKILL)
    wait_until(lambda: httpx.get(f"{server.url}/health", timeout=60).status_code == 503)


BODIES: Mapping[str, dict[str, object]] = {
    "/v1/completions": {"prompt": "Count:", "max_tokens": 40, "ignore_eos": True, "temperature": 0, "stream": True},
    "/generate_stream": {"inputs": "Once", "parameters": {"max_new_tokens": 40, "seed": 3, "ignore_eos": True}},
}


def texts(stream: Iterable[str]) -> list[str]:
    """The text of each event."""
    found = []
    for event in stream:
        if event != "[DONE]":
            one = json.loads(event)
            found.append(one["choices"][0]["text"] if "choices" in one else one["token"]["text"])
    return found


@pytest.mark.parametrize("path", BODIES)
def test_an_answer_goes_on_when_its_engine_is_killed(own_server: RunningServer, path: str):
    url = own_server.url
    with httpx.stream("POST", url + path, json=BODIES[path], timeout=60) as response:
        undisturbed = texts(events(response))

    with httpx.stream("POST", url + path, json=BODIES[path], timeout=60) as response:
        stream = events(response)
        first = next(stream)
        kill_engine(own_server)
        refused = httpx.post(f"{url}/v1/completions", json={"prompt": "hello", "max_tokens": 1}, timeout=60)
        assert refused.status_code == 503
        assert "retry-after" in refused.headers
        assert texts([first, *stream]) == undisturbed

    wait_until_healthy(url)
    assert own_server.process.poll() is None


@pytest.mark.parametrize("path", BODIES)
def test_an_answer_over_which_two_engines_are_killed_ends_with_an_error(own_server: RunningServer, path: str):
    url = own_server.url
    key = "max_tokens" if path == "/v1/completions" else "parameters"
    body = {**BODIES[path], key: 2000 if key == "max_tokens" else {"max_new_tokens": 2000, "ignore_eos": True}}
    with httpx.stream("POST", url + path, json=body, timeout=120) as response:
        stream = events(response)
        next(stream)
        kill_engine(own_server)
        wait_until_healthy(url)
        wait_until(lambda: "tgi_batch_current_size 1.0" in httpx.get(f"{url}/metrics", timeout=60).text.splitlines())
        kill_engine(own_server)
        *_, last = stream
    error = json.loads(last)  # and no [DONE] after it
    if path.startswith("/v1"):
        assert error["error"]["code"] == "server_error"
        assert "engine process died 2 times" in error["error"]["message"]
    else:
        assert error["error_type"] == "generation"
    wait_until_healthy(url)


def test_a_stopped_engine_is_killed_and_what_it_owed_is_answered(own_server: RunningServer):
    os.kill(engine_pid(own_server.process.pid), signal.SIGSTOP)

    answer = httpx.post(f"{own_server.url}/v1/completions", json={"prompt": "hello", "max_tokens": 3}, timeout=60)

    assert answer.status_code == 200
    assert "no sign of life" in own_server.errors()


def test_an_engine_that_finds_no_descriptor_is_started_when_there_is_one(own_server: RunningServer):
    front = own_server.process.pid
    before = resource.prlimit(front, resource.RLIMIT_NOFILE)
    engine = engine_pid(front)
    num_open = len(os.listdir(f"/proc/{front}/fd"))
    resource.prlimit(front, resource.RLIMIT_NOFILE, (num_open - 1, before[1]))
    try:
        os.kill(engine, signal.SIGKILL)
        wait_until(lambda: "Too many open files" in own_server.errors())
    finally:
        resource.prlimit(front, resource.RLIMIT_NOFILE, before)

    wait_until_healthy(own_server.url)


def test_a_server_whose_model_stays_away_ends_with_status_1(tmp_path: Path):
    model = tmp_path / "model"
    shutil.copytree(TINY, model)
    with run_server(str(model), "--restart-limit=1.5", status=None) as server:
        model.rename(tmp_path / "away")
        os.kill(engine_pid(server.process.pid), signal.SIGKILL)
        assert server.process.wait(60) == 1
        last = server.errors().splitlines()[-1]
    assert last.startswith("tightrope: no engine could be started for 1.5 s (--restart-limit)")
    assert str(model) in last


def wait_until(holds: Callable[[], bool]) -> None:
    deadline = time.monotonic() + 60
    while not holds():
        assert time.monotonic() < deadline
        os.sched_yield()
