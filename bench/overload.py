"""Ask a server for ten times of what it can serve, and look how it refuses the rest.

    python -m bench.overload [--model MODEL | --tiny] [--seconds 60] [--times 10]

First plain full load: as many clients as there are places, each with one request after the other. That gives what is
served in a second and the time per token. Then requests come at random moments, ten times as many, whether the server
answers or not. Writes bench/results/overload.json and overload.png.
"""

import argparse
import asyncio
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from statistics import median

from tqdm import tqdm

from bench import report
from bench.load_process import Load, Trial, full, load_pool, open_loop
from bench.peers import StartFailed, end_servers_when_told
from bench.served import add_model_options, chosen_model, serving
from bench.soak_plot import draw
from bench.watch import Reading, columns, line, verdict, watching

SLOTS, WAITING = 16, 128  # the server's defaults
WINDOW, CACHE_TOKENS = 4096, 8192
MAX_TOKENS = 48
WARM_S, PLAIN_S = 15.0, 30.0
REFUSED_MS, SLOWER = 100.0, 1.2  # bars
FRONT_MIB, ENGINE_MIB = 32.0, 64.0  # bars: the most that either may hold beyond its most at plain full load
READ_EVERY_S = 0.5


@dataclass(frozen=True, slots=True)
class Found:
    """All that was seen. Memory is told by the readings of each phase."""

    plain: Sequence[Trial]
    overload: Sequence[Trial]
    plain_s: tuple[float, float]
    overload_s: tuple[float, float]
    readings: Sequence[Reading]
    lags_ms: Sequence[float]  # how late the clients' own loop was during the overload: part of what it measures
    client_cpu_s: float  # of the clients, from the overload's begin to its last answer


async def overload(url: str, front: int, seconds: float, times: float, seed: int, bar: "tqdm[object]") -> Found:
    """Warm up, measure plain full load, and then bring `times` as many requests for so many seconds."""
    loads = [Load(url, MAX_TOKENS, seed + number) for number in range(3)]
    pool, ended = load_pool()
    start_s = time.perf_counter()
    run = partial(asyncio.get_running_loop().run_in_executor, pool)
    with pool:
        async with watching(front, READ_EVERY_S, lambda: ended.value, start_s) as readings:
            showing = asyncio.create_task(_show(bar, lambda: ended.value, readings))
            try:
                bar.set_description("warm-up")
                await run(full, loads[0], start_s, SLOTS, WARM_S)
                bar.set_description("plain full load")
                plain = await run(full, loads[1], start_s, SLOTS, PLAIN_S)
                plain_s = plain.begin_s, plain.begin_s + PLAIN_S
                bar.set_description("overload")
                per_s = times * served_per_s(plain.trials, *plain_s)
                if not per_s:
                    raise StartFailed("nothing was served at plain full load")
                many = await run(open_loop, loads[2], start_s, per_s, seconds)
            finally:
                showing.cancel()
    many_s = many.begin_s, many.begin_s + seconds
    return Found(plain.trials, many.trials, plain_s, many_s, readings, many.lags_ms, many.cpu_s)


async def _show(bar: "tqdm[object]", num_ended: Callable[[], int], readings: Sequence[Reading]) -> None:
    """Keep the progress bar going."""
    while True:
        await asyncio.sleep(1)
        bar.update(1)
        if readings:
            bar.set_postfix(requests=num_ended(), front_mib=round(readings[-1].front.mib))


def served_per_s(trials: Sequence[Trial], begin_s: float, end_s: float) -> float:
    """Answers that came whole between two moments, per second."""
    return sum(1 for t in trials if t.status == 200 and begin_s <= t.end_s <= end_s) / (end_s - begin_s)


def tpot_ms(trials: Sequence[Trial], begin_s: float, end_s: float) -> float | None:
    """Median time per token after the first, of the answers that ended between two moments."""
    found = [t.tpot_s for t in trials if t.tpot_s is not None and begin_s <= t.end_s <= end_s]
    return 1e3 * median(found) if found else None


def refusals_ms(trials: Sequence[Trial]) -> list[float]:
    """Milliseconds from the first byte of the connection to the status of each 429, in rising order."""
    return sorted(1e3 * (t.head_s - t.begin_s) for t in trials if t.status == 429)


