"""Moved tokens are computed again while nothing else runs, and give way within one step; on a tiny model's cache."""

from collections.abc import Iterator
from contextlib import closing
from itertools import count

import pytest
from checkout import ADAPTERS
from engine_runs import request, run

from tightrope.backends.errors import BackendError
from tightrope.backends.hf.backend import HFBackend
from tightrope.backends.hf.cache.moving import COMPUTED_AGAIN
from tightrope.backends.protocol import Chunk
from tightrope.backends.settings import CacheSettings, ModelSettings
from tightrope.engine.core import EngineCore
from tightrope.engine.sampler.steps import SamplingParams
from tightrope.engine.settings import LimitSettings
from tightrope.engine.types import Delta, GenerateRequest, PromptInfo, TokenPrompt

SYSTEM, OLDEST, SECOND, NEW = range(10, 40), range(100, 170), range(200, 350), range(400, 420)
EOS = 2
FULL, DROPPED = (*SYSTEM, *OLDEST, *SECOND), (*SYSTEM, *SECOND, *NEW)
NUM_MOVED = 150 - 64

_fresh_ids = map(str, count())


@pytest.fixture(scope="module")
def loaded() -> Iterator[HFBackend]:
    cache = CacheSettings(tokens=4096, dtype="q8")
    model = ModelSettings(max_num_seqs=4, threads=1, step_tokens=512, cache=cache)
    with closing(HFBackend(ADAPTERS / "llama-bf16", model, lambda _: None)) as backend:
        yield backend
        backend.kv.check_integrity()


class Steps:
    """A core whose backend's steps are watched, in a namespace of its own."""

    def __init__(self, backend: HFBackend, monkeypatch: pytest.MonkeyPatch, **limits: object) -> None:
        self.core = EngineCore(backend, LimitSettings(**limits))  # type: ignore[arg-type]
        self.namespace = next(_fresh_ids)
        self.chunks: list[list[Chunk]] = []
        forward = backend.forward

        def watched(chunks: list[Chunk]) -> object:
            self.chunks.append(list(chunks))
            return forward(chunks)

        monkeypatch.setattr(backend, "forward", watched)

    def asked(self, tokens: tuple[int, ...], **fields: object) -> GenerateRequest:
        fields = {"max_tokens": 2, "ignore_eos": True, "namespace": self.namespace, **fields}
        return request(next(_fresh_ids), TokenPrompt(tokens), **fields)  # type: ignore[arg-type]

    def begin(self, asked: GenerateRequest) -> None:
        self.core.add(self.core.prepare(asked))

    def answer(self, asked: GenerateRequest) -> PromptInfo:
        """Run to the end of the answer, and not beyond."""
        self.begin(asked)
        while True:
            for delta in self.core.step().deltas:
                assert isinstance(delta, Delta)
                if delta.prompt is not None and delta.request_id == asked.request_id:
                    info = delta.prompt
                if delta.finish is not None:
                    return info

    @property
    def heals(self) -> list[bool]:
        """Of each step, whether it healed."""
        return [chunks[0].seq_id < 0 for chunks in self.chunks]


@pytest.fixture
def steps(loaded: HFBackend, monkeypatch: pytest.MonkeyPatch) -> Steps:
    steps = Steps(loaded, monkeypatch)
    steps.answer(steps.asked(FULL))
    return steps


def test_an_answer_over_moved_tokens_tells_so_and_is_healed_while_nothing_else_runs(steps: Steps) -> None:
    info = steps.answer(steps.asked(DROPPED))
    assert (info.num_cached, info.num_moved) == (30 + NUM_MOVED, NUM_MOVED)
    assert not any(steps.heals)
    before = steps.answer(steps.asked(DROPPED))
    assert before.num_moved > 0

    while steps.core.has_work:
        steps.core.step()

    assert steps.core.stats().healed_tokens >= 200 - 96
    after = steps.answer(steps.asked(DROPPED))
    assert (after.num_cached, after.num_moved) == (199, 0)
    assert not steps.core.has_work, "nothing is left to heal"
    stats = steps.core.stats()
    assert stats.moved_tokens == NUM_MOVED + before.num_moved


