"""Kill a server's engine with -9 at random moments, and look what becomes of its clients and what stays behind.

    python -m bench.kills --kills 200 [--model MODEL | --tiny]

The moments take turns: while nothing is asked, while an engine loads, while it reads prompts, while it writes answers.
In the last two more is asked than may run at a time, so that some requests wait. Writes bench/results/kills.json.
"""

import argparse
import asyncio
import json
import random
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Literal

import httpx
from tqdm import tqdm

from bench import report
from bench.peers import StartFailed, end_servers_when_told
from bench.served import Served, Stopped, add_model_options, chosen_model, last_lines_of_tracebacks, serving, stop
from bench.stats import spread
from bench.watch import Reading, engine_process, line, read, verdict

Moment = Literal["idle", "loading", "prefill", "decode"]
End = Literal["whole", "error event", "error", "cut", "silent"]

TOLD: tuple[End, ...] = ("whole", "error event")
MOMENTS: tuple[Moment, ...] = ("idle", "loading", "prefill", "decode")
MAX_NUM_SEQS, NUM_STREAMS = 4, 10  # six of the ten wait
ANSWER_TOKENS, PROMPT_WORDS = 200, 250
BACK_S = 20.0  # bar: a killed engine serves again
PATIENCE_S = 180.0  # one who has no answer then has none
POLL_S = 0.02
FRONT_MIB = 4.0  # bar: growth of the front over all kills, which its allocator takes for some hundreds of requests
MOST_DELAY_S: dict[Moment, float] = {"idle": 0.2, "loading": 3.0, "prefill": 0.1, "decode": 0.3}


@dataclass(frozen=True, slots=True)
class Outcome:
    """What one client saw. `has_begun`: it had read some of its answer when the engine was killed."""

    moment: Moment
    has_begun: bool
    end: End


@dataclass(frozen=True, slots=True)
class Kill:
    """One engine's end; `back_s` is None if no other served within PATIENCE_S."""

    moment: Moment
    back_s: float | None


class Stream:
    """One client's request for a stream."""

    def __init__(self, client: httpx.AsyncClient, words: int) -> None:
        self.num_events = 0
        self._client = client
        salt = random.random()
        self._body = {
            "prompt": f"{salt} " + "and so on " * words,
            "max_tokens": ANSWER_TOKENS,
            "ignore_eos": True,
            "stream": True,
        }

    async def run(self) -> End:
        """Read it to its end."""
        last = ""
        try:
            async with (
                asyncio.timeout(PATIENCE_S),
                self._client.stream("POST", "/v1/completions", json=self._body) as r,
            ):
                if r.status_code != 200:
                    return "error"
                async for text in r.aiter_lines():
                    if text.startswith("data: "):
                        last = text.removeprefix("data: ")
                        self.num_events += 1
        except TimeoutError:
            return "silent"
        except httpx.HTTPError:
            return "cut"
        if last == "[DONE]":
            return "whole"
        return "error event" if last and "error" in json.loads(last) else "cut"


class Killer:
    """Asks one server, and kills its engines; `outcomes` and `kills` grow meanwhile."""

    def __init__(self, served: Served, client: httpx.AsyncClient, seed: int) -> None:
        self._front = served.process.pid
        self._client = client
        self._random = random.Random(seed)
        self.outcomes: list[Outcome] = []
        self.kills: list[Kill] = []

    async def kill_at(self, moment: Moment) -> None:
        """Bring the server to that moment, kill, and wait until it serves again and all have their answers."""
        num_streams = {"idle": 0, "loading": 1}.get(moment, NUM_STREAMS)
        streams = [Stream(self._client, PROMPT_WORDS if moment == "prefill" else 5) for _ in range(num_streams)]
        runs = [asyncio.create_task(stream.run()) for stream in streams]
        if moment == "decode":
            await self._until(lambda: sum(stream.num_events > 0 for stream in streams) >= MAX_NUM_SEQS)
        elif moment == "loading":
            await self._until(lambda: streams[0].num_events > 0)
            await self._kill()  # the one that is to be killed is started now
        await asyncio.sleep(self._random.uniform(0, MOST_DELAY_S[moment]))
        begun = [stream.num_events > 0 and not run.done() for stream, run in zip(streams, runs, strict=True)]
        if moment == "loading":
            begun = [True]
        await self._kill()
        began_s = time.perf_counter()
        self.kills.append(Kill(moment, await self._back_s(began_s)))
        ends = await asyncio.gather(*runs)
        self.outcomes += [Outcome(moment, was, end) for was, end in zip(begun, ends, strict=True)]

    async def _kill(self) -> None:
        await self._until(lambda: engine_process(self._front) is not None)
        engine = engine_process(self._front)
        if engine is not None:
            engine.kill()
            await asyncio.to_thread(engine.wait)

    async def _back_s(self, began_s: float) -> float | None:
        while (seconds := time.perf_counter() - began_s) < PATIENCE_S:
            if (await self._client.get("/health")).status_code == 200:
                return seconds
            await asyncio.sleep(POLL_S)
        return None

    @staticmethod
    async def _until(holds: Callable[[], bool]) -> None:
        async with asyncio.timeout(PATIENCE_S):
            while not holds():
                await asyncio.sleep(POLL_S)


