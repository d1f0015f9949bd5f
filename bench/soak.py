"""Leave a server to many unkind clients for a long time, kill its engine again and again, and look what stays behind.

    python -m bench.soak --minutes 30 [--model MODEL | --tiny]

The mix: chats, several answers, grammars, adapters that come and go, long prompts, batches, other dialects, clients
that leave at any moment, and bodies that must be refused. A tenth of the time warms up, with one kill; then engines are
killed with -9 at random moments for half of the rest; the last engine lives through the other half, so that its memory
can be judged over many requests. Before and after, the server rests, and must hold the same. Writes
bench/results/soak.json and soak.png.
"""

import argparse
import asyncio
import tempfile
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

from tqdm import tqdm

from bench import report
from bench.asks import ADAPTER, ADMIN_KEY, GUEST_FOLDER
from bench.crowd import OWED, Crowd, Rest
from bench.outcomes import Kill, Outcome, by_kind, faults, recoveries_s, told
from bench.peers import StartFailed, end_servers_when_told
from bench.served import (
    Served,
    Stopped,
    add_model_options,
    chosen_model,
    last_lines_of_tracebacks,
    serving,
    stop,
)
from bench.small_models import write_adapter
from bench.soak_plot import draw
from bench.sse import RequestFailed
from bench.watch import Reading, columns, engine_growth, front_growth, line, lives, verdict, watching

WINDOW, CACHE_TOKENS = 4096, 8192  # a cache small enough to be full most of the time
WARM_UP = 0.1  # share of the time
LIFE_WARM_UP = 0.25  # share of the last engine's requests, in which its pools and caches fill
MOST_READINGS = 400
FRONT_MIB, ENGINE_MIB = 1.0, 2.0  # bars: growth per 1,000 requests
BACK_S = 20.0  # bar: a killed engine serves again


@dataclass(frozen=True, slots=True)
class Found:
    """All that was seen."""

    readings: Sequence[Reading]
    warm_s: float  # when the warm-up was over
    outcomes: Sequence[Outcome]
    kills: Sequence[Kill]
    before: Rest
    after: Rest
    stopped: Stopped
    tracebacks: Sequence[str]


async def soak(served: Served, seconds: float, clients: int, seed: int, bar: "tqdm[object]") -> Found:
    """Run the whole soak. Raises RequestFailed when the server itself is gone."""
    front = served.process.pid
    crowd = Crowd(served.url, front, clients, seed)
    warm_up_s = WARM_UP * seconds
    half_s = (seconds - warm_up_s) / 2
    async with watching(
        front, max(1.0, seconds / MOST_READINGS), lambda: crowd.num_answered, crowd.began_s
    ) as readings:
        showing = asyncio.create_task(_show(bar, crowd, readings))
        try:
            await crowd.busy(warm_up_s / 3, crowd.kill_once)
            await crowd.busy(2 * warm_up_s / 3)
            before = await crowd.rest()
            await crowd.busy(half_s, crowd.kill_at_random)
            await crowd.busy(half_s)
            after = await crowd.rest()
        finally:
            showing.cancel()
    stopped = await asyncio.to_thread(stop, served)
    kept = served.log.read_text(errors="replace")
    return Found(
        readings,
        before.reading.at_s,
        crowd.outcomes,
        crowd.kills,
        before,
        after,
        stopped,
        last_lines_of_tracebacks(kept),
    )


async def _show(bar: "tqdm[object]", crowd: Crowd, readings: Sequence[Reading]) -> None:
    """Keep the progress bar going."""
    while True:
        await asyncio.sleep(1)
        bar.update(1)
        if readings:
            engine = readings[-1].engine
            bar.set_postfix(
                requests=crowd.num_answered,
                kills=len(crowd.kills),
                faults=len(faults(crowd.outcomes, crowd.kills)),
                front_mib=round(readings[-1].front.mib),
                engine_mib="-" if engine is None else round(engine.mib),
            )


