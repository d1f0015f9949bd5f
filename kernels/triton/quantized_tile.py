"""How a Triton kernel reads quantized numbers: words in, numbers out, one row of each of several blocks at a time.

A code becomes a float by its bits: those of a byte of codes are shifted to the top of the mantissa, once for all of
them, and under an exponent of zero a field q bits above the byte's lowest is 1 + code / 2^(8 - q). Integer operations
run at half the rate of arithmetic and conversions at an eighth, and would be what a card waits for.
"""

import triton
import triton.language as tl
from triton.language import constexpr


@triton.jit
def load_share(shares: tl.tensor, share: tl.tensor) -> tuple[tl.tensor, tl.tensor, tl.tensor, tl.tensor]:
    """Width in bits, first block, end block and first word row of what a program reads."""
    at = shares + share * 4
    return tl.load(at), tl.load(at + 1), tl.load(at + 2), tl.load(at + 3)


@triton.jit
def spread(words: tl.tensor, FIELD: constexpr, WIDTH: constexpr) -> tl.tensor:
    """1 + code / 2^(8 - FIELD * WIDTH % 8), float32, of field FIELD of words."""
    left: constexpr = 15 - FIELD * WIDTH // 8 * 8  # takes the field's byte to bits 15 .. 23
    moved = words << left if left >= 0 else words >> -left
    mask: constexpr = ((1 << WIDTH) - 1) << (15 + FIELD * WIDTH % 8)
    return ((moved & mask) | 0x3F800000).to(tl.float32, bitcast=True)


@triton.jit
def book_number(words: tl.tensor, codebook: tl.tensor, FIELD: constexpr) -> tl.tensor:
    """The number, float32, that field FIELD of four bits of words stands for."""
    return tl.load(codebook + ((words >> (4 * FIELD)) & 15))


@triton.jit
def load_scale(
    scales: tl.tensor, group_max: tl.tensor, group: tl.tensor, columns: tl.tensor, mask: tl.tensor, stride: tl.tensor
) -> tl.tensor:
    """Scales [blocks, columns] float32 of groups [blocks]; zero where the mask is not."""
    scale = tl.load(scales + group[:, None].to(tl.int64) * stride + columns[None, :], mask=mask, other=0).to(tl.float32)
    if group_max is not None:
        scale = scale * scale * (1 / 256) * tl.load(group_max + group)[:, None]
    return scale


@triton.jit
def load_zero(
    zeros: tl.tensor, group: tl.tensor, columns: tl.tensor, mask: tl.tensor, stride: tl.tensor, BITS: constexpr
) -> tl.tensor:
    """Zero points float32 of groups [blocks]: [blocks, columns], or [1, 1] where one is for all."""
    if zeros is None:
        zero = tl.full((1, 1), 1 << (BITS - 1), tl.float32)
    else:
        at = zeros + group[:, None].to(tl.int64) * stride + columns[None, :]
        zero = tl.load(at, mask=mask, other=0).to(tl.float32)
    return zero
