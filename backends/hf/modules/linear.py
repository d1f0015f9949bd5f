"""Linears of our own: the weight in whatever form it was read, and what adapters add to it.

Weights are plain tensors that the loader delivers. `forward` is how transformers calls a module, with any leading
dimensions; our own modules hand rows [T, hidden] to each other through `run`, without the cost of a module call.
"""

from collections.abc import Sequence

import torch.nn.functional as F
from torch import Tensor, nn

from tightrope.backends.hf.modules.matrices import Matrix, times
from tightrope.backends.hf.modules.step import CurrentStep
from tightrope.backends.hf.modules.token_tables import TableChange
from tightrope.backends.tensor_parallel import Spans
from tightrope.kernels import dispatch
from tightrope.kernels.forms.low_rank import AdapterRows, LowRankSlots


class Linear(nn.Module):
    """One linear, or several on the same input with their rows one below the other.

    `rows` are their names and numbers of outputs, and `own` are the outputs of each that this rank computes. Where
    `sizes` says how many each rank has of a linear's, they are gathered. Rows of a step may use adapters: `adapters`
    add to the outputs of those in their slot. A head may have rows of its own in an adapter, `changes`, and more
    outputs then; both are whole on every rank, and added to what is gathered.
    """

    weight: Matrix
    bias: Tensor | None = None  # [N] float32

    def __init__(
        self, rows: Sequence[tuple[str, int]], num_inputs: int, current: CurrentStep, own: Sequence[Spans],
        sizes: tuple[int, ...] | None,
    ) -> None:  # fmt: skip
        super().__init__()
        self.rows, self.num_inputs, self.num_outputs = tuple(rows), num_inputs, sum(size for _, size in rows)
        self.own, self.sizes = tuple(own), sizes
        self.current = current
        self.adapters = LowRankSlots()
        self.changes: dict[int, TableChange] = {}  # By slot.
        self.is_head = False  # Whether only rows whose logits are wanted come here.

    @property
    def parts(self) -> list[tuple[str, int, Spans]]:
        """Names and numbers of outputs, and which of them adapters add to on this rank."""
        return [
            (name, size, ((0, size),) if self.is_head else own)
            for (name, size), own in zip(self.rows, self.own, strict=True)
        ]

    @property
    def shape(self) -> tuple[int, int]:
        return self.num_outputs, self.num_inputs

    def forward(self, x: Tensor) -> Tensor:
        out = self.run(x.reshape(-1, x.shape[-1]))
        return out.view(*x.shape[:-1], out.shape[-1])

    def run(self, x: Tensor) -> Tensor:
        """x [T, K] to [T, N], of own outputs alone where nothing is gathered."""
        out = times(x, self.weight, self.bias)
        if self.is_head:
            out, rows = self.current.gathered(out, self.sizes), self.current.head_adapters
            return self._adapted(out, x, rows) if rows is not None and (self.adapters or self.changes) else out
        if self.current.adapters is not None and self.adapters:
            self.current.adapters.check(len(x), self.rows[0][0])
            dispatch.add_low_rank(out, x, self.adapters, self.current.adapters)
        return self.current.gathered(out, self.sizes)

    def _adapted(self, out: Tensor, x: Tensor, rows: AdapterRows) -> Tensor:
        """What rows with adapters make of the logits of a head."""
        rows.check(len(x), self.rows[0][0])
        present = sorted(self.changes.keys() & set(rows.present))
        num_outputs = max([self.num_outputs, *(self.changes[slot].num_rows for slot in present)])
        if num_outputs > self.num_outputs:
            out = F.pad(out, (0, num_outputs - self.num_outputs))  # Not all rows have these tokens.
        for slot in present:
            mine = (rows.slots == slot).nonzero()[:, 0]
            out[mine] = self.changes[slot].scored(out[mine], x[mine], rows.scales[mine], self.num_outputs)
        dispatch.add_low_rank(out, x, self.adapters, rows)
        return out
