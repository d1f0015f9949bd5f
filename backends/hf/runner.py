"""ModelRunner: weights, caches and graphs on one device, or on several that layers lie on one after the other."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from functools import partial
from typing import Protocol

import torch
from torch import Tensor

from tightrope.backends.hf.load.model import LoadedModel
from tightrope.backends.hf.run.device_errors import failing_as
from tightrope.backends.hf.run.factors import factors_of
from tightrope.backends.hf.run.graphs import DecodeGraphs
from tightrope.backends.hf.run.later import StageInputs
from tightrope.backends.hf.run.rotary import RotarySets
from tightrope.backends.hf.run.steps import StepInputs
from tightrope.backends.sharing import Threads
from tightrope.kernels import dispatch
from tightrope.kernels.forms.layout import CacheFormat, LayerCache, RopeTable


class Runner(Protocol):
    """Runs a model's steps over caches: on one device, or on several at once. See ModelRunner."""

    @property
    def model(self) -> LoadedModel: ...

    @property
    def caches(self) -> Sequence[LayerCache]: ...

    @property
    def key_factors(self) -> list[Tensor]: ...

    @property
    def formats(self) -> list[CacheFormat]: ...

    def beside(self, caches: Sequence[LayerCache]) -> "Runner": ...

    def found_factors(self) -> list[Tensor]: ...

    def record_decode(self, max_num_seqs: int, max_model_len: int, progress: Callable[[float], None]) -> None: ...

    def run(self, inputs: StepInputs) -> Tensor: ...

    def copy_pages(self, copies: Sequence[tuple[int, int]], *, are_windowed: bool) -> None: ...

    def copy_slots(self, sources: Tensor, targets: Tensor) -> None: ...

    def read_pages(self, numbers: Sequence[int], window_numbers: Sequence[int]) -> Tensor: ...

    def write_pages(
        self,
        stored: Tensor,
        shape: tuple[int, int],
        pages: Sequence[tuple[int, int]],
        windows: Sequence[tuple[int, int]],
    ) -> None: ...


