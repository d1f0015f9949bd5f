"""A real server over a model whose tokenizer gives up on some texts: each is an error of its own request."""

import json
from collections.abc import Iterator
from shutil import copytree

import httpx
import pytest
from checkout import DATA
from real_server import RunningServer, run_server

MODEL = DATA / "adapters" / "llama-bf16"
TOO_MUCH = "a" * 60 + "!"
GIVES_UP = {"type": "Split", "pattern": {"Regex": "(a+)+$"}, "behavior": "Isolated", "invert": False}


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[RunningServer]:
    folder = copytree(MODEL, tmp_path_factory.mktemp("models") / "model")
    path = folder / "tokenizer.json"
    whole = json.loads(path.read_text())
    path.write_text(json.dumps(whole | {"pre_tokenizer": {
        "type": "Sequence", "pretokenizers": [GIVES_UP, whole["pre_tokenizer"]]}}))  # fmt: skip
    with run_server(str(folder), environment={"RUST_BACKTRACE": "0"}) as running:
        yield running


def test_it_is_told_in_the_words_of_each_dialect_and_the_engine_stays(server: RunningServer) -> None:
    for path, body, status in (
        ("/v1/completions", {"prompt": TOO_MUCH, "max_tokens": 1}, 500),
        ("/v1/chat/completions", {"messages": [{"role": "user", "content": TOO_MUCH}], "max_tokens": 1}, 500),
        ("/tokenize", {"prompt": TOO_MUCH}, 500),
        ("/generate", {"inputs": TOO_MUCH, "parameters": {"max_new_tokens": 1}}, 424),
    ):
        reply = httpx.post(f"{server.url}{path}", json=body, timeout=60)
        assert (path, reply.status_code) == (path, status)
        assert "gives up on this text" in reply.text
        assert "Traceback" not in reply.text
    reply = httpx.post(f"{server.url}/v1/completions", json={"prompt": "aaa", "max_tokens": 1}, timeout=60)
    assert reply.status_code == 200
    assert "engine ended" not in server.errors()
    assert "Traceback" not in server.errors()


def test_a_text_of_more_bytes_than_the_window_holds_is_refused_with_the_least_that_it_has(
    server: RunningServer,
) -> None:
    body = {"prompt": "b" * 1_000_000, "max_tokens": 1}
    reply = httpx.post(f"{server.url}/v1/completions", json=body, timeout=60)
    assert reply.status_code == 400
    assert reply.json()["error"]["code"] == "context_length_exceeded"
    assert "requested at least 62501 tokens (at least 62500 in the prompt, 1 to generate)" in reply.text
    told = httpx.post(f"{server.url}/generate", json={"inputs": body["prompt"]}, timeout=60)
    assert (told.status_code, "Given: at least 62500" in told.text) == (422, True)
    cut = {"inputs": "a" * 60 + "!" + "b" * 1_000_000, "parameters": {"max_new_tokens": 1, "truncate": 8}}
    assert httpx.post(f"{server.url}/generate", json=cut, timeout=60).status_code == 200
