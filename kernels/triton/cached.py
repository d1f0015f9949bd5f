"""How a Triton kernel reads cached keys and values: codes and scales in, numbers out, for a tile of tokens.

Products don't care in which order dimensions are summed, so a part of a head is read as two planes, each half of its
dimensions, split as the codes lie: the even and the odd ones of q8, whose codes are loaded two at a time as an int16,
and the low and the high nibbles of q4. A loaded element then yields one number for either plane where it is, with no
exchange between threads. Small integers become float16 by their bits: 0x6400 | n is 1024 + n. Conversions by
instruction run at an eighth of the rate of arithmetic and would be what decode waits for.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.language import constexpr

from tightrope.kernels.forms.layout import GROUP, PAGE
from tightrope.kernels.triton.target import IS_COMPILED

_GROUP = constexpr(GROUP)
_HALF_GROUP = constexpr(GROUP // 2)
_PAGE = constexpr(PAGE)
BITS = {"f16": 16, "q8": 8, "q4": 4}  # Kernels are told this of a cache's dtype.


def words(codes: Tensor) -> Tensor:
    """Codes as the kernels load them: those of q8 two at a time."""
    return codes.view(torch.int16) if codes.dtype == torch.int8 else codes


def padded(num_dims: int) -> int:
    """A power of two whose half products accept, not less than `num_dims`."""
    return max(32, int(triton.next_power_of_2(num_dims)))


# PTX for both planes of codes: of two q8 pairs that are in a register, and of four q4 pairs. All numbers of a register
# are made at once: their codes are moved under the exponent of 1024, and what that adds is taken away.
BYTES_ASM = constexpr("""{
    .reg .b32 t, minus; mov.b32 minus, 0xE480E480; shr.u32 t, $2, 8;
    lop3.b32 $0, $2, 0xFF00FF, 0x64806480, 0x6A; lop3.b32 $1, t, 0xFF00FF, 0x64806480, 0x6A;
    add.f16x2 $0, $0, minus; add.f16x2 $1, $1, minus;
}""")
NIBBLES_ASM = constexpr("""{
    .reg .b32 t, u, minus; mov.b32 minus, 0xE408E408;
    and.b32 t, $4, 0x0F0F0F0F; shr.u32 u, $4, 4; and.b32 u, u, 0x0F0F0F0F;
    prmt.b32 $0, t, 0x64646464, 0x4140; prmt.b32 $1, t, 0x64646464, 0x4342;
    prmt.b32 $2, u, 0x64646464, 0x4140; prmt.b32 $3, u, 0x64646464, 0x4342;
    add.f16x2 $0, $0, minus; add.f16x2 $1, $1, minus; add.f16x2 $2, $2, minus; add.f16x2 $3, $3, minus;
}""")


@triton.jit
def plane_dims(PLANE: constexpr, PADDED: constexpr, BITS: constexpr, IS_WHOLE: constexpr) -> tl.tensor:
    """Dimensions [1, PADDED / 2] int32 of plane 0 or 1 of a part, counted from the part's first.

    IS_WHOLE: the part begins with a group and takes whole groups, or the head's last.
    """
    dim = tl.arange(0, PADDED // 2)
    if BITS == 8:
        dim = 2 * dim + PLANE
    elif BITS == 4 and IS_WHOLE:
        dim = dim // _HALF_GROUP * _GROUP + dim % _HALF_GROUP + _HALF_GROUP * PLANE
    else:
        dim = dim + PLANE * (PADDED // 2)
    return dim[None, :]


@triton.jit
def load_planes(
    codes: tl.tensor,
    scales: tl.tensor,
    rows: tl.tensor,
    is_cached: tl.tensor,
    FIRST: constexpr,
    WIDTH: constexpr,
    PADDED: constexpr,
    HEAD_DIM: constexpr,
    BITS: constexpr,
    IS_WHOLE: constexpr,
    DTYPE: constexpr,
) -> tuple[tl.tensor, tl.tensor]:
    """Dimensions FIRST .. FIRST + WIDTH of cached rows as two planes [N, PADDED / 2] of DTYPE, zero where none are.

    codes point to float16 (16 bits), to int16, each of two codes (8), or to uint8 (4). rows [N] int64 count heads of
    tokens in storage order, is_cached [N] says which to read. FIRST is even for 8 bits.
    """
    NUM_GROUPS: constexpr = (HEAD_DIM + _GROUP - 1) // _GROUP
    place = tl.arange(0, PADDED // 2)[None, :]
    row, is_row = rows[:, None], is_cached[:, None]
    dim_a = plane_dims(0, PADDED, BITS, IS_WHOLE)
    dim_b = plane_dims(1, PADDED, BITS, IS_WHOLE)
    if BITS == 16:
        at = codes + row * HEAD_DIM + FIRST
        plane_a = tl.load(at + dim_a, mask=is_row & (dim_a < WIDTH), other=0.0).to(DTYPE)
        plane_b = tl.load(at + dim_b, mask=is_row & (dim_b < WIDTH), other=0.0).to(DTYPE)
    else:
        if BITS == 8:
            at = codes + row * (NUM_GROUPS * _HALF_GROUP) + FIRST // 2
            pair = tl.load(at + place, mask=is_row & (place < WIDTH // 2), other=0).to(tl.uint16, bitcast=True)
            if IS_COMPILED:
                number_a, number_b = tl.inline_asm_elementwise(
                    BYTES_ASM, "=&r,=&r,r", [pair], dtype=(tl.float16, tl.float16), is_pure=True, pack=2
                )
            else:
                number_a = ((pair & 0xFF) ^ 0x6480).to(tl.float16, bitcast=True) - 1152.0
                number_b = ((pair >> 8) ^ 0x6480).to(tl.float16, bitcast=True) - 1152.0
        elif IS_WHOLE:
            at = codes + row * (NUM_GROUPS * _HALF_GROUP) + FIRST // 2
            is_code = place < (WIDTH + _GROUP - 1) // _GROUP * _HALF_GROUP
            pair = tl.load(at + place, mask=is_row & is_code, other=0)
            if IS_COMPILED:
                number_a, number_b = tl.inline_asm_elementwise(
                    NIBBLES_ASM, "=&r,=&r,=&r,=&r,r", [pair], dtype=(tl.float16, tl.float16), is_pure=True, pack=4
                )
            else:
                pair = pair.to(tl.uint16)
                number_a = ((pair & 15) | 0x6400).to(tl.float16, bitcast=True) - 1032.0
                number_b = ((pair >> 4) | 0x6400).to(tl.float16, bitcast=True) - 1032.0
        else:
            number_a = _nibbles(codes + row * (NUM_GROUPS * _HALF_GROUP), FIRST + dim_a, is_row & (dim_a < WIDTH))
            number_b = _nibbles(codes + row * (NUM_GROUPS * _HALF_GROUP), FIRST + dim_b, is_row & (dim_b < WIDTH))
        if IS_WHOLE:
            group = tl.arange(0, PADDED // _GROUP)[None, :]
            mask = is_row & (group * _GROUP < WIDTH)
            scale = tl.load(scales + row * NUM_GROUPS + FIRST // _GROUP + group, mask=mask, other=0.0)
            scale = tl.broadcast_to(scale[:, :, None], (rows.shape[0], PADDED // _GROUP, _HALF_GROUP))
            scale_a = tl.reshape(scale, (rows.shape[0], PADDED // 2))
            scale_b = scale_a
        else:
            at = scales + row * NUM_GROUPS
            scale_a = tl.load(at + (FIRST + dim_a) // _GROUP, mask=is_row & (dim_a < WIDTH), other=0.0)
            scale_b = tl.load(at + (FIRST + dim_b) // _GROUP, mask=is_row & (dim_b < WIDTH), other=0.0)
        plane_a = number_a.to(DTYPE) * scale_a.to(DTYPE)
        plane_b = number_b.to(DTYPE) * scale_b.to(DTYPE)
    return plane_a, plane_b


@triton.jit
def _nibbles(codes: tl.tensor, dims: tl.tensor, mask: tl.tensor) -> tl.tensor:
    """q4 numbers, float16, at any `dims` of rows that begin at `codes`."""
    byte = tl.load(codes + dims // _GROUP * _HALF_GROUP + dims % _HALF_GROUP, mask=mask, other=0).to(tl.int32)
    return ((byte >> dims % _GROUP // _HALF_GROUP * 4 & 15) - 8).to(tl.float16)


@triton.jit
def cached_rows(
    block_table: tl.tensor, positions: tl.tensor, is_cached: tl.tensor, head: tl.tensor, NUM_KV_HEADS: constexpr
) -> tl.tensor:
    """Rows [N] int64 where one head's keys and values at `positions` [N] lie, by the sequence's table of pages."""
    page = tl.load(block_table + positions // _PAGE, mask=is_cached, other=0).to(tl.int64)
    return (page * NUM_KV_HEADS + head) * _PAGE + positions % _PAGE