class ModelRunner:
    """Runs steps, one at a time, on the device that holds its model. The books of its cache are kept elsewhere.

    Runners may share a model: each stores into its own `caches`, one for each of the model's layers.
    """

    def __init__(
        self,
        model: LoadedModel,
        caches: Sequence[LayerCache],
        rotary: Mapping[str, RotarySets],
        threads: Threads,
        scratch: Tensor | None = None,
        later: Sequence[StageInputs] = (),
    ) -> None:
        """rotary: for each `rope` of the model's layers. threads: of steps.

        scratch: see StepLayout; without it steps of long prompts allocate some. later: what those of the model's
        devices have that follow the first.
        """
        assert len(caches) == len(model.layers)
        self.model, self.caches, self.rotary = model, tuple(caches), rotary
        self._threads, self._scratch, self._later = threads, scratch, tuple(later)
        assert len(later) == len(model.currents) - 1
        self._forward = partial(model.forward, self.caches)
        self._graphs: DecodeGraphs | None = None

    def beside(self, caches: Sequence[LayerCache]) -> "ModelRunner":
        """Another runner of the same weights, with other caches; it records no graphs."""
        return ModelRunner(self.model, caches, self.rotary, self._threads, self._scratch, self._later)

    def found_factors(self) -> list[Tensor]:
        """Each layer's key factors [Hkv, D] by what its f16 cache holds: see factors_of."""
        return factors_of(self.model.layers, self.caches)

    @property
    def key_factors(self) -> list[Tensor]:
        """By what the keys of each cache are divided, of all of a layer's KV heads, [Hkv, D] float32 on the CPU."""
        return [cache.key_factor.cpu() for cache in self.caches]

    @property
    def formats(self) -> list[CacheFormat]:
        """Those of the caches, of all of a layer's KV heads."""
        return [cache.format for cache in self.caches]

    def record_decode(self, max_num_seqs: int, max_model_len: int, progress: Callable[[float], None]) -> None:
        """Record steps of one token a sequence as CUDA graphs, to be played back from now on: see DecodeGraphs."""
        has_windows = any(cache.is_windowed for cache in self.caches)
        device = self.model.device
        self._graphs = DecodeGraphs(self._forward, max_num_seqs, max_model_len, device, has_windows=has_windows)
        with failing_as("recording decode steps", device), torch.inference_mode():
            self._graphs.record_all(self._tables_of, self.model.embedded, progress)

    def _tables_of(self, num_seqs: int) -> dict[str, RopeTable]:
        """By what each kind of layer rotates sequences that have just begun."""
        return {name: rotary.table([1] * num_seqs) for name, rotary in self.rotary.items()}

    def run(self, inputs: StepInputs) -> Tensor:
        """Logits [n, V] float32 of the wanted rows, on the CPU and the caller's own. Stores keys and values.

        V is larger where an adapter of the step knows more tokens. Raises BackendError for a step that failed:
        OutOfMemory for want of memory, DeviceLost if no other can run.
        """
        num_tokens, device = len(inputs.token_ids), self.model.device
        if any(current.device.type == "cpu" for current in self.model.currents):
            self._threads.settle()
        with failing_as(f"a step of {num_tokens} tokens", *self._devices), torch.inference_mode():
            embedded = self.model.embedded(inputs.token_ids)
            token_ids, rows = inputs.token_ids.to(device), inputs.rows.to(self.model.currents[-1].device)
            layout, tables = inputs.layout.to(device), self.tables(inputs)
            if self._scratch is not None:
                layout = replace(layout, scratch=self._scratch)
            adapters = None if inputs.adapters is None else inputs.adapters.to(device)
            later = [stage.step(inputs.layout, inputs.rope_lengths, inputs.adapters) for stage in self._later]
            if self._graphs is None:
                logits = self._forward(token_ids, layout, tables, rows, adapters, embedded, later).cpu()
            else:
                logits = self._graphs.forward(token_ids, layout, tables, rows, adapters, embedded).cpu()
        return torch.from_numpy(logits.numpy())  # A tensor of inference mode couldn't be changed by the sampler.

    @property
    def _devices(self) -> list[torch.device]:
        return [current.device for current in self.model.currents]

    def tables(self, inputs: StepInputs) -> dict[str, RopeTable]:
        """By what each kind of layer rotates in this step."""
        return {name: rotary.table(inputs.rope_lengths) for name, rotary in self.rotary.items()}

    def copy_pages(self, copies: Sequence[tuple[int, int]], *, are_windowed: bool) -> None:
        """Copy pages, (source, target), in every layer of that kind; no page is both, or a target twice.

        Raises BackendError; the same copies may then be made again.
        """
        with failing_as(f"copying {len(copies)} pages", *self._devices), torch.inference_mode():
            numbers = self._on_each(*torch.tensor(copies).t().contiguous())
            for cache in self.caches:
                if cache.is_windowed is are_windowed:
                    cache.copy_pages(*numbers[cache.key_codes.device])

    def read_pages(self, numbers: Sequence[int], window_numbers: Sequence[int]) -> Tensor:
        """A copy of pages in the host's memory, uint8: layer by layer, of windowed layers that of window pages.

        Raises BackendError.
        """
        with failing_as(f"reading {len(numbers)} pages", *self._devices), torch.inference_mode():
            rows = self._on_each(torch.tensor(numbers), torch.tensor(window_numbers))
            parts = [
                tensor[rows[tensor.device][cache.is_windowed]].reshape(-1).view(torch.uint8).cpu()
                for cache in self.caches
                for tensor in cache.stored
                if len(rows[tensor.device][cache.is_windowed])
            ]
            return torch.cat(parts)

    def write_pages(
        self,
        stored: Tensor,
        shape: tuple[int, int],
        pages: Sequence[tuple[int, int]],
        windows: Sequence[tuple[int, int]],
    ) -> None:
        """Write some of the pages that `read_pages` gave: (row there, number here), and window pages likewise.

        shape: so many pages and window pages were read. Raises BackendError.
        """
        with failing_as(f"writing {len(pages)} pages", *self._devices), torch.inference_mode():
            begin = 0
            for cache in self.caches:
                count, placed = (shape[1], windows) if cache.is_windowed else (shape[0], pages)
                for tensor in cache.stored:
                    size = count * tensor[0].numel() * tensor.element_size()
                    block = stored[begin : begin + size].view(tensor.dtype).view(count, *tensor.shape[1:])
                    begin += size
                    if placed and size:
                        rows, numbers = torch.tensor(placed).t()
                        tensor[numbers.to(tensor.device)] = block[rows].to(tensor.device)
            assert begin == len(stored), "pages of another cache"

    def copy_slots(self, sources: Tensor, targets: Tensor) -> None:
        """Copy tokens from slots [n] int64 to slots [n] in every layer without a window; none is both.

        Raises BackendError; the same copies may then be made again.
        """
        with failing_as(f"copying {len(sources)} tokens", *self._devices), torch.inference_mode():
            slots = self._on_each(sources, targets)
            for cache in self.caches:
                if not cache.is_windowed:
                    dispatch.copy_slots(cache, *slots[cache.key_codes.device])

    def _on_each(self, *numbers: Tensor) -> dict[torch.device, tuple[Tensor, ...]]:
        """The same on each device that has caches."""
        devices = {cache.key_codes.device for cache in self.caches}
        return {device: tuple(some.to(device) for some in numbers) for device in devices}
