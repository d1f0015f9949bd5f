"""Which prompts a step takes, by a clock that only the model moves: what waits for what, and for how long."""

import random
from collections.abc import Sequence

import pytest
from engine_runs import request
from fakes import FakeBackend
from torch import Tensor

from tightrope.backends.protocol import Chunk
from tightrope.engine.core import EngineCore
from tightrope.engine.scheduler import OLDEST_SHARE, PATIENCE_S, QUIET_STEP_S
from tightrope.engine.settings import LimitSettings

BUSY_S = 0.15
STEP_S, TOKEN_S, SCORED_S = 0.005, 0.004, 0.02  # what a step, a token and a scored token take


class TimedBackend(FakeBackend):
    """Each step takes what its tokens take."""

    now_s = 0.0

    def forward(self, chunks: Sequence[Chunk]) -> Tensor:
        tokens = sum(len(chunk.token_ids) for chunk in chunks)
        scored = sum(len(chunk.token_ids) for chunk in chunks if chunk.want_logits == "all")
        self.now_s += STEP_S + TOKEN_S * tokens + SCORED_S * scored
        return super().forward(chunks)


class Run:
    """An engine under that clock; `first_s` and `ended_s` say when requests got their first token and their last."""

    def __init__(self, *, capacity: int = 20_000, max_num_seqs: int = 16, max_prompt_rows: int = 512) -> None:
        self.backend = TimedBackend(
            capacity=capacity,
            max_model_len=10_000,
            max_step_tokens=512,
            max_num_seqs=max_num_seqs,
            max_prompt_rows=max_prompt_rows,
        )
        self.core = EngineCore(self.backend, LimitSettings(busy_step_ms=BUSY_S * 1e3), lambda: self.backend.now_s)
        self.first_s: dict[str, float] = {}
        self.ended_s: dict[str, float] = {}
        self.came_s: dict[str, float] = {}

    def add(self, name: str, num_tokens: int, *, max_tokens: int = 1, prompt_logprobs: int | None = None) -> None:
        prompt = (name + "." * num_tokens)[: num_tokens - 1]  # and BOS
        self.came_s[name] = self.backend.now_s
        self.core.add(self.core.prepare(request(name, prompt, max_tokens=max_tokens, prompt_logprobs=prompt_logprobs)))

    def step(self) -> float:
        """Run one step; how long it took."""
        began = self.backend.now_s
        result = self.core.step()
        assert not result.failed
        for delta in result.deltas:
            self.first_s.setdefault(delta.request_id, self.backend.now_s)
            if delta.finish is not None:
                self.ended_s[delta.request_id] = self.backend.now_s
        return self.backend.now_s - began

    def until(self, *names: str) -> None:
        while not set(names) <= self.ended_s.keys():
            self.step()

    def waited_s(self, name: str) -> float:
        return self.first_s[name] - self.came_s[name]


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
        if run.core.has_work:
            took.append(run.step())
    run.until(*names)

    # the first scored prompt is a surprise; the oldest and the first get their least part in any case
    assert sorted(took)[-3] <= QUIET_STEP_S * 1.3
    assert run.core.stats().cache_used == 0
