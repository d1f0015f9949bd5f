"""What is asked of a server, and what is measured: streams side by side, a growing chat, a long prompt among streams.

Prompts are the same for every server of a round and differ between rounds, so that no prompt cache knows them already.
"""

import asyncio
import random
import subprocess
import sys
import time
from collections.abc import Awaitable, Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from statistics import median

from bench.sse import Answer, stream

DECODE_TOKENS = 128
CHAT_TOKENS = 24
_LONG_WORDS = 3200  # about 3,500 tokens of SmolLM2's vocabulary
_SAMPLING = {"temperature": 0.7, "top_k": 40, "top_p": 0.95, "min_p": 0.05, "ignore_eos": True}
_SUBJECTS = ("keeper of a lighthouse", "baker", "young pilot", "judge", "botanist", "clockmaker", "captain", "farmer")
_VOCABULARY = """
the a river stone window morning letter quiet harbour lamp under over across between walked carried opened found
remembered wrote heard built old small green heavy distant careful village mountain garden station bridge market winter
summer evening island forest valley kitchen table paper engine signal captain teacher sister brother friend stranger
slowly suddenly again never always because although while before after until and but with without
"""


@dataclass(frozen=True, slots=True)
class Target:
    """A server under test.

    `extra_body` holds fields that only this server needs to do the same work as the others; None takes a field out.
    """

    name: str
    base_url: str
    pid: int | None
    extra_body: dict[str, object]

    async def complete(self, prompt: str, max_tokens: int, seed: int, until: asyncio.Event | None = None) -> Answer:
        body = self._body({"prompt": prompt, "max_tokens": max_tokens, "seed": seed})
        return await stream(self.base_url, "/v1/completions", body, until)

    async def complete_all(self, prompts: Sequence[str], max_tokens: int) -> list[Answer]:
        """Answers to all prompts at the same time."""
        return await asyncio.gather(*(self.complete(prompt, max_tokens, i) for i, prompt in enumerate(prompts)))

    async def chat(self, messages: list[dict[str, str]], max_tokens: int, seed: int | None = None) -> Answer:
        body = self._body({"messages": messages, "max_tokens": max_tokens, "seed": seed})
        return await stream(self.base_url, "/v1/chat/completions", body)

    def _body(self, fields: dict[str, object]) -> dict[str, object]:
        body = {**fields, **_SAMPLING, **self.extra_body}
        return {name: value for name, value in body.items() if value is not None}


def prose(salt: str, num_words: int) -> str:
    """Sentences of common words, the same for the same salt."""
    draw = random.Random(salt)
    words = draw.choices(_VOCABULARY.split(), k=num_words)
    sentences = [" ".join(words[i : i + 13]).capitalize() for i in range(0, num_words, 13)]
    return ". ".join(sentences) + "."


async def run_streams(
    target: Target, salt: str, num_streams: int, max_tokens: int = DECODE_TOKENS, num_words: int = 13
) -> dict[str, float]:
    """`num_streams` answers of `max_tokens` tokens at the same time, to different prompts of some `num_words` words."""
    prompts = [
        f"{prose(f'{salt} {i}', num_words)} Write a long story about a {subject} who reads this.\n\n"
        for i, subject in enumerate(_SUBJECTS[:num_streams])
    ]
    answers = await target.complete_all(prompts, max_tokens)
    wall_s = max(answer.done_s for answer in answers) - min(answer.sent_s for answer in answers)
    return {
        "tokens_per_s": sum(answer.num_tokens for answer in answers) / wall_s,
        "decode_tokens_per_s": 1 / median(answer.tpot_s for answer in answers),
        "ttft_ms": 1e3 * median(answer.ttft_s for answer in answers),
        "tpot_ms": 1e3 * median(answer.tpot_s for answer in answers),
        "largest_gap_ms": 1e3 * max(answer.largest_gap_s(0.0) for answer in answers),
        "tokens": sum(answer.num_tokens for answer in answers),
        "prompt_tokens": sum(answer.prompt_tokens for answer in answers),
    }


async def run_prompt(target: Target, salt: str, num_words: int) -> dict[str, float]:
    """A long prompt alone: how fast it is read, up to the first token of the answer."""
    answer = await target.complete(prose(salt, num_words), 2, seed=1)
    return {
        "ttft_ms": 1e3 * answer.ttft_s,
        "prompt_tokens_per_s": answer.prompt_tokens / answer.ttft_s,
        "prompt_tokens": answer.prompt_tokens,
        "cached_tokens": answer.cached_tokens,
    }


