"""Prompts on CUDA: a sequence's keys and values are expanded once a layer, and torch's flash attention reads them.

The kernel that decodes converts cached keys for each tile of queries anew, which a prompt of many tiles would wait for.
Expanded they are float16, as there: 16-bit queries are multiplied as float16 by both.
"""

import functools
from collections.abc import Iterator
from dataclasses import dataclass

import torch
import torch.nn.functional as F
import triton
import triton.language as tl
from torch import Tensor
from torch.nn.attention.bias import causal_lower_right
from triton.language import constexpr

from tightrope.kernels.forms.expanded import expands_cache
from tightrope.kernels.forms.layout import GROUP, PAGE, AttentionSpec, LayerCache, RopeTable, StepLayout
from tightrope.kernels.triton.angles import turn
from tightrope.kernels.triton.cached import BITS, cached_rows, load_planes, padded, plane_dims, words
from tightrope.kernels.triton.jit import kernel

FEWEST_QUERIES = 16  # Fewer are one tile of the other kernel, which reads the cache once as well.
TOKENS = 64  # A program expands so many.
_FLASH_CAPABILITY = (8, 0)
_PAGE = constexpr(PAGE)


@dataclass(frozen=True, slots=True)
class Prompt:
    """Rows first .. first + num_queries of a step: the last of `length` tokens of one of its sequences."""

    sequence: int
    first: int
    num_queries: int
    length: int


def prompts_of(queries: Tensor, step: StepLayout, spec: AttentionSpec) -> tuple[Prompt, ...]:
    """The sequences of a step that are read expanded; none where the host doesn't know its lengths."""
    if step.max_query_len < FEWEST_QUERIES or not expands_cache(spec, queries.shape[2]) or not _has_flash(queries):
        return ()
    return tuple(prompt for prompt in _sequences(step) if prompt.num_queries >= FEWEST_QUERIES)


def attend_expanded(
    queries: Tensor,
    outputs: Tensor,
    prompt: Prompt,
    cache: LayerCache,
    step: StepLayout,
    table: RopeTable | None,
    spec: AttentionSpec,
) -> None:
    """Write a prompt's rows of outputs [T, H, D], of queries [T, H, D] that are rotated already."""
    rows = slice(prompt.first, prompt.first + prompt.num_queries)
    dtype = torch.float32 if queries.dtype == torch.float32 else torch.float16
    keys, values = expand(cache, prompt.sequence, prompt.length, step, table, dtype)
    attended = F.scaled_dot_product_attention(
        queries[rows].to(dtype).transpose(0, 1).unsqueeze(0),
        keys.unsqueeze(0),
        values.unsqueeze(0),
        attn_mask=causal_lower_right(prompt.num_queries, prompt.length),
        scale=spec.scale,
        enable_gqa=queries.shape[1] != len(keys),
    )  # [1, H, n, D]
    outputs[rows] = attended[0].transpose(0, 1)


def expand(
    cache: LayerCache, sequence: int, length: int, step: StepLayout, table: RopeTable | None, dtype: torch.dtype
) -> tuple[Tensor, Tensor]:
    """The first `length` keys, rotated, and values of a sequence: [Hkv, length, D] each, in the step's scratch."""
    num_kv_heads, head_dim = cache.format.num_kv_heads, cache.format.head_dim
    half = table.places.shape[-1] if table is not None else 0
    rest = head_dim - 2 * half
    out = _scratch(step, (2, num_kv_heads, length, head_dim), dtype)
    expand_cached[triton.cdiv(length, TOKENS), num_kv_heads](
        out[0],
        out[1],
        words(cache.key_codes),
        cache.key_scales,
        words(cache.value_codes),
        cache.value_scales,
        cache.key_factor,
        step.block_tables,
        None if table is None else table.set_of,
        None if table is None else table.pages,
        None if table is None else table.places,
        sequence,
        length,
        step.block_tables.stride(0),
        0 if table is None else table.pages.shape[1],
        NUM_KV_HEADS=num_kv_heads,
        HEAD_DIM=head_dim,
        DIM_PADDED=padded(head_dim),
        HALF=half,
        HALF_PADDED=padded(half),
        HALF_IS_WHOLE=half % GROUP == 0,
        REST=rest,
        REST_PADDED=padded(rest),
        REST_IS_WHOLE=2 * half % GROUP == 0,
        BITS=BITS[cache.format.dtype],
        TOKENS=TOKENS,
        num_warps=4,
        enable_fp_fusion=True,
    )
    return out[0], out[1]


