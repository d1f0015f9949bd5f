"""Whether an answer is the same bytes whatever else runs: the torch engine on a CPU, format by format.

    python -m bench.same_text [--prompts N] [--threads N] [--forms FORM ...] [--missing]

SmolLM2 in the formats of bench.quant_models, the bf16 one with --batch-invariant, and its GGUF file in our own engine.
Each prompt is answered alone in an empty cache, every other one greedily, the rest with a seed; then once more, behind
a beginning that is cached already, in other company, in other pieces, with numbers of threads that change from step to
step, in a cache so small that answers are preempted, and over moved tokens once these are healed. Token ids, texts and
log probabilities are compared to the last bit. Answers that are to be preempted are long, and are compared with those
that are written side by side where there is room for all. Each row is written as soon as it is known, and rows of other
forms stay.
"""

import argparse
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from contextlib import closing, contextmanager
from dataclasses import dataclass, replace
from itertools import count, cycle
from pathlib import Path
from random import Random
from unittest.mock import patch

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
PROMPT_TOKENS = 6, 120  # the shortest and the longest, of which there are the fewest
ANSWER_TOKENS, LONG_ANSWER = 6, 40  # the latter where answers are preempted while they are written
SHORT_PROMPT = 60  # tokens of their prompts at most
WINDOW, CACHE = 1024, 40 * 1024
SMALL_CACHE = 960  # tokens: about as many as sixteen of these answers begin with
SMALL_STEP = 48
GGUF = "gguf-own"
_ids = map(str, count())

AGAIN, BEHIND, BATCHES, MOVED, PREEMPTED, PIECES, THREADS = COMPANIES = (
    "the same prompt again",
    "behind a cached prefix",
    "batches of 2 to 16",
    "moved and healed",
    "preempted",
    f"steps of {SMALL_STEP} tokens",
    "1 to 3 threads",
)

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

    @property
    def beginning(self) -> "Asked":
        """Two thirds of the prompt, for a token."""
        return replace(self, token_ids=self.token_ids[: -(-2 * len(self.token_ids) // 3)], num_tokens=1)


class Engine:
    """One model with its settings, and the core that runs its requests."""

    def __init__(self, form: str, path: Path, settings: ModelSettings) -> None:
        open_model = open_own if form == GGUF else HFBackend
        settings = settings.model_copy(update={"batch_invariant": form == BF16})
        self.backend = open_model(path, settings, lambda _: None)
        self.core = EngineCore(self.backend, LimitSettings())

    def close(self) -> None:
        self.backend.close()

    @contextmanager
    def steps_of(self, num_tokens: int) -> Iterator[None]:
        """Meanwhile a step has so many tokens at most."""
        core, capabilities = self.core, self.backend.capabilities
        self.backend.capabilities = replace(capabilities, max_step_tokens=num_tokens, max_prompt_rows=num_tokens)
        self.core = EngineCore(self.backend, LimitSettings())
        try:
            yield
        finally:
            self.core, self.backend.capabilities = core, capabilities

    @contextmanager
    def room_for(self, num_tokens: int) -> Iterator[None]:
        """Meanwhile another sequence has the rest of the cache."""
        kv, other = self.backend.kv, -2
        kv.open(other, [0], "", reuse="nothing")
        assert kv.reserve(other, CACHE - num_tokens), "nothing runs"
        try:
            yield
        finally:
            kv.close(other, keep=False)

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


def measure(form: str, path: Path, num_prompts: int, threads: int, wanted: Collection[str]) -> Iterator[Row]:
    """Rows of these companies: how many answers, and how many of them differ from those to the prompt alone."""
    cache = CacheSettings(tokens=CACHE, host_mib=0)
    settings = ModelSettings(max_model_len=WINDOW, threads=threads, cache=cache)
    with closing(Engine(form, path, settings)) as engine:
        asked = prompts_of(engine, num_prompts)
        if set(wanted) - {MOVED, PREEMPTED}:
            names = [next(_ids) for _ in asked]
            alone = engine.answers(asked, names, cycle([1]))
            for company, run in beside_alone(engine, asked, names).items():
                if company in wanted:
                    before, found = engine.num_cached, run()
                    yield row_of(company, found, alone, cached_tokens=engine.num_cached - before)
        if MOVED in wanted:
            yield from moved(engine)
        if PREEMPTED in wanted:
            short = [replace(one, token_ids=one.token_ids[:SHORT_PROMPT], num_tokens=LONG_ANSWER) for one in asked]
            long = engine.answers(short, fresh(), cycle([16]))
            before = engine.core.stats().preemptions
            with engine.room_for(SMALL_CACHE):
                found = engine.answers(short, fresh(), cycle([16]))
            yield row_of(PREEMPTED, found, long, preemptions=engine.core.stats().preemptions - before)


def beside_alone(
    engine: Engine, asked: Sequence[Asked], names: Sequence[str]
) -> Mapping[str, Callable[[], list[Answer]]]:
    """How the same prompts are answered in other companies; under these names they are cached."""

    def behind() -> list[Answer]:
        others = [next(_ids) for _ in asked]
        engine.answers([one.beginning for one in asked], others, cycle([8]))
        return engine.answers(asked, others, cycle([1, 5]))

    def in_pieces() -> list[Answer]:
        with engine.steps_of(SMALL_STEP):
            return engine.answers(asked, fresh(), cycle([5]))

    def with_threads() -> list[Answer]:
        with changing_threads(3):
            return engine.answers(asked, fresh(), cycle([6]))

    return {
        AGAIN: lambda: engine.answers(asked, names, cycle([4])),
        BEHIND: behind,
        BATCHES: lambda: engine.answers(asked, fresh(), cycle(range(2, 17))),
        PIECES: in_pieces,
        THREADS: with_threads,
    }


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
    yield row_of(MOVED, found, cold, healed_tokens=healed, cached_tokens=cached)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--prompts", type=int, default=NUM_PROMPTS)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--forms", nargs="+", help="measure these alone")
    parser.add_argument("--missing", action="store_true", help="leave what the results have already")
    given = parser.parse_args()
    written = None if given.forms is None else {*given.forms} - {BF16, GGUF}
    models = {**write_models(written), GGUF: bundled_model()}
    sizes: Row = {"prompts": given.prompts, "answer_tokens": ANSWER_TOKENS, "preempted_answer_tokens": LONG_ANSWER}
    for form in given.forms or models:
        rows = _known(sizes).get(form, {})
        wanted = [company for company in COMPANIES if not given.missing or company not in rows]
        for row in measure(form, models[form], given.prompts, given.threads, wanted):
            print(form, row, flush=True)
            forms = _known(sizes)  # Another process may have written meanwhile.
            forms.setdefault(form, {})[str(row.pop("company"))] = row
            report.write("same_text", {**sizes, "forms": forms})
    if any(row["differ"] for rows in _known(sizes).values() for row in rows.values()):
        raise SystemExit("answers differ")


def _known(sizes: Row) -> dict[str, dict[str, Row]]:
    """The rows of earlier runs with the same sizes, by form and company."""
    known = report.known("same_text")
    return dict(known["forms"]) if sizes.items() <= known.items() else {}


if __name__ == "__main__":
    main()
