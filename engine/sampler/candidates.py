"""What truncation has left so far: the head of each row's ranking, and what is known of the rest."""

from dataclasses import dataclass, replace
from typing import Self

import numpy as np

from tightrope.engine.sampler.arrays import Doubles, Ids, Mask


@dataclass(frozen=True, slots=True)
class Candidates:
    """The tokens that are still kept, the likeliest first and equals by id; removed ones stand anywhere among them."""

    token_ids: Ids  # [B, N]
    weights: Doubles  # [B, N]: proportional to probability, at most 1; 0 is removed or not listed
    total: Doubles  # [B, 1]: weight of all kept tokens, listed or not
    border: Doubles  # [B, 1]: no kept token that isn't listed weighs more; 0: every kept token is listed
    settled: Mask  # [B, 1]: False when a decision would have needed tokens that aren't listed
    min_keep: Ids  # [B, 1]: no step leaves fewer tokens than these

    @classmethod
    def of_logits(cls, y: Doubles, token_ids: Ids, border: Doubles, total: Doubles, min_keep: Ids) -> Self:
        """All tokens, from transformed logits y [B, N], at most 0; none that isn't listed is above border [B, 1].

        total [B, 1] is the weight of the whole vocabulary, or NaN where only that of a complete list matters.
        """
        weights, border = np.exp(y), np.exp(border)
        return cls(
            token_ids=token_ids,
            weights=weights,
            total=np.where(np.isnan(total), weights.cumsum(1)[:, -1:], total),
            border=border,
            settled=np.ones(border.shape, np.bool_),
            min_keep=min_keep,
        )

    @property
    def is_complete(self) -> Mask:
        """[B, 1]: every kept token is listed."""
        is_complete: Mask = self.border == 0
        return is_complete

    @property
    def num_kept(self) -> Ids:
        """[B, 1]: of the listed tokens."""
        num_kept: Ids = np.count_nonzero(self.weights, axis=1, keepdims=True)
        return num_kept

    def keep(self, mask: Mask, active: Mask, is_closed: Mask) -> "Candidates":
        """Where `active` [B, 1], keep only what `mask` [B, N] says and `min_keep`, and nothing that isn't listed.

        is_closed [B, 1]: the mask is right without knowing what isn't listed; otherwise the row is unsettled.
        """
        is_idle = ~active
        if self.min_keep.any():
            place = (self.weights > 0).cumsum(1)
            mask = mask | (place <= self.min_keep)
            is_closed = is_closed & (place[:, -1:] >= self.min_keep)
        weights = self.weights * (mask | is_idle)
        return replace(
            self,
            weights=weights,
            total=np.where(active, weights.cumsum(1)[:, -1:], self.total),
            border=self.border * is_idle,
            settled=self.settled & (is_closed | self.is_complete | is_idle),
        )

    def reweigh(self, weights: Doubles, active: Mask) -> "Candidates":
        """Where `active` [B, 1], give the kept tokens other weights, which may change their order.

        Tokens that aren't listed would change too, so a row that isn't complete is unsettled.
        """
        weights = np.where(active & (self.weights > 0), weights, self.weights * ~active)
        token_ids = self.token_ids
        if (np.diff(weights, axis=1) > 0).any():
            order = np.lexsort((token_ids, -weights), axis=1)
            weights, token_ids = np.take_along_axis(weights, order, 1), np.take_along_axis(token_ids, order, 1)
        return replace(
            self,
            token_ids=token_ids,
            weights=weights,
            total=np.where(active, weights.cumsum(1)[:, -1:], self.total),
            settled=self.settled & (self.is_complete | ~active),
        )
