"""What a model needs and what fits, of any format, from headers alone: the numbers that `serve` decides by."""

from dataclasses import dataclass
from pathlib import Path
from typing import Literal

LEAST_WINDOW = 1024  # Nobody is served fewer tokens unasked: a chat's first messages may be as long.
CACHE_NAMES: tuple[Literal["q8", "q4", "f16"], ...] = ("q8", "q4", "f16")  # They are shown side by side in this order.


@dataclass(frozen=True, slots=True)
class CacheChoice:
    """One way to store keys and values; `fitting` is the largest context, in tokens, that memory holds with it."""

    name: str
    token_bytes: float
    window_bytes: float  # Of the served window's tokens; less than all of them where layers slide.
    fitting: int


@dataclass(frozen=True, slots=True)
class Chosen:
    """What `serve` would take: cache type, capacity in tokens, most tokens of a step, and start-up lines."""

    cache: str
    cache_tokens: int
    cache_bytes: int
    notes: tuple[str, ...]
    step_tokens: int


@dataclass(frozen=True, slots=True)
class DeviceShare:
    """What one of several devices holds of a model, in bytes. layers: how many; None where each has a part of all."""

    device: str  # "cuda:0", "cpu"
    memory_bytes: int  # For all of it.
    weight_bytes: int
    cache_bytes: int
    workspace_bytes: int
    layers: int | None = None


@dataclass(frozen=True, slots=True)
class MemoryShares:
    """What a loaded model takes of all its devices, as it was planned, in bytes; all are 0 where nobody knows."""

    device: str = "cpu"  # Whose memory it is, as in Outline.
    memory_bytes: int = 0  # For all that lies there.
    weight_bytes: int = 0
    host_bytes: int = 0  # Of weights that stay in the machine's own memory beside a card.
    workspace_bytes: int = 0
    cache_bytes: int = 0
    run_bytes: int = 0  # Of the machine's memory, for chats that have left the cache.
    shares: tuple[DeviceShare, ...] = ()  # Of each device, or rank, where there are several.


UNKNOWN = MemoryShares()


@dataclass(frozen=True, slots=True)
class Outline:
    """A model in a memory. Sizes in bytes and tokens."""

    path: Path
    architecture: str
    format: str  # "gguf", "safetensors bfloat16", "EXL2, 4.65 bits per weight".
    memory_bytes: int  # For weights, cache and workspace together, on the device.
    weight_bytes: int  # On the device.
    workspace_bytes: int
    trained_len: int
    window: int  # As asked for, or as the model's files have it.
    caches: tuple[CacheChoice, ...]
    chosen: Chosen | None
    refusal: str | None  # Where nothing is chosen: one line with what would fit.
    device: str = "cpu"  # Whose memory it is: "cpu", "cuda".
    host_bytes: int = 0  # Of weights that stay in the machine's own memory beside a card.
    shares: tuple[DeviceShare, ...] = ()  # Of several devices, as `serve` would fill them.
    process_bytes: int = 0  # Of the machine's memory, for the processes of all ranks but the first, without the model.


def rank_name(rank: int, device_type: str) -> str:
    """The DeviceShare.device of one of several ranks, on a "cpu" or "cuda"."""
    return f"rank {rank} on the CPU" if device_type == "cpu" else f"cuda:{rank}"