@kernel
def expand_cached(
    keys: tl.tensor,
    values: tl.tensor,
    key_codes: tl.tensor,
    key_scales: tl.tensor,
    value_codes: tl.tensor,
    value_scales: tl.tensor,
    key_factor: tl.tensor,
    block_tables: tl.tensor,
    set_of: tl.tensor,
    pages: tl.tensor,
    places: tl.tensor,
    sequence: int,
    length: int,
    table_width: int,
    num_pages: int,
    NUM_KV_HEADS: constexpr,
    HEAD_DIM: constexpr,
    DIM_PADDED: constexpr,
    HALF: constexpr,
    HALF_PADDED: constexpr,
    HALF_IS_WHOLE: constexpr,
    REST: constexpr,
    REST_PADDED: constexpr,
    REST_IS_WHOLE: constexpr,
    BITS: constexpr,
    TOKENS: constexpr,
) -> None:
    """keys and values [Hkv, length, D]: a tile of tokens of one head, computed in float32 and rounded once."""
    token, head = tl.program_id(0) * TOKENS + tl.arange(0, TOKENS), tl.program_id(1)
    is_token = token < length
    rows = cached_rows(block_tables + tl.cast(sequence, tl.int64) * table_width, token, is_token, head, NUM_KV_HEADS)
    at = ((head.to(tl.int64) * length + token) * HEAD_DIM)[:, None]
    key_row, value_row, factor = keys + at, values + at, key_factor + head * HEAD_DIM
    is_token2 = is_token[:, None]
    if HALF > 0:
        table = tl.load(set_of + sequence).to(tl.int64)
        page = pages + ((table * num_pages + token // _PAGE) * (2 * HALF))[:, None]
        place = places + ((table * _PAGE + token % _PAGE) * (2 * HALF))[:, None]
        first_a, first_b = load_planes(
            key_codes, key_scales, rows, is_token, 0, HALF, HALF_PADDED, HEAD_DIM, BITS, HALF_IS_WHOLE, tl.float32
        )
        second_a, second_b = load_planes(
            key_codes, key_scales, rows, is_token, HALF, HALF, HALF_PADDED, HEAD_DIM, BITS, HALF_IS_WHOLE, tl.float32
        )
        pair_a = plane_dims(0, HALF_PADDED, BITS, HALF_IS_WHOLE)
        pair_b = plane_dims(1, HALF_PADDED, BITS, HALF_IS_WHOLE)
        _store_turned(key_row, first_a, second_a, factor, page, place, pair_a, is_token2, HALF)
        _store_turned(key_row, first_b, second_b, factor, page, place, pair_b, is_token2, HALF)
    if REST > 0:
        rest_a, rest_b = load_planes(
            key_codes, key_scales, rows, is_token, 2 * HALF, REST, REST_PADDED, HEAD_DIM, BITS, REST_IS_WHOLE,
            tl.float32,
        )  # fmt: skip
        dim_a = plane_dims(0, REST_PADDED, BITS, REST_IS_WHOLE)
        dim_b = plane_dims(1, REST_PADDED, BITS, REST_IS_WHOLE)
        rest_a *= tl.load(factor + 2 * HALF + dim_a, mask=dim_a < REST, other=0.0)
        rest_b *= tl.load(factor + 2 * HALF + dim_b, mask=dim_b < REST, other=0.0)
        _store(key_row + 2 * HALF, rest_a, dim_a, is_token2, REST)
        _store(key_row + 2 * HALF, rest_b, dim_b, is_token2, REST)
    value_a, value_b = load_planes(
        value_codes, value_scales, rows, is_token, 0, HEAD_DIM, DIM_PADDED, HEAD_DIM, BITS, True, tl.float32
    )
    _store(value_row, value_a, plane_dims(0, DIM_PADDED, BITS, True), is_token2, HEAD_DIM)
    _store(value_row, value_b, plane_dims(1, DIM_PADDED, BITS, True), is_token2, HEAD_DIM)


@triton.jit
def _store_turned(
    row: tl.tensor,
    first: tl.tensor,
    second: tl.tensor,
    factor: tl.tensor,
    page: tl.tensor,
    place: tl.tensor,
    pair: tl.tensor,
    is_token: tl.tensor,
    HALF: constexpr,
) -> None:
    """One plane of both halves of keys, times their factor, turned by the angles of their pages and places."""
    is_pair = pair < HALF
    mask = is_token & is_pair
    first *= tl.load(factor + pair, mask=is_pair, other=0.0)
    second *= tl.load(factor + HALF + pair, mask=is_pair, other=0.0)
    cos, sin = tl.load(page + pair, mask=mask, other=0.0), tl.load(page + HALF + pair, mask=mask, other=0.0)
    first, second = turn(first, second, cos, sin)
    cos, sin = tl.load(place + pair, mask=mask, other=0.0), tl.load(place + HALF + pair, mask=mask, other=0.0)
    first, second = turn(first, second, cos, sin)
    _store(row, first, pair, is_token, HALF)
    _store(row + HALF, second, pair, is_token, HALF)


@triton.jit
def _store(row: tl.tensor, numbers: tl.tensor, dims: tl.tensor, is_token: tl.tensor, WIDTH: constexpr) -> None:
    tl.store(row + dims, numbers.to(row.dtype.element_ty), mask=is_token & (dims < WIDTH))


def _sequences(step: StepLayout) -> Iterator[Prompt]:
    first = 0
    for sequence, (num_queries, length) in enumerate(step.lengths):
        yield Prompt(sequence, first, num_queries, length)
        first += num_queries


def _scratch(step: StepLayout, shape: tuple[int, int, int, int], dtype: torch.dtype) -> Tensor:
    """Room for numbers of this shape: what the step brings along, if that is enough."""
    device, num_bytes = step.slots.device, dtype.itemsize * shape[0] * shape[1] * shape[2] * shape[3]
    if step.scratch is None or step.scratch.numel() < num_bytes:
        return torch.empty(shape, dtype=dtype, device=device)
    return step.scratch[:num_bytes].view(dtype).view(shape)


def _has_flash(queries: Tensor) -> bool:
    """Whether torch's flash attention takes queries; on a CPU, where nothing is held back, its plain attention does."""
    is_half = queries.dtype != torch.float32
    return queries.is_cpu or (is_half and (queries.is_meta or _card_has_flash(queries.device)))


@functools.cache
def _card_has_flash(device: torch.device) -> bool:
    is_built = torch.backends.cuda.is_flash_attention_available()
    return is_built and torch.cuda.get_device_capability(device) >= _FLASH_CAPABILITY
