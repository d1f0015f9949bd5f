"""`tightrope cluster` that Ray scales, with a made-up model: replicas come with the load and go without it."""

import asyncio
import re
import sys
from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager

import httpx
import pytest
from engine_clients import expected
from real_server import RunningServer, clean_environment, started

from bench.peers import finding_ours

pytestmark = pytest.mark.slow

PATIENCE_S = 150.0
NO_LIMITS = httpx.Limits(max_connections=None)
LONG = 2500  # Tokens; they take 50 s, in which the load is seen to have gone, and a replica is told to end.
OPTIONS = ("--replicas", "1", "--max-replicas", "2", "--scale-up-seconds", "0", "--scale-down-seconds", "0")
# A replica tells of its load so often; of the mean that counts, its last half minute, nothing can be set.
INTERVAL = {"RAY_SERVE_REPLICA_AUTOSCALING_METRIC_PUSH_INTERVAL_S": "1"}


def cluster(places: int) -> AbstractContextManager[RunningServer]:
    """Of one replica, or two, each of which writes so many answers at a time."""
    command = [sys.executable, "-m", "bench.fake_model", "cluster", "--port", "0", *OPTIONS]
    command += ["--max-num-seqs", str(places)]
    return started(command, clean_environment() | finding_ours() | INTERVAL)


class Asker:
    """Asks one thing after another on several connections, and keeps what came of each."""

    def __init__(self, client: httpx.AsyncClient) -> None:
        self._client = client
        self.texts: dict[str, str] = {}

    async def ask(self, prompt: str, max_tokens: int) -> str:
        """An answer, whole."""
        body = {"prompt": prompt, "max_tokens": max_tokens, "temperature": 0, "ignore_eos": True}
        reply = await self._client.post("/v1/completions", json=body)
        assert (reply.status_code, reply.json()["usage"]["completion_tokens"]) == (200, max_tokens)
        text: str = reply.json()["choices"][0]["text"]
        return text

    async def keep_asking(self, name: str, until: asyncio.Event, padding: str, max_tokens: int) -> None:
        number = 0
        while not until.is_set():
            prompt = f"Asked by {name} for the {number}. time. {padding}"
            self.texts[prompt] = await self.ask(prompt, max_tokens)
            number += 1

    async def of_replicas(self, name: str) -> Mapping[str, float]:
        """What /metrics tells of each replica."""
        text = (await self._client.get("/metrics")).text
        found = re.findall(rf'^tightrope_replica_{name}{{replica="([^"]+)"}} (\S+)$', text, re.MULTILINE)
        return {replica: float(value) for replica, value in found}

    async def until(self, name: str, holds: Callable[[Mapping[str, float]], bool]) -> None:
        async with asyncio.timeout(PATIENCE_S):
            while not holds(await self.of_replicas(name)):
                await asyncio.sleep(0.2)


@pytest.mark.parametrize(
    ("places", "clients", "padding", "max_tokens"),
    [(4, 12, "", 100), (24, 23, "A long prompt. " * 250, 1)],
    ids=["by requests that wait", "by tokens that wait"],
)
async def test_a_second_replica_comes_with_the_load_and_goes_without_it_and_no_answer_is_lost(
    places: int, clients: int, padding: str, max_tokens: int
):
    with cluster(places) as running:
        async with httpx.AsyncClient(base_url=running.url, timeout=PATIENCE_S, limits=NO_LIMITS) as client:
            asker, is_enough = Asker(client), asyncio.Event()
            load = [
                asyncio.create_task(asker.keep_asking(str(number), is_enough, padding, max_tokens))
                for number in range(clients)
            ]
            await asker.until("finished_total", lambda finished: len(finished) == 2 and min(finished.values()) > 0)
            is_enough.set()
            await asyncio.gather(*load)
            long = [asyncio.create_task(asker.ask(f"A long one, {number}", LONG)) for number in range(2)]
            await asker.until("running", lambda running: sorted(running.values()) == [1, 1])
            await asker.until("up", lambda up: len(up) == 1)
            for number, task in enumerate(long):
                assert await task == expected(f"A long one, {number}", LONG), "one was where a replica went"
            assert [prompt for prompt, text in asker.texts.items() if text != expected(prompt, max_tokens)] == []
