"""A decoder layer of our own, and the stack of them."""

from collections.abc import Sequence
from functools import cached_property
from itertools import groupby, pairwise
from typing import Any, NamedTuple

from torch import Tensor, nn
from transformers.modeling_outputs import MoeModelOutputWithPast

from tightrope.backends.hf.modules.attention import Attention
from tightrope.backends.hf.modules.carry import Carry
from tightrope.backends.hf.modules.embedding import Embedding
from tightrope.backends.hf.modules.matrices import projection
from tightrope.backends.hf.modules.mlp import MLP, GatedMLP
from tightrope.backends.hf.modules.norm import RMSNorm
from tightrope.backends.hf.modules.step import CurrentStep
from tightrope.kernels import dispatch
from tightrope.kernels.forms.layer import DecoderLayer, LayerStack, LayerStep, Norm
from tightrope.kernels.forms.layout import LayerCache
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

    def run(self, x: Tensor) -> Tensor:
        """x [T, hidden] to [T, hidden]."""
        return self._alone.run(x)

    @cached_property
    def _alone(self) -> "Layers":
        return Layers((self,))

    @property
    def has_replaced_norm(self) -> bool:
        """Whether rows of the current step have another norm than ours, which no kernel of whole layers knows."""
        return any(norm.is_replaced for norm in self._all_norms)

    def operate(self, x: Tensor) -> Tensor:
        """The same, operation by operation."""
        before, after, before_mlp, after_mlp = self._norms
        y = self._run_attention(x if before is None else before(x))
        x = x + (y if after is None else after(y))
        y = self._run_mlp(x if before_mlp is None else before_mlp(x))
        return x + (y if after_mlp is None else after_mlp(y))

    @cached_property
    def whole(self) -> DecoderLayer | None:
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


class _Part(NamedTuple):
    """Neighbours that run alike, and what a kernel runs in their place."""

    layers: tuple[Layer, ...]
    stack: LayerStack | None


class Layers:
    """Layers on one device, one after the other; neighbours that a kernel runs whole are one call of it.

    Between two calls memory would rest for as long as a small layer takes. What a call is told is kept for the next
    step: put together anew for each, it would take as long as one of the layers.
    """

    def __init__(self, layers: tuple[Layer, ...]) -> None:
        self._layers = layers
        self._caches: Sequence[LayerCache] = ()
        self._apart: tuple[Layer, ...] = ()
        self._parts: tuple[_Part, ...] = ()  # Of steps over these caches in which these are run one by one.
        self._kinds: tuple[tuple[bool, str | None], ...] = ()  # Whether theirs is a window's step, and their rotation.

    def run(self, x: Tensor) -> Tensor:
        """x [T, hidden] to [T, hidden]."""
        if not self._layers:
            return x
        current = self._layers[0].attention.current
        self._cut(current)
        steps = [LayerStep(current.layout_of(is_windowed), current.table(rope)) for is_windowed, rope in self._kinds]
        for layers, stack in self._parts:
            done = None if stack is None else dispatch.decoder_layers(x, stack, steps, current.adapters)
            if done is None:
                for layer in layers:
                    x = layer.operate(x)
            else:
                x = done
        return x

    def _cut(self, current: CurrentStep) -> None:
        """Into parts, where those of the step before were others."""
        layers, caches = self._layers, current.caches
        apart = () if current.adapters is None else tuple(layer for layer in layers if layer.has_replaced_norm)
        if caches is self._caches and apart == self._apart:
            return
        self._caches, self._apart = caches, apart
        kinds = {layer: (caches[layer.attention.index].is_windowed, layer.attention.layer.rope) for layer in layers}
        self._kinds = tuple(dict.fromkeys(kinds.values()))
        parts = []
        for is_one_by_one, group in groupby(layers, lambda layer: layer.whole is None or layer in apart):
            some = tuple(group)
            wholes = tuple(layer.whole for layer in some if layer.whole is not None)
            mine = tuple(caches[layer.attention.index] for layer in some)
            numbers = tuple(self._kinds.index(kinds[layer]) for layer in some)
            parts.append(_Part(some, None if is_one_by_one else LayerStack(wholes, mine, numbers)))
        self._parts = tuple(parts)


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
        return MoeModelOutputWithPast(last_hidden_state=self.norm.run(self._run(input_ids[0])).unsqueeze(0))

    def run(self, token_ids: Tensor, rows: Tensor) -> Tensor:
        """Hidden states [n, hidden] of these rows [n] of token_ids [T], rising."""
        x = self._run(token_ids)
        if rows.shape == x.shape[:1]:  # All of them.
            return self.norm.run(x)
        return self.norm.run(x)[rows] if self.norm.replaced else self.norm.run(x[rows])

    def _run(self, token_ids: Tensor) -> Tensor:
        x = self.embedding.run(token_ids)
        for carry, layers in self._stages:
            x = layers.run(x if carry is None else carry.run(x))
        return x

    @cached_property
    def _stages(self) -> list[tuple[Carry | None, Layers]]:
        """Layers on one device each, behind what brings hidden states there."""
        borders = [0, *sorted(self.carries), len(self._layers)]
        return [
            (self.carries.get(begin) if number else None, Layers(self._layers[begin:end]))
            for number, (begin, end) in enumerate(pairwise(borders))
        ]
