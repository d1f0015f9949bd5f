"""Adapters where a step can't mix them: each step has one alone, everyone gets on, and every answer is its own."""

import logging
from collections.abc import Sequence
from dataclasses import replace
from itertools import pairwise
from pathlib import Path

import pytest
from fakes import BOS, FakeBackend, letters
from hypothesis import given, settings
from hypothesis import strategies as st

from tightrope.backends.protocol import Chunk
from tightrope.engine.adapter_turns import TURN_S
from tightrope.engine.core import EngineCore
from tightrope.engine.sampler.steps import SamplingParams
from tightrope.engine.settings import LimitSettings
from tightrope.engine.types import Delta, GenerateRequest, StopRules, TokenPrompt

pytestmark = pytest.mark.quick

STEP_S = 0.01  # by the clock below: a turn takes some steps


class Clock:
    """Time that passes with each look at it."""

    def __init__(self) -> None:
        self.now_s = 0.0

    def __call__(self) -> float:
        self.now_s += STEP_S / 4  # a step looks four times
        return self.now_s


def make_core(num_seqs: int = 8, capacity: int = 4096) -> tuple[EngineCore, FakeBackend]:
    """A core over a backend that can't mix, with the adapters a and b."""
    backend = FakeBackend(max_num_seqs=num_seqs, capacity=capacity)
    backend.capabilities = replace(backend.capabilities, mixes_adapters=False)
    core = EngineCore(backend, LimitSettings(), Clock())
    for name in ("a", "b"):
        core.adapters.prepare(name, Path(__file__))()
    return core, backend


def ask(
    number: int, adapter: str | None, scale: float = 1.0, num_prompt: int = 3, num_new: int = 40
) -> GenerateRequest:
    ids = (BOS, *(97 + (number + i) % 26 for i in range(num_prompt)))
    stop, greedy = StopRules(max_tokens=num_new), SamplingParams(temperature=0.0)
    return GenerateRequest(str(number), TokenPrompt(ids), greedy, stop, adapter=adapter, adapter_scale=scale)


def expected(request: GenerateRequest) -> str:
    assert isinstance(request.prompt, TokenPrompt)
    assert request.stop.max_tokens is not None
    ids = list(request.prompt.token_ids)
    for _ in range(request.stop.max_tokens):
        ids.append(letters(ids))
    return bytes(ids[len(request.prompt.token_ids) :]).decode()


def run(core: EngineCore, requests: Sequence[GenerateRequest]) -> dict[str, str]:
    for request in requests:
        core.add(core.prepare(request))
    deltas: list[Delta] = []
    while core.has_work:
        result = core.step()
        assert not result.failed
        deltas += result.deltas
    return {r.request_id: "".join(d.text for d in deltas if d.request_id == r.request_id) for r in requests}


def uses(step: Sequence[Chunk]) -> set[tuple[str | None, float]]:
    return {(chunk.adapter, chunk.adapter_scale) for chunk in step}


cases = st.lists(
    st.tuples(
        st.sampled_from([None, "a", "b"]), st.sampled_from([1.0, 0.5]), st.integers(1, 90), st.integers(1, 30)
    ),
    min_size=1,
    max_size=12,
)  # fmt: skip


@settings(max_examples=60)
@given(cases, st.integers(1, 4), st.integers(128, 400))
def test_every_step_has_one_adapter_at_one_scale_and_every_answer_is_its_own(
    wanted: list[tuple[str | None, float, int, int]], num_seqs: int, capacity: int
) -> None:
    core, backend = make_core(num_seqs, capacity)
    requests = [ask(i, name, 1.0 if name is None else scale, *rest) for i, (name, scale, *rest) in enumerate(wanted)]

    assert run(core, requests) == {request.request_id: expected(request) for request in requests}
    assert all(len(uses(step)) == 1 for step in backend.steps)


def test_a_turn_lasts_for_some_steps_and_none_waits_longer_than_the_turns_of_the_others() -> None:
    core, backend = make_core()
    run(core, [ask(i, name) for i, name in enumerate([None, "a", "b", "a"])])

    order = [next(iter(uses(step))) for step in backend.steps]
    changes = [i for i, (before, after) in enumerate(pairwise(order), 1) if before != after]
    turns = [after - before for before, after in pairwise(changes)]
    first = [order[change] for change in changes[:6]]
    assert 1 < max(turns) <= TURN_S / STEP_S + 1
    assert len(set(first[:3])) == 3
    assert first[3:] == first[:3]


def test_prompts_of_one_adapter_do_not_hold_up_the_answers_of_another() -> None:
    core, backend = make_core()
    core.add(core.prepare(ask(0, None, num_new=200)))
    core.step()
    core.add(core.prepare(ask(1, "a", num_prompt=800, num_new=1)))
    gap = longest = 0
    while core.has_work and len(backend.steps) < 150:
        wrote = any(delta.request_id == "0" for delta in core.step().deltas)
        gap = 0 if wrote else gap + 1
        longest = max(longest, gap)

    assert 0 < longest <= TURN_S / STEP_S + 1


def test_taking_turns_is_logged_once(caplog: pytest.LogCaptureFixture) -> None:
    core, _ = make_core()
    with caplog.at_level(logging.INFO, "tightrope.engine"):
        run(core, [ask(0, None)])
        assert "take turns" not in caplog.text
        run(core, [ask(0, None), ask(1, "a"), ask(2, "b")])

    assert caplog.text.count("take turns") == 1
