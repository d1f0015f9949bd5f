"""A file through llama.cpp beside llama.cpp's own server: python -m bench.driving [MODEL.gguf]

What our loop, sampler and streams cost or save where both compute with the same library: one stream, eight with prompts
of 180 tokens, and the second turn of a long chat. Both servers are up all the time and take turns. Two minutes with the
bundled model.
"""

import argparse
import asyncio
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path

from bench import report
from bench.compare import bundled_model, compared, results_of
from bench.peers import PEERS, Setup, StartFailed, end_servers_when_told
from bench.sse import RequestFailed
from bench.stats import Sample, spread
from bench.workloads import Scenario, run_chat, run_streams

OURS, THEIRS = "tightrope through llama.cpp", "llama.cpp server"
SHORT_GAP_MS = 300.0  # Nobody minds a shorter pause.

SCENARIOS = [
    Scenario("1 stream", partial(run_streams, num_streams=1), rounds=5),
    Scenario("8 streams", partial(run_streams, num_streams=8, num_words=140), rounds=4),
    Scenario("growing chat", run_chat, rounds=3),
    Scenario("growing chat, seeded", partial(run_chat, is_seeded=True), rounds=1),
]


def _ratio(ours: float, theirs: float) -> float:
    return ours / theirs


def _gap(ours: float, theirs: float) -> float:
    return ours / max(SHORT_GAP_MS, theirs)


@dataclass(frozen=True, slots=True)
class Bar:
    """What our metric, against theirs of the same round, must be at least, or at most."""

    name: str
    scenario: str
    metric: str
    bar: float
    is_least: bool
    value: Callable[[float, float], float] = _ratio


BARS = (
    Bar("one stream, decode speed", "1 stream", "decode_tokens_per_s", 1.0, is_least=True),
    Bar("eight streams, total tokens/s", "8 streams", "tokens_per_s", 1.0, is_least=True),
    Bar("eight streams, largest gap, of 300 ms or theirs", "8 streams", "largest_gap_ms", 1.0, False, _gap),
    Bar("second turn of a long chat, time", "growing chat", "second_ttft_ms", 0.8, is_least=False),
    Bar("the same with a seed", "growing chat, seeded", "second_ttft_ms", 0.8, is_least=False),
)


def verdicts(samples: Sequence[Sample]) -> Iterator[dict[str, object]]:
    """For each bar that was measured its value, the median over the rounds, with the range, and whether it is met."""
    for bar in BARS:
        found = {(sample.server, sample.round): sample.metrics for sample in samples if sample.scenario == bar.scenario}
        rounds = [number for server, number in found if server == OURS and (THEIRS, number) in found]
        if rounds:
            values = spread(
                [bar.value(found[OURS, n][bar.metric], found[THEIRS, n][bar.metric]) for n in sorted(rounds)]
            )
            met = values["median"] >= bar.bar if bar.is_least else values["median"] <= bar.bar
            kind = "at_least" if bar.is_least else "at_most"
            yield {"name": bar.name, kind: bar.bar, "value": values.pop("median"), **values, "met": met}


async def _run(options: argparse.Namespace, setup: Setup) -> list[dict[str, object]]:
    scenarios = [one for one in SCENARIOS if options.scenario in (None, one.name)]
    samples = await compared((PEERS[OURS], PEERS[THEIRS]), setup, scenarios, options.rounds, timeout_s=600)
    bars = list(verdicts(samples))
    if options.scenario is None:
        print(report.write("driving", results_of(setup, samples, bars=bars)))
    return bars


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", nargs="?", type=Path, help="path of a .gguf file; default: the bundled model")
    parser.add_argument(
        "--scenario", choices=[one.name for one in SCENARIOS], help="only this; nothing is written then"
    )
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--rounds", type=int, help="how often each scenario runs; default: its own number")
    options = parser.parse_args()
    end_servers_when_told()
    setup = Setup(options.model or bundled_model(), threads=options.threads)
    try:
        bars = asyncio.run(_run(options, setup))
    except (StartFailed, RequestFailed) as error:
        raise SystemExit(str(error)) from None
    for bar in bars:
        limit = f"at least {bar['at_least']}" if "at_least" in bar else f"at most {bar['at_most']}"
        print(f"{'met   ' if bar['met'] else 'MISSED'} {bar['name']}: {bar['value']:.3f}, {limit}")


if __name__ == "__main__":
    main()
