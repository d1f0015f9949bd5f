"""How wide a step's tensors are on a device: what a rank computes, and what of it is gathered from all ranks."""

from dataclasses import dataclass

from tightrope.backends.files.hf_config import ModelShape
from tightrope.backends.tensor_parallel import ALONE, Share, local_shape


@dataclass(frozen=True, slots=True)
class Width:
    """Columns of something that a step makes: this rank's `own`, of `whole` that all ranks make."""

    own: int
    whole: int

    @property
    def is_split(self) -> bool:
        return self.own < self.whole


@dataclass(frozen=True, slots=True)
class Widths:
    """Those of a model's step. Heads and their keys are as many as a rank has; hidden states come in whole."""

    num_ranks: int
    heads: int  # Of queries.
    qkv: int  # Columns of queries, keys and values.
    attended: Width
    out: Width  # Of linears that give hidden states.
    middle: Width  # Between the two products of an MLP,
    expert: Width  # and of an expert.
    logits: Width

    @classmethod
    def of(cls, shape: ModelShape, share: Share = ALONE, *, attends_by_heads: bool = True) -> "Widths":
        """Of a rank. attends_by_heads: see local_shape."""
        own = local_shape(shape, share, attends_by_heads=attends_by_heads)

        def width(total: int) -> Width:
            begin, end = share.columns(total)
            return Width(end - begin, total)

        return cls(
            share.count,
            own.num_heads,
            (own.num_heads + 2 * own.num_kv_heads) * shape.head_dim,
            Width(own.num_heads * shape.head_dim, shape.num_heads * shape.head_dim),
            width(shape.hidden_size),
            width(shape.intermediate_size),
            width(shape.expert_size),
            width(shape.vocab_size),
        )
