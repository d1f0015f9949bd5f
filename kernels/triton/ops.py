"""The kernels for CUDA tensors, by the names and with the meaning of kernels.reference.

Activations are float16, bfloat16 or float32, and where the reference returns float32 these return the dtype of their
input. Norms, activations, scores and sums are float32 inside. `enable_fp_fusion` is said in every launch because
Triton's default for it changes from version to version.
"""

import torch.nn.functional as F
from torch import Tensor

from tightrope.kernels.triton.attention import attention
from tightrope.kernels.triton.low_rank import add_low_rank
from tightrope.kernels.triton.pointwise import gated, rms_norm, rotate
from tightrope.kernels.triton.store import store_kv

__all__ = ["add_low_rank", "attention", "gated", "linear", "rms_norm", "rotate", "store_kv"]


def linear(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """x [T, K] times weight [N, K] transposed, by cuBLAS in the weight's dtype: [T, N] of x's dtype.

    Sums are float32, but see dispatch.sum_in_float16.
    """
    return F.linear(x.to(weight.dtype), weight, None if bias is None else bias.to(weight.dtype)).to(x.dtype)
