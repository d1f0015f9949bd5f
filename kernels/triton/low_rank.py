"""Low-rank additions on CUDA: each row finds its adapter's matrices by its slot, in a table on the card.

So a step launches the same whichever adapters its rows use, and can be recorded. Rows without one cost programs that
end at once.
"""

from collections.abc import Mapping

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.language import constexpr

from tightrope.kernels import reference
from tightrope.kernels.forms.low_rank import AdapterRows, LowRank, LowRankSlots, LowRankTable
from tightrope.kernels.triton.jit import are_aligned, kernel, multiple

FEW = 128  # A recorded step has no more rows; more are left to cuBLAS, adapter by adapter.
SHRINK_RANKS, INPUTS = 4, 1024  # A program takes so many ranks, and so much of K at a time.
EXPAND_RANKS, OUTPUTS = 16, 256  # A program takes so many ranks at a time, and so many outputs in all.

_DTYPES = {torch.float32: tl.float32, torch.float16: tl.float16, torch.bfloat16: tl.bfloat16}


@triton.jit
def _part_of(where: tl.tensor, slots: tl.tensor, num_slots: tl.tensor, row: tl.tensor) -> tuple[tl.tensor, tl.tensor]:
    """A program's entry of the table, by a row's slot and program_id(2), and the entry's rank: zero where none is."""
    slot = tl.load(slots + row)
    is_known = (slot >= 0) & (slot < num_slots)
    entry = where + (tl.where(is_known, slot, 0) * tl.num_programs(2) + tl.program_id(2)) * 5
    return entry, tl.where(is_known, tl.load(entry + 2), 0).to(tl.int32)


@kernel
def _shrink(
    x: tl.tensor,
    where: tl.tensor,
    inner: tl.tensor,
    slots: tl.tensor,
    scales: tl.tensor,
    num_slots: int,
    stride: int,
    num_inputs: int,
    IS_ALIGNED: constexpr,
    DTYPE: constexpr,
    RANKS: constexpr,
    BLOCK: constexpr,
) -> None:
    """inner [T, P, stride] float32: x [T, K] times down of each part of its row's adapter, scaled."""
    row = tl.program_id(0).to(tl.int64)
    entry, rank = _part_of(where, slots, num_slots, row)
    ranks = tl.program_id(1) * RANKS + tl.arange(0, RANKS)
    num_inputs = multiple(num_inputs, IS_ALIGNED)
    if tl.program_id(1) * RANKS < rank:
        down = tl.multiple_of(tl.load(entry).to(tl.pointer_type(DTYPE)), 16)
        acc = tl.zeros((RANKS, BLOCK), tl.float32)
        for start in range(0, num_inputs, BLOCK):
            k = start + tl.arange(0, BLOCK)
            mine = tl.load(x + row * num_inputs + k, mask=k < num_inputs, other=0.0).to(tl.float32)
            mask = (ranks < rank)[:, None] & (k < num_inputs)[None, :]
            part = tl.load(down + ranks[:, None].to(tl.int64) * num_inputs + k[None, :], mask=mask, other=0.0)
            acc += part.to(tl.float32) * mine[None, :]
        at = inner + (row * tl.num_programs(2) + tl.program_id(2)) * stride + ranks
        tl.store(at, tl.sum(acc, 1) * tl.load(scales + row), mask=ranks < rank)


@kernel
def _expand(
    inner: tl.tensor,
    where: tl.tensor,
    out: tl.tensor,
    slots: tl.tensor,
    num_slots: int,
    inner_stride: int,
    out_stride: int,
    DTYPE: constexpr,
    RANKS: constexpr,
    BLOCK: constexpr,
) -> None:
    """Add to out [T, N] what each part of its row's adapter makes of `inner`."""
    row = tl.program_id(0).to(tl.int64)
    entry, rank = _part_of(where, slots, num_slots, row)
    num_outputs = tl.load(entry + 4)
    if (rank > 0) & (tl.program_id(1) * BLOCK < num_outputs):
        up, first = tl.multiple_of(tl.load(entry + 1).to(tl.pointer_type(DTYPE)), 16), tl.load(entry + 3)
        n = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
        is_output = n < num_outputs
        at_inner = inner + (row * tl.num_programs(2) + tl.program_id(2)) * inner_stride
        acc = tl.zeros((BLOCK,), tl.float32)
        for start in range(0, rank, RANKS):
            ranks = start + tl.arange(0, RANKS)
            mine = tl.load(at_inner + ranks, mask=ranks < rank, other=0.0)
            mask = (ranks < rank)[:, None] & is_output[None, :]
            part = tl.load(up + ranks[:, None] * num_outputs + n[None, :], mask=mask, other=0.0)
            acc += tl.sum(part.to(tl.float32) * mine[:, None], 0)
        at = out + row * out_stride + first + n
        total = tl.load(at, mask=is_output, other=0.0).to(tl.float32) + acc
        tl.store(at, total.to(out.dtype.element_ty), mask=is_output)


def add_low_rank(out: Tensor, x: Tensor, adapters: Mapping[int, LowRank], rows: AdapterRows) -> None:
    """See kernels.reference; out [T, N] has its outputs side by side."""
    if len(x) > FEW:
        reference.add_low_rank(out, x, adapters, rows)
        return
    if not adapters or not len(x):
        return
    table = adapters.table if isinstance(adapters, LowRankSlots) else None
    if table is None:
        table = LowRankTable.of(adapters)
    x = x.contiguous()
    assert out.stride(1) == 1
    num_slots, num_parts, _ = table.where.shape
    inner = torch.empty(len(x), num_parts, table.most_rank, dtype=torch.float32, device=x.device)
    _shrink[len(x), triton.cdiv(table.most_rank, SHRINK_RANKS), num_parts](
        x,
        table.where,
        inner,
        rows.slots,
        rows.scales,
        num_slots,
        table.most_rank,
        x.shape[1],
        IS_ALIGNED=are_aligned(x.shape[1]),
        DTYPE=_DTYPES[table.dtype],
        RANKS=SHRINK_RANKS,
        BLOCK=INPUTS,
        enable_fp_fusion=True,
    )
    _expand[len(x), triton.cdiv(table.most_outputs, OUTPUTS), num_parts](
        inner,
        table.where,
        out,
        rows.slots,
        num_slots,
        table.most_rank,
        out.stride(0),
        DTYPE=_DTYPES[table.dtype],
        RANKS=EXPAND_RANKS,
        BLOCK=OUTPUTS,
        enable_fp_fusion=True,
    )
