"""The table with a row for each token."""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tightrope.backends.hf.modules.step import CurrentStep
from tightrope.backends.hf.modules.token_tables import TableChange


class Embedding(nn.Module):
    """Rows of a table that stays in the file's dtype, in the activations' dtype, times a scale.

    `changes` are what adapters make of it, by slot.
    """

    weight: Tensor  # [V, hidden]

    def __init__(
        self, name: str, shape: tuple[int, int], scale: float, dtype: torch.dtype, current: CurrentStep
    ) -> None:
        super().__init__()
        self.name, self.shape, self.scale, self.dtype, self.current = name, shape, scale, dtype, current
        self.changes: dict[int, TableChange] = {}

    def forward(self, token_ids: Tensor) -> Tensor:
        adapters = self.current.adapters if self.changes else None
        if adapters is None:
            rows = F.embedding(token_ids, self.weight).to(self.dtype)
        else:
            rows = F.embedding(token_ids.clamp(max=len(self.weight) - 1), self.weight).to(self.dtype)
            for slot in self.changes.keys() & set(adapters.present):
                mine = (adapters.slots == slot).view(token_ids.shape)
                rows[mine] = self.changes[slot].embedded(
                    rows[mine], token_ids[mine], adapters.scales[mine.flatten()], len(self.weight)
                )
        return rows if self.scale == 1 else rows * self.scale

    run = forward
