"""Quantised matrices on CUDA, the launches.

One row, and a few, read the packed words once; the rows of the matrix are shared out to programs, whose sums a second
kernel adds up in a fixed order. For many rows slices of the matrix are expanded and multiplied by cuBLAS.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from tightrope.kernels.columns import TILE_OUTPUTS, ColumnMatrix
from tightrope.kernels.triton.quantized_batch import batch_parts, expand_columns
from tightrope.kernels.triton.quantized_vector import sum_parts, vector_parts

MOST_ROWS = 64  # that are multiplied without expanding the matrix
SLICE_BYTES = 32 << 20  # of a matrix that are expanded at a time

_DTYPES = {torch.float32: tl.float32, torch.float16: tl.float16, torch.bfloat16: tl.bfloat16}


def quantized_linear(x: Tensor, matrix: ColumnMatrix, bias: Tensor | None) -> Tensor:
    """x [T, K] of any float dtype times the matrix, and bias [N]: [T, N] of that dtype, summed in float32."""
    x = x.contiguous()
    if len(x) > MOST_ROWS:
        return _expanded_linear(x, matrix, bias)
    out = x.new_empty(len(x), matrix.num_outputs)
    if not len(x):
        return out
    num_shares, stride = len(matrix.shares), matrix.words.shape[1]
    parts = x.new_empty(num_shares, len(x), stride, dtype=torch.float32)
    num_tiles = -(-stride // TILE_OUTPUTS)
    if len(x) == 1:
        vector_parts[num_tiles, num_shares](
            x,
            parts,
            *_tensors(matrix),
            stride,
            WIDTHS=matrix.widths,
            BLOCKS=4,
            OUTPUTS=TILE_OUTPUTS,
            num_warps=4,
            enable_fp_fusion=True,
        )
    else:
        rows = 16 if len(x) <= 16 else 32
        batch_parts[num_tiles, num_shares, -(-len(x) // rows)](
            x,
            parts,
            *_tensors(matrix),
            len(x),
            matrix.num_inputs,
            stride,
            WIDTHS=matrix.widths,
            ROWS=rows,
            BLOCKS=16,
            OUTPUTS=TILE_OUTPUTS,
            DTYPE=_DTYPES[x.dtype],
            num_warps=4,
            enable_fp_fusion=True,
        )
    outputs = 128
    sum_parts[-(-matrix.num_outputs // outputs), len(x)](
        parts,
        bias,
        out,
        num_shares,
        matrix.num_outputs,
        parts.stride(0),
        stride,
        PARTS_PADDED=triton.next_power_of_2(num_shares),
        OUTPUTS=outputs,
        num_warps=4,
        enable_fp_fusion=True,
    )
    return out


def _expanded_linear(x: Tensor, matrix: ColumnMatrix, bias: Tensor | None) -> Tensor:
    out = x.new_empty(len(x), matrix.num_outputs)
    width = max(TILE_OUTPUTS, SLICE_BYTES // (matrix.num_inputs * x.element_size()) // TILE_OUTPUTS * TILE_OUTPUTS)
    for first in range(0, matrix.num_outputs, width):
        weight = expand(matrix, x.dtype, first, min(width, matrix.num_outputs - first))
        torch.mm(x, weight, out=out[:, first : first + width])
    return out if bias is None else out.add_(bias)


def expand(matrix: ColumnMatrix, dtype: torch.dtype, first: int = 0, count: int | None = None) -> Tensor:
    """The weights [K, count] of `count` outputs from `first` on."""
    count = matrix.num_outputs - first if count is None else count
    weight = torch.empty(matrix.num_inputs, count, dtype=dtype, device=matrix.words.device)
    expand_columns[-(-count // TILE_OUTPUTS), len(matrix.shares)](
        weight,
        *_tensors(matrix),
        first,
        count,
        matrix.words.shape[1],
        WIDTHS=matrix.widths,
        BLOCKS=4,
        OUTPUTS=TILE_OUTPUTS,
        num_warps=4,
        enable_fp_fusion=False,  # each weight is rounded as the reference rounds it
    )
    return weight


def _tensors(matrix: ColumnMatrix) -> tuple[Tensor | None, ...]:
    """A matrix's tensors in the order in which the kernels take them."""
    scales = matrix.scales if matrix.scales is not None else matrix.scale_codes
    return (
        matrix.words,
        matrix.source,
        matrix.group_of,
        matrix.shares,
        scales,
        matrix.group_max,
        matrix.zeros,
        matrix.codebook,
    )
