"""The forms that a linear's weight takes in memory, and what each is multiplied by."""

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import reduce
from operator import or_
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from tightrope.kernels import dispatch
from tightrope.kernels.forms.column_join import join_columns
from tightrope.kernels.forms.column_stack import ColumnStack, stack_columns
from tightrope.kernels.forms.columns import ColumnMatrix, to_columns
from tightrope.kernels.forms.layer import Projection
from tightrope.kernels.forms.low_rank import LowRank
from tightrope.kernels.forms.quantized import TILE, Nf4Matrix, QuantizedMatrix, joined

Piece = Tensor | QuantizedMatrix | Nf4Matrix  # A tensor is [N, K].


@dataclass(frozen=True, slots=True)
class Quantized:
    """Integers with scales, several matrices side by side."""

    matrices: tuple[QuantizedMatrix, ...]

    def times(self, x: Tensor, bias: Tensor | None) -> Tensor:
        return dispatch.quantized_linear(x, self.matrices, bias)


@dataclass(frozen=True, slots=True)
class Nf4:
    """Codes of a book, several matrices side by side."""

    matrices: tuple[Nf4Matrix, ...]

    def times(self, x: Tensor, bias: Tensor | None) -> Tensor:
        return dispatch.nf4_linear(x, self.matrices, bias)


@dataclass(frozen=True, slots=True)
class Columns:
    """Quantized matrices of either kind on a card, side by side."""

    matrices: tuple[ColumnMatrix, ...]

    def times(self, x: Tensor, bias: Tensor | None) -> Tensor:
        return dispatch.column_linear(x, self.matrices, bias)


@dataclass(frozen=True, slots=True)
class Exllama:
    """EXL2 or GPTQ matrices run by exllamav2's own kernels, side by side."""

    matrices: tuple[dispatch.ExllamaMatrix, ...]

    def times(self, x: Tensor, bias: Tensor | None) -> Tensor:
        return dispatch.exllama_linear(x, self.matrices, bias)


@dataclass(frozen=True, slots=True)
class Mixed:
    """Several of different forms, as when a quantizer left one of a layer's projections as it was."""

    parts: tuple["Matrix", ...]

    def times(self, x: Tensor, bias: Tensor | None) -> Tensor:
        out = torch.cat([times(x, part, None) for part in self.parts], -1)
        return out if bias is None else out.add_(bias)


Matrix = Tensor | Quantized | Nf4 | Columns | Exllama | Mixed


def times(x: Tensor, weight: Matrix, bias: Tensor | None) -> Tensor:
    """x [T, K] times the weight: [T, N]."""
    if isinstance(weight, Tensor):
        return dispatch.linear(x, weight, bias)
    return weight.times(x, bias)


def rows_of(weight: Matrix, numbers: Tensor) -> Tensor:
    """Rows [..., K] of a weight [N, K] by their numbers [...] int64; float32 where it is quantized."""
    if isinstance(weight, Tensor):
        return F.embedding(numbers, weight)
    assert isinstance(weight, Quantized), "on a CPU tables are of integers, or plain"
    (matrix,) = weight.matrices
    return dispatch.quantized_rows(matrix, numbers.flatten()).view(*numbers.shape, -1)


def runs_exllama(weight: Matrix) -> bool:
    """Whether exllamav2 runs all of a weight, or a part of it."""
    return isinstance(weight, Exllama) or (isinstance(weight, Mixed) and any(map(runs_exllama, weight.parts)))


def projection(weight: Matrix, bias: Tensor | None, adapters: Mapping[int, LowRank]) -> Projection | None:
    """A linear as a whole layer's kernel has it; None for forms that it doesn't know."""
    if isinstance(weight, Tensor):
        return Projection(weight, bias, adapters)
    return Projection(weight.matrices, bias, adapters) if isinstance(weight, Quantized | Nf4) else None


def stacked(weights: Tensor | Sequence[Matrix]) -> tuple[Tensor | tuple[ColumnStack, ...], Sequence[Matrix]] | None:
    """Experts' weights on a card as one kernel runs all of them, and each expert's, in the same memory.

    None elsewhere, and for forms that it doesn't know.
    """
    if isinstance(weights, Tensor):
        return (weights, list(weights)) if dispatch.reads_columns(weights.device) else None
    columns = [weight.matrices for weight in weights if isinstance(weight, Columns)]
    if len(columns) < len(weights) or len({len(matrices) for matrices in columns}) > 1:
        return None
    found = [stack_columns(matrices) for matrices in zip(*columns, strict=True)]
    known = [one for one in found if one is not None]
    if len(known) < len(found):
        return None
    parts = zip(*(parts for _, parts in known), strict=True)
    return tuple(stack for stack, _ in known), [Columns(matrices) for matrices in parts]


