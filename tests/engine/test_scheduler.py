"""Which prompts a step takes, by a clock that only the model moves: what waits for what, and for how long."""

import itertools
import random
from collections.abc import Sequence as Tokens
from typing import TYPE_CHECKING, cast

import pytest
from fakes import ByteTokenizer, FakeKV

from tightrope.backends.protocol import Capabilities, Chunk
from tightrope.backends.reuse import Reuse, Wanted
from tightrope.backends.reuse import Run as Found
from tightrope.engine.sampler.steps import SamplingParams
from tightrope.engine.scheduler import OLDEST_SHARE, PATIENCE_S, QUIET_STEP_S, Scheduler
from tightrope.engine.sequence import Sequence
from tightrope.engine.settings import LimitSettings
from tightrope.engine.track import Track
from tightrope.engine.types import GenerateRequest, StopRules, TextPrompt
from tightrope.engine.work import Work, layout
from tightrope.engine.writer import Writer

if TYPE_CHECKING:
    from tightrope.engine.sampler.state import SamplerState

pytestmark = pytest.mark.quick

BUSY_S = 0.15
STEP_S, TOKEN_S, SCORED_S = 0.005, 0.004, 0.02  # what a step, a token and a scored token take
NO_SAMPLER = cast("SamplerState", None)  # The scheduler never asks how tokens are drawn.


class Run:
    """A scheduler over a fake cache; a step takes what its tokens take, and each sequence writes its own number.

    `first_s` and `ended_s` say when requests got their first token and their last. Every step is held to the options.
    """

    def __init__(
        self,
        *,
        capacity: int = 20_000,
        max_num_seqs: int = 16,
        max_step_tokens: int = 512,
        max_prompt_rows: int = 512,
        mixes_adapters: bool = True,
        busy_step_ms: float = BUSY_S * 1e3,
        steady_tokens: int = 0,
    ) -> None:
        self.kv = FakeKV(capacity)
        self.options = Capabilities(max_num_seqs, max_step_tokens, max_prompt_rows, mixes_adapters, steady_tokens)
        self.scheduler = Scheduler(self.kv, self.options, LimitSettings(busy_step_ms=busy_step_ms))
        self.now_s = 0.0
        self.steps: list[list[Work]] = []
        self.sequences: dict[str, Sequence] = {}
        self.first_s: dict[str, float] = {}
        self.ended_s: dict[str, float] = {}
        self._numbers = itertools.count()

    def add(
        self,
        name: str,
        num_tokens: int,
        *,
        max_tokens: int = 1,
        prompt_logprobs: int | None = None,
        num_others: int = 0,
        seed: int | None = None,
        temperature: float = 1.0,
        adapter: str | None = None,
    ) -> Sequence:
        """Queue a request; num_others: tokens of a second track, if it has one."""
        sampling = SamplingParams(temperature=temperature, seed=seed)
        request = GenerateRequest(
            name, TextPrompt(()), sampling, StopRules(max_tokens), prompt_logprobs=prompt_logprobs
        )
        prompts = [num_tokens, num_others] if num_others else [num_tokens]
        tracks = tuple(Track(number := next(self._numbers), [number] * size) for size in prompts)
        sequence = Sequence(
            request,
            tracks,
            NO_SAMPLER,
            Writer(request, 0, ByteTokenizer(), max_tokens),
            max_len=num_tokens + max_tokens,
            arrived_s=self.now_s,
            prompt_tokens=None if prompt_logprobs is None else [],
            adapter=adapter,
        )
        self.sequences[name] = sequence
        self.scheduler.add(sequence)
        return sequence

    def step(self) -> float:
        """Run one step; how long it took."""
        works = self.scheduler.schedule(self.now_s)
        assert works
        self.steps.append(works)
        chunks, rows_of = layout(works)
        self._check(chunks)
        assert [row for rows in rows_of for one in rows for row in range(one.start, one.stop)] == list(
            range(sum(len(c.token_ids) if c.want_logits == "all" else c.want_logits == "last" for c in chunks))
        )
        scored = sum(len(chunk.token_ids) for chunk in chunks if chunk.want_logits == "all")
        took = STEP_S + TOKEN_S * sum(work.num_run for work in works) + SCORED_S * scored
        self.now_s += took
        for work in works:
            self.scheduler.commit(work)
            if work.is_last:
                self._write(work.sequence)
        self.scheduler.observe(works, took)
        return took

    def _check(self, chunks: list[Chunk]) -> None:
        scored = [chunk for chunk in chunks if chunk.want_logits == "all"]
        assert sum(len(chunk.token_ids) for chunk in chunks) <= self.options.max_step_tokens
        assert sum(len(chunk.token_ids) for chunk in scored) <= self.options.max_prompt_rows
        assert len(self.kv.live) <= self.options.max_num_seqs
        assert self.options.mixes_adapters or len({chunk.adapter for chunk in chunks}) == 1
        for chunk in chunks:
            held = self.kv.live[chunk.seq_id]
            assert len(held.token_ids) == chunk.start, "runs where the cache does not end"
            assert len(held.reserved) >= len(chunk.token_ids), "runs without room"

    def _write(self, sequence: Sequence) -> None:
        name = sequence.request.request_id
        assert all(track.pending.count == 0 for track in sequence.tracks)
        sequence.is_announced = True
        sequence.append(sequence.own.seq_id)
        self.first_s.setdefault(name, self.now_s)
        if len(sequence.own.token_ids) == sequence.max_len:
            self.ended_s[name] = self.now_s
            self.scheduler.remove(sequence)

    def until(self, *names: str) -> None:
        while not set(names) <= self.ended_s.keys():
            self.step()

    def waited_s(self, name: str) -> float:
        return self.first_s[name] - self.sequences[name].arrived_s

    def ran(self, name: str) -> list[list[int]]:
        """How many tokens of each track ran in each step that ran any."""
        return [
            [share for _, share in work.shares]
            for step in self.steps
            for work in step
            if work.sequence.request.request_id == name
        ]


