"""What a running server holds while it is used: memory, descriptors and threads of its front and its engine.

Memory is the anonymous part of what is resident (RssAnon of /proc): pages of a mapped model file come and go with the
kernel's page cache, and say nothing of a leak.
"""

import asyncio
import time
from collections.abc import AsyncIterator, Callable, Mapping, Sequence
from contextlib import asynccontextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from statistics import fmean, median
from typing import Any

import psutil

from bench.meter import process_tree

ENGINE = "tightrope.engine.process.child"  # in the command line of the engine's process
FORKED = "forked-engine"  # the name of one that bench/forked_engines.py has started
LEAST_READINGS = 9  # three for each third
LEAST_REQUESTS = 100  # between the thirds: memory comes in pages and pools, and of a few requests says nothing


@dataclass(frozen=True, slots=True)
class ProcessUse:
    """What one process holds."""

    pid: int
    mib: float
    descriptors: int
    threads: int


@dataclass(frozen=True, slots=True)
class Reading:
    """The server at one moment; `engine` is None while there is none."""

    at_s: float
    requests: int  # answered by then
    front: ProcessUse
    engine: ProcessUse | None
    others_mib: float  # of the front's other children


def engine_process(front: int) -> psutil.Process | None:
    """The child of the front that runs the engine, None while there is none."""
    return _engine_among(process_tree(front)[1:])


def _engine_among(children: Sequence[psutil.Process]) -> psutil.Process | None:
    for process in children:
        with suppress(psutil.NoSuchProcess):
            if ENGINE in " ".join(process.cmdline()) or process.name() == FORKED:
                return process
    return None


def held(pid: int) -> ProcessUse | None:
    """What a process holds now; None if it has ended, be it a zombie still."""
    try:
        lines = Path(f"/proc/{pid}/status").read_text().splitlines()
        descriptors = psutil.Process(pid).num_fds()
    except (OSError, psutil.NoSuchProcess):
        return None
    fields = {name: value.split() for name, _, value in (line.partition(":") for line in lines)}
    if "RssAnon" not in fields:  # a zombie has no memory
        return None
    return ProcessUse(pid, int(fields["RssAnon"][0]) / 1024, descriptors, int(fields["Threads"][0]))


def read(front: int, at_s: float, requests: int) -> Reading | None:
    """The server at this moment; None if its front has ended."""
    children = process_tree(front)[1:]
    engine = _engine_among(children)
    front_held = held(front)
    if front_held is None:
        return None
    others = [held(process.pid) for process in children if engine is None or process.pid != engine.pid]
    engine_held = None if engine is None else held(engine.pid)
    return Reading(at_s, requests, front_held, engine_held, sum(found.mib for found in others if found is not None))


@asynccontextmanager
async def watching(
    front: int, interval_s: float, num_requests: Callable[[], int], began_s: float
) -> AsyncIterator[list[Reading]]:
    """Yield a list that grows by a reading every `interval_s` while the block runs; times count from `began_s`."""
    readings: list[Reading] = []

    async def watch() -> None:
        while True:
            found = read(front, time.perf_counter() - began_s, num_requests())
            if found is not None:
                readings.append(found)
            await asyncio.sleep(interval_s)

    task = asyncio.create_task(watch())
    try:
        yield readings
    finally:
        task.cancel()
        with suppress(asyncio.CancelledError):
            await task


def lives(readings: Sequence[Reading]) -> list[list[Reading]]:
    """The readings of each engine, in the order in which they lived."""
    found: dict[int, list[Reading]] = {}
    for reading in readings:
        if reading.engine is not None:
            found.setdefault(reading.engine.pid, []).append(reading)
    return list(found.values())


def growth(points: Sequence[tuple[int, float]]) -> float | None:
    """How much a value rises with 1,000 requests: from the median of the first third to that of the last.

    points: requests so far and the value, in order of time. Medians pass over what single requests hold for a moment.
    None for fewer than LEAST_READINGS points, or LEAST_REQUESTS requests between the two.
    """
    third = len(points) // 3
    if len(points) < LEAST_READINGS:
        return None
    first, last = points[:third], points[-third:]
    requests = fmean(n for n, _ in last) - fmean(n for n, _ in first)
    if requests < LEAST_REQUESTS:
        return None
    return 1000 * (median(value for _, value in last) - median(value for _, value in first)) / requests


def front_growth(readings: Sequence[Reading]) -> float | None:
    """MiB per 1,000 requests of the front and its helpers, the engine not among them."""
    return growth([(reading.requests, reading.front.mib + reading.others_mib) for reading in readings])


def engine_growth(life: Sequence[Reading], warm_up: int) -> float | None:
    """MiB per 1,000 requests of one engine, after the first `warm_up` of its requests."""
    begin = life[0].requests + warm_up
    return growth([(r.requests, r.engine.mib) for r in life if r.engine is not None and r.requests >= begin])


def verdict(name: str, value: float | None, most: float) -> dict[str, object]:
    """A value that may be `most` at most; one that could not be measured is a bar that was missed."""
    shown = float("nan") if value is None else value
    return {"name": name, "over": None, "bar": most, "value": value, "met": shown <= most}


def line(bar: Mapping[str, Any]) -> str:
    """A verdict in words."""
    value = "not measured" if bar["value"] is None else f"{bar['value']:.4g}"
    return f"{bar['name']}: {value} (bar: {bar['bar']:g}{'' if bar['met'] else ', missed'})"


def columns(readings: Sequence[Reading]) -> dict[str, list[float | None]]:
    """The readings, a list for each thing that was read; None where there was no engine."""
    rows: list[dict[str, float | None]] = []
    for reading in readings:
        row: dict[str, float | None] = {"at_s": reading.at_s, "requests": reading.requests}
        for name, one in (("front", reading.front), ("engine", reading.engine)):
            for field in ("pid", "mib", "descriptors", "threads"):
                row[f"{name}_{field}"] = None if one is None else getattr(one, field)
        rows.append({**row, "others_mib": reading.others_mib})
    return {
        name: [None if (value := row[name]) is None else round(value, 1) for row in rows] for name in (rows or [{}])[0]
    }
