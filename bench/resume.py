"""Kill a server's engine with -9 in the middle of answers, and look whether each goes on as if nothing had happened.

    python -m bench.resume --kills 200 [--model MODEL | --tiny] [--together 4]

The answers, every second one greedy and the others with a seed, are asked of one server that is left alone, and then of
another whose engine is killed at a random token of each. Several together are asked as often, all of which one kill
hits: of these no token that was given out may be lost, doubled or changed, and how many texts are equal is told.
Writes bench/results/resume.json.
"""

import argparse
import asyncio
import json
import random
import tempfile
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import httpx
from tqdm import tqdm

from bench import report
from bench.peers import StartFailed, end_servers_when_told
from bench.served import Served, add_model_options, chosen_model, last_lines_of_tracebacks, serving
from bench.stats import spread
from bench.watch import engine_process, held, line, verdict

ANSWER_TOKENS, PATIENCE_S = 48, 180.0
WARM = 8  # so many kills come before memory is looked at
FRONT_MIB = 4.0  # bar: growth of the front over all kills


@dataclass(frozen=True, slots=True)
class Answer:
    """What one client was given."""

    token_ids: tuple[int, ...]
    text: str  # all pieces of it
    is_whole: bool  # it ended as it should
    at_kill: int = 0  # so many tokens had come when the engine was killed
    pause_s: float = 0.0  # the longest time between two tokens


def body(number: int) -> dict[str, object]:
    """A request of its own for each number, which shares no cached tokens."""
    topics = ("the sea", "a hut in the hills", "an old clock", "the last train", "bread", "a map", "rain", "chess")
    parameters: dict[str, object] = {
        "max_new_tokens": ANSWER_TOKENS,
        "ignore_eos": True,
        "cache_salt": str(number),
        "details": True,
    }
    if number % 2:
        parameters |= {"temperature": 1.0, "seed": number}
    words = " and then, as they used to say," * (number % 13)
    return {"inputs": f"Story {number}, about {topics[number % len(topics)]}{words}:", "parameters": parameters}


async def read(client: httpx.AsyncClient, number: int, seen: list[int]) -> Answer:
    """Read one answer to its end; `seen` grows by its token ids."""
    texts: list[str] = []
    is_whole, at_s, pause_s = False, 0.0, 0.0
    async with asyncio.timeout(PATIENCE_S), client.stream("POST", "/generate_stream", json=body(number)) as response:
        assert response.status_code == 200, response.status_code
        async for text in response.aiter_lines():
            if not text.startswith("data:"):
                continue
            event = json.loads(text[5:])
            if "token" not in event:
                break  # an error event
            now_s = time.perf_counter()
            pause_s, at_s = max(pause_s, now_s - at_s if at_s else 0.0), now_s
            seen.append(event["token"]["id"])
            texts.append(event["token"]["text"])
            if event["generated_text"] is not None:
                is_whole = event["index"] == ANSWER_TOKENS and event["generated_text"] == "".join(texts)
    return Answer(tuple(seen), "".join(texts), is_whole, pause_s=pause_s)


async def killed(served: Served, client: httpx.AsyncClient, numbers: Sequence[int], place: int) -> list[Answer]:
    """Ask for these together, and kill the engine when the first has `place` tokens."""
    seen: list[list[int]] = [[] for _ in numbers]
    reads = [asyncio.create_task(read(client, n, s)) for n, s in zip(numbers, seen, strict=True)]
    while len(seen[0]) < place:
        await asyncio.sleep(0.001)
    engine = engine_process(served.process.pid)
    assert engine is not None
    engine.kill()
    counts = [len(one) for one in seen]
    answers = await asyncio.gather(*reads)
    return [Answer(a.token_ids, a.text, a.is_whole, count, a.pause_s) for a, count in zip(answers, counts, strict=True)]


@dataclass(frozen=True, slots=True)
class Found:
    """What came of all answers, undisturbed and killed, and how much the front grew."""

    expected: Sequence[Answer]
    answers: Sequence[Answer]
    grown_mib: float
    tracebacks: Sequence[str]


