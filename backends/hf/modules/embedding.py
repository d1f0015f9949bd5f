"""The table with a row for each token."""

import torch
from torch import Tensor, nn

from tightrope.backends.hf.modules.matrices import Matrix, rows_of
from tightrope.backends.hf.modules.step import CurrentStep
from tightrope.backends.hf.modules.token_tables import TableChange
from tightrope.backends.tensor_parallel import Share, columns


class Embedding(nn.Module):
    """Rows of a table that stays as the file has it, in the activations' dtype, times a scale.

    `changes` are what adapters make of it, by slot. `is_on_host`: the table lies in the machine's own memory beside a
    card, and each step brings the rows of its tokens along. Where `sizes` says how many tokens' rows each rank has,
    every rank gives a row for each token of a step, and that of the token's own rank counts.
    """

    weight: Matrix  # [V, hidden]
    is_on_host = False
    _ends: Tensor  # The first tokens of all ranks but the first.

    def __init__(self, name: str, shape: tuple[int, int], scale: float, current: CurrentStep, share: Share) -> None:
        super().__init__()
        self.sizes, self.own = columns(shape[0], share.count), share.columns(shape[0])
        self.register_buffer("_ends", torch.tensor(self.sizes or shape[:1]).cumsum(0)[:-1], persistent=False)
        self.name, self.shape, self.scale, self.current = name, shape, scale, current
        self.dtype = current.dtype
        self.changes: dict[int, TableChange] = {}

    def gathered(self, token_ids: Tensor) -> Tensor:
        """Rows [..., hidden] of the table for token_ids where it lies; tokens that it doesn't know get any."""
        begin, end = self.own
        return rows_of(self.weight, token_ids.clamp(begin, end - 1) - begin)

    def forward(self, token_ids: Tensor) -> Tensor:
        adapters = self.current.adapters if self.changes else None
        if self.is_on_host:
            assert self.current.embedded is not None
            rows = self.current.embedded.view(*token_ids.shape, -1).to(self.dtype)
        else:
            is_known = adapters is None and self.sizes is None
            rows = rows_of(self.weight, token_ids) if is_known else self.gathered(token_ids)
            rows = rows.to(self.dtype)
        if self.sizes is not None:
            rows = self._of_owners(rows, token_ids)
        if adapters is not None:
            rows = rows.clone() if self.is_on_host else rows
            for slot in self.changes.keys() & set(adapters.present):
                mine = (adapters.slots == slot).view(token_ids.shape)
                rows[mine] = self.changes[slot].embedded(
                    rows[mine], token_ids[mine], adapters.scales[mine.flatten()], self.shape[0]
                )
        return rows if self.scale == 1 else rows * self.scale

    def _of_owners(self, rows: Tensor, token_ids: Tensor) -> Tensor:
        """Rows [..., hidden] as the ranks have them that own the tokens; `rows` are this rank's."""
        assert self.sizes is not None
        width = rows.shape[-1]
        by_rank = self.current.gathered(rows.view(-1, width), (width,) * len(self.sizes))
        owner = torch.bucketize(token_ids.flatten(), self._ends, right=True)
        places = torch.arange(len(owner), device=rows.device) * len(self.sizes) + owner
        return by_rank.view(-1, width)[places].view(*token_ids.shape, width)

    run = forward
