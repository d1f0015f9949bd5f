"""A full window costs one message: python -m bench.full_window MODEL_FOLDER GGUF_FILE [--turns 30]

A role-play chat that has filled its window goes on, turn by turn, each time without its oldest messages (story.py):

- quality, in both engines: the divergence of what is predicted over moved tokens from a cold prefill, with moved
  tokens upon moved tokens for all turns, and with a chat that was exact the turn before, as it is when healed;
- needle: whether a message that was taken out is still known;
- speed: the time to the first token of each turn, from the torch engine with either, llama.cpp as tightrope drives it,
  and llama.cpp's own server with its reuse of shifted chunks (--cache-reuse), side by side in turns, with what a cold
  prefill of the same prompt takes.

Each row is written as soon as it is known (build/full_window.jsonl), where those of a part that is measured again are
replaced. Writes bench/results/full_window.json and .png.
"""

import argparse
import asyncio
import json
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import replace
from functools import partial
from pathlib import Path
from statistics import mean, median
from typing import Any

from tokenizers import Tokenizer
from tqdm import tqdm

from bench import needle, report
from bench.full_window_plot import draw
from bench.moved_quality import measure as measure_quality
from bench.peers import PEERS, ROOT, Peer, Setup, end_servers_when_told, running
from bench.sse import stream
from bench.story import Turn, story
from bench.workloads import Target
from tightrope.backends.settings import KVCacheDtype

WINDOW = 3000
THREADS = 2
REUSED_CHUNK = 256  # llama.cpp's server moves runs of at least so many tokens.
# Bars: of the tokens behind the new ones; times sooner than cold; nats; of the perplexity.
MOST_COMPUTED, LEAST_SPEEDUP = 0.04, 12.0
FIRST_KLD, FIRST_P99, MEAN_KLD, WORST_KLD, PERPLEXITY = 0.001, 0.01, 0.002, 0.008, 0.005

CACHES: Mapping[str, KVCacheDtype] = {"quality": "q8", "q4": "q4", "gguf": "f16"}
QUALITY_NAMES = {"quality": "torch engine, q8", "q4": "torch engine, q4", "gguf": "GGUF file through llama.cpp, f16"}
NUM_COMPARED = 4  # Turns of the GGUF file that are also read in smaller steps.
OURS = 2  # Chats that our servers have room for: those that are asked cold have their own.
COLD_EVERY = 4  # So often a turn is asked once more from a cold start, since the machine is not always the same.
NAMES = ("torch engine", "torch engine, GGUF", "llama.cpp, driven by tightrope", "llama.cpp server")
Rows = list[dict[str, Any]]


def _options(extra: Sequence[str], setup: Setup, port: int) -> list[str]:
    return [
        *("-m", "tightrope", "serve", str(setup.model), "--port", str(port), "--threads", str(setup.threads)),
        *("--max-model-len", str(setup.context), "--max-num-seqs", str(setup.slots), "--heal=off", *extra),
    ]


def _reusing_llama(setup: Setup, port: int) -> list[str]:
    return [*PEERS["llama.cpp server"].arguments(setup, port), "--cache-reuse", str(REUSED_CHUNK)]


def servers(folder: Path, gguf: Path) -> list[tuple[Peer, Setup]]:
    """The torch engine with the folder; both of our engines and llama.cpp's server with the GGUF file."""
    setup = Setup(gguf, THREADS, WINDOW + 512, 1, "f16")
    ours = replace(setup, slots=OURS)
    return [
        (Peer(NAMES[0], partial(_options, ("--kv-cache=q8",))), replace(ours, model=folder)),
        (Peer(NAMES[1], partial(_options, ("--kv-cache=q8", "--gguf-engine=own"))), ours),
        (Peer(NAMES[2], partial(_options, ("--kv-cache=f16", "--gguf-engine=llama.cpp"))), ours),
        (replace(PEERS[NAMES[3]], arguments=_reusing_llama), setup),
    ]


