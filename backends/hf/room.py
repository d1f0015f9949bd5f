"""What memory there is for cache and workspace beside a model's weights, and how many tokens it holds."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Protocol

import torch

from tightrope.backends.allocator import held_bytes
from tightrope.backends.errors import DoesNotFit
from tightrope.backends.files.hf_config import ModelShape
from tightrope.backends.hf.cache.window_pages import KEPT_WINDOWS, most_needed
from tightrope.backends.hf.host_workspace import HostWorkspace
from tightrope.backends.hf.load.arena import arena_bytes
from tightrope.backends.hf.load.blueprint import Blueprint
from tightrope.backends.hf.workspace import CardWorkspace
from tightrope.backends.memory import GIB, CardMemory, does_not_fit, free_for, free_memory, grossed_up, spare_bytes
from tightrope.backends.settings import ModelSettings
from tightrope.kernels.forms.layout import PAGE, CacheDtype, CacheFormat

MOST_TOKENS = 1 << 28  # The longest window that is believed where tokens beyond the layers' windows take no room.
JOINED = ("GPTQ", "AWQ")  # Of these formats gate and up have one order of inputs, and are one matrix.
MOST_RUNS = 3  # EXL2 sorts the groups of a matrix by width, and mixes two or three widths.
LEAST_STEP = 256  # On a card steps shrink to so many tokens where memory is short: it takes longer to read a prompt.


@dataclass(frozen=True, slots=True)
class CacheSizes:
    """What pages of the cache take. Layers with a sliding window stop at `most_window_pages`."""

    full_bytes: int  # For a token in the layers that see everything.
    windowed_bytes: int  # For a token in those with a window.
    window_tokens: int | None
    most_window_pages: int

    @classmethod
    def of(cls, settings: ModelSettings, shape: ModelShape, dtype: CacheDtype, step_tokens: int) -> "CacheSizes":
        layer_bytes = CacheFormat(dtype, shape.num_kv_heads, shape.head_dim).bytes_per_token
        windows = [window for window in shape.windows if window is not None]
        if not windows:
            return cls(shape.num_layers * layer_bytes, 0, None, 0)
        most = most_needed(max(windows), settings.max_num_seqs + KEPT_WINDOWS, step_tokens)
        return cls((shape.num_layers - len(windows)) * layer_bytes, len(windows) * layer_bytes, max(windows), most)

    def bytes_of(self, num_pages: int) -> int:
        return PAGE * (num_pages * self.full_bytes + min(num_pages, self.most_window_pages) * self.windowed_bytes)


class Workspace(Protocol):
    """What work takes beside weights and cache."""

    def num_bytes(self, tokens: int, window: int) -> int:
        """For steps of up to `tokens`, in sequences of up to `window`."""

    def load_bytes(self, tokens: int) -> int:
        """Before there is a cache, for such steps."""


@dataclass(frozen=True, slots=True)
class Asked:
    """A cache of so many tokens, for steps of `step` tokens in sequences of up to `window`."""

    settings: ModelSettings
    shape: ModelShape
    dtype: CacheDtype
    tokens: int
    step: int
    window: int


class Space(Protocol):
    """Memory beside a model's weights, of one device or of several; see Room."""

    @property
    def usable_bytes(self) -> int: ...

    @property
    def weight_bytes(self) -> int: ...

    @property
    def workspace(self) -> Workspace: ...

    @property
    def step_tokens(self) -> tuple[int, ...]: ...

    @property
    def run_reserve_bytes(self) -> int: ...

    @property
    def host_bytes(self) -> int | None: ...

    def fitting(
        self, settings: ModelSettings, shape: ModelShape, dtype: CacheDtype, step: int, window: int = 0
    ) -> int: ...

    def largest_window(self, settings: ModelSettings, shape: ModelShape, dtype: CacheDtype) -> int: ...

    def host_left(self, device_bytes: int) -> int: ...

    def refusal(self, asked: Asked, smaller: Sequence[str], most_tokens: int) -> DoesNotFit: ...