class FetchingKV(FakeKV):
    """Some chats are to be fetched first, which takes so many steps."""

    def __init__(self, capacity: int, steps: dict[int, int]) -> None:
        super().__init__(capacity)
        self.steps = steps

    def fetch(self, seq_id: int, token_ids: Tokens, namespace: str, *, reuse: Wanted = "exact") -> bool:
        self.steps[seq_id] = self.steps.get(seq_id, 0) - 1
        return self.steps[seq_id] < 0


def test_a_chat_that_is_fetched_keeps_nobody_waiting() -> None:
    run = Run()
    run.kv = run.scheduler._kv = kv = FetchingKV(20_000, {})
    writer, chat = run.add("writer", 10, max_tokens=40), None
    run.step()
    chat = run.add("chat", 100)
    kv.steps[chat.own.seq_id] = 10
    run.step()
    run.add("other", 100)
    run.until("other")
    assert "chat" not in run.first_s
    run.until("chat")
    assert sum(writer in {work.sequence for work in step} for step in run.steps) >= 12
    assert all(step for step in run.steps)


def test_a_chat_is_not_fetched_piece_by_piece_where_nobody_waits() -> None:
    run = Run()
    run.kv = run.scheduler._kv = FetchingKV(20_000, {0: 1000})
    run.add("chat", 100)
    run.until("chat")
    assert len(run.steps) <= 2


def test_a_chat_that_is_cancelled_while_it_is_fetched_leaves_nothing_behind() -> None:
    run = Run()
    run.kv = run.scheduler._kv = kv = FetchingKV(20_000, {})
    run.add("writer", 10, max_tokens=40)
    run.step()
    chat = run.add("chat", 100)
    kv.steps[chat.own.seq_id] = 1000
    run.step()
    run.scheduler.remove(chat)
    run.until("writer")
    assert not run.scheduler.has_work


@pytest.mark.parametrize("steps", [1, 3, 10, 30, 45])
@pytest.mark.parametrize("prompt_logprobs", [None, 0])
def test_a_short_prompt_does_not_wait_behind_a_long_one(steps: int, prompt_logprobs: int | None):
    run = Run(max_prompt_rows=64)
    run.add("long", 6000, prompt_logprobs=prompt_logprobs)
    for _ in range(steps):
        run.step()

    run.add("short", 20)
    run.until("short")

    assert "long" not in run.ended_s
    assert run.waited_s("short") <= 2 * BUSY_S


@pytest.mark.parametrize("num_tokens", [1, 63, 64, 65, 127, 128, 129, 190, 193, 400, 575, 577, 1000])
def test_a_greedy_prompt_that_is_alone_runs_in_steps_that_are_large_enough(num_tokens: int):
    run = Run(steady_tokens=64, max_step_tokens=200)
    run.add("greedy", num_tokens, temperature=0)
    run.until("greedy")

    steps = [share for (share,) in run.ran("greedy")]

    assert sum(steps) == num_tokens
    assert all(share >= min(64, num_tokens) for share in steps)


def test_the_long_prompt_loses_little_to_a_short_one():
    alone, run = Run(), Run()
    for one in (alone, run):
        one.add("long", 6000)
        one.step()
    alone.until("long")
    run.add("short", 20)
    run.until("long")

    assert run.ended_s["long"] <= alone.ended_s["long"] * 1.1 + STEP_S + 20 * TOKEN_S


