"""Several rows times a quantized matrix on CUDA, and the matrix expanded for products with many rows.

A block is a product of its own: its weights without their scale, which 16 bits hold exactly, times 32 numbers of each
row; sums are scaled in float32. Outputs are on the side of a card's matrix units that takes sixteen, rows on that which
takes eight.
"""

import triton
import triton.language as tl
from triton.language import constexpr

from tightrope.kernels.forms.columns import BLOCK
from tightrope.kernels.forms.quantized import TILE
from tightrope.kernels.triton.jit import kernel
from tightrope.kernels.triton.members import enter_member, find_member, first_output
from tightrope.kernels.triton.quantized_pairs import (
    book_bits,
    pair_rows,
    pair_weights,
    tiled_outputs,
    untiled_outputs,
)
from tightrope.kernels.triton.quantized_tile import (
    book_lanes,
    book_number,
    code_number,
    groups_in_block,
    load_scale,
    load_share,
    load_words,
    load_zero,
)

_BLOCK = constexpr(BLOCK)
_TILE = constexpr(TILE)


@kernel
def batch_parts(
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
    num_rows: int,
    num_inputs: int,
    num_tiles: int,
    WIDTHS: constexpr,
    SCALING: constexpr,
    ROWS: constexpr,
    OUTPUTS: constexpr,
    DTYPE: constexpr,
) -> None:
    """parts [S, T, N] float32 for x [T, K]: what each share of the stored rows adds to the outputs."""
    member, first_column = find_member(members, num_members, OUTPUTS)
    share, columns = tl.program_id(1), first_column + tl.arange(0, OUTPUTS)
    bits, first, end, word = load_share(shares, member * tl.num_programs(1) + share)
    before = first_output(members, member)
    words, source, group_of, scales, group_max, zeros, mins, stride = enter_member(
        words, source, group_of, scales, group_max, zeros, mins, members, member
    )
    tokens = tl.program_id(2) * ROWS + tl.arange(0, ROWS)
    total = tl.zeros((OUTPUTS, ROWS), tl.float32)
    for BITS in tl.static_range(2, 9):
        if (WIDTHS >> BITS) & 1:  # noqa: SIM102  decided when it is compiled, and the next one when it runs
            if bits == BITS:
                total = multiply_blocks(
                    x, words, source, group_of, scales, scale_codes, group_max, zeros, mins, codebook, first, end, word,
                    first_column, tokens, num_rows, num_inputs, stride, BITS, SCALING, OUTPUTS, DTYPE,
                )  # fmt: skip
    at_row = parts + (share * num_rows + tokens)[None, :].to(tl.int64) * (num_tiles * _TILE)
    at_parts = at_row + (before + columns)[:, None]
    tl.store(at_parts, total, mask=(tokens < num_rows)[None, :] & (columns < stride)[:, None])


