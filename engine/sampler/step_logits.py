"""The logits of a step, as the loop handles them: by their rows, without a tensor in its hands."""

from collections.abc import Sequence

from torch import Tensor

from tightrope.engine.sampler.guidance import guided
from tightrope.engine.sampler.sampler import Sampled, prompt_logprobs, sample
from tightrope.engine.sampler.state import SamplerState


class StepLogits:
    """[rows, V] float32. They are written to, and hold until the next step."""

    def __init__(self, logits: Tensor) -> None:
        self._logits = logits

    def guide(self, row: int, negative: int, scale: float) -> None:
        """Lead a row away from the one of its negative prompt, see `guided`."""
        self._logits[row] = guided(self._logits[row], self._logits[negative], scale)

    def draw(self, rows: Sequence[int], states: Sequence[SamplerState]) -> list[Sampled | None]:
        """The next token of each of these rows, see `sample`."""
        logits = self._logits if len(rows) == self._logits.shape[0] else self._logits[rows]
        return sample(logits, states, may_overwrite=True)

    def scores(self, rows: slice, token_ids: Sequence[int], top: int) -> list[Sampled]:
        """The log probability of each of these tokens, which follow the first of the rows, see `prompt_logprobs`."""
        return prompt_logprobs(self._logits[rows][: len(token_ids)], token_ids, top)
