"""The C++ kernels of quantized matrices against plain float64, for every instruction set that this machine runs."""

from collections.abc import Sequence
from dataclasses import dataclass

import pytest
import rounded
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from rounded import Rounded
from torch import Tensor

from tightrope.kernels import reference
from tightrope.kernels.cpu import native
from tightrope.kernels.forms.layer import Projection
from tightrope.kernels.forms.quantized import (
    Nf4Matrix,
    QuantizedMatrix,
    arrange,
    pack,
    pack_nf4,
    tiled,
)

pytestmark = pytest.mark.quick

SOME = settings(max_examples=25)
WIDTHS = (2, 3, 4, 5, 6, 8)
SEEDS = st.integers(0, 2**32 - 1)
ROWS = st.sampled_from((1, 2, 3, 7, 8, 9, 16, 29, 50))


@pytest.fixture(scope="module", params=native.usable() or ["none"])
def kernels(request: pytest.FixtureRequest) -> native.NativeKernels:
    built = native.NativeKernels(request.param)
    built.set_threads(2)
    return built


@dataclass(frozen=True)
class Shape:
    """Everything about a matrix but its numbers."""

    num_outputs: int
    group_rows: tuple[int, ...]
    group_bits: tuple[int, ...]
    scales: str
    has_zeros: bool
    is_permuted: bool