def percentile(values: Sequence[float], share: float) -> float | None:
    """The smallest of these sorted values that at least `share` of them don't exceed."""
    return values[max(0, -int(-share * len(values) // 1) - 1)] if values else None


def peaks_mib(readings: Sequence[Reading], begin_s: float, end_s: float) -> tuple[float | None, float | None]:
    """The most that front and engine held between two moments."""
    within = [r for r in readings if begin_s <= r.at_s <= end_s]
    engines = [r.engine.mib for r in within if r.engine is not None]
    return max((r.front.mib for r in within), default=None), max(engines, default=None)


def figures(found: Found) -> dict[str, float | None]:
    """The numbers that the bars are about, and what they came from."""
    plain, many = tpot_ms(found.plain, *found.plain_s), tpot_ms(found.overload, *found.overload_s)
    before, during = peaks_mib(found.readings, *found.plain_s), peaks_mib(found.readings, *found.overload_s)
    front, engine = (None if a is None or b is None else b - a for a, b in zip(before, during, strict=True))
    begin_s, end_s = found.overload_s
    return {
        "plain_served_per_s": served_per_s(found.plain, *found.plain_s),
        "offered_per_s": len(found.overload) / (end_s - begin_s),
        "served_per_s": served_per_s(found.overload, begin_s, end_s),
        "plain_tpot_ms": plain,
        "tpot_ms": many,
        "tpot_ratio": None if plain is None or many is None else many / plain,
        "refused_p50_ms": percentile(refusals_ms(found.overload), 0.5),
        "refused_p99_ms": percentile(refusals_ms(found.overload), 0.99),
        "refused_max_ms": percentile(refusals_ms(found.overload), 1.0),
        "client_late_p99_ms": percentile(sorted(found.lags_ms), 0.99),
        "client_cpu_ms": 1e3 * found.client_cpu_s / max(1, len(found.overload)),
        "front_more_mib": front,
        "engine_more_mib": engine,
    }


def verdicts(found: Found) -> list[dict[str, object]]:
    """Each bar with its value, all of them the most that may be."""
    numbers = figures(found)
    statuses = Counter(t.status for t in (*found.plain, *found.overload))
    silent = sum(1 for t in found.overload if t.status == 429 and not t.says_when)
    return [
        verdict("answers with 5xx", sum(n for status, n in statuses.items() if status >= 500), 0),
        verdict("requests without a whole answer", statuses[0], 0),
        verdict(
            "other statuses than 200 and 429",
            sum(n for s, n in statuses.items() if 0 < s < 500 and s not in (200, 429)),
            0,
        ),
        verdict("refusals without Retry-After", silent, 0),
        verdict("ms to a refusal, p99", numbers["refused_p99_ms"], REFUSED_MS),
        verdict("time per token over that of plain full load", numbers["tpot_ratio"], SLOWER),
        verdict("front, MiB beyond plain full load", numbers["front_more_mib"], FRONT_MIB),
        verdict("engine, MiB beyond plain full load", numbers["engine_more_mib"], ENGINE_MIB),
    ]


def results(found: Found, bars: list[dict[str, object]], setup: dict[str, object]) -> dict[str, object]:
    """All of it as JSON."""
    return {
        "setup": setup,
        "bars": bars,
        "figures": figures(found),
        "statuses": {
            phase: {str(status): n for status, n in sorted(Counter(t.status for t in trials).items())}
            for phase, trials in (("plain", found.plain), ("overload", found.overload))
        },
        "readings": columns(found.readings),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    add_model_options(parser)
    parser.add_argument("--seconds", type=float, default=60.0, help="how long the overload lasts")
    parser.add_argument("--times", type=float, default=10.0, help="how many times of what is served is asked for")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--name", default="overload", help="results go to bench/results/NAME.json and NAME.png")
    options = parser.parse_args()
    end_servers_when_told()
    total = int(WARM_S + PLAIN_S + options.seconds)
    sizes = (
        "--max-num-seqs",
        SLOTS,
        "--max-waiting",
        WAITING,
        "--max-model-len",
        WINDOW,
        "--kv-cache-tokens",
        CACHE_TOKENS,
    )
    with tempfile.TemporaryDirectory() as place, tqdm(total=total, unit="s", disable=None) as bar:
        model = chosen_model(options, Path(place))
        try:
            with serving(model, Path(place), options.name, [*map(str, sizes)]) as served:
                pid, span_s = served.process.pid, options.seconds
                found = asyncio.run(overload(served.url, pid, span_s, options.times, options.seed, bar))
        except StartFailed as error:
            raise SystemExit(f"{error}; the server's log is build/{options.name}.log") from None
    setup: dict[str, object] = {"model": model.name, "slots": SLOTS, "waiting": WAITING, "tokens": MAX_TOKENS}
    setup |= {"seconds": options.seconds, "times": options.times, "seed": options.seed}
    bars = verdicts(found)
    print(report.write(options.name, results(found, bars, setup)))
    caption = (
        f"{model.name}, {options.times:g} times overload for {options.seconds:g} s, {len(found.overload):,} requests"
    )
    phases = (found.plain_s[0], *found.overload_s)
    print(draw(found.readings, phases, "phases", bars, caption, report.RESULTS / f"{options.name}.png"))
    print("\n".join(map(line, bars)))


if __name__ == "__main__":
    main()
