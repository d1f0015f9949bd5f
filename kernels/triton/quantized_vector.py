"""One row times a quantized matrix on CUDA: every word is read once, by a program that has some blocks of some outputs.

Within a block codes are summed with x as they are spread, 1 + code / 2^k, and what that adds is taken away once a
block: sum of (code - zero) * x = sum of 2^k * x * spread - sum of 2^k * x - zero * sum of x.
"""

import triton
import triton.language as tl
from triton.language import constexpr

from tightrope.kernels.forms.columns import BLOCK, NUMBERS
from tightrope.kernels.forms.quantized import TILE
from tightrope.kernels.triton.jit import kernel
from tightrope.kernels.triton.members import enter_member, find_member, first_output
from tightrope.kernels.triton.quantized_tile import (
    book_lanes,
    book_number,
    groups_in_block,
    high_bit,
    load_scale,
    load_share,
    load_zero,
    spread,
)

_BLOCK = constexpr(BLOCK)
_TILE = constexpr(TILE)
_NUMBERS = constexpr(NUMBERS)


@kernel
def vector_parts(
    x: tl.tensor,
    parts: tl.tensor,
    words: tl.tensor,
    source: tl.tensor,
    group_of: tl.tensor,
    shares: tl.tensor,
    scales: tl.tensor,
    scale_codes: tl.tensor,
    group_max: tl.tensor,
    zeros: tl.tensor,
    mins: tl.tensor,
    codebook: tl.tensor,
    members: tl.tensor,
    num_members: int,
    num_tiles: int,
    WIDTHS: constexpr,
    SCALING: constexpr,
    BLOCKS: constexpr,
    OUTPUTS: constexpr,
) -> None:
    """parts [S, N] float32: what each share of the rows adds to the outputs."""
    member, first_column = find_member(members, num_members, OUTPUTS)
    share, columns = tl.program_id(1), tl.arange(0, OUTPUTS)
    bits, first, end, word = load_share(shares, member * tl.num_programs(1) + share)
    words, source, group_of, scales, group_max, zeros, mins, stride = enter_member(
        words, source, group_of, scales, group_max, zeros, mins, members, member
    )
    words += first_column
    scales += first_column
    if SCALING != _NUMBERS:
        scale_codes += first_column
    if zeros is not None:
        zeros += first_column
    if mins is not None:
        mins += first_column
    num_columns = stride - first_column  # From the first on, there are so many.
    total = tl.zeros((BLOCKS, OUTPUTS), tl.float32)
    book = book_lanes(codebook)
    for BITS in tl.static_range(2, 9):
        if (WIDTHS >> BITS) & 1:  # noqa: SIM102  decided when it is compiled, and the next one when it runs
            if bits == BITS:
                for block in range(first, end, BLOCKS):
                    blocks = block + tl.arange(0, BLOCKS)
                    at = words + (word + (blocks - first) * BITS)[:, None].to(tl.int64) * stride + columns[None, :]
                    mask = (blocks < end)[:, None] & (columns < num_columns)[None, :]
                    group = tl.load(group_of + blocks, mask=blocks < end, other=0)
                    for part in tl.static_range(groups_in_block(SCALING)):
                        summed, plain = _block_sums(
                            x,
                            at,
                            source,
                            zeros,
                            book,
                            blocks,
                            end,
                            group,
                            columns,
                            mask,
                            stride,
                            BLOCKS,
                            OUTPUTS,
                            BITS,
                            part,
                            groups_in_block(SCALING),
                            codebook is not None,
                            mins is not None,
                        )
                        scale, least = load_scale(
                            scales, scale_codes, group_max, mins, group[:, None] + part, columns[None, :], mask, stride,
                            SCALING,
                        )  # fmt: skip
                        total += summed * scale
                        if mins is not None:
                            total += least * plain[:, None]
    tl.store(  # What is read of a matrix before the loop, and not here, takes a register of it.
        parts + share * (num_tiles * _TILE) + first_output(members, member) + first_column + columns,
        tl.sum(total, 0),
        mask=columns < num_columns,
    )


