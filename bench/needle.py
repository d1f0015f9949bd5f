"""Whether a message that was taken out is still known from the tokens behind it: how likely the model is to say it."""

import math
from collections.abc import Iterator
from contextlib import closing
from pathlib import Path
from statistics import mean

from bench.english import english_text
from bench.moved_quality import Reader
from tightrope.backends.hf.backend import HFBackend
from tightrope.backends.reuse import Wanted
from tightrope.backends.settings import CacheSettings, ModelSettings

WORDS = ("marigold", "pendulum", "cinnamon")
NUM_MESSAGES, MESSAGE_CHARS = 12, 350
QUESTION = "What is the secret word?"
OPENING = "The secret word is"


def measure(folder: Path, window: int, threads: int) -> Iterator[dict[str, object]]:
    """Mean probability of a word's tokens with its message there, after it is gone with moved tokens, and exactly.

    Once for a message in the middle of a chat, and once for the first one behind the system message.
    """
    cache = CacheSettings(tokens=4 * window, dtype="q8", host_mib=0)
    settings = ModelSettings(max_model_len=window, max_num_seqs=2, threads=threads, cache=cache)
    with closing(HFBackend(folder, settings, lambda _: None)) as backend:
        reader = Reader(backend)
        for name, place in (("the first", 0), ("in the middle", NUM_MESSAGES // 2)):
            found = [_one(backend, reader, word, place) for word in WORDS]
            there, moved, exact = (mean(values) for values in zip(*found, strict=True))
            yield {"place": name, "words": len(WORDS), "there": there, "moved": moved, "exact": exact}


def _one(backend: HFBackend, reader: Reader, word: str, place: int) -> tuple[float, float, float]:
    def encode(text: str) -> list[int]:
        return backend.tokenizer.encode(text, parse_special=True, is_start=True)

    def turn(role: str, text: str) -> str:
        return f"<|im_start|>{role}\n{text}<|im_end|>\n"

    text = english_text()
    parts = [text[i * MESSAGE_CHARS :][:MESSAGE_CHARS] for i in range(NUM_MESSAGES)]
    messages = [turn("assistant" if i % 2 else "user", part) for i, part in enumerate(parts)]
    needle = turn("user", f"Remember this. {OPENING} {word}. I will ask you for it later.")
    system = turn("system", "You are Mira, who keeps a harbour, and answers what she is asked.")
    end = f"{turn('user', QUESTION)}<|im_start|>assistant\n{OPENING}"
    answer = encode(f"{OPENING} {word}")[len(encode(OPENING)) :]

    def likelihood(chat: list[str], reuse: Wanted) -> float:
        tokens = [*encode("".join((system, *chat, end))), *answer]
        rows, _ = reader.read(tokens, f"{word} {place}", reuse)
        chosen = [float(rows[-1 - len(answer) + i, token]) for i, token in enumerate(answer)]
        return math.exp(mean(chosen))

    known = [*messages[:place], needle, *messages[place:]]
    reader.read(encode("".join((system, *known))), f"{word} {place}", "nothing")
    moved = likelihood(messages, "moved")  # Before the question stands anywhere in the cache, lest it be moved, too.
    return likelihood(known, "exact"), moved, likelihood(messages, "nothing")
