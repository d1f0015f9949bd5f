"""transformers' own rotary modules, where they still run: one fixed set of frequencies, as resolved."""

from collections.abc import Mapping

import torch
from torch import nn

from tightrope.backends.rope.scaling import RopeSpec


def fix_rotary(model: nn.Module, rope: Mapping[str, RopeSpec]) -> None:
    """Give every rotary module the frequencies of the served window, whatever the length of a sequence.

    Cached keys that are rotated already can't follow a frequency that changes with the length (dynamic, longrope).
    """
    for module in model.modules():
        for name in [name for name, _ in module.named_buffers(recurse=False)]:
            if name == "inv_freq" or (name.endswith("_inv_freq") and "original" not in name):
                prefix = name.removesuffix("inv_freq")
                key = prefix.removesuffix("_")
                _fix(module, prefix, rope[key if key in rope else next(iter(rope))])


def _fix(module: nn.Module, prefix: str, spec: RopeSpec) -> None:
    inv_freq, factor = spec.frequencies(spec.window)
    buffer = torch.from_numpy(inv_freq)
    setattr(module, f"{prefix}inv_freq", buffer)
    setattr(module, f"{prefix}original_inv_freq", buffer.clone())
    setattr(module, f"{prefix}attention_scaling", factor)
    if isinstance(module.rope_type, dict):
        module.rope_type[prefix.removesuffix("_")] = "default"
    else:
        setattr(module, "rope_type", "default")  # noqa: B010 - a module takes only tensors; or it would change them by length
