"""Log probabilities beside the drawn tokens: of the model's own distribution, or of the one that was drawn from."""

import math
from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from tightrope.engine.sampler.ranking import Blocks, Doubles, Ids

Top = tuple[tuple[int, float], ...]

_SPARE = 12  # ranked beyond what is wanted, since tokens that tie at the border are left out


def raw(
    logits: Tensor, blocks: Blocks | None, token_ids: Sequence[int], tops: Sequence[int]
) -> tuple[list[float], list[Top]]:
    """Log-softmax of each row at a token, and the row's `tops` likeliest tokens; of equals the lowest ids.

    Tokens of no probability at all aren't listed. logits [B, V] float32, as the model gave them, and their blocks if
    they are known; token_ids and tops [B].
    """
    n = min(max(tops), logits.shape[1])
    ids = np.array(token_ids, np.int64)[:, None]
    if n > 0:
        ids = np.hstack([ids, _likeliest(blocks or Blocks(logits), n)])
    logprobs = logits.log_softmax(-1).gather(1, torch.from_numpy(ids).to(logits.device)).tolist()
    listed: list[Top] = [
        tuple(pair for pair in zip(row[1 : 1 + top], values[1 : 1 + top], strict=True) if pair[1] > -math.inf)
        for row, values, top in zip(ids.tolist(), logprobs, tops, strict=True)
    ]
    return [values[0] for values in logprobs], listed


def _likeliest(blocks: Blocks, n: int) -> Ids:
    """Ids [B, n] of the n likeliest tokens of each row, in order; tokens of -inf, of any id, fill the rest."""
    rows = np.arange(len(blocks.top))
    ranking = blocks.rank(rows, [n + _SPARE] * len(rows))
    num_listed = (ranking.logits > -np.inf).sum(1)
    if ((num_listed < n) & (ranking.border[:, 0] > -np.inf)).any():  # too many equals at a border
        ranking = blocks.rank(rows, [blocks.num] * len(rows))
    return ranking.token_ids[:, :n]


def processed(weights: Doubles, token_ids: Ids, total: float, top: int) -> Top:
    """The `top` likeliest of the tokens that could have been drawn; all that tie with the last of them are listed too.

    weights [N] descending but for removed tokens, which are 0; token_ids [N]; total is the weight of all kept tokens.
    """
    kept = np.flatnonzero(weights)
    if top == 0 or not len(kept):
        return ()
    least = weights[kept[min(top, len(kept)) - 1]]
    listed = kept[weights[kept] >= least]
    logprobs = [math.log(share) for share in (weights[listed] / total).tolist()]
    return tuple(zip(token_ids[listed].tolist(), logprobs, strict=True))
