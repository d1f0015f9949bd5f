"""The quantized matrices of experts on a card, one below the other: a kernel finds each of them by numbers there."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from functools import reduce
from operator import or_

import torch
import torch.nn.functional as F
from torch import Tensor

from tightrope.kernels.forms.columns import BLOCK, NUMBERS, ColumnMatrix


@dataclass(frozen=True, slots=True)
class ColumnStack:
    """Matrices of the same inputs and outputs, one below the other in `matrix`.

    Of its shares each expert has as many, one expert's after the other's, filled up with shares of no blocks; they tell
    words and blocks of the whole stack, as `group_of` does groups. `source` is there always.
    """

    matrix: ColumnMatrix
    num_experts: int


def stack_columns(matrices: Sequence[ColumnMatrix]) -> tuple[ColumnStack, tuple[ColumnMatrix, ...]] | None:
    """The stack of matrices, and each of them again as a part of it, so that nothing is in memory twice.

    None where they can't be stacked: sizes, or kinds of scales, zero points or books differ, or scales have units.
    """
    first = matrices[0]
    if any(_kind(matrix) != _kind(first) for matrix in matrices) or not have_one_book(matrices):
        return None
    if first.scaling != NUMBERS:
        return None
    most = max(len(matrix.shares) for matrix in matrices)
    shares, groups = [], []
    word = block = group = 0
    for matrix in matrices:
        offsets = torch.tensor([0, block, block, word], dtype=torch.int32, device=matrix.shares.device)
        shares.append(F.pad(matrix.shares + offsets, (0, 0, 0, most - len(matrix.shares))))
        groups.append(matrix.group_of + group)
        word, block, group = word + len(matrix.words), block + len(matrix.group_of), group + num_groups(matrix)
    whole = replace(
        first,
        widths=reduce(or_, (matrix.widths for matrix in matrices)),
        words=torch.cat([matrix.words for matrix in matrices]),
        source=torch.cat([source_of(matrix) for matrix in matrices]),
        group_of=torch.cat(groups),
        shares=torch.cat(shares),
        scales=joined([matrix.scales for matrix in matrices]),
        scale_codes=joined([matrix.scale_codes for matrix in matrices]),
        group_max=joined([matrix.group_max for matrix in matrices]),
        zeros=joined([matrix.zeros for matrix in matrices]),
        mins=joined([matrix.mins for matrix in matrices]),
    )
    return ColumnStack(whole, len(matrices)), tuple(_parts(whole, matrices))


def _kind(matrix: ColumnMatrix) -> tuple[object, ...]:
    return matrix.num_inputs, matrix.num_outputs, *kinds_of_tensors(matrix)


def kinds_of_tensors(matrix: ColumnMatrix) -> tuple[torch.dtype | None, ...]:
    """What must be the same, beside the inputs and the book, for a kernel to read two matrices alike."""
    tensors = (matrix.scales, matrix.scale_codes, matrix.group_max, matrix.zeros, matrix.mins)
    return tuple(None if tensor is None else tensor.dtype for tensor in tensors)


def have_one_book(matrices: Sequence[ColumnMatrix]) -> bool:
    """Whether the codes of all stand for the same numbers."""
    book = matrices[0].codebook
    if book is None:
        return all(matrix.codebook is None for matrix in matrices)
    books = [matrix.codebook for matrix in matrices]
    return all(other is not None and (other.is_meta or torch.equal(other, book)) for other in books)


def source_of(matrix: ColumnMatrix) -> Tensor:
    """ColumnMatrix.source, also where rows are in the order of the inputs."""
    rows = len(matrix.group_of) * BLOCK
    return torch.arange(rows, dtype=torch.int32, device=matrix.words.device) if matrix.source is None else matrix.source


def num_groups(matrix: ColumnMatrix) -> int:
    """Groups of rows that share a scale."""
    scales = matrix.scale_codes if matrix.scales is None else matrix.scales
    assert scales is not None
    return len(scales)


def joined(tensors: Sequence[Tensor | None]) -> Tensor | None:
    """All that are there, one below the other."""
    found = [tensor for tensor in tensors if tensor is not None]
    return torch.cat(found) if found else None


def _parts(whole: ColumnMatrix, matrices: Sequence[ColumnMatrix]) -> Iterator[ColumnMatrix]:
    """The matrices with the stack's memory for all that is large."""
    word = group = 0
    for matrix in matrices:
        words, groups = slice(word, word + len(matrix.words)), slice(group, group + num_groups(matrix))
        word, group = words.stop, groups.stop
        yield replace(
            matrix,
            words=whole.words[words],
            scales=None if whole.scales is None else whole.scales[groups],
            scale_codes=None if whole.scale_codes is None else whole.scale_codes[groups],
            group_max=None if whole.group_max is None else whole.group_max[groups],
            zeros=None if whole.zeros is None else whole.zeros[groups],
            mins=None if whole.mins is None else whole.mins[groups],
        )
