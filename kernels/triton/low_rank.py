"""Low-rank additions on CUDA: rows with other adapters, or none, cost a program that ends at once."""

from collections.abc import Mapping

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.language import constexpr

from tightrope.kernels import reference
from tightrope.kernels.forms.low_rank import AdapterRows, LowRank

FEW = 64  # rows; more are left to cuBLAS, adapter by adapter
INPUTS = 256  # of K at a time
OUTPUTS = 256  # of a program


@triton.jit
def _shrink(
    x: tl.tensor,
    down: tl.tensor,
    inner: tl.tensor,
    slots: tl.tensor,
    scales: tl.tensor,
    slot: tl.tensor,
    num_inputs: tl.tensor,
    rank: tl.tensor,
    RANKS: constexpr,
    BLOCK: constexpr,
) -> None:
    row = tl.program_id(0).to(tl.int64)
    if tl.load(slots + row) == slot:
        ranks = tl.program_id(1) * RANKS + tl.arange(0, RANKS)
        acc = tl.zeros((RANKS,), tl.float32)
        for start in range(0, num_inputs, BLOCK):
            k = start + tl.arange(0, BLOCK)
            mine = tl.load(x + row * num_inputs + k, mask=k < num_inputs, other=0.0).to(tl.float32)
            mask = (ranks < rank)[:, None] & (k < num_inputs)[None, :]
            part = tl.load(down + ranks[:, None].to(tl.int64) * num_inputs + k[None, :], mask=mask, other=0.0)
            acc += tl.sum(part.to(tl.float32) * mine[None, :], 1)
        tl.store(inner + row * rank + ranks, acc * tl.load(scales + row), mask=ranks < rank)


@triton.jit
def _expand(
    inner: tl.tensor,
    up: tl.tensor,
    out: tl.tensor,
    slots: tl.tensor,
    slot: tl.tensor,
    first: tl.tensor,
    num_outputs: tl.tensor,
    stride: tl.tensor,
    rank: tl.tensor,
    BLOCK: constexpr,
) -> None:
    row = tl.program_id(0).to(tl.int64)
    if tl.load(slots + row) == slot:
        n = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
        mask = n < num_outputs
        acc = tl.zeros((BLOCK,), tl.float32)
        for r in range(rank):
            weights = tl.load(up + r * num_outputs.to(tl.int64) + n, mask=mask, other=0.0)
            acc += weights.to(tl.float32) * tl.load(inner + row * rank + r)
        at = out + row * stride + first + n
        tl.store(at, (tl.load(at, mask=mask, other=0.0).to(tl.float32) + acc).to(out.dtype.element_ty), mask=mask)


def add_low_rank(out: Tensor, x: Tensor, adapters: Mapping[int, LowRank], rows: AdapterRows) -> None:
    """See kernels.reference; out [T, N] has its outputs side by side."""
    if len(x) > FEW:
        reference.add_low_rank(out, x, adapters, rows)
        return
    x = x.contiguous()
    assert out.stride(1) == 1
    for slot in rows.present:
        for part in adapters[slot].parts if slot in adapters else ():
            rank, num_outputs = part.up.shape
            inner = torch.empty(len(x), rank, dtype=torch.float32, device=x.device)
            ranks = min(16, triton.next_power_of_2(rank))
            _shrink[len(x), triton.cdiv(rank, ranks)](
                x,
                part.down,
                inner,
                rows.slots,
                rows.scales,
                slot,
                x.shape[1],
                rank,
                RANKS=ranks,
                BLOCK=INPUTS,
                enable_fp_fusion=True,
            )
            _expand[len(x), triton.cdiv(num_outputs, OUTPUTS)](
                inner,
                part.up,
                out,
                rows.slots,
                slot,
                part.first,
                num_outputs,
                out.stride(0),
                rank,
                BLOCK=OUTPUTS,
                enable_fp_fusion=True,
            )
