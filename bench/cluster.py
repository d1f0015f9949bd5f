"""Two replicas behind one front: whose tokens chats find, what survives a replica's end, and what the front costs.

    python -m bench.cluster [--only chats kills restart first-byte speed fake] [--kills 20] [--short]

All runs on this machine, by `tightrope cluster`. Writes bench/results/cluster.json; parts that are left out stay as
they were measured before.
"""

import argparse
import asyncio
import json
import random
import re
import signal
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from statistics import median

import httpx
import psutil

from bench import report
from bench.compare import bundled_model
from bench.meter import process_tree
from bench.peers import ROOT, end_servers_when_told, finding_ours, free_port, started
from bench.sse import Answer, stream
from bench.stats import spread

Result = dict[str, object]

REPLICAS = 2
CHATS, TURNS = 8, 5
START_S = 300.0
OPTIONS = ("--threads", "1", "--max-model-len", "2048", "--kv-cache-tokens", "16384", "--log-level", "warning")
WORDS = ["harbour", "lantern", "winter", "granite", "orchard", "compass", "thunder", "velvet", "meadow", "cinder"]
POLL_S = 0.1
# The bars.
FIRST_BYTE_S, SPEED, FAKE_SPEED = 0.005, 0.90, 0.97
PAGE = 32  # Tokens are found by whole pages, of which the last may be begun.


# ---- servers ----


@contextmanager
def server(kind: str, *options: str, module: str = "tightrope", model: Sequence[str] = ()) -> Iterator[str]:
    """A server of ours, `serve` or `cluster`, until the block ends; its URL."""
    port, log = free_port(), ROOT / "build" / f"cluster-{kind}.log"
    log.parent.mkdir(exist_ok=True)
    url = f"http://127.0.0.1:{port}"
    command = [sys.executable, "-m", module, kind, *model, "--port", str(port), *options]
    with log.open("w+") as output, started(command, f"{url}/health", output, finding_ours(), START_S) as process:
        if kind == "cluster":
            until(lambda: num_up(url) == REPLICAS)
        PIDS[url] = process.pid
        yield url


PIDS: dict[str, int] = {}  # Of each server's front.


def num_up(url: str) -> int:
    return sum(int(float(value)) for value in of_replicas(url, "up").values())


def of_replicas(url: str, name: str) -> dict[str, str]:
    """What /metrics says of each replica."""
    text = httpx.get(f"{url}/metrics").text
    return dict(re.findall(rf'^tightrope_replica_{name}{{replica="([^"]+)"}} (\S+)$', text, re.MULTILINE))


def until(holds: Callable[[], bool], most_s: float = START_S) -> float:
    """Seconds until it does."""
    began_s = time.monotonic()
    while not holds():
        if time.monotonic() - began_s > most_s:
            raise TimeoutError("it took too long")
        time.sleep(POLL_S)
    return time.monotonic() - began_s


def replica_processes(url: str) -> list[psutil.Process]:
    """Ray's actors that hold replicas; each has an engine as its child."""
    tree = process_tree(PIDS[url])
    return [process for process in tree if "ServeReplica" in " ".join(process.cmdline()[:1])]


def completion(prompt: str, max_tokens: int, **more: object) -> dict[str, object]:
    return {"prompt": prompt, "max_tokens": max_tokens, "temperature": 0, "ignore_eos": True, **more}


async def ask(url: str, body: dict[str, object]) -> Answer:
    return await stream(url, "/v1/completions", {**body, "stream": True, "stream_options": {"include_usage": True}})


# ---- chats find their tokens ----


async def chats(url: str) -> Result:
    """CHATS chats at once, TURNS turns each; a follow-up should find all that its chat has computed before."""

    async def chat(number: int) -> list[tuple[int, int]]:
        draw, before, turns = random.Random(number), 0, []
        text = f"Chat {number}. " + " ".join(draw.choices(WORDS, k=100))
        for _ in range(TURNS):
            answer = await ask(url, completion(text, 32))
            turns.append((answer.cached_tokens, before))
            text += answer.text + " " + " ".join(draw.choices(WORDS, k=30))
            before = answer.prompt_tokens + answer.num_tokens
        return turns

    every = [turn for turns in await asyncio.gather(*map(chat, range(CHATS))) for turn in turns[1:]]
    found = [cached >= before - PAGE for cached, before in every]
    return {
        "chats": CHATS,
        "turns": TURNS,
        "follow_ups": len(every),
        "found_their_chat": sum(found),
        "tokens_found": sum(cached for cached, _ in every),
        "tokens_computed_before": sum(before for _, before in every),
        "prompts_by_replica": sorted(int(float(value)) for value in of_replicas(url, "prompt_tokens_total").values()),
        "met": all(found),
    }


