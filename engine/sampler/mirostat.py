"""Mirostat: truncation that steers the surprise of tokens to a target, and corrects itself by what was drawn.

`mu` is the most that the next token may surprise, in bits; it starts at twice the target, tau.
Source: Basu et al. 2021, "Mirostat: A Neural Text Decoding Algorithm that Directly Controls Perplexity",
arXiv 2007.14966; version 2 is the authors' later simplification.
"""

import math

import numpy as np

from tightrope.engine.sampler.arrays import Doubles, Mask
from tightrope.engine.sampler.candidates import Candidates
from tightrope.engine.sampler.steps import SamplingParams

_NOTHING_BITS = 20  # Tokens that surprise by this much more than log2(V) have less than a millionth of the mass.
_MEASURED = 100  # Version 1 estimates the exponent of Zipf's law from this many of the likeliest tokens.


def first_mu(params: SamplingParams) -> float:
    return 2 * params.mirostat_tau


def next_mu(mu: float, surprise: float, params: SamplingParams) -> float:
    """The mu after a token of this surprise, in bits, among those that could be drawn."""
    return mu - params.mirostat_eta * (surprise - params.mirostat_tau)


def cuts(mu: float, vocab_size: int) -> bool:
    """Whether version 2 removes anything: where the model surprises less than tau, mu grows for ever."""
    return mu < math.log2(vocab_size) + _NOTHING_BITS


def mirostat(candidates: Candidates, mode: Doubles, mu: Doubles, vocab_size: Doubles) -> Candidates:
    """Keep tokens that surprise by at most mu bits (2), or as many as Zipf's law expects to (1). Neutral: mode 0."""
    candidates = _by_zipfs_law(candidates, mode == 1, mu, vocab_size)
    active = (mode == 2) & (mu < np.log2(vocab_size) + _NOTHING_BITS)
    most = candidates.weights.max(1, keepdims=True)
    least = np.minimum(candidates.total * np.exp2(-mu), most)
    return candidates.keep(candidates.weights >= least, active=active, is_closed=candidates.border < least)


def _by_zipfs_law(candidates: Candidates, active: Mask, mu: Doubles, vocab_size: Doubles) -> Candidates:
    """Keep the k likeliest tokens, where a Zipf distribution cut after k has a surprise of mu bits."""
    if not active.any():
        return candidates
    order = (candidates.weights == 0).argsort(axis=1, kind="stable")[:, :_MEASURED]
    logs = np.log(np.take_along_axis(candidates.weights, order, 1))
    ranks = np.log(np.arange(1, logs.shape[1] + 1))
    steps = np.diff(ranks)
    falls = np.where(logs[:, 1:] > -np.inf, logs[:, :-1] - logs[:, 1:], 0.0)
    is_measured = logs[:, 1:] > -np.inf
    s = (steps * falls).sum(1, keepdims=True) / np.maximum((steps**2 * is_measured).sum(1, keepdims=True), 1e-30)
    excess = s - 1
    # The spread is (1 - V**-excess) / excess, or its limit.
    spread = np.where(np.abs(excess) > 1e-9, -np.expm1(-excess * np.log(vocab_size)) / excess, np.log(vocab_size))
    k = np.exp(np.clip((mu * np.log(2) - np.log(np.maximum(spread, 1e-300))) / np.maximum(s, 1e-9), 0.0, 40.0))
    place = (candidates.weights > 0).cumsum(1)
    num_kept = place[:, -1:]
    active = active & (k < vocab_size)
    is_closed = (num_kept >= np.floor(k)) & (num_kept >= _MEASURED)
    return candidates.keep(place <= np.floor(k), active=active, is_closed=is_closed)
