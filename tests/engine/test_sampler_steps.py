"""Every step, in any order and any company, against the float64 reference."""

import math
from collections.abc import Mapping

import numpy as np
import pytest
import sampling_reference as reference
import torch
from error_bounds import UNIT, roundings
from hypothesis import HealthCheck, assume, given, settings
from hypothesis import strategies as st
from msgspec import structs

from tightrope.engine.sampler.draw import dice, uniform
from tightrope.engine.sampler.mirostat import next_mu
from tightrope.engine.sampler.sampler import Sampled, sample
from tightrope.engine.sampler.state import SamplerState
from tightrope.engine.sampler.steps import NEUTRAL, SAMPLER_ORDER, STEPS, SamplingParams
from tightrope.engine.sampler.transforms import transformed
from tightrope.engine.types import LogprobRequest
from tightrope.kernels import dispatch
from tightrope.kernels.forms.rows import SUMS

pytestmark = pytest.mark.quick

VOCAB_SIZES = (1, 2, 3, 30, 400)
# of a border, of what a whole row weighs: its exponentials are off by 2e-7, and up to 64 of them are summed in float32;
# their exponents, through six steps, by 40 roundings of their size, whose mean, by their weights, is at most log V
EDGE = 2e-7 + roundings(66) + 40 * UNIT * math.log(max(VOCAB_SIZES))
# of a probability, whose logarithm is at least -600: as many roundings of float64, in up to six steps
EXACT = 6 * 16 * 600 * 2.0**-53
# of an entropy, the logarithm of a sum less a mean of logarithms: where one token has almost all, little else is left
ENTROPY = 16 * (1 + math.log(max(VOCAB_SIZES))) * 2.0**-53
unit = st.floats(0.05, 0.98)


def maybe(values: st.SearchStrategy[float], neutral: float) -> st.SearchStrategy[float]:
    return st.one_of(st.just(neutral), st.just(neutral), values)


VALUES: Mapping[str, st.SearchStrategy[object]] = {
    "temperature": st.sampled_from([0.3, 1.0, 1.0, 2.5]),
    "top_k": st.sampled_from([0, 0, 3, 40]),
    "top_p": maybe(unit, 1.0),
    "min_p": maybe(st.floats(0.001, 0.3), 0.0),
    "typical_p": maybe(unit, 1.0),
    "dynatemp_range": maybe(st.floats(0.1, 1.0), 0.0),
    "dynatemp_exponent": st.sampled_from([1.0, 0.5, 2.0]),
    "smoothing_factor": maybe(st.floats(0.05, 2.0), 0.0),
    "smoothing_curve": st.sampled_from([1.0, 2.5, 6.0]),
    "top_n_sigma": maybe(st.floats(0.5, 3.0), 0.0),
    "tfs": maybe(unit, 1.0),
    "top_a": maybe(st.floats(0.01, 0.9), 0.0),
    "epsilon_cutoff": maybe(st.floats(1e-4, 0.1), 0.0),
    "eta_cutoff": maybe(st.floats(1e-4, 0.1), 0.0),
    "xtc_probability": maybe(st.sampled_from([0.5, 1.0]), 0.0),
    "xtc_threshold": st.floats(0.01, 0.5),
    "xtc_spares_ends": st.booleans(),  # It comes to token ids before the steps see it.
    "xtc_ignore_tokens": st.lists(st.integers(0, 9), max_size=3).map(tuple),
    "mirostat_mode": st.sampled_from([0, 0, 0, 1, 2]),
    "mirostat_tau": st.floats(0.5, 8.0),
    "adaptive_target": maybe(st.floats(0.0, 1.0), -1.0),
    "skew": maybe(st.floats(-3.0, 3.0), 0.0),
    "min_keep": st.sampled_from([0, 0, 0, 1, 5]),
    "order": st.one_of(st.just(()), st.permutations(SAMPLER_ORDER).map(lambda order: tuple(order[:6]))),
    "seed": st.integers(0, 2**64 - 1),
}
params = st.builds(SamplingParams, **VALUES)
OF_THE_NEXT_TOKEN_ALONE = {"mirostat_eta", "adaptive_decay"}
THRESHOLDS = [  # of what a step keeps: at a border, a little more or less of them is another token
    name
    for step in STEPS
    for name in step.params
    if step.run and step.removes and isinstance(getattr(NEUTRAL, name), float)
    if name not in {"xtc_probability", *OF_THE_NEXT_TOKEN_ALONE}
]