# ---- kills ----


async def kills(url: str, num_kills: int) -> Result:
    """Four answers at a time, a replica killed with -9 while they are written: each text as without the kill."""
    draw, equal, moved, back_s = random.Random(17), 0, 0, []
    for number in range(num_kills):
        bodies = [completion(f"Story {number}-{i}: {' '.join(draw.choices(WORDS, k=20))}", 120) for i in range(4)]
        undisturbed = [(await ask(url, body)).text for body in bodies]
        lost_before = await lost(url)
        answers = [asyncio.create_task(ask(url, body)) for body in bodies]
        await running(url, 4)
        await asyncio.sleep(draw.uniform(0.1, 1.5))
        draw.choice(replica_processes(url)).send_signal(signal.SIGKILL)
        texts = [answer.text for answer in await asyncio.gather(*answers)]
        equal += sum(text == other for text, other in zip(texts, undisturbed, strict=True))
        moved += await lost(url) > lost_before
        back_s.append(await asyncio.to_thread(until, lambda: num_up(url) == REPLICAS))
    return {
        "kills": num_kills,
        "kills_seen": moved,
        "answers": 4 * num_kills,
        "equal_texts": equal,
        "replica_back_s": spread(back_s),
        "met": equal == 4 * num_kills and moved == num_kills,
    }


async def lost(url: str) -> int:
    async with httpx.AsyncClient() as client:
        found = re.search(r"^tightrope_engine_restarts_total (\S+)$", (await client.get(f"{url}/metrics")).text, re.M)
    assert found is not None
    return int(float(found[1]))


async def running(url: str, number: int) -> None:
    """Wait until so many are being written."""
    async with httpx.AsyncClient() as client:
        while f"tgi_batch_current_size {float(number)}" not in (await client.get(f"{url}/metrics")).text:
            await asyncio.sleep(0.02)


# ---- a rolling restart ----


async def restart(url: str) -> Result:
    """All replicas started anew, one after the other, while four clients ask one thing after another."""
    before, over = set(of_replicas(url, "up")), asyncio.Event()
    num_answers, refused = 0, []

    async def client(number: int) -> None:
        nonlocal num_answers
        while not over.is_set():
            try:
                await ask(url, completion(f"Client {number}, request {num_answers}", 24))
                num_answers += 1
            except Exception as error:  # Whatever it is, it is counted.
                refused.append(repr(error)[:200])

    clients = [asyncio.create_task(client(number)) for number in range(4)]
    psutil.Process(PIDS[url]).send_signal(signal.SIGHUP)

    def is_new() -> bool:
        return num_up(url) == REPLICAS and not before & {
            name for name, up in of_replicas(url, "up").items() if up != "0.0"
        }

    took_s = await asyncio.to_thread(until, is_new)
    over.set()
    await asyncio.gather(*clients)
    return {"took_s": took_s, "answers": num_answers, "refused": refused, "met": not refused}


# ---- what the front costs ----


async def first_byte(single: str, cluster: str, num_pairs: int) -> Result:
    """The time to the first event of short prompts, asked of one server and of the cluster in turns."""
    times: dict[str, list[float]] = {single: [], cluster: []}
    for number in range(num_pairs):
        for url in (single, cluster) if number % 2 else (cluster, single):
            prompt = f"{number} {url[-4:]} " + " ".join(random.choices(WORDS, k=8))
            times[url].append((await ask(url, completion(prompt, 2))).ttft_s)
    added = median(times[cluster]) - median(times[single])
    return {
        "requests_each": num_pairs,
        "single_server_s": spread(times[single]),
        "cluster_s": spread(times[cluster]),
        "added_s": added,
        "met": added <= FIRST_BYTE_S,
    }


