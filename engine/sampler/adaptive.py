"""Adaptive-p: tokens near a probability are preferred, and that probability is corrected by what was drawn.

The current target is moved so that the mean probability of the drawn tokens, in which older ones fade, comes to the
target: it is twice the target less that mean. Both are kept as one number, not yet held between 0 and 1.
Source: llama.cpp's sampler `adaptive-p` (pull request 17927) and its author's notes, MrJackSpade/adaptive-p-docs.
"""

import numpy as np

from tightrope.engine.sampler.arrays import Doubles
from tightrope.engine.sampler.candidates import Candidates
from tightrope.engine.sampler.steps import SamplingParams

_WIDTH = 0.3  # A probability this far from the current target is at a distance of 1.
_SHARPNESS = 10.0  # A token far away loses about this many logits for each such distance.


def first_target(params: SamplingParams) -> float:
    return params.adaptive_target


def next_target(current: float, surprise: float, params: SamplingParams) -> float:
    """The current target after a token of this surprise, in bits."""
    decay = params.adaptive_decay
    probability: float = 2.0**-surprise
    return decay * current + (1 - decay) * (2 * params.adaptive_target - probability)


def adaptive_p(candidates: Candidates, target: Doubles, current: Doubles) -> Candidates:
    """Give tokens new weights by how far their probability is from the current target. Neutral: a negative target.

    Close to it the logit falls with the square of the distance, far from it in a straight line, so that not even the
    least likely token becomes impossible: min_p or another step should have removed those before.
    """
    shares = candidates.weights / candidates.weights.cumsum(1)[:, -1:]
    distance = np.abs(shares - np.clip(current, 0.0, 1.0)) / _WIDTH
    logits = np.where(candidates.weights > 0, -_SHARPNESS * distance**2 / (1 + distance), -np.inf)
    return candidates.reweigh(np.exp(logits - logits.max(1, keepdims=True)), active=target >= 0)
