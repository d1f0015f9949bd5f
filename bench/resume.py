"""Kill a server's engine with -9 in the middle of answers, or cut its clients off, and look whether each goes on.

    python -m bench.resume [--kills 200 | --cuts 200] [--model MODEL | --tiny] [--gguf-engine llama.cpp] [--together 4]

The answers, every second one greedy and the others with a seed, are asked of one server that is left alone, and then of
another, again and again, whose engine is killed at a random token of each, or whose sockets are cut at a random byte,
several times an answer. Several together are asked as often, all of which one kill hits: of these no token that was
given out may be lost, doubled or changed, and how many texts are equal is told. Prompts fit one step, since how many
tokens longer ones have in each depends on the time that steps take, and so do the last bits. Puts its row into
bench/results/resume.json, in place of one of the same kind, after each answer: what ends a run takes one along at most.
"""

import argparse
import asyncio
import json
import random
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import takewhile
from pathlib import Path
from typing import Any, get_args

import httpx
from tqdm import tqdm

from bench import report
from bench.peers import StartFailed, end_servers_when_told
from bench.served import Served, add_model_options, chosen_model, last_lines_of_tracebacks, serving
from bench.stats import spread
from bench.watch import engine_process, held, line, verdict
from tightrope.backends.settings import GgufEngine

ANSWER_TOKENS = 32
PATIENCE_S = 900.0  # for an answer, over the start of an engine on a machine that does other things, too
WARM = 8  # so many kills come before memory is looked at
FRONT_MIB = 4.0  # bar: growth of the front over all kills
MOST_READINGS = 20  # of its memory are told


@dataclass(frozen=True, slots=True)
class Answer:
    """What one client was given."""

    token_ids: tuple[int, ...]
    text: str  # all pieces of it
    is_whole: bool  # it ended as it should
    at_kill: int = 0  # so many tokens had come when the engine was killed
    pause_s: float = 0.0  # the longest time between two tokens
    num_cuts: int = 0  # its socket was cut so often


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
    words = " and then, as they used to say," * (number % 4)
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


def whole_events(raw: bytes) -> list[bytes]:
    """The events of a stream, or of a part of it, that came to their ends."""
    return [event for event in raw.split(b"\n\n")[:-1] if event.startswith(b"id: ")]


async def cut(client: httpx.AsyncClient, number: int, rng: random.Random) -> Answer:
    """Read an answer whose socket is cut at random bytes, and read on each time."""
    events: list[bytes] = []
    method, path, headers, num_cuts = "POST", "/generate_stream", {"x-resumable": "1"}, -1
    while not events or b'"generated_text":null' in events[-1]:
        content = {"json": body(number)} if method == "POST" else {}
        most, raw = rng.randrange(200, 4000), b""
        async with (
            asyncio.timeout(PATIENCE_S),
            client.stream(method, path, headers=headers, **content) as response,  # type: ignore[arg-type]
        ):
            assert response.status_code == 200, response.status_code
            path = f"/v1/stream/{response.headers['x-stream-id']}"
            async for piece in response.aiter_raw():
                raw += piece
                if len(raw) >= most:
                    break
        events += whole_events(raw[:most] if len(raw) > most else raw)
        method, num_cuts = "GET", num_cuts + 1
        headers = {"last-event-id": f"{response.headers['x-stream-id']}.{len(events)}"}
    parsed = [json.loads(event.partition(b"data:")[2]) for event in events]
    texts = [event["token"]["text"] for event in parsed]
    is_whole = [event["index"] for event in parsed] == list(range(1, ANSWER_TOKENS + 1))
    is_whole = is_whole and parsed[-1]["generated_text"] == "".join(texts)
    return Answer(tuple(event["token"]["id"] for event in parsed), "".join(texts), is_whole, num_cuts=num_cuts)


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
    """What came of all answers so far; the undisturbed ones were asked for in turn, and the front had so many MiB."""

    expected: Sequence[Answer]
    answers: Sequence[Answer]
    front_mib: Sequence[float]
    tracebacks: Sequence[str]
    num_missing: int = 0  # so many kills or cuts are still to come

    @property
    def pairs(self) -> list[tuple[Answer, Answer]]:
        """Each answer behind the undisturbed one."""
        return [(self.expected[n % len(self.expected)], answer) for n, answer in enumerate(self.answers)]

    @property
    def grown_mib(self) -> float:
        """Growth of the front since it is warm."""
        return self.front_mib[-1] - self.front_mib[min(WARM, len(self.front_mib)) - 1]


