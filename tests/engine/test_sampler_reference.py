"""The sampler against the float64 reference, over random logits, parameters and batches."""

import itertools
import math

import numpy as np
import pytest
import sampling_reference as reference
import torch
from error_bounds import UNIT, roundings
from hypothesis import given, settings
from hypothesis import strategies as st

from tightrope.engine.guided.grammar import Packed
from tightrope.engine.sampler.draw import uniform
from tightrope.engine.sampler.penalties import edit_logits
from tightrope.engine.sampler.sampler import Sampled, prompt_logprobs, sample
from tightrope.engine.sampler.state import SamplerState
from tightrope.engine.sampler.steps import SamplingParams
from tightrope.engine.types import LogprobRequest

Row = tuple[str, int, SamplingParams, int]  # shape, seed of the logits, parameters, place in the output
History = tuple[SamplingParams, list[int], list[int], set[int], set[int] | None]  # ..., output, suppressed, allowed
VOCAB_SIZES = (
    1,
    2,
    3,
    31,
    32,
    33,
    100,
    1000,
    5000,
    12000,
)  # short lists are possible above 900 tokens with top_k, 8200 without
# of what a whole row weighs: its exponentials are off by 2e-7, and up to 64 of them are summed in float32; their
# exponents are off by 8 roundings of their own size, whose mean, by their weights, is at most log V
EDGE = 2e-7 + roundings(66) + 8 * UNIT * math.log(max(VOCAB_SIZES))

shapes = st.sampled_from(
    ["normal", "peaked", "flat", "equal", "steps", "few_levels", "huge", "tiny", "mostly_banned", "nothing", "nan"]
)
unit = st.floats(0.001, 1.0)
params = st.builds(
    SamplingParams,
    temperature=st.sampled_from([0.0, 1e-30, 0.01, 0.7, 1.0, 1.0, 1.5, 1e6]),
    top_k=st.sampled_from([0, 0, 1, 2, 20, 50, 400, 100000]),
    top_p=st.one_of(st.just(1.0), unit),
    min_p=st.one_of(st.just(0.0), unit),
    typical_p=st.one_of(st.just(1.0), st.just(1.0), unit),
    seed=st.integers(0, 2**64 - 1),
)


def logits_row(shape: str, vocab_size: int, seed: int) -> np.ndarray:
    rng = np.random.default_rng(seed)
    row = rng.normal(0, 3, vocab_size)
    match shape:
        case "peaked":
            row[rng.integers(vocab_size)] += 20
        case "flat":
            row /= 100
        case "equal":
            row[:] = row[0]
        case "steps":
            row = np.round(row)
        case "few_levels":
            row = rng.integers(0, 2, vocab_size) * 4.0
        case "huge":
            row *= 1e37
        case "tiny":
            row *= 1e-37
        case "mostly_banned":
            row[rng.random(vocab_size) < 0.9] = -np.inf
        case "nothing":
            row[:] = -np.inf
        case "nan":
            row[rng.integers(vocab_size)] = np.nan
    return row.astype(np.float32)


rows = st.tuples(shapes, st.integers(0, 2**32 - 1), params, st.integers(0, 1000))


@settings(max_examples=120)
@given(vocab_size=st.sampled_from(VOCAB_SIZES), batch=st.lists(rows, min_size=1, max_size=5))
def test_kept_tokens_probabilities_and_draws_equal_the_reference(vocab_size: int, batch: list[Row]):
    check_batch(vocab_size, batch)


ALONE = (
    SamplingParams(seed=1),
    SamplingParams(seed=2, top_p=0.95),
    SamplingParams(seed=3, top_p=0.5, temperature=0.7),
    SamplingParams(seed=4, typical_p=0.9),
    SamplingParams(seed=5, min_p=0.002),
    SamplingParams(seed=6, min_p=0.05, temperature=2.0),
    SamplingParams(seed=7, top_k=20),
    SamplingParams(seed=8, top_k=1000, top_p=0.9),
    SamplingParams(temperature=0.0),
)


