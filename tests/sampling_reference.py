"""What the sampler means, in float64 and in order, written to be read: one function a step, one row at a time.

Probabilities are lists of (token id, probability), the likeliest first and equals by id, which always sum to 1.
"""

import math
from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from tightrope.engine.types import SamplingParams

Logits = NDArray[np.float64]
Distribution = list[tuple[int, float]]


def penalise(
    logits: Logits, params: SamplingParams, prompt: Sequence[int], output: Sequence[int], suppressed: Sequence[int] = ()
) -> Logits:
    """Steps 1 to 4: penalties, biases, and tokens that may not come."""
    seen = [*prompt, *output]
    generated = list(output)
    if params.penalty_range > 0:
        seen = seen[-params.penalty_range :]
        generated = generated[-params.penalty_range :]
    logits = logits.copy()
    for token in set(seen):
        if logits[token] > 0:
            logits[token] /= params.repetition_penalty
        else:
            logits[token] *= params.repetition_penalty
    for token in set(generated):
        logits[token] -= params.frequency_penalty * generated.count(token) + params.presence_penalty
    for token in set(seen):
        logits[token] -= params.relative_frequency_penalty * seen.count(token) / len(seen)
    for token, bias in params.logit_bias.items():
        logits[token] += bias
    for token in suppressed:
        logits[token] = -math.inf
    return logits


def is_drawable(logits: Logits) -> bool:
    """Whether a token can be drawn at all: no NaN, and the largest logit is finite."""
    return math.isfinite(logits.max())


def softmax(logits: Logits, temperature: float) -> Distribution:
    """Step 5. Tokens whose probability is too small for a float64 are not in it."""
    with np.errstate(over="ignore"):
        weights = np.exp((logits - logits.max()) / max(temperature, 1e-30))
    order = sorted(range(len(logits)), key=lambda token: (-logits[token], token))
    return renormalise([(token, float(weights[token])) for token in order])


def renormalise(weights: Distribution) -> Distribution:
    total = math.fsum(weight for _, weight in weights)
    return [(token, weight / total) for token, weight in weights if weight > 0]


def top_k(distribution: Distribution, k: int) -> Distribution:
    return renormalise(distribution[:k]) if k > 0 else distribution


def top_p(distribution: Distribution, p: float) -> Distribution:
    return renormalise(_until(distribution, p)) if p < 1 else distribution


def min_p(distribution: Distribution, p: float) -> Distribution:
    likeliest = max(probability for _, probability in distribution)
    return renormalise([entry for entry in distribution if entry[1] >= p * likeliest])


def typical_p(distribution: Distribution, p: float) -> Distribution:
    if p >= 1:
        return distribution
    entropy = -math.fsum(probability * math.log(probability) for _, probability in distribution)
    by_distance = sorted(distribution, key=lambda entry: abs(-math.log(entry[1]) - entropy))
    kept = {token for token, _ in _until(by_distance, p)}
    return renormalise([entry for entry in distribution if entry[0] in kept])


def _until(entries: Distribution, p: float) -> Distribution:
    """The first entries whose probabilities sum to p; at least one."""
    kept, reached = [], 0.0
    for entry in entries:
        kept.append(entry)
        reached += entry[1]
        if reached >= p:
            break
    return kept


def truncate(logits: Logits, params: SamplingParams) -> Distribution:
    """Steps 5 to 9: what may be drawn, and how likely. Greedy draws the first token of an untruncated softmax."""
    if params.temperature == 0:
        return softmax(logits, 1.0)
    distribution = softmax(logits, params.temperature)
    distribution = top_k(distribution, params.top_k)
    distribution = top_p(distribution, params.top_p)
    distribution = min_p(distribution, params.min_p)
    return typical_p(distribution, params.typical_p)


def draw(distribution: Distribution, u: float) -> int:
    """Step 10: the token on which u in [0, 1) falls."""
    reached = 0.0
    for token, probability in distribution:
        reached += probability
        if u < reached:
            return token
    return distribution[-1][0]


def log_softmax(logits: Logits) -> Logits:
    shifted = logits - logits.max()
    return shifted - math.log(math.fsum(np.exp(shifted)))
