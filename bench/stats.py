"""Medians with their range, and ratios taken pair by pair: what the results say of repeated measurements."""

from collections import defaultdict
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from statistics import median


@dataclass(frozen=True, slots=True)
class Sample:
    """One scenario run once against one server."""

    server: str
    scenario: str
    round: int
    metrics: dict[str, float]


def spread(values: Sequence[float]) -> dict[str, float]:
    """Median, smallest and largest of at least one value."""
    return {"median": median(values), "min": min(values), "max": max(values)}


def summarise(samples: Iterable[Sample]) -> dict[str, dict[str, dict[str, dict[str, float]]]]:
    """Spread of every metric over the rounds: {scenario: {server: {metric: {median, min, max}}}}."""
    values: dict[tuple[str, str, str], list[float]] = defaultdict(list)
    for sample in samples:
        for metric, value in sample.metrics.items():
            values[sample.scenario, sample.server, metric].append(value)
    summary: dict[str, dict[str, dict[str, dict[str, float]]]] = {}
    for (scenario, server, metric), found in values.items():
        summary.setdefault(scenario, {}).setdefault(server, {})[metric] = spread(found)
    return summary


def paired_ratios(samples: Iterable[Sample], scenario: str, metric: str, ours: str, theirs: str) -> list[float]:
    """`metric` of `ours` over that of `theirs`, for each round that has both.

    The two of a round ran one after the other, so a machine that slows down over minutes changes both alike.
    """
    by_round: dict[int, dict[str, float]] = defaultdict(dict)
    for sample in samples:
        if sample.scenario == scenario and metric in sample.metrics:
            by_round[sample.round][sample.server] = sample.metrics[metric]
    return [found[ours] / found[theirs] for _, found in sorted(by_round.items()) if ours in found and theirs in found]


@dataclass(frozen=True, slots=True)
class Bar:
    """What a metric must reach: its ratio to that of the server `over`, or its own value where `over` is None."""

    name: str
    scenario: str
    metric: str
    least: float
    over: str | None = None


BARS = (
    Bar("single stream, decode speed", "1 stream", "decode_tokens_per_s", 0.95, "llama.cpp server"),
    Bar("8 streams, total tokens/s", "8 streams", "tokens_per_s", 1.0, "llama.cpp server"),
    Bar("second turn of a long chat, times sooner", "growing chat", "speedup", 10.0),
)


def judge(samples: Sequence[Sample], bars: Iterable[Bar], ours: str = "tightrope") -> list[dict[str, object]]:
    """For each bar that was measured: its value (the median), the range over the rounds, and whether it is met."""
    verdicts: list[dict[str, object]] = []
    for bar in bars:
        if bar.over is not None:
            values = paired_ratios(samples, bar.scenario, bar.metric, ours, bar.over)
        else:
            values = [s.metrics[bar.metric] for s in samples if s.scenario == bar.scenario and s.server == ours]
        if values:
            found = spread(values)
            verdicts.append(
                {
                    "name": bar.name,
                    "over": bar.over,
                    "bar": bar.least,
                    "value": found["median"],
                    "min": found["min"],
                    "max": found["max"],
                    "met": found["median"] >= bar.least,
                }
            )
    return verdicts
