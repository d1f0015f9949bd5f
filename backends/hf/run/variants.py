"""Other caches on the same weights: what a type of cache changes can be measured without loading a model twice."""

from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import cached_property

from torch import Tensor

from tightrope.backends.hf.run.calibrate import key_factors
from tightrope.backends.hf.run.steps import StepBuilder, StepInputs
from tightrope.backends.hf.runner import Runner
from tightrope.backends.holdings import Holdings
from tightrope.backends.protocol import Backend, Chunk, KVCache, KVUsage
from tightrope.backends.reuse import Accepts, Reuse, Wanted, always
from tightrope.kernels.forms.layout import CacheDtype, LayerCache

Inputs = Callable[[Sequence[Chunk]], StepInputs]


class CacheVariants:
    """Backends that share the weights and the books of one, each with a runner of its own."""

    def __init__(self, base: Backend, runner: Runner, steps: StepBuilder, inputs: Inputs) -> None:
        """runner, steps: those of `base`. inputs: its books' view of a step that it has just run."""
        self._base, self._runner, self._steps, self._inputs = base, runner, steps, inputs

    @property
    def num_layers(self) -> int:
        return len(self._runner.caches)

    def variant(self, dtypes: Sequence[CacheDtype], *, has_factors: bool = True) -> "CacheVariant":
        """A backend whose layers are cached so, [num_layers]. Without factors keys are quantized as they are."""
        return CacheVariant(self._base, self.runner(dtypes, has_factors=has_factors), self._inputs)

    def runner(self, dtypes: Sequence[CacheDtype], *, has_factors: bool = True) -> Runner:
        """The runner of such a backend."""
        first = self._runner
        caches = [
            LayerCache.allocate(
                replace(cache.format, dtype=dtype),
                len(cache.key_codes),
                cache.key_codes.device,
                is_windowed=cache.is_windowed,
            )
            for dtype, cache in zip(dtypes, first.caches, strict=True)
        ]
        if has_factors:
            for cache, factor in zip(caches, self._key_factors, strict=True):
                if cache.format.dtype != "f16":
                    cache.key_factor.copy_(factor)
        return first.beside(caches)

    @cached_property
    def _key_factors(self) -> list[Tensor]:
        """Each layer's [Hkv, D] float32, from one run of the calibration's text."""
        base = self._base
        first = self._runner
        return key_factors(first.beside, first.model, base.tokenizer, self._steps, base.capabilities.max_step_tokens)


class CacheVariant:
    """A Backend that runs what its base has just run, with its own keys and values.

    The base must have opened the sequences, without reuse, and not yet have committed the step.
    """

    def __init__(self, base: Backend, runner: Runner, inputs: Inputs) -> None:
        self.runner, self.inputs = runner, inputs
        self.tokenizer, self.capabilities, self.adapters = base.tokenizer, base.capabilities, base.adapters
        self.kv: KVCache = _BaseBooks(base.kv)
        kinds = sorted({cache.format.dtype for cache in runner.caches})
        self.card = replace(
            base.card,
            cache_dtype=kinds[0] if len(kinds) == 1 else "mixed",
            cache_token_bytes=float(sum(cache.format.bytes_per_token for cache in runner.caches)),
        )

    def forward(self, chunks: Sequence[Chunk]) -> Tensor:
        """See Backend."""
        return self.runner.run(self.inputs(chunks))

    def close(self) -> None:
        """The base owns the weights; the caches go with this object."""


class _BaseBooks:
    """A KVCache that leaves all bookkeeping to another."""

    def __init__(self, base: KVCache) -> None:
        self._base = base

    def open(
        self,
        seq_id: int,
        token_ids: Sequence[int],
        namespace: str,
        *,
        reuse: Wanted = "exact",
        accepts: Accepts = always,
        reproducible: bool = False,
        steady: bool = False,
    ) -> Reuse:
        return Reuse()

    def fetch(self, seq_id: int, token_ids: Sequence[int], namespace: str, *, reuse: Wanted = "exact") -> bool:
        return True

    def reserve(self, seq_id: int, num_tokens: int) -> bool:
        return True

    def commit(self, seq_id: int, start: int, token_ids: Sequence[int]) -> None:
        return

    def truncate(self, seq_id: int, num_tokens: int) -> None:
        return

    def close(self, seq_id: int, *, keep: bool) -> None:
        return

    def leave(self, token_ids: Sequence[int], namespace: str) -> None:
        return

    def report_to(self, holdings: Holdings) -> None:
        return

    def usage(self) -> KVUsage:
        return self._base.usage()

    def check_integrity(self) -> None:
        self._base.check_integrity()
