"""Which candidates may be drawn: pure functions from candidates to candidates, one a sampling parameter.

Parameters are [B, 1] float64; a row whose parameter is neutral comes back unchanged.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

from tightrope.engine.sampler.candidates import Candidates


def top_k(candidates: Candidates, k: Tensor) -> Candidates:
    """Keep the k likeliest tokens; of equals the lowest ids. Neutral: 0."""
    place = (candidates.weights > 0).cumsum(1)
    return candidates.keep(place <= k, active=k > 0, is_closed=place[:, -1:] >= k)


def top_p(candidates: Candidates, p: Tensor) -> Candidates:
    """Keep the smallest set of likeliest tokens whose share reaches p, at least one. Neutral: 1.

    Source: Holtzman et al. 2020, "The Curious Case of Neural Text Degeneration", arXiv 1904.09751.
    """
    reached = candidates.weights.cumsum(1)
    wanted = (p * candidates.total).clamp(min=torch.finfo(torch.float64).tiny)
    return candidates.keep(_before(reached) < wanted, active=p < 1, is_closed=reached[:, -1:] >= wanted)


def min_p(candidates: Candidates, p: Tensor) -> Candidates:
    """Keep tokens at least p times as likely as the likeliest. Neutral: 0.

    Source: Nguyen et al. 2024, "Turning Up the Heat", arXiv 2407.01082.
    """
    least = p * candidates.weights.amax(1, keepdim=True)
    return candidates.keep(candidates.weights >= least, active=p > 0, is_closed=candidates.border < least)


def typical_p(candidates: Candidates, p: Tensor) -> Candidates:
    """Keep the smallest set that reaches p of tokens whose surprisal is nearest the entropy, at least one. Neutral: 1.

    Source: Meister et al. 2022, "Locally Typical Sampling", arXiv 2202.00666.
    """
    shares = candidates.weights / candidates.weights.cumsum(1)[:, -1:]
    surprisal = -shares.log()  # inf where removed
    entropy = (shares * surprisal).nan_to_num().sum(1, keepdim=True)
    order = (surprisal - entropy).abs().sort(dim=1, stable=True).indices
    reached = shares.gather(1, order).cumsum(1)
    wanted = p.clamp(min=torch.finfo(torch.float64).tiny)
    mask = torch.zeros_like(shares, dtype=torch.bool).scatter(1, order, _before(reached) < wanted)
    return candidates.keep(mask, active=p < 1, is_closed=torch.zeros_like(p, dtype=torch.bool))


def _before(reached: Tensor) -> Tensor:
    """What was reached before each place: a running sum [B, N], moved on by one."""
    return F.pad(reached[:, :-1], (1, 0))
