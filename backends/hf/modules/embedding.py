"""The table with a row for each token."""

import torch
from torch import Tensor, nn

from tightrope.backends.hf.modules.matrices import Matrix, rows_of
from tightrope.backends.hf.modules.step import CurrentStep
from tightrope.backends.hf.modules.token_tables import TableChange


class Embedding(nn.Module):
    """Rows of a table that stays as the file has it, in the activations' dtype, times a scale.

    `changes` are what adapters make of it, by slot. `is_on_host`: the table lies in the machine's own memory beside a
    card, and each step brings the rows of its tokens along.
    """

    weight: Matrix  # [V, hidden]
    is_on_host = False

    def __init__(
        self, name: str, shape: tuple[int, int], scale: float, dtype: torch.dtype, current: CurrentStep
    ) -> None:
        super().__init__()
        self.name, self.shape, self.scale, self.dtype, self.current = name, shape, scale, dtype, current
        self.changes: dict[int, TableChange] = {}

    def gathered(self, token_ids: Tensor) -> Tensor:
        """Rows [..., hidden] of the table for token_ids where it lies; tokens that only adapters know get any."""
        return rows_of(self.weight, token_ids.clamp(max=self.shape[0] - 1))

    def forward(self, token_ids: Tensor) -> Tensor:
        adapters = self.current.adapters if self.changes else None
        if self.is_on_host:
            assert self.current.embedded is not None
            rows = self.current.embedded.view(*token_ids.shape, -1).to(self.dtype)
        else:
            rows = rows_of(self.weight, token_ids) if adapters is None else self.gathered(token_ids)
            rows = rows.to(self.dtype)
        if adapters is not None:
            rows = rows.clone() if self.is_on_host else rows
            for slot in self.changes.keys() & set(adapters.present):
                mine = (adapters.slots == slot).view(token_ids.shape)
                rows[mine] = self.changes[slot].embedded(
                    rows[mine], token_ids[mine], adapters.scales[mine.flatten()], self.shape[0]
                )
        return rows if self.scale == 1 else rows * self.scale

    run = forward
