"""The tables of docs/replicas.md, as the results have them."""

import re
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

from bench.fleet.routing import ROUTERS
from bench.fleet.runs import MOST_NEEDED
from bench.fleet.traces import CROWDS

Results = Mapping[str, Any]


def put(page: Path, results: Results) -> None:
    """Write all tables into the page, each behind the comment that names it, in the place of the one that is there."""
    text = page.read_text("utf-8")
    for name, rows in TABLES.items():
        table = "\n".join(rows(results))
        text = re.sub(rf"(<!-- fleet: {name} -->\n)(?:\|.*\n)*", rf"\g<1>{table}\n", text)
    page.write_text(text, "utf-8")


def _head(first: str) -> Iterator[str]:
    yield f"| {first} | {' | '.join(ROUTERS)} |"
    yield f"| --- |{' ---: |' * len(ROUTERS)}"


def _cells(rows: list[Mapping[str, Any]]) -> str:
    by_router = {row["router"]: row for row in rows}
    return " | ".join(_cell(by_router[router]) if router in by_router else "" for router in ROUTERS)


def _cell(row: Mapping[str, Any]) -> str:
    return f"{row['hit_rate']:.0%}, {_seconds(row['ttft_p50_s'])}, {_seconds(row['ttft_p99_s'])}"


def _seconds(value: float) -> str:
    return f"{value:.0f}" if value >= 10 else f"{value:.1f}" if value >= 1 else f"{value:.2f}"


def _rows(results: Results, table: str, crowd: str) -> list[Mapping[str, Any]]:
    return [row for row in results["runs"] if (row["table"], row["crowd"]) == (table, crowd)]


def _sizes(results: Results) -> Iterator[str]:
    yield from _head("clients, replicas")
    for crowd in CROWDS:
        rows = _rows(results, "sizes", crowd)
        sizes = sorted({row["replicas"] for row in rows})
        for number in dict.fromkeys((sizes[0], sizes[len(sizes) // 2], sizes[-1])):
            yield f"| {crowd}, {number:,} | {_cells([row for row in rows if row['replicas'] == number])} |"


def _failures(results: Results) -> Iterator[str]:
    yield from _head("clients, what happens")
    for crowd in CROWDS:
        for table in ("failures", "shared disk", "failures, shared disk", "late digests", "no ids"):
            if rows := _rows(results, table, crowd):
                yield f"| {crowd}, {table} | {_cells(rows)} |"


def _needed(results: Results) -> Iterator[str]:
    yield from _head("clients at the same time")
    for crowd in CROWDS:
        rows = {row["router"]: row for row in results["needed"] if row["crowd"] == crowd}
        cells = " | ".join(str(rows[router]["replicas"] or f"over {MOST_NEEDED}") for router in ROUTERS)
        yield f"| {crowd}, {rows[ROUTERS[0]]['places']} | {cells} |"


def _calibration(results: Results) -> Iterator[str]:
    yield "| clients, how sent | requests | found: real, simulated | mean | median | within the bar |"
    yield "| --- | ---: | ---: | ---: | ---: | --- |"
    for row in results["calibration"]:
        real, made = row["real"], row["simulated"]
        pairs = [f"{real['hit_rate']:.1%}, {made['hit_rate']:.1%}"]
        pairs += [f"{real[name]:.3f}, {made[name]:.3f}" for name in ("ttft_mean_s", "ttft_p50_s")]
        yield f"| {row['case']} | {real['requests']} | {' | '.join(pairs)} | {'yes' if row['met'] else 'no'} |"


TABLES: Mapping[str, Callable[[Results], Iterator[str]]] = {
    "sizes": _sizes,
    "failures": _failures,
    "needed": _needed,
    "calibration": _calibration,
}
