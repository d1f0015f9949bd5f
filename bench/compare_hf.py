"""Compare the torch engine with `transformers serve` and plain `generate`: python -m bench.compare_hf MODEL_FOLDER

Each peer is tried once in float32 and bfloat16 (`generate` with both kinds of attention as well), one process at a
time; the fastest variant of each takes part in a scenario. Then all are up and take turns, as in bench.compare.
Answers are greedy and run to their last token; prompts are new each time, so that no prompt cache helps.
"""

import argparse
import asyncio
from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path

from bench import report
from bench.compare import compare, takes_part
from bench.load import exclusive, measure
from bench.peers import Peer, Setup, StartFailed, end_servers_when_told, running
from bench.peers_hf import OURS, VARIANTS, Variant
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


@dataclass(frozen=True, slots=True)
class Trial:
    """What a variant reached, once, in a scenario's metric."""

    server: str
    variant: str
    scenario: str
    value: float


async def try_out(variant: Variant, setup: Setup, lock: Path | None) -> list[Trial]:
    """Start the variant alone and run each of its scenarios once, after an answer that warms it up."""
    found = []
    with running(variant.peer, setup) as target, exclusive(lock):
        await target.complete("Once upon a time", 16, seed=0)
        for scenario in scenarios(_TRIAL_TOKENS):
            if takes_part(variant.peer, scenario):
                metrics = (await measure(target, scenario, 0, "trial")).metrics
                value = metrics[_METRICS[scenario.name]]
                found.append(Trial(variant.peer.name, variant.label, scenario.name, value))
    return found


def winners(trials: Sequence[Trial]) -> dict[tuple[str, str], str]:
    """The fastest variant's label for each (scenario, server)."""
    best: dict[tuple[str, str], Trial] = {}
    for trial in trials:
        key = trial.scenario, trial.server
        if key not in best or trial.value > best[key].value:
            best[key] = trial
    return {key: trial.variant for key, trial in best.items()}


def chosen_peers(trials: Sequence[Trial]) -> list[Peer]:
    """The variants that won, each for the scenarios that it won."""
    labels = winners(trials)
    peers = []
    for variant in VARIANTS:
        won = frozenset(s for (s, server), label in labels.items() if (server, label) == _key(variant))
        if won:
            peers.append(replace(variant.peer, only=won))
    return peers


def _key(variant: Variant) -> tuple[str, str]:
    return variant.peer.name, variant.label


async def _run(options: argparse.Namespace, setup: Setup) -> list[dict[str, object]]:
    trials: list[Trial] = []
    for variant in VARIANTS:
        print(f"trying {variant.peer.name} in {variant.label}", flush=True)
        trials += await try_out(variant, setup, options.lock)
    for (scenario, server), label in winners(trials).items():
        print(f"{scenario}: {server} is fastest in {label}", flush=True)
    verdicts: list[dict[str, object]] = []
    with ExitStack() as stack:
        targets: list[tuple[Peer, Target]] = []
        for peer in (OURS, *chosen_peers(trials)):
            print(f"starting {peer.name}", flush=True)
            targets.append((peer, stack.enter_context(running(peer, setup))))
        async for samples in compare(targets, scenarios(options.tokens), options.rounds, options.lock):
            verdicts = keep(samples, trials, setup, options.name)
    return verdicts


def keep(samples: Sequence[Sample], trials: Sequence[Trial], setup: Setup, name: str) -> list[dict[str, object]]:
    """Write what was measured so far as JSON and picture, and return the verdicts on the bars."""
    summary, verdicts, chosen = summarise(samples), judge(samples, BARS), winners(trials)
    report.write(
        name,
        {
            "setup": {**asdict(setup), "model": setup.model.name},
            "variants": [
                {**asdict(trial), "is_chosen": chosen[trial.scenario, trial.server] == trial.variant}
                for trial in trials
            ],
            "bars": verdicts,
            "summary": summary,
            "rounds": [asdict(sample) for sample in samples],
        },
    )
    peers = "; ".join(
        f"{scenario}, {server}: {label}" for (scenario, server), label in sorted(chosen.items()) if scenario in summary
    )
    caption = f"{setup.model.name}, {setup.threads} threads, {setup.cache} cache; medians, whiskers span all rounds"
    draw(summary, verdicts, f"{caption}\n{peers}", report.RESULTS / f"{name}.png", PANELS)
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
