"""Everything is killed with -9 while chats are written, again and again: no answer may be another than without."""

import asyncio
import os
import random
import shutil
import tempfile
import time
from collections.abc import Callable, Sequence
from contextlib import ExitStack, suppress
from dataclasses import asdict, dataclass, field
from pathlib import Path

import httpx
import psutil
from tqdm import tqdm

from bench import report
from bench.english import english_text
from bench.meter import process_tree
from bench.served import Served, serving

NUM_CHATS, NUM_TURNS = 24, 4
FIRST_CHARS, TURN_CHARS, ANSWER_TOKENS = 1200, 500, 12
WINDOW = 1024
OPTIONS = ["--max-model-len", str(WINDOW), "--kv-cache-tokens", str(2 * WINDOW)]
DISK_MIB = 64  # The folder is full after some lives, so that old chats go, too.
MOST_ANSWERS, MOST_WAIT_S = 6, 0.06  # In one life; and so long after the last answer begins, everything is killed.
PATIENCE_S = 900  # For an answer.
TIE = 0.1  # Nats: where two tokens are as likely as that, the steps that a prompt is read in decide between them.


@dataclass(frozen=True, slots=True)
class Said:
    """An answer, token by token: the text of each, and the logarithms of probability of the likeliest."""

    tokens: tuple[str, ...]
    likeliest: tuple[dict[str, float], ...]
    num_cached: int

    def is_other_than(self, other: "Said") -> bool:
        """Whether they part at a token that isn't about as likely as the other's."""
        for mine, theirs, likely in zip(self.tokens, other.tokens, other.likeliest, strict=False):
            if mine != theirs:
                return mine not in likely or likely[theirs] - likely[mine] > TIE
        return len(self.tokens) != len(other.tokens)


@dataclass(slots=True)
class Counts:
    """What was seen in all lives of a server."""

    kills: int = 0
    kills_within_a_file: int = 0  # A file that was begun and not finished was left behind.
    answers: int = 0
    answers_from_disk: int = 0  # Some of their prompt was cached before anything was asked of that life.
    equal: int = 0
    ties: int = 0
    wrong: int = 0
    tracebacks: int = 0
    wrong_prompts: list[str] = field(default_factory=list)


def prompt_of(chat: int, turn: int) -> str:
    text = english_text()
    start = chat * (FIRST_CHARS + NUM_TURNS * TURN_CHARS)
    return text[start : start + FIRST_CHARS + turn * TURN_CHARS]


async def ask(client: httpx.AsyncClient, url: str, prompt: str) -> Said:
    body = {"prompt": prompt, "max_tokens": ANSWER_TOKENS, "temperature": 0, "logprobs": 5, "ignore_eos": True}
    reply = await client.post(f"{url}/v1/completions", json=body)
    reply.raise_for_status()
    answer = reply.json()
    logprobs = answer["choices"][0]["logprobs"]
    cached = answer["usage"]["prompt_tokens_details"]["cached_tokens"]
    return Said(tuple(logprobs["tokens"]), tuple(logprobs["top_logprobs"]), cached)


def kill_all(served: Served) -> None:
    for process in process_tree(served.process.pid):
        with suppress(psutil.NoSuchProcess):
            process.kill()
    served.process.wait()


async def live(served: Served, asked: Sequence[tuple[int, int]], chance: random.Random) -> list[tuple[int, int, Said]]:
    """Ask for these turns, and then for others, until it is time to kill; returns what was answered."""
    said: list[tuple[int, int, Said]] = []
    most = chance.randint(1, MOST_ANSWERS)
    async with httpx.AsyncClient(timeout=PATIENCE_S) as client:
        for number in range(most + 1):
            chat, turn = asked[number] if number < len(asked) else (chance.randrange(NUM_CHATS), 0)
            if number >= len(asked) and said and chance.random() < 0.7:  # A chat goes on.
                chat, turn = said[-1][0], (said[-1][1] + 1) % NUM_TURNS
            task = asyncio.create_task(ask(client, served.url, prompt_of(chat, turn)))
            if number == most:
                await asyncio.wait([task], timeout=MOST_WAIT_S * chance.random() ** 3)
                kill_all(served)
                task.cancel()
                await asyncio.gather(task, return_exceptions=True)
            else:
                said.append((chat, turn, await task))
    return said


class Lives:
    """The lives of a server over one folder of chats, each ended by a kill, beside one without that is left alone."""

    def __init__(self, model: Path, folder: Path, plain: Served, seed: int) -> None:
        self.model, self.counts, self._seed = model, Counts(), seed
        self._folder, self._chats, self._plain = folder, folder / "chats", plain
        self._chance = random.Random(seed)
        self._last: list[tuple[int, int]] = []  # The next turns of what was written last.
        self._expected: dict[tuple[int, int], Said] = {}

    def next(self) -> None:
        """Live once more."""
        counts, temp = self.counts, self._folder / str(self.counts.kills)
        temp.mkdir()
        kept = ["--session-dir", str(self._chats), "--session-disk-mib", str(DISK_MIB)]
        with serving(self.model, temp, "session-kills", [*OPTIONS, *kept]) as served:
            said = asyncio.run(live(served, self._last, self._chance))
        shutil.rmtree(temp)
        counts.kills += 1
        unfinished = [file for file in os.listdir(self._chats) if file.startswith(".")]
        counts.kills_within_a_file += bool(unfinished)
        for file in unfinished:
            (self._chats / file).unlink()
        counts.tracebacks += "Traceback" in served.log.read_text()
        seen = set[int]()
        for chat, turn, answer in said:
            if (chat, turn) not in self._expected:
                self._expected[chat, turn] = asyncio.run(_cold(self._plain.url, prompt_of(chat, turn)))
            counts.answers_from_disk += chat not in seen and answer.num_cached > 0
            seen.add(chat)
            _count(counts, answer, self._expected[chat, turn], f"{chat}, {turn}")
        self._last = [(chat, min(turn + 1, NUM_TURNS - 1)) for chat, turn, _ in said[-2:]]

    def told(self) -> dict[str, object]:
        return {"model": self.model.name, "seed": self._seed, **asdict(self.counts)}


def _count(counts: Counts, answer: Said, expected: Said, prompt: str) -> None:
    counts.answers += 1
    if answer.tokens == expected.tokens:
        counts.equal += 1
    elif answer.is_other_than(expected):
        counts.wrong += 1
        counts.wrong_prompts.append(prompt)
    else:
        counts.ties += 1


async def _cold(url: str, prompt: str) -> Said:
    async with httpx.AsyncClient(timeout=PATIENCE_S) as client:
        return await ask(client, url, prompt)


def measure_kills(models: Sequence[Path], num_kills: int, write: Callable[[dict[str, object]], None]) -> None:
    """Kill so often, one model after the other; `write` is given what was counted after each."""
    seed = int(time.time())
    with ExitStack() as stack:
        lives = []
        for number, model in enumerate(models):
            folder = Path(stack.enter_context(tempfile.TemporaryDirectory()))
            (folder / "plain").mkdir()
            plain = stack.enter_context(serving(model, folder / "plain", f"session-kills-plain-{number}", OPTIONS))
            lives.append(Lives(model, folder, plain, seed + number))
        for number in tqdm(range(num_kills), desc="kills", disable=None):
            lives[number % len(lives)].next()
            rows = [each.told() for each in lives]
            write({**report.environment(), "models": rows, "bar": not any(each.counts.wrong for each in lives)})
