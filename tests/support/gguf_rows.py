"""Rows of GGUF's blocks of random bytes, and the numbers that they stand for."""

import gguf
import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from tightrope.backends.files.gguf.tensor_types import TENSOR_TYPES

LAYOUTS = {kind.name: kind for kind in TENSOR_TYPES.values()}


def random_rows(kind: str, outputs: int, inputs: int, seed: int) -> NDArray[np.uint8]:
    """Rows of blocks [N, bytes] of which every byte is random, but for floats, which are of usual sizes."""
    form, random = LAYOUTS[kind], np.random.default_rng(seed)
    blocks = random.integers(0, 256, (outputs, inputs // form.values, form.num_bytes), dtype=np.uint8)
    for floats in form.floats:
        numbers = random.standard_normal((*blocks.shape[:2], 1)).astype(np.float16)
        blocks[..., floats.start : floats.start + 2] = numbers.view(np.uint8)
    return blocks.reshape(outputs, -1)


def meant(kind: str, rows: NDArray[np.uint8]) -> Tensor:
    """The weight [N, K] float32 by the `gguf` package."""
    return torch.from_numpy(gguf.quants.dequantize(rows, gguf.GGMLQuantizationType[kind]))
