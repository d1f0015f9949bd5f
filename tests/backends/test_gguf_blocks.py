"""GGUF's blocks in the layout of our kernels: the numbers they stand for, their products, and the memory they take."""

import numpy as np
import pytest
import torch
from gguf_rows import LAYOUTS, meant, random_rows
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray
from torch import Tensor

from tightrope.backends.files.gguf.tensor_types import TensorType
from tightrope.backends.quant.gguf import BLOCK_TYPES, to_matrix
from tightrope.kernels import dispatch, reference
from tightrope.kernels.cpu import native
from tightrope.kernels.forms.quantized import dequantize

pytestmark = pytest.mark.quick

SEEDS = st.integers(0, 2**32 - 1)
ROWS = st.sampled_from((1, 2, 3, 7, 8, 9, 29, 40))
EXACT = 1e-4  # Of a product's length; inputs are in 16 bits, or 13 of some types, whose rounding is half of this.


@pytest.fixture(scope="module", params=native.usable() or ["none"])
def kernels(request: pytest.FixtureRequest) -> native.NativeKernels:
    built = native.NativeKernels(request.param)
    built.set_threads(2)
    return built


@pytest.mark.parametrize("kind", BLOCK_TYPES)
@given(outputs=st.integers(1, 40), blocks=st.integers(1, 3), seed=SEEDS)
@settings(max_examples=10)
def test_blocks_stand_for_the_numbers_of_the_gguf_package_to_the_last_bit(
    kind: str, outputs: int, blocks: int, seed: int
):
    rows = random_rows(kind, outputs, 256 * blocks, seed)

    matrix = to_matrix(kind, torch.from_numpy(rows), 256 * blocks)

    ours, theirs = dequantize(matrix).t().contiguous(), meant(kind, rows)
    assert torch.equal(ours.view(torch.int32), theirs.view(torch.int32))


@pytest.mark.parametrize("kind", BLOCK_TYPES)
@pytest.mark.parametrize("outputs", [1, 16, 35, 300])
def test_every_kernel_takes_blocks_apart_as_torch_does(
    kernels: native.NativeKernels, kind: str, outputs: int, monkeypatch: pytest.MonkeyPatch
):
    rows = torch.from_numpy(random_rows(kind, outputs, 768, seed=outputs))
    monkeypatch.setattr(dispatch, "_native", lambda: None)
    wanted = to_matrix(kind, rows, 768)
    monkeypatch.setattr(dispatch, "_native", lambda: kernels)

    ours = to_matrix(kind, rows, 768)

    assert torch.equal(dequantize(wanted).t(), meant(kind, rows.numpy()))
    assert ours.by_tile.keys() == wanted.by_tile.keys()
    for name, tensor in wanted.by_tile.items():
        assert torch.equal(ours.by_tile[name].view(torch.uint8), tensor.view(torch.uint8)), name


@pytest.mark.parametrize("kind", BLOCK_TYPES)
@given(outputs=st.integers(1, 70), blocks=st.integers(1, 3), rows=ROWS, seed=SEEDS)
@settings(max_examples=6)
def test_a_product_is_that_with_the_numbers_that_blocks_stand_for(
    kernels: native.NativeKernels, kind: str, outputs: int, blocks: int, rows: int, seed: int
):
    weight = random_rows(kind, outputs, 256 * blocks, seed)
    matrix = to_matrix(kind, torch.from_numpy(weight), 256 * blocks)
    x = torch.randn(rows, 256 * blocks, generator=torch.Generator().manual_seed(seed))

    ours = kernels.quantized_linear(x, [matrix], None)

    exact = x.double() @ meant(kind, weight).double().t()
    size = x.double().norm(dim=1, keepdim=True) * meant(kind, weight).double().norm(dim=1)  # [T, N]
    assert ((ours - exact).abs() <= EXACT * size).all()
    torch.testing.assert_close(ours, reference.quantized_linear(x, [matrix], None), rtol=0, atol=EXACT * size.max())


