"""Paged attention of one new token a sequence on CUDA: over a stretch of its cached keys and values.

The few query heads that share a key head are on the side of a card's matrix units that takes eight, cached tokens and
dimensions on that which takes sixteen. All planes of a tile's keys are one operand, all of its values another, so that
the threads of a program wait for each other once for each. Products have operands of DTYPE, float16 or float32, and
float32 sums. Source of the scheme: the "Flash-Decoding" note of Dao et al., 2023.
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
def decode(
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
    row = tl.load(query_starts + b)
    if tl.load(query_starts + b + 1) - row != 1:
        return
    length = tl.load(context_lens + b)
    begin = 0
    if HAS_WINDOW:
        begin = tl.maximum(length - window, 0) // _PAGE * _PAGE
    stretch = tl.cdiv(tl.cdiv(length - begin, num_splits), BLOCK_TOKENS) * BLOCK_TOKENS
    begin += part * stretch
    end = tl.minimum(length, begin + stretch)

    member = tl.arange(0, GROUP_PADDED)
    is_member = (member < GROUP)[None, :]
    at = (row.to(tl.int64) * (NUM_KV_HEADS * GROUP) + head * GROUP + member) * HEAD_DIM
    q_at = queries + at[None, :]
    factor = key_factor + head * HEAD_DIM
    if HALF > 0:
        pair_a = plane_dims(0, HALF_PADDED, BITS, HALF_IS_WHOLE)
        pair_b = plane_dims(1, HALF_PADDED, BITS, HALF_IS_WHOLE)
        q_first_a, q_second_a = _load_queries(q_at, pair_a, is_member, HALF)
        q_first_b, q_second_b = _load_queries(q_at, pair_b, is_member, HALF)
        c_first_a, c_second_a = _load_factors(factor, pair_a, HALF, DTYPE)
        c_first_b, c_second_b = _load_factors(factor, pair_b, HALF, DTYPE)
        table = tl.load(set_of + b).to(tl.int64)
        pages += table * num_pages * (2 * HALF)
        places += table * (_PAGE * 2 * HALF)
        cos_a, sin_a = tile_angles(pages, places, num_pages, pair_a, BLOCK_TOKENS, HALF)
        cos_b, sin_b = tile_angles(pages, places, num_pages, pair_b, BLOCK_TOKENS, HALF)
        cos_a, sin_a, cos_b, sin_b = cos_a.to(DTYPE), sin_a.to(DTYPE), cos_b.to(DTYPE), sin_b.to(DTYPE)
    if REST > 0:
        rest_a = plane_dims(0, REST_PADDED, BITS, REST_IS_WHOLE)
        rest_b = plane_dims(1, REST_PADDED, BITS, REST_IS_WHOLE)
        c_rest_a = tl.load(factor + 2 * HALF + rest_a, mask=rest_a < REST, other=0.0).to(DTYPE)
        c_rest_b = tl.load(factor + 2 * HALF + rest_b, mask=rest_b < REST, other=0.0).to(DTYPE)
        q_rest = tl.trans(_beside(rest_a, rest_b))
        q_rest = tl.load(q_at + 2 * HALF + q_rest, mask=is_member & (q_rest < REST), other=0.0).to(DTYPE)

    largest = tl.full((GROUP_PADDED,), float("-inf"), tl.float32)
    totals = tl.zeros((BLOCK_TOKENS, GROUP_PADDED), tl.float32)
    mixed = tl.zeros((DIM_PADDED, GROUP_PADDED), tl.float32)
    for start in range(begin, end, BLOCK_TOKENS):
        token = start + tl.arange(0, BLOCK_TOKENS)
        is_cached = token < end
        rows = cached_rows(block_tables + b * table_width, token, is_cached, head, NUM_KV_HEADS)
        scores = tl.zeros((BLOCK_TOKENS, GROUP_PADDED), tl.float32)
        if HALF > 0:
            first_a, first_b = load_planes(
                key_codes, key_scales, rows, is_cached, 0, HALF, HALF_PADDED, HEAD_DIM, BITS, HALF_IS_WHOLE, DTYPE
            )
            second_a, second_b = load_planes(
                key_codes, key_scales, rows, is_cached, HALF, HALF, HALF_PADDED, HEAD_DIM, BITS, HALF_IS_WHOLE, DTYPE
            )
            first_a, second_a = turn(first_a * c_first_a, second_a * c_second_a, cos_a, sin_a)
            first_b, second_b = turn(first_b * c_first_b, second_b * c_second_b, cos_b, sin_b)
            keys = _beside(_beside(first_a, first_b), _beside(second_a, second_b))
            # turning the few queries back to the tile's page costs less than turning its keys on
            q_a, q_b = _turned_back(q_first_a, q_second_a, pages, start, pair_a, HALF)
            q_c, q_d = _turned_back(q_first_b, q_second_b, pages, start, pair_b, HALF)
            turned = tl.join(tl.join(q_a, q_c), tl.join(q_b, q_d))  # [pairs, heads, plane, half]
            turned = tl.reshape(tl.permute(turned, (3, 2, 0, 1)), (2 * HALF_PADDED, GROUP_PADDED))
            scores = tl.dot(keys, turned.to(DTYPE), scores, input_precision="ieee")
        if REST > 0:
            k_rest_a, k_rest_b = load_planes(
                key_codes, key_scales, rows, is_cached, 2 * HALF, REST, REST_PADDED, HEAD_DIM, BITS, REST_IS_WHOLE,
                DTYPE,
            )  # fmt: skip
            scores = tl.dot(_beside(k_rest_a * c_rest_a, k_rest_b * c_rest_b), q_rest, scores, input_precision="ieee")
        scores *= scale
        if HAS_SOFTCAP:
            scores = softcap * (2 * tl.sigmoid(2 * scores / softcap) - 1)  # This is tanh.
        is_seen = is_cached
        if HAS_WINDOW:
            is_seen &= length - 1 - token < window
        scores = tl.where(is_seen[:, None], scores * _LOG2E, float("-inf"))

        new_largest = tl.maximum(largest, tl.max(scores, 0))
        reference = tl.where(new_largest == float("-inf"), 0.0, new_largest)  # A row may have seen no key yet.
        weights = tl.exp2(scores - reference[None, :])
        fade = tl.exp2(largest - reference)[None, :]
        value_a, value_b = load_planes(
            value_codes, value_scales, rows, is_cached, 0, HEAD_DIM, DIM_PADDED, HEAD_DIM, BITS, True, DTYPE
        )
        totals = totals * fade + weights
        values = tl.trans(_beside(value_a, value_b))
        mixed = tl.dot(values, weights.to(DTYPE), mixed * fade, input_precision="ieee")
        largest = new_largest

    total = tl.sum(totals, 0)
    dim = tl.trans(_beside(plane_dims(0, DIM_PADDED, BITS, True), plane_dims(1, DIM_PADDED, BITS, True)))
    mask = is_member & (dim < HEAD_DIM)
    if partials is not None:
        slot = ((b * NUM_KV_HEADS + head) * GROUP + member) * num_splits + part
        tl.store(stats + slot * 2, largest, mask=member < GROUP)
        tl.store(stats + slot * 2 + 1, total, mask=member < GROUP)
        tl.store(partials + slot[None, :] * HEAD_DIM + dim, mixed, mask=mask)
    else:
        mixed *= (1 / tl.where(total == 0, 1.0, total))[None, :]
        tl.store(outputs + at[None, :] + dim, mixed.to(outputs.dtype.element_ty), mask=mask)


@triton.jit
def _beside(a: tl.tensor, b: tl.tensor) -> tl.tensor:
    """Two planes side by side."""
    return tl.reshape(tl.permute(tl.join(a, b), (0, 2, 1)), (a.shape[0], 2 * a.shape[1]))


@triton.jit
def _load_queries(
    queries: tl.tensor, pairs: tl.tensor, is_member: tl.tensor, HALF: constexpr
) -> tuple[tl.tensor, tl.tensor]:
    """Both halves of a plane of queries, [pairs, heads] float32, zero from HALF on."""
    pairs = tl.trans(pairs)
    mask = is_member & (pairs < HALF)
    first = tl.load(queries + pairs, mask=mask, other=0.0).to(tl.float32)
    return first, tl.load(queries + HALF + pairs, mask=mask, other=0.0).to(tl.float32)


@triton.jit
def _load_factors(
    factor: tl.tensor, pairs: tl.tensor, HALF: constexpr, DTYPE: constexpr
) -> tuple[tl.tensor, tl.tensor]:
    """Those of both halves of a plane of keys, [1, pairs]."""
    first = tl.load(factor + pairs, mask=pairs < HALF, other=0.0).to(DTYPE)
    return first, tl.load(factor + HALF + pairs, mask=pairs < HALF, other=0.0).to(DTYPE)


@triton.jit
def _turned_back(
    first: tl.tensor, second: tl.tensor, pages: tl.tensor, start: tl.tensor, pairs: tl.tensor, HALF: constexpr
) -> tuple[tl.tensor, tl.tensor]:
    """Both halves of a plane of queries, from where they stand to the page of token `start`."""
    cos, sin = page_angle(pages, start // _PAGE, tl.trans(pairs), HALF)
    first, second = turn(first, second, cos, -sin)
    return first, second