def test_the_oldest_prompt_keeps_its_share_of_every_step_while_shorter_ones_come_for_ever():
    run = Run()
    run.add("long", 2000)
    run.step()
    count = 0
    while "long" not in run.ended_s:
        for _ in range(4):
            run.add(f"s{count}", 100)
            count += 1
        run.step()

    assert count > 40
    assert run.waited_s("long") <= 2000 * TOKEN_S / OLDEST_SHARE * 1.5


def test_a_step_is_bounded_in_time_also_while_nobody_writes():
    run = Run()
    run.add("long", 5000)
    run.step()  # teaches what a token costs

    took = [run.step() for _ in range(20)]

    assert max(took) <= QUIET_STEP_S * 1.1
    assert min(took) >= QUIET_STEP_S * 0.7  # and no shorter than that: each step reads all weights once


def test_the_last_tokens_of_the_only_prompt_run_with_those_before_them_if_they_are_few():
    run = Run()
    run.add("teacher", 300)
    run.until("teacher")
    fitting = int(QUIET_STEP_S / TOKEN_S)

    for name, num_tokens in (("few left", int(fitting * 1.3)), ("many left", int(fitting * 1.7))):
        run.add(name, num_tokens)
        run.until(name)

    assert len(run.ran("few left")) == 1
    assert len(run.ran("many left")) == 2


def test_no_step_is_stretched_while_another_prompt_waits():
    run = Run()
    run.add("teacher", 300)
    run.until("teacher")
    run.add("first", 1000)
    run.add("short", int(QUIET_STEP_S * (1 - OLDEST_SHARE) / TOKEN_S * 1.3))

    assert run.step() <= QUIET_STEP_S * 1.3, "with the least part that the oldest has"


def test_a_prompt_that_does_not_fit_the_cache_at_the_moment_lets_smaller_ones_pass():
    run = Run(capacity=1200)
    run.add("writing", 100, max_tokens=800)
    run.step()
    run.add("large", 1000)
    run.step()

    run.add("small", 20)
    run.until("small")

    assert run.waited_s("small") <= 2 * BUSY_S
    assert "large" not in run.first_s
    run.until("writing", "large")


@pytest.mark.plain
def test_smaller_prompts_pass_one_that_does_not_fit_for_so_long_and_no_longer():
    run = Run(capacity=1200)
    run.add("writing", 200, max_tokens=300)
    run.step()
    run.add("large", 1000)
    count = 0
    while "large" not in run.first_s:
        for _ in range(3):  # more than there is room for, for ever
            run.add(f"s{count}", 200, max_tokens=30)
            count += 1
        run.step()

    assert PATIENCE_S / 2 < run.waited_s("large") < PATIENCE_S + 30


def test_any_traffic_ends_and_every_step_is_short():
    rng = random.Random(5)
    run = Run(capacity=6000, max_num_seqs=6, max_prompt_rows=128)
    run.add("teacher", 300)
    run.until("teacher")
    names: list[str] = []
    took = []
    for number in range(300):
        if rng.random() < 0.2 and len(names) < 40:
            names.append(f"r{number}")
            scored = 0 if rng.random() < 0.2 else None
            size = rng.choice([5, 30, 200, 1500])
            run.add(names[-1], size, max_tokens=rng.randint(1, 30), prompt_logprobs=scored)
        if run.scheduler.has_work:
            took.append(run.step())
    run.until(*names)

    # the first scored prompt is a surprise; the oldest and the first get their least part in any case
    assert sorted(took)[-3] <= QUIET_STEP_S * 1.3
    assert run.kv.usage().used == 0


@pytest.mark.parametrize("busy_step_ms", [100.0, 400.0])
def test_busy_step_ms_bounds_the_steps_in_which_somebody_writes(busy_step_ms: float):
    run = Run(busy_step_ms=busy_step_ms)
    run.add("teacher", 500)
    run.until("teacher")
    run.add("writing", 10, max_tokens=1000)
    run.step()
    run.add("long", 1500)

    took = [run.step() for _ in range(10)]

    assert max(took[1:]) <= busy_step_ms / 1e3 * 1.1
    assert min(took[1:]) >= busy_step_ms / 1e3 * 0.7


@pytest.mark.parametrize("max_step_tokens", [24, 100])
def test_max_step_tokens_bounds_a_step_however_fast_the_model_is(max_step_tokens: int):
    run = Run(max_step_tokens=max_step_tokens, busy_step_ms=2000.0)
    run.add("writing", 5, max_tokens=50)
    run.step()
    run.add("long", 300)
    run.until("long")

    assert max(sum(work.num_run for work in step) for step in run.steps) == max_step_tokens