def widths_of(weights: Iterable[Matrix]) -> int:
    """All widths of quantized matrices on a card, as ColumnMatrix.widths tells them."""
    return reduce(or_, (matrix.widths for weight in weights for matrix in _columns(weight)), 0)


def read_by(weight: Matrix, widths: int) -> Matrix:
    """The same, read by the kernel that knows these widths, which are its own and perhaps others."""
    if isinstance(weight, Columns):
        return Columns(tuple(_with_widths(matrix, widths) for matrix in weight.matrices))
    if isinstance(weight, Mixed):
        return Mixed(tuple(read_by(part, widths) for part in weight.parts))
    return weight


def _with_widths(matrix: ColumnMatrix, widths: int) -> ColumnMatrix:
    return replace(matrix, widths=widths, parts=tuple(_with_widths(part, widths) for part in matrix.parts))


def _columns(weight: Matrix) -> Iterator[ColumnMatrix]:
    if isinstance(weight, Columns):
        yield from weight.matrices
    elif isinstance(weight, Mixed):
        for part in weight.parts:
            yield from _columns(part)


def side_by_side(
    pieces: Sequence[Piece], device: torch.device, *, is_expert: bool = False, all_outputs: int = 0
) -> Matrix:
    """One matrix, on `device`, of pieces that have the same inputs, their outputs one after the other.

    Those of experts stay with our kernels, one of which runs all experts at once. all_outputs: of all ranks, where the
    pieces are one's: on a card it decides by how many sums the inputs are shared out, which are the same on each.
    """
    tensors = [piece for piece in pieces if isinstance(piece, Tensor)]
    if len(tensors) == len(pieces):
        return torch.cat(tensors).to(device)
    integers = tuple(piece for piece in pieces if isinstance(piece, QuantizedMatrix))
    codes = tuple(piece for piece in pieces if isinstance(piece, Nf4Matrix))
    if len(integers) != len(pieces) and len(codes) != len(pieces):
        return Mixed(tuple(side_by_side([piece], device, is_expert=is_expert) for piece in pieces))
    integers = _joined(integers) if integers else ()
    if dispatch.reads_columns(device):
        if integers and not is_expert and all(dispatch.is_exllama(matrix) for matrix in integers):
            return Exllama(tuple(dispatch.to_exllama(matrix, device) for matrix in integers))
        matrices: tuple[QuantizedMatrix | Nf4Matrix, ...] = (*integers, *codes)
        num_outputs = sum(matrix.num_outputs for matrix in matrices)
        whole = all_outputs or num_outputs
        if is_expert:  # Each is as much of its whole as all are of theirs.
            sizes = [matrix.num_outputs * whole // num_outputs for matrix in matrices]
            return Columns(
                tuple(to_columns(m, device, size - m.num_outputs) for m, size in zip(matrices, sizes, strict=True))
            )
        columns = [to_columns(matrix, device, whole - matrix.num_outputs) for matrix in matrices]
        return Columns(join_columns(columns))
    return Quantized(integers) if integers else Nf4(codes)


def _joined(matrices: tuple[QuantizedMatrix, ...]) -> tuple[QuantizedMatrix, ...]:
    """One matrix where all have their inputs in the same order and groups: then inputs are prepared once."""
    first = matrices[0]
    if len(matrices) == 1 or not all(_are_alike(first, other) for other in matrices[1:]):
        return matrices
    if any(matrix.num_outputs % TILE for matrix in matrices[:-1]):
        return matrices
    num_outputs = sum(matrix.num_outputs for matrix in matrices)
    parts: dict[str, Any] = {name: joined([matrix.by_tile[name] for matrix in matrices]) for name in first.by_tile}
    return (replace(first, num_outputs=num_outputs, **parts),)


def _are_alike(first: QuantizedMatrix, second: QuantizedMatrix) -> bool:
    """Whether rows are arranged alike, with scales, zeros, mins and books of the same kind."""
    kinds = [
        {name: (tensor.dtype, tensor.shape[1]) for name, tensor in matrix.by_tile.items() if name != "codes"}
        for matrix in (first, second)
    ]
    if first.scales is None or kinds[0] != kinds[1] or (first.codebook is None) != (second.codebook is None):
        return False
    if (first.source is None) != (second.source is None):
        return False
    sources = first.source is None or second.source is None or torch.equal(first.source, second.source)
    groups = torch.equal(first.group_starts, second.group_starts) and torch.equal(first.group_bits, second.group_bits)
    return sources and groups
