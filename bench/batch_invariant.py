"""What --batch-invariant costs a model of plain weights on a CPU: python -m bench.batch_invariant

SmolLM2 in bf16, served with the option and without it. Both servers are up at the same time and take turns. A ratio is
that of two speeds of one round: how many times as long the same takes with the option.
"""

import argparse
import asyncio
from contextlib import ExitStack
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import Any

from bench import report
from bench.compare import compare
from bench.peers import PEERS, Peer, Setup, StartFailed, end_servers_when_told, running
from bench.quant_models import BF16, write_models
from bench.sse import RequestFailed
from bench.stats import Sample, paired_ratios, spread, summarise
from bench.workloads import Scenario, Target, run_prompt, run_streams

WITHOUT = PEERS["tightrope"]
WITH = Peer("--batch-invariant", lambda setup, port: [*WITHOUT.arguments(setup, port), "--batch-invariant"])
SCENARIOS = (
    Scenario("1 stream", partial(run_streams, num_streams=1), rounds=5),
    Scenario("8 streams", partial(run_streams, num_streams=8, num_words=140), rounds=3),
    Scenario("prompt", partial(run_prompt, num_words=1920), rounds=3),
)
SPEEDS = {"1 stream": "decode_tokens_per_s", "8 streams": "tokens_per_s", "prompt": "prompt_tokens_per_s"}


async def measured(setup: Setup, rounds: int | None) -> list[Sample]:
    samples: list[Sample] = []
    with ExitStack() as stack:
        targets: list[tuple[Peer, Target]] = []
        for peer in (WITHOUT, WITH):
            print(f"starting {peer.name}", flush=True)
            targets.append((peer, stack.enter_context(running(peer, setup))))
        async for found in compare(targets, list(SCENARIOS), rounds, None):
            samples = found
    return samples


def costs(samples: list[Sample]) -> dict[str, dict[str, float]]:
    """By scenario, how many times as long it takes with the option."""
    ratios = {name: paired_ratios(samples, name, speed, WITHOUT.name, WITH.name) for name, speed in SPEEDS.items()}
    return {name: spread(values) for name, values in ratios.items()}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", nargs="?", type=Path, help="a folder; default: the bundled model in bf16")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--rounds", type=int, help="how often each scenario runs; default: its own number")
    options = parser.parse_args()
    end_servers_when_told()
    setup = Setup(options.model or write_models()[BF16], threads=options.threads, cache="q8")
    try:
        samples = asyncio.run(measured(setup, options.rounds))
    except (StartFailed, RequestFailed) as error:
        raise SystemExit(str(error)) from None
    found = costs(samples)
    print({name: round(cost["median"], 2) for name, cost in found.items()})
    results: dict[str, Any] = {
        "setup": {**asdict(setup), "model": setup.model.name},
        "times_as_long": found,
        "summary": summarise(samples),
        "rounds": [asdict(sample) for sample in samples],
    }
    print(report.write("batch_invariant", results))


if __name__ == "__main__":
    main()
