"""`tightrope cluster` with two replicas of a real model, by Ray: its clients, and the end of a replica."""

import json
import os
import re
import signal
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import suppress
from ipaddress import ip_address
from pathlib import Path

import gguf
import httpx
import psutil
import pytest
from real_server import RunningServer, clean_environment, started
from vector_models import bert, write_gguf

PATIENCE_S = 300.0
OPTIONS = ("--port", "0", "--replicas", "2", "--threads", "1", "--max-model-len", "1024", "--kv-cache-tokens", "4096")


def cluster_command(*options: str) -> list[str]:
    return [sys.executable, "-m", "tightrope", "cluster", *OPTIONS, *options]


@pytest.fixture(scope="module")
def cluster(tmp_path_factory: pytest.TempPathFactory) -> Iterator[RunningServer]:
    beside = write_gguf(tmp_path_factory.mktemp("cluster") / "vectors.gguf", bert(), gguf.PoolingType.MEAN)
    with started(cluster_command("--embedding-model", str(beside)), clean_environment()) as running:
        yield running
        tree = psutil.Process(running.process.pid).children(recursive=True)
    assert not psutil.wait_procs(tree, timeout=PATIENCE_S)[1], "Ray's processes end with the command"


def until(holds: Callable[[], bool]) -> None:
    deadline_s = time.monotonic() + PATIENCE_S
    while not holds():
        assert time.monotonic() < deadline_s


def of_replicas(url: str, name: str) -> Mapping[str, float]:
    """What /metrics tells of each replica."""
    text = httpx.get(f"{url}/metrics", timeout=60).text
    found = re.findall(rf'^tightrope_replica_{name}{{replica="([^"]+)"}} (\S+)$', text, re.MULTILINE)
    return {replica: float(value) for replica, value in found}


def are_up(url: str) -> bool:
    return list(of_replicas(url, "up").values()) == [1.0, 1.0]


def replica_processes(cluster: RunningServer) -> list[psutil.Process]:
    """Each is an actor of Ray's, and has the engine as its child."""
    children = psutil.Process(cluster.process.pid).children(recursive=True)
    return [child for child in children if "ServeReplica" in "".join(child.cmdline()[:1])]


def body(prompt: str, max_tokens: int) -> dict[str, object]:
    return {"prompt": prompt, "max_tokens": max_tokens, "temperature": 0, "ignore_eos": True}


def test_it_says_what_it_serves_and_answers_in_all_dialects(cluster: RunningServer):
    assert "replica   2 of 2 is ready" in cluster.output
    assert re.search(r"^cache     8192 tokens, q8, for up to 32 answers at a time$", cluster.output, re.MULTILINE)
    said = [{"role": "user", "content": "Say hello."}]
    with httpx.Client(base_url=cluster.url, timeout=PATIENCE_S) as client:
        asked = {"messages": said, "max_tokens": 8}
        chat = client.post("/v1/chat/completions", json=asked).json()
        assert chat["usage"]["completion_tokens"] == 8
        assert client.post("/v1/messages", json={**asked, "model": "any"}).json()["content"]
        assert client.post("/generate", json={"inputs": "Hello", "parameters": {"max_new_tokens": 4}}).json()
        assert client.post("/tokenize", json={"prompt": "Hello there"}).json()["count"] == 2
        assert client.get("/health").status_code == 200


def test_the_front_has_the_embedding_models(cluster: RunningServer):
    answer = httpx.post(f"{cluster.url}/v1/embeddings", json={"model": "vectors", "input": ["a cat", "the sea"]})
    assert [len(row["embedding"]) for row in answer.json()["data"]] == [32, 32]


def test_nothing_listens_beyond_this_machine(cluster: RunningServer):
    processes = [psutil.Process(cluster.process.pid), *psutil.Process(cluster.process.pid).children(recursive=True)]
    listening = {
        ip_address(connection.laddr.ip.removeprefix("::ffff:"))
        for process in processes
        for connection in process.net_connections("inet")
        if connection.status == psutil.CONN_LISTEN
    }
    assert listening
    assert all(address.is_loopback for address in listening)


