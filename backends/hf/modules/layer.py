"""A decoder layer of our own, and the stack of them."""

from collections.abc import Sequence
from functools import cached_property
from itertools import groupby
from typing import Any

from torch import Tensor, nn
from transformers.modeling_outputs import MoeModelOutputWithPast

from tightrope.backends.hf.modules.attention import Attention
from tightrope.backends.hf.modules.carry import Carry
from tightrope.backends.hf.modules.embedding import Embedding
from tightrope.backends.hf.modules.matrices import projection
from tightrope.backends.hf.modules.mlp import MLP, GatedMLP
from tightrope.backends.hf.modules.norm import RMSNorm
from tightrope.kernels import dispatch
from tightrope.kernels.forms.layer import DecoderLayer, LayerRun, Norm
from tightrope.kernels.forms.ranks import LayerSplit


class Layer(nn.Module):
    """A decoder layer: attention and MLP on the normed residual stream, perhaps normed again before they join it."""

    def __init__(
        self,
        attention: Attention,
        mlp: MLP,
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

    def now(self) -> LayerRun | None:
        """The layer in the current step, as a kernel runs all of it; None where its operations run one by one."""
        whole = self._whole
        if whole is None or any(norm.is_replaced for norm in self._all_norms):
            return None
        step, cache, table = self.attention.now()
        return LayerRun(whole, cache, step, table)

    def run(self, x: Tensor) -> Tensor:
        """x [T, hidden] to [T, hidden]."""
        return _through((self,), x)

    def operate(self, x: Tensor) -> Tensor:
        """The same, operation by operation."""
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
        split, gather = None, attention.current.gather
        if gather is not None:
            if gather.shared is None:
                return None
            split = LayerSplit(gather.shared, attention.sizes, attention.out.sizes, mlp.sizes, mlp.down.sizes)
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
            split,
        )


def _of(norm: RMSNorm | None) -> Norm | None:
    return None if norm is None else Norm(norm.weight, norm.eps)


def _through(layers: Sequence[Layer], x: Tensor) -> Tensor:
    """x [T, hidden] through layers in their order; neighbours that a kernel runs whole are one call of it.

    Between two calls memory would rest for as long as a small layer takes.
    """
    for _, group in groupby([(layer, layer.now()) for layer in layers], lambda part: part[1] is None):
        some = tuple(group)
        runs = [run for _, run in some if run is not None]
        done = dispatch.decoder_layers(x, runs, some[0][0].attention.current.adapters) if runs else None
        if done is None:
            for layer, _ in some:
                x = layer.operate(x)
        else:
            x = done
    return x


class Stack(nn.Module):
    """The base model: embedding, layers, last norm.

    `carries` bring hidden states to where the layer of that number is, or what follows the last of them.
    """

    def __init__(self, embedding: Embedding, layers: tuple[Layer, ...], norm: RMSNorm) -> None:
        super().__init__()
        self.embedding, self.layers, self.norm = embedding, nn.ModuleList(layers), norm
        self._layers = layers
        self.carries: dict[int, Carry] = {}

    def forward(self, input_ids: Tensor, **kwargs: Any) -> MoeModelOutputWithPast:  # noqa: ANN401 - transformers' own
        x = self.embedding.run(input_ids[0])
        begin = 0
        for number, carry in sorted(self.carries.items()):
            x = carry.run(_through(self._layers[begin:number], x))
            begin = number
        x = _through(self._layers[begin:], x)
        return MoeModelOutputWithPast(last_hidden_state=self.norm.run(x).unsqueeze(0))
