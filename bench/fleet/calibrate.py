"""The simulation held to two real replicas: the same clients, the same ways to send, the same seed."""

import asyncio
import tempfile
from collections.abc import Collection, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager
from dataclasses import asdict, replace
from pathlib import Path
from statistics import mean, median
from typing import Any

import numpy as np

from bench.compare import bundled_model
from bench.fleet.costs import Costs, Shape
from bench.fleet.measure import measure, pace
from bench.fleet.plan import Plan
from bench.fleet.real import clustered, play, servers
from bench.fleet.simulate import simulate
from bench.fleet.traces import Scale

WITHIN = 0.15  # the bar: so far from the real value may the simulated one be, as a share of it, for each of HELD
HELD = ("hit_rate", "ttft_mean_s", "ttft_p50_s")
SHAPE = Shape(cache_tokens=16 * 1024, host_tokens=0)
SCALE = Scale(window=1400, lengths=0.33, pauses=0.25)  # so that a few minutes have hundreds of requests
WINDOW = 4096
NEARLY, RUNS = 0.01, 9  # costs that differ by so much at most, in so many simulations
DIGEST_LAG_S = 0.1  # a replica tells with its next step
CASES: Mapping[str, Plan] = {
    f"{crowd}, {router}": Plan(crowd, router, 2, 150.0, 30.0, places=places, lag_s=DIGEST_LAG_S, scale=SCALE)
    for crowd, places in (("role-play", 8), ("agents", 3), ("leaderboards", 2))
    for router in ("random", "session", "exact digest")
    if (crowd, router) != ("leaderboards", "session")  # They have none.
}


@contextmanager
def _pair() -> Iterator[list[str]]:
    """Two real servers with empty caches."""
    with tempfile.TemporaryDirectory() as folder, servers(bundled_model(), Path(folder), 2, SHAPE, WINDOW) as urls:
        yield urls


def _replicas(router: str) -> AbstractContextManager[list[str]]:
    """Two real replicas for requests that are sent so: only our own front hears what each holds."""
    return clustered(bundled_model(), 2, SHAPE, WINDOW) if router == "exact digest" else _pair()


def measured_costs() -> dict[str, Any]:
    with _pair() as urls:
        costs, together, samples = asyncio.run(measure(urls))
    found = {"model": bundled_model().name, "threads": 1, **asdict(costs)}
    return {**found, "together": round(together, 3), "samples": samples}


def _typical(plan: Plan, costs: Costs, metrics: Collection[str]) -> dict[str, float]:
    """Each metric's median over runs whose costs differ by so little that only who comes first does.

    Who waits asks later: clients and replicas make a loop in which one place in a queue changes all that follows.
    """
    scales = np.linspace(1 - NEARLY, 1 + NEARLY, RUNS)
    runs = [simulate(plan, costs.times(float(scale)), SHAPE) for scale in scales]
    return {metric: median(run[metric] for run in runs) for metric in metrics}


def calibrated(costs: Costs, together: float, names: Collection[str], seconds: float) -> Iterator[dict[str, Any]]:
    """A row for each of these cases: what real servers did, what the simulation says, and how far they are apart.

    A machine may be slower or faster than while its costs were measured, and a front takes its share: costs are scaled
    by what a few requests take just before and behind (`pace`). together: how many times as long work takes while both
    are at it, as they share a machine.
    """
    for name in names:
        plan = replace(CASES[name], seconds=seconds, warm_s=seconds / 5, together=together)
        with _replicas(plan.router) as urls:
            targets = urls if len(urls) == plan.replicas else urls * plan.replicas  # One address spreads them itself.
            before = asyncio.run(pace(targets, costs)) / together
            real = asyncio.run(play(plan, urls, SHAPE)).summary()
            now = mean((before, asyncio.run(pace(targets, costs)) / together))
        simulated = _typical(plan, costs.times(now), real)
        apart = {held: round(simulated[held] / real[held] - 1, 4) if real[held] else 0.0 for held in HELD}
        yield {
            "case": name,
            "seconds": seconds,
            "pace": round(now, 3),
            "real": real,
            "simulated": simulated,
            "apart": apart,
            "met": all(abs(value) <= WITHIN for value in apart.values()),
        }