@pytest.mark.parametrize("shape", ["normal", "peaked", "flat", "equal", "steps", "few_levels", "mostly_banned"])
def test_a_list_that_is_too_short_is_noticed_for_every_parameter_alone(shape: str):
    """At 9,000 tokens, 141 blocks, a short list is at first all that is looked at."""
    for place in range(4):
        check_batch(9000, [(shape, 10 * place + i, p, place) for i, p in enumerate(ALONE)])


def check_batch(vocab_size: int, batch: list[Row]) -> None:
    """Every row against the reference, and lists that were long from the start against lists that grew."""
    logits = np.stack([logits_row(shape, vocab_size, seed) for shape, seed, _, _ in batch])
    listed, plain = (
        sample(torch.from_numpy(logits), [state(p, vocab_size, place, top) for _, _, p, place in batch])
        for top in (vocab_size, 0)
    )

    for row, (_, _, p, place), everything, short in zip(logits.astype(np.float64), batch, listed, plain, strict=True):
        if not reference.is_drawable(row):
            assert everything is None
            assert short is None
            continue
        assert (short.token_id, short.logprob) == (everything.token_id, everything.logprob)
        kept = check_kept(row, p, everything)
        check_drawn(kept, 0.0 if p.temperature == 0 else uniform(p.seed, place), everything)


def state(p: SamplingParams, vocab_size: int, place: int, top: int) -> SamplerState:
    made = SamplerState(p, [], vocab_size, LogprobRequest(processed=True, top=top))
    made.num_output = place
    return made


def check_kept(row: np.ndarray, p: SamplingParams, result: Sampled) -> reference.Distribution:
    """The kept set is the reference's; where a border lies within EDGE, between those of both sides of the border."""
    kept = {token for token, logprob in result.top if logprob > -600}
    nudged = [visible(reference.truncate(row, q)) for q in nudges(p)]
    assert set.intersection(*nudged) <= kept <= set.union(*nudged)
    probabilities = dict(reference.softmax(row, p.temperature or 1.0))
    total = math.fsum(probabilities[token] for token, _ in result.top)
    expected = [(token, probabilities[token] / total) for token, _ in result.top]
    assert [token for token, _ in expected] == sorted(
        (token for token, _ in expected), key=lambda token: (-row[token], token)
    )
    for (_, probability), (_, logprob) in zip(expected, result.top, strict=True):
        assert math.exp(logprob) == np.float64(probability).round(300) or abs(logprob - math.log(probability)) < EDGE
    return expected


def visible(distribution: reference.Distribution) -> set[int]:
    return {token for token, probability in distribution if probability > math.exp(-600)}


def nudges(p: SamplingParams) -> list[SamplingParams]:
    """The parameters with every border moved up and down by what rounding may do."""
    tops, minima, typicals = (
        [value] if value == neutral else [value * (1 - EDGE), value, min(value * (1 + EDGE), 1 - 1e-12)]
        for value, neutral in ((p.top_p, 1.0), (p.min_p, 0.0), (p.typical_p, 1.0))
    )
    return [
        SamplingParams(p.temperature, p.top_k, top, minimum, typical)
        for top, minimum, typical in itertools.product(tops, minima, typicals)
    ]


def check_drawn(kept: reference.Distribution, u: float, result: Sampled) -> None:
    """The drawn token is the reference's, or its neighbour when u lies within EDGE of their border."""
    assert result.token_id in {reference.draw(kept, min(max(u + nudge, 0.0), 1.0)) for nudge in (-EDGE, 0, EDGE)}
    assert result.logprob == dict(result.top)[result.token_id]


tokens = st.integers(0, 49)
penalties = st.builds(
    SamplingParams,
    repetition_penalty=st.sampled_from([1.0, 1.15, 0.8, 2.0]),
    frequency_penalty=st.sampled_from([0.0, 0.5, -2.0]),
    presence_penalty=st.sampled_from([0.0, 0.7, -1.0]),
    relative_frequency_penalty=st.sampled_from([0.0, 1.5]),
    penalty_range=st.sampled_from([0, 0, 1, 4, 30]),
    repetition_decay=st.sampled_from([0, 0, 1, 7, 100]),
    logit_bias=st.dictionaries(tokens, st.floats(-100, 100, width=32), max_size=3),
)
histories = st.tuples(
    penalties,
    st.lists(tokens, max_size=40),
    st.lists(tokens, max_size=40),
    st.sets(tokens, max_size=2),
    st.none() | st.sets(tokens),
)


