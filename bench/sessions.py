"""What a long chat's next turn takes once the chat has left the cache: python -m bench.sessions MODEL [MODEL ...]

For each model, with chats of about 3,500 tokens of English and greedy answers:

- two chats alternate on a cache that holds one, and come back from the host's memory;
- everything is killed with -9 once a chat is on disk, and started anew; the answer is held to the one that
  was given before the kill. Another chat comes back from disk beside a stream, whose longest pause is told.

Bars: the first token within 15 % of what it takes cold through memory, and within 10 % from disk; the same text; and a
chat is on disk within five seconds of its answer. With --kills N the engine is killed so often, shared among the
models, while chats are written (bench/session_kills.py): no token may be wrong. Writes bench/results/sessions.json, in
place of what is there of the same models and engine.
"""

import argparse
import asyncio
import json
import os
import shutil
import statistics
import tempfile
import time
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any, get_args

import psutil
from tqdm import tqdm

from bench import report
from bench.english import english_text
from bench.meter import process_tree
from bench.peers import end_servers_when_told
from bench.served import serving
from bench.session_kills import measure_kills
from bench.sse import Answer, stream
from tightrope.backends.settings import GgufEngine

WINDOW, CACHE = 4096, 4096  # tokens
CHARS = 15_500  # about 3,500 tokens of this text
HOST_MIB = 1024
OPTIONS = ("--max-model-len", str(WINDOW), "--kv-cache-tokens", str(CACHE), "--host-cache-mib", str(HOST_MIB))
THROUGH_MEMORY, FROM_DISK, ON_DISK_S = 0.15, 0.10, 5.0  # the bars
NEIGHBOUR, NEIGHBOUR_S = "Once upon a time", 0.5  # The other stream, and how long it has run when the chat comes back.
MOST_WAIT_S, STILL_S, POLL_S = 60.0, 1.5, 0.02
TURNS = ("\n\nSay it once more, in other words.\n\n", "\n\nAnd what follows from that?\n\n")


@dataclass(frozen=True, slots=True)
class Chat:
    """A prompt, and those of the turns after it."""

    prompts: tuple[str, ...]

    @classmethod
    def of(cls, number: int) -> "Chat":
        text = english_text()[number * 2 * CHARS :][:CHARS]
        return cls((text, text + TURNS[0], text + TURNS[0] + TURNS[1]))


async def ask(url: str, prompt: str) -> Answer:
    body = {"prompt": prompt, "max_tokens": 32, "temperature": 0, "stream_options": {"include_usage": True}}
    return await stream(url, "/v1/completions", {**body, "stream": True})


def row(turn: str, answer: Answer, cold: Answer) -> dict[str, object]:
    return {
        "turn": turn,
        "prompt_tokens": answer.prompt_tokens,
        "cached_tokens": answer.cached_tokens,
        "ttft_s": round(answer.ttft_s, 3),
        "of_cold": round(answer.ttft_s / cold.ttft_s, 4),
    }


def written_after_s(folder: Path, done_s: float) -> tuple[float, int]:
    """Seconds from a moment of `time.time` to the last change of the folder, and its bytes, once all is still.

    Nobody is waited for longer than MOST_WAIT_S.
    """
    last, still_since = (0.0, 0), time.monotonic()
    began = still_since
    while time.monotonic() - still_since < STILL_S and time.monotonic() - began < MOST_WAIT_S:
        found = [entry.stat() for entry in os.scandir(folder) if entry.name.endswith(".run")]
        state = (max((status.st_ctime for status in found), default=0.0), sum(status.st_size for status in found))
        if state != last or not found:
            last, still_since = state, time.monotonic()
        time.sleep(POLL_S)
    return last[0] - done_s, last[1]


def through_memory(model: Path, engine: str, folder: Path, bar: tqdm) -> list[dict[str, object]]:
    """Two chats in turns on a cache that holds one."""
    options = [*OPTIONS, "--gguf-engine", engine]
    first, second = Chat.of(0), Chat.of(1)

    async def turns(url: str) -> list[dict[str, object]]:
        asked = []
        for prompt in (first.prompts[0], first.prompts[1], second.prompts[0], first.prompts[2], second.prompts[1]):
            asked.append(await ask(url, prompt))
            bar.update()
        cold, stayed, cold_second, back, back_second = asked
        return [
            row("first, cold", cold, cold),
            row("first, from the cache", stayed, cold),
            row("second, cold", cold_second, cold_second),
            row("first, through memory", back, cold),
            row("second, through memory", back_second, cold_second),
        ]

    with serving(model, folder, "sessions-memory", options) as served:
        return asyncio.run(turns(served.url))


