"""The engine is killed with -9 in the middle of answers of real models: each goes on as the very same text."""

import json
import os
import random
import signal
from collections.abc import Iterator
from typing import Any

import httpx
import pytest
from real_server import RunningServer, engine_pid, run_server

NUM_KILLS, NUM_TOKENS = 5, 24
PATIENCE_S = 120


@pytest.fixture(scope="module", params=["llama.cpp", "torch"])
def own_server(request: pytest.FixtureRequest) -> Iterator[RunningServer]:
    if request.param == "llama.cpp":
        with run_server("--gguf-engine=llama.cpp", "--max-model-len=512", "--max-num-seqs=2") as running:
            yield running
        return
    from hf_models import smollm2_bf16  # here, since torch and the GGUF reader take seconds to import

    with run_server(str(smollm2_bf16()), "--max-model-len=512", "--max-num-seqs=2") as running:
        yield running


def body(number: int) -> dict[str, Any]:
    """A request of its own, of which nothing is cached: every second one greedy, the others with a seed."""
    sampling = {"temperature": 1.0, "seed": number, "mirostat_mode": number % 4 // 2 * 2} if number % 2 else {}
    parameters = {"max_new_tokens": NUM_TOKENS, "ignore_eos": True, "cache_salt": str(number), **sampling}
    return {"inputs": f"Story {number}: once upon a time", "parameters": parameters}


def answer(server: RunningServer, number: int, kill_at: int | None = None) -> tuple[list[int], str]:
    """Token ids and the text of all events; the engine is killed when so many have come."""
    token_ids: list[int] = []
    texts: list[str] = []
    with httpx.stream("POST", f"{server.url}/generate_stream", json=body(number), timeout=PATIENCE_S) as response:
        for line in response.iter_lines():
            if line.startswith("data:"):
                event = json.loads(line.removeprefix("data:"))
                assert "token" in event, event
                token_ids.append(event["token"]["id"])
                texts.append(event["token"]["text"])
                assert event["index"] == len(token_ids)
                if len(token_ids) == kill_at:
                    os.kill(engine_pid(server.process.pid), signal.SIGKILL)
    assert event["generated_text"] == "".join(texts)
    return token_ids, "".join(texts)


def test_answers_go_on_as_the_text_that_they_would_have_been(own_server: RunningServer):
    undisturbed = [answer(own_server, number) for number in range(NUM_KILLS)]
    assert len({text for _, text in undisturbed}) == NUM_KILLS
    places = random.Random(0)

    for number, expected in enumerate(undisturbed):
        found = answer(own_server, number, kill_at=places.randrange(1, NUM_TOKENS // 2))
        assert found == expected

    assert own_server.errors().count("killed by SIGKILL") == NUM_KILLS
    metrics = httpx.get(f"{own_server.url}/metrics", timeout=60).text
    assert f"tightrope_engine_restarts_total {NUM_KILLS}.0" in metrics.splitlines()