def test_the_examples_vary_every_parameter_of_the_chain():
    varied = {name for step in STEPS if step.run or step.name == "min_keep" for name in step.params}
    assert varied - OF_THE_NEXT_TOKEN_ALONE <= VALUES.keys()


def logits_row(shape: str, vocab_size: int, seed: int) -> np.ndarray:
    row = np.random.default_rng(seed).normal(0, 2.5, vocab_size)
    match shape:
        case "peaked":
            row[seed % vocab_size] += 15
        case "zipf":
            row = -1.6 * np.log(np.random.default_rng(seed).permutation(vocab_size) + 1.0) + row / 10
        case "mostly_banned":
            row[np.random.default_rng(seed + 1).random(vocab_size) < 0.9] = -np.inf
            row[seed % vocab_size] = 1.0
    return row.astype(np.float32)


def expected(row: np.ndarray, p: SamplingParams, place: int) -> tuple[reference.Distribution, dict[int, float]]:
    """What the reference keeps, and how far off each probability may be, as a part of it.

    Examples are dropped where a border or a rival lies within EDGE of a token.
    """
    exact, acts = row.astype(np.float64), dice(p.seed or 0, place) < p.xtc_probability
    kept = reference.truncate(exact, p, acts=acts)
    for factor in (1 - EDGE, 1 + EDGE):  # Two tokens may be as typical as each other, one likelier and one less likely.
        other = reference.truncate(exact * factor, p, acts=acts)
        assume({token for token, _ in other} == {token for token, _ in kept})
    for name in THRESHOLDS:
        value, neutral = getattr(p, name), getattr(NEUTRAL, name)
        for factor in (1 - EDGE, 1 + EDGE) if value != neutral else ():
            nudged = min(value * factor, 1 - 1e-12) if neutral == 1 else value * factor
            other = reference.truncate(exact, structs.replace(p, **{name: nudged}), acts=acts)
            assume({token for token, _ in other} == {token for token, _ in kept})
    tolerances = dict.fromkeys(dict(kept), EXACT)
    for off in (-ENTROPY, ENTROPY) if p.dynatemp_range else ():
        other = reference.truncate(exact, p, acts=acts, entropy_off=off)
        assume({token for token, _ in other} == {token for token, _ in kept})
        for token, probability in kept:
            tolerances[token] = max(tolerances[token], EXACT + abs(dict(other)[token] / probability - 1))
    return kept, tolerances


@pytest.mark.plain
@settings(max_examples=150, suppress_health_check=[HealthCheck.filter_too_much, HealthCheck.too_slow])
@given(
    vocab_size=st.sampled_from(VOCAB_SIZES),
    shape=st.sampled_from(["normal", "peaked", "zipf", "mostly_banned"]),
    seed=st.integers(0, 2**32 - 1),
    p=params,
    other=params,
    place=st.integers(0, 1000),
)
def test_any_steps_in_any_order_keep_and_draw_what_the_reference_does(
    vocab_size: int, shape: str, seed: int, p: SamplingParams, other: SamplingParams, place: int
):
    row = logits_row(shape, vocab_size, seed)
    kept, tolerances = expected(row, p, place)
    neighbour = logits_row("normal", vocab_size, seed + 1)
    for is_native in (True, False):
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(dispatch, "row_sums", summed_exactly)
            patch.setattr(dispatch, "row_mass", lambda *row: summed_exactly(*row)[:, [SUMS.index("mass")]])
            if not is_native:
                patch.setattr(dispatch, "_native", lambda: None)
            results = []
            for logprobs in (LogprobRequest(processed=True, top=vocab_size), None):
                states = [SamplerState(p, [], vocab_size, logprobs), SamplerState(other, [], vocab_size, None)]
                states[0].num_output = place
                results.append(sample(torch.from_numpy(np.stack([row, neighbour])), states)[0])
        check(p, place, kept, tolerances, *results)


def summed_exactly(logits: torch.Tensor, rows: np.ndarray, transforms: np.ndarray) -> np.ndarray:
    """As kernels.reference.row_sums, in float64: what steps learn of a row is then what the reference knows of it."""
    chosen = logits.numpy()[rows].astype(np.float64)
    with np.errstate(all="ignore"):  # Each kind of transform is worked out for the rows of the others, too.
        y = transformed(chosen - chosen.max(1, keepdims=True), transforms)
    weights, finite = np.exp(y), np.where(y > -np.inf, y, 0.0)
    return np.stack([(y > -np.inf).sum(1), *(x.sum(1) for x in (weights, finite * weights, finite, finite**2))], 1)


