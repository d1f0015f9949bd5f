"""Quantized matrices of a card side by side as one, which one launch multiplies.

Their inputs are the same, but each may have groups, widths and an order of inputs of its own, as the queries, keys and
values of an EXL2 model have.
"""

from collections.abc import Sequence
from dataclasses import replace
from functools import reduce
from operator import or_

import torch
import torch.nn.functional as F
from torch import Tensor

from tightrope.kernels.forms.column_stack import have_one_book, joined, kinds_of_tensors, num_groups, source_of
from tightrope.kernels.forms.columns import BLOCK, MEMBER_FIELDS, NUMBERS, ColumnMatrix
from tightrope.kernels.forms.quantized import TILE

FOUR = 4  # Numbers of 32 bits that kernels read together, as they find them aligned.


def join_columns(matrices: Sequence[ColumnMatrix]) -> tuple[ColumnMatrix, ...]:
    """One matrix of several, or these as they are where a kernel can't read them alike.

    Each must end with a whole tile, but for the last. Where they are joined nothing is in memory twice.
    """
    first = matrices[0]
    are_alike = all(kinds_of_tensors(matrix) == kinds_of_tensors(first) for matrix in matrices)
    are_whole = all(matrix.num_outputs == matrix.num_tiles * TILE for matrix in matrices[:-1])
    if len(matrices) == 1 or not are_alike or not are_whole or not have_one_book(matrices) or first.scaling != NUMBERS:
        return tuple(matrices)
    most = max(len(matrix.shares) for matrix in matrices)
    has_source = any(matrix.source is not None for matrix in matrices)
    whole = ColumnMatrix(
        first.num_inputs,
        sum(matrix.num_outputs for matrix in matrices),
        reduce(or_, (matrix.widths for matrix in matrices)),
        torch.cat([matrix.words.flatten() for matrix in matrices]),
        torch.cat([_filled(source_of(matrix), FOUR * BLOCK, -1) for matrix in matrices]) if has_source else None,
        torch.cat([_filled(matrix.group_of, FOUR) for matrix in matrices]),
        torch.cat([F.pad(matrix.shares, (0, 0, 0, most - len(matrix.shares))) for matrix in matrices]),
        _members(matrices).to(first.words.device),
        scales=_flat([matrix.scales for matrix in matrices]),
        scale_codes=_flat([matrix.scale_codes for matrix in matrices]),
        group_max=joined([None if m.group_max is None else _filled(m.group_max, FOUR) for m in matrices]),
        zeros=_flat([matrix.zeros for matrix in matrices]),
        mins=_flat([matrix.mins for matrix in matrices]),
        codebook=first.codebook,
    )
    return (replace(whole, parts=_parts(whole, matrices)),)


def _members(matrices: Sequence[ColumnMatrix]) -> Tensor:
    """ColumnMatrix.members."""
    rows, at = [], [0] * (MEMBER_FIELDS - 1)
    for matrix in matrices:
        rows.append((*at, matrix.num_tiles))
        groups = num_groups(matrix)
        whole = -(-len(matrix.group_of) // FOUR) * FOUR, -(-groups // FOUR) * FOUR
        sizes = matrix.num_tiles, matrix.words.numel() // TILE, groups * matrix.num_tiles, *whole
        at = [begin + size for begin, size in zip(at, sizes, strict=True)]
    return torch.tensor(rows, dtype=torch.int32)


def _filled(rows: Tensor, count: int, number: int = 0) -> Tensor:
    """rows [R] filled up to a multiple of `count`, so that what follows them is aligned as they are."""
    return F.pad(rows, (0, -len(rows) % count), value=number)


def _flat(tensors: Sequence[Tensor | None]) -> Tensor | None:
    return joined([None if tensor is None else tensor.flatten() for tensor in tensors])


def _parts(whole: ColumnMatrix, matrices: Sequence[ColumnMatrix]) -> tuple[ColumnMatrix, ...]:
    """The matrices in the memory of the whole."""
    parts, word, number, block, group, share = [], 0, 0, 0, 0, 0
    most = len(whole.shares) // len(matrices)
    for matrix in matrices:
        words = word, word + matrix.words.numel()
        groups, blocks = num_groups(matrix), len(matrix.group_of)
        numbers = number, number + groups * matrix.num_tiles * TILE
        parts.append(
            replace(
                matrix,
                words=whole.words[slice(*words)].view(matrix.words.shape),
                source=None if whole.source is None else whole.source[block * BLOCK :][: blocks * BLOCK],
                group_of=whole.group_of[block : block + blocks],
                shares=whole.shares[share : share + most],
                group_max=None if whole.group_max is None else whole.group_max[group : group + groups],
                scales=_like(whole.scales, matrix.scales, *numbers),
                scale_codes=_like(whole.scale_codes, matrix.scale_codes, *numbers),
                zeros=_like(whole.zeros, matrix.zeros, *numbers),
                mins=_like(whole.mins, matrix.mins, *numbers),
            )
        )
        word, number, share = words[1], numbers[1], share + most
        block, group = block - (-blocks // FOUR) * FOUR, group - (-groups // FOUR) * FOUR
    return tuple(parts)


def _like(flat: Tensor | None, own: Tensor | None, begin: int, end: int) -> Tensor | None:
    return None if flat is None or own is None else flat[begin:end].view(own.shape)
