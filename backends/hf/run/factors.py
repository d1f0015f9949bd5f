"""Key factors of the keys that caches hold."""

from collections.abc import Sequence

import torch
from torch import Tensor

from tightrope.backends.hf.modules.step import LayerInfo
from tightrope.kernels.forms.layout import LayerCache

# No factor is smaller than this share of its head's largest, as a channel may lie still in a text alone.
SMALLEST = 1e-3


def factors_of(layers: Sequence[LayerInfo], caches: Sequence[LayerCache]) -> list[Tensor]:
    """Each layer's key factors [Hkv, D] float32: the largest magnitude of each channel among the keys in its f16 cache.

    Ones where it caches rotated keys. Places that hold nothing are zero.
    """
    return [
        cache.key_factor if layer.rope is None else _factors(cache.key_codes)
        for layer, cache in zip(layers, caches, strict=True)
    ]


def _factors(keys: Tensor) -> Tensor:
    """Factors [Hkv, D] float32 of cached keys [P, Hkv, PAGE, D]."""
    if not len(keys):
        return torch.ones(keys.shape[1], keys.shape[3], device=keys.device)
    largest = keys.float().abs().amax((0, 2))
    floor = SMALLEST * largest.amax(-1, keepdim=True)
    return torch.where(floor > 0, largest.maximum(floor), 1.0)
