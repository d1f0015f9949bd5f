"""Log probabilities beside the drawn tokens: of the model's own distribution, or of the one that was drawn from."""

import math

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from tightrope.engine.sampler.candidates import rank, rank_all

Top = tuple[tuple[int, float], ...]

_SPARE = 12  # ranked beyond what is wanted, since tokens that tie at the border are left out


def raw(logits: Tensor, token_ids: Tensor, tops: list[int]) -> tuple[list[float], list[Top]]:
    """Log-softmax of each row at a token, and the row's `tops` likeliest tokens; of equals the lowest ids.

    Tokens of no probability at all aren't listed. logits [B, V] float32, as the model gave them; token_ids [B] int64.
    """
    logprobs = logits.log_softmax(-1)
    own: list[float] = logprobs.gather(1, token_ids[:, None])[:, 0].tolist()
    n = min(max(tops), logits.shape[1])
    if n == 0:
        return own, [()] * len(own)
    likeliest = _likeliest(logits, n)
    listed = zip(likeliest.tolist(), logprobs.gather(1, likeliest).tolist(), tops, strict=True)
    return own, [
        tuple(
            (token_id, logprob)
            for token_id, logprob in zip(ids[:top], values[:top], strict=True)
            if logprob > -math.inf
        )
        for ids, values, top in listed
    ]


def _likeliest(logits: Tensor, n: int) -> Tensor:
    """Ids [B, n] of the n likeliest tokens of each row, in order."""
    ranking = rank(logits, n + _SPARE)
    if ranking.token_ids.shape[1] < n:  # a tiny vocabulary never has fewer than n, by the caller's minimum
        return ranking.token_ids
    is_short = (ranking.logits[:, n - 1 : n] == -torch.inf) & (ranking.border != -torch.inf)
    if not is_short.any():
        return ranking.token_ids[:, :n]
    return rank_all(logits).token_ids[:, :n]


def processed(weights: NDArray[np.float64], token_ids: NDArray[np.int64], total: float, top: int) -> Top:
    """The `top` likeliest of the tokens that could have been drawn; all that tie with the last of them are listed too.

    weights [N] descending but for removed tokens, which are 0; token_ids [N]; total is the weight of all kept tokens.
    """
    kept = np.flatnonzero(weights)
    if top == 0 or not len(kept):
        return ()
    least = weights[kept[min(top, len(kept)) - 1]]
    listed = kept[weights[kept] >= least]
    logprobs = np.log(weights[listed] / total)
    return tuple(zip(token_ids[listed].tolist(), logprobs.tolist(), strict=True))
