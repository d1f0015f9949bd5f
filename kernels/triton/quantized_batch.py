"""Several rows times a quantized matrix on CUDA, and the matrix expanded for products with many rows.

A product does not care in which order rows are summed, so a tile is multiplied row by row of its blocks: row r of each
of BLOCKS blocks is one operand, decoded where its words were loaded. The words of a block are taken in a loop: written
out, the products of all widths take a compiler minutes.
"""

import triton
import triton.language as tl
from triton.language import constexpr

from tightrope.kernels.forms.columns import BLOCK
from tightrope.kernels.triton.quantized_tile import book_number, load_scale, load_share, load_zero, spread

_BLOCK = constexpr(BLOCK)


@triton.jit
def batch_parts(
    x: tl.tensor,
    parts: tl.tensor,
    words: tl.tensor,
    source: tl.tensor,
    group_of: tl.tensor,
    shares: tl.tensor,
    scales: tl.tensor,
    group_max: tl.tensor,
    zeros: tl.tensor,
    codebook: tl.tensor,
    num_rows: tl.tensor,
    num_inputs: tl.tensor,
    stride: tl.tensor,
    WIDTHS: constexpr,
    ROWS: constexpr,
    BLOCKS: constexpr,
    OUTPUTS: constexpr,
    DTYPE: constexpr,
) -> None:
    """parts [S, T, N] float32 for x [T, K]: what each share of the stored rows adds to the outputs."""
    share = tl.program_id(1)
    bits, first, end, word = load_share(shares, share)
    columns = tl.program_id(0) * OUTPUTS + tl.arange(0, OUTPUTS)
    tokens = tl.program_id(2) * ROWS + tl.arange(0, ROWS)
    total = tl.zeros((ROWS, OUTPUTS), tl.float32)
    for BITS in tl.static_range(2, 9):
        if (WIDTHS >> BITS) & 1:  # noqa: SIM102  decided when it is compiled, and the next one when it runs
            if bits == BITS:
                total = multiply_blocks(
                    total, x, words, source, group_of, scales, group_max, zeros, codebook, first, end, word, columns,
                    tokens, num_rows, num_inputs, stride, BITS, BLOCKS, DTYPE,
                )  # fmt: skip
    at_parts = parts + (share * num_rows + tokens)[:, None].to(tl.int64) * stride + columns[None, :]
    tl.store(at_parts, total, mask=(tokens < num_rows)[:, None] & (columns < stride)[None, :])


@triton.jit
def multiply_blocks(
    total: tl.tensor,
    x: tl.tensor,
    words: tl.tensor,
    source: tl.tensor,
    group_of: tl.tensor,
    scales: tl.tensor,
    group_max: tl.tensor,
    zeros: tl.tensor,
    codebook: tl.tensor,
    first: tl.tensor,
    end: tl.tensor,
    first_word: tl.tensor,
    columns: tl.tensor,
    tokens: tl.tensor,
    num_rows: tl.tensor,
    num_inputs: tl.tensor,
    stride: tl.tensor,
    BITS: constexpr,
    BLOCKS: constexpr,
    DTYPE: constexpr,
) -> tl.tensor:
    """total [ROWS, OUTPUTS] plus the product of x with blocks first .. end, of BITS."""
    LOW: constexpr = 8 if BITS == 8 else 4 if BITS >= 4 else 2
    FIELDS: constexpr = 32 // LOW  # of a low word
    for step in range(tl.cdiv(end - first, BLOCKS) * LOW):
        word = step % LOW
        blocks = first + step // LOW * BLOCKS + tl.arange(0, BLOCKS)
        mask = (blocks < end)[:, None] & (columns < stride)[None, :]
        at = words + (first_word + (blocks - first) * BITS)[:, None].to(tl.int64) * stride + columns[None, :]
        low, high = _load_words(at, word, mask, stride, LOW, BITS - LOW)  # what is not read meets an x of zero
        group = tl.load(group_of + blocks, mask=blocks < end, other=0)
        scale = load_scale(scales, group_max, group, columns, mask, stride)
        zero = load_zero(zeros, group, columns, mask, stride, BITS)
        for field in tl.static_range(FIELDS):
            row = blocks * _BLOCK + word * FIELDS + field
            is_row = blocks < end
            if source is not None:
                row = tl.load(source + row, mask=is_row, other=-1)
                is_row = row >= 0
            at_x = x + tokens[:, None].to(tl.int64) * num_inputs + row[None, :]
            number = tl.load(at_x, mask=(tokens < num_rows)[:, None] & is_row[None, :], other=0.0)
            weight = _weight(low, high, scale, zero, codebook, field, LOW, BITS - LOW)
            total = tl.dot(number.to(DTYPE), weight.to(DTYPE), total, input_precision="ieee")
    return total


