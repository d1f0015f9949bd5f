"""Quantized matrices on CUDA, the launches.

One row, and a few, read the packed words once; the rows of the matrix are shared out to programs, whose sums a second
kernel adds up in a fixed order. For many rows slices of the matrix are expanded and multiplied by cuBLAS.
"""

from collections.abc import Sequence

import torch
import triton
import triton.language as tl
from torch import Tensor

from tightrope.kernels.forms.columns import MOST_ROWS, TILE_OUTPUTS, ColumnMatrix
from tightrope.kernels.forms.expanded import slice_outputs
from tightrope.kernels.forms.quantized import TILE
from tightrope.kernels.triton.quantized_batch import batch_parts, expand_columns
from tightrope.kernels.triton.quantized_vector import sum_parts, vector_parts

FEWEST_ROWS = (1, 2, 9, 17, MOST_ROWS + 1)  # Each kind of launch begins at so many rows.
BATCH_OUTPUTS = 128  # A program that multiplies several rows, or expands them, takes so many.
SUM_OUTPUTS = 128  # A program of the sum takes so many.
SUMMED = 16  # It adds up so many shares at a time.

_DTYPES = {torch.float32: tl.float32, torch.float16: tl.float16, torch.bfloat16: tl.bfloat16}


def quantized_linear(x: Tensor, matrices: Sequence[ColumnMatrix], bias: Tensor | None) -> Tensor:
    """x [T, K] of any float dtype times each of the matrices, side by side: [T, sum of their N] of that dtype.

    bias has the width of the result. Sums are float32, and always in the same order.
    """
    x = x.contiguous()
    out = x.new_empty(len(x), sum(matrix.num_outputs for matrix in matrices))
    end = 0
    for matrix in matrices:
        begin, end = end, end + matrix.num_outputs
        own_bias = None if bias is None else bias[begin:end]
        if len(x) > MOST_ROWS:
            _multiply_parts(x, matrix, own_bias, out[:, begin:end])
        elif len(x):
            _multiply(x, matrix, own_bias, out[:, begin:end])
    return out


def _multiply(x: Tensor, matrix: ColumnMatrix, bias: Tensor | None, out: Tensor) -> None:
    """x [T, K] times the matrix to `out` [T, N], whose rows may lie apart."""
    num_shares, num_tiles = matrix.num_shares, matrix.num_tiles
    parts = x.new_empty(num_shares, len(x), num_tiles * TILE, dtype=torch.float32)
    if len(x) == 1:
        vector_parts[matrix.num_programs(TILE_OUTPUTS), num_shares](
            x,
            parts,
            *columns_of(matrix),
            matrix.members,
            len(matrix.members),
            num_tiles,
            WIDTHS=matrix.widths,
            SCALING=matrix.scaling,
            BLOCKS=4,
            OUTPUTS=TILE_OUTPUTS,
            num_warps=4,
            enable_fp_fusion=True,
        )
    else:
        rows = min(32, max(8, triton.next_power_of_2(len(x))))  # A side of the matrix units takes at least eight.
        batch_parts[matrix.num_programs(BATCH_OUTPUTS), num_shares, -(-len(x) // rows)](
            x,
            parts,
            *columns_of(matrix),
            matrix.members,
            len(matrix.members),
            len(x),
            matrix.num_inputs,
            num_tiles,
            WIDTHS=matrix.widths,
            SCALING=matrix.scaling,
            ROWS=rows,
            OUTPUTS=BATCH_OUTPUTS,
            DTYPE=operands(x),
            num_warps=4,
            num_stages=1,  # The kernel itself loads ahead, into registers.
            enable_fp_fusion=True,
        )
    add_parts(parts, bias, out)


def add_parts(parts: Tensor, bias: Tensor | None, out: Tensor) -> None:
    """Add up the shares of parts [S, T, stride] float32 and bias [N] to `out` [T, N], whose rows may lie apart."""
    num_shares, num_rows, stride = parts.shape
    num_outputs = out.shape[1]
    sum_parts[triton.cdiv(num_outputs, SUM_OUTPUTS), num_rows](
        parts,
        bias,
        out,
        num_shares,
        num_outputs,
        stride // TILE,
        out.stride(0),
        PARTS=SUMMED,
        OUTPUTS=SUM_OUTPUTS,
        num_warps=4,
        enable_fp_fusion=True,
    )


def _multiply_parts(x: Tensor, matrix: ColumnMatrix, bias: Tensor | None, out: Tensor) -> None:
    """Each of the matrices that are joined, if they are, to its columns of `out`."""
    end = 0
    for part in matrix.parts or (matrix,):
        begin, end = end, end + part.num_outputs
        _multiply_expanded(x, part, None if bias is None else bias[begin:end], out[:, begin:end])


def _multiply_expanded(x: Tensor, matrix: ColumnMatrix, bias: Tensor | None, out: Tensor) -> None:
    operand = x.half() if sums_halves() and x.dtype == torch.bfloat16 else x
    width = slice_outputs(matrix.num_inputs, matrix.num_outputs, x.element_size())
    for first in range(0, matrix.num_outputs, width):
        weight = expand(matrix, operand.dtype, first, min(width, matrix.num_outputs - first))
        if operand.dtype == out.dtype:
            torch.mm(operand, weight, out=out[:, first : first + width])
        else:
            out[:, first : first + width] = operand @ weight
        del weight  # Else two would be there at a time.
    if bias is not None:
        out.add_(bias)


def sums_halves() -> bool:
    """Whether products of float16 numbers may be summed in float16: see dispatch.sum_in_float16."""
    return bool(torch.backends.cuda.matmul.allow_fp16_accumulation)


def expand(matrix: ColumnMatrix, dtype: torch.dtype, first: int = 0, count: int | None = None) -> Tensor:
    """The weights [K, count] of `count` outputs from `first` on, which begins a tile; rows are whole tiles apart."""
    assert first % TILE == 0
    count = matrix.num_outputs - first if count is None else count
    tiles = -(-count // TILE)
    weight = torch.empty(matrix.num_inputs, tiles * TILE, dtype=dtype, device=matrix.words.device)
    expand_columns[-(-count // BATCH_OUTPUTS), len(matrix.shares)](
        weight,
        *columns_of(matrix),
        first // TILE,
        count,
        tiles,
        matrix.words.shape[1] // TILE,
        WIDTHS=matrix.widths,
        SCALING=matrix.scaling,
        BLOCKS=4,
        OUTPUTS=BATCH_OUTPUTS,
        num_warps=4,
        enable_fp_fusion=False,  # Each weight is rounded as the reference rounds it.
    )
    return weight[:, :count]


def operands(x: Tensor) -> tl.dtype:
    """What numbers are multiplied as: x's dtype, where Triton can; its interpreter, on a CPU, can't in bfloat16."""
    return tl.float32 if x.dtype == torch.bfloat16 and x.is_cpu else _DTYPES[x.dtype]


def columns_of(matrix: ColumnMatrix) -> tuple[Tensor | None, ...]:
    """A matrix's tensors in the order in which the kernels take them."""
    scales, codes = matrix.scales, matrix.scale_codes
    return (
        matrix.words,
        matrix.source,
        matrix.group_of,
        matrix.shares,
        codes if scales is None else scales,
        None if scales is None else codes,
        matrix.group_max,
        matrix.zeros,
        matrix.mins,
        matrix.codebook,
    )