def test_healing_gives_way_within_a_step_and_what_it_has_done_stays(
    steps: Steps, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(steps.core._scheduler._rate, "tokens_in", lambda seconds: 0)  # The smallest steps there are.
    steps.answer(steps.asked(DROPPED))
    steps.core.step()
    assert steps.heals[-1]
    assert steps.core.has_work, "it takes more than one step"

    exact = steps.answer(steps.asked((*DROPPED, 5), cache_reuse="exact"))

    assert exact.num_cached == (30 + 64) // 16 * 16 + 64, "whole pages of exact tokens, and one step"
    num_steps = len(steps.chunks)
    while steps.core.has_work:
        steps.core.step()
    assert steps.heals[num_steps - 2 : num_steps] == [False, False]
    assert steps.answer(steps.asked(DROPPED, cache_reuse="exact")).num_cached == 199


def test_a_step_that_heals_runs_beside_nothing_and_wants_no_logits(steps: Steps) -> None:
    steps.answer(steps.asked(DROPPED))
    while steps.core.has_work:
        steps.core.step()

    healing = [chunks for chunks, heals in zip(steps.chunks, steps.heals, strict=True) if heals]
    assert healing
    assert all(len(chunks) == 1 and chunks[0].want_logits == "none" for chunks in healing)


@pytest.mark.parametrize(
    "exact",
    [{"cache_reuse": "exact"}, {"sampling": SamplingParams(seed=1)}, {"prompt_logprobs": 0}],
    ids=["asked for", "a seed", "log probabilities of the prompt"],
)
def test_requests_that_promise_exact_tokens_get_them_alone(steps: Steps, exact: dict[str, object]) -> None:
    info = steps.answer(steps.asked(DROPPED, **exact))
    assert info.num_moved == 0
    assert info.num_cached <= 30

    steps.answer(steps.asked((*DROPPED[:-5], 6, 7)))
    again = steps.answer(steps.asked((*DROPPED[:-5], 6, 7), **exact))
    assert again.num_moved == 0


def test_off_heals_nothing_auto_what_takes_under_a_minute_and_always_everything(
    loaded: HFBackend, monkeypatch: pytest.MonkeyPatch
) -> None:
    for heal, seconds, is_healed in (
        ("off", 1.0, False),
        ("auto", 59.0, True),
        ("auto", 60.0, False),
        ("always", 3600.0, True),
    ):
        steps = Steps(loaded, monkeypatch, heal=heal)
        steps.answer(steps.asked(FULL))
        steps.answer(steps.asked(DROPPED))
        monkeypatch.setattr(steps.core._scheduler._rate, "seconds_of", lambda tokens, seconds=seconds: seconds)
        while steps.core.has_work:
            steps.core.step()
        assert (steps.core.stats().healed_tokens > 0) is is_healed, (heal, seconds)


def test_a_cancelled_answer_over_moved_tokens_is_healed_too(steps: Steps) -> None:
    asked = steps.asked(DROPPED, max_tokens=50)
    steps.begin(asked)
    steps.core.step()
    steps.core.step()
    steps.core.cancel(asked.request_id)

    while steps.core.has_work:
        steps.core.step()

    assert steps.answer(steps.asked(DROPPED)).num_moved == 0


def test_of_a_chat_the_last_turn_alone_is_healed(steps: Steps) -> None:
    for more in ((), (430,), (430, 431)):
        steps.answer(steps.asked((*DROPPED, *more)))

    while steps.core.has_work:
        steps.core.step()

    assert steps.core.stats().healed_tokens <= len(DROPPED) + 4 - 80


def test_a_step_of_healing_that_fails_leaves_the_tokens_as_they_are(
    steps: Steps, loaded: HFBackend, monkeypatch: pytest.MonkeyPatch
) -> None:
    steps.answer(steps.asked(DROPPED))

    def fails(chunks: list[Chunk]) -> object:
        raise BackendError("no memory")

    with monkeypatch.context() as patch:
        patch.setattr(loaded, "forward", fails)
        while steps.core.has_work:
            assert not steps.core.step().failed

    assert steps.core.stats().healed_tokens == 0
    assert steps.answer(steps.asked(DROPPED)).num_moved > 0


def test_behind_a_removal_in_the_middle_exact_tokens_are_waited_for_if_they_take_under_ten_seconds(
    loaded: HFBackend, monkeypatch: pytest.MonkeyPatch
) -> None:
    def turns(*ended: bool) -> tuple[int, ...]:
        system = (*SYSTEM, EOS) if ended[0] else tuple(SYSTEM)
        return (*system, *range(50, 60), *((EOS,) if ended[1] else ()))

    for before, seconds, is_moved in (
        (turns(True, False), 0.0, True),  # The system message's turn has ended, and no other.
        (turns(True, True), 9.9, False),
        (turns(True, True), 10.0, True),
        (tuple(range(10, 200)), 9.9, False),  # More than half of the prompt.
    ):
        steps = Steps(loaded, monkeypatch, heal="off")
        steps.answer(steps.asked((*before, *OLDEST, *SECOND)))
        monkeypatch.setattr(steps.core._scheduler._rate, "seconds_of", lambda tokens, seconds=seconds: seconds)
        info = steps.answer(steps.asked((*before, *SECOND, 420)))
        assert (info.num_moved > 0) is is_moved, (before, seconds)
        monkeypatch.undo()


def test_of_a_chat_that_loses_its_oldest_message_and_one_in_the_middle_what_stands_between_them_is_moved(
    loaded: HFBackend, monkeypatch: pytest.MonkeyPatch
) -> None:
    between, note, behind = [EOS, *range(50, 99), EOS, *range(200, 350)], [*range(400, 430)], [*range(99, 170)]
    steps = Steps(loaded, monkeypatch, heal="off")
    steps.answer(steps.asked((*SYSTEM, *OLDEST, *between, *note, *behind)))
    info = steps.answer(steps.asked((*SYSTEM, *between, *behind, 420)))
    assert info.num_moved == len(between) - COMPUTED_AGAIN


def test_many_turns_of_a_full_window_with_requests_beside_healing_leave_the_books_in_order(
    loaded: HFBackend, monkeypatch: pytest.MonkeyPatch
) -> None:
    steps = Steps(loaded, monkeypatch)
    monkeypatch.setattr(steps.core._scheduler._rate, "tokens_in", lambda seconds: 0)
    messages = [tuple(range(start, start + 60)) for start in range(50, 350, 60)]
    num_moved = 0
    for turn in range(12):
        prompt = (*SYSTEM, *(token for message in messages for token in message))
        num_moved += steps.answer(steps.asked(prompt, max_tokens=5)).num_moved
        for _ in range(turn % 3):
            steps.core.step()
        messages = [*messages[1:], tuple((7 * turn + token) % 400 + 50 for token in messages[-1])]
        loaded.kv.check_integrity()

    assert num_moved > 12 * 60
    run(steps.core, steps.asked(prompt))
    assert not steps.core.has_work
