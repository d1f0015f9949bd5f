"""What one rank has of a model: found, planned, loaded and cached, on its device. A single rank has all of it."""

import logging
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path

import torch
from torch import Tensor

from tightrope.backends import heap
from tightrope.backends.adapters import AdapterRoom
from tightrope.backends.errors import BackendError
from tightrope.backends.files.peft import room_for_adapters
from tightrope.backends.hf.adapters.rows import Adapters
from tightrope.backends.hf.load.inspection import Inspect
from tightrope.backends.hf.load.model import LoadedModel, build
from tightrope.backends.hf.modules.gather import Gather
from tightrope.backends.hf.modules.rotary import fix_rotary
from tightrope.backends.hf.modules.step import CurrentStep, scratch_bytes
from tightrope.backends.hf.plan import HFPlan, cache_dtype, check_layers, make_plan, memory_shares
from tightrope.backends.hf.room import Space, check_host, room_on
from tightrope.backends.hf.run.device_errors import failing_as
from tightrope.backends.hf.run.graphs import batch_size
from tightrope.backends.hf.run.later import StageInputs
from tightrope.backends.hf.run.warmup import Steps, warm_up
from tightrope.backends.hf.runner import ModelRunner
from tightrope.backends.hf.workspace import token_bytes
from tightrope.backends.planning import MemoryShares
from tightrope.backends.settings import ModelSettings
from tightrope.backends.sharing import Threads
from tightrope.backends.tensor_parallel import ALONE, Share
from tightrope.backends.threads import compute_threads
from tightrope.kernels import dispatch
from tightrope.kernels.forms.layout import PAGE, CacheFormat, LayerCache

log = logging.getLogger("tightrope.hf")

LARGE_BYTES = 1 << 20  # Weights, and a step's tensors for many tokens; below it what the heap keeps is little.


class Part:
    """A rank's part of a model, made step by step: found, planned, loaded, and given caches.

    Files and settings are checked, and the memory is planned, before anything large is allocated.
    """

    plan: HFPlan
    room: Space
    model: LoadedModel
    threads: Threads

    def __init__(
        self,
        path: Path,
        settings: ModelSettings,
        device: torch.device,
        inspect: Inspect,
        share: Share = ALONE,
        num_threads: int = 0,
    ) -> None:
        """Read all but the weights by `inspect`. num_threads: 0 is what the settings say. Raises BackendError."""
        self.settings, self.device, self.share = settings, device, share
        self.num_threads = num_threads or compute_threads(settings.threads)
        heap.map_from(LARGE_BYTES)
        self.found = inspect(path, settings, device, share)
        heap.trim()  # The plan begins with what headers and a tree without weights take.
        self.adapter_bytes = room_for_adapters(settings, self.found.blueprint.adapters.read)
        check_host(self.found.blueprint)

    @property
    def weight_bytes(self) -> int:
        """Of the machine's memory, where the model runs on its CPU: weights and the room for adapters."""
        return self.found.blueprint.weight_bytes + self.adapter_bytes

    @property
    def cache_bytes(self) -> int:
        """Of keys and values of a token in all layers."""
        return token_bytes(self.found.blueprint.local, cache_dtype(self.settings))

    def make_plan(self, settings: ModelSettings, host_bytes: int | None = None) -> HFPlan:
        """Plan with these settings, which are kept. host_bytes: see room_on. Raises BackendError, and DoesNotFit."""
        blueprint = self.found.blueprint
        self.settings = settings
        self.room = room_on(self.device, settings, blueprint, self.adapter_bytes, host_bytes=host_bytes)
        self.plan = make_plan(settings, blueprint.local, self.room)
        check_layers(self.plan, blueprint.layers)
        return self.plan

    @property
    def memory(self) -> MemoryShares:
        """What the plan takes of the device."""
        return memory_shares(self.plan, self.room, self.device.type, self.found.blueprint.host_bytes)

    def load(self, progress: Callable[[float], None], gather: Gather | None = None) -> None:
        """Read the weights, and set up what computes. gather: by which ranks meet. Raises BackendError."""
        settings, plan, blueprint, num_threads = self.settings, self.plan, self.found.blueprint, self.num_threads
        devices = [part.current.device for part in blueprint.parts]
        cards = [device for device in devices if device.type == "cuda"]
        for card in cards:
            torch.cuda.set_per_process_memory_fraction(settings.gpu_memory_fraction, card)
        if plan.rope:
            fix_rotary(blueprint.tree, plan.rope)  # The window may be shorter than the model's own.
        self.threads = Threads(num_threads, dispatch.set_threads)
        # Its threads wait for their next work by spinning for milliseconds, where ours are to compute.
        torch.set_num_threads(1)
        dispatch.set_threads(num_threads)
        dispatch.set_batch_invariant(is_wanted=settings.batch_invariant)
        if settings.matmul_sums == "float16" and cards:
            dispatch.sum_in_float16()
        with failing_as("loading the model", *devices):
            self.model = build(blueprint, progress, num_threads)
            self.model.current.gather = gather
            self.model.adapters.room = AdapterRoom(self.adapter_bytes)
            first, *self.later = [StageInputs.of(plan.rope, plan.window, device) for device in devices]
            self.rotary = first.rotary
        heap.trim()

    def load_adapters(self) -> list[str]:
        """Put those of the settings in place; returns what a person should know of them. Raises BackendError."""
        adapters, notes = self.model.adapters, list[str]()
        adapters.announce = notes.append
        with failing_as("loading adapters", self.device):
            for name, path in self.settings.adapters.items():
                adapters.prepare(name, Path(path).expanduser())()
        adapters.announce = log.warning
        return notes

    def warm_up(self, progress: Callable[[float], None]) -> None:
        """Compile what steps launch on a card. Raises BackendError."""
        devices = [current.device for current in self.model.currents]
        if any(device.type == "cuda" for device in devices):
            plan = self.plan
            steps = Steps.of(self.settings, self.model, self.rotary, plan.cache_dtype, plan.window, self.later)
            with failing_as("compiling kernels", *devices):
                warm_up(steps, self.threads.most, progress)

    @property
    def own(self) -> "Part":
        """What this process has of the model."""
        return self

    @property
    def adapters(self) -> Adapters:
        """Those beside the weights."""
        return self.model.adapters

    def close(self) -> None:
        """Nothing: what this process has goes with its last user."""

    def runner_over(self, caches: Sequence[LayerCache]) -> ModelRunner:
        """A runner of the model, without memory of its own for long prompts."""
        return ModelRunner(self.model, caches, self.rotary, self.threads, later=self.later)

    def cached_runner(self, factors: Sequence[Tensor]) -> ModelRunner:
        """A runner over the caches of the plan, whose keys are divided by `factors` where there are any.

        Raises BackendError.
        """
        caches = _allocate(self.plan, self.model)
        scratch, *others = (_scratch(self.plan, self.model, current) for current in self.model.currents)
        later = [replace(stage, scratch=other) for stage, other in zip(self.later, others, strict=True)]
        for cache, factor in zip(caches, factors, strict=bool(factors)):
            cache.key_factor.copy_(factor)
        return ModelRunner(self.model, caches, self.rotary, self.threads, scratch, later)

    @property
    def can_be_recorded(self) -> bool:
        """Whether steps can be CUDA graphs: on a GPU, and where no step waits to learn which experts were picked."""
        are_few = batch_size(self.settings.max_num_seqs) <= dispatch.MOST_STACKED
        picks_freely = not self.found.shape.num_experts or (are_few and self.model.picks_experts_on_card)
        return self.device.type == "cuda" and picks_freely and not self.later


