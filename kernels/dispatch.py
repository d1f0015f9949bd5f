"""Every kernel by name: the fastest implementation that this machine has for the tensors at hand.

Signatures and meaning are those of kernels.reference.
"""

from tightrope.kernels.reference import attention, gated, linear, rms_norm, rotate, store_kv

__all__ = ["attention", "describe", "gated", "linear", "rms_norm", "rotate", "set_threads", "store_kv"]


def set_threads(num_threads: int) -> None:
    """Compute with `num_threads` threads on a CPU, the caller's included."""


def describe() -> str:
    """What runs the kernels, for the start-up lines."""
    return "torch reference"
