"""Our modules in transformers' tree: the same arithmetic as the classes whose place they take, through our kernels.

Weights are plain tensors that the loader delivers. `forward` is how transformers calls a module, with any leading
dimensions; our own modules hand rows [T, hidden] to each other through `run`, without the cost of a module call.
"""

from collections.abc import Iterator, Mapping, Sequence
from functools import cached_property
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers.modeling_outputs import MoeModelOutputWithPast

from tightrope.backends.hf.modules.attention import Attention, CurrentStep
from tightrope.backends.hf.modules.matrices import Matrix, projection, stacked, times
from tightrope.backends.hf.modules.token_tables import TableChange
from tightrope.kernels import dispatch
from tightrope.kernels.forms.layer import DecoderLayer, GatedExperts, Norm, Projection, StackedExperts
from tightrope.kernels.forms.low_rank import AdapterRows, LowRank


class Linear(nn.Module):
    """One linear, or several on the same input with their rows one below the other.

    `rows` are their names and numbers of outputs. Rows of a step may use adapters: `adapters` add to the outputs of
    those in their slot. A head may have rows of its own in an adapter, `changes`, and more outputs then.
    """

    weight: Matrix
    bias: Tensor | None = None  # [N] float32

    def __init__(self, rows: Sequence[tuple[str, int]], num_inputs: int, current: CurrentStep) -> None:
        super().__init__()
        self.rows, self.num_inputs, self.num_outputs = tuple(rows), num_inputs, sum(size for _, size in rows)
        self.current = current
        self.adapters: dict[int, LowRank] = {}
        self.changes: dict[int, TableChange] = {}  # by slot
        self.is_head = False  # whether only rows whose logits are wanted come here

    @property
    def shape(self) -> tuple[int, int]:
        return self.num_outputs, self.num_inputs

    def forward(self, x: Tensor) -> Tensor:
        out = self.run(x.reshape(-1, x.shape[-1]))
        return out.view(*x.shape[:-1], out.shape[-1])

    def run(self, x: Tensor) -> Tensor:
        """x [T, K] to [T, N]."""
        out = times(x, self.weight, self.bias)
        rows = self.current.head_adapters if self.is_head else self.current.adapters
        if rows is not None and (self.adapters or self.changes):
            return self._adapted(out, x, rows)
        return out

    def _adapted(self, out: Tensor, x: Tensor, rows: AdapterRows) -> Tensor:
        rows.check(len(x), self.rows[0][0])
        present = sorted(self.changes.keys() & set(rows.present))
        num_outputs = max([self.num_outputs, *(self.changes[slot].num_rows for slot in present)])
        if num_outputs > self.num_outputs:
            out = F.pad(out, (0, num_outputs - self.num_outputs))  # of tokens that not all rows have
        for slot in present:
            mine = (rows.slots == slot).nonzero()[:, 0]
            out[mine] = self.changes[slot].scored(out[mine], x[mine], rows.scales[mine], self.num_outputs)
        dispatch.add_low_rank(out, x, self.adapters, rows)
        return out


class RMSNorm(nn.Module):
    """Root mean square norm; Gemma's one, `offset`, is in the weight. `replaced` are those of adapters, by slot."""

    weight: Tensor  # [N] float32

    def __init__(self, name: str, size: int, eps: float, offset: float, current: CurrentStep) -> None:
        super().__init__()
        self.name, self.size, self.eps, self.offset, self.current = name, size, eps, offset, current
        self.replaced: dict[int, Tensor] = {}
        self.runs_by_row = True  # whether the first dimension of what `run` is given is that of a step's rows

    def forward(self, x: Tensor) -> Tensor:
        return self.run(x.reshape(-1, x.shape[-1])).view(x.shape)

    def run(self, x: Tensor) -> Tensor:
        """x [T, N], or [T, heads, N]."""
        out = dispatch.rms_norm(x.contiguous(), self.weight, self.eps)
        if self.replaced and (rows := self.current.adapters) is not None:
            rows.check(len(x), self.name)
            for slot in self.replaced.keys() & set(rows.present):
                mine = (rows.slots == slot).nonzero()[:, 0]
                own = dispatch.rms_norm(x[mine].contiguous(), self.replaced[slot], self.eps)
                out[mine] = torch.lerp(out[mine], own, rows.scales[mine].to(out.dtype).view(-1, *[1] * (x.dim() - 1)))
        return out

    @property
    def is_replaced(self) -> bool:
        """Whether a row of the step has another weight than ours."""
        rows = self.current.adapters
        return rows is not None and not self.replaced.keys().isdisjoint(rows.present)


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


