"""Paged attention on CUDA, the kernels: a tile of queries against cached keys, expanded and rotated in registers.

Products have operands of DTYPE, float16 or float32, and float32 sums. Source of the scheme: Dao et al. 2022,
arXiv 2205.14135, and the "Flash-Decoding" note of its authors, 2023.
"""

import math

import triton
import triton.language as tl
from triton.language import constexpr

from tightrope.kernels.forms.layout import PAGE
from tightrope.kernels.triton.angles import page_angle, tile_angles, turn
from tightrope.kernels.triton.cached import cached_rows, load_planes, plane_dims
from tightrope.kernels.triton.jit import kernel

_PAGE = constexpr(PAGE)
_LOG2E = constexpr(math.log2(math.e))


@kernel
def attend(
    queries: tl.tensor,
    outputs: tl.tensor,
    partials: tl.tensor,
    stats: tl.tensor,
    key_codes: tl.tensor,
    key_scales: tl.tensor,
    value_codes: tl.tensor,
    value_scales: tl.tensor,
    key_factor: tl.tensor,
    query_starts: tl.tensor,
    context_lens: tl.tensor,
    block_tables: tl.tensor,
    table_width: int,
    pages: tl.tensor,
    places: tl.tensor,
    set_of: tl.tensor,
    num_pages: int,
    scale: float,
    softcap: float,
    window: int,
    num_splits: int,
    NUM_KV_HEADS: constexpr,
    GROUP: constexpr,
    GROUP_PADDED: constexpr,
    BLOCK_QUERIES: constexpr,
    BLOCK_TOKENS: constexpr,
    HEAD_DIM: constexpr,
    DIM_PADDED: constexpr,
    HALF: constexpr,
    HALF_PADDED: constexpr,
    HALF_IS_WHOLE: constexpr,
    REST: constexpr,
    REST_PADDED: constexpr,
    REST_IS_WHOLE: constexpr,
    BITS: constexpr,
    HAS_WINDOW: constexpr,
    HAS_SOFTCAP: constexpr,
    DTYPE: constexpr,
) -> None:
    part, head, b = tl.program_id(0), tl.program_id(1), tl.program_id(2)
    first_row = tl.load(query_starts + b)
    num_queries = tl.load(query_starts + b + 1) - first_row
    length = tl.load(context_lens + b)
    first_query = part * BLOCK_QUERIES
    if (num_queries <= 1) | (first_query >= num_queries):
        return

    first_position = length - num_queries + first_query
    end = tl.minimum(length, first_position + BLOCK_QUERIES)
    begin = 0
    if HAS_WINDOW:
        begin = tl.maximum(first_position - window + 1, 0) // _PAGE * _PAGE

    # rows of the tile: heads of the group within queries
    row = tl.arange(0, BLOCK_QUERIES * GROUP_PADDED)
    query, member = row // GROUP_PADDED, row % GROUP_PADDED
    is_row = (member < GROUP) & (first_query + query < num_queries)
    at = (first_row + first_query + query).to(tl.int64) * (NUM_KV_HEADS * GROUP) + head * GROUP + member
    position = first_position + query
    q_row, is_row2 = queries + at[:, None] * HEAD_DIM, is_row[:, None]
    factor = key_factor + head * HEAD_DIM
    if HALF > 0:
        pair_a = plane_dims(0, HALF_PADDED, BITS, HALF_IS_WHOLE)
        pair_b = plane_dims(1, HALF_PADDED, BITS, HALF_IS_WHOLE)
        q_first_a, q_first_b = (
            _load(q_row, pair_a, is_row2, HALF).to(DTYPE),
            _load(q_row, pair_b, is_row2, HALF).to(DTYPE),
        )
        q_second_a = _load(q_row + HALF, pair_a, is_row2, HALF).to(DTYPE)
        q_second_b = _load(q_row + HALF, pair_b, is_row2, HALF).to(DTYPE)
        c_first_a, c_first_b = _load(factor, pair_a, True, HALF).to(DTYPE), _load(factor, pair_b, True, HALF).to(DTYPE)
        c_second_a = _load(factor + HALF, pair_a, True, HALF).to(DTYPE)
        c_second_b = _load(factor + HALF, pair_b, True, HALF).to(DTYPE)
        table = tl.load(set_of + b).to(tl.int64)
        pages += table * num_pages * (2 * HALF)
        places += table * (_PAGE * 2 * HALF)
        cos_a, sin_a = tile_angles(pages, places, num_pages, pair_a, BLOCK_TOKENS, HALF)
        cos_b, sin_b = tile_angles(pages, places, num_pages, pair_b, BLOCK_TOKENS, HALF)
        cos_a, sin_a, cos_b, sin_b = cos_a.to(DTYPE), sin_a.to(DTYPE), cos_b.to(DTYPE), sin_b.to(DTYPE)
    if REST > 0:
        rest_a = plane_dims(0, REST_PADDED, BITS, REST_IS_WHOLE)
        rest_b = plane_dims(1, REST_PADDED, BITS, REST_IS_WHOLE)
        q_rest_a = _load(q_row + 2 * HALF, rest_a, is_row2, REST).to(DTYPE)
        q_rest_b = _load(q_row + 2 * HALF, rest_b, is_row2, REST).to(DTYPE)
        c_rest_a = _load(factor + 2 * HALF, rest_a, True, REST).to(DTYPE)
        c_rest_b = _load(factor + 2 * HALF, rest_b, True, REST).to(DTYPE)

    largest = tl.full((BLOCK_QUERIES * GROUP_PADDED,), float("-inf"), tl.float32)
    total = tl.zeros((BLOCK_QUERIES * GROUP_PADDED,), tl.float32)
    mixed_a = tl.zeros((BLOCK_QUERIES * GROUP_PADDED, DIM_PADDED // 2), tl.float32)
    mixed_b = tl.zeros((BLOCK_QUERIES * GROUP_PADDED, DIM_PADDED // 2), tl.float32)
    for start in range(begin, end, BLOCK_TOKENS):
        token = start + tl.arange(0, BLOCK_TOKENS)
        is_cached = token < end
        rows = cached_rows(block_tables + b * table_width, token, is_cached, head, NUM_KV_HEADS)
        scores = tl.zeros((BLOCK_QUERIES * GROUP_PADDED, BLOCK_TOKENS), tl.float32)
        if HALF > 0:
            k_first_a, k_first_b = load_planes(
                key_codes, key_scales, rows, is_cached, 0, HALF, HALF_PADDED, HEAD_DIM, BITS, HALF_IS_WHOLE, DTYPE
            )
            k_second_a, k_second_b = load_planes(
                key_codes, key_scales, rows, is_cached, HALF, HALF, HALF_PADDED, HEAD_DIM, BITS, HALF_IS_WHOLE, DTYPE
            )
            page_cos_a, page_sin_a = page_angle(pages, start // _PAGE, pair_a, HALF)
            page_cos_b, page_sin_b = page_angle(pages, start // _PAGE, pair_b, HALF)
            scores = _rotated_product(
                scores,
                q_first_a,
                q_second_a,
                k_first_a * c_first_a,
                k_second_a * c_second_a,
                cos_a,
                sin_a,
                page_cos_a,
                page_sin_a,
                DTYPE,
            )
            scores = _rotated_product(
                scores,
                q_first_b,
                q_second_b,
                k_first_b * c_first_b,
                k_second_b * c_second_b,
                cos_b,
                sin_b,
                page_cos_b,
                page_sin_b,
                DTYPE,
            )
        if REST > 0:
            k_rest_a, k_rest_b = load_planes(
                key_codes,
                key_scales,
                rows,
                is_cached,
                2 * HALF,
                REST,
                REST_PADDED,
                HEAD_DIM,
                BITS,
                REST_IS_WHOLE,
                DTYPE,
            )
            scores = tl.dot(q_rest_a, tl.trans(k_rest_a * c_rest_a), scores, input_precision="ieee")
            scores = tl.dot(q_rest_b, tl.trans(k_rest_b * c_rest_b), scores, input_precision="ieee")
        scores *= scale
        if HAS_SOFTCAP:
            scores = softcap * (2 * tl.sigmoid(2 * scores / softcap) - 1)  # This is tanh.
        is_seen = is_cached[None, :] & (token[None, :] <= position[:, None])
        if HAS_WINDOW:
            is_seen &= position[:, None] - token[None, :] < window
        scores = tl.where(is_seen, scores * _LOG2E, float("-inf"))

        new_largest = tl.maximum(largest, tl.max(scores, 1))
        reference = tl.where(new_largest == float("-inf"), 0.0, new_largest)  # A row may have seen no key yet.
        weights = tl.exp2(scores - reference[:, None])
        fade = tl.exp2(largest - reference)
        value_a, value_b = load_planes(
            value_codes, value_scales, rows, is_cached, 0, HEAD_DIM, DIM_PADDED, HEAD_DIM, BITS, True, DTYPE
        )
        total = total * fade + tl.sum(weights, 1)
        weights = weights.to(DTYPE)
        mixed_a = tl.dot(weights, value_a, mixed_a * fade[:, None], input_precision="ieee")
        mixed_b = tl.dot(weights, value_b, mixed_b * fade[:, None], input_precision="ieee")
        largest = new_largest

    dim_a = plane_dims(0, DIM_PADDED, BITS, True)
    dim_b = plane_dims(1, DIM_PADDED, BITS, True)
    inverse = 1 / tl.where(total == 0, 1.0, total)[:, None]
    mixed_a *= inverse
    mixed_b *= inverse
    out_row = outputs + at[:, None] * HEAD_DIM
    tl.store(out_row + dim_a, mixed_a.to(out_row.dtype.element_ty), mask=is_row2 & (dim_a < HEAD_DIM))
    tl.store(out_row + dim_b, mixed_b.to(out_row.dtype.element_ty), mask=is_row2 & (dim_b < HEAD_DIM))


@triton.jit
def _load(row: tl.tensor, dims: tl.tensor, is_row: tl.tensor, WIDTH: constexpr) -> tl.tensor:
    """Numbers at `dims` of rows, float32, zero from WIDTH on."""
    return tl.load(row + dims, mask=is_row & (dims < WIDTH), other=0.0).to(tl.float32)


@triton.jit
def _rotated_product(
    scores: tl.tensor,
    q_first: tl.tensor,
    q_second: tl.tensor,
    k_first: tl.tensor,
    k_second: tl.tensor,
    cos: tl.tensor,
    sin: tl.tensor,
    page_cos: tl.tensor,
    page_sin: tl.tensor,
    DTYPE: constexpr,
) -> tl.tensor:
    """scores plus the product of one plane of queries with keys that are turned to their positions first.

    cos, sin: of the tile's tokens, counted from its page; page_cos, page_sin: of the page.
    """
    cos, sin = turn(cos, sin, page_cos.to(DTYPE), page_sin.to(DTYPE))
    k_first, k_second = turn(k_first, k_second, cos, sin)
    scores = tl.dot(q_first, tl.trans(k_first), scores, input_precision="ieee")
    return tl.dot(q_second, tl.trans(k_second), scores, input_precision="ieee")


@kernel
def merge(
    outputs: tl.tensor,
    partials: tl.tensor,
    stats: tl.tensor,
    query_starts: tl.tensor,
    num_splits: int,
    NUM_HEADS: constexpr,
    HEAD_DIM: constexpr,
    DIM_PADDED: constexpr,
    MOST_SPLITS: constexpr,
    SPLITS: constexpr,
) -> None:
    """Join the stretches of one head of one decoding sequence by their largest scores and sums, SPLITS at a time."""
    b, head = tl.program_id(0), tl.program_id(1)
    row = tl.load(query_starts + b)
    if tl.load(query_starts + b + 1) - row != 1:
        return
    first = (b * NUM_HEADS + head) * num_splits
    largest, total = _stretches(stats, first, tl.arange(0, MOST_SPLITS), num_splits)
    overall = tl.maximum(tl.max(largest, 0), -1e38)  # It is finite also where nothing is cached.
    sum_of_weights = tl.sum(tl.exp2(largest - overall) * total, 0)
    dim = tl.arange(0, DIM_PADDED)
    mixed = tl.zeros((SPLITS, DIM_PADDED), tl.float32)
    for begin in range(0, num_splits, SPLITS):
        split = begin + tl.arange(0, SPLITS)
        peak, own = _stretches(stats, first, split, num_splits)
        mask = (own > 0)[:, None] & (dim < HEAD_DIM)[None, :]
        part = tl.load(partials + (first + split)[:, None] * HEAD_DIM + dim[None, :], mask=mask, other=0.0)
        mixed += part * tl.exp2(peak - overall)[:, None]
    result = tl.sum(mixed, 0) / tl.where(sum_of_weights == 0, 1.0, sum_of_weights)
    at = outputs + (row.to(tl.int64) * NUM_HEADS + head) * HEAD_DIM + dim
    tl.store(at, result.to(outputs.dtype.element_ty), mask=dim < HEAD_DIM)


@triton.jit
def _stretches(
    stats: tl.tensor, first: tl.tensor, split: tl.tensor, num_splits: tl.tensor
) -> tuple[tl.tensor, tl.tensor]:
    """Largest scores and sums of stretches `split`; -inf and 0 of those that saw no key, or aren't there."""
    at = stats + (first + split) * 2
    total = tl.load(at + 1, mask=split < num_splits, other=0.0)
    return tl.load(at, mask=total > 0, other=float("-inf")), total
