"""Mixtures of experts on CUDA: which experts run is said by a table on the card, so that no launch waits for the host.

Places are the picks of all tokens, token after token. The table shares them out to tiles, each of up to ROWS places of
one expert; there are as many tiles as any picks could need, and those that are left over end at once.
"""

from collections.abc import Callable

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.language import constexpr

from tightrope.kernels.forms.column_stack import ColumnStack
from tightrope.kernels.forms.layer import StackedExperts
from tightrope.kernels.forms.quantized import TILE
from tightrope.kernels.triton.jit import kernel
from tightrope.kernels.triton.pointwise import gated
from tightrope.kernels.triton.quantized import BATCH_OUTPUTS, add_parts, columns_of, operands
from tightrope.kernels.triton.quantized_batch import multiply_blocks
from tightrope.kernels.triton.quantized_tile import load_share

_TILE = constexpr(TILE)

ROWS = 16  # A tile has so many places.
PLACES = 64  # A program of the table looks at so many places together.
PLAIN_OUTPUTS, PLAIN_INPUTS = 32, 128  # A program of plain weights takes so many, and so many at a time.


def experts(
    x: Tensor, layer: StackedExperts, picked: Tensor, shares: Tensor, gather: Callable[[Tensor], Tensor] | None = None
) -> Tensor:
    """See kernels.dispatch.experts; x [T, K] and the result are of any float dtype."""
    tokens, each = picked.shape
    tiles = share_out(picked, layer.num_experts)
    gates = gated(_times(x.contiguous(), layer.gate_up, tiles, tokens * each, each), layer.activation)
    gates = gates if gather is None else gather(gates)
    mixed = _times(gates, layer.down, tiles, tokens * each, 1)
    return torch.bmm(shares.to(x.dtype).unsqueeze(1), mixed.view(tokens, each, -1)).squeeze(1)