Tell = Callable[[Sequence[Answer], Sequence[float], int], None]  # answers, MiB of the front, kills or cuts so far


async def undisturbed(served: Served, number: int) -> list[Answer]:
    async with httpx.AsyncClient(base_url=served.url, timeout=None) as client:
        return [await read(client, n, []) for n in tqdm(range(number), desc="undisturbed", disable=None)]


async def interrupted(served: Served, cuts: int, num_texts: int, seed: int, tell: Tell) -> None:
    """Cut sockets so often, while these answers are read again and again."""
    rng = random.Random(seed)
    answers, mib, num_cuts = list[Answer](), list[float](), 0
    async with httpx.AsyncClient(base_url=served.url, timeout=None) as client:
        with tqdm(total=cuts, desc="cut", disable=None) as bar:
            while num_cuts < cuts:
                answers.append(await cut(client, len(answers) % num_texts, rng))
                num_cuts += answers[-1].num_cuts
                bar.update(answers[-1].num_cuts)
                mib.append(_mib(served))
                tell(answers, mib, num_cuts)


async def disturbed(served: Served, kills: int, together: int, num_texts: int, seed: int, tell: Tell) -> None:
    """Kill the engine so often, each time in the middle of so many answers."""
    rng = random.Random(seed)
    answers, mib = list[Answer](), list[float]()
    async with httpx.AsyncClient(base_url=served.url, timeout=None) as client:
        for number in tqdm(range(kills), desc=f"killed, {together} at a time", disable=None):
            while (await client.get("/health")).status_code != 200:
                await asyncio.sleep(0.02)
            numbers = [n % num_texts for n in range(number * together, (number + 1) * together)]
            answers += await killed(served, client, numbers, rng.randrange(1, ANSWER_TOKENS - 4))
            mib.append(_mib(served))
            tell(answers, mib, number + 1)


def _mib(served: Served) -> float:
    front = held(served.process.pid)
    assert front is not None, "the front has ended"
    return front.mib


def verdicts(found: Found, together: int) -> list[dict[str, object]]:
    """Each bar with its value, all of them the most that may be."""
    differ = sum(answer.token_ids != expected.token_ids for expected, answer in found.pairs)
    num_odd = sum(len(answer.token_ids) != ANSWER_TOKENS for answer in found.answers)
    bars = [
        verdict("answers that did not end whole", sum(not answer.is_whole for answer in found.answers), 0),
        verdict("answers with tokens lost or doubled", num_odd, 0),
        verdict("growth of the front in MiB", found.grown_mib, FRONT_MIB),
        verdict("tracebacks in the log", len(found.tracebacks), 0),
        verdict("kills or cuts that are missing", found.num_missing, 0),
    ]
    return [verdict("answers that differ from the undisturbed", differ, 0), *bars] if together == 1 else bars


def parts_at(expected: Answer, answer: Answer) -> int | None:
    """The place of the first token that another stands in the place of; None where there is none."""
    pairs = zip(expected.token_ids, answer.token_ids, strict=False)
    same = sum(1 for _ in takewhile(lambda pair: pair[0] == pair[1], pairs))
    return None if answer.token_ids == expected.token_ids else same


