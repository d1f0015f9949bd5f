"""Small mixtures of experts as a card has them, of every kind of weights."""

import torch
from torch import Tensor

from bench.gpu.matrices import random_matrix, random_nf4
from tightrope.kernels.forms.column_stack import ColumnStack, stack_columns
from tightrope.kernels.forms.columns import to_columns
from tightrope.kernels.forms.layer import StackedExperts
from tightrope.kernels.forms.quantized import Nf4Matrix, QuantizedMatrix, dequantize

EXPERTS, HIDDEN, MIDDLE = 5, 64, 32
Packed = QuantizedMatrix | Nf4Matrix


def matrices(kind: str, inputs: int, outputs: int) -> list[Packed]:
    """One for each expert: of other widths, groups and orders where the format allows it."""
    groups = inputs // 32
    widths = [[5, *[4] * (groups - 1)], [*[4] * (groups - 1), 3], [4] * groups]
    found: list[Packed] = []
    for e in range(EXPERTS):
        if kind == "exl2":
            sizes, bits = ([32] * groups, widths[e % 3])
            found.append(random_matrix(sizes, bits, outputs, is_coded=True, is_permuted=True, seed=e))
        elif kind == "gptq":
            found.append(
                random_matrix([32] * groups, [4] * groups, outputs, has_zeros=True, is_permuted=e % 2 == 0, seed=e)
            )
        else:
            found.append(random_nf4(inputs, outputs, 32))
    return found


def stacked(found: list[Packed]) -> ColumnStack:
    made = stack_columns([to_columns(matrix) for matrix in found])
    assert made is not None
    return made[0]


def layer_of(kind: str) -> tuple[StackedExperts, Tensor, Tensor]:
    """Experts on a card, and their weights [E, 2 * F, K] and [E, K, F] float32."""
    if kind == "plain":
        gate_up, down = torch.randn(EXPERTS, 2 * MIDDLE, HIDDEN) / 8, torch.randn(EXPERTS, HIDDEN, MIDDLE) / 6
        return StackedExperts(gate_up, down, "silu"), gate_up, down
    gates, ups, downs = matrices(kind, HIDDEN, MIDDLE), matrices(kind, HIDDEN, MIDDLE), matrices(kind, MIDDLE, HIDDEN)
    plain = [torch.stack([dequantize(matrix).t() for matrix in found]) for found in (gates, ups, downs)]
    layer = StackedExperts((stacked(gates), stacked(ups)), (stacked(downs),), "silu")
    return layer, torch.cat(plain[:2], 1), plain[2]
