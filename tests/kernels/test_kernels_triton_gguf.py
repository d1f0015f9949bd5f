"""The CUDA kernels of GGUF's blocks in Triton's interpreter, held to what the `gguf` package makes of the blocks."""

from collections.abc import Iterator
from types import ModuleType

import pytest
import torch
from gguf_rows import meant, random_rows
from interpreted import interpreted

from tightrope.backends.quant.gguf import BLOCK_TYPES, to_matrix
from tightrope.kernels.forms.column_join import join_columns
from tightrope.kernels.forms.column_stack import stack_columns
from tightrope.kernels.forms.columns import NUMBERS, ColumnMatrix, to_columns
from tightrope.kernels.forms.quantized import dequantize, mins_of

ERRORS = {torch.float32: 3e-5, torch.float16: 2e-3, torch.bfloat16: 1.2e-2}  # Of the sum of what is added up.
ONE_OF_EACH = ("Q4_1", "Q8_0", "Q2_K", "Q3_K", "Q4_K", "Q6_K", "IQ4_XS")  # Of each way in which scales lie.


@pytest.fixture(scope="module")
def ops() -> Iterator[ModuleType]:
    with interpreted("quantized") as module:
        yield module


def columns(kind: str, outputs: int, inputs: int, seed: int = 0) -> ColumnMatrix:
    return to_columns(to_matrix(kind, torch.from_numpy(random_rows(kind, outputs, inputs, seed)), inputs))


@pytest.mark.parametrize("kind", BLOCK_TYPES)
def test_blocks_expand_to_the_numbers_of_the_gguf_package_to_the_last_bit(ops: ModuleType, kind: str):
    found = ops.expand(columns(kind, 45, 256), torch.float32)

    wanted = meant(kind, random_rows(kind, 45, 256, 0)).t().contiguous()
    assert torch.equal(found.contiguous().view(torch.int32), wanted.view(torch.int32))


@pytest.mark.parametrize("kind", ["Q4_1", "Q3_K", "Q4_K"])
def test_a_slice_of_the_outputs_of_blocks_expands_alone(ops: ModuleType, kind: str):
    found = ops.expand(columns(kind, 200, 256), torch.float32, 16, 140)

    assert torch.equal(found, meant(kind, random_rows(kind, 200, 256, 0)).t()[:, 16:156])


@pytest.mark.parametrize("num_rows", [1, 5])
@pytest.mark.parametrize("kind", BLOCK_TYPES)
def test_a_product_with_blocks_is_that_with_their_numbers(ops: ModuleType, kind: str, num_rows: int):
    assert_product(ops, kind, num_rows, torch.float32)


@pytest.mark.slow
@pytest.mark.parametrize("dtype", ERRORS)
@pytest.mark.parametrize("num_rows", [1, 5, 66])
@pytest.mark.parametrize("kind", ONE_OF_EACH)
def test_a_product_in_any_precision_is_that_with_their_numbers(
    ops: ModuleType, kind: str, num_rows: int, dtype: torch.dtype
):
    assert_product(ops, kind, num_rows, dtype)


def assert_product(ops: ModuleType, kind: str, num_rows: int, dtype: torch.dtype) -> None:
    rows = torch.from_numpy(random_rows(kind, 40, 256, num_rows))
    matrix = to_matrix(kind, rows, 256)
    x, bias = (torch.randn(num_rows, 256) / 32).to(dtype), torch.randn(40).to(dtype)  # float16 has no large sums.

    found = ops.quantized_linear(x, [to_columns(matrix)], bias)

    weight, mins = dequantize(matrix).double(), mins_of(matrix)
    added = weight.abs()
    if mins is not None:  # They are added apart from what codes stand for, from which they may take away nearly all.
        added += 2 * mins.double().abs().repeat_interleave(256 // len(mins), 0)
    assert found.dtype == dtype
    most = ERRORS[dtype] * (x.double().abs() @ added + bias.double().abs())
    assert ((found.double() - (x.double() @ weight + bias.double())).abs() <= most).all()


@pytest.mark.parametrize("kind", BLOCK_TYPES)
def test_a_matrix_of_blocks_takes_hardly_more_memory_on_a_card_than_in_the_file(kind: str):
    assert columns(kind, 1024, 4096).num_bytes <= 1.03 * random_rows(kind, 1024, 4096, 0).nbytes


@pytest.mark.parametrize("num_rows", [1, 5])
@pytest.mark.parametrize("kind", ["Q4_0", "Q4_1", "Q4_K"])
def test_several_matrices_of_blocks_multiply_as_each_does(ops: ModuleType, kind: str, num_rows: int):
    matrices = [columns(kind, outputs, 256, outputs) for outputs in (32, 16, 24)]
    x = torch.randn(num_rows, 256)

    joined = join_columns(matrices)

    assert len(joined) == (1 if matrices[0].scaling == NUMBERS else 3)
    torch.testing.assert_close(
        ops.quantized_linear(x, joined, None), ops.quantized_linear(x, matrices, None), rtol=1e-4, atol=1e-2
    )


@pytest.mark.parametrize("kind", ["Q4_1", "Q8_0", "Q4_K", "Q6_K"])
def test_experts_of_blocks_with_units_are_not_stacked(kind: str):
    matrices = [columns(kind, 32, 256, seed) for seed in range(3)]

    stacked = stack_columns(matrices)

    assert (stacked is None) == (matrices[0].scaling != NUMBERS)
    if stacked is not None:
        for part, matrix in zip(stacked[1], matrices, strict=True):
            assert (part.mins is None) == (matrix.mins is None)
            assert part.mins is None or matrix.mins is None or torch.equal(part.mins, matrix.mins)
