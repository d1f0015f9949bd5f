"""DRY, its breakers, and n-grams that come once, against the reference that looks at every place anew."""

import math

import numpy as np
import pytest
import sampling_reference as reference
import torch
from error_bounds import UNIT
from hypothesis import given, settings
from hypothesis import strategies as st

from tightrope.engine.sampler.breakers import Breakers
from tightrope.engine.sampler.repeats import Repeats, Runs
from tightrope.engine.sampler.sampler import sample
from tightrope.engine.sampler.state import SamplerState
from tightrope.engine.sampler.steps import LONGEST_RUN, SamplingParams

pytestmark = pytest.mark.quick

PIECES = ("a", "b", "ab", "\n", "ba", "")
texts = st.text("ab\n", max_size=3)


def token_bytes(token_id: int) -> bytes:
    return PIECES[token_id].encode()


def breaks_of(token_ids: list[int], breakers: tuple[str, ...]) -> list[bool]:
    """Whether a breaker's last character is in the token, by the plain text."""
    ends = np.cumsum([len(PIECES[token_id]) for token_id in token_ids])
    text = "".join(PIECES[token_id] for token_id in token_ids)
    return [
        any(
            text[:end].endswith(breaker)
            for end in range(stop - len(PIECES[token_id]) + 1, stop + 1)
            for breaker in breakers
            if breaker
        )
        for token_id, stop in zip(token_ids, ends.tolist(), strict=True)
    ]


params = st.builds(
    SamplingParams,
    dry_multiplier=st.sampled_from([0.0, 0.8]),
    dry_base=st.sampled_from([1.0, 1.75, 1e30]),
    dry_allowed_length=st.integers(1, 4),
    dry_range=st.sampled_from([0, 0, 3, 20]),
    dry_sequence_breakers=st.lists(texts, max_size=3).map(tuple),
    no_repeat_ngram_size=st.integers(0, 4),
)
tokens = st.lists(st.integers(0, len(PIECES) - 1), max_size=40)


@settings(max_examples=200)
@given(p=params, prompt=tokens, output=tokens, rewind=tokens)
def test_penalties_of_repeats_equal_the_reference_even_after_a_rewind(
    p: SamplingParams, prompt: list[int], output: list[int], rewind: list[int]
):
    repeats = Repeats(p, prompt, token_bytes)
    for token_id in [*output, *rewind]:
        repeats.append(token_id)
    repeats.truncate(len(prompt) + len(output))
    token_ids, subtract = repeats.penalties()

    whole = [*prompt, *output]
    expected = np.zeros(len(PIECES))
    if p.dry_multiplier:
        for token, penalty in reference.dry(whole, p, breaks_of(whole, p.dry_sequence_breakers)).items():
            expected[token] += penalty
    if p.no_repeat_ngram_size:
        for token in reference.repeated_ngrams(whole, p.no_repeat_ngram_size):
            expected[token] = math.inf
    found = np.zeros(len(PIECES))
    np.add.at(found, token_ids, subtract)
    np.testing.assert_allclose(found, expected, rtol=1.001 * UNIT)  # of float64, once to float32


@settings(max_examples=30)
@given(period=st.integers(1, 3), size=st.integers(500, 1100), window=st.sampled_from([0, 100]))
def test_runs_longer_than_the_longest_count_as_that_long(period: int, size: int, window: int):
    token_ids = [i % period for i in range(size)]
    grown = Runs([])
    for token_id in token_ids:
        grown.append(token_id)
    for runs in (grown, Runs(token_ids)):
        following, lengths = runs.following(2, window)
        found = dict(zip(following.tolist(), lengths.tolist(), strict=True))
        assert found == {k: n for k, n in reference.runs(token_ids, [False] * size, window).items() if n >= 2}
    assert window or max(found.values()) == LONGEST_RUN


def test_a_breaker_is_found_inside_a_token_and_across_several():
    breakers = Breakers(["ab\n", "\nb"], token_bytes)
    assert breakers.ends_in([0, 1, 3])
    assert breakers.ends_in([2, 3])
    assert breakers.ends_in([3, 5, 5, 4])
    assert not breakers.ends_in([3, 0, 1])
    assert not Breakers([""], token_bytes).ends_in([0])


def test_ten_thousand_breakers_and_an_enormous_base_leave_numbers_finite():
    breakers = tuple(f"{i:x}" * (1 + i % 12) for i in range(10_000))
    p = SamplingParams(dry_multiplier=1e30, dry_base=1e30, dry_range=10**9, dry_sequence_breakers=breakers, seed=1)
    made = SamplerState(p, [5, 6, 7] * 400, 50, None, None, lambda token_id: b"x")
    row = torch.zeros(1, 50)
    row[0, 5] = 10.0
    drawn = sample(row, [made])[0]
    assert drawn is not None
    assert drawn.token_id != 5
    made.append(drawn.token_id, drawn.surprise)
    after = sample(row, [made])[0]
    assert after is not None
    assert after.token_id == 5  # nothing is repeated any more


def test_a_token_that_may_not_come_again_can_leave_none_to_draw():
    made = SamplerState(SamplingParams(no_repeat_ngram_size=1), [0, 1, 2], 3, None)
    assert sample(torch.zeros(1, 3), [made]) == [None]


def test_banned_tokens_are_never_drawn_whatever_their_bias():
    p = SamplingParams(banned_tokens=(1, 2), logit_bias={1: 100.0}, repetition_penalty=0.1)
    made = SamplerState(p, [1], 4, None)
    drawn = [sample(torch.zeros(1, 4), [made]) for made.num_output in range(30)]
    assert {d[0].token_id for d in drawn if d[0] is not None} == {0, 3}
