"""Which candidates may be drawn: pure functions from candidates to candidates, one a sampling parameter.

Parameters are [B, 1] float64; a row whose parameter is neutral comes back unchanged.
"""

import numpy as np

from tightrope.engine.sampler.candidates import Candidates
from tightrope.engine.sampler.ranking import Doubles

_TINY = np.finfo(np.float64).tiny  # a share so small that one token always reaches it


def top_k(candidates: Candidates, k: Doubles) -> Candidates:
    """Keep the k likeliest tokens; of equals the lowest ids. Neutral: 0."""
    place = (candidates.weights > 0).cumsum(1)
    return candidates.keep(place <= k, active=k > 0, is_closed=place[:, -1:] >= k)


def top_p(candidates: Candidates, p: Doubles) -> Candidates:
    """Keep the smallest set of likeliest tokens whose share reaches p, at least one. Neutral: 1.

    Source: Holtzman et al. 2020, "The Curious Case of Neural Text Degeneration", arXiv 1904.09751.
    """
    reached = candidates.weights.cumsum(1)
    wanted = np.maximum(p * candidates.total, _TINY)
    return candidates.keep(_before(reached) < wanted, active=p < 1, is_closed=reached[:, -1:] >= wanted)


def min_p(candidates: Candidates, p: Doubles) -> Candidates:
    """Keep tokens at least p times as likely as the likeliest. Neutral: 0.

    Source: Nguyen et al. 2024, "Turning Up the Heat", arXiv 2407.01082.
    """
    least = p * candidates.weights.max(1, keepdims=True)
    return candidates.keep(candidates.weights >= least, active=p > 0, is_closed=candidates.border < least)


def typical_p(candidates: Candidates, p: Doubles) -> Candidates:
    """Keep the smallest set that reaches p of tokens whose surprisal is nearest the entropy, at least one. Neutral: 1.

    Source: Meister et al. 2022, "Locally Typical Sampling", arXiv 2202.00666.
    """
    shares = candidates.weights / candidates.weights.cumsum(1)[:, -1:]
    surprisal = -np.log(shares)  # inf where removed
    entropy = np.where(shares > 0, shares * surprisal, 0.0).cumsum(1)[:, -1:]
    order = np.abs(surprisal - entropy).argsort(axis=1, kind="stable")
    reached = np.take_along_axis(shares, order, 1).cumsum(1)
    mask = np.zeros(shares.shape, np.bool_)
    np.put_along_axis(mask, order, _before(reached) < np.maximum(p, _TINY), 1)
    return candidates.keep(mask, active=p < 1, is_closed=np.zeros(p.shape, np.bool_))


def _before(reached: Doubles) -> Doubles:
    """What was reached before each place: a running sum [B, N], moved on by one."""
    before = np.zeros_like(reached)
    before[:, 1:] = reached[:, :-1]
    return before
