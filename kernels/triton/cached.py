"""How a Triton kernel reads cached keys and values: codes and scales in, numbers out, for a tile of tokens."""

import triton
import triton.language as tl
from triton.language import constexpr

from tightrope.kernels.layout import GROUP, PAGE

_GROUP: constexpr = GROUP
_PAGE: constexpr = PAGE


@triton.jit
def load_values(
    codes: tl.tensor,
    scales: tl.tensor,
    rows: tl.tensor,
    is_cached: tl.tensor,
    FIRST: constexpr,
    WIDTH: constexpr,
    PADDED: constexpr,
    HEAD_DIM: constexpr,
    BITS: constexpr,
    DTYPE: constexpr,
) -> tl.tensor:
    """Dimensions FIRST .. FIRST + WIDTH of cached rows, as a tile [N, PADDED] of DTYPE; zero where there is nothing.

    rows [N] int64 count heads of tokens in storage order, is_cached [N] says which to read.
    """
    GROUPS: constexpr = (HEAD_DIM + _GROUP - 1) // _GROUP
    if BITS == 16:
        dims = tl.arange(0, PADDED)[None, :]
        mask = is_cached[:, None] & (dims < WIDTH)
        return tl.load(codes + rows[:, None] * HEAD_DIM + FIRST + dims, mask=mask, other=0.0).to(DTYPE)
    if FIRST % _GROUP == 0 and PADDED % _GROUP == 0 and (WIDTH % _GROUP == 0 or FIRST + WIDTH == HEAD_DIM):
        # whole groups: one scale is loaded for its 32 values; what pads the last group is stored as zero
        groups = FIRST // _GROUP + tl.arange(0, PADDED // _GROUP)[None, :, None]
        lanes = tl.arange(0, _GROUP)[None, None, :]
        mask = is_cached[:, None, None] & (groups < (FIRST + WIDTH + _GROUP - 1) // _GROUP)
        rows3 = rows[:, None, None]
        scale = tl.load(scales + rows3 * GROUPS + groups, mask=mask, other=0.0)
        number = _numbers(codes, rows3, groups, lanes, mask, GROUPS, BITS)
        return tl.reshape(number.to(DTYPE) * scale.to(DTYPE), (rows.shape[0], PADDED))
    dims = FIRST + tl.arange(0, PADDED)[None, :]
    groups = dims // _GROUP
    mask = is_cached[:, None] & (dims < FIRST + WIDTH)
    scale = tl.load(scales + rows[:, None] * GROUPS + groups, mask=mask, other=0.0)
    number = _numbers(codes, rows[:, None], groups, dims % _GROUP, mask, GROUPS, BITS)
    return number.to(DTYPE) * scale.to(DTYPE)


@triton.jit
def _numbers(
    codes: tl.tensor,
    rows: tl.tensor,
    groups: tl.tensor,
    lanes: tl.tensor,
    mask: tl.tensor,
    GROUPS: constexpr,
    BITS: constexpr,
) -> tl.tensor:
    """The integers that codes stand for, int8, at `lanes` of `groups` of `rows`."""
    if BITS == 8:
        return tl.load(codes + rows * (GROUPS * _GROUP) + groups * _GROUP + lanes, mask=mask, other=0)
    half: constexpr = _GROUP // 2
    packed = tl.load(codes + rows * (GROUPS * half) + groups * half + lanes % half, mask=mask, other=0)
    return ((packed >> (lanes // half * 4).to(tl.uint8)) & 15).to(tl.int8) - 8


@triton.jit
def cached_rows(
    block_table: tl.tensor, positions: tl.tensor, is_cached: tl.tensor, head: tl.tensor, NUM_KV_HEADS: constexpr
) -> tl.tensor:
    """Rows [N] int64 where one head's keys and values at `positions` [N] lie, by the sequence's table of pages."""
    page = tl.load(block_table + positions // _PAGE, mask=is_cached, other=0).to(tl.int64)
    return (page * NUM_KV_HEADS + head) * _PAGE + positions % _PAGE
