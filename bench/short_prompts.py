"""What a short prompt waits for behind a long one: python -m bench.short_prompts MODEL [MODEL ...]

For each model: first tokens of prompts of 20 tokens that come at random moments while one of 6,000 is read, and while
4,000 tokens are echoed with their log probabilities; each alone first. Prompts are of random token ids, new each time,
so that nothing of them is cached. Bars: the median first token within four times that of a prompt alone, or half a
second, whichever is more; for each of them the long prompt takes at most a tenth longer than alone, beyond what the
short one takes itself. Five come beside one long prompt, so what it loses to all of them is told as well.
"""

import argparse
import asyncio
import random
import statistics
from dataclasses import dataclass
from pathlib import Path

from tqdm import tqdm

from bench import report
from bench.peers import PEERS, Setup, end_servers_when_told, running
from bench.sse import Answer, stream
from bench.workloads import Target

SHORT, LONG, SCORED = 20, 6000, 4000  # tokens
LEAST_S, TIMES, LOSS = 0.5, 4.0, 0.10
EACH = 5  # short prompts beside one long one
IDS = range(100, 1000)  # of ordinary tokens in every vocabulary that is measured


@dataclass(frozen=True, slots=True)
class Beside:
    """Short prompts' times to their first token beside a long prompt, and what the long one took. Seconds."""

    ttft_s: list[float]
    long_s: float


async def ask(target: Target, rng: random.Random, size: int, **fields: object) -> Answer:
    body = {"prompt": rng.choices(IDS, k=size), "max_tokens": 8, "temperature": 0, "ignore_eos": True, **fields}
    return await stream(target.base_url, "/v1/completions", body)


async def beside(target: Target, rng: random.Random, alone_s: float, size: int, **fields: object) -> Beside:
    """EACH short prompts at random moments of a long one, each within its own part of the time that it takes alone."""
    long = asyncio.create_task(ask(target, rng, size, **fields))
    waits_s = [(place + rng.random()) * 0.9 * alone_s / EACH for place in range(EACH)]

    async def short(wait_s: float) -> float:
        await asyncio.sleep(wait_s)
        return (await ask(target, rng, SHORT)).ttft_s

    ttft_s = await asyncio.gather(*map(short, waits_s))
    return Beside(list(ttft_s), (await long).ttft_s)


async def measure(target: Target, rounds: int, progress: tqdm) -> dict[str, object]:
    rng = random.Random(rounds)
    for _ in range(3):  # the first steps teach what a token costs
        await ask(target, rng, 1000)
    lone_s = statistics.median([(await ask(target, rng, SHORT)).ttft_s for _ in range(20)])
    bar_s = max(TIMES * lone_s, LEAST_S)
    found: dict[str, object] = {"short_alone_s": lone_s, "bar_s": bar_s}
    for name, size, fields in (("prefill", LONG, {}), ("echo", SCORED, {"echo": True, "logprobs": 5})):
        alone_s = statistics.median([(await ask(target, rng, size, **fields)).ttft_s for _ in range(3)])
        runs = []
        for _ in range(rounds):
            runs.append(await beside(target, rng, alone_s, size, **fields))
            progress.update()
        ttft_s = [s for run in runs for s in run.ttft_s]
        long_s = statistics.median(run.long_s for run in runs)
        loss = (long_s - EACH * lone_s) / alone_s - 1
        found[name] = {
            "tokens": size,
            "long_alone_s": alone_s,
            "long_s": long_s,
            "long_loss": loss,
            "long_loss_to_each": loss / EACH,
            "loss_is_met": loss / EACH <= LOSS,
            "ttft_s": {
                "median": statistics.median(ttft_s),
                "p90": statistics.quantiles(ttft_s, n=10)[-1],
                "max": max(ttft_s),
            },
            "arrivals": len(ttft_s),
            "ttft_is_met": statistics.median(ttft_s) <= bar_s,
        }
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("models", type=Path, nargs="+", help="GGUF files or folders")
    parser.add_argument("--rounds", type=int, default=10, help="long prompts of each kind, with five short ones each")
    parser.add_argument("--write", metavar="NAME", help="keep the results as bench/results/NAME.json")
    options = parser.parse_args()
    end_servers_when_told()
    results: dict[str, object] = {}
    with tqdm(total=2 * options.rounds * len(options.models), unit="prompt") as progress:
        for model in options.models:
            with running(PEERS["tightrope"], Setup(model, slots=8)) as target:
                results[model.name] = found = asyncio.run(measure(target, options.rounds, progress))
            tqdm.write(f"{model.name}: {found}")
    if options.write:
        print(report.write(options.write, {"models": results}))


if __name__ == "__main__":
    main()
