"""The runs that are told in docs/replicas.md: sizes of fleets, failures, disks, and how many replicas are needed."""

from collections.abc import Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import replace
from functools import partial
from typing import Any

from tqdm import tqdm

from bench.fleet.costs import Costs, Shape
from bench.fleet.plan import Plan
from bench.fleet.routing import ROUTERS
from bench.fleet.simulate import simulate
from bench.fleet.traces import CROWDS

SIZES = (2, 8, 32, 128, 1000)
SHAPE = Shape()
DIES_EVERY_S, DOWN_S = 1200.0, 60.0
LATE_S = 30.0
TARGET_S = 10.0  # 99 of 100 first tokens are to come within this time,
NEEDED_PLACES = {"role-play": 96, "agents": 24, "leaderboards": 16}  # of so many clients at the same time
MOST_NEEDED = 128


def plan_of(crowd: str, router: str, number: int) -> Plan:
    """One that is counted for twice as long as the crowd takes to settle; for as long in the largest fleets."""
    settles_s = CROWDS[crowd].settles_s
    return Plan(crowd, router, number, settles_s * (3 if number <= 200 else 2), settles_s)


def plans(most: int) -> Iterator[tuple[str, Plan]]:
    """All runs, each with the name of its table; the largest fleets first, so that none is waited for at the end."""
    for number in sorted((size for size in SIZES if size <= most), reverse=True):
        yield from (("sizes", plan_of(crowd, router, number)) for crowd in CROWDS for router in ROUTERS)
    for crowd in CROWDS:
        for router in ROUTERS:
            plan = plan_of(crowd, router, min(most, 32))
            yield "failures", replace(plan, mtbf_s=DIES_EVERY_S, down_s=DOWN_S)
            yield "shared disk", replace(plan, disk="shared")
            yield "failures, shared disk", replace(plan, disk="shared", mtbf_s=DIES_EVERY_S, down_s=DOWN_S)
        digest = plan_of(crowd, "exact digest", min(most, 32))
        yield "late digests", replace(digest, lag_s=LATE_S)
        if CROWDS[crowd].has_sessions:
            yield "no ids", replace(digest, sends_ids=False)


def runs(costs: Costs, most: int, jobs: int) -> list[dict[str, Any]]:
    """A row for each plan, in their order; jobs: so many are run at the same time."""
    todo = list(plans(most))
    rows = []
    total = sum(plan.replicas * plan.seconds for _, plan in todo)
    with (
        tqdm(total=round(total), unit=" replica-seconds", unit_scale=True, desc="runs", disable=None) as bar,
        ProcessPoolExecutor(jobs) as pool,
    ):
        for (table, plan), row in zip(todo, pool.map(partial(_run, costs), [plan for _, plan in todo]), strict=True):
            rows.append({"table": table, **row})
            bar.update(plan.replicas * plan.seconds)
    return rows


def _run(costs: Costs, plan: Plan) -> dict[str, Any]:
    return simulate(plan, costs, SHAPE)


def needed(costs: Costs, jobs: int) -> list[dict[str, Any]]:
    """The fewest replicas with which a crowd's first tokens come in time; 0 where MOST_NEEDED are not enough."""
    cases: Sequence[tuple[str, str]] = [(crowd, router) for crowd in CROWDS for router in ROUTERS]
    with ProcessPoolExecutor(jobs) as pool:
        found = pool.map(partial(_needed, costs), cases)
        return list(tqdm(found, total=len(cases), desc="needed", disable=None))


def _needed(costs: Costs, case: tuple[str, str]) -> dict[str, Any]:
    crowd, router = case

    def is_enough(number: int) -> bool:
        plan = replace(plan_of(crowd, router, number), places=NEEDED_PLACES[crowd])
        return float(simulate(plan, costs, SHAPE)["ttft_p99_s"]) <= TARGET_S

    low, high = 1, 1
    while high <= MOST_NEEDED and not is_enough(high):
        low, high = high + 1, 2 * high
    found = high if high <= MOST_NEEDED else 0
    while found and low < found:
        middle = (low + found) // 2
        low, found = (low, middle) if is_enough(middle) else (middle + 1, found)
    return {"crowd": crowd, "router": router, "places": NEEDED_PLACES[crowd], "replicas": found}
