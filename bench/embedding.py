"""What vectors of texts cost the chats beside them: python -m bench.embedding EMBEDDING_MODEL [--model MODEL]

A server with both models writes an answer alone, and then one while 100 texts of some 120 words are embedded by
requests one after another, for half a minute at most. Bar: no token of the answer comes more than 0.3 s later than the
one before. Told besides: the answer's speed, how long the texts take with and without it, and the memory of the second
process, as it was loaded and at the end, beside what `plan` says. Writes bench/results/embedding.json.
"""

import argparse
import asyncio
import json
import tempfile
import time
from contextlib import suppress
from pathlib import Path

import psutil

from bench import report
from bench.compare import bundled_model
from bench.english import english_text
from bench.load import exclusive
from bench.meter import measured_cores, process_tree
from bench.peers import end_servers_when_told
from bench.served import serving
from bench.sse import Answer, exchange, stream
from bench.stats import spread
from tightrope.backends.embedding.opening import footprints, taken_bytes
from tightrope.backends.settings import EmbeddingSettings, ModelSettings

NUM_TEXTS, CHARS = 100, 700
NUM_TOKENS, MOST_TOKENS = 200, 6000  # Of the answer alone, and of one that goes on as long as there are texts.
NUM_REQUESTS, BESIDE_S = 3, 30.0
BAR_S = 0.3
CHILD = "tightrope.engine.embedding.child"


def texts() -> list[str]:
    whole = english_text()
    return [whole[number * CHARS :][:CHARS] for number in range(NUM_TEXTS)]


async def embed(url: str) -> float:
    """Seconds for all texts in one request."""
    reply = await exchange(url, "/v1/embeddings", json.dumps({"input": texts()}).encode())
    assert reply.status == 200, reply.body[:200]
    return reply.done_s - reply.sent_s


async def embed_again(url: str) -> list[float]:
    """The same of up to NUM_REQUESTS requests, as many as are answered in BESIDE_S."""
    taken_s: list[float] = []
    with suppress(TimeoutError):
        async with asyncio.timeout(BESIDE_S):
            while len(taken_s) < NUM_REQUESTS:
                taken_s.append(await embed(url))
    return taken_s


async def write(url: str, num_tokens: int, until: asyncio.Event | None = None) -> Answer:
    body: dict[str, object] = {"prompt": "Once upon a time", "max_tokens": num_tokens, "ignore_eos": True}
    return await stream(url, "/v1/completions", body, until)


def gaps(answer: Answer) -> dict[str, float]:
    waits = [late - early for early, late in zip(answer.arrivals_s, answer.arrivals_s[1:], strict=False)]
    return {
        "tokens_per_s": round(1 / answer.tpot_s, 1),
        "median_gap_s": round(spread(waits)["median"], 4),
        "largest_gap_s": round(max(waits), 4),
    }


async def measure(url: str, pid: int) -> dict[str, object]:
    await write(url, NUM_TOKENS)  # Everything is warm behind this.
    alone = await write(url, NUM_TOKENS)
    alone_s = await embed(url)
    is_over = asyncio.Event()
    writing = asyncio.create_task(write(url, MOST_TOKENS, is_over))
    await asyncio.sleep(0.5)
    with measured_cores(pid) as cores:
        busy_s = await embed_again(url)
    is_over.set()
    beside = gaps(await writing)
    return {
        "alone": gaps(alone),
        "beside": beside,
        "texts_alone_s": round(alone_s, 2),
        "texts_beside_s": [round(one, 2) for one in busy_s] or f"more than {BESIDE_S:.0f}",
        "cores_beside": {name: round(value, 2) for name, value in cores.items()},
        "bar_s": BAR_S,
        "met": beside["largest_gap_s"] <= BAR_S,
    }


def private_bytes(pid: int) -> int:
    """Of the process that embeds."""
    (child,) = (process for process in process_tree(pid) if CHILD in process.cmdline())
    found: int = psutil.Process(child.pid).memory_full_info().uss
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("embedding_model", type=Path)
    parser.add_argument("--model", type=Path, help="the chat model; default: the bundled one")
    parser.add_argument("--lock", type=Path, help="lock file to hold while measuring")
    args = parser.parse_args()
    end_servers_when_told()
    model = args.model or bundled_model()
    settings = ModelSettings(embedding=EmbeddingSettings(models=(str(args.embedding_model),)))
    options = ("--embedding-model", str(args.embedding_model))
    began_s = time.perf_counter()
    with (
        exclusive(args.lock),
        tempfile.TemporaryDirectory() as folder,
        serving(model, Path(folder), "embedding", options) as served,
    ):
        loaded_mib = private_bytes(served.process.pid) >> 20
        found = asyncio.run(measure(served.url, served.process.pid))
        found |= {"loaded_mib": loaded_mib, "private_mib": private_bytes(served.process.pid) >> 20}
    found["planned_mib"] = taken_bytes(footprints(settings)) >> 20
    print(json.dumps(found, indent=1), f"{time.perf_counter() - began_s:.0f} s")
    print(report.write("embedding", {**report.known("embedding"), args.embedding_model.name: found}))


if __name__ == "__main__":
    main()
