"""Our modules in transformers' tree: the same arithmetic as the classes whose place they take, through our kernels.

Weights are plain tensors that the loader delivers. `forward` is how transformers calls a module, with any leading
dimensions; our own modules hand rows [T, hidden] to each other through `run`, without the cost of a module call.
"""

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers.modeling_outputs import MoeModelOutputWithPast

from tightrope.backends.hf.attention import Attention
from tightrope.backends.hf.matrices import Matrix, times
from tightrope.kernels import dispatch


class Linear(nn.Module):
    """One linear, or several on the same input with their rows one below the other."""

    weight: Matrix
    bias: Tensor | None = None  # [N] float32

    def __init__(self, num_outputs: int) -> None:
        super().__init__()
        self.num_outputs = num_outputs

    def forward(self, x: Tensor) -> Tensor:
        return self.run(x.reshape(-1, x.shape[-1])).view(*x.shape[:-1], self.num_outputs)

    def run(self, x: Tensor) -> Tensor:
        """x [T, K] to [T, N]."""
        return times(x, self.weight, self.bias)


class RMSNorm(nn.Module):
    """Root mean square norm; Gemma's one is in the weight."""

    weight: Tensor  # [N] float32

    def __init__(self, eps: float) -> None:
        super().__init__()
        self.eps = eps

    def forward(self, x: Tensor) -> Tensor:
        return dispatch.rms_norm(x.contiguous(), self.weight, self.eps)

    run = forward


class Embedding(nn.Module):
    """Rows of a table that stays in the file's dtype, in the activations' dtype, times a scale."""

    weight: Tensor  # [V, hidden]

    def __init__(self, scale: float, dtype: torch.dtype) -> None:
        super().__init__()
        self.scale, self.dtype = scale, dtype

    def forward(self, token_ids: Tensor) -> Tensor:
        rows = F.embedding(token_ids, self.weight).to(self.dtype)
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
    """The experts of a mixture, of which only those run that a token picked."""

    gate_up: Tensor | Sequence[Matrix]  # [E, 2 * F, K] in the file's dtype, or a matrix for each expert
    down: Tensor | Sequence[Matrix]  # [E, K, F]

    def __init__(self, activation: str) -> None:
        super().__init__()
        self.activation = activation

    def forward(self, hidden_states: Tensor, top_k_index: Tensor, top_k_weights: Tensor) -> Tensor:
        """hidden_states [T, K], top_k_index and top_k_weights [T, k] to [T, K]."""
        result = torch.zeros_like(hidden_states)
        order = top_k_index.flatten().argsort(stable=True)  # places [T * k], sorted by expert
        counts = torch.bincount(top_k_index.flatten(), minlength=len(self.down)).tolist()
        for expert, places in enumerate(order.split(counts)):
            if len(places):
                rows = places // top_k_index.shape[1]
                gate_up = times(hidden_states[rows], self.gate_up[expert], None)
                mixed = times(dispatch.gated(gate_up, self.activation), self.down[expert], None)
                result.index_add_(0, rows, mixed * top_k_weights.flatten()[places].unsqueeze(1).to(mixed.dtype))
        return result


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

    def forward(self, hidden_states: Tensor, *args: object, **kwargs: object) -> Tensor:
        return self.run(hidden_states.reshape(-1, hidden_states.shape[-1])).view(hidden_states.shape)

    def run(self, x: Tensor) -> Tensor:
        """x [T, hidden] to [T, hidden]."""
        before, after, before_mlp, after_mlp = self._norms
        y = self._run_attention(x if before is None else before(x))
        x = x + (y if after is None else after(y))
        y = self._run_mlp(x if before_mlp is None else before_mlp(x))
        return x + (y if after_mlp is None else after_mlp(y))


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
