"""What --batch-invariant costs a model of plain weights on a CPU: python -m bench.batch_invariant

SmolLM2 in bf16, served with the option and without it. Both servers are up at the same time and take turns. A ratio is
that of two speeds of one round: how many times as long the same takes with the option.
"""

import argparse
import asyncio
from functools import partial
from pathlib import Path

from bench import report
from bench.compare import compared, results_of
from bench.peers import PEERS, Peer, Setup, StartFailed, end_servers_when_told
from bench.quant_models import BF16, write_models
from bench.sse import RequestFailed
from bench.stats import Sample, paired_ratios, spread
from bench.workloads import Scenario, run_prompt, run_streams

WITHOUT = PEERS["tightrope"]
WITH = Peer("--batch-invariant", lambda setup, port: [*WITHOUT.arguments(setup, port), "--batch-invariant"])
SCENARIOS = (
    Scenario("1 stream", partial(run_streams, num_streams=1), rounds=5),
    Scenario("8 streams", partial(run_streams, num_streams=8, num_words=140), rounds=3),
    Scenario("prompt", partial(run_prompt, num_words=1920), rounds=3),
)
SPEEDS = {"1 stream": "decode_tokens_per_s", "8 streams": "tokens_per_s", "prompt": "prompt_tokens_per_s"}


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
        samples = asyncio.run(compared((WITHOUT, WITH), setup, SCENARIOS, options.rounds))
    except (StartFailed, RequestFailed) as error:
        raise SystemExit(str(error)) from None
    found = costs(samples)
    print({name: round(cost["median"], 2) for name, cost in found.items()})
    print(report.write("batch_invariant", results_of(setup, samples, times_as_long=found)))


if __name__ == "__main__":
    main()
