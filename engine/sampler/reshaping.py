"""Steps that change how likely tokens are, and remove none: temperature, fixed or dynamic, and smoothing.

Most requests run them first, see transforms.py; what truncation has shortened is reshaped here.
"""

import numpy as np

from tightrope.engine.sampler.arrays import Doubles
from tightrope.engine.sampler.candidates import Candidates
from tightrope.engine.sampler.truncation import entropy

LEAST, MOST = 1e-30, 1e30  # Temperatures are held between these: float32 can divide by them.


def temperature(candidates: Candidates, t: Doubles, spread: Doubles, exponent: Doubles) -> Candidates:
    """Divide logits by t; with a spread, by between t - spread and t + spread. Neutral: t 1, spread 0.

    Source of the spread: Kalomaze 2023, KoboldCpp's dynamic temperature.
    """
    weights = candidates.weights
    if spread.any():
        shares = weights / weights.cumsum(1)[:, -1:]
        most = np.log(np.maximum(candidates.num_kept, 2))
        t = np.where(spread > 0, dynamic(t, spread, exponent, entropy(shares) / most), t)
    logits = np.log(weights / weights.max(1, keepdims=True))
    return candidates.reweigh(np.exp(logits / np.clip(t, LEAST, MOST)), active=t != 1)


def dynamic(t: Doubles, spread: Doubles, exponent: Doubles, share: Doubles) -> Doubles:
    """The temperature where the entropy is this share of its largest possible value."""
    low, high = np.maximum(t - spread, 0.0), t + spread
    moved: Doubles = low + (high - low) * np.clip(share, 0.0, 1.0) ** exponent
    return moved


def smoothing(candidates: Candidates, factor: Doubles, curve: Doubles) -> Candidates:
    """Transform the logits, see `quadratic`. Neutral: factor 0."""
    weights = candidates.weights
    logits = quadratic(np.log(weights / weights.max(1, keepdims=True)), factor, curve)
    with np.errstate(over="ignore"):
        weights_now = np.exp(logits - np.where(weights > 0, logits, -np.inf).max(1, keepdims=True))
    return candidates.reweigh(weights_now, active=factor > 0)


def quadratic(logits: Doubles, factor: Doubles, curve: Doubles) -> Doubles:
    """Logits [B, N] below a largest of 0, made steeper far from it and flatter near to it; factor, curve [B, 1].

    The curve 1 is a parabola. A larger one mixes in a cubic, which beyond 3 lifts tokens close below the largest.
    Source: Kalomaze 2024, "quadratic sampling", text-generation-webui pull requests 5403 and 5551.
    """
    lifted: Doubles = factor * logits * logits * (logits * (curve - 1) / 2 - (3 - curve) / 2)
    return lifted
