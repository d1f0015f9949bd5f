"""What the sampler means, in float64 and in order, written to be read: one function a step, one row at a time.

Probabilities are lists of (token id, probability), the likeliest first and equals by id, which always sum to 1.
"""

import itertools
import math
from collections.abc import Sequence

import numpy as np
from hypothesis import assume, currently_in_test_context
from numpy.typing import NDArray

from tightrope.engine.sampler.steps import SAMPLER_ORDER, SamplingParams

Logits = NDArray[np.float64]
Distribution = list[tuple[int, float]]
VANISHING = 1e-290  # Far above the numbers that a float64 holds with fewer digits, or not at all.
RESHAPING = ("temperature", "smoothing")
COUNTING = ("temperature", "top_n_sigma")  # Every token counts in what they do, however unlikely it is.


def penalise(
    logits: Logits, params: SamplingParams, prompt: Sequence[int], output: Sequence[int], suppressed: Sequence[int] = ()
) -> Logits:
    """Steps 1 to 4: penalties, biases, and tokens that may not come."""
    whole = [*prompt, *output]
    strengths = {place: strength(len(whole) - 1 - place, params) for place in range(len(whole))}
    logits = logits.copy()
    if params.watermark_delta and whole:
        logits[green(whole[-1], len(logits), params.watermark_gamma)] += params.watermark_delta
    for token in set(whole):
        seen = [strengths[i] for i, other in enumerate(whole) if other == token]
        generated = [strengths[i] for i, other in enumerate(whole) if other == token and i >= len(prompt)]
        penalty = 1 + (params.repetition_penalty - 1) * max(seen)
        logits[token] *= penalty if logits[token] <= 0 else 1 / penalty
        logits[token] -= params.frequency_penalty * sum(generated) + params.presence_penalty * max(generated, default=0)
        logits[token] -= params.relative_frequency_penalty * sum(seen) / sum(strengths.values())
    for token, bias in params.logit_bias.items():
        logits[token] += bias
    for token in params.banned_tokens:
        logits[token] = -math.inf
    for token in suppressed:
        logits[token] = -math.inf
    return logits


def green(previous: int, size: int, gamma: float) -> list[int]:
    """The first ids of a shuffle by Fisher and Yates, whose dice are a Mersenne twister's, seeded as in 2002."""
    twister = np.random.MT19937()
    twister._legacy_seeding(15_485_863 * previous & 0xFFFFFFFF)
    ids = list(range(size))
    for place, die in enumerate(twister.random_raw(size - 1).tolist()):
        other = place + die % (size - place)
        ids[place], ids[other] = ids[other], ids[place]
    return ids[: int(size * gamma)]


def strength(distance: int, params: SamplingParams) -> float:
    """How much a token counts that stands so many before the last one: 1 in the range, then less and less."""
    if params.penalty_range == 0 or distance < params.penalty_range:
        return 1.0
    if distance >= params.penalty_range + params.repetition_decay:
        return 0.0
    return 1 - (distance - params.penalty_range) / params.repetition_decay


def dry(token_ids: Sequence[int], params: SamplingParams, breaks: Sequence[bool]) -> dict[int, float]:
    """What DRY subtracts, by token; breaks: whether a breaker ends in each token."""
    most = 1e30

    def penalty(excess: int) -> float:
        if excess * math.log(params.dry_base) > math.log(most / params.dry_multiplier):  # the power may be no number
            return most
        return params.dry_multiplier * params.dry_base**excess

    lengths = runs(token_ids, breaks, params.dry_range)
    excesses = {token: length - params.dry_allowed_length for token, length in lengths.items()}
    return {token: penalty(excess) for token, excess in excesses.items() if excess >= 0}


def repeated_ngrams(token_ids: Sequence[int], n: int) -> set[int]:
    """The tokens that would complete n tokens that are there already."""
    grams = [tuple(token_ids[i : i + n]) for i in range(len(token_ids) - n + 1)]
    begun = tuple(token_ids[len(token_ids) - n + 1 :])
    return {gram[-1] for gram in grams if gram[:-1] == begun}


def runs(token_ids: Sequence[int], breaks: Sequence[bool], window: int = 0) -> dict[int, int]:
    """For each token that followed a run somewhere: how long the longest was. See engine.sampler.repeats."""
    size = len(token_ids)
    start = max(size - window, 0) if window else 0
    free = next((i for i in range(size) if breaks[size - 1 - i]), size)  # tokens after the last breaker
    longest: dict[int, int] = {}
    for end in range(start, size - 1):
        length = 0
        while length < min(free, end - start + 1, 256) and token_ids[end - length] == token_ids[size - 1 - length]:
            length += 1
        if length:
            longest[token_ids[end + 1]] = max(length, longest.get(token_ids[end + 1], 0))
    return longest


def is_drawable(logits: Logits) -> bool:
    """Whether a token can be drawn at all: no NaN, and the largest logit is finite."""
    return math.isfinite(logits.max())