def packed(allowed: set[int], vocab_size: int) -> Packed:
    bits = np.zeros(vocab_size, np.uint8)
    bits[sorted(allowed)] = 1
    return np.packbits(bits, bitorder="little")


@settings(max_examples=150)
@given(batch=st.lists(histories, min_size=1, max_size=4), rewind=st.integers(0, 40), seed=st.integers(0, 2**32 - 1))
def test_penalised_logits_equal_the_reference_even_after_a_rewind(batch: list[History], rewind: int, seed: int):
    logits = np.stack([logits_row("mostly_banned" if i % 2 else "normal", 50, seed + i) for i in range(len(batch))])
    states = []
    for p, prompt, output, *_ in batch:
        made = SamplerState(p, prompt, 50, None)
        for token in [*output, *range(rewind)]:
            made.append(token)
        made.truncate(len(output))
        for token in output[len(output) // 2 :]:
            made.append(token)
        states.append(made)
    before = torch.from_numpy(logits.copy())

    masks = {row: packed(allowed, 50) for row, (*_, allowed) in enumerate(batch) if allowed is not None}
    edited = edit_logits(before, [s.edits for s in states], [tuple(banned) for *_, banned, _ in batch], masks)

    for row, (p, prompt, output, banned, allowed), result in zip(logits, batch, edited.numpy(), strict=True):
        whole = [*output, *output[len(output) // 2 :]]
        excluded = set() if allowed is None else set(range(50)) - allowed
        expected = reference.penalise(row.astype(np.float64), p, prompt, whole, banned | excluded)
        # the logit times up to 2, each penalty and the bias: eight roundings of each at most
        most_counted = abs(p.frequency_penalty) * len(whole) + abs(p.presence_penalty) + p.relative_frequency_penalty
        size = 2 * np.abs(row) + most_counted + max(map(abs, p.logit_bias.values()), default=0.0)
        is_possible = expected > -np.inf
        np.testing.assert_array_equal(result > -np.inf, is_possible)
        assert (np.abs(result[is_possible] - expected[is_possible]) <= 8 * UNIT * size[is_possible]).all()
    assert torch.equal(before, torch.from_numpy(logits))


@settings(max_examples=60)
@given(vocab_size=st.sampled_from(VOCAB_SIZES), seed=st.integers(0, 2**32 - 1), top=st.integers(0, 8), shape=shapes)
def test_raw_logprobs_are_the_models_own_and_list_exactly_the_wanted_number(
    vocab_size: int, seed: int, top: int, shape: str
):
    row = logits_row(shape, vocab_size, seed)
    exact = row.astype(np.float64)
    p = SamplingParams(temperature=0.5, repetition_penalty=1.5, top_k=5, seed=seed)
    made = SamplerState(p, range(vocab_size), vocab_size, LogprobRequest(processed=False, top=top))

    drawn = sample(torch.from_numpy(row[None]), [made])[0]
    scored = prompt_logprobs(torch.from_numpy(row[None]), [seed % vocab_size], top)[0]

    if not reference.is_drawable(exact):
        assert drawn is None
        assert (scored.logprob, scored.top) == (None, ())
        return
    expected = reference.log_softmax(exact)
    possible = [token for token in range(vocab_size) if exact[token] > -math.inf]
    likeliest = sorted(possible, key=lambda token: (-exact[token], token))[:top]
    assert drawn is not None
    for result in (drawn, scored):
        assert [token for token, _ in result.top] == likeliest
        for token, logprob in [(result.token_id, result.logprob), *result.top]:
            np.testing.assert_allclose(logprob, expected[token], rtol=2.0**-50, atol=EDGE)
