"""The engine process is killed in mid-answer: what open streams, /health and later requests see."""

import json
import os
import resource
import shutil
import signal
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import httpx
import pytest
from checkout import DATA
from real_server import RunningServer, run_server

pytestmark = pytest.mark.slow

TINY = DATA / "adapters" / "llama-bf16"
BACK_S = 20  # how soon a killed engine must serve again


@pytest.fixture(scope="module")
def own_server() -> Iterator[RunningServer]:
    with run_server("--stuck-after=4") as running:
        yield running


def engine_pid(front: int) -> int:
    """The front's child that runs the engine."""
    for status in Path("/proc").glob("[0-9]*/status"):
        try:
            parent = next(line for line in status.read_text().splitlines() if line.startswith("PPid:"))
            command = status.with_name("cmdline").read_bytes()
        except (OSError, StopIteration):
            continue  # it ended meanwhile
        if int(parent.split()[1]) == front and b"tightrope.engine.process.child" in command:
            return int(status.parent.name)
    raise AssertionError("the engine process isn't there")


def events(response: httpx.Response) -> Iterator[str]:
    for line in response.iter_lines():
        if line.startswith("data: "):
            yield line.removeprefix("data: ")


def wait_until_healthy(url: str) -> float:
    """Poll /health until it says 200; return the seconds that took."""
    began = time.monotonic()
    while time.monotonic() - began < BACK_S:
        if httpx.get(f"{url}/health").status_code == 200:
            return time.monotonic() - began
    raise AssertionError(f"the engine was not back after {BACK_S} s")


@pytest.mark.parametrize(
    ("path", "body"),
    [
        ("/v1/completions", {"prompt": "Count:", "max_tokens": 2000, "ignore_eos": True, "stream": True}),
        (
            "/generate_stream",
            {"inputs": "Once upon a time", "parameters": {"max_new_tokens": 2000, "temperature": 5.0}},
        ),
    ],
    ids=["openai", "tgi"],
)
def test_a_killed_engine_ends_the_stream_with_an_error_and_is_back(
    own_server: RunningServer, path: str, body: dict[str, object]
):
    url = own_server.url
    with httpx.stream("POST", url + path, json=body, timeout=60) as response:
        assert response.status_code == 200
        stream = events(response)
        next(stream)
        os.kill(engine_pid(own_server.process.pid), signal.SIGKILL)
        *_, last = stream
    error = json.loads(last)  # and no [DONE] after it
    if path.startswith("/v1"):
        assert error["error"]["code"] == "server_error"
        assert "engine process died" in error["error"]["message"]
    else:
        assert error["error_type"] == "generation"

    health = httpx.get(f"{url}/health")
    assert health.status_code == 503
    refused = httpx.post(f"{url}/v1/completions", json={"prompt": "hello", "max_tokens": 1})
    assert refused.status_code == 503
    assert "retry-after" in refused.headers

    wait_until_healthy(url)
    answer = httpx.post(f"{url}/v1/completions", json={"prompt": "hello", "max_tokens": 3}, timeout=60)
    assert answer.status_code == 200
    assert answer.json()["usage"]["completion_tokens"] >= 1
    assert own_server.process.poll() is None


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