def test_a_chat_goes_on_where_its_tokens_are(cluster: RunningServer):
    with httpx.Client(base_url=cluster.url, timeout=PATIENCE_S) as client:
        for number in range(3):
            text, before = f"Once upon a time, for the {number}. time, there was a lighthouse. " * 6, 0
            for turn in range(3):
                reply = client.post("/v1/completions", json=body(text, 16)).json()
                cached = reply["usage"]["prompt_tokens_details"]["cached_tokens"]
                assert turn == 0 or cached >= before - 32
                text += reply["choices"][0]["text"] + " And then?"
                before = reply["usage"]["total_tokens"]


def test_a_model_that_was_unloaded_by_a_route_is_there_again_for_the_next_request(cluster: RunningServer):
    until(lambda: are_up(cluster.url))
    with httpx.Client(base_url=cluster.url, timeout=PATIENCE_S) as client:
        assert client.post("/v1/model/unload").status_code == 200
        reply = client.post("/v1/completions", json=body("Are you there?", 8))
        assert (reply.status_code, reply.json()["usage"]["completion_tokens"]) == (200, 8)
    until(lambda: are_up(cluster.url))


def test_a_replica_that_is_killed_in_mid_answer_changes_no_text(cluster: RunningServer):
    prompts = [f"A story about the number {number}, which nobody had counted to:" for number in range(2)]
    with httpx.Client(base_url=cluster.url, timeout=PATIENCE_S) as client:
        undisturbed = [client.post("/v1/completions", json=body(prompt, 100)).json() for prompt in prompts]
        streams = [
            client.send(
                client.build_request("POST", "/v1/completions", json={**body(p, 100), "stream": True}), stream=True
            )
            for p in prompts
        ]
        lines = [stream.iter_lines() for stream in streams]
        begun = [next(line) for line in lines]
        for process in replica_processes(cluster)[:1]:
            os.kill(process.pid, signal.SIGKILL)
        texts = ["".join(text_of(line) for line in [first, *rest]) for first, rest in zip(begun, lines, strict=True)]
    assert texts == [reply["choices"][0]["text"] for reply in undisturbed]


def text_of(line: str) -> str:
    data = line.removeprefix("data: ")
    if not data or data == "[DONE]":
        return ""
    choices = json.loads(data)["choices"]
    return choices[0]["text"] if choices else ""


@pytest.mark.slow
def test_all_replicas_are_started_anew_without_a_refused_request(cluster: RunningServer):
    until(lambda: are_up(cluster.url))
    before = of_replicas(cluster.url, "up").keys()
    cluster.process.send_signal(signal.SIGHUP)
    with httpx.Client(base_url=cluster.url, timeout=PATIENCE_S) as client:
        deadline_s = time.monotonic() + 2 * PATIENCE_S
        while before & of_replicas(cluster.url, "up").keys() or not are_up(cluster.url):
            reply = client.post("/v1/completions", json=body("Are you there?", 8))
            assert (reply.status_code, reply.json()["usage"]["completion_tokens"]) == (200, 8)
            assert time.monotonic() < deadline_s


def test_a_model_that_can_not_be_loaded_ends_the_command_with_its_reason(tmp_path: Path):
    model = tmp_path / "broken.gguf"
    model.write_bytes(b"GGUF" + bytes(64))
    with (
        pytest.raises(AssertionError, match="did not start") as told,
        started([*cluster_command(), str(model)], clean_environment()),
    ):
        pass
    (line,) = str(told.value).strip().splitlines()
    assert line.startswith(f"the server did not start: tightrope: {model}: ")


@pytest.mark.slow
def test_all_its_processes_may_be_told_to_end_at_once():
    """As systemd does by itself."""
    with started(cluster_command("--replicas", "1"), clean_environment()) as running:
        whole = psutil.Process(running.process.pid)
        for process in [whole, *whole.children(recursive=True)]:
            with suppress(psutil.NoSuchProcess):
                process.terminate()
        assert running.process.wait(PATIENCE_S) == 0, running.error_log.read_text("utf-8")
