"""Which quantized format a model folder is in, if any, told by its tensors; and what it takes in memory.

Tensors say what there is; config.json, or the older settings files beside it, say how zero points were stored. EXL2
files written before exllamav2 0.0.16 have nothing but tensors.
"""

import os
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from math import prod
from pathlib import Path
from typing import Any

import torch

from tightrope.backends.errors import BackendError
from tightrope.backends.files.json import read_object
from tightrope.backends.files.safetensors import Checkpoint
from tightrope.backends.quant.awq import Awq
from tightrope.backends.quant.exl2 import Exl2
from tightrope.backends.quant.format import CPU, Format, Packed
from tightrope.backends.quant.gptq import Gptq
from tightrope.backends.quant.nf4 import Nf4
from tightrope.backends.quant.stated import method_of

# The first that tells a tensor is the format of all.
FORMATS: tuple[type[Format], ...] = (
    Exl2,
    Awq,
    Gptq,
    Nf4,
)
# What people call them who name the format that a model should be in.
ASKED: Mapping[str, type[Format]] = {"exl2": Exl2, "awq": Awq, "gptq": Gptq, "bitsandbytes-nf4": Nf4}
MAX_FILE = 16 << 20  # It is in bytes.
# The names are AutoGPTQ's, old AutoAWQ's and auto-round's.
SETTINGS_FILES = ("quantize_config.json", "quant_config.json", "quantization_config.json")
AT_LOAD = ("bitsandbytes",)  # These methods may also mean: quantize plain weights while loading.


@dataclass(frozen=True)
class Quantization:
    """The format of a checkpoint, and the linears that are in it."""

    format: Format
    checkpoint: Checkpoint

    @cached_property
    def modules(self) -> frozenset[str]:
        """The quantized linears, as the files call them."""
        marks = tuple(f".{part}" for part in self.format.parts)
        return frozenset(
            name.removesuffix(mark)
            for name, entry in self.checkpoint.tensors.items()
            for mark in marks
            if name.endswith(mark) and self.format.holds(entry)
        )

    def packed(self, module: str, device: torch.device = CPU) -> Packed:
        return Packed(self.checkpoint, module, device)

    def tensors(self, module: str) -> tuple[str, ...]:
        """The names of a linear's tensors, but for its bias."""
        packed = self.packed(module)
        return tuple(packed.name(part) for part in (*self.format.parts, *self.format.optional) if packed.has(part))

    @cached_property
    def bits_per_weight(self) -> float:
        """Of quantized linears, everything stored for them counted, by the shapes of their tensors."""
        names = [name for module in self.modules for name in self.tensors(module)]
        num_bytes = sum(self.checkpoint.tensors[name].num_bytes for name in names)
        return 8 * num_bytes / max(1, sum(prod(self.format.size(self.packed(module))) for module in self.modules))

    @property
    def memory_bytes(self) -> int:
        """Bytes of all weights once loaded, by headers."""
        packed = {name for module in self.modules for name in self.tensors(module)}
        plain = sum(entry.num_bytes for name, entry in self.checkpoint.tensors.items() if name not in packed)
        return plain + sum(sum(self.format.tensor_bytes(self.packed(module))) for module in self.modules)

    def describe(self) -> str:
        if not self.modules:
            return f"{self.format.name}, plain weights"
        return f"{self.format.name}, {self.bits_per_weight:.2f} bits per weight"


def find_quantization(folder: Path, config: Mapping[str, Any], checkpoint: Checkpoint) -> Quantization | None:
    """What `checkpoint` of `folder` is quantized in; None for plain weights. config is that of config.json.

    Raises BackendError for a format that can't be read.
    """
    path, settings = _settings(folder, config)
    for tensor in checkpoint.tensors:
        for kind in FORMATS:
            if kind.tells(checkpoint, tensor):
                return Quantization(kind.of(path, settings), checkpoint)
    if settings and method_of(settings) not in AT_LOAD and not _may_be_left_over(settings):
        raise _not_read(path, settings)
    return None


def check_asked(folder: Path, asked: str | None, found: Quantization | None) -> None:
    """Raise BackendError for weights in another format than was asked for, plain ones among them."""
    if asked is None or (found is not None and isinstance(found.format, ASKED[asked])):
        return
    what = "plain, and nothing is quantized while loading" if found is None else found.describe()
    raise BackendError(f"--quantize {asked}: the weights in {folder} are {what}; leave it out")


def stated_and_not_found(folder: Path, config: Mapping[str, Any]) -> BackendError | None:
    """What to say of plain weights of which some are missing, where the settings speak of packed ones."""
    path, settings = _settings(folder, config)
    return _not_read(path, settings) if settings and method_of(settings) not in AT_LOAD else None


def note_on_plain(folder: Path, config: Mapping[str, Any]) -> str | None:
    """A start-up line for plain weights, all of them there, where the settings speak of packed ones."""
    path, settings = _settings(folder, config)
    if not settings or method_of(settings) in AT_LOAD:
        return None
    return f"weights: plain, though {path.name} speaks of {settings.get('quant_method')!s:.40}; served as they are"


def _may_be_left_over(settings: Mapping[str, Any]) -> bool:
    """Whether plain weights beside these settings are what the model computes with.

    They are where somebody expanded them and kept the settings, and where nothing but a cache was quantized. Other
    methods quantize while they load, or the activations, so that plain weights alone are another model.
    """
    method = method_of(settings)
    if method == "compressed-tensors":
        return not settings.get("config_groups")
    if method == "modelopt":
        return not settings.get("quant_algo")
    return any(method in kind.methods for kind in FORMATS)


def _not_read(path: Path, settings: Mapping[str, Any]) -> BackendError:
    return BackendError(
        f"{path}: weights are said to be quantized in format {settings.get('quant_method') or 'unknown'}, and no "
        f"tensor is in one that can be read: {', '.join(kind.name for kind in FORMATS)} (AutoRound's too)"
    )


def weight_bytes(checkpoint: Checkpoint, quantization: Quantization | None, *, is_tied: bool) -> int:
    """Bytes of all weights once loaded, by headers. is_tied: a head like the embedding is a copy, kept once."""
    total = checkpoint.weight_bytes if quantization is None else quantization.memory_bytes
    ends = ("lm_head.weight", "embed_tokens.weight")
    found = [entry for name, entry in checkpoint.tensors.items() if name.endswith(ends)]
    if is_tied and len(found) == 2 and (found[0].dtype, found[0].shape) == (found[1].dtype, found[1].shape):
        total -= found[0].num_bytes
    return total


def describe_format(dtype: str, quantization: Quantization | None) -> str:
    """The format in words; dtype is what config.json calls that of plain weights."""
    return f"safetensors {dtype}" if quantization is None else quantization.describe()


def _settings(folder: Path, config: Mapping[str, Any]) -> tuple[Path, Mapping[str, Any]]:
    """The model's words on its quantization, and the file that has them; empty where there are none."""
    block = config.get("quantization_config")
    if isinstance(block, dict):
        return folder / "config.json", block
    for path in (folder / file for file in SETTINGS_FILES):
        if os.path.lexists(path):
            return path, read_object(path, MAX_FILE)
    return folder / "config.json", {}
