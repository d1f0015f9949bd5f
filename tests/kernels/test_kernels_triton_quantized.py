"""The CUDA kernels of quantized matrices in Triton's interpreter, on a CPU, held to the dequantized product."""

import math
from collections.abc import Iterator
from types import ModuleType

import pytest
import rounded
import torch
from error_bounds import LAMBDA, UNIT, within
from hypothesis import given, settings
from hypothesis import strategies as st
from interpreted import interpreted
from rounded import Rounded
from torch import Tensor

from bench.gpu.matrices import random_matrix, random_nf4
from tightrope.kernels.forms import expanded
from tightrope.kernels.forms.columns import BLOCK, pack_columns, to_columns
from tightrope.kernels.forms.quantized import PLANES, Nf4Matrix, QuantizedMatrix, dequantize, scales_of

WIDTHS = sorted(PLANES)


@pytest.fixture(scope="module")
def ops() -> Iterator[ModuleType]:
    with interpreted("quantized") as module:
        yield module


def assert_product(ops: ModuleType, matrix: QuantizedMatrix | Nf4Matrix, x: Tensor, bias: Tensor | None = None) -> None:
    """Held to float64; half precision rounds each weight, the product and its sum with the bias once more."""
    weight = dequantize(matrix).double()
    spread = spread_off(x, matrix) if len(x) == 1 and isinstance(matrix, QuantizedMatrix) else None
    wanted = rounded.times(Rounded.exact(x), weight, spread)
    sizes = x.double().abs() @ weight.abs()
    if bias is not None:
        wanted, sizes = wanted + Rounded.exact(bias.expand_as(wanted.value)), sizes + bias.double().abs()
    halved = 0.0 if x.dtype == torch.float32 else 3 * torch.finfo(x.dtype).eps / 2

    found = ops.quantized_linear(x, [to_columns(matrix)], bias)

    assert found.dtype == x.dtype
    assert found.shape == wanted.value.shape
    within(found, wanted.value, LAMBDA * wanted.off + halved * sizes)


def spread_off(x: Tensor, matrix: QuantizedMatrix) -> Tensor:
    """The scale of errors [1, N] of one row x [1, K], which is summed with numbers that are taken off again.

    Beside each number of x those are less than 2^9 times it, before they are multiplied by the scale. Four sums take
    up the 32 numbers of a block, and then come together: 132 roundings of the block's sum. A group's blocks are taken
    as one, which can't be less.
    """
    stored = torch.arange(matrix.num_inputs) if matrix.source is None else matrix.source.long()
    numbers = torch.where(stored >= 0, x[0, stored.clamp(min=0)].double().abs(), 0.0)
    groups = torch.stack([part.sum() for part in numbers.split(matrix.group_starts.diff().tolist())])
    return math.sqrt(132) * UNIT * 2**9 * (groups.unsqueeze(1) * scales_of(matrix).double()).norm(dim=0, keepdim=True)


