"""The walk: our modules take the places of those of the skeleton that compute what ours do."""

from collections.abc import Callable, Collection
from dataclasses import dataclass
from itertools import accumulate

from torch import Tensor, nn
from transformers import PreTrainedModel

from tightrope.backends.errors import BackendError
from tightrope.backends.hf.load import patterns
from tightrope.backends.hf.load.stages import Stages
from tightrope.backends.hf.load.trace import Attended, Trace, is_linear
from tightrope.backends.hf.load.weights import ExpertWeights, LinearWeights, WantedWeights
from tightrope.backends.hf.modules.attention import Attention, InterfaceAttention
from tightrope.backends.hf.modules.embedding import Embedding
from tightrope.backends.hf.modules.experts import Experts
from tightrope.backends.hf.modules.interface import answer_with
from tightrope.backends.hf.modules.layer import Layer, Stack
from tightrope.backends.hf.modules.linear import Linear
from tightrope.backends.hf.modules.mlp import MLP, GatedMLP, Unbatched
from tightrope.backends.hf.modules.norm import RMSNorm
from tightrope.backends.hf.modules.step import CurrentStep, LayerInfo
from tightrope.backends.tensor_parallel import ALONE, Heads, Share, Spans, columns, heads, joined, within


@dataclass(frozen=True, slots=True)
class Specialised:
    """What the walk left: the attention layers in order, the weights to load, and which classes were kept."""

    layers: tuple[LayerInfo, ...]
    wants: WantedWeights
    kept: tuple[str, ...]  # These classes attend, or stack layers, in their own way.


def specialise(
    model: PreTrainedModel, seen: Trace, ropes: Collection[str], stages: Stages, share: Share = ALONE
) -> Specialised:
    """Replace what we know of `model`'s modules. `ropes` are the keys of the tables that steps will have.

    Linears, tables and heads are those of `share`. Attention that keeps transformers' class has all heads on every
    rank. Raises BackendError when the model keeps more than keys and values, or attends in a way that our cache can't.
    """
    layers = _layers(model, seen)
    specialiser = _Specialiser(model, seen, layers, ropes, stages, share)
    specialiser.run()
    return Specialised(tuple(specialiser.layers), specialiser.wants, tuple(dict.fromkeys(specialiser.kept)))


def _layers(model: PreTrainedModel, seen: Trace) -> dict[nn.Module, Attended]:
    def refused(reason: str) -> BackendError:
        return BackendError(f"config.json: a model of model_type {model.config.model_type!r} can't be served: {reason}")

    if any(isinstance(module, nn.Conv1d) for module in model.modules()):
        raise refused("its layers keep a state beside keys and values")
    asked = {attended.module: attended for attended in seen.attended}
    count: int = model.config.get_text_config().num_hidden_layers
    if len(asked) != count or len(seen.attended) != count:
        raise refused(f"of its {count} layers {len(seen.attended)} attend through transformers' attention interface")
    return asked