def is_tie(kept: reference.Distribution, place: int, tolerances: Mapping[int, float]) -> bool:
    """Whether rounding may turn the order of this token and the next."""
    (token, most), (other, least) = kept[place : place + 2]
    return most - least <= most * (tolerances.get(token, EXACT) + tolerances.get(other, EXACT))


def swapped(kept: reference.Distribution, place: int) -> reference.Distribution:
    return [*kept[:place], kept[place + 1], kept[place], *kept[place + 2 :]]


def check(
    p: SamplingParams,
    place: int,
    kept: reference.Distribution,
    tolerances: Mapping[int, float],
    whole: Sampled | None,
    plain: Sampled | None,
) -> None:
    """What was drawn with the logprobs of all tokens, and without any, against what the reference keeps."""
    assert whole is not None
    assert plain is not None
    assert {token for token, logprob in whole.top if logprob > -600} == {t for t, q in kept if q > math.exp(-600)}
    for token, logprob in whole.top:
        probability = dict(kept).get(token, 0.0)
        rounding = tolerances.get(token, EXACT)
        assert math.exp(logprob) == pytest.approx(probability, rel=rounding, abs=math.exp(-600))
    u = uniform(p.seed or 0, place) ** math.exp(-p.skew)
    orders = [kept, *(swapped(kept, place) for place in range(len(kept) - 1) if is_tie(kept, place, tolerances))]
    nudged = [min(max(u + nudge, 0.0), 1.0) for nudge in (-EDGE, 0, EDGE)]
    drawn = {reference.draw(order, number) for order in orders for number in nudged}
    assert {whole.token_id, plain.token_id} <= drawn


def state(vocab_size: int, **fields: object) -> SamplerState:
    return SamplerState(SamplingParams(**fields), [], vocab_size, LogprobRequest(True, vocab_size))  # type: ignore[arg-type]


def one(logits: torch.Tensor, **fields: object) -> Sampled:
    drawn = sample(logits[None], [state(len(logits), **fields)])[0]
    assert drawn is not None
    return drawn


def kept(logits: torch.Tensor, **fields: object) -> set[int]:
    return {token for token, _ in one(logits, **fields).top}


STEEP = torch.tensor([0.5, 0.2, 0.15, 0.08, 0.04, 0.02, 0.01]).log()


@pytest.mark.parametrize(
    ("fields", "tokens"),
    [
        ({"tfs": 0.5}, {0}),  # second differences 0.25, 0.02, 0.03, 0.02, 0.01: shares 0.76, 0.82, ...
        ({"tfs": 0.8}, {0, 1}),
        ({"top_a": 0.4}, {0, 1, 2}),  # 0.4 x 0.5 x 0.5 = 0.1
        ({"epsilon_cutoff": 0.03}, {0, 1, 2, 3, 4}),
        ({"epsilon_cutoff": 0.9}, {0}),
        ({"eta_cutoff": 0.03}, {0, 1, 2, 3, 4}),
        ({"xtc_probability": 1.0, "xtc_threshold": 0.1}, {2, 3, 4, 5, 6}),
        ({"xtc_probability": 1.0, "xtc_threshold": 0.3}, {0, 1, 2, 3, 4, 5, 6}),  # the only one stays
        ({"xtc_probability": 1.0, "xtc_threshold": 0.1, "min_keep": 6}, {0, 1, 2, 3, 4, 5, 6}),
        ({"xtc_probability": 1.0, "xtc_threshold": 0.1, "xtc_ignore_tokens": (0,)}, {0, 2, 3, 4, 5, 6}),
        ({"xtc_probability": 1.0, "xtc_threshold": 0.1, "xtc_ignore_tokens": (2, 6)}, {1, 2, 3, 4, 5, 6}),
        ({"top_p": 0.4, "min_keep": 3}, {0, 1, 2}),
        ({"top_k": 2, "min_keep": 3}, {0, 1, 2}),
        ({"mirostat_mode": 2, "mirostat_tau": 1.5}, {0, 1, 2}),  # mu = 3 bits: at least an eighth
        ({"top_k": 2, "min_p": 0.5, "order": ("top_k", "min_p")}, {0}),
        ({"temperature": 9.0, "min_p": 0.5}, {0, 1, 2, 3, 4, 5, 6}),
        ({"temperature": 9.0, "min_p": 0.5, "order": ("min_p", "temperature")}, {0}),
    ],
)
def test_worked_examples(fields: dict[str, object], tokens: set[int]):
    assert kept(STEEP, **fields) == tokens


