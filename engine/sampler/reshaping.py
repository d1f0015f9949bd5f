"""Steps that change how likely tokens are, and remove none: temperature, fixed or dynamic, and smoothing.

Most requests run them first. They are applied to whole rows of logits there, and so are top_n_sigma and eta_cutoff,
which look at all tokens too; what truncation has shortened is reshaped as candidates.
"""

import math
from collections.abc import Sequence
from typing import TypeVar

import numpy as np
import torch
from torch import Tensor

from tightrope.engine.sampler.candidates import Candidates
from tightrope.engine.sampler.ranking import Doubles
from tightrope.engine.sampler.truncation import entropy
from tightrope.engine.types import SamplingParams

T = TypeVar("T", Doubles, Tensor)

LEAST, MOST = 1e-30, 1e30  # temperatures: what float32 can divide by


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
    """Bend the logits, see `quadratic`. Neutral: factor 0."""
    weights = candidates.weights
    logits = quadratic(np.log(weights / weights.max(1, keepdims=True)), factor, curve)
    with np.errstate(over="ignore"):
        bent = np.exp(logits - np.where(weights > 0, logits, -np.inf).max(1, keepdims=True))
    return candidates.reweigh(bent, active=factor > 0)


def quadratic(logits: T, factor: T, curve: T) -> T:
    """Logits [B, N] below a largest of 0, bent: steeper far from it and flatter near to it; factor, curve [B, 1].

    The curve 1 is a parabola. A larger one mixes in a cubic, which beyond 3 lifts tokens close below the largest.
    Source: Kalomaze 2024, "quadratic sampling", text-generation-webui pull requests 5403 and 5551.
    """
    return factor * logits * logits * (logits * (curve - 1) / 2 - (3 - curve) / 2)


def reshape_rows(logits: Tensor, heads: Sequence[tuple[int, Sequence[str], SamplingParams]]) -> None:
    """Apply first steps to whole rows of logits [B, V] float32, in place: (row, steps, the row's parameters).

    The largest logit of such a row is 0 afterwards. A row without any finite logit, or with a NaN, stays without one.
    """
    for row, steps, params in heads:
        values = logits[row].double()
        top = values.max()
        if not top.isfinite():
            continue
        values = values - top
        for step in steps:
            match step:
                case "temperature":
                    values = values / _row_temperature(values, params)
                case "smoothing":
                    factor, curve = (torch.tensor(v) for v in (params.smoothing_factor, params.smoothing_curve))
                    bent = quadratic(values, factor.double(), curve.double())
                    values = torch.where(values > -torch.inf, bent, values)
                    values = values - values.max()
                case "top_n_sigma":
                    sigma = values[values > -torch.inf].std(correction=0)
                    values = values.masked_fill(values < -params.top_n_sigma * sigma, -torch.inf)
                case "eta_cutoff":
                    logprobs = values.log_softmax(0)
                    eta = min(params.eta_cutoff, math.sqrt(params.eta_cutoff) * math.exp(-_entropy(logprobs)))
                    values = values.masked_fill(logprobs < min(math.log(eta), float(logprobs.max())), -torch.inf)
                case _:
                    raise AssertionError(step)
        logits[row] = values.float()


def _row_temperature(values: Tensor, params: SamplingParams) -> float:
    t = params.temperature
    if params.dynatemp_range > 0:
        num_possible = int((values > -torch.inf).sum())
        share = _entropy(values.log_softmax(0)) / math.log(max(num_possible, 2))
        arguments = (np.array(v) for v in (t, params.dynatemp_range, params.dynatemp_exponent, share))
        t = float(dynamic(*arguments))
    return min(max(t, LEAST), MOST)


def _entropy(logprobs: Tensor) -> float:
    """In nats, of one row [V]."""
    return float(torch.where(logprobs > -torch.inf, -logprobs * logprobs.exp(), 0.0).sum())
