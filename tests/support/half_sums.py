"""Products whose sums are float16, as a card's matrix units make them, emulated on a CPU.

An instruction multiplies float16 numbers exactly and adds blocks of BLOCK products to a sum, which it rounds to
float16, to nearest. Source: Fasi, Higham, Mikaitis and Pranesh 2021, "Numerical behavior of NVIDIA tensor cores",
PeerJ Computer Science 7:e330; an A100 takes 8 products at a time.
"""

import torch
from torch import Tensor

BLOCK = 8
HALF_UNIT = 2.0**-11  # A number rounded to float16 is off by at most this share of itself, if it isn't tiny.


def half_sums(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """x [T, K] times weight [N, K] transposed, both rounded to float16 first: [T, N] float32 numbers of float16."""
    x, weight = x.half().float(), weight.half().float()
    total = x.new_zeros(len(x), len(weight))
    for begin in range(0, x.shape[1], BLOCK):
        block = slice(begin, begin + BLOCK)
        total = torch.addmm(total, x[:, block], weight[:, block].t()).half().float()
    return total if bias is None else total + bias


def largest_error(x: Tensor, weight: Tensor) -> Tensor:
    """A bound [T, N] on what half_sums is off: each rounding is of a sum that is no larger than that of magnitudes."""
    blocks = -(-x.shape[1] // BLOCK)
    magnitudes = x.half().double().abs() @ weight.half().double().abs().t()
    return blocks * HALF_UNIT * (1 + HALF_UNIT) ** blocks * magnitudes + blocks * 2.0**-25
