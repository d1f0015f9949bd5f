"""What a decoder layer, or its mixture of experts, is made of, for kernels that run all of it at once."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import NamedTuple

from torch import Tensor

from tightrope.kernels.forms.column_stack import ColumnStack
from tightrope.kernels.forms.layout import AttentionSpec, LayerCache, RopeTable, StepLayout
from tightrope.kernels.forms.low_rank import LowRank
from tightrope.kernels.forms.quantized import Nf4Matrix, QuantizedMatrix
from tightrope.kernels.forms.ranks import LayerSplit


@dataclass(frozen=True, slots=True)
class Projection:
    """A plain weight [N, K], or quantized matrices whose outputs are side by side; and a bias [N] float32.

    `adapters` add to the outputs of the rows in their slot; they may come and go.
    """

    weight: Tensor | tuple[QuantizedMatrix | Nf4Matrix, ...]
    bias: Tensor | None
    adapters: Mapping[int, LowRank] = field(default_factory=dict)

    @property
    def num_outputs(self) -> int:
        if isinstance(self.weight, Tensor):
            return len(self.weight)
        return sum(matrix.num_outputs for matrix in self.weight)


@dataclass(frozen=True, slots=True)
class Norm:
    """See kernels.reference.rms_norm."""

    weight: Tensor  # float32
    eps: float


@dataclass(frozen=True, slots=True, eq=False, weakref_slot=True)
class DecoderLayer:
    """Attention and a gated MLP on the residual stream; see `Layer` of the torch engine for the order.

    qkv: queries, keys and values one below the other. norms: before and after attention, before and after the MLP.
    head_norms: of each head's queries and keys. num_heads: those of this rank.
    """

    qkv: Projection
    out: Projection
    gate_up: Projection
    down: Projection
    norms: tuple[Norm | None, Norm | None, Norm | None, Norm | None]
    head_norms: tuple[Norm | None, Norm | None]
    num_heads: int
    activation: str
    attention: AttentionSpec
    split: LayerSplit | None = None  # Over ranks; None: this process has all of the layer.

    @property
    def projections(self) -> tuple[Projection, ...]:
        """In the order in which kernels are told of their adapters."""
        return self.qkv, self.out, self.gate_up, self.down


@dataclass(frozen=True, slots=True, eq=False, weakref_slot=True)
class LayerStack:
    """Layers one after the other, each over its cache, the same in many steps.

    kinds: the number of each layer's among the steps that a kernel is given with them.
    """

    layers: tuple[DecoderLayer, ...]
    caches: tuple[LayerCache, ...]
    kinds: tuple[int, ...]


class LayerStep(NamedTuple):
    """A step for layers of a kind: where they store keys and values, and by what they rotate, None for nothing."""

    layout: StepLayout
    table: RopeTable | None


@dataclass(frozen=True, slots=True, eq=False, weakref_slot=True)
class GatedExperts:
    """The gated MLPs of a mixture, expert by expert; see kernels.reference.gated for what lies between the two."""

    gate_up: tuple[Projection, ...]
    down: tuple[Projection, ...]
    activation: str

    @property
    def projections(self) -> tuple[Projection, ...]:
        """In the order in which kernels are told of their adapters."""
        return tuple(part for pair in zip(self.gate_up, self.down, strict=True) for part in pair)


@dataclass(frozen=True, slots=True)
class StackedExperts:
    """The same on a card: plain weights [E, N, K], or stacks whose outputs are side by side."""

    gate_up: Tensor | tuple[ColumnStack, ...]
    down: Tensor | tuple[ColumnStack, ...]
    activation: str

    @property
    def num_experts(self) -> int:
        return len(self.down) if isinstance(self.down, Tensor) else self.down[0].num_experts
