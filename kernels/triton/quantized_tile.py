"""How a Triton kernel reads quantized numbers: words in, numbers out, one row of each of several blocks at a time.

A code becomes a float by its bits: those of a byte of codes are shifted to the top of the mantissa, once for all of
them, and under an exponent of zero a field q bits above the byte's lowest is 1 + code / 2^(8 - q). Integer operations
run at half the rate of arithmetic and conversions at an eighth, and would be what a card waits for. Masking a field and
setting its exponent is one instruction, lop3, of which the assembler makes two where it isn't told.
"""

import triton
import triton.language as tl
from triton.language import constexpr

from tightrope.kernels.forms.columns import (
    BOTH_OF_SIXTEEN,
    HALVED,
    NUMBERS,
    OF_EIGHT,
    OF_SIXTEEN,
    SIX_BITS_OF_EIGHT,
    SIX_BITS_OF_SIXTEEN,
)
from tightrope.kernels.triton.target import IS_COMPILED

_BOTH_OF_SIXTEEN = constexpr(BOTH_OF_SIXTEEN)
_SIX_BITS_OF_SIXTEEN, _SIX_BITS_OF_EIGHT = constexpr(SIX_BITS_OF_SIXTEEN), constexpr(SIX_BITS_OF_EIGHT)


@triton.jit
def load_share(shares: tl.tensor, share: tl.tensor) -> tuple[tl.tensor, tl.tensor, tl.tensor, tl.tensor]:
    """Width in bits, first block, end block and first word row of what a program reads."""
    at = shares + share * 4
    return tl.load(at), tl.load(at + 1), tl.load(at + 2), tl.load(at + 3)


@triton.jit
def spread(words: tl.tensor, BIT: constexpr, WIDTH: constexpr) -> tl.tensor:
    """1 + code / 2^(8 - BIT % 8), float32, of the codes of WIDTH bits that begin at bit BIT of words, within a byte."""
    left: constexpr = 15 - BIT // 8 * 8  # It takes the byte to bits 15 .. 23.
    moved = words << left if left >= 0 else words >> -left
    mask: constexpr = ((1 << WIDTH) - 1) << (15 + BIT % 8)
    if IS_COMPILED:
        asm: constexpr = "lop3.b32 $0, $1, $2, $3, 0xEA;"  # (a & b) | c
        bits = tl.inline_asm_elementwise(
            asm, "=r,r,r,r", [moved, mask, 0x3F800000], dtype=tl.int32, is_pure=True, pack=1
        )
    else:
        bits = (moved & mask) | 0x3F800000
    return bits.to(tl.float32, bitcast=True)


@triton.constexpr_function
def high_bit(row: int, low: int, high: int) -> int:
    """Where in its word the second plane's code of a block's row begins; see ColumnMatrix."""
    half = 16 // low
    return row % (2 * half) // half * 16 + high * (row // (2 * half) % (low // high) * half + row % half)


@triton.jit
def code_number(
    low: tl.tensor, high: tl.tensor, zero: tl.tensor, FIELD: constexpr, BITS: constexpr, LOW: constexpr
) -> tl.tensor:
    """code - zero, float32, of field FIELD of low words; high words' rows stand where those of a first low word do."""
    HIGH: constexpr = BITS - LOW
    unit: constexpr = 1 << (8 - FIELD * LOW % 8)
    number = spread(low, FIELD * LOW, LOW) * unit - (unit + zero)  # These are whole numbers, so this is exact.
    if HIGH > 0:
        bit: constexpr = high_bit(FIELD, LOW, HIGH)
        unit_high: constexpr = 1 << (8 + LOW - bit % 8)
        number += spread(high, bit, HIGH) * unit_high - unit_high
    return number