def softmax(logits: Logits, temperature: float) -> Distribution:
    """Step 5. Tokens whose probability is too small for a float64 are not in it."""
    with np.errstate(over="ignore"):
        weights = np.exp((logits - logits.max()) / max(temperature, 1e-30))
    order = np.lexsort((np.arange(len(logits)), -logits))  # by logit, and of equals by id
    return renormalize(list(zip(order.tolist(), weights[order].tolist(), strict=True)))


def renormalize(weights: Distribution) -> Distribution:
    total = math.fsum(weight for _, weight in weights)
    return [(token, share) for token, weight in weights if (share := weight / total) > 0]


def top_k(distribution: Distribution, k: int) -> Distribution:
    return renormalize(distribution[:k]) if k > 0 else distribution


def top_p(distribution: Distribution, p: float) -> Distribution:
    return renormalize(_until(distribution, p)) if p < 1 else distribution


def min_p(distribution: Distribution, p: float) -> Distribution:
    likeliest = max(probability for _, probability in distribution)
    return renormalize([entry for entry in distribution if entry[1] >= p * likeliest])


def typical_p(distribution: Distribution, p: float) -> Distribution:
    if p >= 1:
        return distribution
    entropy = -math.fsum(probability * math.log(probability) for _, probability in distribution)
    by_distance = sorted(distribution, key=lambda entry: abs(-math.log(entry[1]) - entropy))
    kept = {token for token, _ in _until(by_distance, p)}
    return renormalize([entry for entry in distribution if entry[0] in kept])


def _until(entries: Distribution, p: float) -> Distribution:
    """The first entries whose probabilities sum to p; at least one."""
    kept, reached = [], 0.0
    for entry in entries:
        kept.append(entry)
        reached += entry[1]
        if reached >= p:
            break
    return kept


def temper(distribution: Distribution, params: SamplingParams, entropy_off: float = 0.0) -> Distribution:
    t = params.temperature
    if params.dynatemp_range > 0:
        share = (entropy(distribution) + entropy_off) / math.log(len(distribution)) if len(distribution) > 1 else 0.0
        low, high = max(t - params.dynatemp_range, 0.0), t + params.dynatemp_range
        t = low + (high - low) * min(max(share, 0.0), 1.0) ** params.dynatemp_exponent
    t = min(max(t, 1e-30), 1e30)
    most = max(p for _, p in distribution)
    return renormalize([(token, math.exp(math.log(p / most) / t)) for token, p in distribution])


def entropy(distribution: Distribution) -> float:
    return -math.fsum(p * math.log(p) for _, p in distribution)


def smooth(distribution: Distribution, factor: float, curve: float) -> Distribution:
    """f(x) = -(3 - curve) / 2 factor x**2 + (curve - 1) / 2 factor x**3, for the logit x below the largest."""
    if factor == 0:
        return distribution
    most = max(p for _, p in distribution)
    bent = {}
    for token, p in distribution:
        x = math.log(p / most)
        bent[token] = -(3 - curve) / 2 * factor * x**2 + (curve - 1) / 2 * factor * x**3
    top = max(bent.values())
    weights = [(token, math.exp(value - top)) for token, value in bent.items()]
    return renormalize(sorted(weights, key=lambda entry: (-entry[1], entry[0])))


def top_n_sigma(distribution: Distribution, n: float) -> Distribution:
    if n == 0:
        return distribution
    logits = [math.log(p) for _, p in distribution]
    least = max(logits) - n * float(np.std(logits))
    return renormalize([entry for entry in distribution if math.log(entry[1]) >= least])


def tfs(distribution: Distribution, z: float) -> Distribution:
    if z >= 1 or len(distribution) < 3:
        return distribution
    bends = np.abs(np.diff([p for _, p in distribution], n=2))
    if bends.sum() == 0:
        return distribution
    reached = np.concatenate([[0.0], np.cumsum(bends)]) / bends.sum()
    return renormalize([entry for entry, share in zip(distribution, reached, strict=False) if share <= z])


def top_a(distribution: Distribution, a: float) -> Distribution:
    most = max(p for _, p in distribution)
    return _at_least(distribution, a * most**2)


def eta_cutoff(distribution: Distribution, epsilon: float) -> Distribution:
    return _at_least(distribution, min(epsilon, math.sqrt(epsilon) * math.exp(-entropy(distribution))))


def _at_least(distribution: Distribution, least: float) -> Distribution:
    most = max(p for _, p in distribution)
    return renormalize([entry for entry in distribution if entry[1] >= min(least, most)])


def xtc(
    distribution: Distribution, acts: bool, threshold: float, ignored: tuple[int, ...], min_keep: int
) -> Distribution:
    likely = [token for token, p in distribution if p >= threshold and token not in ignored]
    removed = set(likely[:-1])
    if not acts or len(distribution) - len(removed) < min_keep:
        return distribution
    return renormalize([entry for entry in distribution if entry[0] not in removed])


