"""Log probabilities beside the drawn tokens: of the model's own distribution, or of the one that was drawn from."""

import math
from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from tightrope.engine.sampler.arrays import Doubles, Ids
from tightrope.kernels import dispatch
from tightrope.kernels.forms.rows import MAX_TRANSFORMS

Top = tuple[tuple[int, float], ...]


def raw(logits: Tensor, rows: Ids, token_ids: Sequence[int], tops: Sequence[int]) -> tuple[list[float], list[Top]]:
    """Log-softmax of each of these rows at a token, and the row's `tops` likeliest tokens; of equals the lowest ids.

    Tokens of no probability at all aren't listed. logits [any, V] float32, as the model gave them; rows, token_ids and
    tops [B].
    """
    wanted = np.maximum(np.array(tops, np.int64), 1)
    ranked = dispatch.rank(logits, rows, wanted)
    num_listed = (ranked.logits > -np.inf).sum(1)
    if ((num_listed < wanted) & (ranked.border[:, 0] > -np.inf)).any():  # Too many equals stand at a border.
        ranked = dispatch.rank(logits, rows, np.full(len(rows), logits.shape[1]))
    own = logits[torch.from_numpy(rows).to(logits.device), torch.tensor(token_ids, device=logits.device)]
    mass = dispatch.row_mass(logits, rows, np.zeros((len(rows), MAX_TRANSFORMS, 4)))
    with np.errstate(invalid="ignore"):  # A row may hold NaN.
        values = np.hstack([own.cpu().numpy()[:, None], ranked.logits]).astype(np.float64)
        logprobs = (values - ranked.top - np.log(mass)).tolist()
    listed: list[Top] = [
        tuple(pair for pair in zip(ids[:top], row[1 : 1 + top], strict=False) if pair[1] > -math.inf)
        for ids, row, top in zip(ranked.token_ids.tolist(), logprobs, tops, strict=True)
    ]
    return [row[0] for row in logprobs], listed


def processed(weights: Doubles, token_ids: Ids, total: float, top: int) -> Top:
    """The `top` likeliest of the tokens that could have been drawn; all that tie with the last of them are listed too.

    weights [N] descending but for removed tokens, which are 0; token_ids [N]; total is the weight of all kept tokens.
    """
    kept = np.flatnonzero(weights)
    if top == 0 or not len(kept):
        return ()
    least = weights[kept[min(top, len(kept)) - 1]]
    listed = kept[weights[kept] >= least]
    logprobs = (np.log(weights[listed]) - math.log(total)).tolist()  # A share itself may be too small for a float64.
    return tuple(zip(token_ids[listed].tolist(), logprobs, strict=True))