@triton.jit
def _load_words(
    at: tl.tensor, word: tl.tensor, mask: tl.tensor, stride: tl.tensor, LOW: constexpr, HIGH: constexpr
) -> tuple[tl.tensor, tl.tensor]:
    """A word of the low plane of blocks, and that of the high one, whose rows are moved down to its lowest bits."""
    low = tl.load(at + word * stride, mask=mask)
    high = low
    if HIGH > 0:
        bit = word * (32 // LOW * HIGH)  # of the high plane's, where the rows of the low word begin
        high = tl.load(at + (LOW + bit // 32) * stride, mask=mask) >> (bit % 32)
    return low, high


@triton.jit
def _weight(
    low: tl.tensor,
    high: tl.tensor,
    scale: tl.tensor,
    zero: tl.tensor,
    codebook: tl.tensor,
    FIELD: constexpr,
    LOW: constexpr,
    HIGH: constexpr,
) -> tl.tensor:
    """(code - zero) * scale, float32, of row FIELD of the words' rows; see _load_words."""
    if codebook is not None:
        weight = book_number(low, codebook, FIELD) * scale
    else:
        unit: constexpr = 1 << (8 - FIELD * LOW % 8)
        code = spread(low, FIELD, LOW) * unit - (unit + zero)  # exact: whole numbers
        if HIGH > 0:
            unit_high: constexpr = 1 << (8 + LOW - FIELD * HIGH % 8)
            code += spread(high, FIELD, HIGH) * unit_high - unit_high
        weight = code * scale
    return weight


@triton.jit
def expand_columns(
    out: tl.tensor,
    words: tl.tensor,
    source: tl.tensor,
    group_of: tl.tensor,
    shares: tl.tensor,
    scales: tl.tensor,
    group_max: tl.tensor,
    zeros: tl.tensor,
    codebook: tl.tensor,
    first_column: tl.tensor,
    num_columns: tl.tensor,
    stride: tl.tensor,
    WIDTHS: constexpr,
    BLOCKS: constexpr,
    OUTPUTS: constexpr,
) -> None:
    """out [K, num_columns]: the weights of outputs from first_column on, each rounded to out's dtype."""
    share = tl.program_id(1)
    bits, first, end, word = load_share(shares, share)
    own = tl.program_id(0) * OUTPUTS + tl.arange(0, OUTPUTS)
    for BITS in tl.static_range(2, 9):
        if (WIDTHS >> BITS) & 1:  # noqa: SIM102  decided when it is compiled, and the next one when it runs
            if bits == BITS:
                _expand_blocks(
                    out, words, source, group_of, scales, group_max, zeros, codebook, first, end, word, first_column,
                    own, num_columns, stride, BITS, BLOCKS,
                )  # fmt: skip


@triton.jit
def _expand_blocks(
    out: tl.tensor,
    words: tl.tensor,
    source: tl.tensor,
    group_of: tl.tensor,
    scales: tl.tensor,
    group_max: tl.tensor,
    zeros: tl.tensor,
    codebook: tl.tensor,
    first: tl.tensor,
    end: tl.tensor,
    first_word: tl.tensor,
    first_column: tl.tensor,
    own: tl.tensor,
    num_columns: tl.tensor,
    stride: tl.tensor,
    BITS: constexpr,
    BLOCKS: constexpr,
) -> None:
    """Store the weights of blocks first .. end, of BITS."""
    LOW: constexpr = 8 if BITS == 8 else 4 if BITS >= 4 else 2
    FIELDS: constexpr = 32 // LOW  # of a low word
    columns = first_column + own
    for step in range(tl.cdiv(end - first, BLOCKS) * LOW):
        word = step % LOW
        blocks = first + step // LOW * BLOCKS + tl.arange(0, BLOCKS)
        mask = (blocks < end)[:, None] & (own < num_columns)[None, :]
        at = words + (first_word + (blocks - first) * BITS)[:, None].to(tl.int64) * stride + columns[None, :]
        low, high = _load_words(at, word, mask, stride, LOW, BITS - LOW)
        group = tl.load(group_of + blocks, mask=blocks < end, other=0)
        scale = load_scale(scales, group_max, group, columns, mask, stride)
        zero = load_zero(zeros, group, columns, mask, stride, BITS)
        for field in tl.static_range(FIELDS):
            row = blocks * _BLOCK + word * FIELDS + field
            if source is not None:
                row = tl.load(source + row, mask=blocks < end, other=-1)
            weight = _weight(low, high, scale, zero, codebook, field, LOW, BITS - LOW)
            at_out = out + row[:, None].to(tl.int64) * num_columns + own[None, :]
            tl.store(at_out, weight.to(out.dtype.element_ty), mask=mask & (row >= 0)[:, None])
