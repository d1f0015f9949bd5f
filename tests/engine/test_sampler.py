"""What a sampler promises besides its arithmetic: seeds, neighbours, edges."""

import math

import pytest
import torch

from tightrope.engine.errors import InvalidRequest
from tightrope.engine.sampler.draw import splitmix64, uniform
from tightrope.engine.sampler.sampler import sample
from tightrope.engine.sampler.state import SamplerState
from tightrope.engine.sampler.steps import SamplingParams
from tightrope.engine.types import LogprobRequest

pytestmark = pytest.mark.quick

V = 20000


NEUTRAL = SamplingParams()


def state(
    params: SamplingParams = NEUTRAL, vocab_size: int = V, logprobs: LogprobRequest | None = None
) -> SamplerState:
    return SamplerState(params, [], vocab_size, logprobs)


def random_logits(num_rows: int, vocab_size: int = V) -> torch.Tensor:
    return torch.randn(num_rows, vocab_size, generator=torch.Generator().manual_seed(1)) * 3


def draw_one(logits: torch.Tensor, made: SamplerState) -> int:
    drawn = sample(logits[None], [made])[0]
    assert drawn is not None
    return drawn.token_id


def test_the_generator_is_splitmix64():
    assert [splitmix64(1234567, place) for place in range(3)] == [
        6457827717110365317,
        3203168211198807973,
        9817491932198370423,
    ]


def test_uniform_numbers_fill_their_interval_evenly_across_places_and_across_seeds():
    by_place = [uniform(7, place) for place in range(10_000)]
    by_seed = [uniform(seed, 0) for seed in range(10_000)]
    for numbers in (by_place, by_seed):
        counts = [sum(int(u * 20) == cell for u in numbers) for cell in range(20)]
        assert min(numbers) >= 0
        assert max(numbers) < 1
        assert sum((count - 500) ** 2 / 500 for count in counts) < 43.8  # chi-square, 19 degrees, p = 0.001


def test_tokens_come_as_often_as_they_are_likely():
    logits = torch.tensor([0.0, 1.0, 2.0, -1.0, 2.0, 0.5, -3.0, 1.5])
    states = [state(SamplingParams(temperature=0.8, seed=seed), 8) for seed in range(200)]
    counts = [0] * 8
    for _ in range(50):
        for made, drawn in zip(states, sample(logits.expand(200, 8), states), strict=True):
            counts[drawn.token_id] += 1
            made.append(drawn.token_id)
    expected = (logits.double() / 0.8).softmax(0) * 10_000
    assert sum((c - e) ** 2 / e for c, e in zip(counts, expected.tolist(), strict=True)) < 24.3  # 7 degrees, p = 0.001


def test_a_seed_says_the_same_whoever_its_neighbours_are():
    logits = random_logits(6)
    mixed = [
        SamplingParams(seed=1),
        SamplingParams(seed=2, top_p=0.95),
        SamplingParams(seed=3, top_k=1000, temperature=2.0),
        SamplingParams(seed=4, min_p=0.05),
        SamplingParams(seed=5, typical_p=0.9),
        SamplingParams(temperature=0.0),
    ]
    alone = [sample(logits[i : i + 1], [state(p)])[0] for i, p in enumerate(mixed)]
    assert sample(logits, [state(p) for p in mixed]) == alone
    assert sample(logits.flip(0), [state(p) for p in reversed(mixed)]) == alone[::-1]


def test_a_rewound_sequence_draws_again_what_it_drew():
    logits = random_logits(30)
    made = state(SamplingParams(seed=9, repetition_penalty=1.3, frequency_penalty=0.2, penalty_range=5))

    def continue_from(place: int) -> list[int]:
        drawn = []
        for row in logits[place:]:
            drawn.append(draw_one(row, made))
            made.append(drawn[-1])
        return drawn

    first = continue_from(0)
    made.truncate(11)
    assert continue_from(11) == first[11:]


def test_a_seed_is_drawn_and_told_when_none_is_given():
    one, other = state(), state()
    assert one.seed != other.seed
    assert 0 <= one.seed < 2**64
    assert state(SamplingParams(seed=0)).seed == 0


@pytest.mark.parametrize("broken", [math.nan, math.inf, -math.inf])
def test_a_row_without_numbers_draws_nothing_and_leaves_its_neighbours_alone(broken: float):
    logits = random_logits(3)
    states = [state(SamplingParams(seed=i, top_p=0.9), logprobs=LogprobRequest(i == 0, 2)) for i in range(3)]
    whole = sample(logits, states)
    logits[1] = broken
    assert sample(logits, states) == [whole[0], None, whole[2]]


def test_a_batch_of_greedy_rows_draws_nothing_from_a_row_without_numbers():
    logits = random_logits(2)
    logits[0, 7] = math.nan
    drawn = sample(logits, [state(SamplingParams(temperature=0.0))] * 2)
    assert drawn[0] is None
    assert drawn[1].token_id == int(logits[1].argmax())


