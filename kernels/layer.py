"""What a decoder layer is made of, for kernels that run all of it at once."""

from dataclasses import dataclass

from torch import Tensor

from tightrope.kernels.layout import AttentionSpec
from tightrope.kernels.quantized import Nf4Matrix, QuantizedMatrix


@dataclass(frozen=True, slots=True)
class Projection:
    """A plain weight [N, K], or quantised matrices whose outputs are side by side; and a bias [N] float32."""

    weight: Tensor | tuple[QuantizedMatrix | Nf4Matrix, ...]
    bias: Tensor | None


@dataclass(frozen=True, slots=True)
class Norm:
    """See kernels.reference.rms_norm."""

    weight: Tensor  # float32
    eps: float


@dataclass(frozen=True, slots=True, eq=False, weakref_slot=True)
class DecoderLayer:
    """Attention and a gated MLP on the residual stream; see backends.hf.organs.Layer for the order.

    qkv: queries, keys and values one below the other. norms: before and after attention, before and after the MLP.
    head_norms: of each head's queries and keys.
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