@triton.jit
def multiply_blocks(
    x: tl.tensor,
    words: tl.tensor,
    source: tl.tensor,
    group_of: tl.tensor,
    scales: tl.tensor,
    scale_codes: tl.tensor,
    group_max: tl.tensor,
    zeros: tl.tensor,
    mins: tl.tensor,
    codebook: tl.tensor,
    first: tl.tensor,
    end: tl.tensor,
    first_word: tl.tensor,
    first_column: tl.tensor,
    tokens: tl.tensor,
    num_rows: tl.tensor,
    num_inputs: tl.tensor,
    stride: tl.tensor,
    BITS: constexpr,
    SCALING: constexpr,
    OUTPUTS: constexpr,
    DTYPE: constexpr,
) -> tl.tensor:
    """The product [OUTPUTS, ROWS] of x's rows `tokens` with blocks first .. end, of BITS, from first_column on."""
    LOW: constexpr = 8 if BITS == 8 else 4 if BITS >= 4 else 2
    ROWS: constexpr = tokens.shape[0]
    book = book_lanes(codebook)
    pairs = book_bits(book, codebook is not None, DTYPE)
    offsets = pair_rows(LOW, codebook is not None)
    HALVES: constexpr = groups_in_block(SCALING) == 2
    is_first = (offsets < _BLOCK // 2)[:, None]
    word = tl.arange(0, LOW)[None, :, None]
    columns = first_column + 4 * tl.arange(0, OUTPUTS // 4)[:, None, None] + tl.arange(0, 4)[None, None, :]
    is_output, is_token = columns < stride, (tokens < num_rows)[None, :]
    at_word = words + first_word.to(tl.int64) * stride + columns
    at_x = x + tokens[None, :].to(tl.int64) * num_inputs
    # scales and zero points are loaded by each thread that needs them: four lanes have the same outputs
    of_lane, of_word = columns + 0 * tl.arange(0, 4)[None, :, None], columns + 0 * word
    total = tl.zeros((OUTPUTS, ROWS), tl.float32)
    # what a block is multiplied with is loaded while the one before it is multiplied; where it lies, one before that
    row, group = _find(source, group_of, offsets, first)
    low, high = load_words(at_word, word, is_output, stride, LOW, BITS - LOW)
    number = tl.load(at_x + row[:, None], mask=is_token & (row >= 0)[:, None], other=0.0)
    scale, least = load_scale(scales, scale_codes, group_max, mins, group, of_lane, is_output, stride, SCALING)
    scale_b, least_b = scale, least
    if HALVES:
        scale_b, least_b = load_scale(
            scales, scale_codes, group_max, mins, group + 1, of_lane, is_output, stride, SCALING
        )
    zero = load_zero(zeros, group, of_word, is_output, stride, BITS, mins is not None)
    row, group = _find(source, group_of, offsets, tl.minimum(first + 1, end - 1))
    for block in range(first, end):
        at_word += tl.where(block + 1 < end, BITS * stride, 0)  # The last one is loaded again.
        next_low, next_high = load_words(at_word, word, is_output, stride, LOW, BITS - LOW)
        next_number = tl.load(at_x + row[:, None], mask=is_token & (row >= 0)[:, None], other=0.0)
        next_scale, next_least = load_scale(
            scales, scale_codes, group_max, mins, group, of_lane, is_output, stride, SCALING
        )
        next_zero = zero
        if zeros is not None:
            next_zero = load_zero(zeros, group, of_word, is_output, stride, BITS, mins is not None)
        next_scale_b, next_least_b = next_scale, next_least
        if HALVES:
            next_scale_b, next_least_b = load_scale(
                scales, scale_codes, group_max, mins, group + 1, of_lane, is_output, stride, SCALING
            )
        row, group = _find(source, group_of, offsets, tl.minimum(block + 2, end - 1))
        weight = pair_weights(low, high, zero, book, pairs, BITS, LOW, codebook is not None, DTYPE)
        if HALVES:  # Each half's inputs meet zeros in place of the other's.
            first_half = tl.where(is_first, number, 0.0)
            total += _times_half(weight, first_half, scale, least, mins is not None, OUTPUTS, DTYPE)
            total += _times_half(weight, number - first_half, scale_b, least_b, mins is not None, OUTPUTS, DTYPE)
        else:
            total += _times_half(weight, number, scale, least, mins is not None, OUTPUTS, DTYPE)
        low, high, number, zero = next_low, next_high, next_number, next_zero
        scale, least, scale_b, least_b = next_scale, next_least, next_scale_b, next_least_b
    return untiled_outputs(total)


@triton.jit
def _times_half(
    weight: tl.tensor,
    number: tl.tensor,
    scale: tl.tensor,
    least: tl.tensor,
    HAS_MINS: constexpr,
    OUTPUTS: constexpr,
    DTYPE: constexpr,
) -> tl.tensor:
    """The product [OUTPUTS, ROWS] of a block's weights [OUTPUTS, 32] and numbers [32, ROWS] of one group, scaled."""
    product = tl.dot(weight, number.to(DTYPE), input_precision="ieee")
    scaled = product * _of_product(scale, OUTPUTS, number.shape[1])
    if HAS_MINS:
        scaled += _of_product(least, OUTPUTS, number.shape[1]) * tl.sum(number.to(tl.float32), 0)[None, :]
    return scaled


@triton.jit
def _of_product(values: tl.tensor, OUTPUTS: constexpr, ROWS: constexpr) -> tl.tensor:
    """values [OUTPUTS / 4, 4, 4] of outputs for each number [OUTPUTS, ROWS] of a product."""
    spread = tl.broadcast_to(tiled_outputs(values)[:, None, :, None], (OUTPUTS, ROWS // 8, 4, 2))
    return tl.reshape(spread, (OUTPUTS, ROWS))


@triton.jit
def _find(source: tl.tensor, group_of: tl.tensor, offsets: tl.tensor, block: tl.tensor) -> tuple[tl.tensor, tl.tensor]:
    """Inputs [32] of a block's rows, -1 where there are none, and its group."""
    row = block * _BLOCK + offsets
    if source is not None:
        row = tl.load(source + row)
    return row, tl.load(group_of + block)


@kernel
def expand_columns(
    out: tl.tensor,
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
    first_tile: int,
    num_columns: int,
    out_tiles: int,
    num_tiles: int,
    WIDTHS: constexpr,
    SCALING: constexpr,
    BLOCKS: constexpr,
    OUTPUTS: constexpr,
) -> None:
    """out [K, num_columns], rows out_tiles apart: outputs from first_tile on, each weight rounded to out's dtype."""
    share = tl.program_id(1)
    bits, first, end, word = load_share(shares, share)
    stride, first_column, out_stride = num_tiles * _TILE, first_tile * _TILE, out_tiles * _TILE
    own = tl.program_id(0) * OUTPUTS + tl.arange(0, OUTPUTS)
    for BITS in tl.static_range(2, 9):
        if (WIDTHS >> BITS) & 1:  # noqa: SIM102  decided when it is compiled, and the next one when it runs
            if bits == BITS:
                _expand_blocks(
                    out, words, source, group_of, scales, scale_codes, group_max, zeros, mins, codebook, first, end,
                    word, first_column, own, num_columns, out_stride, stride, BITS, SCALING, BLOCKS,
                )  # fmt: skip


@triton.jit
def _expand_blocks(
    out: tl.tensor,
    words: tl.tensor,
    source: tl.tensor,
    group_of: tl.tensor,
    scales: tl.tensor,
    scale_codes: tl.tensor,
    group_max: tl.tensor,
    zeros: tl.tensor,
    mins: tl.tensor,
    codebook: tl.tensor,
    first: tl.tensor,
    end: tl.tensor,
    first_word: tl.tensor,
    first_column: tl.tensor,
    own: tl.tensor,
    num_columns: tl.tensor,
    out_stride: tl.tensor,
    stride: tl.tensor,
    BITS: constexpr,
    SCALING: constexpr,
    BLOCKS: constexpr,
) -> None:
    """Store the weights of blocks first .. end, of BITS."""
    LOW: constexpr = 8 if BITS == 8 else 4 if BITS >= 4 else 2
    FIELDS: constexpr = 32 // LOW  # A low word has so many.
    columns, book = first_column + own, book_lanes(codebook)
    for step in range(tl.cdiv(end - first, BLOCKS) * LOW):
        word = step % LOW
        blocks = first + step // LOW * BLOCKS + tl.arange(0, BLOCKS)
        mask = (blocks < end)[:, None] & (own < num_columns)[None, :]
        at = words + (first_word + (blocks - first) * BITS)[:, None].to(tl.int64) * stride + columns[None, :]
        low, high = load_words(at, word, mask, stride, LOW, BITS - LOW)
        group = tl.load(group_of + blocks, mask=blocks < end, other=0)
        if groups_in_block(SCALING) == 2:
            group += word // (LOW // 2)
        scale, least = load_scale(
            scales, scale_codes, group_max, mins, group[:, None], columns[None, :], mask, stride, SCALING
        )
        zero = load_zero(zeros, group[:, None], columns[None, :], mask, stride, BITS, mins is not None)
        for field in tl.static_range(FIELDS):
            row = blocks * _BLOCK + word * FIELDS + field
            if source is not None:
                row = tl.load(source + row, mask=blocks < end, other=-1)
            if codebook is not None:
                weight = book_number(low, book, field) * scale
            else:
                weight = code_number(low, high, zero, field, BITS, LOW) * scale
            if mins is not None:
                weight += least
            at_out = out + row[:, None].to(tl.int64) * out_stride + own[None, :]
            tl.store(at_out, weight.to(out.dtype.element_ty), mask=mask & (row >= 0)[:, None])