class GatedMLP(nn.Module):
    """down(activation(gate(x)) * up(x)), gate and up as one linear."""

    def __init__(self, gate_up: Linear, down: Linear, activation: str) -> None:
        super().__init__()
        self.gate_up, self.down, self.activation = gate_up, down, activation

    def forward(self, x: Tensor) -> Tensor:
        return self.run(x.reshape(-1, x.shape[-1])).view(x.shape)

    def run(self, x: Tensor) -> Tensor:
        """x [T, hidden] to [T, hidden]."""
        return self.down.run(dispatch.gated(self.gate_up.run(x), self.activation))


class Experts(nn.Module):
    """The experts of a mixture, of which only those run that a token picked. Adapters are by expert, then by slot."""

    gate_up: Tensor | Sequence[Matrix]  # [E, 2 * F, K] in the file's dtype, or a matrix for each expert
    down: Tensor | Sequence[Matrix]  # [E, K, F]
    whole: GatedExperts | StackedExperts | None = None  # where their forms are known to a kernel

    def __init__(self, name: str, shape: tuple[int, int, int], activation: str, current: CurrentStep) -> None:
        """shape: number of experts, hidden size K, size F between their two products."""
        super().__init__()
        self.name, self.activation, self.current = name, activation, current
        num_experts, self.hidden, self.middle = shape
        self.gate_up_adapters: tuple[dict[int, LowRank], ...] = tuple({} for _ in range(num_experts))
        self.down_adapters: tuple[dict[int, LowRank], ...] = tuple({} for _ in range(num_experts))

    def places(self) -> Iterator[tuple[str, dict[int, LowRank], int, int, int]]:
        """Each expert's linears as files name them: name, adapters, first output, outputs, inputs."""
        for expert, (gate_up, down) in enumerate(zip(self.gate_up_adapters, self.down_adapters, strict=True)):
            for gate_name, up_name, down_name in (("gate_proj", "up_proj", "down_proj"), ("w1", "w3", "w2")):
                yield f"{self.name}.{expert}.{gate_name}", gate_up, 0, self.middle, self.hidden
                yield f"{self.name}.{expert}.{up_name}", gate_up, self.middle, self.middle, self.hidden
                yield f"{self.name}.{expert}.{down_name}", down, 0, self.hidden, self.middle

    def forward(self, hidden_states: Tensor, top_k_index: Tensor, top_k_weights: Tensor) -> Tensor:
        """hidden_states [T, K], top_k_index and top_k_weights [T, k] to [T, K]."""
        rows = self.current.adapters if any(self.gate_up_adapters) or any(self.down_adapters) else None
        if self.whole is not None:
            shares = top_k_weights.to(torch.float32)
            if (done := dispatch.experts(hidden_states, self.whole, top_k_index, shares, rows)) is not None:
                return done
        return self._one_by_one(hidden_states, top_k_index, top_k_weights)

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
        result = torch.zeros_like(hidden_states)
        order = top_k_index.flatten().argsort(stable=True)  # places [T * k], sorted by expert
        counts = torch.bincount(top_k_index.flatten(), minlength=len(self.down)).tolist()
        for expert, places in enumerate(order.split(counts)):
            if len(places):
                rows = places // top_k_index.shape[1]
                adapters = None if self.current.adapters is None else self.current.adapters.at(rows)
                gate_up = _adapted(hidden_states[rows], self.gate_up[expert], self.gate_up_adapters[expert], adapters)
                middle = dispatch.gated(gate_up, self.activation)
                mixed = _adapted(middle, self.down[expert], self.down_adapters[expert], adapters)
                result.index_add_(0, rows, mixed * top_k_weights.flatten()[places].unsqueeze(1).to(mixed.dtype))
        return result


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


