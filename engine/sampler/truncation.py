"""Which candidates may be drawn: pure functions from candidates to candidates, one a sampling parameter.

Parameters are [B, 1] float64; a row whose parameter is neutral comes back unchanged.
"""

from dataclasses import replace

import numpy as np

from tightrope.engine.sampler.arrays import Doubles, Ids, Mask
from tightrope.engine.sampler.candidates import Candidates

_TINY = np.finfo(np.float64).tiny  # One token always reaches a share as small as this.


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
    surprisal = -np.log(shares)  # Removed tokens have inf.
    entropy = np.where(shares > 0, shares * surprisal, 0.0).cumsum(1)[:, -1:]
    order = np.abs(surprisal - entropy).argsort(axis=1, kind="stable")
    reached = np.take_along_axis(shares, order, 1).cumsum(1)
    mask = np.zeros(shares.shape, np.bool_)
    np.put_along_axis(mask, order, _before(reached) < np.maximum(p, _TINY), 1)
    return candidates.keep(mask, active=p < 1, is_closed=np.zeros(p.shape, np.bool_))


def tfs(candidates: Candidates, z: Doubles) -> Candidates:
    """Cut the tail where the curve of sorted probabilities has become straight. Neutral: 1.

    Its second differences are summed from the likeliest token on; a token is kept while the share of those before it
    is at most z, and the likeliest always. Where the curve is straight all along, or has less than three tokens,
    nothing is tail.
    Source: Bricken 2019, "Tail Free Sampling".
    """
    weights, num_kept = _packed(candidates)
    place = np.arange(weights.shape[1])
    bends = np.zeros_like(weights)
    bends[:, :-2] = np.abs(np.diff(weights, n=2, axis=1))
    before = _before((bends * (place < num_kept - 2)).cumsum(1))
    listed = before[:, -1:]
    # Beyond the list the curve falls from its last but one weight to 0: it can't bend by more than twice that.
    last = np.take_along_axis(weights, np.maximum(num_kept - 2, 0), 1)
    most = listed + np.where(candidates.is_complete, 0.0, 2 * last)
    fewest, longest = ((before <= z * bound) | (place == 0) for bound in (listed, most))
    is_closed = (fewest == longest).all(1, keepdims=True) & (longest.sum(1, keepdims=True) < num_kept - 2)
    return candidates.keep(_unpacked(candidates, fewest), active=z < 1, is_closed=is_closed)


def top_a(candidates: Candidates, a: Doubles) -> Candidates:
    """Keep tokens whose probability is at least a times the square of the likeliest one's. Neutral: 0.

    Source: BlinkDL 2022, RWKV-LM, "the top-a sampling method".
    """
    most = candidates.weights.max(1, keepdims=True)
    least = np.minimum(a * most * (most / candidates.total), most)
    return candidates.keep(candidates.weights >= least, active=a > 0, is_closed=candidates.border < least)


def epsilon_cutoff(candidates: Candidates, epsilon: Doubles) -> Candidates:
    """Keep tokens of at least this probability, or else the likeliest. Neutral: 0.

    Source: Hewitt, Manning and Liang 2022, "Truncation Sampling as Language Model Desmoothing", arXiv 2210.15191.
    """
    least = np.minimum(epsilon * candidates.total, candidates.weights.max(1, keepdims=True))
    return candidates.keep(candidates.weights >= least, active=epsilon > 0, is_closed=candidates.border < least)


def eta_cutoff(candidates: Candidates, epsilon: Doubles) -> Candidates:
    """Keep tokens of at least min(epsilon, sqrt(epsilon) exp(-entropy)), or else the likeliest. Neutral: 0.

    Source: Hewitt, Manning and Liang 2022, "Truncation Sampling as Language Model Desmoothing", arXiv 2210.15191.
    """
    shares = candidates.weights / candidates.weights.cumsum(1)[:, -1:]
    eta = np.minimum(epsilon, np.sqrt(epsilon) * np.exp(-entropy(shares)))
    mask = shares >= np.minimum(eta, shares.max(1, keepdims=True))
    return candidates.keep(mask, active=epsilon > 0, is_closed=np.zeros(epsilon.shape, np.bool_))