def test_max_prompt_rows_bounds_the_scored_tokens_of_all_prompts_together():
    run = Run(max_prompt_rows=8)
    for name in "abc":
        run.add(name, 30, prompt_logprobs=0)
    run.add("plain", 200)
    run.until(*"abc", "plain")

    scored = [sum(work.shares[0][1] for work in step if work.is_scored) for step in run.steps]
    assert max(scored) == 8
    assert sum(scored) == 3 * 30


def test_max_num_seqs_counts_every_track():
    run = Run(max_num_seqs=3)
    run.add("two tracks", 10, num_others=10, max_tokens=5)
    run.add("one track", 10, max_tokens=5)
    run.add("late", 10)
    run.step()
    run.until("late")

    assert run.first_s["two tracks"] == run.first_s["one track"]
    assert run.first_s["late"] > min(run.ended_s["two tracks"], run.ended_s["one track"])


@pytest.mark.parametrize("mixes_adapters", [True, False])
def test_adapters_share_a_step_only_where_the_backend_mixes_them(mixes_adapters: bool):
    run = Run(mixes_adapters=mixes_adapters)
    run.add("plain", 10, max_tokens=5)
    run.add("adapted", 10, max_tokens=5, adapter="a")
    run.until("plain", "adapted")

    assert max(len({work.sequence.adapter for work in step}) for step in run.steps) == (2 if mixes_adapters else 1)


def test_other_tracks_are_read_first_and_the_last_tokens_of_all_run_together():
    run = Run(max_step_tokens=30)
    run.add("r", 50, num_others=40, max_tokens=3)
    run.until("r")

    assert run.ran("r") == [[0, 30], [21, 9], [29, 1], [1, 1], [1, 1]]


def test_the_last_token_of_a_seeded_prompt_runs_without_those_before_it():
    run = Run()
    run.add("r", 30, seed=1)
    run.until("r")

    assert run.ran("r") == [[29], [1]]


def test_the_youngest_gives_its_place_back_and_all_end():
    run = Run(capacity=150)
    for name in "abcd":
        run.add(name, 30, max_tokens=60)
    run.until(*"abcd")

    assert run.scheduler.preemptions > 0
    assert run.ended_s["a"] == min(run.ended_s.values())
    assert run.kv.usage().used == 0


def test_a_sequence_that_lost_tokens_goes_on_from_those_that_are_left():
    run = Run()
    sequence = run.add("r", 20, num_others=10, max_tokens=9)
    for _ in range(6):
        run.step()
    num_written = sequence.num_output
    sequence.take_back(3)

    run.scheduler.rewind(sequence)
    run.until("r")

    assert run.ran("r")[-1] == [1, 1]
    assert len(run.ran("r")) == 1 + 9 + 3 - 1
    assert num_written == 6


class FindsRuns(FakeKV):
    """A cache that finds these runs in whatever is opened, and knows which places are stored."""

    def __init__(self, *runs: Found) -> None:
        super().__init__(1000)
        self.reuse = Reuse(runs)
        self.stored = {place for run in runs for place in range(run.start, run.stop)}

    def open(self, *args: object, **options: object) -> Reuse:
        super().open(*args, **options)  # type: ignore[arg-type]
        return self.reuse

    def commit(self, seq_id: int, start: int, token_ids: list[int]) -> None:
        places = set(range(start, start + len(token_ids)))
        assert not self.stored & places
        self.stored |= places


def test_what_lies_between_cached_runs_is_computed_in_order_over_all_that_stands_before_it():
    kv = FindsRuns(Found(0, 0, 5), Found(30, 12, 20, is_exact=False), Found(60, 40, 8))
    run = Run(max_step_tokens=10)
    scheduler = run.scheduler = Scheduler(kv, run.options, LimitSettings())
    sequence = run.add("r", 60)
    steps = []
    while not sequence.is_prompt_computed:
        works = scheduler.schedule(0.0)
        chunks, rows_of = layout(works)
        there = set(kv.stored)
        for chunk in chunks:
            assert set(range(chunk.start)) <= there
            there |= set(range(chunk.start, chunk.start + len(chunk.token_ids)))
        steps.append([(chunk.start, len(chunk.token_ids), chunk.want_logits) for chunk in chunks])
        for work in works:
            scheduler.commit(work)

    assert steps == [[(5, 7, "none"), (32, 3, "none")], [(35, 5, "none"), (48, 5, "none")], [(53, 7, "last")]]
    assert rows_of == [[slice(0, 1)]]
    assert sequence.num_cached == 33
    assert kv.stored == set(range(60))