@triton.jit
def _block_sums(
    x: tl.tensor,
    at: tl.tensor,
    source: tl.tensor,
    zeros: tl.tensor,
    book: tl.tensor,
    blocks: tl.tensor,
    end: tl.tensor,
    group: tl.tensor,
    columns: tl.tensor,
    mask: tl.tensor,
    stride: tl.tensor,
    BLOCKS: constexpr,
    OUTPUTS: constexpr,
    BITS: constexpr,
    PART: constexpr,
    PARTS: constexpr,
    HAS_BOOK: constexpr,
    HAS_MINS: constexpr,
) -> tuple[tl.tensor, tl.tensor]:
    """Over part PART of PARTS of each block's rows the sums [BLOCKS, OUTPUTS] of (code - zero) * x, and [BLOCKS] of x.

    The latter is there with mins or zero points.
    """
    LOW: constexpr = 8 if BITS == 8 else 4 if BITS >= 4 else 2
    HIGH: constexpr = BITS - LOW
    FIELDS: constexpr = 32 // LOW  # A low word has so many.
    summed = tl.zeros((BLOCKS, OUTPUTS), tl.float32)
    added = tl.zeros((BLOCKS,), tl.float32)
    plain = tl.zeros((BLOCKS,), tl.float32)
    for word in tl.static_range(PART * LOW // PARTS, (PART + 1) * LOW // PARTS):
        low = tl.load(at + word * stride, mask=mask)  # What is not read meets an x of zero.
        if HIGH > 0:
            high = tl.load(at + (LOW + word * HIGH // LOW) * stride, mask=mask)
        for field in tl.static_range(FIELDS):
            row = blocks * _BLOCK + (word * FIELDS + field)
            number = _load_x(x, source, row, blocks < end)
            if HAS_BOOK:
                summed += book_number(low, book, field) * number[:, None]
            else:
                number_low = number * (1 << (8 - field * LOW % 8))
                summed += spread(low, field * LOW, LOW) * number_low[:, None]
                added += number * _taken_away(word * FIELDS + field, LOW, HIGH, zeros is None and not HAS_MINS)
                if zeros is not None or HAS_MINS:
                    plain += number
                if HIGH > 0:
                    number_high = number * (1 << (8 + LOW - high_bit(word * FIELDS + field, LOW, HIGH) % 8))
                    summed += spread(high, high_bit(word * FIELDS + field, LOW, HIGH), HIGH) * number_high[:, None]
    if not HAS_BOOK:
        summed -= added[:, None]
        if zeros is not None:
            zero = load_zero(zeros, group[:, None], columns[None, :], mask, stride, BITS, HAS_MINS)
            summed -= zero * plain[:, None]
    return summed, plain


@triton.constexpr_function
def _taken_away(row: int, low: int, high: int, is_one_zero: bool) -> int:
    """What the spread codes of a block's row are too large by: their ones, and a zero point that is one for all."""
    ones = 1 << (8 - row * low % 8)
    if high > 0:
        ones += 1 << (8 + low - high_bit(row, low, high) % 8)
    return ones + (1 << (low + high - 1)) * is_one_zero


@triton.jit
def _load_x(x: tl.tensor, source: tl.tensor, row: tl.tensor, is_row: tl.tensor) -> tl.tensor:
    """Inputs, float32, of stored rows; zero where there is none."""
    if source is not None:
        row = tl.load(source + row, mask=is_row, other=-1)
        is_row = row >= 0
    return tl.load(x + row, mask=is_row, other=0.0).to(tl.float32)


@kernel
def sum_parts(
    parts: tl.tensor,
    bias: tl.tensor,
    out: tl.tensor,
    num_parts: int,
    num_outputs: int,
    num_tiles: int,
    out_stride: int,
    PARTS: constexpr,
    OUTPUTS: constexpr,
) -> None:
    """out [T, num_outputs], rows out_stride apart: bias and the sum of parts [S, T, N], always in the same order."""
    row = tl.program_id(1).to(tl.int64)
    stride = num_tiles * _TILE
    part_stride = tl.num_programs(1).to(tl.int64) * stride
    columns = tl.program_id(0) * OUTPUTS + tl.arange(0, OUTPUTS)
    is_output = columns < num_outputs
    sums = tl.zeros((PARTS, OUTPUTS), tl.float32)
    for first in range(0, num_parts, PARTS):
        part = first + tl.arange(0, PARTS)
        at = parts + part[:, None] * part_stride + row * stride + columns[None, :]
        sums += tl.load(at, mask=(part < num_parts)[:, None] & is_output[None, :], other=0.0)
    total = tl.sum(sums, 0)
    if bias is not None:
        total += tl.load(bias + columns, mask=is_output, other=0.0).to(tl.float32)
    tl.store(out + row * out_stride + columns, total.to(out.dtype.element_ty), mask=is_output)