def from_disk(model: Path, engine: str, folder: Path, bar: tqdm) -> dict[str, object]:
    """A chat over a kill of everything, which finds what was on disk when its first turn had ended.

    Its second turn is asked for before the kill as well: prompts are read in pieces by the clock, which round
    differently, so that only what follows on the same cached tokens has to be the same text.
    """
    chats, then = folder / "chats", folder / "then"
    options = [*OPTIONS, "--gguf-engine", engine]
    chat, other = Chat.of(0), Chat.of(1)
    with serving(model, folder, "sessions-killed", [*options, "--session-dir", str(chats)]) as served:
        asyncio.run(ask(served.url, other.prompts[0]))
        cold = asyncio.run(ask(served.url, chat.prompts[0]))
        written_s, num_bytes = written_after_s(chats, time.time())
        bar.update()
        shutil.copytree(chats, then)
        stayed = asyncio.run(ask(served.url, chat.prompts[1]))
        for process in process_tree(served.process.pid):
            with suppress(psutil.NoSuchProcess):
                process.kill()
        served.process.wait()
    (folder / "temp").rename(folder / "temp-killed")
    with serving(model, folder, "sessions-restarted", [*options, "--session-dir", str(then)]) as served:
        back = asyncio.run(ask(served.url, chat.prompts[1]))
        beside = asyncio.run(beside_a_stream(served.url, other.prompts[1]))
        bar.update()
    return {
        "beside_a_stream": beside,
        "cold": row("cold", cold, cold),
        "after_kill": row("after kill -9 and restart", back, cold),
        "same_text": back.text == stayed.text,
        "written_s": round(written_s, 2),
        "disk_mib": round(num_bytes / (1 << 20), 1),
    }


async def beside_a_stream(url: str, prompt: str) -> dict[str, object]:
    """How long a stream pauses while a chat comes back from disk."""
    body = {"prompt": NEIGHBOUR, "max_tokens": 400, "temperature": 0, "ignore_eos": True}
    enough = asyncio.Event()
    neighbour = asyncio.create_task(stream(url, "/v1/completions", body, enough))
    await asyncio.sleep(NEIGHBOUR_S)
    answer = await ask(url, prompt)
    enough.set()
    arrivals = (await neighbour).arrivals_s
    gaps = list(pairwise(arrivals))
    beside = [late - early for early, late in gaps if late > answer.sent_s and early < answer.arrivals_s[0]]
    return {
        "cached_tokens": answer.cached_tokens,
        "ttft_s": round(answer.ttft_s, 3),
        "longest_pause_s": round(max(beside), 3),
        "median_s": round(statistics.median(late - early for early, late in gaps), 3),
    }


def measure(model: Path, engine: str, bar: tqdm) -> dict[str, object]:
    with tempfile.TemporaryDirectory() as folder:
        (Path(folder) / "memory").mkdir()
        (Path(folder) / "disk").mkdir()
        rows = through_memory(model, engine, Path(folder) / "memory", bar)
        disk = from_disk(model, engine, Path(folder) / "disk", bar)
    after_kill = disk["after_kill"]
    assert isinstance(after_kill, dict)
    shares = [float(str(found["of_cold"])) for found in rows if "through memory" in str(found["turn"])]
    bars = {
        "through memory": max(shares) <= THROUGH_MEMORY,
        "from disk": after_kill["of_cold"] <= FROM_DISK,
        "same text": disk["same_text"],
        "written in time": float(str(disk["written_s"])) <= ON_DISK_S,
    }
    return {"model": model.name, "gguf_engine": engine, "memory": rows, "disk": disk, "bars": bars}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("models", type=Path, nargs="+", metavar="MODEL", help="path of a .gguf file or model folder")
    parser.add_argument("--name", default="sessions", help="of the file in bench/results (default: sessions)")
    parser.add_argument("--gguf-engine", default="auto", choices=get_args(GgufEngine), help="what runs .gguf files")
    parser.add_argument("--kills", type=int, metavar="N", help="kill N times while chats are written, and no more")
    parser.add_argument("--forked", action="store_true", help="engines that need no imports: bench/forked_engines.py")
    options = parser.parse_args()
    end_servers_when_told()
    path = report.RESULTS / f"{options.name}.json"
    models = [model.resolve() for model in options.models]
    if options.kills:
        measure_kills(
            models,
            options.gguf_engine,
            options.kills,
            are_forked=options.forked,
            write=lambda found: write_kills(path, found),
        )
        return
    with tqdm(total=7 * len(models), desc="turns", disable=None) as bar:
        for model in models:  # What ends a run takes one model along at most.
            row = measure(model, options.gguf_engine, bar)
            parts = results_of(path)
            report.write(options.name, {**parts, "chats": merged(parts.get("chats", []), [row])})
            bar.write(f"{model.name}: {row['bars']}")
    print(path)


def results_of(path: Path) -> dict[str, Any]:
    """What is there already."""
    found: dict[str, Any] = json.loads(path.read_text())["results"] if path.exists() else {}
    return found


def merged(rows: Sequence[Mapping[str, Any]], new: Sequence[Mapping[str, Any]]) -> list[Mapping[str, Any]]:
    """The rows with new ones in place of those of the same models and engines."""
    names = {(row["model"], row["gguf_engine"]) for row in new}
    return [*(row for row in rows if (row["model"], row["gguf_engine"]) not in names), *new]


def write_kills(path: Path, found: Mapping[str, Any]) -> None:
    """Put what came of kills beside the rest, which keeps the machine and the date that it was measured on."""
    written: dict[str, Any] = json.loads(path.read_text()) if path.exists() else {**report.environment(), "results": {}}
    models = merged(written["results"].get("kills", {}).get("models", []), found["models"])
    written["results"]["kills"] = {
        **found,
        "models": models,
        "num_kills": sum(row["kills"] for row in models),
        "bar": not any(row["wrong"] or row["tracebacks"] for row in models),
    }
    report.replace(path, written)


if __name__ == "__main__":
    main()
