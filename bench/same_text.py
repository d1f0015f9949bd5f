"""Whether an answer is the same bytes whatever else runs: the torch engine on a CPU, format by format.

    python -m bench.same_text [--prompts N] [--forms FORM ...]

SmolLM2 in the formats of bench.quant_models, the bf16 one with --batch-invariant, and its GGUF file in our own engine.
Each prompt is answered alone in an empty cache, every other one greedily, the rest with a seed; then over what is
cached already, in other company, in other pieces, in a cache so small that answers are preempted, with numbers of
threads that change from step to step, and over moved tokens once these are healed. Token ids, texts and log
probabilities are compared to the last bit. A form's rows are written when all of it is known; those of others stay.
"""

import argparse
import json
from collections.abc import Iterable, Iterator, Sequence
from contextlib import closing, contextmanager
from dataclasses import dataclass, replace
from itertools import count, cycle
from pathlib import Path
from random import Random
from unittest.mock import patch

from tqdm import tqdm

from bench import report
from bench.english import english_text
from bench.quant_models import BF16, write_models
from tightrope.backends.hf.backend import HFBackend
from tightrope.backends.locate import bundled_model
from tightrope.backends.own_gguf.backend import open_own
from tightrope.backends.settings import CacheSettings, ModelSettings
from tightrope.backends.sharing import Threads
from tightrope.engine.core import EngineCore
from tightrope.engine.sampler.steps import SamplingParams
from tightrope.engine.settings import LimitSettings
from tightrope.engine.types import GenerateRequest, LogprobRequest, StopRules, TokenPrompt

NUM_PROMPTS = 200
PROMPT_TOKENS = 4, 100  # the shortest and the longest, of which there are the fewest
ANSWER_TOKENS, LONG_ANSWER = 6, 40  # the latter where answers are preempted while they are written
SHORT_PROMPT = 60  # tokens of their prompts at most
WINDOW, CACHE = 1024, 40 * 1024
SMALL_CACHE = 960  # tokens: about as many as sixteen of these answers begin with
GGUF = "gguf-own"
_ids = map(str, count())

Answer = tuple[tuple[int, ...], str, tuple[float | None, ...]]  # Token ids, text, log probabilities.
Row = dict[str, object]


@dataclass(frozen=True, slots=True)
class Asked:
    """One prompt of the set and how it is answered: with a seed, or greedily."""

    token_ids: tuple[int, ...]
    seed: int | None
    num_tokens: int = ANSWER_TOKENS

    def request(self, namespace: str) -> GenerateRequest:
        return GenerateRequest(
            next(_ids),
            TokenPrompt(self.token_ids),
            SamplingParams(temperature=0.0 if self.seed is None else 1.0, seed=self.seed),
            StopRules(max_tokens=self.num_tokens, ignore_eos=True),
            logprobs=LogprobRequest(processed=False),
            namespace=namespace,
        )

    def followed(self, answer: Answer) -> "Asked":
        """The prompt that a chat sends next: this one, its answer and something more."""
        return replace(self, token_ids=(*self.token_ids, *answer[0], *self.token_ids[:7]))


class Engine:
    """One model with its settings, and the core that runs its requests."""

    def __init__(self, form: str, path: Path, settings: ModelSettings) -> None:
        open_model = open_own if form == GGUF else HFBackend
        settings = settings.model_copy(update={"batch_invariant": form == BF16})
        self.backend = open_model(path, settings, lambda _: None)
        self.core = EngineCore(self.backend, LimitSettings())

    def close(self) -> None:
        self.backend.close()

    def answers(self, asked: Sequence[Asked], names: Iterable[str], sizes: Iterable[int]) -> list[Answer]:
        """Answers to prompts, so many at a time, each in the namespace of that name."""
        rest = [one.request(name) for one, name in zip(asked, names, strict=False)]
        found: list[Answer] = []
        for size in sizes:
            if not rest:
                break
            found += self._together(rest[:size])
            rest = rest[size:]
        return found

    def _together(self, requests: Sequence[GenerateRequest]) -> list[Answer]:
        tokens: dict[str, list[tuple[int, float | None]]] = {one.request_id: [] for one in requests}
        texts, running = dict.fromkeys(tokens, ""), set(tokens)
        for one in requests:
            self.core.add(self.core.prepare(one))
        while running:
            result = self.core.step()
            assert not result.failed, result.failed
            for delta in result.deltas:
                texts[delta.request_id] += delta.text
                tokens[delta.request_id] += [(token.token_id, token.logprob) for token in delta.tokens]
                if delta.finish is not None:
                    running.discard(delta.request_id)
        return [
            (tuple(number for number, _ in made), texts[name], tuple(logprob for _, logprob in made))
            for name, made in tokens.items()
        ]

    @property
    def num_cached(self) -> int:
        return self.core.stats().cached_tokens

    def heal(self) -> int:
        """Compute again what was moved; returns how many tokens that were."""
        before = self.core.stats().healed_tokens
        while self.core.has_work:
            self.core.step()
        return self.core.stats().healed_tokens - before


def prompts_of(engine: Engine, num_prompts: int) -> list[Asked]:
    tokens = engine.backend.tokenizer.encode(english_text(), parse_special=False, is_start=True)
    draw, (least, most) = Random(1), PROMPT_TOKENS
    starts = [draw.randrange(len(tokens) - most) for _ in range(num_prompts)]
    sizes = [int(least * (most / least) ** draw.random()) for _ in range(num_prompts)]
    pairs = enumerate(zip(starts, sizes, strict=True))
    return [Asked(tuple(tokens[start : start + size]), i if i % 2 else None) for i, (start, size) in pairs]