def test_top_n_sigma_keeps_the_same_tokens_at_any_temperature():
    logits = torch.randn(5000, generator=torch.Generator().manual_seed(3)) * 3
    sets = [kept(logits, top_n_sigma=1.0, temperature=t) for t in (0.1, 1.0, 10.0)]
    assert sets[0] == sets[1] == sets[2]
    assert 1 < len(sets[0]) < 200


def test_the_deviation_is_of_all_tokens_those_too_whose_probability_no_float64_can_hold():
    logits = torch.tensor([0.0, -10.0, -14.0, -60.0])  # smoothed: 0, -100, -196, -3600
    assert math.exp(-3600) == 0
    for n, tokens in ((0.05, {0}), (0.1, {0, 1}), (0.2, {0, 1, 2})):  # One deviation is 1518; without the last, 80.
        assert kept(logits, smoothing_factor=1.0, smoothing_curve=1.0, top_n_sigma=n) == tokens


def test_a_dynamic_temperature_is_low_where_the_model_is_sure_and_high_where_it_is_not():
    sure, unsure = torch.tensor([20.0, 0.0, 0.0, 0.0]), torch.tensor([0.1, 0.0, 0.0, 0.0])
    for logits, temperature in ((sure, 0.5), (unsure, 1.5)):
        dynamic, fixed = one(logits, dynatemp_range=0.5), one(logits, temperature=temperature)
        assert [token for token, _ in dynamic.top] == [token for token, _ in fixed.top]
        for (_, a), (_, b) in zip(dynamic.top, fixed.top, strict=True):
            assert a == pytest.approx(b, rel=0.02, abs=1e-3)


def test_smoothing_with_a_steep_curve_can_lift_a_token_above_the_likeliest():
    top = one(torch.tensor([1.0, 0.5, -3.0]), smoothing_factor=2.0, smoothing_curve=8.0).top
    assert top[0][0] == 1
    late = one(torch.tensor([1.0, 0.5, -3.0]), smoothing_factor=2.0, smoothing_curve=8.0, top_k=2, order=("top_k",))
    assert [token for token, _ in late.top] == [1, 0]


def test_xtc_acts_as_often_as_its_probability_says_and_the_same_again_for_the_same_seed():
    def has_acted(seed: int) -> bool:
        return 0 not in {t for t, _ in one(STEEP, xtc_probability=0.3, xtc_threshold=0.1, seed=seed).top}

    acted = [has_acted(seed) for seed in range(400)]
    assert 88 < sum(acted) < 152  # 120 expected, 3.5 standard deviations
    assert acted[:20] == [has_acted(seed) for seed in range(20)]


@pytest.mark.parametrize("skew", [-20.0, -1.0, 1.0, 20.0])
def test_a_skewed_draw_leans_to_less_likely_tokens_above_zero_and_to_likelier_ones_below(skew: float):
    def ranks(skew: float) -> list[int]:  # the tokens of STEEP stand in the order of their probabilities
        return [one(STEEP, skew=skew, seed=seed).token_id for seed in range(200)]

    plain, leaning = ranks(0.0), ranks(skew)
    assert all((b - a) * skew >= 0 for a, b in zip(plain, leaning, strict=True))
    assert plain != leaning
    if abs(skew) == 20:
        assert set(leaning) == {6 if skew > 0 else 0}


@pytest.mark.parametrize(("target", "mean"), [(0.1, 0.1), (0.3, 0.3), (0.9, 0.45)])  # 0.45 is the most there is
def test_adaptive_p_prefers_tokens_near_its_target_and_moves_the_mean_probability_towards_it(
    target: float, mean: float
):
    assert one(STEEP, adaptive_target=0.2).top[0][0] == 1
    logits = torch.tensor([0.45, 0.25, 0.15, 0.1, 0.05]).log()
    made = SamplerState(SamplingParams(adaptive_target=target, adaptive_decay=0.8, seed=1), [], 5, None)
    probabilities = []
    for _ in range(600):
        drawn = sample(logits[None], [made])[0]
        assert drawn is not None
        assert drawn.surprise == pytest.approx(-float(logits[drawn.token_id]) / math.log(2))  # of before its step
        probabilities.append(float(logits[drawn.token_id].exp()))
        made.append(drawn.token_id, drawn.surprise)
    assert sum(probabilities) / 600 == pytest.approx(mean, abs=0.03)