@st.composite
def shapes(draw: st.DrawFn) -> Shape:
    size = draw(st.sampled_from((8, 32, 40, 64, 128, 136, 600)))
    count = draw(st.integers(1, 1200 // size if size < 600 else 2))
    widths = sorted(draw(st.lists(st.sampled_from(WIDTHS), min_size=1, max_size=3)), reverse=True)
    last = draw(st.one_of(st.just(size), st.integers(1, size)))
    return Shape(
        num_outputs=draw(st.integers(1, 70)),
        group_rows=(*[size] * (count - 1), last),
        group_bits=tuple(widths[g * len(widths) // count] for g in range(count)),
        scales=draw(st.sampled_from(("float16", "float32", "codes"))),
        has_zeros=draw(st.booleans()),
        is_permuted=draw(st.booleans()),
    )


def matrix_of(shape: Shape) -> QuantizedMatrix:
    inputs, groups, outputs = sum(shape.group_rows), len(shape.group_rows), shape.num_outputs
    order = torch.randperm(inputs) if shape.is_permuted else torch.arange(inputs)
    rows = arrange(order, shape.group_rows, shape.group_bits)
    counts = rows.group_starts.diff()
    most = (1 << rows.group_bits.int()).unsqueeze(1)  # codes are less, zeros may be as much
    codes = (torch.rand(int(counts.sum()), outputs) * most.repeat_interleave(counts, 0)).to(torch.uint8)
    scales, scale_codes = torch.rand(groups, outputs) + 0.1, torch.randint(1, 17, (groups, outputs), dtype=torch.uint8)
    return QuantizedMatrix(
        inputs,
        outputs,
        rows.source,
        rows.group_starts,
        rows.group_bits,
        pack(codes, rows),
        scales=None if shape.scales == "codes" else tiled(scales.half() if shape.scales == "float16" else scales),
        scale_codes=tiled(scale_codes) if shape.scales == "codes" else None,
        group_max=torch.rand(groups) + 0.1 if shape.scales == "codes" else None,
        zeros=tiled((torch.rand(groups, outputs) * (most + 1)).to(torch.int16)) if shape.has_zeros else None,
    )


def nf4_matrix(outputs: int, blocks: int, blocksize: int) -> Nf4Matrix:
    codes = torch.randint(16, (outputs, blocks * blocksize), dtype=torch.uint8)
    return pack_nf4(codes, torch.randn(outputs, blocks), torch.rand(16) * 2 - 1, blocksize)


def assert_is_product(
    ours: Tensor, x: Tensor, matrices: Sequence[QuantizedMatrix | Nf4Matrix], bias: Tensor | None
) -> None:
    rounded.project(Projection(tuple(matrices), bias), Rounded.exact(x), None).check(ours)


@given(shape=shapes(), rows=ROWS, has_bias=st.booleans(), size=st.sampled_from((1e-6, 1.0, 1e4)), seed=SEEDS)
@SOME
def test_a_product_with_packed_codes_is_that_with_the_weights_they_stand_for(
    kernels: native.NativeKernels, shape: Shape, rows: int, has_bias: bool, size: float, seed: int
):
    torch.manual_seed(seed)
    matrix, x = matrix_of(shape), torch.randn(rows, sum(shape.group_rows)) * size
    bias = torch.randn(shape.num_outputs) * size if has_bias else None

    ours = kernels.quantized_linear(x, [matrix], bias)

    assert_is_product(ours, x, [matrix], bias)


@given(shape=shapes(), rows=ROWS, seed=SEEDS)
@SOME
def test_single_outputs_are_those_of_the_weights_to_the_last_bit(
    kernels: native.NativeKernels, shape: Shape, rows: int, seed: int
):
    torch.manual_seed(seed)
    matrix, numbers = matrix_of(shape), torch.randint(shape.num_outputs, (rows,))

    assert torch.equal(kernels.quantized_rows(matrix, numbers), reference.quantized_rows(matrix, numbers))


def side_by_side(list_of_shapes: list[Shape], rows: int, seed: int) -> tuple[list[QuantizedMatrix], Tensor, Tensor]:
    """Matrices whose groups are those of the first shape, inputs [rows, K], and a bias of all outputs."""
    torch.manual_seed(seed)
    first = list_of_shapes[0]
    matrices = [
        matrix_of(Shape(s.num_outputs, first.group_rows, first.group_bits, s.scales, s.has_zeros, s.is_permuted))
        for s in list_of_shapes
    ]
    x, bias = torch.randn(rows, sum(first.group_rows)), torch.randn(sum(s.num_outputs for s in list_of_shapes))
    return matrices, x, bias


@given(list_of_shapes=st.lists(shapes(), min_size=2, max_size=11), rows=ROWS, seed=SEEDS)
@settings(max_examples=6)
def test_matrices_on_the_same_x_give_their_outputs_side_by_side(
    kernels: native.NativeKernels, list_of_shapes: list[Shape], rows: int, seed: int
):
    matrices, x, bias = side_by_side(list_of_shapes, rows, seed)

    ours = kernels.quantized_linear(x, matrices, bias)

    torch.testing.assert_close(
        ours,
        torch.cat([
            kernels.quantized_linear(x, [m], b)
            for m, b in zip(matrices, bias.split([s.num_outputs for s in list_of_shapes]), strict=True)
        ], 1),
        rtol=0,
        atol=0,
    )  # fmt: skip
    assert_is_product(ours, x, matrices, bias)


def test_a_long_prompt_is_taken_in_several_passes(kernels: native.NativeKernels):
    matrix = matrix_of(Shape(24, (32, 32), (5, 4), "codes", has_zeros=False, is_permuted=True))
    x = torch.randn(1100, 64)

    assert_is_product(kernels.quantized_linear(x, [matrix], None), x, [matrix], None)


@given(list_of_shapes=st.lists(shapes(), min_size=1, max_size=3), rows=st.integers(33, 70), seed=SEEDS)
@settings(max_examples=12)
def test_a_row_of_a_prompt_gives_what_it_gives_alone_to_the_last_bit(
    kernels: native.NativeKernels, list_of_shapes: list[Shape], rows: int, seed: int
):
    matrices, x, bias = side_by_side(list_of_shapes, rows, seed)

    together = kernels.quantized_linear(x, matrices, bias)

    assert torch.equal(together, torch.cat([kernels.quantized_linear(row, matrices, bias) for row in x.split(1)]))


@pytest.mark.parametrize("bits", WIDTHS)
def test_the_largest_codes_and_numbers_do_not_overflow(kernels: native.NativeKernels, bits: int):
    inputs = 20_000
    rows = arrange(torch.arange(inputs), [inputs], [bits])
    codes = torch.full((int(rows.group_starts[-1]), 16), 2**bits - 1, dtype=torch.uint8)
    zeros = torch.tensor([0, 2**bits] * 8, dtype=torch.int16).unsqueeze(0)
    matrix = QuantizedMatrix(
        inputs, 16, rows.source, rows.group_starts, rows.group_bits, pack(codes, rows), tiled(torch.ones(1, 16)),
        zeros=tiled(zeros),
    )  # fmt: skip

    for x in (torch.full((rows_of_x, inputs), size) for rows_of_x in (3, 40) for size in (7.0, -7.0)):
        ours = kernels.quantized_linear(x, [matrix], None)

        assert_is_product(ours, x, [matrix], None)


@pytest.mark.parametrize("wrong", [float("inf"), float("-inf"), float("nan")])
def test_a_number_that_is_not_finite_spoils_its_row_and_no_other(kernels: native.NativeKernels, wrong: float):
    matrix = matrix_of(Shape(40, (128, 128), (4, 3), "float16", has_zeros=False, is_permuted=True))
    for rows in (5, 50):
        x = torch.randn(rows, 256)
        x[2, 100] = wrong

        ours = kernels.quantized_linear(x, [matrix], None)

        assert ours.isfinite().any(1).tolist() == [row != 2 for row in range(rows)]
        assert ours[3:].isfinite().all()


def test_zeros_give_zeros(kernels: native.NativeKernels):
    matrix = matrix_of(Shape(20, (64,), (4,), "codes", has_zeros=True, is_permuted=False))

    assert not kernels.quantized_linear(torch.zeros(2, 64), [matrix], None).any()


@given(
    outputs=st.lists(st.integers(1, 70), min_size=1, max_size=3),
    blocks=st.integers(1, 9),
    blocksize=st.sampled_from((8, 64, 128)),
    rows=ROWS,
    has_bias=st.booleans(),
    seed=SEEDS,
)
@SOME
def test_an_nf4_product_is_that_with_the_weights_that_the_codes_stand_for(
    kernels: native.NativeKernels, outputs: list[int], blocks: int, blocksize: int, rows: int, has_bias: bool, seed: int
):
    torch.manual_seed(seed)
    matrices, x = [nf4_matrix(n, blocks, blocksize) for n in outputs], torch.randn(rows, blocks * blocksize)
    bias = torch.randn(sum(outputs)) if has_bias else None

    ours = kernels.nf4_linear(x, matrices, bias)

    assert_is_product(ours, x, matrices, bias)


def test_a_matrix_that_is_gone_is_not_remembered(kernels: native.NativeKernels):
    shape = Shape(20, (64,), (4,), "float16", has_zeros=False, is_permuted=False)
    for _ in range(20):  # a later matrix may lie where an earlier one was
        matrix, x = matrix_of(shape), torch.randn(1, 64)

        assert_is_product(kernels.quantized_linear(x, [matrix], None), x, [matrix], None)