def mirostat_1(distribution: Distribution, mu: float, vocab_size: int) -> Distribution:
    ps = [p for _, p in distribution[:100]]
    steps = [math.log((i + 2) / (i + 1)) for i in range(len(ps) - 1)]
    falls = [math.log(a / b) for a, b in itertools.pairwise(ps)]
    s = sum(t * b for t, b in zip(steps, falls, strict=True)) / max(sum(t * t for t in steps), 1e-30)
    excess = s - 1
    spread = math.log(vocab_size) if abs(excess) <= 1e-9 else (1 - vocab_size**-excess) / excess
    log_k = (mu * math.log(2) - math.log(max(spread, 1e-300))) / max(s, 1e-9)
    return renormalize(distribution[: max(math.floor(math.exp(min(log_k, 40))), 1)])


def mirostat_2(distribution: Distribution, mu: float) -> Distribution:
    return _at_least(distribution, 2.0**-mu)


def adaptive_p(distribution: Distribution, current: float) -> Distribution:
    weights = []
    for token, p in distribution:
        distance = abs(p - min(max(current, 0), 1)) / 0.3
        weights.append((token, math.exp(-10 * distance**2 / (1 + distance))))
    return renormalize(sorted(weights, key=lambda entry: (-entry[1], entry[0])))


def truncate(
    logits: Logits, params: SamplingParams, *, acts: bool = False, mu: float | None = None, entropy_off: float = 0.0
) -> Distribution:
    """Steps 5 and 6: what may be drawn, and how likely. Greedy draws the first token of an untruncated softmax.

    Drops the example of a property in which a step is given a token that is about to vanish, and one in which a step
    that counts all tokens isn't given those that have: the sampler holds logits, in which none vanishes.

    acts: what XTC's dice say; mu: that of mirostat or adaptive-p, if it isn't the first; entropy_off: what is added to
    the entropy that a dynamic temperature follows, to see what its rounding comes to.
    """
    if params.temperature == 0:
        return softmax(logits, 1.0)
    order = [*params.order, *(step for step in SAMPLER_ORDER if step not in params.order)]
    if order[0] == "temperature" and params.dynatemp_range == 0:
        distribution = softmax(logits, params.temperature)
        order = order[1:]
    else:
        distribution = softmax(logits, 1.0)
    has_lost = False
    for step in order:
        before = distribution
        distribution = run(step, distribution, params, acts, entropy_off)
        # Whether a token has vanished that is about to is a question of rounding alone.
        if distribution != before and currently_in_test_context():
            assume(min(probability for _, probability in before) >= VANISHING)
            assume(not (has_lost and step in COUNTING))
        has_lost |= step in RESHAPING and len(distribution) < len(before)
        if step not in ("temperature", "smoothing", "xtc"):
            distribution = at_least_so_many(before, distribution, params.min_keep)
    if params.mirostat_mode == 0:
        if params.adaptive_target < 0:
            return distribution
        return adaptive_p(distribution, params.adaptive_target if mu is None else mu)
    mu = 2 * params.mirostat_tau if mu is None else mu
    steered = mirostat_1(distribution, mu, len(logits)) if params.mirostat_mode == 1 else mirostat_2(distribution, mu)
    return at_least_so_many(distribution, steered, params.min_keep)


def at_least_so_many(before: Distribution, after: Distribution, min_keep: int) -> Distribution:
    """What a step has left, and the likeliest that it was given."""
    kept = {token for token, _ in after} | {token for token, _ in before[:min_keep]}
    return renormalize([entry for entry in before if entry[0] in kept])


def run(step: str, distribution: Distribution, params: SamplingParams, acts: bool, entropy_off: float) -> Distribution:
    match step:
        case "temperature":
            return temper(distribution, params, entropy_off)
        case "smoothing":
            return smooth(distribution, params.smoothing_factor, params.smoothing_curve)
        case "top_n_sigma":
            return top_n_sigma(distribution, params.top_n_sigma)
        case "top_k":
            return top_k(distribution, params.top_k)
        case "top_p":
            return top_p(distribution, params.top_p)
        case "min_p":
            return min_p(distribution, params.min_p)
        case "typical_p":
            return typical_p(distribution, params.typical_p)
        case "tfs":
            return tfs(distribution, params.tfs)
        case "top_a":
            return top_a(distribution, params.top_a)
        case "epsilon_cutoff":
            return _at_least(distribution, params.epsilon_cutoff)
        case "eta_cutoff":
            return eta_cutoff(distribution, params.eta_cutoff)
        case "xtc":
            return xtc(distribution, acts, params.xtc_threshold, params.xtc_ignore_tokens, params.min_keep)
    raise AssertionError(step)


def draw(distribution: Distribution, u: float) -> int:
    """Step 7: the token on which u in [0, 1) falls."""
    reached = 0.0
    for token, probability in distribution:
        reached += probability
        if u < reached:
            return token
    return distribution[-1][0]


def log_softmax(logits: Logits) -> Logits:
    shifted = logits - logits.max()
    return shifted - math.log(math.fsum(np.exp(shifted)))
