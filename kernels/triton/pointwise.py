"""The small kernels of a layer on CUDA: turning queries, root mean square, gated activation; float32 inside."""

import math

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.language import constexpr

from tightrope.kernels.forms.layout import PAGE, RopeTable, StepLayout
from tightrope.kernels.triton.jit import kernel

_PAGE = constexpr(PAGE)
_SQRT_HALF = constexpr(math.sqrt(0.5))
_GELU = constexpr(2 * math.sqrt(2 / math.pi))

BLOCK = 1024  # A program takes so many columns of the gated activation.


@kernel
def _rotate(
    x: tl.tensor,
    out: tl.tensor,
    positions: tl.tensor,
    sequence_of: tl.tensor,
    pages: tl.tensor,
    places: tl.tensor,
    set_of: tl.tensor,
    query_scale: tl.tensor,
    num_pages: int,
    heads_apart: int,
    NUM_HEADS: constexpr,
    HEADS_PADDED: constexpr,
    HEAD_DIM: constexpr,
    HALF: constexpr,
    HALF_PADDED: constexpr,
    REST_PADDED: constexpr,
) -> None:
    token = tl.program_id(0).to(tl.int64)
    table = tl.load(set_of + tl.load(sequence_of + token)).to(tl.int64)
    position = tl.load(positions + token)
    scale = tl.load(query_scale + table)
    pair = tl.arange(0, HALF_PADDED)[None, :]
    page = pages + (table * num_pages + position // _PAGE) * (2 * HALF) + pair
    place = places + (table * _PAGE + position % _PAGE) * (2 * HALF) + pair
    head = tl.arange(0, HEADS_PADDED)[:, None]
    source, target = x + (token * heads_apart + head) * HEAD_DIM, out + (token * NUM_HEADS + head) * HEAD_DIM
    mask = (head < NUM_HEADS) & (pair < HALF)
    first = tl.load(source + pair, mask=mask, other=0.0).to(tl.float32)
    second = tl.load(source + HALF + pair, mask=mask, other=0.0).to(tl.float32)
    first, second = _turn(first, second, page, pair < HALF, HALF)
    first, second = _turn(first, second, place, pair < HALF, HALF)
    tl.store(target + pair, (first * scale).to(out.dtype.element_ty), mask=mask)
    tl.store(target + HALF + pair, (second * scale).to(out.dtype.element_ty), mask=mask)
    if HEAD_DIM > 2 * HALF:
        dim = 2 * HALF + tl.arange(0, REST_PADDED)[None, :]
        mask = (head < NUM_HEADS) & (dim < HEAD_DIM)
        tl.store(target + dim, tl.load(source + dim, mask=mask), mask=mask)


@triton.jit
def _turn(
    first: tl.tensor, second: tl.tensor, angle: tl.tensor, mask: tl.tensor, HALF: constexpr
) -> tuple[tl.tensor, tl.tensor]:
    cos, sin = tl.load(angle, mask=mask, other=0.0), tl.load(angle + HALF, mask=mask, other=0.0)
    return first * cos - second * sin, second * cos + first * sin


def rotate(x: Tensor, step: StepLayout, table: RopeTable) -> Tensor:
    """kernels.reference.rotate for x [T, H, D] of any float dtype, which the result has too."""
    num_tokens, num_heads, head_dim = x.shape
    half = table.places.shape[-1]
    if x.stride(2) != 1 or x.stride(1) != head_dim or x.stride(0) % head_dim:
        x = x.contiguous()
    out = torch.empty(x.shape, dtype=x.dtype, device=x.device)
    if num_tokens:
        _rotate[num_tokens,](
            x,
            out,
            step.positions,
            step.sequence_of,
            table.pages,
            table.places,
            table.set_of,
            table.query_scale,
            table.pages.shape[1],
            x.stride(0) // head_dim,
            NUM_HEADS=num_heads,
            HEADS_PADDED=triton.next_power_of_2(num_heads),
            HEAD_DIM=head_dim,
            HALF=half,
            HALF_PADDED=triton.next_power_of_2(half),
            REST_PADDED=triton.next_power_of_2(max(1, head_dim - 2 * half)),
            enable_fp_fusion=True,
        )
    return out


@kernel
def _rms_norm(
    x: tl.tensor,
    weight: tl.tensor,
    out: tl.tensor,
    eps: float,
    num_rows: int,
    HEAD_DIM: constexpr,
    PADDED: constexpr,
    ROWS: constexpr,
) -> None:
    row = (tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS))[:, None]
    column = tl.arange(0, PADDED)[None, :]
    mask = (row < num_rows) & (column < HEAD_DIM)
    values = tl.load(x + row * HEAD_DIM + column, mask=mask, other=0.0).to(tl.float32)
    scale = tl.rsqrt(tl.sum(values * values, 1) / HEAD_DIM + eps)
    result = values * scale[:, None] * tl.load(weight + column, mask=column < HEAD_DIM, other=0.0).to(tl.float32)
    tl.store(out + row * HEAD_DIM + column, result.to(out.dtype.element_ty), mask=mask)


def rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """kernels.reference.rms_norm for x [..., D] of any float dtype, which the result has too."""
    dim = x.shape[-1]
    rows = x.reshape(-1, dim).contiguous()
    out = torch.empty(x.shape, dtype=x.dtype, device=x.device)
    padded = triton.next_power_of_2(dim)
    rows_each = max(1, 1024 // padded)  # Heads are short, so that a program takes several.
    if len(rows):
        _rms_norm[-(-len(rows) // rows_each),](
            rows,
            weight,
            out,
            eps,
            len(rows),
            HEAD_DIM=dim,
            PADDED=padded,
            ROWS=rows_each,
            num_warps=4 if padded <= 2048 else 8,
            enable_fp_fusion=True,
        )
    return out


@kernel
def _gated(gate_up: tl.tensor, out: tl.tensor, NUM_COLUMNS: constexpr, ACTIVATION: constexpr, BLOCK: constexpr) -> None:
    row = tl.program_id(0).to(tl.int64)
    column = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    mask = column < NUM_COLUMNS
    source = gate_up + row * 2 * NUM_COLUMNS + column
    gate = tl.load(source, mask=mask, other=0.0).to(tl.float32)
    up = tl.load(source + NUM_COLUMNS, mask=mask, other=0.0).to(tl.float32)
    if ACTIVATION == "silu":
        active = gate * tl.sigmoid(gate)
    elif ACTIVATION == "gelu":
        active = 0.5 * gate * (1 + tl.erf(gate * _SQRT_HALF))
    else:  # Since tanh(y) is 2 * sigmoid(2 * y) - 1, half of 1 + tanh(y) is a sigmoid.
        active = gate * tl.sigmoid((gate + 0.044715 * gate * gate * gate) * _GELU)
    tl.store(out + row * NUM_COLUMNS + column, (active * up).to(out.dtype.element_ty), mask=mask)


def gated(gate_up: Tensor, activation: str) -> Tensor:
    """kernels.reference.gated for gate_up [T, 2 * F] of any float dtype, which the result has too."""
    num_rows, num_columns = gate_up.shape[0], gate_up.shape[1] // 2
    out = gate_up.new_empty(num_rows, num_columns)
    if num_rows:
        grid = (num_rows, -(-num_columns // BLOCK))
        _gated[grid](
            gate_up.contiguous(),
            out,
            NUM_COLUMNS=num_columns,
            ACTIVATION=activation,
            BLOCK=BLOCK,
            enable_fp_fusion=True,
        )
    return out