class _Specialiser:
    """One walk over one model."""

    def __init__(
        self,
        model: PreTrainedModel,
        seen: Trace,
        asked: dict[nn.Module, Attended],
        ropes: Collection[str],
        stages: Stages,
        share: Share,
    ) -> None:
        self.model, self.seen, self.asked, self.ropes, self.stages = model, seen, asked, ropes, stages
        self.names = {module: name for name, module in model.named_modules()}
        self.index = {module: i for i, module in enumerate(asked)}
        self.share = share
        self.wants = WantedWeights()
        self.kept: list[str] = []
        self.layers = [self._layer(i, attended) for i, attended in enumerate(asked.values())]

    def run(self) -> None:
        self._children(self.model)

    def _layer(self, index: int, asked: Attended) -> LayerInfo:
        try:
            spec = patterns.scores(asked)
        except ValueError as reason:
            kind = self.model.config.model_type
            raise BackendError(f"config.json: a model of model_type {kind!r} can't be served: {reason}") from None
        found, num_kv_heads, head_dim = patterns.heads(asked, self.seen), asked.key.shape[1], asked.key.shape[3]
        if found is None:
            return LayerInfo(num_kv_heads, head_dim, spec, None)
        rope = self._rope(index) if found.is_rotated else None
        own = self._heads(asked)[self.share.rank]
        return LayerInfo(own.num_keys, head_dim, spec, rope, own.keys[0], num_kv_heads)

    def _heads(self, asked: Attended) -> tuple[Heads, ...]:
        """Each rank's."""
        return heads(asked.query.shape[1], asked.key.shape[1], self.share.count)

    def _rope(self, index: int) -> str:
        """The key of a layer's rotary table: its type where types rotate differently."""
        if "default" in self.ropes:
            return "default"
        layer_type: str = self.model.config.get_text_config().layer_types[index]
        return layer_type

    def _children(self, module: nn.Module) -> None:
        """Specialise what is below a module that keeps its class."""
        for name, child in module.named_children():
            module._modules[name] = self._specialised(child)
        prefix = f"{self.names[module]}." if self.names[module] else ""
        for name, parameter in module.named_parameters(recurse=False):
            self._as_it_is(prefix + name, parameter, _set_parameter(module, name))
        for name, buffer in module.named_buffers(recurse=False):
            if name not in module._non_persistent_buffers_set:
                self._as_it_is(prefix + name, buffer, _set(module, name))

    def _as_it_is(self, name: str, tensor: Tensor, deliver: Callable[[Tensor], None]) -> None:
        self.wants.as_it_is(name, tensor, deliver, self.stages.of(name).dtype)

    def _specialised(self, module: nn.Module) -> nn.Module:
        """Our module in place of one of the skeleton; itself where we know none, specialised below."""
        parts = self._linear, self._embedding, self._norm, self._gated, self._experts, self._attention
        for build in (*parts, self._block, self._stack):
            if (ours := build(module)) is not None:
                return ours
        self._children(module)
        return module

    def _current(self, module: nn.Module) -> CurrentStep:
        return self.stages.of(self.names[module])

    def _linear(self, module: nn.Module) -> Linear | None:
        return self._gathered(module) if is_linear(module) else None

    def _gathered(self, module: nn.Linear) -> Linear:
        """A linear whose outputs are whole on every rank, each of which computes some of them."""
        sizes = columns(module.out_features, self.share.count)
        return self._fused((module,), (self.share.columns(module.out_features),), sizes)

    def _fused(self, modules: tuple[nn.Linear, ...], own: Spans, sizes: tuple[int, ...] | None = None) -> Linear:
        """own: this rank's of all outputs, one module's after another's. sizes: see Linear."""
        ends = accumulate(module.out_features for module in modules)
        of_each = tuple(within(own, end - module.out_features, end) for module, end in zip(modules, ends, strict=True))
        rows = tuple((self.names[module], module.out_features) for module in modules)
        linear = Linear(rows, modules[0].in_features, self.stages.of(rows[0][0]), of_each, sizes)
        has_bias = modules[0].bias is not None
        setters = _set(linear, "weight"), _set(linear, "bias")
        self.wants.linears.append(LinearWeights(rows, modules[0].in_features, has_bias, *setters, of_each))
        return linear

    def _embedding(self, module: nn.Module) -> Embedding | None:
        scale = patterns.embedding_scale(module, self.seen)
        if scale is None or not isinstance(module, nn.Embedding):
            return None
        shape = module.num_embeddings, module.embedding_dim
        ours = Embedding(self.names[module], shape, scale, self._current(module), self.share)
        rows, setters = ((ours.name, module.num_embeddings),), (_set(ours, "weight"), _set(ours, "bias"))
        self.wants.tables.append(LinearWeights(rows, module.embedding_dim, False, *setters, ((ours.own,),)))
        return ours

    def _norm(self, module: nn.Module) -> RMSNorm | None:
        found = patterns.norm(module, self.seen)
        if found is None:
            return None
        ours = RMSNorm(self.names[module], found.size, found.eps, found.offset, self._current(module))
        ours.runs_by_row = self.seen.calls[module].hidden_states.dim() == 3
        rows = [(f"{ours.name}.weight", found.size)]
        self.wants.vector(rows, _set(ours, "weight"), found.offset)
        return ours

    def _gated(self, module: nn.Module) -> GatedMLP | None:
        found = patterns.gated(module, self.seen)
        if found is None:
            return None
        middle = found.down.in_features
        gate_up = self._fused(found.gate_up, self._twice(middle))
        return GatedMLP(gate_up, self._gathered(found.down), found.activation, columns(middle, self.share.count))

    def _twice(self, middle: int) -> Spans:
        """This rank's of `middle` outputs of a gate, and of as many that stand behind them."""
        begin, end = self.share.columns(middle)
        return joined(((begin, end), (middle + begin, middle + end)))

    def _experts(self, module: nn.Module) -> Experts | None:
        found = patterns.experts(module)
        if found is None:
            return None
        count, hidden, middle = found.num_experts, found.hidden_size, found.intermediate_size
        name = self.names[module]
        ours = Experts(name, (count, hidden, middle), found.activation, self._current(module), self.share)
        own = self._twice(middle), (self.share.columns(hidden),)
        gate_up, down = (("gate_proj", "up_proj"), ("w1", "w3")), (("down_proj",), ("w2",))
        self.wants.experts += [
            ExpertWeights(name, "gate_up_proj", gate_up, (count, 2 * middle, hidden), _set(ours, "gate_up"), own[0]),
            ExpertWeights(name, "down_proj", down, (count, hidden, middle), _set(ours, "down"), own[1]),
        ]
        return ours

    def _attention(self, module: nn.Module) -> nn.Module | None:
        if module not in self.asked:
            return None
        asked, index = self.asked[module], self.index[module]
        found, layer = patterns.heads(asked, self.seen), self.layers[index]
        if found is None:
            answer_with(module, InterfaceAttention(layer, index, self._current(module)))
            self.kept.append(type(module).__name__)
            return None
        q_norm, k_norm = (None if norm is None else self._norm(norm) for norm in (found.q_norm, found.k_norm))
        for ours in (q_norm, k_norm):
            if ours is not None:
                ours.runs_by_row = True
        by_rank, (_, num_heads, _, dim) = self._heads(asked), asked.query.shape
        own, starts = by_rank[self.share.rank], (0, num_heads, num_heads + asked.key.shape[1])
        spans = ((own.queries, starts[0]), (own.keys, starts[1]), (own.keys, starts[2]))
        qkv = self._fused(found.qkv, joined(((start + a) * dim, (start + b) * dim) for (a, b), start in spans))
        sizes = None if self.share == ALONE else tuple(one.num_queries * dim for one in by_rank)
        norms = q_norm, k_norm
        out = self._gathered(found.out)
        return Attention(qkv, out, norms, own.num_queries, layer, index, self._current(module), sizes)

    def _as_block(self, module: nn.Module) -> patterns.Block | None:
        """What a decoder layer is made of, if our layer can take its place."""
        found = patterns.block(module, self.seen)
        asked = self.asked.get(found.attention) if found is not None else None
        return found if asked is not None and patterns.heads(asked, self.seen) is not None else None

    def _block(self, module: nn.Module) -> Layer | None:
        found = self._as_block(module)
        if found is None:
            return None
        attention, mlp = self._specialised(found.attention), self._specialised(found.mlp)
        assert isinstance(attention, Attention)
        norms = (found.input_norm, found.post_attention_norm, found.pre_mlp_norm, found.post_mlp_norm)
        first, second, third, fourth = (None if norm is None else self._norm(norm) for norm in norms)
        return Layer(attention, mlp if isinstance(mlp, MLP) else Unbatched(mlp), (first, second, third, fourth))

    def _stack(self, module: nn.Module) -> Stack | None:
        found = patterns.stack(module, self.seen)
        if found is None or any(self._as_block(layer) is None for layer in found.layers):
            return None
        embedding, norm = self._embedding(found.embedding), self._norm(found.norm)
        if embedding is None or norm is None:
            return None
        layers = [layer for layer in map(self._block, found.layers) if layer is not None]
        return Stack(embedding, tuple(layers), norm)


def _set(module: nn.Module, name: str) -> Callable[[object], None]:
    return lambda value: setattr(module, name, value)


def _set_parameter(module: nn.Module, name: str) -> Callable[[Tensor], None]:
    return lambda tensor: setattr(module, name, nn.Parameter(tensor, requires_grad=False))
