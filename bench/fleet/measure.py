"""What a replica's work takes, measured on real ones, and how much longer where they share a machine."""

import asyncio
import json
import random
import time
from collections.abc import Iterable, Sequence
from statistics import median
from typing import Any

import numpy as np

from bench import report
from bench.fleet.costs import Costs
from bench.fleet.real import PLAIN_TOKENS, ask

PROMPTS = (64, 256, 1024, 3000)  # tokens
BATCHES = ((1, 64), (4, 64), (8, 64), (1, 1500), (4, 500))  # answers at the same time, tokens before each
WRITTEN = 48
ROUNDS = 2
PACE_PROMPT, PACE_ROUNDS = 700, 3  # tokens
CROWD = 4  # Events are written and read on the same processors.


async def measure(urls: Sequence[str]) -> tuple[Costs, float, dict[str, Any]]:
    """Costs of a replica while the others rest, how many times as long all takes while they work, and the samples."""
    found = [await _one(url, f"costs {number}") for number, url in enumerate(urls)]
    prompts = [sample for samples, _ in found for sample in samples]
    steps = [sample for _, samples in found for sample in samples]
    overhead_s, token_s, pair_s = _fit([(1, n, n * n / 2) for n, _ in prompts], [seconds for _, seconds in prompts])
    step_s, stream_s, cached_s = _fit([(1, n, cached) for n, cached, _ in steps], [seconds for *_, seconds in steps])
    host_s, disk_s = restoring()
    costs = Costs(max(0.0, overhead_s - step_s), token_s, pair_s, step_s, stream_s, cached_s, host_s, disk_s)
    together = await _together(urls)
    return (
        costs,
        median(both / alone for alone, both in together),
        {"prompts": prompts, "steps": steps, "both": together},
    )


async def _together(urls: Sequence[str]) -> list[tuple[float, float]]:
    """Seconds of `CROWD` prompts with answers at a replica, alone and while all replicas have as many."""
    draw = random.Random("together")

    async def crowd(url: str) -> float:
        asked = [ask(url, draw.choices(PLAIN_TOKENS, k=500), WRITTEN) for _ in range(CROWD)]
        return round(max(done_s for _, done_s, *_ in await asyncio.gather(*asked)), 3)

    samples = []
    for _ in range(ROUNDS):
        alone = [await crowd(url) for url in urls]
        samples += list(zip(alone, await asyncio.gather(*map(crowd, urls)), strict=True))
    return samples


async def pace(urls: Sequence[str], costs: Costs) -> float:
    """How many times as long as by these costs a prompt with an answer takes now, at all replicas at once."""
    draw = random.Random(f"pace {time.monotonic_ns()}")  # never one that is cached
    expected_s = costs.overhead_s + costs.prefill_s(0, PACE_PROMPT)
    expected_s += sum(costs.decode_s(1, PACE_PROMPT + number) for number in range(WRITTEN))
    took = []
    for _ in range(PACE_ROUNDS):
        asked = [ask(url, draw.choices(PLAIN_TOKENS, k=PACE_PROMPT), WRITTEN) for url in urls]
        took += [done_s for _, done_s, *_ in await asyncio.gather(*asked)]
    return median(took) / expected_s


async def _one(url: str, salt: str) -> tuple[list[tuple[int, float]], list[tuple[int, int, float]]]:
    """Prompts' (tokens, seconds to the first token), and steps' (answers, cached tokens, seconds)."""
    draw = random.Random(salt)
    prompts, steps = [], []
    for _ in range(ROUNDS):
        for number in PROMPTS:
            seconds, *_ = await ask(url, draw.choices(PLAIN_TOKENS, k=number), 1)
            prompts.append((number, round(seconds, 4)))
        for batch, before in BATCHES:
            texts = [draw.choices(PLAIN_TOKENS, k=before) for _ in range(batch)]
            for text in texts:  # so that all begin to write at once
                await ask(url, text, 1)
            answers = await asyncio.gather(*(ask(url, text, WRITTEN) for text in texts))
            seconds = median((done_s - first_s) / (WRITTEN - 1) for first_s, done_s, *_ in answers)
            steps.append((batch, batch * (before + WRITTEN // 2), round(seconds, 5)))
    return prompts, steps


def _fit(rows: Iterable[Sequence[float]], seconds: Sequence[float]) -> list[float]:
    """Coefficients of at least 0 that come closest to the seconds, each weighed by its own size.

    Those that would come out below 0 are left out, the most negative first.
    """
    matrix = np.array(list(rows), dtype=float) / np.array(seconds)[:, None]
    kept = list(range(matrix.shape[1]))
    while True:
        found, *_ = np.linalg.lstsq(matrix[:, kept], np.ones(len(matrix)), rcond=None)
        if found.min() >= 0:
            break
        del kept[int(found.argmin())]
    whole = np.zeros(matrix.shape[1])
    whole[kept] = found
    return [float(value) for value in whole]


def restoring() -> tuple[float, float]:
    """Seconds of a token that comes back from the machine's memory, and from disk, of bench/results/sessions.json."""
    chats = json.loads((report.RESULTS / "sessions.json").read_text("utf-8"))["results"]["chats"]
    host, disk = [], []
    for chat in (chat for chat in chats if chat["gguf_engine"] != "llama.cpp"):
        stayed = next(row["ttft_s"] for row in chat["memory"] if "from the cache" in row["turn"])
        host += [(r["ttft_s"] - stayed) / r["cached_tokens"] for r in chat["memory"] if "through memory" in r["turn"]]
        back = chat["disk"]["after_kill"]
        disk.append((back["ttft_s"] - stayed) / back["cached_tokens"])
    return median(host), median(disk)