async def ask(target: Target, text: str, **fields: object) -> dict[str, Any]:
    body = {"prompt": text, "max_tokens": 1, "temperature": 0, "stream": True, "cache_prompt": True, **fields}
    answer = await stream(target.base_url, "/v1/completions", {**body, "stream_options": {"include_usage": True}})
    return {"ttft_s": round(answer.ttft_s, 3), "tokens": answer.prompt_tokens, "cached": answer.cached_tokens}


def speed(targets: Sequence[Target], turns: Sequence[Turn], count: Callable[[str], int]) -> Iterator[dict[str, Any]]:
    """A row for each turn and server; servers take turns, so that what else the machine does meets all of them."""
    for number, turn in enumerate(turns):
        for target in targets:
            told = {"part": "speed", "server": target.name, "turn": number, "new_tokens": count(turn.messages[-1][1])}
            yield {**told, "what": turn.what, **asyncio.run(ask(target, turn.text))}
            if number % COLD_EVERY == 1 and target.name != NAMES[-1]:  # There it would take the place of the chat.
                yield {**told, "what": "cold", **asyncio.run(ask(target, turn.text, cache_salt=f"cold {number}"))}


def make_room(path: Path, parts: Collection[str], asked: Collection[str]) -> None:
    """Take the rows of these parts out of the file, and of those of speed the rows of the servers that are asked."""
    caches = {CACHES[part] for part in parts if part in CACHES}
    lines = path.read_text("utf-8").splitlines() if path.exists() else []
    rows = [json.loads(line) for line in lines]

    def is_old(row: dict[str, Any]) -> bool:
        if row["part"] == "quality":
            return row["cache"] in caches
        return row["part"] in parts and (row["part"] != "speed" or row["server"] in asked)

    path.write_text("".join(f"{json.dumps(row)}\n" for row in rows if not is_old(row)), "utf-8")


def written(path: Path, parts: Iterator[dict[str, Any]], bar: tqdm) -> None:
    with path.open("a") as file:
        for row in parts:
            file.write(json.dumps(row) + "\n")
            file.flush()
            bar.update()


def counted(rows: Rows) -> Rows:
    """All but the turns behind one that was asked cold as well, which may have taken the chat's place in the cache."""
    last: dict[str, str] = {}
    result: Rows = []
    for row in rows:
        server = row.get("server", "")
        if last.get(server) != "cold again" or row["part"] != "speed":
            result.append(row)
        last[server] = "cold again" if row["what"] == "cold" and row.get("turn") else row["what"]
    return result


def judge(rows: Rows) -> dict[str, Any]:
    """What the turns come to that lose their oldest messages, and which bars that holds."""
    dropped = [row for row in rows if row["what"] == "the oldest go"]
    result: dict[str, Any] = {}
    bars: dict[str, bool] = {}
    for part in CACHES:
        if quality := [row for row in dropped if row["part"] == "quality" and row["cache"] == CACHES[part]]:
            result[QUALITY_NAMES[part]] = _quality_of(quality)
    if found := result.get(QUALITY_NAMES["quality"]):
        bars["first drop"] = found["first drop, mean"] <= FIRST_KLD
        bars["first drop, 99th percentile"] = found["first drop, 99th percentile, mean"] <= FIRST_P99
        bars["healed between turns"] = found["healed between turns, worst"] <= FIRST_KLD
        bars["unhealed, mean"] = found["unhealed, mean"] <= MEAN_KLD
        bars["unhealed, worst"] = found["unhealed, worst"] <= WORST_KLD
        bars["perplexity"] = abs(found["perplexity over cold"] - 1) <= PERPLEXITY
    for name in dict.fromkeys(row["server"] for row in dropped if row["part"] == "speed"):
        found = result[name] = _speed_of([row for row in rows if row.get("server") == name])
        if name != NAMES[-1]:
            bars[f"{name}, times sooner"] = found["times sooner"] >= LEAST_SPEEDUP
            bars[f"{name}, computed of the rest"] = found["computed of the rest"] <= MOST_COMPUTED
    if theirs := result.get(NAMES[-1]):
        for name in NAMES[:-1]:
            if name in result:
                bars[f"{name}, no later than llama.cpp's server"] = result[name]["ttft_s"] <= theirs["ttft_s"]
    return {**result, "bars": bars}


