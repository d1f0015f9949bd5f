"""Steps that change how likely tokens are, and remove none: temperature, fixed or dynamic, and smoothing.

Most requests run them first. They are applied to whole rows of logits there, and so are top_n_sigma and eta_cutoff,
which look at all tokens too; what truncation has shortened is reshaped as candidates.
"""

from collections import defaultdict
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


def reshape_rows(logits: Tensor, heads: Sequence[tuple[int, tuple[str, ...], SamplingParams]]) -> None:
    """Apply first steps to whole rows of logits [B, V] float32, in place: (row, steps, the row's parameters).

    The largest logit of such a row is 0 afterwards. Rows whose largest logit isn't finite stay as they are.
    """
    groups: dict[tuple[str, ...], list[tuple[int, SamplingParams]]] = defaultdict(list)
    for row, steps, params in heads:
        groups[steps].append((row, params))
    for steps, members in groups.items():
        rows = [row for row, _ in members]
        before = logits[rows]  # [n, V], a copy
        top = before.amax(-1, keepdim=True)
        values = before - top
        for step in steps:
            values = _ROW_STEPS[step](values, [params for _, params in members])
        logits[rows] = torch.where(top.isfinite(), values, before)


def _temper_rows(values: Tensor, params: Sequence[SamplingParams]) -> Tensor:
    t = _column(values, [p.temperature for p in params])
    spread = _column(values, [p.dynatemp_range for p in params])
    if (spread > 0).any():
        most = (values > -torch.inf).sum(-1, keepdim=True).clamp(min=2).log()
        share = _entropy(values.log_softmax(-1)) / most
        arguments = (t, spread, _column(values, [p.dynatemp_exponent for p in params]), share)
        moved = torch.from_numpy(dynamic(*(a.cpu().numpy().astype(np.float64) for a in arguments))).to(values)
        t = torch.where(spread > 0, moved, t)
    return values / t.clamp(LEAST, MOST)


def _smooth_rows(values: Tensor, params: Sequence[SamplingParams]) -> Tensor:
    factor = _column(values, [p.smoothing_factor for p in params])
    curve = _column(values, [p.smoothing_curve for p in params])
    bent = torch.where(values > -torch.inf, quadratic(values, factor, curve), values)
    return bent.sub_(bent.amax(-1, keepdim=True))


def _keep_n_sigma_of_rows(values: Tensor, params: Sequence[SamplingParams]) -> Tensor:
    is_possible = values > -torch.inf
    count = is_possible.sum(-1, keepdim=True)
    mean = values.masked_fill(~is_possible, 0.0).sum(-1, keepdim=True) / count
    sigma = ((values - mean).masked_fill_(~is_possible, 0.0).square_().sum(-1, keepdim=True) / count).sqrt()
    return values.masked_fill(values < -_column(values, [p.top_n_sigma for p in params]) * sigma, -torch.inf)


def _cut_eta_of_rows(values: Tensor, params: Sequence[SamplingParams]) -> Tensor:
    logprobs = values.log_softmax(-1)
    epsilon = _column(values, [p.eta_cutoff for p in params])
    eta = torch.minimum(epsilon.log(), epsilon.log() / 2 - _entropy(logprobs))
    return values.masked_fill(logprobs < torch.minimum(eta, logprobs.amax(-1, keepdim=True)), -torch.inf)


_ROW_STEPS = {
    "temperature": _temper_rows,
    "smoothing": _smooth_rows,
    "top_n_sigma": _keep_n_sigma_of_rows,
    "eta_cutoff": _cut_eta_of_rows,
}


def _column(like: Tensor, values: Sequence[float]) -> Tensor:
    """[n, 1], in the type of `like`, no larger than that can hold."""
    most = torch.finfo(like.dtype).max
    return torch.tensor([[min(value, most)] for value in values], dtype=like.dtype, device=like.device)


def _entropy(logprobs: Tensor) -> Tensor:
    """In nats, of each row [n, V]: [n, 1]."""
    return -(logprobs.exp() * logprobs.clamp(min=torch.finfo(logprobs.dtype).min)).sum(-1, keepdim=True)