async def run_chat(target: Target, salt: str, *, is_seeded: bool = False) -> dict[str, float]:
    """Two turns of a chat: the first brings about 3,500 tokens, the second adds the answer and a short question.

    Chat clients send no seed. Where one is sent, a server may promise the same text again, and pay for it.
    """
    messages = [
        {"role": "system", "content": f"You remember every letter. {prose(salt, 8)}"},
        {"role": "user", "content": f"Here is the letter. {prose(salt + ' letter', _LONG_WORDS)} What is it about?"},
    ]
    first = await target.chat(messages, CHAT_TOKENS, 1 if is_seeded else None)
    messages += [
        {"role": "assistant", "content": first.text},
        {"role": "user", "content": "And who wrote it, do you think?"},
    ]
    second = await target.chat(messages, CHAT_TOKENS, 2 if is_seeded else None)
    return {
        "first_ttft_ms": 1e3 * first.ttft_s,
        "second_ttft_ms": 1e3 * second.ttft_s,
        "speedup": first.ttft_s / second.ttft_s,
        "first_prompt_tokens": first.prompt_tokens,
        "second_prompt_tokens": second.prompt_tokens,
        "second_cached_tokens": second.cached_tokens,
    }


async def run_long_prompt(target: Target, salt: str, num_streams: int = 3) -> dict[str, float]:
    """A prompt of 3,500 tokens arrives while streams run: how long they stand still, and when it gets its answer."""
    is_answered = asyncio.Event()
    running = [
        asyncio.create_task(target.complete(f"{prose(f'{salt} {i}', 13)} Once", 1200, i, is_answered))
        for i in range(num_streams)
    ]
    await asyncio.sleep(2.0)  # streams are in full flow; what they do before is the pace to compare with
    arrived_s = time.perf_counter()
    try:
        answer = await target.complete(prose(salt + " long", _LONG_WORDS), 4, seed=9)
    finally:
        is_answered.set()
    streams = await asyncio.gather(*running)
    before = [
        stream.arrivals_s[i + 1] - t
        for stream in streams
        for i, t in enumerate(stream.arrivals_s[:-1])
        if stream.arrivals_s[i + 1] < arrived_s
    ]
    during = [sum(1 for t in stream.arrivals_s if arrived_s < t < answer.arrivals_s[0]) for stream in streams]
    return {
        "ttft_ms": 1e3 * answer.ttft_s,
        "prompt_tokens": answer.prompt_tokens,
        "usual_gap_ms": 1e3 * median(before),
        "largest_gap_ms": 1e3 * max(stream.largest_gap_s(arrived_s) for stream in streams),
        "tokens_meanwhile": sum(during),
    }


@contextmanager
def busy_neighbour() -> Iterator[None]:
    """One process that never rests, for the time of the block."""
    process = subprocess.Popen([sys.executable, "-c", "while True: pass"])
    try:
        yield
    finally:
        process.kill()
        process.wait()


@dataclass(frozen=True, slots=True)
class Scenario:
    """A workload by name; `rounds` is how often a comparison repeats it unless told otherwise."""

    name: str
    run: Callable[[Target, str], Awaitable[dict[str, float]]]
    rounds: int
    needs_parallel: bool = False  # says nothing of a server that runs one request at a time
    beside_neighbour: bool = False


def _streams(num_streams: int) -> Callable[[Target, str], Awaitable[dict[str, float]]]:
    return lambda target, salt: run_streams(target, salt, num_streams)


SCENARIOS = {
    scenario.name: scenario
    for scenario in (
        Scenario("1 stream", _streams(1), rounds=7),
        Scenario("4 streams", _streams(4), rounds=5),
        Scenario("8 streams", _streams(8), rounds=7),
        Scenario("growing chat", run_chat, rounds=3),
        Scenario("long prompt", run_long_prompt, rounds=2, needs_parallel=True),
        Scenario("1 stream, busy neighbour", _streams(1), rounds=3, beside_neighbour=True),
        Scenario("8 streams, busy neighbour", _streams(8), rounds=3, needs_parallel=True, beside_neighbour=True),
    )
}