def fresh() -> Iterator[str]:
    """Namespaces in which nothing is cached yet."""
    while True:
        yield next(_ids)


def row_of(company: str, found: Sequence[Answer], alone: Sequence[Answer], **more: int) -> Row:
    differ = sum(one != other for one, other in zip(found, alone, strict=True))
    return {"company": company, "answers": len(found), "differ": differ, **more}


@contextmanager
def changing_threads(most: int) -> Iterator[None]:
    """Meanwhile each step has another number of threads than the one before, of 1 to `most`."""
    numbers = cycle(range(1, most + 1))

    def settle(self: Threads) -> int:
        self.now = next(numbers)
        self._apply(self.now)
        return self.now

    with patch.object(Threads, "settle", settle):
        yield


def measure(form: str, path: Path, num_prompts: int) -> Iterator[Row]:
    """Rows: in which company, how many answers, and how many of them differ from those to the prompt alone."""
    usual = ModelSettings(max_model_len=WINDOW, threads=2, cache=CacheSettings(tokens=CACHE, host_mib=0))
    with closing(Engine(form, path, usual)) as engine:
        asked = prompts_of(engine, num_prompts)
        short = [replace(one, token_ids=one.token_ids[:SHORT_PROMPT], num_tokens=LONG_ANSWER) for one in asked]
        names = [next(_ids) for _ in asked]
        alone = engine.answers(asked, names, cycle([1]))
        yield from over_cached(engine, asked, names, alone)
        yield row_of("batches of 2 to 16", engine.answers(asked, fresh(), cycle(range(2, 17))), alone)
        yield from moved(engine)
        long = engine.answers(short, fresh(), cycle([1]))
    small = CacheSettings(tokens=SMALL_CACHE, host_mib=0)
    with closing(Engine(form, path, usual.model_copy(update={"cache": small}))) as engine:
        found = engine.answers(short, fresh(), cycle([16]))
        yield row_of("preempted", found, long, preemptions=engine.core.stats().preemptions)
    with closing(Engine(form, path, usual.model_copy(update={"step_tokens": 48}))) as engine:
        yield row_of("steps of 48 tokens", engine.answers(asked, fresh(), cycle([5])), alone)
    with closing(Engine(form, path, usual.model_copy(update={"threads": 3}))) as engine, changing_threads(3):
        yield row_of("1 to 3 threads", engine.answers(asked, fresh(), cycle([6])), alone)


def over_cached(engine: Engine, asked: Sequence[Asked], names: Sequence[str], alone: Sequence[Answer]) -> Iterator[Row]:
    """The same prompts once more, and the next turns of their chats."""
    before = engine.num_cached
    again = engine.answers(asked, names, cycle([1, 4]))
    yield row_of("the same prompt again", again, alone, cached_tokens=engine.num_cached - before)
    followed = [one.followed(answer) for one, answer in zip(asked, alone, strict=True)]
    before = engine.num_cached
    found = engine.answers(followed, names, cycle([1, 5]))
    cached = engine.num_cached - before
    yield row_of("behind a cached prefix", found, engine.answers(followed, fresh(), cycle([1])), cached_tokens=cached)


def moved(engine: Engine) -> Iterator[Row]:
    """Chats that lose their oldest message, once what moved has been computed again."""
    eos = next(iter(engine.backend.tokenizer.eos_ids))
    text = engine.backend.tokenizer.encode(english_text(), parse_special=False, is_start=True)
    found: list[Answer] = []
    cold: list[Answer] = []
    healed, before, cached = 0, 0, 0
    for start in range(0, 4000, 1000):
        system, oldest, rest, new = (
            text[start + begin : start + end] for begin, end in ((0, 30), (30, 180), (180, 400), (400, 430))
        )
        whole = Asked((*system, eos, *oldest, eos, *rest, eos), None)
        dropped = Asked((*system, eos, *rest, eos, *new), None)
        name = next(_ids)
        engine.answers([whole, dropped], [name] * 2, cycle([1]))
        healed += engine.heal()
        both = [dropped, replace(dropped, seed=start + 1)]
        before = engine.num_cached
        found += engine.answers(both, [name] * 2, cycle([1]))
        cached += engine.num_cached - before
        cold += engine.answers(both, fresh(), cycle([1]))
    yield row_of("moved and healed", found, cold, healed_tokens=healed, cached_tokens=cached)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--prompts", type=int, default=NUM_PROMPTS)
    parser.add_argument("--forms", nargs="+", help="measure these alone")
    given = parser.parse_args()
    models = {**write_models(), GGUF: bundled_model()}
    path = report.RESULTS / "same_text.json"
    forms: dict[str, object] = dict(json.loads(path.read_text())["results"]["forms"]) if path.exists() else {}
    differing = False
    for form in given.forms or models:
        rows = []
        for row in tqdm(measure(form, models[form], given.prompts), form, disable=None):
            print(form, row, flush=True)
            rows.append(row)
            differing |= bool(row["differ"])
        forms[form] = rows
        report.write(
            "same_text", {"answer_tokens": ANSWER_TOKENS, "preempted_answer_tokens": LONG_ANSWER, "forms": forms}
        )
    if differing:
        raise SystemExit("answers differ")


if __name__ == "__main__":
    main()