def row(found: Found, bars: list[dict[str, object]], setup: dict[str, object]) -> dict[str, object]:
    """What came of one run, as JSON."""
    pairs, answers = found.pairs, found.answers
    places = [parts_at(expected, answer) for expected, answer in pairs]
    return {
        "setup": setup,
        "date": report.environment()["date"],
        "bars": bars,
        "answers": len(answers),
        "equal": places.count(None),
        "parted": [
            {
                "number": number,
                "at_kill": answers[number].at_kill,
                "parts_at": place,
                "token_ids": [one.token_ids[place : place + 1] for one in pairs[number]],
            }
            for number, place in enumerate(places)
            if place is not None
        ],
        "num_cuts": sum(answer.num_cuts for answer in answers),
        "at_kill": spread([answer.at_kill for answer in answers]),
        "pause_s": spread([round(answer.pause_s, 2) for answer in answers]),
        "front_mib": [round(mib, 2) for mib in found.front_mib[:: -(-len(found.front_mib) // MOST_READINGS)]],
    }


def with_row(path: Path, new: dict[str, object]) -> list[object]:
    """The rows of a file of results, with this one in place of an earlier one of its setup."""
    rows: list[Any] = json.loads(path.read_text())["results"]["rows"] if path.exists() else []
    return [*(row for row in rows if row["setup"] != new["setup"]), new]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    what = parser.add_mutually_exclusive_group()
    what.add_argument("--kills", type=int, default=200)
    what.add_argument("--cuts", type=int, default=0, help="cut so many sockets instead")
    parser.add_argument("--together", type=int, default=1, help="answers that one kill hits")
    parser.add_argument("--texts", type=int, default=40, help="answers that are asked for in turn")
    parser.add_argument("--forked", action="store_true", help="engines that need no imports: bench/forked_engines.py")
    parser.add_argument("--threads", type=int, default=0, help="of the engine; 0 is one per physical core")
    parser.add_argument("--gguf-engine", default="auto", choices=get_args(GgufEngine), help="what runs a .gguf file")
    add_model_options(parser)
    parser.add_argument("--seed", type=int, default=0, help="of the tokens at which engines are killed")
    parser.add_argument("--name", default="resume", help="results go to bench/results/NAME.json")
    options = parser.parse_args()
    end_servers_when_told()
    with tempfile.TemporaryDirectory() as place:
        model = chosen_model(options, Path(place))
        try:
            bars = measure(model, Path(place), options)
        except StartFailed as error:
            raise SystemExit(f"{error}; the server's log is in build/") from None
    print(report.RESULTS / f"{options.name}.json")
    print("\n".join(map(line, bars)))


def measure(model: Path, folder: Path, options: argparse.Namespace) -> list[dict[str, object]]:
    """Ask all of both servers, and write the row as it grows; returns its bars. Raises StartFailed."""
    flags = ["--max-num-seqs", "4", "--max-model-len", "512", "--threads", str(options.threads)]
    flags += ["--gguf-engine", options.gguf_engine]
    num = options.cuts or options.kills
    setup: dict[str, object] = {
        "model": model.name,
        "gguf_engine": options.gguf_engine,
        **({"cuts": num} if options.cuts else {"kills": num, "together": options.together}),
        "texts": options.texts,
        "forked": options.forked,
        "threads": options.threads,
        "seed": options.seed,
    }
    (folder / "a").mkdir()
    log = f"{options.name}-{model.stem}-{options.gguf_engine}"  # Runs may be beside each other.
    with serving(model, folder / "a", f"{log}-undisturbed", flags) as served:
        expected = asyncio.run(undisturbed(served, options.texts))
    bars: list[dict[str, object]] = []
    path = report.RESULTS / f"{options.name}.json"
    with serving(model, folder, log, flags, are_forked=options.forked) as served:

        def tell(answers: Sequence[Answer], mib: Sequence[float], num_so_far: int) -> None:
            tracebacks = last_lines_of_tracebacks(served.log.read_text(errors="replace"))
            found = Found(expected, answers, mib, tracebacks, max(0, num - num_so_far))
            bars[:] = verdicts(found, options.together)
            report.write(options.name, {"rows": with_row(path, row(found, bars, setup))})

        if options.cuts:
            asyncio.run(interrupted(served, num, options.texts, options.seed, tell))
        else:
            asyncio.run(disturbed(served, num, options.together, options.texts, options.seed, tell))
    return bars


if __name__ == "__main__":
    main()
