"""From packed weights as files have them to the kernels' layouts: in C++ where they lie on a CPU, else in torch.

Codes lie in 32-bit words, one after the other from the lowest bit up and across the borders of words. Both ways give
the same bytes.
"""

from functools import cache

import torch
from torch import Tensor

from tightrope.kernels.cpu import native
from tightrope.kernels.cpu.packing import NativePacking
from tightrope.kernels.forms.quantized import Nf4Matrix, Rows, Take, pack_nf4, pack_slices, tiled

ROWS_AT_ONCE = 2048  # so many are unpacked at a time, as their words take 32 bits each meanwhile
COPIED = (torch.float32, torch.bfloat16, torch.float16)


def pack_columns(words: Tensor, starts: Tensor, rows: Rows, num_outputs: int, take: Take) -> Tensor:
    """Codes as `pack` has them [C, bytes] of words [W, at least num_outputs] int32, with a stream down each column.

    starts [R] int64: the bit of a column at which a stored row's code begins, -1 for rows that fill up a group. The
    bytes are put where `take` says if C++ packs them.
    """
    if (built := _native_for(words)) is not None:
        return built.pack_columns(words, starts, rows, num_outputs, take)
    widths = rows.group_bits.repeat_interleave(rows.group_starts.diff().long()).to(words.device)
    starts = starts.to(words.device)
    return pack_slices(lambda a, b: column_codes(words[:, a:b], starts, widths), num_outputs, rows, words.device)


def pack_nibbles(words: Tensor, nibble_of: Tensor, rows: Rows, num_outputs: int, take: Take) -> Tensor:
    """The same of words [K, N / 8] int32 of eight outputs each, in groups of four bits alone.

    nibble_of [8] int32: which nibble of a word, counted from the lowest bits, an output is.
    """
    if (built := _native_for(words)) is not None:
        return built.pack_nibbles(words, nibble_of, rows, num_outputs, take)
    starts = nibble_starts(nibble_of, words.shape[1])
    return pack_slices(lambda a, b: rows.gather(row_codes(words, starts[a:b], 4)), num_outputs, rows, words.device)


def nibble_starts(nibble_of: Tensor, num_words: int) -> Tensor:
    """The bit of a row at which each output's four begin, [8 * num_words] int32."""
    return (32 * torch.arange(num_words, dtype=torch.int32).unsqueeze(1) + 4 * nibble_of).flatten()


def new_tiles(num_tiles: int, tile_bytes: int) -> Tensor:
    """See Take."""
    return torch.empty(num_tiles, tile_bytes, dtype=torch.uint8)


def unpack_rows(words: Tensor, starts: Tensor, bits: int, more: int, dtype: torch.dtype) -> Tensor:
    """[C, G, 16] of words [G, W] int32: the `bits` bits from bit starts[n] of row g on, and `more`; 0 after output N.

    starts [N] int32. dtype: uint8 or int16.
    """
    if (built := _native_for(words)) is not None:
        return built.unpack_rows(words, starts, bits, more, dtype)
    return tiled(row_codes(words, starts, bits).to(dtype) + more)


def pack_pairs(
    raw: Tensor, block_scales: Tensor, shape: tuple[int, int], blocksize: int, run: int, book: Tensor
) -> Nf4Matrix:
    """The matrix of `shape` [N, K] whose codes lie row after row in bytes [N * K / 2], the first of two in high bits.

    block_scales float32: those of blocks of `blocksize` codes, which go on from one row to the next. A run of codes, a
    multiple of 8 that divides K, shares one. book float32 [16].
    """
    outputs, inputs = shape
    if (built := _native_for(raw)) is not None:
        return built.pack_nf4(raw, block_scales, shape, blocksize, run, book)
    codes = torch.stack((raw >> 4, raw & 15), 1).flatten()[: outputs * inputs].view(shape)
    first = torch.arange(0, codes.numel(), run, device=raw.device)  # It is the first weight of each run.
    return pack_nf4(codes, block_scales[first // blocksize].view(outputs, -1), book, run)


def copy_finite(target: Tensor, source: Tensor) -> bool:
    """Copy numbers, converted where dtypes differ; whether all are finite. One pass where neither is converted."""
    built = _native_for(source)
    is_plain = target.dtype == source.dtype and source.dtype in COPIED and target.shape == source.shape
    if built is not None and is_plain and target.is_cpu and target.is_contiguous() and source.is_contiguous():
        return built.copy_finite(target, source)
    target.copy_(source)
    if not source.is_floating_point() or not source.numel():
        return True
    low, high = torch.aminmax(source)  # a NaN anywhere makes both NaN
    return bool(torch.isfinite(low) & torch.isfinite(high))


def column_codes(words: Tensor, starts: Tensor, widths: Tensor | int) -> Tensor:
    """Codes [R, N] uint8 of words [W, N] int32: `widths` [R] bits of a column, from `starts` [R] on; 0 for -1."""
    codes = words.new_empty(len(starts), words.shape[1], dtype=torch.uint8)
    for begin in range(0, len(starts), ROWS_AT_ONCE):
        start = starts[begin : begin + ROWS_AT_ONCE].unsqueeze(1).long()
        width = widths if isinstance(widths, int) else widths[begin : begin + ROWS_AT_ONCE].unsqueeze(1).int()
        word, bit = (start.clamp(min=0) >> 5)[:, 0], (start & 31).int()
        value = (words[word] >> bit) & ((1 << (32 - bit).clamp(max=8)) - 1)  # The shift has filled up with the sign.
        following = words[(word + 1).clamp(max=len(words) - 1)]
        value |= torch.where(bit + width > 32, following << (32 - bit).clamp(max=31), 0)
        codes[begin : begin + ROWS_AT_ONCE] = torch.where(start < 0, 0, value & ((1 << width) - 1))
    return codes


def row_codes(words: Tensor, starts: Tensor, bits: int) -> Tensor:
    """Codes [G, N] uint8 of rows of words [G, W] int32."""
    return column_codes(words.t(), starts.to(words.device), bits).t()


def _native_for(packed: Tensor) -> NativePacking | None:
    return _native() if packed.is_cpu and packed.stride(-1) == 1 else None


@cache
def _native() -> NativePacking | None:
    """The fastest build's; None where there is none, which kernels.dispatch says."""
    try:
        usable = native.usable()
        return NativePacking(usable[0]) if usable else None
    except native.UnusableBuild:
        return None
