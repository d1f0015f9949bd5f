"""`--gguf-engine`: the bundled GGUF file served by the torch engine, and what `plan` says of it."""

import json

import httpx
import pytest
from real_server import run_server

from tightrope.server.cli.main import main

ENGINES = {
    "own": "engine: the torch engine runs this GGUF file, as --gguf-engine own asks for",
    "llama.cpp": "engine: llama.cpp runs this GGUF file, as --gguf-engine llama.cpp asks for",
    "auto": "engine: the torch engine runs this GGUF file, as it knows the architecture and all tensor types, and the "
    "device is a CPU",
}


@pytest.mark.parametrize("engine", ENGINES)
def test_plan_says_in_one_line_which_engine_runs_a_file_and_why(engine: str, capsys: pytest.CaptureFixture[str]):
    assert main(["plan", f"--gguf-engine={engine}", "--json"]) == 0

    found = json.loads(capsys.readouterr().out)
    assert [note for note in found["serve_notes"] if note.startswith("engine:")] == [ENGINES[engine]]
    assert (found["serve_cache"] == "q8") == (engine != "llama.cpp")  # llama.cpp's f16 is the fastest there


def test_the_bundled_file_answers_a_chat_in_the_torch_engine():
    chat = {"messages": [{"role": "user", "content": "What is the capital of France?"}], "max_tokens": 24}
    with run_server("--max-model-len=1024") as running, httpx.Client(timeout=60) as client:
        assert ENGINES["auto"] in running.output
        assert "weights: GGUF, 5.7" in running.output
        answer = client.post(f"{running.url}/v1/chat/completions", json={**chat, "temperature": 0}).json()

    assert "Paris" in answer["choices"][0]["message"]["content"]


def test_an_engine_that_is_not_known_is_refused(capsys: pytest.CaptureFixture[str]):
    assert main(["plan", "--gguf-engine=vllm"]) == 2

    assert "--gguf-engine" in capsys.readouterr().err
