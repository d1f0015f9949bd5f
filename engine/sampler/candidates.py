"""What truncation has left so far: the head of each row's ranking, and what is known of the rest."""

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from tightrope.engine.sampler.ranking import Doubles, Ranking

Mask = NDArray[np.bool_]


@dataclass(frozen=True, slots=True)
class Candidates:
    """The tokens that are still kept, in the columns of a ranking."""

    weights: Doubles  # [B, N]: proportional to probability, 1 for the row's likeliest; 0 is removed or not listed
    total: Doubles  # [B, 1]: weight of all kept tokens, listed or not
    border: Doubles  # [B, 1]: no kept token that isn't listed weighs more; 0: every kept token is listed
    settled: Mask  # [B, 1]: False when a decision would have needed tokens that aren't listed

    @property
    def is_complete(self) -> Mask:
        """[B, 1]: every kept token is listed."""
        is_complete: Mask = self.border == 0
        return is_complete

    def keep(self, mask: Mask, active: Mask, is_closed: Mask) -> "Candidates":
        """Where `active` [B, 1], keep only what `mask` [B, N] says and nothing that isn't listed.

        is_closed [B, 1]: the mask is right without knowing what isn't listed; otherwise the row is unsettled.
        """
        is_idle = ~active
        weights = self.weights * (mask | is_idle)
        return Candidates(
            weights=weights,
            total=np.where(active, weights.cumsum(1)[:, -1:], self.total),
            border=self.border * is_idle,
            settled=self.settled & (is_closed | self.is_complete | is_idle),
        )


def weigh(ranking: Ranking, temperature: Doubles, total: Doubles) -> Candidates:
    """Candidates at a temperature > 0 [B, 1]; total [B, 1] is the weight of the whole vocabulary."""
    top = ranking.top.astype(np.float64)
    return Candidates(
        weights=np.exp((ranking.logits - top) / temperature),
        total=total,
        border=np.exp((ranking.border - top) / temperature),
        settled=np.ones(top.shape, np.bool_),
    )
