"""Compare the torch engine with `transformers serve` and plain `generate`: python -m bench.compare_hf MODEL_FOLDER

Each peer is up in float32 and in bfloat16 (`generate` with eager attention as well) and all are tried once, in turns;
only the fastest variant of each takes part in a scenario. Then they take turns with tightrope as in bench.compare.
Answers are greedy and run to their last token; prompts are new each time, so that no prompt cache helps.
"""

import argparse
import asyncio
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, replace
from functools import partial
from pathlib import Path

from bench import report
from bench.compare import compare, results_of, serving
from bench.peers import Peer, Setup, StartFailed, end_servers_when_told
from bench.peers_hf import OURS, VARIANTS, family
from bench.plot import Panel, draw
from bench.sse import RequestFailed
from bench.stats import Bar, Sample, judge, summarise
from bench.workloads import Scenario, Target, run_prompt, run_streams

_PROMPT_WORDS = 3680  # about 4,000 tokens of SmolLM2's vocabulary
_TRIAL_TOKENS = 32

# what decides between variants, and what is held to the bars; more is better
_METRICS = {"1 stream": "decode_tokens_per_s", "8 streams": "tokens_per_s", "4,000 tokens": "prompt_tokens_per_s"}
BARS = tuple(
    Bar(f"{scenario}, {what}", scenario, _METRICS[scenario], least, peer)
    for scenario, what, least in (
        ("1 stream", "decode speed", 2.0),
        ("8 streams", "total tokens/s", 2.0),
        ("4,000 tokens", "prefill speed", 1.0),
    )
    for peer in ("transformers serve", "generate")
)
PANELS = (
    Panel(
        "Throughput",
        "tokens per second over all streams, more is better",
        (("1 stream", "1 stream", "tokens_per_s"), ("8 streams", "8 streams", "tokens_per_s")),
    ),
    Panel(
        "A prompt of 4,000 tokens",
        "tokens of the prompt per second up to the first token of the answer, more is better",
        (("prefill", "4,000 tokens", "prompt_tokens_per_s"),),
    ),
)


def scenarios(stream_tokens: int) -> list[Scenario]:
    """What is measured, with answers of `stream_tokens` tokens."""
    return [
        Scenario("1 stream", partial(run_streams, num_streams=1, max_tokens=stream_tokens), rounds=5),
        Scenario("8 streams", partial(run_streams, num_streams=8, max_tokens=stream_tokens), rounds=5),
        Scenario("4,000 tokens", partial(run_prompt, num_words=_PROMPT_WORDS), rounds=3),
    ]


def winners(trials: Iterable[Sample]) -> dict[str, list[str]]:
    """The scenarios that each variant won, by its name: those where it was the fastest of its family."""
    best: dict[tuple[str, str], Sample] = {}
    for trial in trials:
        key, metric = (trial.scenario, family(trial.server)), _METRICS[trial.scenario]
        if key not in best or trial.metrics[metric] > best[key].metrics[metric]:
            best[key] = trial
    won: dict[str, list[str]] = {}
    for trial in best.values():
        won.setdefault(trial.server, []).append(trial.scenario)
    return won


def entrants(variants: Iterable[tuple[Peer, Target]], won: Mapping[str, list[str]]) -> list[tuple[Peer, Target]]:
    """The variants that won anything, each for what it won and under its family's name."""
    return [
        (replace(peer, only=frozenset(won[peer.name])), replace(target, name=family(peer.name)))
        for peer, target in variants
        if peer.name in won
    ]


async def _run(options: argparse.Namespace, setup: Setup) -> list[dict[str, object]]:
    verdicts: list[dict[str, object]] = []
    with serving((OURS, *VARIANTS), setup) as targets:
        ours, *variants = targets
        *_, trials = [s async for s in compare(variants, scenarios(_TRIAL_TOKENS), 1, options.lock, salt="trial")]
        targets = [ours, *entrants(variants, winners(trials))]
        async for samples in compare(targets, scenarios(options.tokens), options.rounds, options.lock):
            verdicts = keep(samples, trials, setup, options.name)
    return verdicts


def keep(samples: Sequence[Sample], trials: Sequence[Sample], setup: Setup, name: str) -> list[dict[str, object]]:
    """Write what was measured so far as JSON and picture, and return the verdicts on the bars."""
    verdicts, won = judge(samples, BARS), winners(trials)
    tried = [asdict(trial) for trial in trials]
    report.write(name, results_of(setup, samples, variants=won, bars=verdicts, trials=tried))
    caption = [
        f"{setup.model.name}, {setup.threads} threads, {setup.cache} cache; medians, whiskers span all rounds",
        *(f"{variant}: {' and '.join(scenarios)}" for variant, scenarios in won.items()),
    ]
    draw(summarise(samples), verdicts, "\n".join(caption), report.RESULTS / f"{name}.png", PANELS)
    return verdicts


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", type=Path, help="folder of a Hugging Face model in bf16")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--cache", choices=["f16", "q8"], default="q8", help="tightrope's storage of keys and values")
    parser.add_argument("--tokens", type=int, default=128, help="length of an answer")
    parser.add_argument("--rounds", type=int, help="how often each scenario runs; default: its own number")
    parser.add_argument("--lock", type=Path, help="lock file to hold while measuring")
    parser.add_argument("--name", default="compare_hf", help="results go to bench/results/NAME.json and NAME.png")
    options = parser.parse_args()
    end_servers_when_told()
    setup = Setup(options.model, threads=options.threads, cache=options.cache)
    try:
        verdicts = asyncio.run(_run(options, setup))
    except (StartFailed, RequestFailed) as error:
        raise SystemExit(str(error)) from None
    for verdict in verdicts:
        mark = "met   " if verdict["met"] else "MISSED"
        print(f"{mark} {verdict['name']}, over {verdict['over']}: {verdict['value']:.2f}, bar {verdict['bar']}")


if __name__ == "__main__":
    main()
