"""The experts of a mixture."""

from collections.abc import Iterable, Iterator, Mapping, Sequence

import torch
from torch import Tensor, nn

from tightrope.backends.hf.modules.matrices import Matrix, projection, stacked, times
from tightrope.backends.hf.modules.step import CurrentStep
from tightrope.backends.tensor_parallel import Share, Span, columns
from tightrope.kernels import dispatch
from tightrope.kernels.forms.layer import GatedExperts, Projection, StackedExperts
from tightrope.kernels.forms.low_rank import AdapterRows, LowRank, LowRankSlots


class Experts(nn.Module):
    """The experts of a mixture, of which only those run that a token picked. Adapters are by expert, then by slot.

    Ranks split each expert by columns, as they would a gated MLP: then all are as busy, whichever experts are picked.
    `sizes` are the ranks' numbers of columns between an expert's two products, and of the sum; None: each has all.
    """

    gate_up: Tensor | Sequence[Matrix]  # [E, 2 * F, K] in the file's dtype, or a matrix for each expert.
    down: Tensor | Sequence[Matrix]  # [E, K, F]
    whole: GatedExperts | StackedExperts | None = None  # It is there where a kernel knows their forms.

    def __init__(
        self, name: str, shape: tuple[int, int, int], activation: str, current: CurrentStep,
        share: Share,
    ) -> None:  # fmt: skip
        """shape: number of experts, hidden size K, size F between their two products."""
        super().__init__()
        self.name, self.activation, self.current = name, activation, current
        num_experts, self.hidden, self.middle = shape
        self.sizes = columns(self.middle, share.count), columns(self.hidden, share.count)
        self.own_middle, self.own_hidden = share.columns(self.middle), share.columns(self.hidden)
        self.gate_up_adapters = tuple(LowRankSlots() for _ in range(num_experts))
        self.down_adapters = tuple(LowRankSlots() for _ in range(num_experts))

    def places(self) -> Iterator[tuple[str, LowRankSlots, int, tuple[int, int], Span]]:
        """Each expert's linears as files name them: name, adapters, first output here, sizes [N, K], own outputs."""
        up_first = self.own_middle[1] - self.own_middle[0]
        up, down = (self.middle, self.hidden), (self.hidden, self.middle)
        for expert, (first, second) in enumerate(zip(self.gate_up_adapters, self.down_adapters, strict=True)):
            for gate_name, up_name, down_name in (("gate_proj", "up_proj", "down_proj"), ("w1", "w3", "w2")):
                yield f"{self.name}.{expert}.{gate_name}", first, 0, up, self.own_middle
                yield f"{self.name}.{expert}.{up_name}", first, up_first, up, self.own_middle
                yield f"{self.name}.{expert}.{down_name}", second, 0, down, self.own_hidden

    def forward(self, hidden_states: Tensor, top_k_index: Tensor, top_k_weights: Tensor) -> Tensor:
        """hidden_states [T, K], top_k_index and top_k_weights [T, k] to [T, K]."""
        rows = self.current.adapters if any(self.gate_up_adapters) or any(self.down_adapters) else None
        if self.whole is not None:
            shares = top_k_weights.to(torch.float32)
            gather = None if self.sizes[0] is None else self._gathered
            done = dispatch.experts(hidden_states, self.whole, top_k_index, shares, rows, gather)
            if done is not None:
                return self.current.gathered(done, self.sizes[1])
        mixed = self._one_by_one(hidden_states, top_k_index, top_k_weights)
        return self.current.gathered(mixed, self.sizes[1])

    def _gathered(self, middle: Tensor) -> Tensor:
        return self.current.gathered(middle, self.sizes[0])

    def settle(self) -> None:
        """Lay out the weights, once they are there, as the kernels that run all experts at once have them."""
        gate_up, down = stacked(self.gate_up), stacked(self.down)
        if gate_up is not None and down is not None:
            self.whole = StackedExperts(gate_up[0], down[0], self.activation)
            self.gate_up, self.down = gate_up[1], down[1]
            return
        all_gate_up = _projections(self.gate_up, self.gate_up_adapters)
        all_down = _projections(self.down, self.down_adapters)
        self.whole = GatedExperts(all_gate_up, all_down, self.activation) if all_gate_up and all_down else None

    def _one_by_one(self, hidden_states: Tensor, top_k_index: Tensor, top_k_weights: Tensor) -> Tensor:
        begin, end = self.own_hidden
        result = hidden_states.new_zeros(len(hidden_states), end - begin)
        order = top_k_index.flatten().argsort(stable=True)  # places [T * k], sorted by expert
        counts = torch.bincount(top_k_index.flatten(), minlength=len(self.down)).tolist()
        picked = [(e, places) for e, places in enumerate(order.split(counts)) if len(places)]
        rows_of = [places // top_k_index.shape[1] for _, places in picked]
        at = [None if self.current.adapters is None else self.current.adapters.at(rows) for rows in rows_of]
        middles: Iterable[Tensor]
        middles = (self.first(e, hidden_states[rows], a) for (e, _), rows, a in zip(picked, rows_of, at, strict=True))
        if self.sizes[0] is not None:
            middles = self._gathered(torch.cat(list(middles))).split([len(rows) for rows in rows_of])
        for (expert, places), rows, adapters, middle in zip(picked, rows_of, at, middles, strict=True):
            mixed = self.second(expert, middle, adapters)
            result.index_add_(0, rows, mixed * top_k_weights.flatten()[places].unsqueeze(1).to(mixed.dtype))
        return result

    def first(self, expert: int, x: Tensor, adapters: AdapterRows | None) -> Tensor:
        """What lies between an expert's two products, of x [T, K]: own columns of [T, F]."""
        gate_up = _adapted(x, self.gate_up[expert], self.gate_up_adapters[expert], adapters)
        return dispatch.gated(gate_up, self.activation)

    def second(self, expert: int, middle: Tensor, adapters: AdapterRows | None) -> Tensor:
        """Own columns of [T, K], of what all ranks' `first` gave."""
        return _adapted(middle, self.down[expert], self.down_adapters[expert], adapters)


def _projections(
    weights: Tensor | Sequence[Matrix], adapters: Sequence[Mapping[int, LowRank]]
) -> tuple[Projection, ...]:
    """Each expert's; none unless all have forms that a kernel knows."""
    found = [projection(weight, None, added) for weight, added in zip(weights, adapters, strict=True)]
    known = tuple(one for one in found if one is not None)
    return known if len(known) == len(found) else ()


def _adapted(x: Tensor, weight: Matrix, added: Mapping[int, LowRank], rows: AdapterRows | None) -> Tensor:
    out = times(x, weight, None)
    if rows is not None and added:
        dispatch.add_low_rank(out, x, added, rows)
    return out