@pytest.mark.parametrize("mode", [1, 2])
def test_mirostat_steers_the_mean_surprise_to_its_target(mode: int):
    logits = -1.1 * torch.arange(1, 5001).log()  # Zipf's law, as version 1 takes it to be
    made = SamplerState(SamplingParams(mirostat_mode=mode, mirostat_tau=3.0, seed=1), [], 5000, None)
    surprises = []
    for _ in range(600):
        drawn = sample(logits[None], [made])[0]
        assert drawn is not None
        assert drawn.surprise is not None
        surprises.append(drawn.surprise)
        made.append(drawn.token_id, drawn.surprise)
    assert sum(surprises[100:]) / 500 == pytest.approx(3.0, abs=0.3)


@pytest.mark.parametrize(
    "params",
    [
        SamplingParams(mirostat_mode=2, mirostat_tau=4.0, mirostat_eta=0.5, seed=5),
        SamplingParams(adaptive_target=0.1, adaptive_decay=0.5, min_p=0.05, seed=5),
    ],
)
def test_the_mu_of_what_steers_goes_back_with_a_rewound_sequence(params: SamplingParams):
    logits = torch.randn(40, 500, generator=torch.Generator().manual_seed(2)) * 2
    made = SamplerState(params, [], 500, None)

    def go_on(start: int) -> list[tuple[int, float]]:
        written = []
        for row in logits[start:]:
            drawn = sample(row[None], [made])[0]
            assert drawn is not None
            assert drawn.surprise is not None
            before = made.mu
            made.append(drawn.token_id, drawn.surprise)
            by_surprise = next_mu(before, drawn.surprise, params)
            by_probability = 0.5 * before + 0.5 * (2 * 0.1 - 2.0**-drawn.surprise)
            assert made.mu == pytest.approx(by_surprise if params.mirostat_mode else by_probability)
            written.append((drawn.token_id, made.mu))
        return written

    first = go_on(0)
    made.truncate(13)
    assert go_on(13) == first[13:]


def test_a_token_is_listed_whose_share_of_the_whole_is_too_small_for_a_float64():
    for exponent in np.arange(-745.2, -743.0, 0.1):
        logits = torch.tensor([0.0, 0.0, exponent / 2], dtype=torch.float32)
        drawn = one(logits, temperature=0.5, seed=1)
        listed = dict(drawn.top)
        assert {0, 1} <= listed.keys()
        assert listed.get(2, exponent) == pytest.approx(exponent - math.log(2), abs=0.7)


def test_min_keep_leaves_the_likeliest_token_that_is_not_typical_whether_it_is_listed_or_only_drawn():
    for place in range(40):
        states = [
            SamplerState(SamplingParams(typical_p=0.2, min_keep=1, seed=place), [], 7, logprobs)
            for logprobs in (LogprobRequest(processed=True, top=7), None)
        ]
        logits = torch.tensor([[2.0, 0.0, 0.1, 0.2, 0.3, 0.4, 0.5]])
        listed, drawn = (sample(logits, [state])[0] for state in states)
        assert listed is not None
        assert drawn is not None
        assert 0 in dict(listed.top)
        assert drawn.token_id == listed.token_id


@pytest.mark.parametrize("broken", [math.nan, math.inf, -math.inf])
def test_rows_without_numbers_draw_nothing_whatever_reshapes_them(broken: float):
    logits = torch.randn(3, 2000, generator=torch.Generator().manual_seed(1))
    logits[1] = broken
    fields = {"smoothing_factor": 0.3, "dynatemp_range": 0.5, "top_n_sigma": 1.0, "mirostat_mode": 2, "seed": 1}
    drawn = sample(logits, [state(2000, **fields) for _ in range(3)])
    assert drawn[1] is None
    assert drawn[0] is not None
    assert drawn[2] is not None


def test_extreme_parameters_stay_finite():
    logits = torch.randn(2000, generator=torch.Generator().manual_seed(4)) * 20
    for fields in (
        {"mirostat_mode": 1, "mirostat_tau": 1e300},
        {"mirostat_mode": 1, "mirostat_tau": 1e-300},
        {"mirostat_mode": 2, "mirostat_tau": 1e300},
        {"smoothing_factor": 1000.0, "smoothing_curve": 100.0},
        {"dynatemp_range": 1e300, "dynatemp_exponent": 1e300},
        {"top_n_sigma": 1e300},
        {"temperature": 1e300, "order": ("min_p", "temperature"), "min_p": 0.01},
        {"temperature": 1e-300, "order": ("min_p", "temperature"), "min_p": 0.01},
    ):
        assert one(logits, seed=1, **fields).logprob is not None
