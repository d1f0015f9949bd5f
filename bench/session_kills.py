"""The engine is killed with -9 while it writes chats, again and again: no answer may be another than without.

The next one goes on with the answer that is under way, and with the folder as it finds it.
"""

import asyncio
import os
import random
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import asdict, dataclass, field
from pathlib import Path

import httpx
from tqdm import tqdm

from bench import report
from bench.english import english_text
from bench.served import Served, last_lines_of_tracebacks, serving
from bench.watch import engine_process

NUM_CHATS, NUM_TURNS = 12, 4
FIRST_CHARS, TURN_CHARS, ANSWER_TOKENS = 1200, 500, 12
WINDOW = 1024
OPTIONS = ["--max-model-len", str(WINDOW), "--kv-cache-tokens", str(2 * WINDOW)]
DISK_MIB = 64  # The folder is full after some lives, so that old chats go, too.
MOST_ANSWERS = 3  # In one life, and one that is killed.
MOST_WAIT_S, MOST_FILE_WAIT_S = 0.06, 2.0  # The kill comes so long after the last answer begins, or as a file does.
PATIENCE_S = 900  # For an answer.
TIE = 0.1  # Nats: where two tokens are as likely as that, the steps that a prompt is read in decide between them.


@dataclass(frozen=True, slots=True)
class Said:
    """An answer, token by token: the text of each, and the logarithms of probability of the likeliest."""

    tokens: tuple[str, ...]
    likeliest: tuple[dict[str, float], ...]
    num_cached: int

    def parts_from(self, other: "Said") -> tuple[int, float | None] | None:
        """Where they part, and by how many nats the token there is less likely than the other's; None where nowhere.

        No number of nats where it isn't among the likeliest, or one of the answers ends there.
        """
        for place, (mine, theirs) in enumerate(zip(self.tokens, other.tokens, strict=False)):
            if mine != theirs:
                likely = other.likeliest[place]
                return place, likely[theirs] - likely[mine] if mine in likely else None
        num_common = min(len(self.tokens), len(other.tokens))
        return (num_common, None) if len(self.tokens) != len(other.tokens) else None


@dataclass(slots=True)
class Counts:
    """What was seen in all lives of an engine."""

    kills: int = 0
    kills_within_a_file: int = 0  # A file that was begun and not finished was left behind.
    answers: int = 0
    answers_from_disk: int = 0  # Some of their prompt was cached before anything was asked of that life.
    equal: int = 0
    ties: int = 0
    wrong: int = 0
    tracebacks: int = 0
    parted: list[dict[str, object]] = field(default_factory=list)


def prompt_of(chat: int, turn: int) -> str:
    text = english_text()
    start = chat * (FIRST_CHARS + NUM_TURNS * TURN_CHARS)
    return text[start : start + FIRST_CHARS + turn * TURN_CHARS]


async def ask(client: httpx.AsyncClient, url: str, prompt: str) -> Said:
    body = {"prompt": prompt, "max_tokens": ANSWER_TOKENS, "temperature": 0, "logprobs": 5, "ignore_eos": True}
    while (reply := await client.post(f"{url}/v1/completions", json=body)).status_code == 503:
        await until_well(client, url)  # The kill came before it.
    reply.raise_for_status()
    answer = reply.json()
    logprobs = answer["choices"][0]["logprobs"]
    cached = answer["usage"]["prompt_tokens_details"]["cached_tokens"]
    return Said(tuple(logprobs["tokens"]), tuple(logprobs["top_logprobs"]), cached)


def unfinished(folder: Path) -> list[str]:
    """The files that are being written, or were when their process was killed."""
    return [name for name in os.listdir(folder) if name.startswith(".")]


def wait_for_file(folder: Path) -> None:
    """Wait until a file is being written, but not for long."""
    end_s = time.monotonic() + MOST_FILE_WAIT_S
    while not unfinished(folder) and time.monotonic() < end_s:
        pass


