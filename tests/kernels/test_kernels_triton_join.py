"""Matrices joined side by side, which one launch multiplies, held to each of them alone, in Triton's interpreter."""

from collections.abc import Iterator, Sequence
from types import ModuleType
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from interpreted import interpreted

from bench.gpu.matrices import random_matrix, random_nf4
from tightrope.kernels.forms.column_join import join_columns
from tightrope.kernels.forms.columns import ColumnMatrix, to_columns
from tightrope.kernels.forms.quantized import PLANES, Nf4Matrix, QuantizedMatrix, dequantize

WIDTHS = sorted(PLANES)


@pytest.fixture(scope="module")
def ops() -> Iterator[ModuleType]:
    with interpreted("quantized") as module:
        yield module


def joined(matrices: Sequence[QuantizedMatrix | Nf4Matrix]) -> ColumnMatrix:
    """As the server joins them."""
    total = sum(matrix.num_outputs for matrix in matrices)
    columns = [to_columns(matrix, beside=total - matrix.num_outputs) for matrix in matrices]
    (found,) = join_columns(columns)
    return found


def qkv(outputs: Sequence[int] = (288, 48, 40)) -> list[QuantizedMatrix]:
    """Of EXL2, by different widths, groups and orders of inputs."""
    kinds: list[tuple[list[int], list[int]]] = [([96, 96], [6, 4]), ([32, 64, 96], [5, 4, 3]), ([192], [8])]
    return [
        random_matrix(sizes, bits, count, is_coded=True, is_permuted=True, seed=i)
        for i, ((sizes, bits), count) in enumerate(zip(kinds, outputs, strict=True))
    ]


@pytest.mark.parametrize("num_rows", [0, 1, 3, 17, 70])
@pytest.mark.parametrize(
    "matrices",
    [
        qkv(),
        [random_matrix([64, 128], [4, 4], 272, has_zeros=True, is_permuted=i > 0, seed=i) for i in range(2)],
        [random_nf4(192, 64, 64), random_nf4(192, 16, 64), random_nf4(192, 20, 32)],
    ],
    ids=["EXL2", "GPTQ", "nf4"],
)
def test_joined_matrices_multiply_as_each_does_alone(
    ops: ModuleType, matrices: list[QuantizedMatrix | Nf4Matrix], num_rows: int
):
    x, bias = torch.randn(num_rows, 192), torch.randn(sum(matrix.num_outputs for matrix in matrices))

    found = ops.quantized_linear(x, [joined(matrices)], bias)

    wanted = x.double() @ torch.cat([dequantize(matrix) for matrix in matrices], 1).double() + bias
    torch.testing.assert_close(found.double(), wanted, rtol=1e-4, atol=1e-3)


@settings(max_examples=10)
@given(data=st.data())
def test_any_matrices_multiply_joined(ops: ModuleType, data: st.DataObject):
    matrices, num_inputs = [], 8 * data.draw(st.integers(1, 20))
    for i in range(data.draw(st.integers(2, 4))):
        border = 8 * data.draw(st.integers(0, num_inputs // 8 - 1))
        sizes = [size for size in (border, num_inputs - border) if size]
        bits = [data.draw(st.sampled_from(WIDTHS)) for _ in sizes]
        outputs = 16 * data.draw(st.integers(1, 20))
        matrices.append(
            random_matrix(sizes, bits, outputs, is_coded=True, is_permuted=data.draw(st.booleans()), seed=i)
        )
    x = torch.randn(data.draw(st.sampled_from([1, 2, 9])), num_inputs)

    found = ops.quantized_linear(x, [joined(matrices)], None)

    wanted = x.double() @ torch.cat([dequantize(matrix) for matrix in matrices], 1).double()
    torch.testing.assert_close(found.double(), wanted, rtol=1e-4, atol=1e-3)


@pytest.mark.parametrize("num_rows", [1, 3])
def test_joined_matrices_take_two_launches(ops: ModuleType, monkeypatch: pytest.MonkeyPatch, num_rows: int):
    launched: list[str] = []

    class Counted:
        def __init__(self, name: str) -> None:
            self.name, self.kernel = name, getattr(ops, name)

        def __getitem__(self, grid: Any) -> Any:  # noqa: ANN401
            launched.append(self.name)
            return self.kernel[grid]

    for name in ("vector_parts", "batch_parts", "sum_parts"):
        monkeypatch.setattr(ops, name, Counted(name))

    ops.quantized_linear(torch.randn(num_rows, 192), [joined(qkv())], None)

    assert launched == ["vector_parts" if num_rows == 1 else "batch_parts", "sum_parts"]


def test_nothing_is_in_memory_twice_and_rows_are_shared_out_to_fewer_programs():
    matrices = qkv()
    alone = [to_columns(matrix) for matrix in matrices]
    together = joined(matrices)

    for part in together.parts:
        for name in ("words", "source", "group_of", "shares", "scale_codes", "group_max"):
            inner, outer = getattr(part, name), getattr(together, name)
            assert inner.untyped_storage().data_ptr() == outer.untyped_storage().data_ptr(), name
    assert together.num_tiles == sum(matrix.num_tiles for matrix in alone)
    assert together.num_shares <= max(matrix.num_shares for matrix in alone)
    assert together.num_bytes <= 1.05 * sum(matrix.num_bytes for matrix in alone)


@pytest.mark.parametrize(
    "matrices",
    [
        [random_matrix([64], [4], 32), random_matrix([64], [4], 32, has_zeros=True)],
        [random_matrix([64], [4], 32), random_matrix([64], [4], 32, is_coded=True)],
        [random_matrix([64], [4], 40), random_matrix([64], [4], 32)],
        [random_matrix([64], [4], 32), random_nf4(64, 32, 32)],
    ],
    ids=["zero points in one", "other scales", "a tile that is partly empty", "a book in one"],
)
def test_matrices_that_no_kernel_reads_alike_stay_as_they_are(matrices: list[QuantizedMatrix | Nf4Matrix]):
    columns = [to_columns(matrix) for matrix in matrices]

    assert all(found is given for found, given in zip(join_columns(columns), columns, strict=True))