def _allocate(plan: HFPlan, model: LoadedModel) -> list[LayerCache]:
    """All pages of all layers: on each card within one tensor, as one takes whole megabytes. Raises BackendError."""
    caches: list[LayerCache] = []
    formats = [CacheFormat(plan.cache_dtype, layer.num_kv_heads, layer.head_dim) for layer in model.layers]
    counts = [plan.num_window_pages if is_windowed else plan.num_pages for is_windowed in plan.windowed]
    try:
        sizes = [count * format.page_bytes for count, format in zip(counts, formats, strict=True)]
        memory: dict[torch.device, Tensor] = {}
        for device in dict.fromkeys(model.layer_devices):
            if device.type == "cuda":
                torch.cuda.empty_cache()  # What loading took beside the weights.
                own = [size for size, where in zip(sizes, model.layer_devices, strict=True) if where == device]
                memory[device] = torch.empty(sum(own), dtype=torch.uint8, device=device)
        for format, num_pages, size, is_windowed, device in zip(
            formats, counts, sizes, plan.windowed, model.layer_devices, strict=True
        ):
            place = None
            if device in memory:
                place, memory[device] = memory[device][:size], memory[device][size:]
            caches.append(LayerCache.allocate(format, num_pages, device, is_windowed=is_windowed, memory=place))
    except (RuntimeError, OSError) as error:
        raise BackendError(f"no memory for a cache of {plan.num_pages * PAGE} tokens: {error}") from error
    for cache in caches:
        cache.touch()
    return caches


def _scratch(plan: HFPlan, model: LoadedModel, current: CurrentStep) -> Tensor | None:
    """Where prompts expand a sequence's keys and values on a device; None where nothing is expanded."""
    size = scratch_bytes(model.layers, plan.window)
    if current.device.type != "cuda" or current.dtype == torch.float32 or not size:
        return None
    return torch.empty(size, dtype=torch.uint8, device=current.device)