@dataclass(frozen=True, slots=True)
class Room:
    """Memory of a device, what takes of it, and how many tokens a step may have, the fastest first."""

    usable_bytes: int  # For weights, cache and workspace together.
    weight_bytes: int
    workspace: Workspace
    step_tokens: tuple[int, ...]
    run_reserve_bytes: int = 0  # Of the machine's memory these are kept for runs beside the cache.
    # What is free of the machine's memory beside a card; None: the device is the machine, and `usable_bytes` says it.
    host_bytes: int | None = None

    @property
    def spare_bytes(self) -> int:
        """What is left beside the weights; less than zero where these alone don't fit."""
        return self.usable_bytes - self.weight_bytes

    def fitting(self, settings: ModelSettings, shape: ModelShape, dtype: CacheDtype, step: int, window: int = 0) -> int:
        """The most pages beside steps of `step` tokens and sequences of up to `window`; 0: of as many as all pages."""
        sizes = CacheSizes.of(settings, shape, dtype, step)
        if self.workspace.load_bytes(step) > self.spare_bytes:
            return 0

        def fits(pages: int) -> bool:
            workspace_bytes = self.workspace.num_bytes(step, window or pages * PAGE)
            return sizes.bytes_of(pages) + workspace_bytes <= self.spare_bytes

        return most_pages(fits)

    def host_left(self, device_bytes: int) -> int:
        """Bytes of the machine's memory for runs, where cache and workspace take `device_bytes` of the device's."""
        if self.host_bytes is not None:
            return self.host_bytes
        return self.spare_bytes - device_bytes + self.run_reserve_bytes

    def largest_window(self, settings: ModelSettings, shape: ModelShape, dtype: CacheDtype) -> int:
        """The largest window, in tokens, that there is room for; whole pages."""
        return self.fitting(settings, shape, dtype, self.step_tokens[-1]) * PAGE

    def refusal(self, asked: Asked, smaller: Sequence[str], most_tokens: int) -> DoesNotFit:
        """The line for a cache that has no room. smaller: types that would hold it; this one holds most_tokens."""
        taken = self.weight_bytes + self.workspace.num_bytes(asked.step, asked.window)
        need = CacheSizes.of(asked.settings, asked.shape, asked.dtype, asked.step).bytes_of(-(-asked.tokens // PAGE))
        return does_not_fit(asked.tokens, asked.dtype, need, self.usable_bytes - taken, taken, smaller, most_tokens)


def most_pages(fits: Callable[[int], bool]) -> int:
    """The most pages that fit, where fewer always do as well; 0 where one doesn't."""
    low, high = 0, MOST_TOKENS // PAGE
    while low < high:
        pages = (low + high + 1) // 2
        low, high = (pages, high) if fits(pages) else (low, pages - 1)
    return low


def room_on(
    device: torch.device,
    settings: ModelSettings,
    blueprint: Blueprint,
    adapter_bytes: int,
    *,
    host_bytes: int | None = None,
    card: CardMemory | None = None,
) -> Room:
    """That of the device that a model is drawn for.

    host_bytes: of the machine's memory, all of which may be used; None is what is free. card: None is what its driver
    says, with our context open there.
    """
    if device.type == "cpu":
        free_bytes = free_for(settings) if host_bytes is None else grossed_up(host_bytes)
        return host_room(
            settings, host_workspace(settings, blueprint), blueprint.weight_bytes + adapter_bytes, free_bytes
        )
    return card_room(settings, blueprint, adapter_bytes, card or CardMemory(*torch.cuda.mem_get_info(device)))


def host_room(settings: ModelSettings, workspace: HostWorkspace, weight_bytes: int, free_bytes: int) -> Room:
    """That of the machine's own memory, of which `free_bytes` are free."""
    reserve = settings.cache.host_reserve_bytes
    usable = spare_bytes(reserve, free_bytes)
    return Room(usable, weight_bytes, workspace, (settings.step_tokens_on("cpu"),), reserve)


def host_workspace(settings: ModelSettings, blueprint: Blueprint) -> HostWorkspace:
    """What steps of a model, or of a rank's part of it, take on a CPU."""
    return HostWorkspace(
        settings,
        blueprint.shape,
        blueprint.share,
        attends_by_heads=blueprint.attends_by_heads,
        is_kept=bool(blueprint.kept),
        is_ours=blueprint.whole is not None,
    )


def card_room(settings: ModelSettings, blueprint: Blueprint, adapter_bytes: int, memory: CardMemory) -> Room:
    """That of a card. The weights are counted as torch's allocator takes them from it."""
    workspace = card_workspace(settings, blueprint)
    weights = held_bytes([arena_bytes(blueprint.block_sizes)]) + held_bytes(blueprint.other_sizes) + adapter_bytes
    usable = memory.usable_bytes(settings.gpu_memory_fraction)
    host_bytes = spare_bytes(blueprint.host_bytes, free_for(settings))
    return Room(usable, weights, workspace, card_steps(settings), settings.cache.host_reserve_bytes, host_bytes)


def card_steps(settings: ModelSettings) -> tuple[int, ...]:
    """How many tokens a card's steps may have, the fastest first."""
    steps = [settings.step_tokens_on("cuda")]
    while steps[-1] > LEAST_STEP:
        steps.append(max(LEAST_STEP, steps[-1] // 2))
    return tuple(steps)


def card_workspace(settings: ModelSettings, blueprint: Blueprint) -> CardWorkspace:
    """What steps of a model take on a card; a rank is planned with as much as one that holds all of it."""
    quantization = blueprint.quantization
    return CardWorkspace(
        settings,
        blueprint.shape,
        itemsize=blueprint.activation_dtype.itemsize,
        is_quantized=quantization is not None,
        is_head_quantized=not blueprint.has_plain_head,
        is_whole=blueprint.is_exllama,
        is_joined=quantization is not None and quantization.format.name in JOINED,
        num_runs=MOST_RUNS if quantization is not None and quantization.format.name == "EXL2" else 1,
        has_adapters=bool(settings.adapters or settings.adapter_folder),
        is_kept=bool(blueprint.kept),
        is_ours=blueprint.whole is not None,
    )


def check_host(blueprint: Blueprint, host_bytes: int | None = None) -> None:
    """Raise DoesNotFit where the weights that stay in the machine's own memory are more than is free there."""
    free_bytes = free_memory() if host_bytes is None else host_bytes
    if blueprint.host_bytes > free_bytes:
        raise DoesNotFit(
            f"the embedding takes {blueprint.host_bytes / GIB:.2f} GiB of the machine's own memory, and "
            f"{free_bytes / GIB:.2f} GiB is free there: free some memory"
        )