async def undisturbed(served: Served, number: int) -> list[Answer]:
    async with httpx.AsyncClient(base_url=served.url, timeout=None) as client:
        return [await read(client, n, []) for n in tqdm(range(number), desc="undisturbed", disable=None)]


async def disturbed(served: Served, number: int, together: int, seed: int) -> tuple[list[Answer], float]:
    rng = random.Random(seed)
    answers: list[Answer] = []
    before = 0.0
    async with httpx.AsyncClient(base_url=served.url, timeout=None) as client:
        for first in tqdm(range(0, number, together), desc=f"killed, {together} at a time", disable=None):
            while (await client.get("/health")).status_code != 200:
                await asyncio.sleep(0.02)
            numbers = range(first, min(first + together, number))
            answers += await killed(served, client, numbers, rng.randrange(1, ANSWER_TOKENS - 4))
            if first <= WARM * together:
                before = _mib(served)
        return answers, _mib(served) - before


def _mib(served: Served) -> float:
    front = held(served.process.pid)
    assert front is not None, "the front has ended"
    return front.mib


def verdicts(found: Found, together: int) -> list[dict[str, object]]:
    """Each bar with its value, all of them the most that may be."""
    pairs = list(zip(found.expected, found.answers, strict=True))
    differ = sum(answer.token_ids != expected.token_ids for expected, answer in pairs)
    bars = [
        verdict("answers that did not end whole", sum(not answer.is_whole for answer in found.answers), 0),
        verdict("answers with tokens lost or doubled", sum(len(a.token_ids) != ANSWER_TOKENS for _, a in pairs), 0),
        verdict("growth of the front in MiB", found.grown_mib, FRONT_MIB),
        verdict("tracebacks in the log", len(found.tracebacks), 0),
    ]
    return [verdict("answers that differ from the undisturbed", differ, 0), *bars] if together == 1 else bars


def results(found: Found, bars: list[dict[str, object]], setup: dict[str, object]) -> dict[str, object]:
    """All of it as JSON."""
    pairs = list(zip(found.expected, found.answers, strict=True))
    rows = [
        {**asdict(answer), "is_equal": answer.token_ids == expected.token_ids, "text": None, "token_ids": None}
        for expected, answer in pairs
    ]
    return {
        "setup": setup,
        "bars": bars,
        "equal": sum(bool(row["is_equal"]) for row in rows),
        "pause_s": spread([round(answer.pause_s, 2) for answer in found.answers]),
        "answers": [{key: value for key, value in row.items() if value is not None} for row in rows],
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--kills", type=int, default=200)
    parser.add_argument("--together", type=int, default=1, help="answers that one kill hits")
    add_model_options(parser)
    parser.add_argument("--seed", type=int, default=0, help="of the tokens at which engines are killed")
    parser.add_argument("--name", default="resume", help="results go to bench/results/NAME.json")
    options = parser.parse_args()
    number = options.kills * options.together
    end_servers_when_told()
    with tempfile.TemporaryDirectory() as place:
        model = chosen_model(options, Path(place))
        flags = ["--max-num-seqs", "4", "--max-model-len", "2048"]
        try:
            (Path(place) / "a").mkdir()
            with serving(model, Path(place) / "a", f"{options.name}-undisturbed", flags) as served:
                expected = asyncio.run(undisturbed(served, number))
            with serving(model, Path(place), options.name, flags) as served:
                answers, grown_mib = asyncio.run(disturbed(served, number, options.together, options.seed))
                tracebacks = last_lines_of_tracebacks(served.log.read_text(errors="replace"))
        except StartFailed as error:
            raise SystemExit(f"{error}; the server's log is build/{options.name}.log") from None
    found = Found(expected, answers, grown_mib, tracebacks)
    bars = verdicts(found, options.together)
    setup: dict[str, object] = {"model": model.name, **vars(options), "model_option": None}
    setup = {key: str(value) for key, value in setup.items() if value is not None}
    print(report.write(options.name, results(found, bars, setup)))
    print("\n".join(map(line, bars)))


if __name__ == "__main__":
    main()
