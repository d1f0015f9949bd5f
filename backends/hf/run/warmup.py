"""Every kernel that a model's steps launch, compiled before the first of them.

A few steps launch them all between them, each with as many rows as another way to multiply them takes: on a card that
runs them, and on the meta device, which stands for one, by their sizes alone.
"""

import logging
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from tightrope.backends.errors import BackendError
from tightrope.backends.hf.load.model import LoadedModel
from tightrope.backends.hf.modules.carry import launching_on
from tightrope.backends.hf.modules.experts import Experts
from tightrope.backends.hf.modules.linear import Linear
from tightrope.backends.hf.modules.step import CurrentStep
from tightrope.backends.hf.run.later import StageInputs
from tightrope.backends.hf.run.rotary import RotarySets
from tightrope.backends.settings import ModelSettings
from tightrope.backends.tensor_parallel import size_of
from tightrope.kernels import dispatch
from tightrope.kernels.forms.layout import PAGE, CacheDtype, CacheFormat, LayerCache, StepLayout
from tightrope.kernels.forms.low_rank import AdapterRows, LowRank, LowRankPart

log = logging.getLogger("tightrope.hf")


@dataclass(frozen=True, slots=True)
class Steps:
    """What steps of a model can be like."""

    model: LoadedModel
    rotary: Mapping[str, RotarySets]  # For each `rope` of the model's layers.
    cache_dtype: CacheDtype
    window: int  # Tokens of the longest sequence.
    step_tokens: int
    has_adapters: bool  # Rows may use adapters, be they loaded already or later.
    later: tuple[StageInputs, ...] = ()  # Of the model's devices behind the first.

    @classmethod
    def of(
        cls,
        settings: ModelSettings,
        model: LoadedModel,
        rotary: Mapping[str, RotarySets],
        dtype: CacheDtype,
        window: int,
        later: Sequence[StageInputs] = (),
    ) -> "Steps":
        has_adapters = bool(settings.adapters) or settings.adapter_folder is not None
        return cls(model, rotary, dtype, window, settings.step_tokens_on("cuda"), has_adapters, tuple(later))

    def run(self) -> None:
        """Run a step of each kind. Nothing is stored, and what comes out means nothing."""
        with torch.inference_mode():
            caches = self._caches(self.cache_dtype)
            for context in sorted({1, self.window}):  # A short one is read at once, a long one in stretches.
                self._run(caches, 1, context)
            counts = self._row_counts()
            for num_tokens in counts:
                self._run(caches, num_tokens, num_tokens)
            if self.cache_dtype != "f16":
                self._run(self._caches("f16"), counts[-1], counts[-1])  # As the calibration does.
            if self.has_adapters:
                self._run_experts()
                self._run_adapters()

    def _caches(self, dtype: CacheDtype) -> list[LayerCache]:
        """A page for each layer, in which nothing is stored; those of layers on the CPU hold a step."""
        formats = [CacheFormat(dtype, layer.num_kv_heads, layer.head_dim) for layer in self.model.layers]
        most = -(-max(self._row_counts()) // PAGE)
        return [
            LayerCache.allocate(format, most if device.type == "cpu" else 1, device)
            for format, device in zip(formats, self.model.layer_devices, strict=True)
        ]

    def _row_counts(self) -> list[int]:
        """Tokens of prompts that take all ways of multiplying them."""
        most = min(self.step_tokens, self.window)
        if any(isinstance(module, Experts) for module in self.model.tree.modules()):
            most = min(most, dispatch.MOST_STACKED)  # A longer step would read from the card which experts it needs.
        return [count for count in dispatch.fewest_rows() if 1 < count <= most]

    def _run(self, caches: Sequence[LayerCache], num_tokens: int, context: int) -> None:
        """A step of so many tokens, launched as one for a context of so many."""
        model = self.model
        token_ids = torch.zeros(num_tokens, dtype=torch.int64, device=model.device)
        tables = {name: rotary.table([1]) for name, rotary in self.rotary.items()}
        layout, *others = (
            replace(_layout(num_tokens, current.device), max_context_len=context) for current in model.currents
        )
        later = [stage.step(other, [1], None) for stage, other in zip(self.later, others, strict=True)]
        rows = torch.arange(num_tokens, device=model.currents[-1].device)
        model.forward(caches, token_ids, layout, tables, rows, later=later)

    def _run_experts(self) -> None:
        """Each expert by itself, as in steps with adapters."""
        for module in self.model.tree.modules():
            if isinstance(module, Experts) and module.current.device.type != "cpu":
                for expert in range(len(module.down)):
                    for count in dispatch.fewest_rows():
                        with launching_on(module.current.device):
                            module.first(expert, _rows(count, module.hidden, module.current), None)
                            module.second(expert, _rows(count, module.middle, module.current), None)

    def _run_adapters(self) -> None:
        """An adapter on each linear, of a rank that makes no difference."""
        for module in self.model.tree.modules():
            if isinstance(module, Linear) and module.current.device.type != "cpu":
                device, dtype = module.current.device, module.current.dtype
                slots = torch.zeros(1, dtype=torch.int32, device=device)
                rows = AdapterRows(slots, torch.zeros(1, device=device), (0,))
                parts, first = [], 0
                for _, _, own in module.parts:
                    sizes = module.num_inputs, size_of(own)
                    down, up = (torch.zeros(1, n, dtype=dtype, device=device) for n in sizes)
                    parts.append(LowRankPart(first, down, up))
                    first += size_of(own)
                x, out = _rows(1, module.num_inputs, module.current), _rows(1, first, module.current)
                with launching_on(device):
                    dispatch.add_low_rank(out, x, {0: LowRank(tuple(parts))}, rows)


def _layout(num_tokens: int, device: torch.device) -> StepLayout:
    """A sequence with so many tokens; on a card none of them has a place in the cache, nor any token before them."""
    numbers = torch.arange(num_tokens, dtype=torch.int32)
    is_stored = device.type == "cpu"
    none = torch.zeros_like(numbers)
    layout = StepLayout(
        query_starts=torch.tensor([0, num_tokens], dtype=torch.int32),
        context_lens=torch.tensor([num_tokens if is_stored else 0], dtype=torch.int32),
        block_tables=numbers[: -(-num_tokens // PAGE)].unsqueeze(0) * is_stored,
        slots=numbers.long() if is_stored else torch.full((num_tokens,), -1),
        positions=numbers if is_stored else none,
        sequence_of=none,
        max_query_len=num_tokens,
        max_context_len=num_tokens,
        lengths=((num_tokens, num_tokens),),
    )
    return layout.to(device)


def _rows(count: int, width: int, current: CurrentStep) -> Tensor:
    return torch.zeros(count, width, dtype=current.dtype, device=current.device)


def warm_up(steps: Steps, num_threads: int, progress: Callable[[float], None]) -> None:
    """Compile all kernels, or load them from the disk, and run each once, as libraries set themselves up then.

    Raises BackendError.
    """
    launches = gather(steps)
    began_s = time.monotonic()
    num_compiled = compile_kernels(launches, num_threads, progress)
    if num_compiled:
        took_s = time.monotonic() - began_s
        log.info("kernels compiled: count=%d seconds=%.0f folder=%s", num_compiled, took_s, dispatch.compiled_folder())
    steps.run()


def gather(steps: Steps) -> dict[str, Any]:  # Any: Triton's kernels
    """The kernels that steps launch and that this process has not compiled, as dispatch.compile_all takes them."""
    with dispatch.gathered() as launches:
        steps.run()
    return launches


def compile_kernels(launches: dict[str, Any], num_threads: int, progress: Callable[[float], None]) -> int:
    """Compile what was gathered; returns how many were not on disk. Raises BackendError for one that can't be."""
    try:
        return dispatch.compile_all(launches, num_threads, progress)
    except RuntimeError as error:
        raise BackendError(str(error)) from error
