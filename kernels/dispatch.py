"""Every kernel by name: the fastest implementation that this machine has for the tensors at hand.

Signatures and meaning are those of kernels.reference.
"""

import numpy as np
from numpy.typing import NDArray
from torch import Tensor

from tightrope.kernels.reference import attention, gated, linear, rms_norm, rotate, store_kv

__all__ = [
    "UNSETTLED",
    "attention",
    "describe",
    "draw",
    "gated",
    "linear",
    "rms_norm",
    "rotate",
    "set_threads",
    "store_kv",
]


def set_threads(num_threads: int) -> None:
    """Compute with `num_threads` threads on a CPU, the caller's included."""


def describe() -> str:
    """What runs the kernels, for the start-up lines."""
    return "torch reference"


UNSETTLED = -2  # a row that `draw` leaves to the sampler's own steps


def draw(logits: Tensor, params: NDArray[np.float64]) -> NDArray[np.int64] | None:
    """A token drawn from each row, -1 where nothing can be drawn, UNSETTLED where that can't be told cheaply.

    logits [B, V] float32; params [B, 6]: temperature > 0, a number in [0, 1), top_k, top_p, min_p, typical_p. None when
    there is no native kernel for these logits.
    """
    return None