async def tokens_per_s(urls: Sequence[str], streams: int, tokens: int) -> float:
    """So many streams, shared out over these servers, each with so many tokens."""
    bodies = [
        completion(f"{n} {random.random()} {' '.join(random.choices(WORDS, k=5))}", tokens) for n in range(streams)
    ]
    began_s = time.perf_counter()
    answers = await asyncio.gather(*(ask(urls[n % len(urls)], body) for n, body in enumerate(bodies)))
    return sum(answer.num_tokens for answer in answers) / (time.perf_counter() - began_s)


async def speed(direct: Sequence[str], cluster: str, bar: float, streams: int, tokens: int, rounds: int) -> Result:
    """Tokens a second of as many servers without a front of their own, and of the cluster, in turns."""
    found: dict[str, list[float]] = {"direct": [], "cluster": []}
    for urls in (direct, [cluster]):
        await tokens_per_s(urls, streams, 4)
    for _ in range(rounds):
        found["direct"].append(await tokens_per_s(direct, streams, tokens))
        found["cluster"].append(await tokens_per_s([cluster], streams, tokens))
    ratios = [one / other for one, other in zip(found["cluster"], found["direct"], strict=True)]
    return {
        "streams": streams,
        "tokens_each": tokens,
        "direct_tokens_per_s": spread(found["direct"]),
        "cluster_tokens_per_s": spread(found["cluster"]),
        "ratio": spread(ratios),
        "met": median(ratios) >= bar,
    }


# ---- the parts ----


def measure(parts: Sequence[str], num_kills: int, is_short: bool) -> Iterator[tuple[str, Result]]:
    """Each part's name and what it gave."""
    rounds = 1 if is_short else 5
    with ExitStack() as servers, tempfile.TemporaryDirectory() as folder:

        def ours(kind: str, *options: str) -> str:
            return servers.enter_context(server(kind, *OPTIONS, *options, model=[str(bundled_model())]))

        cluster = ""
        if set(parts) - {"fake"}:
            cluster = ours("cluster", "--replicas", str(REPLICAS), "--session-dir", folder)
        if "chats" in parts:
            yield "chats", asyncio.run(chats(cluster))
        if "kills" in parts:
            yield "kills", asyncio.run(kills(cluster, num_kills))
        if "restart" in parts:
            yield "restart", asyncio.run(restart(cluster))
        needs_direct = {"first-byte", "speed"} & set(parts)
        # They write chats to disk as the replicas do, so that the front is all that is measured.
        direct = [ours("serve", "--session-dir", f"{folder}/{n}") for n in range(REPLICAS) if needs_direct]
        if "first-byte" in parts:
            yield "first-byte", asyncio.run(first_byte(direct[0], cluster, 10 if is_short else 100))
        if "speed" in parts:
            yield "speed", asyncio.run(speed(direct, cluster, SPEED, 8, 32 if is_short else 128, rounds))
    if "fake" in parts:
        with ExitStack() as servers:

            def fake(kind: str, *options: str) -> str:
                return servers.enter_context(server(kind, "--max-num-seqs", "8", *options, module="bench.fake_model"))

            direct = [fake("serve") for _ in range(REPLICAS)]
            cluster = fake("cluster", "--replicas", str(REPLICAS))
            yield "fake", asyncio.run(speed(direct, cluster, FAKE_SPEED, 16, 50 if is_short else 250, rounds))


PARTS = ("chats", "kills", "restart", "first-byte", "speed", "fake")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", nargs="+", choices=PARTS, default=PARTS, help="these parts alone")
    parser.add_argument("--kills", type=int, default=20)
    parser.add_argument(
        "--short", action="store_true", help="a round of each, to see that all runs; nothing is written"
    )
    options = parser.parse_args()
    end_servers_when_told()
    for name, result in measure(options.only, options.kills, options.short):
        print(name, json.dumps(result, indent=2), flush=True)
        if not options.short:
            report.write("cluster", {**report.known("cluster"), name: result})


if __name__ == "__main__":
    main()
