"""What adapters make of the two tables with a row for each token: the embedding, and the head."""

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from tightrope.kernels import dispatch


@dataclass(frozen=True, slots=True)
class TableChange:
    """One adapter's rows of a table [V, hidden]; `num_rows` is how many it has, more than the model's or fewer.

    `rows` [n, hidden] are its own; `places` [num_rows] int64 say where in them the row of a token is, -1 where the
    model's is used. To an embedding, `down` [num_rows, r] and `up` [r, hidden] add: down[token] @ up. A head's own rows
    may have biases [n] float32.
    """

    num_rows: int
    rows: Tensor | None = None
    places: Tensor | None = None
    bias: Tensor | None = None
    down: Tensor | None = None
    up: Tensor | None = None

    @property
    def num_bytes(self) -> int:
        parts = (self.rows, self.places, self.bias, self.down, self.up)
        return sum(part.nbytes for part in parts if part is not None)

    def to(self, device: torch.device) -> "TableChange":
        """The same in the memory of `device`."""
        parts = (self.rows, self.places, self.bias, self.down, self.up)
        return TableChange(self.num_rows, *(None if part is None else part.to(device) for part in parts))

    def embedded(self, theirs: Tensor, token_ids: Tensor, scales: Tensor, num_theirs: int) -> Tensor:
        """Rows of tokens [n], of which `theirs` [n, hidden] are the model's.

        Each is scales [n] of the way from the model's row to the adapter's; tokens that the model's `num_theirs` rows
        don't reach have the adapter's alone.
        """
        out, scales = theirs, scales.unsqueeze(1).to(theirs.dtype)
        if self.rows is not None and self.places is not None:
            places = self.places[token_ids]
            is_own = (places >= 0).unsqueeze(1)
            own = F.embedding(places.clamp(min=0), self.rows).to(out.dtype)
            way = torch.where((token_ids < num_theirs).unsqueeze(1), scales, 1.0)
            out = torch.where(is_own, torch.lerp(out, own, way), out)
        if self.down is not None and self.up is not None:
            out = out + (F.embedding(token_ids, self.down).to(out.dtype) @ self.up.to(out.dtype)) * scales
        return out

    def scored(self, theirs: Tensor, x: Tensor, scales: Tensor, num_theirs: int) -> Tensor:
        """Logits [n, V] of x [n, hidden], of which `theirs` [n, V] are the model's; V is num_rows or more.

        As with `embedded`: scales [n] of the way from the model's logit to the adapter's.
        """
        if self.rows is None or self.places is None:
            return theirs
        columns = (self.places >= 0).nonzero()[:, 0]
        own = dispatch.linear(x, self.rows, self.bias)[:, self.places[columns]].to(theirs.dtype)
        way = torch.where(columns < num_theirs, scales.unsqueeze(1).to(own.dtype), 1.0)
        return theirs.index_copy(1, columns, torch.lerp(theirs[:, columns], own, way))


def table_change(
    table: Tensor | None,
    bias: Tensor | None,
    theirs: Tensor | None,
    tokens: tuple[tuple[int, ...], Tensor] | None,
    num_theirs: int,
    *,
    is_bias_theirs: bool,
) -> TableChange:
    """Of a whole table [V, hidden] in the place of a model's `theirs` [num_theirs, hidden], and of single rows.

    Rows that equal the model's are left out; theirs None: they can't be compared. bias: of as many rows as there are,
    of `table`, or of the model where `is_bias_theirs`.
    """
    num_rows = num_theirs if table is None else len(table)
    chosen = torch.zeros(num_rows, dtype=torch.bool)
    if table is not None:
        chosen[:] = True
        if theirs is not None and (bias is None or is_bias_theirs):
            for begin in range(0, min(num_rows, num_theirs), _COMPARED):
                end = min(begin + _COMPARED, num_rows, num_theirs)
                chosen[begin:end] = (table[begin:end].float() != theirs[begin:end].cpu().float()).any(1)
    token_ids = chosen.nonzero()[:, 0]
    rows = None if table is None else table[token_ids]
    if tokens is not None:
        single = torch.tensor(tokens[0], dtype=torch.int64)
        num_rows = max(num_rows, int(single.max()) + 1) if len(single) else num_rows
        rows = tokens[1].clone() if rows is None else torch.cat([rows, tokens[1].to(rows.dtype)])
        token_ids = torch.cat([token_ids, single])
    if rows is None or not len(rows):
        return TableChange(num_rows)
    places = torch.full((num_rows,), -1, dtype=torch.int64)
    for place, token_id in enumerate(token_ids.tolist()):  # Of a token given twice the later row counts.
        places[token_id] = place
    if bias is not None:
        bias = F.pad(bias.cpu().float(), (0, max(0, num_rows - len(bias))))[token_ids]
    return TableChange(num_rows, rows, places, bias)


_COMPARED = 4096  # So many rows are compared at a time.
