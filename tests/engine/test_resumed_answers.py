"""An engine's answers, gone on with by another engine: no token given out is lost, doubled or changed."""

from collections.abc import Sequence
from typing import TYPE_CHECKING

import pytest
from engine_runs import make_core, request
from fakes import FakeBackend, letters
from msgspec.structs import replace

from tightrope.engine.core import EngineCore
from tightrope.engine.errors import BackendFailed, EngineError
from tightrope.engine.process.stream import MAX_TRIES, Stream
from tightrope.engine.sampler.steps import SamplingParams
from tightrope.engine.types import Delta, GenerateRequest, Grammar, Guidance, LogprobRequest, Token

if TYPE_CHECKING:
    from torch import Tensor

LENGTH = 24


class Spread(FakeBackend):
    """A model with something to choose: every letter has a logit that depends on all tokens before it."""

    def _row(self, so_far: Sequence[int]) -> "Tensor":
        import torch

        generator = torch.Generator().manual_seed(letters(so_far) + 31 * len(so_far))
        row = torch.full((self.tokenizer.vocab_size,), -30.0)
        row[97:103] = 2 * torch.randn(6, generator=generator)
        return row


class Front:
    """What the front keeps of a request, and what its client was given."""

    def __init__(self, asked: GenerateRequest) -> None:
        self.asked = asked
        self.stream = Stream(asked, 0.0)

    def given(self) -> list[Delta]:
        items = []
        while not self.stream.items.empty():
            item = self.stream.items.get_nowait()
            assert not isinstance(item, EngineError)
            items.append(item)
        return items

    def submit_to(self, core: EngineCore) -> None:
        message = self.stream.submit()
        core.add(core.prepare(message.request, message.written))


def run(core: EngineCore, *fronts: Front, num_steps: int = 1 << 30) -> None:
    """Run the requests of these fronts for so many steps at most."""
    for front in fronts:
        front.submit_to(core)
    while core.has_work and num_steps:
        num_steps -= 1
        result = core.step()
        assert not result.failed
        for delta in (*result.progress, *result.deltas):
            next(f for f in fronts if f.asked.request_id == delta.request_id).stream.take(delta, 1.0)


def tokens_of(deltas: list[Delta], index: int) -> list[Token]:
    return [token for delta in deltas if delta.index == index for token in delta.tokens]


def told(deltas: list[Delta], index: int) -> tuple[str, list[Token], object]:
    """Text, tokens with their log probabilities, and the end of one choice."""
    of_choice = [delta for delta in deltas if delta.index == index]
    finish = of_choice[-1].finish
    assert finish is not None
    ends = [delta for delta in of_choice if delta.finish is not None]
    assert len(ends) == 1
    assert sum(delta.prompt is not None for delta in of_choice) == 1
    what = (finish.reason, finish.num_tokens, finish.matched)
    return "".join(delta.text for delta in of_choice), tokens_of(deltas, index), what


SEEDED = SamplingParams(temperature=1.0, seed=7)
HARD = {"mirostat": {"mirostat_mode": 2, "mirostat_tau": 1.5}, "adaptive": {"adaptive_target": 0.3}}
PENALTIES = {"repetition_penalty": 1.3, "frequency_penalty": 0.5, "dry_multiplier": 1.0, "dry_allowed_length": 1}
ASKED = {
    "greedy": request(max_tokens=LENGTH),
    "seeded": request(sampling=SEEDED, max_tokens=LENGTH),
    "no seed": request(sampling=SamplingParams(temperature=1.0), max_tokens=LENGTH),
    "mirostat": request(sampling=replace(SEEDED, **HARD["mirostat"]), max_tokens=LENGTH),
    "mirostat 1": request(sampling=replace(SEEDED, mirostat_mode=1, mirostat_tau=1.5), max_tokens=LENGTH),
    "adaptive-p": request(sampling=replace(SEEDED, **HARD["adaptive"]), max_tokens=LENGTH),
    "penalties": request(sampling=replace(SEEDED, **PENALTIES), max_tokens=LENGTH),
    "xtc": request(sampling=replace(SEEDED, xtc_probability=0.5, xtc_threshold=0.1), max_tokens=LENGTH),
    "banned strings": request(
        sampling=replace(SEEDED, banned_strings=("ab", "ca", "cde", "fff", "eb")), max_tokens=LENGTH
    ),
    "banned and steered": request(
        sampling=replace(SEEDED, banned_strings=("ab", "ca", "cde"), **HARD["mirostat"]), max_tokens=LENGTH
    ),
    "stop strings": request(sampling=SEEDED, max_tokens=LENGTH, strings=("abcde", "fa"), min_tokens=9),
    "three choices": request(sampling=SEEDED, n=3, max_tokens=LENGTH),
    "grammar": request(sampling=SEEDED, grammar=Grammar("regex", "([a-c][d-f]){9}", "regex"), max_tokens=LENGTH),
    "guidance": replace(request(sampling=SEEDED, max_tokens=LENGTH), guidance=Guidance("abc" * 20, 2.0)),
    "log probabilities": request(
        sampling=SEEDED, logprobs=LogprobRequest(processed=True, top=2), prompt_logprobs=1, max_tokens=LENGTH
    ),
}