def share_out(picked: Tensor, num_experts: int) -> Tensor:
    """The table [tiles, 1 + ROWS] int32 for picks [T, k] int64: a tile's expert and its places, -1 where none is."""
    num_places = picked.numel()
    most = min(num_places, num_experts + num_places // ROWS)
    tiles = torch.full((most, 1 + ROWS), -1, dtype=torch.int32, device=picked.device)
    _share_out[triton.cdiv(num_places, PLACES),](
        picked.contiguous(),
        tiles,
        num_places,
        ROWS=ROWS,
        PLACES=PLACES,
        EXPERTS=triton.next_power_of_2(num_experts),
        enable_fp_fusion=True,
    )
    return tiles


@kernel
def _share_out(
    picked: tl.tensor,
    tiles: tl.tensor,
    num_places: int,
    ROWS: constexpr,
    PLACES: constexpr,
    EXPERTS: constexpr,
) -> None:
    own = tl.program_id(0) * PLACES + tl.arange(0, PLACES)
    mine = tl.load(picked + own, mask=own < num_places, other=-1)
    experts = tl.arange(0, EXPERTS)
    rank = tl.zeros((PLACES,), tl.int32)  # It is the rank of a place among those of its expert.
    counts = tl.zeros((EXPERTS,), tl.int32)
    for first in range(0, num_places, PLACES):
        places = first + tl.arange(0, PLACES)
        theirs = tl.load(picked + places, mask=places < num_places, other=-2)
        is_before = (mine[:, None] == theirs[None, :]) & (places[None, :] < own[:, None])
        rank += tl.sum(is_before.to(tl.int32), 1)
        counts += tl.sum((theirs[:, None] == experts[None, :]).to(tl.int32), 0)
    whole = (counts + ROWS - 1) // ROWS  # Each expert has so many tiles.
    before = tl.sum(tl.where(experts[None, :] < mine[:, None], whole[None, :], 0), 1)
    at = tiles + (before + rank // ROWS) * (1 + ROWS)
    tl.store(at, mine.to(tl.int32), mask=own < num_places)
    tl.store(at + 1 + rank % ROWS, own, mask=own < num_places)


def _times(x: Tensor, weights: Tensor | tuple[ColumnStack, ...], tiles: Tensor, num_places: int, each: int) -> Tensor:
    """[P, N]: for each place row place / each of x, times its expert's weights."""
    if isinstance(weights, Tensor):
        return _times_plain(x, weights, tiles, num_places, each)
    out = x.new_empty(num_places, sum(stack.matrix.num_outputs for stack in weights))
    end = 0
    for stack in weights:
        begin, end = end, end + stack.matrix.num_outputs
        _times_stack(x, stack, tiles, out[:, begin:end], each)
    return out


def _times_stack(x: Tensor, stack: ColumnStack, tiles: Tensor, out: Tensor, each: int) -> None:
    matrix = stack.matrix
    num_shares = len(matrix.shares) // stack.num_experts
    stride = matrix.words.shape[1]
    parts = x.new_empty(num_shares, len(out), stride, dtype=torch.float32)
    grouped_parts[triton.cdiv(stride, BATCH_OUTPUTS), num_shares, len(tiles)](
        x,
        parts,
        tiles,
        *columns_of(matrix),
        len(out),
        len(x),
        matrix.num_inputs,
        stride // TILE,
        each,
        WIDTHS=matrix.widths,
        SCALING=matrix.scaling,
        ROWS=ROWS,
        OUTPUTS=BATCH_OUTPUTS,
        DTYPE=operands(x),
        num_warps=4,
        num_stages=1,  # The kernel itself loads ahead, into registers.
        enable_fp_fusion=True,
    )
    add_parts(parts, None, out)


@kernel
def grouped_parts(
    x: tl.tensor,
    parts: tl.tensor,
    tiles: tl.tensor,
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
    num_places: int,
    num_rows: int,
    num_inputs: int,
    num_tiles: int,
    each: int,
    WIDTHS: constexpr,
    SCALING: constexpr,
    ROWS: constexpr,
    OUTPUTS: constexpr,
    DTYPE: constexpr,
) -> None:
    """parts [S, P, N] float32: what each share of the stored rows of a place's expert adds to the place's outputs."""
    tile = tiles + tl.program_id(2) * (1 + ROWS)
    expert = tl.load(tile)
    if expert >= 0:
        places = tl.load(tile + 1 + tl.arange(0, ROWS))
        is_place = places >= 0
        tokens = tl.where(is_place, places // each, num_rows)
        share, stride = tl.program_id(1), num_tiles * _TILE
        bits, first, end, word = load_share(shares, expert * tl.num_programs(1) + share)
        first_column = tl.program_id(0) * OUTPUTS
        columns = first_column + tl.arange(0, OUTPUTS)
        total = tl.zeros((OUTPUTS, ROWS), tl.float32)
        for BITS in tl.static_range(2, 9):
            if (WIDTHS >> BITS) & 1:  # noqa: SIM102  decided when it is compiled, and the next one when it runs
                if bits == BITS:
                    total = multiply_blocks(
                        x, words, source, group_of, scales, scale_codes, group_max, zeros, mins, codebook, first, end,
                        word, first_column, tokens, num_rows, num_inputs, stride, BITS, SCALING, OUTPUTS, DTYPE,
                    )  # fmt: skip
        at = parts + (share * num_places + places)[None, :].to(tl.int64) * stride + columns[:, None]
        tl.store(at, total, mask=is_place[None, :] & (columns < stride)[:, None])


def _times_plain(x: Tensor, weight: Tensor, tiles: Tensor, num_places: int, each: int) -> Tensor:
    _, num_outputs, num_inputs = weight.shape
    out = x.new_empty(num_places, num_outputs)
    x = x.to(weight.dtype)
    grouped_plain[triton.cdiv(num_outputs, PLAIN_OUTPUTS), len(tiles)](
        x,
        out,
        tiles,
        weight,
        each,
        NUM_INPUTS=num_inputs,
        NUM_OUTPUTS=num_outputs,
        ROWS=ROWS,
        OUTPUTS=PLAIN_OUTPUTS,
        INPUTS=PLAIN_INPUTS,
        DTYPE=operands(x),
        num_warps=4,
        enable_fp_fusion=True,
    )
    return out


@kernel
def grouped_plain(
    x: tl.tensor,
    out: tl.tensor,
    tiles: tl.tensor,
    weight: tl.tensor,
    each: int,
    NUM_INPUTS: constexpr,
    NUM_OUTPUTS: constexpr,
    ROWS: constexpr,
    OUTPUTS: constexpr,
    INPUTS: constexpr,
    DTYPE: constexpr,
) -> None:
    """out [P, N]: rows of x times the transpose of weight [E, N, K] of each place's expert."""
    tile = tiles + tl.program_id(1) * (1 + ROWS)
    expert = tl.load(tile).to(tl.int64)
    if expert >= 0:
        places = tl.load(tile + 1 + tl.arange(0, ROWS))
        is_place = places >= 0
        columns = tl.program_id(0) * OUTPUTS + tl.arange(0, OUTPUTS)
        at_x = x + (places // each).to(tl.int64)[:, None] * NUM_INPUTS
        at_weight = weight + (expert * NUM_OUTPUTS + columns)[None, :] * NUM_INPUTS
        total = tl.zeros((ROWS, OUTPUTS), tl.float32)
        for first in range(0, NUM_INPUTS, INPUTS):
            k = first + tl.arange(0, INPUTS)
            is_input = k < NUM_INPUTS
            numbers = tl.load(at_x + k[None, :], mask=is_place[:, None] & is_input[None, :], other=0.0)
            mask = is_input[:, None] & (columns < NUM_OUTPUTS)[None, :]
            weights = tl.load(at_weight + k[:, None], mask=mask, other=0.0)
            total = tl.dot(numbers.to(DTYPE), weights.to(DTYPE), total, input_precision="ieee")
        at = out + places.to(tl.int64)[:, None] * NUM_OUTPUTS + columns[None, :]
        tl.store(at, total.to(out.dtype.element_ty), mask=is_place[:, None] & (columns < NUM_OUTPUTS)[None, :])
