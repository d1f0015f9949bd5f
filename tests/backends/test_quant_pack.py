"""Packed bytes hold the codes that they were given, as the layout says, and stand for the weights of the formula."""

import numpy as np
import pytest
import rounded
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from rounded import Rounded
from streams import unstream
from torch import Tensor

from tightrope.kernels import reference
from tightrope.kernels.forms.quantized import (
    BLOCK_ROWS,
    PLANES,
    SLICE,
    TILE,
    QuantizedMatrix,
    Rows,
    arrange,
    dequantize,
    pack,
    pack_nf4,
    pack_slices,
    tiled,
    unpack,
    unpack_nf4,
)

pytestmark = pytest.mark.quick

WIDTHS = st.sampled_from(sorted(PLANES))


@st.composite
def matrices(draw: st.DrawFn) -> tuple[QuantizedMatrix, Tensor]:
    """A matrix of any groups and widths, and its codes [R, N]."""
    groups = draw(st.lists(st.tuples(st.integers(1, 70), WIDTHS), min_size=1, max_size=5))
    outputs = draw(st.integers(1, 40))
    made = torch.Generator().manual_seed(draw(st.integers(0, 1 << 30)))
    inputs = sum(count for count, _ in groups)
    order = torch.randperm(inputs, generator=made) if draw(st.booleans()) else torch.arange(inputs)
    rows = arrange(order, [count for count, _ in groups], [bits for _, bits in groups])
    starts = rows.group_starts.tolist()
    codes = torch.cat(
        [
            torch.randint(0, 1 << bits, (end - begin, outputs), generator=made, dtype=torch.uint8)
            for (_, bits), begin, end in zip(groups, starts, starts[1:], strict=False)
        ]
    )
    scales = torch.rand(len(groups), outputs, generator=made) - 0.5
    zeros = torch.randint(0, 257, (len(groups), outputs), generator=made, dtype=torch.int16)
    given: dict[str, Tensor] = {}
    if draw(st.booleans()):
        given["scales"] = tiled(scales.half() if draw(st.booleans()) else scales)
    else:
        given["scale_codes"] = tiled(torch.randint(1, 17, scales.shape, generator=made, dtype=torch.uint8))
        given["group_max"] = torch.rand(len(groups), generator=made).half().float()  # as EXL2 stores it
    if draw(st.booleans()):
        given["zeros"] = tiled(zeros)
    packed = pack(codes, rows)
    return QuantizedMatrix(inputs, outputs, rows.source, rows.group_starts, rows.group_bits, packed, **given), codes


