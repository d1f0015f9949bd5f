"""A model that is of our modules from end to end: its steps run without transformers' own code around these."""

from dataclasses import dataclass

from torch import Tensor

from tightrope.backends.hf.modules.layer import Stack
from tightrope.backends.hf.modules.linear import Linear


@dataclass(frozen=True, slots=True)
class WholeModel:
    """A stack, and a head that makes logits of each of its hidden states, to which nothing more is done."""

    stack: Stack
    head: Linear

    def run(self, token_ids: Tensor, rows: Tensor) -> Tensor:
        """Logits [n, V] of these rows [n] of token_ids [T]."""
        return self.head.run(self.stack.run(token_ids, rows))