def verdicts(found: Found) -> list[dict[str, object]]:
    """Each bar with its value, all of them the most that may be."""
    wrong = faults(found.outcomes, found.kills)

    def count(*ends: str) -> int:
        return sum(1 for outcome in wrong if outcome.end in ends and outcome.expected != "refusal")

    warm = [reading for reading in found.readings if reading.at_s >= found.warm_s]
    back = recoveries_s(found.kills)
    owed = sum(found.after.gauges[name] for name in OWED)
    before, after = found.before.reading, found.after.reading
    return [
        verdict("streams and answers that were cut short", count("cut"), 0),
        verdict("requests without an answer", count("lost"), 0),
        verdict("errors and refusals that no kill explains", count("failed", "refused"), 0),
        verdict("answers that are not what was asked for", count("wrong"), 0),
        verdict("bad input that was not refused with 4xx", sum(1 for o in wrong if o.expected == "refusal"), 0),
        verdict("front, growth in MiB per 1,000 requests", front_growth(warm), FRONT_MIB),
        verdict("last engine, growth in MiB per 1,000 requests", last_life(found.readings)["growth_mib"], ENGINE_MIB),
        verdict("descriptors more at rest after than before", _more(before, after, "descriptors"), 0),
        verdict("threads more at rest after than before", _more(before, after, "threads"), 0),
        verdict("cached tokens in use, answers running or waiting at rest", owed, 0),
        verdict("seconds until a killed engine serves again, the longest but 1 %", _all_but_1_percent(back), BACK_S),
        verdict("kills after which none came back", sum(1 for kill in found.kills if kill.back_s is None), 0),
        verdict("tracebacks in the log", len(found.tracebacks), 0),
        verdict("exit status", found.stopped.status, 0),
        verdict("processes and temporary files left", len(found.stopped.processes) + len(found.stopped.files), 0),
    ]


def last_life(readings: Sequence[Reading]) -> dict[str, float | None]:
    """Requests that the last engine answered, and how it grew after the first of them."""
    found = lives(readings)
    if not found:
        return {"requests": 0, "growth_mib": None}
    requests = found[-1][-1].requests - found[-1][0].requests
    return {"requests": requests, "growth_mib": engine_growth(found[-1], int(LIFE_WARM_UP * requests))}


def _more(before: Reading, after: Reading, name: str) -> int | None:
    """How many more of them front and engine hold, whichever gained more."""
    if before.engine is None or after.engine is None:
        return None
    pairs = ((before.front, after.front), (before.engine, after.engine))
    return max(int(getattr(late, name)) - int(getattr(early, name)) for early, late in pairs)


def _all_but_1_percent(seconds: Sequence[float]) -> float | None:
    return sorted(seconds)[-1 - len(seconds) // 100] if seconds else None


def results(found: Found, bars: list[dict[str, object]], setup: dict[str, object]) -> dict[str, object]:
    """All of it as JSON."""
    wrong = faults(found.outcomes, found.kills)
    return {
        "setup": setup,
        "bars": bars,
        "requests": by_kind(found.outcomes),
        "faults": told(wrong),
        "tracebacks": found.tracebacks[:10],
        "kills": [asdict(kill) for kill in found.kills],
        "last_engine": last_life(found.readings),
        "at_rest": {"before": asdict(found.before), "after": asdict(found.after), "stopped": asdict(found.stopped)},
        "readings": columns(found.readings),
    }


def server_options(model: Path, folder: Path) -> list[str]:
    """Serve with an adapter, and one in a folder that adapters may be loaded from; both are written now."""
    lasting = write_adapter(model, folder / ADAPTER, seed=1)
    write_adapter(model, folder / GUEST_FOLDER, seed=2)
    return [
        *("--lora", f"{ADAPTER}={lasting}", "--lora-folder", str(folder), "--admin-key", ADMIN_KEY),
        *("--max-model-len", str(WINDOW), "--kv-cache-tokens", str(CACHE_TOKENS)),
    ]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--minutes", type=float, default=30.0)
    add_model_options(parser)
    parser.add_argument("--clients", type=int, default=20, help="how many ask at the same time")
    parser.add_argument("--seed", type=int, default=0, help="of what is asked, and when engines are killed")
    parser.add_argument("--name", default="soak", help="results go to bench/results/NAME.json and NAME.png")
    options = parser.parse_args()
    end_servers_when_told()
    seconds = 60 * options.minutes
    with tempfile.TemporaryDirectory() as place, tqdm(total=int(seconds), unit="s", disable=None) as bar:
        folder = Path(place)
        model = chosen_model(options, folder)
        flags = server_options(model, folder / "adapters")
        try:
            with serving(model, folder, options.name, flags) as served:
                found = asyncio.run(soak(served, seconds, options.clients, options.seed, bar))
        except (StartFailed, RequestFailed) as error:
            raise SystemExit(f"{error}; the server's log is build/{options.name}.log") from None
    setup: dict[str, object] = {"model": model.name, "window": WINDOW, "cache_tokens": CACHE_TOKENS}
    setup |= {"minutes": options.minutes, "clients": options.clients, "seed": options.seed}
    bars = verdicts(found)
    print(report.write(options.name, results(found, bars, setup)))
    caption = f"{model.name}, {options.clients} clients, {len(found.outcomes):,} requests, {len(found.kills)} kills"
    picture = report.RESULTS / f"{options.name}.png"
    print(draw(found.readings, [kill.at_s for kill in found.kills], "kills of the engine", bars, caption, picture))
    print("\n".join(map(line, bars)))


if __name__ == "__main__":
    main()