def plain_weight(matrix: QuantizedMatrix, codes: Tensor) -> np.ndarray:
    """[K, N] float64 by the formula, row after row."""
    weight = np.zeros((matrix.num_inputs, matrix.num_outputs))
    starts, n = matrix.group_starts.tolist(), torch.arange(matrix.num_outputs)
    for g, bits in enumerate(matrix.group_bits.tolist()):
        at = (n // TILE, g, n % TILE)
        if matrix.scales is not None:
            scale = matrix.scales[at].double()
        else:
            scale = (matrix.scale_codes[at].double() / 16) ** 2 * float(matrix.group_max[g])
        zero = 1 << (bits - 1) if matrix.zeros is None else matrix.zeros[at].double()
        for r in range(starts[g], starts[g + 1]):
            k = r if matrix.source is None else int(matrix.source[r])
            if k >= 0:
                weight[k] = (codes[r].double() - zero) * scale
    return weight


@settings(max_examples=40)
@given(matrices())
def test_unpacking_gives_the_codes_that_were_packed(made: tuple[QuantizedMatrix, Tensor]):
    matrix, codes = made

    assert torch.equal(unpack(matrix), codes)


@settings(max_examples=25)
@given(matrices())
def test_a_matrix_stands_for_the_weight_of_the_formula(made: tuple[QuantizedMatrix, Tensor]):
    matrix, codes = made

    np.testing.assert_array_equal(dequantize(matrix).numpy(), plain_weight(matrix, codes).astype(np.float32))


@settings(max_examples=25)
@given(matrices(), st.integers(1, 3), st.booleans())
def test_the_reference_multiplies_matrices_side_by_side(
    made: tuple[QuantizedMatrix, Tensor], num_rows: int, has_bias: bool
):
    matrix, codes = made
    weight = plain_weight(matrix, codes)
    x = torch.rand(num_rows, matrix.num_inputs) - 0.5
    bias = torch.rand(2 * matrix.num_outputs) if has_bias else None

    found = reference.quantized_linear(x, (matrix, matrix), bias)

    wanted = rounded.times(Rounded.exact(x), torch.from_numpy(np.concatenate([weight] * 2, 1)))
    (wanted if bias is None else wanted + Rounded.exact(bias.expand_as(found))).check(found)


@given(WIDTHS, st.integers(1, 3), st.integers(1, 2), st.integers(0, 1 << 30))
def test_a_line_holds_rows_four_apart_from_the_lowest_bits_up(bits: int, blocks: int, tiles: int, seed: int):
    count, outputs = blocks * BLOCK_ROWS[bits], tiles * TILE
    codes = torch.randint(0, 1 << bits, (count, outputs), generator=torch.Generator().manual_seed(seed)).byte()

    packed = pack(codes, arrange(torch.arange(count), [count], [bits])).tolist()

    for tile, found in enumerate(packed):
        at = 0
        for block in range(0, count, BLOCK_ROWS[bits]):
            low = 0
            for width in PLANES[bits]:
                for line in range(block, block + BLOCK_ROWS[bits], 32 // width):
                    for n in range(TILE):
                        for j in range(4):
                            fields = [int(codes[line + j + 4 * i, tile * TILE + n]) >> low for i in range(8 // width)]
                            byte = sum((field & ((1 << width) - 1)) << (width * i) for i, field in enumerate(fields))
                            assert found[at + 4 * n + j] == byte
                    at += 64
                low += width
        assert at == len(found)


def test_packing_in_slices_gives_the_same_bytes():
    codes = torch.randint(0, 16, (32, 2 * SLICE + 5), dtype=torch.uint8)
    rows = arrange(torch.arange(32), [32], [4])

    assert torch.equal(pack_slices(lambda begin, end: codes[:, begin:end], codes.shape[1], rows), pack(codes, rows))


@given(st.integers(1, 40), st.integers(1, 4), st.sampled_from([8, 16, 64]), st.integers(0, 1 << 30))
def test_nf4_stands_for_the_book_s_numbers_times_the_scales(outputs: int, blocks: int, blocksize: int, seed: int):
    made = torch.Generator().manual_seed(seed)
    codes = torch.randint(0, 16, (outputs, blocks * blocksize), generator=made, dtype=torch.uint8)
    scales, book = torch.rand(outputs, blocks, generator=made), torch.rand(16, generator=made)

    matrix = pack_nf4(codes, scales, book, blocksize)

    assert torch.equal(unpack_nf4(matrix), codes.t())
    assert torch.equal(dequantize(matrix).t(), book[codes.long()] * scales.repeat_interleave(blocksize, 1))


@given(WIDTHS, st.integers(1, 3), st.integers(1, 3), st.integers(0, 1 << 30))
def test_a_stream_is_read_across_the_borders_of_words(bits: int, periods: int, columns: int, seed: int):
    codes = np.random.default_rng(seed).integers(0, 1 << bits, (32 * periods, columns))
    streams = [sum(int(code) << (bits * r) for r, code in enumerate(column)) for column in codes.T]
    words = [[(stream >> (32 * w)) & 0xFFFFFFFF for stream in streams] for w in range(periods * bits)]

    found = unstream(torch.from_numpy(np.array(words, np.uint32).view(np.int32)), bits)

    np.testing.assert_array_equal(found.numpy(), codes)


def test_rows_that_fill_up_a_group_have_no_input():
    rows = arrange(torch.tensor([2, 0, 1]), [1, 2], [4, 8])

    assert rows.source is not None
    assert rows.source.tolist() == [2, *[-1] * 7, 0, 1, *[-1] * 6]
    assert rows.group_starts.tolist() == [0, 8, 16]
    assert Rows(rows.source, rows.group_starts, rows.group_bits).gather(torch.tensor([5, 6, 7])).tolist()[:9] == [
        7, *[0] * 7, 5,
    ]  # fmt: skip