class Unbatched(nn.Module):
    """A module of transformers that our layer runs on rows [T, hidden]."""

    def __init__(self, module: nn.Module) -> None:
        super().__init__()
        self.module = module

    def run(self, x: Tensor) -> Tensor:
        """x [T, hidden] to [T, hidden], in a batch of one."""
        output = self.module(x.unsqueeze(0))
        assert isinstance(output, Tensor)  # or its layer would have been left as it is
        return output.view(x.shape)


class Layer(nn.Module):
    """A decoder layer: attention and MLP on the normed residual stream, perhaps normed again before they join it."""

    def __init__(
        self,
        attention: Attention,
        mlp: GatedMLP | Unbatched,
        norms: tuple[RMSNorm | None, RMSNorm | None, RMSNorm | None, RMSNorm | None],
    ) -> None:
        super().__init__()
        self.attention, self.mlp = attention, mlp
        self.input_norm, self.post_attention_norm, self.pre_mlp_norm, self.post_mlp_norm = norms
        self._run_attention, self._run_mlp = attention.run, mlp.run
        self._norms = tuple(None if norm is None else norm.run for norm in norms)
        self._all_norms = [norm for norm in (*norms, attention.q_norm, attention.k_norm) if norm is not None]

    def forward(self, hidden_states: Tensor, *args: object, **kwargs: object) -> Tensor:
        return self.run(hidden_states.reshape(-1, hidden_states.shape[-1])).view(hidden_states.shape)

    def run(self, x: Tensor) -> Tensor:
        """x [T, hidden] to [T, hidden]."""
        if (whole := self._whole) is not None and not any(norm.is_replaced for norm in self._all_norms):
            step, cache, table = self.attention.now()
            rows = self.attention.current.adapters
            if (done := dispatch.decoder_layer(x, whole, cache, step, table, rows)) is not None:
                return done
        before, after, before_mlp, after_mlp = self._norms
        y = self._run_attention(x if before is None else before(x))
        x = x + (y if after is None else after(y))
        y = self._run_mlp(x if before_mlp is None else before_mlp(x))
        return x + (y if after_mlp is None else after_mlp(y))

    @cached_property
    def _whole(self) -> DecoderLayer | None:
        """The layer as one kernel runs it, where its parts have the forms for that; read once weights are there."""
        attention, mlp = self.attention, self.mlp
        if not isinstance(mlp, GatedMLP):
            return None
        linears = (attention.qkv, attention.out, mlp.gate_up, mlp.down)
        qkv, out, gate_up, down = (projection(linear.weight, linear.bias, linear.adapters) for linear in linears)
        if qkv is None or out is None or gate_up is None or down is None:
            return None
        return DecoderLayer(
            qkv,
            out,
            gate_up,
            down,
            (_of(self.input_norm), _of(self.post_attention_norm), _of(self.pre_mlp_norm), _of(self.post_mlp_norm)),
            (_of(attention.q_norm), _of(attention.k_norm)),
            attention.num_heads,
            mlp.activation,
            attention.layer.spec,
        )


def _of(norm: RMSNorm | None) -> Norm | None:
    return None if norm is None else Norm(norm.weight, norm.eps)


class Stack(nn.Module):
    """The base model: embedding, layers, last norm."""

    def __init__(self, embedding: Embedding, layers: tuple[Layer, ...], norm: RMSNorm) -> None:
        super().__init__()
        self.embedding, self.layers, self.norm = embedding, nn.ModuleList(layers), norm
        self._layers = tuple(layer.run for layer in layers)

    def forward(self, input_ids: Tensor, **kwargs: Any) -> MoeModelOutputWithPast:  # noqa: ANN401 - transformers' own
        x = self.embedding.run(input_ids[0])
        for layer in self._layers:
            x = layer(x)
        return MoeModelOutputWithPast(last_hidden_state=self.norm.run(x).unsqueeze(0))
