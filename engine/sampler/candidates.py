"""The likeliest tokens of each row, in order, and how much weighs what is not listed.

Sorting 50,000 logits takes 3 ms; what truncation keeps is usually a handful. So the vocabulary is cut into blocks of
32, one pass takes each block's maximum, and the n blocks with the largest maxima are looked into: at least n tokens are
as large as the n-th maximum, so whatever exceeds the n-th largest token of the row is in these blocks. Among equals at
the border the choice would be arbitrary: they are left out, and the list is exact down to there.
"""

from dataclasses import dataclass, replace

import torch
import torch.nn.functional as F
from torch import Tensor

BLOCK = 32  # tokens; the fastest of 16, 32, 64 and 128 for lists of 20 to 256 tokens


@dataclass(frozen=True, slots=True)
class Ranking:
    """The largest logits of each row: descending, equals by id."""

    logits: Tensor  # [B, N] float32; -inf where nothing is listed
    token_ids: Tensor  # [B, N] int64
    border: Tensor  # [B, 1] float32: no token that isn't listed has a larger logit; -inf: all are listed
    top: Tensor  # [B, 1] float32: the largest; not finite in a row from which nothing can be drawn


@dataclass(frozen=True, slots=True)
class Candidates:
    """What truncation has left so far: the head of each row in order, and bounds on the rest."""

    weights: Tensor  # [B, N] float64, proportional to probability: 1 for the likeliest, 0 is removed
    total: Tensor  # [B, 1] float64: weight of all kept tokens, listed or not
    border: Tensor  # [B, 1] float64: no token that isn't listed weighs more; 0 when those are all removed
    settled: Tensor  # [B, 1] bool: False when a decision would have needed tokens that aren't listed

    @property
    def is_complete(self) -> Tensor:
        """[B, 1] bool: every kept token is listed."""
        return self.border == 0

    def keep(self, mask: Tensor, active: Tensor, is_closed: Tensor) -> "Candidates":
        """Where `active` [B, 1], keep only what `mask` [B, N] says and nothing that isn't listed.

        is_closed [B, 1]: the mask is right without knowing what isn't listed; otherwise the row is unsettled.
        """
        weights = torch.where(mask | ~active, self.weights, 0.0)
        return replace(
            self,
            weights=weights,
            total=torch.where(active, weights.cumsum(-1)[:, -1:], self.total),
            border=torch.where(active, 0.0, self.border),
            settled=self.settled & (is_closed | self.is_complete | ~active),
        )


def rank(logits: Tensor, n: int) -> Ranking:
    """The n largest logits of each row, or fewer: those that tie with the n-th are listed all or not at all.

    logits [B, V] float32.
    """
    vocab_size = logits.shape[1]
    num_blocks = -(-vocab_size // BLOCK)
    if n >= vocab_size:
        return rank_all(logits)
    if 2 * n > num_blocks:
        values, token_ids = logits.topk(n)
    else:
        if vocab_size % BLOCK:
            logits = F.pad(logits, (0, num_blocks * BLOCK - vocab_size), value=-torch.inf)
        blocks = logits.reshape(-1, BLOCK)  # [B * num_blocks, 32]
        maxima = blocks.amax(-1).view(-1, num_blocks)
        chosen = maxima.topk(n, sorted=False).indices  # [B, n]
        rows = torch.arange(0, len(blocks), num_blocks, device=logits.device)[:, None]
        values, places = blocks[(chosen + rows).view(-1)].view(-1, n * BLOCK).topk(n)
        token_ids = chosen.gather(1, places // BLOCK) * BLOCK + places % BLOCK
    border = values[:, -1:]
    return Ranking(
        logits=torch.where(values > border, values, -torch.inf),
        token_ids=_order_equals(values, token_ids, vocab_size + BLOCK),
        border=border,
        top=values[:, :1],
    )


def rank_all(logits: Tensor) -> Ranking:
    """Every token of each row. logits [B, V] float32."""
    values, token_ids = logits.sort(dim=-1, descending=True, stable=True)
    return Ranking(values, token_ids, torch.full_like(values[:, :1], -torch.inf), values[:, :1])


def _order_equals(values: Tensor, token_ids: Tensor, bound: int) -> Tensor:
    """Put tokens of equal value in the order of their ids; values [B, N] descend, ids are less than `bound`."""
    group = F.pad((values[:, 1:] != values[:, :-1]).cumsum(1), (1, 0))
    return (group * bound + token_ids).sort(1).values % bound


def weigh(ranking: Ranking, temperature: Tensor, total: Tensor) -> Candidates:
    """Candidates at a temperature. temperature [B, 1] float64 > 0; total [B, 1] float64, relative to the likeliest."""
    top = ranking.top.double()
    return Candidates(
        weights=((ranking.logits.double() - top) / temperature).exp(),
        total=total,
        border=((ranking.border.double() - top) / temperature).exp(),
        settled=torch.ones_like(top, dtype=torch.bool),
    )


def vocabulary_weight(logits: Tensor, temperature: Tensor) -> Tensor:
    """Weight of each whole row, where the likeliest token weighs 1: the sum of exp((logit - top) / temperature).

    logits [B, V] float32; temperature and result [B, 1] float64. log_softmax is the fastest
    fused pass that torch has on a CPU.
    """
    scaled = (logits - logits.amax(-1, keepdim=True)) / temperature.float()
    return scaled.log_softmax(-1).amax(-1, keepdim=True).double().neg().exp()


def argmax(logits: Tensor) -> tuple[Tensor, Tensor]:
    """The largest logit of each row and its token, the lowest id among equals: both [B]. logits [B, V] float32.

    By blocks: seven times faster than torch's own over a whole row.
    """
    vocab_size = logits.shape[1]
    if vocab_size % BLOCK:
        logits = F.pad(logits, (0, -vocab_size % BLOCK), value=-torch.inf)
    blocks = logits.reshape(len(logits), -1, BLOCK)
    best = blocks.amax(-1).argmax(-1)  # [B]
    block = blocks[torch.arange(len(blocks), device=logits.device), best]  # [B, 32]
    places = block.argmax(-1)
    return block.gather(1, places[:, None])[:, 0], best * BLOCK + places
