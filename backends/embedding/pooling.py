"""One vector for each text, of the hidden states of its tokens."""

from collections.abc import Callable, Mapping, Sequence

import torch
from torch import Tensor


def _mean(hidden: Tensor, mask: Tensor) -> Tensor:
    return (hidden * mask).sum(1) / mask.sum(1).clamp(min=1)


def _mean_sqrt_len(hidden: Tensor, mask: Tensor) -> Tensor:
    return (hidden * mask).sum(1) / mask.sum(1).clamp(min=1).sqrt()


def _weighted_mean(hidden: Tensor, mask: Tensor) -> Tensor:
    weights = mask * torch.arange(1, hidden.shape[1] + 1, dtype=hidden.dtype)[None, :, None]
    return (hidden * weights).sum(1) / weights.sum(1).clamp(min=1)


def _max(hidden: Tensor, mask: Tensor) -> Tensor:
    return hidden.masked_fill(mask == 0, -torch.inf).amax(1)


def _first(hidden: Tensor, mask: Tensor) -> Tensor:
    return hidden[:, 0]


def _last(hidden: Tensor, mask: Tensor) -> Tensor:
    return hidden[torch.arange(len(hidden)), mask[..., 0].sum(1).long() - 1]


_MODES: Mapping[str, Callable[[Tensor, Tensor], Tensor]] = {
    "cls": _first,
    "max": _max,
    "mean": _mean,
    "mean_sqrt_len": _mean_sqrt_len,
    "weightedmean": _weighted_mean,
    "lasttoken": _last,
}


def pool(hidden: Tensor, lengths: Sequence[int], modes: Sequence[str]) -> Tensor:
    """[B, D * modes] float32 of hidden states [B, T, D] float32, of which each row's first `lengths` are its text's."""
    mask = (torch.arange(hidden.shape[1])[None, :] < torch.tensor(lengths)[:, None]).to(hidden.dtype)[..., None]
    return torch.cat([_MODES[mode](hidden, mask) for mode in modes], dim=1)