@dataclass(frozen=True, slots=True)
class Found:
    """All that was seen."""

    kills: Sequence[Kill]
    outcomes: Sequence[Outcome]
    before: Reading
    after: Reading
    stopped: Stopped
    tracebacks: Sequence[str]


async def run(served: Served, kills: int, seed: int) -> Found:
    """All kills, after one of each kind that warms up."""
    limits = httpx.Limits(max_keepalive_connections=0)  # a kept connection would count as a descriptor
    async with httpx.AsyncClient(base_url=served.url, timeout=None, limits=limits) as client:
        killer = Killer(served, client, seed)
        for moment in MOMENTS:
            await killer.kill_at(moment)
        killer.kills.clear()
        killer.outcomes.clear()
        before = await _rested(served)
        for place in tqdm(range(kills), disable=None):
            await killer.kill_at(MOMENTS[place % len(MOMENTS)])
        after = await _rested(served)
    stopped = await asyncio.to_thread(stop, served)
    tracebacks = last_lines_of_tracebacks(served.log.read_text(errors="replace"))
    return Found(killer.kills, killer.outcomes, before, after, stopped, tracebacks)


async def _rested(served: Served) -> Reading:
    """What the server holds when its connections are closed."""
    await asyncio.sleep(2)
    reading = read(served.process.pid, 0.0, 0)
    assert reading is not None, "the front has ended"
    return reading


def verdicts(found: Found) -> list[dict[str, object]]:
    """Each bar with its value, all of them the most that may be."""
    back = sorted(kill.back_s for kill in found.kills if kill.back_s is not None)
    slow = back[-1 - len(back) // 100] if back else None
    begun = [outcome.end for outcome in found.outcomes if outcome.has_begun]
    waited = [outcome.end for outcome in found.outcomes if not outcome.has_begun]
    before, after = found.before, found.after
    return [
        verdict("streams that had begun and were not written to their end", sum(e != "whole" for e in begun), 0),
        verdict("requests that waited and were not answered", sum(e not in TOLD for e in waited), 0),
        verdict("seconds until it serves again, the longest but 1 %", slow, BACK_S),
        verdict("kills after which none came back", len(found.kills) - len(back), 0),
        verdict("descriptors of the front more than before", after.front.descriptors - before.front.descriptors, 0),
        verdict("threads of the front more than before", after.front.threads - before.front.threads, 0),
        verdict("growth of the front in MiB", after.front.mib - before.front.mib, FRONT_MIB),
        verdict("tracebacks in the log", len(found.tracebacks), 0),
        verdict("exit status", found.stopped.status, 0),
        verdict("processes and temporary files left", len(found.stopped.processes) + len(found.stopped.files), 0),
    ]


def results(found: Found, bars: list[dict[str, object]], setup: dict[str, object]) -> dict[str, object]:
    """All of it as JSON."""
    back = {m: [k.back_s for k in found.kills if k.moment == m and k.back_s is not None] for m in MOMENTS}
    ends = Counter((o.moment, "begun" if o.has_begun else "waiting", o.end) for o in found.outcomes)
    return {
        "setup": setup,
        "bars": bars,
        "back_s": {moment: spread([round(s, 2) for s in seconds]) for moment, seconds in back.items() if seconds},
        "outcomes": [dict(zip(("moment", "was", "end", "number"), (*key, n), strict=True)) for key, n in ends.items()],
        "kills": [asdict(kill) for kill in found.kills],
        "at_rest": {"before": asdict(found.before), "after": asdict(found.after), "stopped": asdict(found.stopped)},
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--kills", type=int, default=200)
    add_model_options(parser)
    parser.add_argument("--seed", type=int, default=0, help="of the moments within each kind")
    parser.add_argument("--name", default="kills", help="results go to bench/results/NAME.json")
    options = parser.parse_args()
    end_servers_when_told()
    with tempfile.TemporaryDirectory() as place:
        folder = Path(place)
        model = chosen_model(options, folder)
        flags = ["--max-num-seqs", str(MAX_NUM_SEQS), "--max-model-len", "4096"]
        try:
            with serving(model, folder, options.name, flags) as served:
                found = asyncio.run(run(served, options.kills, options.seed))
        except StartFailed as error:
            raise SystemExit(f"{error}; the server's log is build/{options.name}.log") from None
    bars = verdicts(found)
    setup: dict[str, object] = {"model": model.name, "kills": options.kills, "seed": options.seed}
    print(report.write(options.name, results(found, bars, setup)))
    print("\n".join(map(line, bars)))


if __name__ == "__main__":
    main()
