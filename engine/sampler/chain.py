"""The steps from ranked logits to a drawn token, for a batch whose rows have parameters of their own."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
from torch import Tensor

from tightrope.engine.sampler.candidates import Candidates, Mask, weigh
from tightrope.engine.sampler.draw import draw, uniform
from tightrope.engine.sampler.ranking import Doubles, Floats, Ids, Ranking, vocabulary_weight
from tightrope.engine.sampler.state import SamplerState
from tightrope.engine.sampler.truncation import min_p, top_k, top_p, typical_p

TRUNCATION: tuple[tuple[str, float, Callable[[Candidates, Doubles], Candidates]], ...] = (
    ("top_k", 0, top_k),
    ("top_p", 1, top_p),
    ("min_p", 0, min_p),
    ("typical_p", 1, typical_p),
)  # parameter, neutral value, step; in the order in which they run

_LIST = 128  # candidates listed at first for a row without top_k: enough for most rows at temperature 1
_SPARE = 12  # listed beyond what is wanted, since tokens that tie at the border are left out
_TEMPERATURES = (1e-30, 1e30)  # what float32 can divide by


@dataclass(frozen=True, slots=True)
class Drawn:
    """What came of a batch."""

    candidates: Candidates  # the kept tokens, in the columns of the ranking
    columns: Ids  # [B]: of the drawn tokens
    settled: Mask  # [B]: False where the ranking was too short to tell


class Chain:
    """The parameters of a batch, and the steps that aren't neutral in every row."""

    def __init__(self, states: Sequence[SamplerState]) -> None:
        rows = [_row(state) for state in states]
        self._table = np.array(rows, np.float64)  # [B, 2 + steps]
        self._steps = [
            (column, step)
            for column, (_, neutral, step) in enumerate(TRUNCATION, 2)
            if any(row[column] != neutral for row in rows)
        ]
        self._tops = np.array([[state.processed_top] for state in states])
        self._lists_tops = bool(self._tops.any())
        self._weighed = [row for row, state in enumerate(states) if _needs_total(state)]
        self.num_listed = [_num_listed(state) for state in states]

    def totals(self, logits: Tensor, top: Floats) -> Doubles:
        """Weight of each whole row [B, 1], where a step asks for it; elsewhere a bound, as no weight exceeds 1.

        top [B, 1]: the largest logit of each row.
        """
        totals = np.full((len(logits), 1), float(logits.shape[1]))
        if rows := self._weighed:
            whole = logits if len(rows) == len(logits) else logits[rows]
            totals[rows] = vocabulary_weight(whole, top[rows], self._table[rows, :1])
        return totals

    def run(self, rows: Ids, ranking: Ranking, totals: Doubles) -> Drawn:
        """Draw from these rows' ranking; totals [B, 1] of the whole batch."""
        table = self._table[rows]
        with np.errstate(all="ignore"):  # rows from which nothing can be drawn are full of NaN
            candidates = weigh(ranking, table[:, :1], totals[rows])
            for column, step in self._steps:
                candidates = step(candidates, table[:, column : column + 1])
            columns, settled = draw(candidates, table[:, 1:2])
        if self._lists_tops:
            num_kept = np.count_nonzero(candidates.weights, axis=1, keepdims=True)
            settled &= candidates.is_complete | (num_kept >= self._tops[rows])
        return Drawn(candidates, columns[:, 0], settled[:, 0])


def _row(state: SamplerState) -> list[float]:
    """temperature, u, and the truncation parameters. Greedy is the first of all tokens at temperature 1."""
    params = state.params
    if params.temperature == 0:
        return [1.0, 0.0, *(neutral for _, neutral, _ in TRUNCATION)]
    low, high = _TEMPERATURES
    temperature = min(max(params.temperature, low), high)
    u = uniform(state.seed, state.num_output)
    return [temperature, u, params.top_k, params.top_p, params.min_p, params.typical_p]


def native_params(states: Sequence[SamplerState]) -> Doubles:
    """[B, 2 + steps]: temperature, u and the truncation parameters, as the native twin of the chain takes them.

    Greedy is there the one likeliest token.
    """
    rows = [_row(state) for state in states]
    for row, state in zip(rows, states, strict=True):
        if state.params.temperature == 0:
            row[2] = 1.0
    return np.array(rows, np.float64)


def _needs_total(state: SamplerState) -> bool:
    """Whether the weight of the whole vocabulary decides anything, or is part of a logprob."""
    params = state.params
    if params.temperature == 0:
        return state.wants_processed
    return params.top_k == 0 and (params.top_p < 1 or (params.min_p == 0 and params.typical_p == 1))


def _num_listed(state: SamplerState) -> int:
    params = state.params
    if params.temperature == 0:
        return state.processed_top + _SPARE
    return params.top_k + _SPARE if params.top_k > 0 else max(_LIST, state.processed_top + _SPARE)