class Lives:
    """The lives of an engine over one folder of chats, each ended by a kill, beside one without that is left alone."""

    def __init__(self, setup: Mapping[str, object], served: Served, chats: Path, plain: Served, seed: int) -> None:
        self.counts, self._setup, self._seed = Counts(), setup, seed
        self._served, self._chats, self._plain = served, chats, plain
        self._chance = random.Random(seed)
        self._last: list[tuple[int, int]] = []  # The next turns of what was written last.
        self._expected: dict[tuple[int, int], Said] = {}

    async def next(self) -> None:
        """Live once more: ask for the turns after the last ones, and then for others, until it is time to kill."""
        counts, seen = self.counts, set[int]()
        said: list[tuple[int, int]] = []
        most = self._chance.randint(1, MOST_ANSWERS)
        async with httpx.AsyncClient(timeout=PATIENCE_S) as client:
            await until_well(client, self._served.url)
            for number in range(most + 1):
                chat, turn = self._choose(number, said)
                asked = asyncio.create_task(ask(client, self._served.url, prompt_of(chat, turn)))
                if number == most:
                    await self._kill()
                answer = await asked
                counts.answers_from_disk += number < most and chat not in seen and answer.num_cached > 0
                seen.add(chat)
                said.append((chat, turn))
                what = {"chat": chat, "turn": turn, "is_killed": number == most, "num_cached": answer.num_cached}
                count(counts, answer, await self._undisturbed(client, chat, turn), what)
        counts.tracebacks = len(last_lines_of_tracebacks(self._served.log.read_text()))
        self._last = [(chat, min(turn + 1, NUM_TURNS - 1)) for chat, turn in said[-2:]]

    def _choose(self, number: int, said: Sequence[tuple[int, int]]) -> tuple[int, int]:
        if number < len(self._last):
            return self._last[number]
        if said and self._chance.random() < 0.7:  # A chat goes on.
            return said[-1][0], (said[-1][1] + 1) % NUM_TURNS
        return self._chance.randrange(NUM_CHATS), 0

    async def _kill(self) -> None:
        """Kill the engine at a random moment, or in the middle of a file."""
        engine = engine_process(self._served.process.pid)
        assert engine is not None
        if self._chance.random() < 0.5:
            await asyncio.to_thread(wait_for_file, self._chats)
        else:
            await asyncio.sleep(MOST_WAIT_S * self._chance.random() ** 3)
        engine.kill()
        engine.wait()
        left = unfinished(self._chats)
        for file in left:
            (self._chats / file).unlink()
        self.counts.kills += 1
        self.counts.kills_within_a_file += bool(left)

    async def _undisturbed(self, client: httpx.AsyncClient, chat: int, turn: int) -> Said:
        if (chat, turn) not in self._expected:
            self._expected[chat, turn] = await ask(client, self._plain.url, prompt_of(chat, turn))
        return self._expected[chat, turn]

    def told(self) -> dict[str, object]:
        return {**self._setup, "seed": self._seed, **asdict(self.counts)}


async def until_well(client: httpx.AsyncClient, url: str) -> None:
    while (await client.get(f"{url}/health")).status_code != 200:
        await asyncio.sleep(0.02)


def count(counts: Counts, answer: Said, expected: Said, what: Mapping[str, object]) -> None:
    """what: tells one that parts from the expected."""
    counts.answers += 1
    if (parts := answer.parts_from(expected)) is None:
        counts.equal += 1
        return
    place, nats = parts
    is_tie = nats is not None and nats <= TIE
    counts.ties += is_tie
    counts.wrong += not is_tie
    counts.parted.append({**what, "place": place, "nats": None if nats is None else round(nats, 4)})


def measure_kills(
    models: Sequence[Path], engine: str, num_kills: int, *, are_forked: bool, write: Callable[[dict[str, object]], None]
) -> None:
    """Kill so often, one model after the other; `write` is given what was counted after each.

    engine: what runs GGUF files. are_forked: see bench/forked_engines.py.
    """
    seed = int(time.time())
    with ExitStack() as stack:
        lives = []
        for number, model in enumerate(models):
            folder = Path(stack.enter_context(tempfile.TemporaryDirectory()))
            (folder / "plain").mkdir()
            name = f"session-kills-{model.stem}-{engine}"
            options = [*OPTIONS, "--gguf-engine", engine]
            kept = ["--session-dir", str(folder / "chats"), "--session-disk-mib", str(DISK_MIB)]
            plain = stack.enter_context(serving(model, folder / "plain", f"{name}-plain", options))
            served = stack.enter_context(serving(model, folder, name, [*options, *kept], are_forked=are_forked))
            setup = {"model": model.name, "gguf_engine": engine, "forked": are_forked}
            lives.append(Lives(setup, served, folder / "chats", plain, seed + number))
        for number in tqdm(range(num_kills), desc="kills", disable=None):
            asyncio.run(lives[number % len(lives)].next())
            write({**report.environment(), "models": [each.told() for each in lives]})
