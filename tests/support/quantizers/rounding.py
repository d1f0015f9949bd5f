"""Rounding to few bits with correction: each row's error is made up for by the rows after it.

Source: Frantar et al. 2022, "GPTQ", arXiv 2210.17323, the variant with a Cholesky factor and lazy updates.
"""

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

BLOCK = 32  # rows between updates of all that follow; groups are multiples of it
DAMPING = 0.05  # of the mean diagonal of the hessian, which few tokens have made


@dataclass(frozen=True, slots=True)
class Grid:
    """The values that a group's rows may take, (code - zero) * scale.

    scale, above 0, and zero are [N] float32, and exactly what is stored.
    """

    bits: int
    scale: Tensor
    zero: Tensor

    def encode(self, rows: Tensor) -> Tensor:
        """The nearest codes, as float32."""
        return (rows / self.scale).add_(self.zero).round_().clamp_(0, (1 << self.bits) - 1)

    def decode(self, codes: Tensor) -> Tensor:
        return (codes - self.zero).mul_(self.scale)


Fit = Callable[[Tensor, int], Grid]  # of a group's rows [n, N], to so many bits


def best(rows: Tensor, grids: Iterable[Grid]) -> Grid:
    """For each output the grid that rounds it with the least squared error; the grids have the same width."""
    chosen: Grid | None = None
    least = rows.new_full((rows.shape[1],), torch.inf)
    for grid in grids:
        error = (grid.decode(grid.encode(rows)) - rows).square_().sum(0)
        if chosen is None:
            chosen = grid
        is_better = error < least
        least = torch.where(is_better, error, least)
        scale = torch.where(is_better, grid.scale, chosen.scale)
        chosen = Grid(grid.bits, scale, torch.where(is_better, grid.zero, chosen.zero))
    assert chosen is not None
    return chosen


@dataclass(frozen=True, slots=True)
class Rounded:
    """Codes uint8 [K, N] in the order of the rows given, and each group's grid."""

    codes: Tensor
    grids: list[Grid]


def importance_order(hessian: Tensor) -> Tensor:
    """Inputs [K], those of the largest activations first: act-order."""
    return hessian.diag().argsort(descending=True, stable=True)


def round_corrected(weight: Tensor, hessian: Tensor, groups: Sequence[tuple[int, int]], fit: Fit) -> Rounded:
    """Round weight [K, N], whose inputs have this hessian, row by row; `groups` are (bits, rows) and cover K.

    A group's grid is fitted to its rows as earlier corrections have left them.
    """
    weight, factor = weight.clone(memory_format=torch.contiguous_format), _factor(hessian)
    codes = torch.empty(weight.shape, dtype=torch.uint8)
    grids: list[Grid] = []
    end = 0
    for bits, rows in groups:
        begin, end = end, end + rows
        grids.append(fit(weight[begin:end], bits))
        for at in range(begin, end, BLOCK):
            codes[at : at + BLOCK] = _round_block(weight, factor, at, grids[-1])
    return Rounded(codes, grids)


def _round_block(weight: Tensor, factor: Tensor, at: int, grid: Grid) -> Tensor:
    """Codes of the rows `at` and on; those and all rows after them are changed in `weight`."""
    block, after = slice(at, at + BLOCK), slice(at + BLOCK, None)
    rows, within = weight[block], factor[block, block]
    codes, errors = torch.empty_like(rows), torch.empty_like(rows)
    for i in range(BLOCK):
        codes[i] = grid.encode(rows[i])
        errors[i] = (rows[i] - grid.decode(codes[i])) / within[i, i]
        rows[i + 1 :].addr_(within[i, i + 1 :], errors[i], alpha=-1)
    weight[after].addmm_(factor[block, after].t(), errors, alpha=-1)
    return codes.to(torch.uint8)


def _factor(hessian: Tensor) -> Tensor:
    """The upper Cholesky factor of the damped hessian's inverse."""
    damping = DAMPING * hessian.diag().mean()
    damped = hessian.double() + damping * torch.eye(len(hessian), dtype=torch.float64)
    inverse = torch.cholesky_inverse(torch.linalg.cholesky(damped))
    return torch.linalg.cholesky(inverse, upper=True).float()