@pytest.mark.parametrize("what", ASKED)
def test_an_answer_goes_on_from_every_step_as_if_nothing_had_happened(what: str):
    asked = ASKED[what]
    undisturbed = Front(asked)
    run(core := make_core(Spread()), undisturbed)
    whole = undisturbed.given()
    num_steps = core.stats().steps
    assert num_steps > 8

    for place in range(1, num_steps):
        front = Front(asked)
        run(make_core(Spread()), front, num_steps=place)
        front.stream.lose_engine()
        given = front.given()
        run(core := make_core(Spread()), front)
        deltas = given + front.given()
        for index in range(asked.n):
            text, tokens, end = told(deltas, index)
            if what == "no seed":
                assert tokens[: len(tokens_of(given, index))] == tokens_of(given, index)
                assert (len(tokens), len(text)) == (LENGTH, LENGTH)
            else:
                assert (text, tokens, end) == told(whole, index)
        core._backend.kv.check_integrity()


@pytest.mark.parametrize("params", [SamplingParams(temperature=0.0), SEEDED], ids=["greedy", "seeded"])
@pytest.mark.parametrize("guidance", [None, Guidance("led away from " * 5, 1.5)], ids=["plain", "guided"])
def test_the_next_engine_runs_the_steps_of_the_first(params: SamplingParams, guidance: Guidance | None):
    asked = replace(request(prompt="a long prompt " * 20, sampling=params), guidance=guidance)
    first, second = Spread(max_step_tokens=33), Spread(max_step_tokens=512)
    run(make_core(first), front := Front(asked), num_steps=20)
    front.stream.lose_engine()
    run(make_core(second), front)

    steps = [
        [[(chunk.start, tuple(chunk.token_ids)) for chunk in step] for step in backend.steps]
        for backend in (first, second)
    ]
    assert max(len(step) for step in steps[0]) == 1 + (guidance is not None)
    assert len(steps[0]) == 20
    assert steps[1][:20] == steps[0]


def test_tokens_that_were_cached_are_read_again_in_steps_that_give_way():
    core = make_core(Spread(max_step_tokens=64))
    prompt = "what has been said already " * 8
    run(core, Front(request("before", prompt, max_tokens=1)))
    front = Front(request("r", prompt + "and more", max_tokens=LENGTH))
    run(core, front, num_steps=10)
    found = front.stream.submit().written[0]
    assert found is not None
    assert found.layout.found[0] > 200
    front.stream.lose_engine()
    given = front.given()

    run(make_core(later := Spread(max_step_tokens=64)), front)

    assert max(sum(len(chunk.token_ids) for chunk in step) for step in later.steps) <= 64
    run(make_core(Spread()), undisturbed := Front(request("r", prompt + "and more", max_tokens=LENGTH)))
    assert told(given + front.given(), 0) == told(undisturbed.given(), 0)


def test_answers_that_run_side_by_side_go_on_in_few_steps():
    asked = [request(name, f"prompt {name}", sampling=SEEDED, max_tokens=200) for name in "abcd"]
    alone = {}
    for one in asked:
        run(make_core(Spread()), front := Front(one))
        alone[one.request_id] = told(front.given(), 0)
    fronts = [Front(one) for one in asked]
    run(make_core(Spread()), *fronts, num_steps=150)
    given = []
    for front in fronts:
        front.stream.lose_engine()
        given.append(front.given())

    run(make_core(later := Spread(max_step_tokens=64)), *fronts)

    for front, before in zip(fronts, given, strict=True):
        assert told(before + front.given(), 0) == alone[front.asked.request_id]
    assert len(later.steps) < 50 + 4 * 200 / 16, "what was given out is not run token by token"


def test_a_choice_that_has_ended_is_not_written_again():
    asked = request(sampling=SEEDED, n=3, max_tokens=LENGTH, strings=("b",))
    run(make_core(Spread()), undisturbed := Front(asked))
    whole = undisturbed.given()
    lengths = {told(whole, index)[2] for index in range(3)}
    assert len(lengths) > 1, "they end at different times"
    front = Front(asked)
    core = make_core(Spread())
    run(core, front, num_steps=1)
    while front.stream.num_open == 3:
        for delta in core.step().deltas:
            front.stream.take(delta, 1.0)
    front.stream.lose_engine()
    deltas = front.given()
    run(make_core(Spread()), front)
    deltas += front.given()
    assert [told(deltas, index) for index in range(3)] == [told(whole, index) for index in range(3)]


def test_an_answer_that_has_ended_every_engine_so_far_is_not_tried_for_ever():
    stream = Stream(request(), 0.0)
    for _ in range(5):
        assert stream.lose_engine(), "it only waited"
    for place in range(1, MAX_TRIES + 1):
        stream.has_begun = True
        assert stream.lose_engine() == (place < MAX_TRIES)


def test_an_answer_that_does_not_fit_the_next_engine_ends_with_a_word():
    asked = request(max_tokens=None)
    front = Front(asked)
    run(make_core(Spread(max_model_len=200)), front, num_steps=80)
    front.stream.lose_engine()
    with pytest.raises(BackendFailed, match="can't go on"):
        front.submit_to(make_core(Spread(max_model_len=64)))


def test_the_last_delta_tells_the_times_of_all_engines():
    front = Front(request(max_tokens=LENGTH))
    run(make_core(Spread()), front, num_steps=5)
    front.stream.lose_engine()
    core = make_core(Spread())
    front.submit_to(core)
    while core.has_work:
        for delta in core.step().deltas:
            front.stream.take(delta, 9.0)
    finish = front.given()[-1].finish
    assert finish is not None
    assert (finish.timings.prefill_s, finish.timings.decode_s) == (1.0, 8.0)
