"""Quantized matrices that are nowhere in memory, as kernels of a card read them."""

from collections.abc import Sequence
from dataclasses import replace

import torch
from torch import Tensor

from tightrope.kernels.forms.columns import BLOCK, MEMBER_FIELDS, TILE_OUTPUTS, ColumnMatrix, share_out

GROUP_ROWS, NF4_ROWS = 128, 64  # that share a scale


def meta(*shape: int, dtype: torch.dtype = torch.float16) -> Tensor:
    return torch.empty(*shape, dtype=dtype, device="meta")


def matrix_of(
    kind: str, bits: Sequence[int], num_inputs: int, num_outputs: int, *, is_permuted: bool = False
) -> ColumnMatrix:
    """Of groups of as many widths as are in `bits`, again and again; its `shares` are there.

    kind: "gptq" has scales alone, "awq" zero points, too, "exl2" coded scales, "nf4" a book.
    """
    rows = NF4_ROWS if kind == "nf4" else GROUP_ROWS
    groups = num_inputs // rows
    own = sorted((bits[i % len(bits)] for i in range(groups)), reverse=True)
    widths, shares = share_out(own, [rows // BLOCK] * groups, -(-num_outputs // TILE_OUTPUTS))
    plain = ColumnMatrix(
        num_inputs,
        num_outputs,
        widths,
        meta(sum(own) * rows // 32, num_outputs, dtype=torch.int32),
        meta(num_inputs, dtype=torch.int32) if is_permuted else None,
        meta(num_inputs // BLOCK, dtype=torch.int32),
        shares,
        meta(1, MEMBER_FIELDS, dtype=torch.int32),
    )
    if kind == "exl2":
        codes = meta(groups, num_outputs, dtype=torch.uint8)
        return replace(plain, scale_codes=codes, group_max=meta(groups, dtype=torch.float32))
    if kind == "nf4":
        book = meta(16, dtype=torch.float32)
        return replace(plain, scales=meta(groups, num_outputs, dtype=torch.float32), codebook=book)
    zeros = meta(groups, num_outputs, dtype=torch.int16) if kind == "awq" else None
    return replace(plain, scales=meta(groups, num_outputs), zeros=zeros)