@triton.jit
def load_words(
    at: tl.tensor, word: tl.tensor, mask: tl.tensor, stride: tl.tensor, LOW: constexpr, HIGH: constexpr
) -> tuple[tl.tensor, tl.tensor]:
    """A word of the low plane of blocks, and that of the high one, moved for code_number; anything where not read."""
    low = tl.load(at + word * stride, mask=mask)
    high = low
    if HIGH > 0:
        PER_WORD: constexpr = LOW // HIGH  # So many low words have their second plane in one.
        high = tl.load(at + (LOW + word // PER_WORD) * stride, mask=mask) >> (word % PER_WORD * (HIGH * (16 // LOW)))
    return low, high


@triton.jit
def book_lanes(codebook: tl.tensor) -> tl.tensor:
    """A book of sixteen numbers, float32, one in each lane of half a warp; zero where there is no book.

    In the interpreter, which has no lanes, it is where the book lies.
    """
    lanes = 0.0
    if codebook is not None:
        if IS_COMPILED:
            asm: constexpr = """{
                .reg .b32 lane; .reg .b64 at;
                mov.u32 lane, %laneid; and.b32 lane, lane, 15; mad.wide.u32 at, lane, 4, $1; ld.global.nc.f32 $0, [at];
            }"""
            lanes = tl.inline_asm_elementwise(
                asm, "=f,l", [codebook.to(tl.int64)], dtype=tl.float32, is_pure=True, pack=1
            )
        else:
            lanes = codebook
    return lanes


@triton.jit
def book_number(words: tl.tensor, book: tl.tensor, FIELD: constexpr) -> tl.tensor:
    """The number, float32, that field FIELD of four bits of words stands for, by what book_lanes gives.

    Lanes give each other the number at once: of a lane's number only the lowest five bits count.
    """
    if IS_COMPILED:
        asm: constexpr = "shfl.sync.idx.b32 $0, $1, $2, 31, 0xffffffff;"
        number = tl.inline_asm_elementwise(
            asm, "=f,f,r", [book, words >> (4 * FIELD)], dtype=tl.float32, is_pure=True, pack=1
        )
    else:
        number = tl.load(book + ((words >> (4 * FIELD)) & 15))
    return number


@triton.constexpr_function
def groups_in_block(scaling: int) -> int:
    """Two where a group is half a block."""
    return 2 if scaling in HALVED else 1


@triton.constexpr_function
def _groups_of_unit(scaling: int) -> int:
    """How many share a scale by which their codes are multiplied."""
    return 1 if scaling == NUMBERS else 16 if scaling in HALVED else 8


@triton.constexpr_function
def _are_bytes(scaling: int) -> bool:
    return scaling in (OF_EIGHT, OF_SIXTEEN)


@triton.jit
def load_scale(
    scales: tl.tensor,
    codes: tl.tensor,
    group_max: tl.tensor,
    mins: tl.tensor,
    group: tl.tensor,
    columns: tl.tensor,
    mask: tl.tensor,
    stride: tl.tensor,
    SCALING: constexpr,
) -> tuple[tl.tensor, tl.tensor]:
    """Scales float32 of groups and columns, which are broadcast; zero where the mask is not. And mins, if there are."""
    GROUPS: constexpr = _groups_of_unit(SCALING)
    at = (group // GROUPS).to(tl.int64) * stride + columns
    scale = tl.load(scales + at, mask=mask, other=0).to(tl.float32)
    least = scale
    if mins is not None:
        least = tl.load(mins + at, mask=mask, other=0).to(tl.float32)
    if group_max is not None:
        scale = scale * scale * (tl.load(group_max + group) * (1 / 256))
    if _are_bytes(SCALING):
        scale *= tl.load(codes + group.to(tl.int64) * stride + columns, mask=mask, other=0).to(tl.float32)
    if SCALING == _BOTH_OF_SIXTEEN:
        both = tl.load(codes + group.to(tl.int64) * stride + columns, mask=mask, other=0).to(tl.int32)
        scale *= (both & 15).to(tl.float32)
        least *= (both >> 4).to(tl.float32)
    if SCALING == _SIX_BITS_OF_SIXTEEN:
        unit, code = codes + (group // 16).to(tl.int64) * 12 * stride + columns, group % 16
        low = tl.load(unit + code % 8 * stride, mask=mask, other=0).to(tl.int32)
        high = tl.load(unit + (8 + code % 4) * stride, mask=mask, other=0).to(tl.int32)
        scale *= (((low >> (code // 8 * 4)) & 15 | ((high >> (code // 4 * 2)) & 3) << 4) - 32).to(tl.float32)
    if SCALING == _SIX_BITS_OF_EIGHT:
        unit, code = codes + (group // 8).to(tl.int64) * 12 * stride + columns, group % 8
        first = tl.load(unit + code % 4 * stride, mask=mask, other=0).to(tl.int32)
        second = tl.load(unit + (4 + code % 4) * stride, mask=mask, other=0).to(tl.int32)
        rest = tl.load(unit + (8 + code % 4) * stride, mask=mask, other=0).to(tl.int32)
        scale *= tl.where(code < 4, first & 63, rest & 15 | (first >> 6) << 4).to(tl.float32)
        least *= tl.where(code < 4, second & 63, rest >> 4 | (second >> 6) << 4).to(tl.float32)
    return scale, least


@triton.jit
def load_zero(
    zeros: tl.tensor,
    group: tl.tensor,
    columns: tl.tensor,
    mask: tl.tensor,
    stride: tl.tensor,
    BITS: constexpr,
    HAS_MINS: constexpr,
) -> tl.tensor:
    """Zero points float32 of groups and columns, which are broadcast; [1, 1] where one is for all."""
    if zeros is None:
        zero = tl.full((1, 1), 0 if HAS_MINS else 1 << (BITS - 1), tl.float32)
    else:
        zero = tl.load(zeros + group.to(tl.int64) * stride + columns, mask=mask, other=0).to(tl.float32)
    return zero
