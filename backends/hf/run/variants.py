"""Other caches on the same weights: what a type of cache changes can be measured without loading a model twice."""

from collections.abc import Sequence
from dataclasses import replace
from functools import cached_property
from typing import Protocol

from torch import Tensor

from tightrope.backends.hf.run.calibrate import set_key_factors
from tightrope.backends.hf.run.graphs import DecodeGraphs
from tightrope.backends.hf.run.steps import StepBuilder
from tightrope.backends.hf.runner import LoadedModel
from tightrope.backends.protocol import Backend, Chunk, KVCache, KVUsage
from tightrope.kernels.forms.layout import CacheDtype, LayerCache


class Base(Backend, Protocol):
    """A backend whose weights and books are shared: one layer cache in `caches` for each layer of `model`."""

    model: LoadedModel
    caches: list[LayerCache]
    graphs: DecodeGraphs | None
    steps: StepBuilder


class CacheVariants:
    """Backends that share the weights and the books of one."""

    def __init__(self, base: Base) -> None:
        self._base = base

    @property
    def num_layers(self) -> int:
        return len(self._base.model.layers)

    def variant(self, dtypes: Sequence[CacheDtype], *, has_factors: bool = True) -> "CacheVariant":
        """A backend whose layers are cached so, [num_layers]. Without factors keys are quantized as they are."""
        caches = self._allocate(dtypes)
        if has_factors:
            for cache, factor in zip(caches, self._key_factors, strict=True):
                if cache.format.dtype != "f16":
                    cache.key_factor.copy_(factor)
        return CacheVariant(self._base, caches)

    @cached_property
    def _key_factors(self) -> list[Tensor]:
        """Each layer's [Hkv, D] float32, from one run of the calibration's text."""
        base, holders = self._base, self._allocate(["q8"] * self.num_layers, num_pages=1)
        set_key_factors(base.model, holders, base.tokenizer, base.steps, base.capabilities.max_step_tokens)
        base.model.attach(base.caches)
        return [cache.key_factor for cache in holders]

    def _allocate(self, dtypes: Sequence[CacheDtype], num_pages: int | None = None) -> list[LayerCache]:
        """Caches like those of the base, or of `num_pages` each."""
        return [
            LayerCache.allocate(
                replace(cache.format, dtype=dtype),
                num_pages or len(cache.key_codes),
                self._base.model.device,
                is_windowed=cache.is_windowed,
            )
            for dtype, cache in zip(dtypes, self._base.caches, strict=True)
        ]


class CacheVariant:
    """A Backend that runs what its base has just run, with its own keys and values.

    The base must have opened the sequences, without reuse, and not yet have committed the step.
    """

    def __init__(self, base: Base, caches: Sequence[LayerCache]) -> None:
        self.caches = tuple(caches)
        self._base = base
        self.tokenizer, self.capabilities, self.adapters = base.tokenizer, base.capabilities, base.adapters
        self.kv: KVCache = _BaseBooks(base.kv)
        kinds = sorted({cache.format.dtype for cache in caches})
        self.card = replace(
            base.card,
            cache_dtype=kinds[0] if len(kinds) == 1 else "mixed",
            cache_token_bytes=float(sum(cache.format.bytes_per_token for cache in caches)),
        )

    def forward(self, chunks: Sequence[Chunk]) -> Tensor:
        """See Backend."""
        graphs, self._base.graphs = self._base.graphs, None  # they are of the base's caches
        self._base.model.attach(self.caches)
        try:
            return self._base.forward(chunks)
        finally:
            self._base.model.attach(self._base.caches)
            self._base.graphs = graphs

    def close(self) -> None:
        """The base owns the weights; the caches go with this object."""


class _BaseBooks:
    """A KVCache that leaves all bookkeeping to another."""

    def __init__(self, base: KVCache) -> None:
        self._base = base

    def open(
        self, seq_id: int, token_ids: Sequence[int], namespace: str, *, reuse: bool = True, reproducible: bool = False
    ) -> int:
        return 0

    def reserve(self, seq_id: int, num_tokens: int) -> bool:
        return True

    def commit(self, seq_id: int, token_ids: Sequence[int]) -> None:
        return

    def truncate(self, seq_id: int, num_tokens: int) -> None:
        return

    def close(self, seq_id: int, *, keep: bool) -> None:
        return

    def usage(self) -> KVUsage:
        return self._base.usage()
