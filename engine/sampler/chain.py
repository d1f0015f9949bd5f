"""The steps from logits to a drawn token for a batch whose rows have parameters of their own."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from tightrope.engine.sampler.candidates import Candidates, Ranking, vocabulary_weight, weigh
from tightrope.engine.sampler.draw import draw, uniform
from tightrope.engine.sampler.state import SamplerState
from tightrope.engine.sampler.truncation import min_p, top_k, top_p, typical_p

TRUNCATION: tuple[tuple[str, float, Callable[[Candidates, Tensor], Candidates]], ...] = (
    ("top_k", 0, top_k),
    ("top_p", 1, top_p),
    ("min_p", 0, min_p),
    ("typical_p", 1, typical_p),
)  # name, neutral value, step; in the order in which they run

_LIST = 128  # candidates listed at first for a row without top_k: enough for most rows at temperature 1
_SPARE = 12  # listed beyond what is wanted, since tokens that tie at the border are left out
_TEMPERATURES = (1e-30, 1e30)  # what float32 can divide by


@dataclass(frozen=True, slots=True)
class Drawn:
    """What came of a batch; [B, 1] each but `candidates`."""

    candidates: Candidates  # the kept tokens, in the columns of the ranking
    token_ids: Tensor  # int64
    logprobs: Tensor  # float64: log of the probability drawn from
    settled: Tensor  # bool: False where the ranking was too short to tell


class Chain:
    """The parameters of a batch as columns [B, 1] float64, and the steps that aren't neutral in every row."""

    def __init__(self, states: Sequence[SamplerState], vocab_size: int, device: torch.device) -> None:
        rows = [_row(state) for state in states]
        table = torch.tensor(rows, dtype=torch.float64).to(device)
        self._temperature, self._u, *columns = table.split(1, dim=1)
        self._steps = [
            (step, column)
            for i, ((_, neutral, step), column) in enumerate(zip(TRUNCATION, columns, strict=True))
            if any(row[2 + i] != neutral for row in rows)
        ]
        self._weighed = [row for row, state in enumerate(states) if _needs_total(state)]
        self._vocab_size = vocab_size
        self.num_listed = max(_num_listed(state) for state in states)

    def run(self, logits: Tensor, ranking: Ranking) -> Drawn:
        """Draw from the edited logits [B, V], whose largest are in `ranking`."""
        candidates = weigh(ranking, self._temperature, self._total(logits))
        for step, column in self._steps:
            candidates = step(candidates, column)
        columns, settled = draw(candidates, self._u)
        logprobs = (candidates.weights.gather(1, columns) / candidates.total).log()
        return Drawn(candidates, ranking.token_ids.gather(1, columns), logprobs, settled)

    def _total(self, logits: Tensor) -> Tensor:
        """Weight of each whole row, where a step asks for it; elsewhere the bound that no weight exceeds 1."""
        weighed = self._weighed
        if len(weighed) == len(logits):
            return vocabulary_weight(logits, self._temperature)
        total = torch.full_like(self._temperature, self._vocab_size)
        if weighed:
            total[weighed] = vocabulary_weight(logits[weighed], self._temperature[weighed])
        return total


def _row(state: SamplerState) -> list[float]:
    """temperature, u, and the truncation parameters. Greedy is the first of all tokens at temperature 1."""
    params = state.params
    if params.temperature == 0:
        return [1.0, 0.0, *(neutral for _, neutral, _ in TRUNCATION)]
    low, high = _TEMPERATURES
    temperature = min(max(params.temperature, low), high)
    u = uniform(state.seed, state.num_output)
    return [temperature, u, params.top_k, params.top_p, params.min_p, params.typical_p]


def _needs_total(state: SamplerState) -> bool:
    """Whether the weight of the whole vocabulary decides anything, or is part of a logprob."""
    params = state.params
    if params.temperature == 0:
        return state.logprobs is not None and state.logprobs.processed
    return params.top_k == 0 and (params.top_p < 1 or (params.min_p == 0 and params.typical_p == 1))


def _num_listed(state: SamplerState) -> int:
    params = state.params
    top = state.logprobs.top if state.logprobs is not None and state.logprobs.processed else 0
    if params.temperature == 0:
        return top + _SPARE
    return params.top_k + _SPARE if params.top_k > 0 else max(_LIST, top + _SPARE)