@pytest.mark.parametrize("vocab_size", [5, 20000])
@pytest.mark.parametrize("logprobs", [None, LogprobRequest(processed=True)])
def test_greedy_takes_the_lowest_id_among_equals(vocab_size: int, logprobs: LogprobRequest | None):
    logits = torch.zeros(1, vocab_size)
    logits[0, 3:] = 1.0
    assert sample(logits, [state(SamplingParams(temperature=0.0), vocab_size, logprobs)])[0].token_id == 3


def test_top_k_keeps_exactly_k_of_equal_tokens_with_the_lowest_ids():
    drawn = sample(torch.zeros(1, V), [state(SamplingParams(top_k=5), logprobs=LogprobRequest(True, 5))])[0]
    assert drawn.top == tuple((token, pytest.approx(math.log(0.2))) for token in range(5))


def test_top_p_stops_at_the_token_that_reaches_it():
    params = SamplingParams(top_k=4, top_p=0.5)  # after top_k the mass is a float64 sum, so a half is a half
    drawn = sample(torch.zeros(1, V), [state(params, logprobs=LogprobRequest(True, 4))])[0]
    assert [token for token, _ in drawn.top] == [0, 1]


def test_the_last_of_the_likeliest_tokens_brings_its_equals_along_in_processed_logprobs_only():
    logits = torch.full((1, V), -20.0)
    logits[0, 10:14] = torch.tensor([5.0, 4.0, 4.0, 4.0])
    processed, raw = (
        sample(logits, [state(SamplingParams(top_p=0.999), logprobs=LogprobRequest(p, 2))])[0] for p in (True, False)
    )
    assert [token for token, _ in processed.top] == [10, 11, 12, 13]
    assert [token for token, _ in raw.top] == [10, 11]


def test_a_greedy_token_has_its_probability_among_all_tokens():
    logits = random_logits(1)
    drawn = sample(logits, [state(SamplingParams(temperature=0.0), logprobs=LogprobRequest(True, 1))])[0]
    assert drawn.logprob == pytest.approx(float(logits.log_softmax(-1).max()), abs=1e-5)
    assert drawn.top == ((drawn.token_id, drawn.logprob),)


def test_suppressed_tokens_are_not_drawn_until_they_are_released():
    logits = random_logits(1)
    made = state(SamplingParams(temperature=0.0))
    best, second = logits[0].topk(2).indices.tolist()
    made.suppressed = (best,)
    assert draw_one(logits[0], made) == second
    made.suppressed = ()
    assert draw_one(logits[0], made) == best


def test_a_bias_of_a_hundred_bans_or_forces_a_token():
    logits = random_logits(1)
    best = int(logits.argmax())
    assert all(draw_one(logits[0], state(SamplingParams(logit_bias={best: -100.0}, seed=i))) != best for i in range(20))
    assert all(draw_one(logits[0], state(SamplingParams(logit_bias={5: 100.0}, seed=i))) == 5 for i in range(20))


def test_a_banned_token_stays_banned_whatever_is_added():
    logits = torch.tensor([-math.inf, 1.0])
    made = state(SamplingParams(logit_bias={0: 100.0}, repetition_penalty=0.5, presence_penalty=-2.0), 2)
    made.append(0)
    assert draw_one(logits, made) == 1


def test_a_bias_outside_the_vocabulary_is_refused_by_name():
    with pytest.raises(InvalidRequest, match="logit_bias names token 20000, but token ids go from 0 to 19999"):
        state(SamplingParams(logit_bias={V: 1.0}))


def test_penalties_follow_a_long_output_through_a_short_range():
    made = state(SamplingParams(temperature=0.0, presence_penalty=2.0, penalty_range=4))
    for token in range(1000):
        made.append(token)
    logits = torch.zeros(V)
    logits[996:1000] = 1.0
    logits[100] = 0.5
    assert draw_one(logits, made) == 100
    assert made.edits.entries()[0].size < 400


def test_logits_are_left_as_they_were():
    logits = random_logits(2)
    before = logits.clone()
    states = [state(SamplingParams(logit_bias={3: 5.0}, top_p=0.9), logprobs=LogprobRequest(False, 3)) for _ in "ab"]
    states[0].suppressed = (1, 2)
    sample(logits, states)
    assert torch.equal(logits, before)


def test_rows_that_are_a_view_of_a_larger_tensor_are_sampled_as_copies_would_be():
    wide = random_logits(4, V + 7)
    view = wide[::2, 3 : V + 3]
    states = [state(SamplingParams(seed=i, top_k=20, repetition_penalty=1.1)) for i in range(2)]
    assert sample(view, states) == sample(view.contiguous(), states)


def test_an_empty_batch_is_empty():
    assert sample(torch.empty(0, V), []) == []
