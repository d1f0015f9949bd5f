"""A model in two ranks behind a real server: the text of one rank, and no rank outlives the others."""

import json
import os
import signal
import time
from collections.abc import Callable, Iterator
from typing import Any

import httpx
import psutil
import pytest
from checkout import DATA
from real_server import RunningServer, engine_pid, run_server

TINY = DATA / "adapters" / "llama-bf16"
RANK = "tightrope.backends.hf.ranks.child"
NUM_TOKENS, PATIENCE_S = 200, 120
OPTIONS = (str(TINY), "--device=cpu", "--max-model-len=512", "--max-num-seqs=2", "--threads=2")


@pytest.fixture(scope="module")
def of_ranks() -> Iterator[RunningServer]:
    with run_server(*OPTIONS, "--tensor-parallel=2") as running:
        yield running


@pytest.fixture(scope="module")
def of_one() -> Iterator[RunningServer]:
    with run_server(*OPTIONS) as running:
        yield running


def body(number: int) -> dict[str, Any]:
    """A request of its own: every second one greedy, the others with a seed."""
    sampling = {"temperature": 1.0, "seed": number} if number % 2 else {}
    parameters = {"max_new_tokens": NUM_TOKENS, "ignore_eos": True, "cache_salt": str(number), **sampling}
    return {"inputs": f"Story {number}: once upon a time", "parameters": parameters}


def answer(server: RunningServer, number: int, at: int = 0, do: Callable[[], object] = lambda: None) -> list[int]:
    """The tokens of a stream, in the middle of which something is done."""
    token_ids: list[int] = []
    with httpx.stream("POST", f"{server.url}/generate_stream", json=body(number), timeout=PATIENCE_S) as response:
        for line in response.iter_lines():
            if line.startswith("data:"):
                event = json.loads(line.removeprefix("data:"))
                assert "token" in event, event
                token_ids.append(event["token"]["id"])
                if len(token_ids) == at:
                    do()
    return token_ids


def wait_until_healthy(server: RunningServer) -> None:
    deadline = time.monotonic() + PATIENCE_S
    while httpx.get(f"{server.url}/health", timeout=60).status_code != 200:
        assert time.monotonic() < deadline, "no engine came back"


def rank_pid(server: RunningServer) -> int:
    return engine_pid(engine_pid(server.process.pid), RANK)


def kill_rank(server: RunningServer) -> None:
    os.kill(rank_pid(server), signal.SIGKILL)


def test_answers_of_two_ranks_are_those_of_one(of_ranks: RunningServer, of_one: RunningServer):
    assert "devices: 2 ranks of the model on this CPU, as asked" in of_ranks.output
    for number in range(4):
        found = answer(of_ranks, number)

        assert len(found) == NUM_TOKENS
        assert found == answer(of_one, number)


def test_a_rank_that_is_killed_in_mid_answer_changes_no_token_of_it(of_ranks: RunningServer, of_one: RunningServer):
    before = of_ranks.errors().count("rank 1 of 2 was killed by SIGKILL")
    for number, at in ((10, 3), (11, 9)):
        found = answer(of_ranks, number, at, lambda: kill_rank(of_ranks))

        assert found == answer(of_one, number)

    assert of_ranks.errors().count("rank 1 of 2 was killed by SIGKILL") - before == 2


def test_a_rank_that_ends_while_nothing_is_asked_ends_the_engine_which_is_brought_back(of_ranks: RunningServer):
    engine = psutil.Process(engine_pid(of_ranks.process.pid))

    kill_rank(of_ranks)

    engine.wait(PATIENCE_S)
    wait_until_healthy(of_ranks)
    assert len(answer(of_ranks, 20)) == NUM_TOKENS


def test_an_engine_that_is_killed_takes_its_ranks_along_even_one_that_stands_still(of_ranks: RunningServer):
    ranks = [psutil.Process(rank_pid(of_ranks))]
    ranks[0].suspend()

    os.kill(engine_pid(of_ranks.process.pid), signal.SIGKILL)

    _, left = psutil.wait_procs(ranks, PATIENCE_S)
    assert left == []
    wait_until_healthy(of_ranks)
    assert len(answer(of_ranks, 30)) == NUM_TOKENS


@pytest.mark.slow
def test_a_rank_that_stands_still_in_mid_answer_ends_the_engine_and_the_answer_goes_on(of_one: RunningServer):
    with run_server(*OPTIONS, "--tensor-parallel=2", "--stuck-after=8") as server:
        found = answer(server, 40, 5, lambda: psutil.Process(rank_pid(server)).suspend())

        assert found == answer(of_one, 40)
        assert "engine is stuck" in server.errors()