@pytest.mark.parametrize("bits", WIDTHS)
def test_words_hold_the_codes_of_a_column(bits: int):
    codes = torch.randint(0, 1 << bits, (2 * BLOCK, 3), dtype=torch.uint8)

    words = pack_columns(codes, [bits], [2]).long() & 0xFFFFFFFF  # [2 * bits, 3]

    low, high = PLANES[bits][0], bits - PLANES[bits][0]
    half = 16 // low
    for row in range(2 * BLOCK):
        first, (word, field) = row // BLOCK * bits, divmod(row % BLOCK, 2 * half)
        found = int(words[first + word, 1]) >> (field * low) & ((1 << low) - 1)
        if high:
            top, turn = divmod(word, low // high)
            bit = 16 * (field // half) + high * (turn * half + field % half)
            found += (int(words[first + low + top, 1]) >> bit & ((1 << high) - 1)) << low
        assert found == codes[row, 1]


@pytest.mark.parametrize("bits", WIDTHS)
def test_every_width_expands_to_the_bit(ops: ModuleType, bits: int):
    matrix = random_matrix([64, 32], [bits] * 2, 33, has_zeros=True)

    assert torch.equal(ops.expand(to_columns(matrix), torch.float32), dequantize(matrix))


def test_a_slice_of_the_outputs_expands_alone(ops: ModuleType):
    matrix = random_matrix([96, 64], [6, 3], 300, is_coded=True, is_permuted=True)

    found = ops.expand(to_columns(matrix), torch.float32, 144, 140)

    assert torch.equal(found, dequantize(matrix)[:, 144:284])


@pytest.mark.parametrize("num_rows", [1, 5])
@pytest.mark.parametrize("bits", WIDTHS)
def test_every_width_multiplies(ops: ModuleType, bits: int, num_rows: int):
    matrix = random_matrix([32, 64], [bits] * 2, 48, is_coded=True)

    assert_product(ops, matrix, torch.randn(num_rows, 96))


@pytest.mark.parametrize("num_rows", [0, 1, 2, 17, 64, 65, 90])
def test_any_number_of_rows_is_multiplied(ops: ModuleType, num_rows: int):
    matrix = random_matrix([128, 64], [4, 4], 40, has_zeros=True)

    assert_product(ops, matrix, torch.randn(num_rows, 192), torch.randn(40))


@pytest.mark.parametrize("num_rows", [1, 3, 70])
@pytest.mark.parametrize("blocksize", [32, 64])
def test_numbers_of_a_codebook_multiply(ops: ModuleType, blocksize: int, num_rows: int):
    assert_product(ops, random_nf4(192, 50, blocksize), torch.randn(num_rows, 192), torch.randn(50))


@pytest.mark.parametrize("num_rows", [1, 4, 70])
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_rows_multiply_within_their_rounding(ops: ModuleType, dtype: torch.dtype, num_rows: int):
    matrix = random_matrix([64, 128], [5, 4], 32, is_coded=True, is_permuted=True)

    assert_product(ops, matrix, torch.randn(num_rows, 192).to(dtype), torch.randn(32).to(dtype))


@pytest.mark.parametrize("num_rows", [1, 3, 70])
def test_several_matrices_multiply_side_by_side(ops: ModuleType, num_rows: int):
    matrices = [random_matrix([64], [4], 50), random_nf4(64, 30, 32)]
    x, bias = torch.randn(num_rows, 64), torch.randn(80)

    found = ops.quantized_linear(x, [to_columns(matrix) for matrix in matrices], bias)

    wanted = x @ torch.cat([dequantize(matrix) for matrix in matrices], 1) + bias
    torch.testing.assert_close(found, wanted, rtol=1e-4, atol=1e-4)


def test_a_slice_of_a_larger_tensor_multiplies(ops: ModuleType):
    matrix = random_matrix([64], [4], 32)

    assert_product(ops, matrix, torch.randn(3, 100)[:, 20:84])


def test_large_matrices_are_expanded_in_slices(ops: ModuleType, monkeypatch: pytest.MonkeyPatch):
    matrix = random_matrix([64], [4], 300)
    monkeypatch.setattr(expanded, "SLICE_BYTES", 64 * 4 * 128)
    widths = []
    monkeypatch.setattr(ops, "expand", lambda *args, real=ops.expand: widths.append(args[3]) or real(*args))

    assert_product(ops, matrix, torch.randn(66, 64), torch.randn(300))
    assert widths == [256, 44]


@pytest.mark.parametrize(("dtype", "expanded_to"), [(torch.bfloat16, torch.float16), (torch.float32, torch.float32)])
def test_products_whose_sums_may_be_halves_have_float16_operands(
    ops: ModuleType, monkeypatch: pytest.MonkeyPatch, dtype: torch.dtype, expanded_to: torch.dtype
):
    monkeypatch.setattr(ops, "sums_halves", lambda: True)
    made = []
    monkeypatch.setattr(ops, "expand", lambda *args, real=ops.expand: made.append(args[1]) or real(*args))

    assert_product(ops, random_matrix([64], [4], 48), torch.randn(66, 64).to(dtype), torch.randn(48).to(dtype))
    assert made == [expanded_to]


def test_each_block_is_shared_out_once():
    matrix = to_columns(random_matrix([1600, 320, 96], [6, 4, 3], 5000))
    shares = matrix.shares.tolist()

    assert [first for _, first, _, _ in shares] == [0, *(end for _, _, end, _ in shares[:-1])]
    assert shares[-1][2] == len(matrix.group_of)
    assert [word for _, _, _, word in shares] == [
        sum(bits * (end - first) for bits, first, end, _ in shares[:i]) for i in range(len(shares))
    ]
    assert len(matrix.words) == (1600 * 6 + 320 * 4 + 96 * 3) // 32
    assert len({end - first for _, first, end, _ in shares}) > 1


@settings(max_examples=20)
@given(data=st.data())
def test_any_matrix_multiplies_as_it_is_dequantized(ops: ModuleType, data: st.DataObject):
    groups = st.tuples(st.integers(1, 20).map(lambda n: 8 * n), st.sampled_from(WIDTHS))
    sizes, bits = zip(*data.draw(st.lists(groups, min_size=1, max_size=4)), strict=True)
    matrix = random_matrix(
        sizes,
        bits,
        data.draw(st.integers(1, 80)),
        is_coded=data.draw(st.booleans()),
        has_zeros=data.draw(st.booleans()),
        is_permuted=data.draw(st.booleans()),
        seed=data.draw(st.integers(0, 2**31)),
    )

    assert_product(ops, matrix, torch.randn(data.draw(st.sampled_from([1, 2, 9, 66])), sum(sizes)))
