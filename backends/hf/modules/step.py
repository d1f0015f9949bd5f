"""The step that runs: what all modules of a model read, and what each attention layer is."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from tightrope.backends.hf.modules.gather import Gather
from tightrope.kernels.forms.expanded import expanded_cache_bytes, expands_cache
from tightrope.kernels.forms.layout import AttentionSpec, LayerCache, RopeTable, StepLayout
from tightrope.kernels.forms.low_rank import AdapterRows


@dataclass(frozen=True, slots=True)
class LayerInfo:
    """One attention layer. `rope` is its key in a step's tables; None: nothing is rotated when keys are read.

    A rank keeps `num_kv_heads` of all the layer's, from `first_kv_head` on; ranks may keep the same ones.
    """

    num_kv_heads: int
    head_dim: int
    spec: AttentionSpec
    rope: str | None
    first_kv_head: int = 0
    all_kv_heads: int = 0  # 0: no more than this rank's.


def scratch_bytes(layers: Sequence[LayerInfo], num_tokens: int) -> int:
    """What StepLayout.scratch needs on a card for sequences of up to `num_tokens`; one layer after another uses it."""
    expanded = [layer for layer in layers if expands_cache(layer.spec, layer.head_dim)]
    return max((expanded_cache_bytes(num_tokens, layer.num_kv_heads, layer.head_dim) for layer in expanded), default=0)


@dataclass(frozen=True, slots=True)
class StepOn:
    """A step as one device has it."""

    layout: StepLayout
    tables: Mapping[str, RopeTable]  # For each `rope` of the model's layers.
    adapters: AdapterRows | None = None  # None when no row of the step uses any.


@dataclass(slots=True)
class CurrentStep:
    """The step that a model runs, and the caches that it stores into, one a layer; shared by the model's modules.

    Modules on a device share one: a model whose layers lie on several has as many. `dtype` is that of hidden states.
    """

    device: torch.device = field(default_factory=lambda: torch.device("cpu"))
    dtype: torch.dtype = torch.float32

    layout: StepLayout | None = None
    tables: Mapping[str, RopeTable] = field(default_factory=dict)
    caches: Sequence[LayerCache] = ()
    embedded: Tensor | None = None  # [T, hidden]: rows of a table in the machine's own memory.
    adapters: AdapterRows | None = None  # None when no row of the step uses any.
    head_adapters: AdapterRows | None = None  # Those of the rows whose logits are wanted.
    gather: Gather | None = None  # None where one rank holds all of the model. Steps leave it as it is.

    def begin(self, caches: Sequence[LayerCache], step: StepOn) -> None:
        """Have the modules run this step, which stores into `caches`."""
        self.caches, self.layout, self.tables, self.adapters = caches, step.layout, step.tables, step.adapters
        self.embedded = self.head_adapters = None

    def gathered(self, local: Tensor, sizes: tuple[int, ...] | None) -> Tensor:
        """Columns [T, sum(sizes)] of all ranks where this one has `local`; itself where every rank has all (None)."""
        if sizes is None:
            return local
        assert self.gather is not None, "a rank is told how to gather before its first step"
        return self.gather(local, sizes)

    def layer(self, index: int) -> tuple[StepLayout, LayerCache]:
        """The step as a layer has it, and the layer's cache."""
        cache = self.caches[index]
        return self.layout_of(cache.is_windowed), cache

    def layout_of(self, is_windowed: bool) -> StepLayout:
        """The step as layers with a window have it, or those without."""
        layout = None if self.layout is None else self.layout.windowed if is_windowed else self.layout
        assert layout is not None
        return layout

    def table(self, rope: str | None) -> RopeTable | None:
        """By what layers of this rotation rotate; None for nothing."""
        return None if rope is None else self.tables[rope]