def _quality_of(turns: Rows) -> dict[str, float]:
    found = {
        "turns": len(turns),
        "first drop, mean": mean(row["first_kld"] for row in turns),
        "first drop, 99th percentile, mean": mean(row["first_kld_p99"] for row in turns),
        "healed between turns, worst": max(row["first_kld"] for row in turns),
        "unhealed, mean": mean(row["kld"] for row in turns),
        "unhealed, median": median(row["kld"] for row in turns),
        "unhealed, worst": max(row["kld"] for row in turns),
        "perplexity over cold": mean(row["perplexity"] for row in turns),
    }
    if steps := [row["step_kld"] for row in turns if row.get("step_kld") is not None]:
        found["cold in half steps, mean"] = mean(steps)
    return found


def _speed_of(rows: Rows) -> dict[str, float]:
    turns = [row for row in rows if row["what"] == "the oldest go"]
    cold_s = median(row["ttft_s"] for row in rows if row["what"] == "cold")
    ttft_s = median(row["ttft_s"] for row in turns)
    shares = [
        max(0, row["tokens"] - row["cached"] - row["new_tokens"]) / (row["tokens"] - row["new_tokens"]) for row in turns
    ]
    return {
        "turns": len(turns), "cold_s": cold_s, "ttft_s": ttft_s, "times sooner": cold_s / ttft_s,
        "computed of the rest": mean(shares),
    }  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path, help="model folder for the torch engine")
    parser.add_argument("gguf", type=Path, help="the same model as a GGUF file")
    parser.add_argument("--turns", type=int, default=30)
    parser.add_argument(
        "--part",
        choices=[*CACHES, "speed", "needle", "judge"],
        action="append",
        help="default: all; judge measures nothing",
    )
    parser.add_argument("--server", choices=NAMES, action="append", help="default: all")
    options = parser.parse_args()
    parts = options.part or [*CACHES, "speed", "needle"]
    end_servers_when_told()
    tokenizer = Tokenizer.from_file(str(options.folder / "tokenizer.json"))

    def count(text: str) -> int:
        return len(tokenizer.encode(text).ids)

    path = ROOT / "build" / "full_window.jsonl"
    path.parent.mkdir(exist_ok=True)
    asked = options.server or NAMES
    make_room(path, parts, asked)
    with tqdm(desc="rows", disable=None) as bar:
        for part, cache in CACHES.items():
            if part in parts:
                model, compared = (options.gguf, NUM_COMPARED) if part == "gguf" else (options.folder, 0)
                turns = measure_quality(model, cache, WINDOW, options.turns, THREADS, compared)
                written(path, ({"part": "quality", "cache": cache, **row} for row in turns), bar)
        if "needle" in parts:
            needles = needle.measure(options.folder, WINDOW, THREADS)
            written(path, ({"part": "needle", "what": "a message is taken out", **row} for row in needles), bar)
        if "speed" in parts:
            with ExitStack() as stack:
                started = [s for s in servers(options.folder, options.gguf) if s[0].name in asked]
                targets = [stack.enter_context(running(*server)) for server in started]
                written(path, speed(targets, list(story(WINDOW, options.turns, count)), count), bar)
    rows = counted([json.loads(line) for line in path.read_text("utf-8").splitlines()])
    found = judge(rows)
    print(json.dumps(found, indent=2))
    print(report.write("full_window", {"window": WINDOW, "rows": rows, "found": found}))
    draw(rows, found, report.RESULTS / "full_window.png")


if __name__ == "__main__":
    main()