def top_n_sigma(candidates: Candidates, n: Doubles) -> Candidates:
    """Keep tokens whose logit is at most n standard deviations of all logits below the largest. Neutral: 0.

    Source: Tang et al. 2024, "Top-nσ: Not All Logits Are You Need", arXiv 2411.07641.
    """
    is_kept = candidates.weights > 0
    logits = np.log(np.where(is_kept, candidates.weights, 1.0))
    count = candidates.num_kept
    mean = logits.sum(1, keepdims=True) / count
    sigma = np.sqrt((is_kept * (logits - mean) ** 2).sum(1, keepdims=True) / count)
    top = np.log(candidates.weights.max(1, keepdims=True))
    return candidates.keep(logits >= top - n * sigma, active=n > 0, is_closed=np.zeros(n.shape, np.bool_))


def xtc(candidates: Candidates, acts: Doubles, threshold: Doubles, ignored: Ids) -> Candidates:
    """Remove all tokens of at least the threshold's probability but the least likely of them. Neutral: acts 0.

    acts: 1 where the row's own dice, thrown once a token, say so. ignored [B, K]: tokens that neither count nor go, so
    that an end that is likely is not put off; -1 is none. Nothing is removed where less than `min_keep` tokens
    would be left.
    Source: Weidmann 2024, "Exclude Top Choices (XTC)", text-generation-webui pull request 6335.
    """
    weights, total = candidates.weights, candidates.total
    is_likely = (weights >= threshold * total) & (weights > 0)
    for column in ignored.T:
        is_likely &= candidates.token_ids != column[:, None]
    place = is_likely.cumsum(1)
    removed = is_likely & (place < place[:, -1:])
    active = (acts > 0) & removed.any(1, keepdims=True)
    num_left = candidates.num_kept - removed.sum(1, keepdims=True)
    active &= ~candidates.is_complete | (num_left >= candidates.min_keep)
    left = weights * ~(removed & active)
    # What isn't listed keeps its weight: a difference of sums, which says nothing where little is left.
    total = np.where(active, total - (weights - left).sum(1, keepdims=True), total)
    is_sure = (candidates.border < threshold * candidates.total) & (total > 0.1 * candidates.total)
    return replace(
        candidates,
        weights=left,
        total=np.where(candidates.is_complete, left.cumsum(1)[:, -1:], total),
        settled=candidates.settled & (candidates.is_complete | is_sure | (acts == 0)),
    )


def entropy(shares: Doubles) -> Doubles:
    """Of each row of probabilities [B, N], in nats: [B, 1]."""
    logs = np.log(np.where(shares > 0, shares, 1.0))
    sums: Doubles = -(shares * logs).sum(1, keepdims=True)
    return sums


def _packed(candidates: Candidates) -> tuple[Doubles, Ids]:
    """Weights [B, N] with removed tokens moved behind the kept ones, and how many those are [B, 1]."""
    order = (candidates.weights == 0).argsort(axis=1, kind="stable")
    return np.take_along_axis(candidates.weights, order, 1), candidates.num_kept


def _unpacked(candidates: Candidates, mask: Mask) -> Mask:
    """A mask over packed weights, for the places where the tokens stand."""
    order = (candidates.weights == 0).argsort(axis=1, kind="stable")
    placed = np.zeros_like(mask)
    np.put_along_axis(placed, order, mask, 1)
    return placed


def _before(reached: Doubles) -> Doubles:
    """What was reached before each place: a running sum [B, N], moved on by one."""
    before = np.zeros_like(reached)
    before[:, 1:] = reached[:, :-1]
    return before