@pytest.mark.parametrize("kind", BLOCK_TYPES)
def test_a_row_of_a_prompt_gives_what_it_gives_alone_to_the_last_bit(kernels: native.NativeKernels, kind: str):
    inputs = 2304  # they are taken in two parts
    matrix = to_matrix(kind, torch.from_numpy(random_rows(kind, 83, inputs, seed=4)), inputs)
    x, bias = torch.randn(61, inputs), torch.randn(2 * 83)

    together = kernels.quantized_linear(x, [matrix, matrix], bias)

    alone = [kernels.quantized_linear(row, [matrix, matrix], bias) for row in x.split(1)]
    assert torch.equal(together, torch.cat(alone))


@pytest.mark.parametrize("kind", [kind for kind in BLOCK_TYPES if LAYOUTS[kind].values == 256])
def test_the_largest_codes_of_weights_and_of_their_scales_do_not_overflow(kernels: native.NativeKernels, kind: str):
    blocks = np.full((16 * 3, LAYOUTS[kind].num_bytes), 255 if kind in ("Q2_K", "Q4_K", "Q5_K") else 0, np.uint8)
    if kind == "Q6_K":
        blocks[:, 192:208] = 128  # The least signed byte; elsewhere codes of 0 are the least ones, too.
    for floats in LAYOUTS[kind].floats:
        blocks[:, floats.start : floats.start + 2] = np.float16([1]).view(np.uint8)
    rows = blocks.reshape(16, -1)
    matrix, weight = to_matrix(kind, torch.from_numpy(rows), 768), meant(kind, rows).double()
    alike, one_is_larger = torch.full((768,), -7.0), torch.randn(768, generator=torch.Generator().manual_seed(6))
    one_is_larger[300] = 5e4

    for x in (alike, one_is_larger, weight[0].float()):
        for num_rows in (3, 40):
            ours = kernels.quantized_linear(x.expand(num_rows, -1).contiguous(), [matrix], None)

            off = (ours - x.double() @ weight.t()).abs()
            # Numbers that are alike are off alike, by half a unit, of which each is 2,047 where weights are so large.
            assert (off <= 2.5e-4 * x.double().norm() * weight.norm(dim=1)).all()


@pytest.mark.parametrize("kind", BLOCK_TYPES)
def test_single_outputs_are_rows_of_the_table(kernels: native.NativeKernels, kind: str):
    matrix = to_matrix(kind, torch.from_numpy(random_rows(kind, 100, 512, seed=1)), 512)
    numbers = torch.tensor([99, 0, 17, 17, 64, *range(20)])

    assert torch.equal(dequantize(matrix.outputs(numbers)), dequantize(matrix)[:, numbers])
    assert torch.equal(kernels.quantized_rows(matrix, numbers), dequantize(matrix).t()[numbers])
    assert torch.equal(kernels.quantized_rows(matrix, numbers[:1]), dequantize(matrix).t()[numbers[:1]])


@pytest.mark.parametrize("kind", BLOCK_TYPES)
def test_a_matrix_takes_hardly_more_memory_than_its_blocks(kind: str):
    rows = random_rows(kind, 1024, 4096, seed=2)

    matrix = to_matrix(kind, torch.from_numpy(rows), 4096)

    assert matrix.num_bytes <= 1.03 * rows.nbytes


@pytest.mark.parametrize("kind", BLOCK_TYPES)
def test_every_float_of_a_block_is_checked(kind: str):
    form = LAYOUTS[kind]
    for floats in form.floats:
        rows = random_rows(kind, 20, 512, seed=3)
        _blocks(rows, form)[13, 1, floats.start : floats.start + 2] = np.frombuffer(b"\x00\x7e", np.uint8)
        seen: list[Tensor] = []

        to_matrix(kind, torch.from_numpy(rows), 512, seen.append)

        assert sum(int(tensor.isnan().sum()) for tensor in seen) == 1


def _blocks(rows: NDArray[np.uint8], form: TensorType) -> NDArray[np.uint8]:
    return rows.reshape(len(rows), -1, form.num_bytes)
