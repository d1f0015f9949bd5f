"""A rank's outputs on a card: their inputs are shared out to as many sums as those of the whole matrix."""

from collections.abc import Iterator
from types import ModuleType

import pytest
import torch
from interpreted import interpreted

from bench.gpu.matrices import random_matrix, random_nf4
from tightrope.kernels.forms import columns
from tightrope.kernels.forms.columns import to_columns
from tightrope.kernels.forms.quantized import Nf4Matrix, QuantizedMatrix

MATRICES = {
    "act-order": random_matrix([128] * 8, [4] * 8, 96, has_zeros=True, is_permuted=True),
    "EXL2": random_matrix([96, 160, 256], [5, 4, 3], 96, is_coded=True, is_permuted=True),
    "nf4": random_nf4(512, 96, 64),
}


@pytest.fixture(scope="module")
def ops() -> Iterator[ModuleType]:
    with interpreted("quantized") as module:
        yield module


@pytest.mark.parametrize("name", MATRICES)
@pytest.mark.parametrize("num_rows", [1, 3])
def test_a_ranks_outputs_have_the_bits_of_those_of_the_whole_matrix(
    ops: ModuleType, num_rows: int, name: str, monkeypatch: pytest.MonkeyPatch
):
    # So that a smaller matrix by itself would be shared out otherwise.
    monkeypatch.setattr(columns, "PROGRAMS", 6)
    monkeypatch.setattr(columns, "TILE_OUTPUTS", 32)
    matrix: QuantizedMatrix | Nf4Matrix = MATRICES[name]
    x = torch.randn(num_rows, matrix.num_inputs, generator=torch.Generator().manual_seed(2))
    whole = ops.quantized_linear(x, [to_columns(matrix)], None)

    for begin, end in ((0, 32), (32, 96)):
        own = matrix.tiles(begin // 16, end // 16)
        found = ops.quantized_linear(x, [to_columns(own, beside=96 - own.num_outputs)], None)

        assert torch.equal(found, whole[:, begin:end])
    assert len(to_columns(own).shares) != len(to_columns(matrix).shares)
