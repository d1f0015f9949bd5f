"""Packed weights laid out anew by every build are those of torch, byte for byte."""

from collections.abc import Callable
from typing import TypeVar
from unittest.mock import patch

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from streams import unstream
from torch import Tensor

from tightrope.kernels import packing
from tightrope.kernels.cpu import native
from tightrope.kernels.cpu.packing import NativePacking
from tightrope.kernels.forms.quantized import PLANES, Rows, arrange, pack, tiled, unpack_nf4

pytestmark = pytest.mark.quick

T = TypeVar("T")

BUILDS = st.sampled_from([NativePacking(name) for name in native.usable()] or [None])
SEEDS = st.integers(0, 1 << 30)


def words_of(made: torch.Generator, *shape: int) -> Tensor:
    return torch.randint(-(1 << 31), 1 << 31, shape, generator=made).int()


def both(build: NativePacking | None, work: Callable[[], T]) -> tuple[T, T]:
    """What a build gives, and torch."""
    found: list[T] = []
    for one in (build, None):
        with patch.object(packing, "_native", lambda one=one: one):
            found.append(work())
    return found[0], found[1]


@st.composite
def columns(draw: st.DrawFn) -> tuple[Tensor, Tensor, Rows, int, Tensor]:
    """Words with groups of several widths one below the other, and the codes [R, N] that they are."""
    groups = draw(st.lists(st.tuples(st.integers(1, 3), st.sampled_from(sorted(PLANES))), min_size=1, max_size=5))
    outputs, more = draw(st.integers(1, 70)), draw(st.integers(0, 9))
    made = torch.Generator().manual_seed(draw(SEEDS))
    counts = [32 * count for count, _ in groups]
    widths = [bits for _, bits in groups]
    words = [words_of(made, count * bits // 32, outputs + more) for count, bits in zip(counts, widths, strict=True)]
    order = torch.randperm(sum(counts), generator=made) if draw(st.booleans()) else torch.arange(sum(counts))
    rows = arrange(order, counts, widths)
    codes = torch.cat([unstream(group, bits)[:, :outputs] for group, bits in zip(words, widths, strict=True)])
    firsts = torch.tensor([0, *(len(group) for group in words)]).cumsum(0)[:-1] * 32
    starts = torch.cat(
        [first + bits * torch.arange(count) for first, bits, count in zip(firsts, widths, counts, strict=True)]
    )
    return torch.cat(words), starts, rows, outputs, codes


@settings(max_examples=60)
@given(columns(), BUILDS)
def test_codes_down_columns_are_packed_as_they_stand(
    made: tuple[Tensor, Tensor, Rows, int, Tensor], build: NativePacking | None
):
    words, starts, rows, outputs, codes = made

    found, plain = both(build, lambda: packing.pack_columns(words, starts, rows, outputs, packing.new_tiles))

    assert torch.equal(found, plain)
    assert torch.equal(found, pack(codes, rows))


@given(st.sampled_from(sorted(PLANES)), st.integers(1, 40), st.integers(1, 90), SEEDS, BUILDS)
def test_rows_in_an_order_of_their_own_fill_up_their_groups(
    bits: int, outputs: int, size: int, seed: int, build: NativePacking | None
):
    made = torch.Generator().manual_seed(seed)
    words, order = words_of(made, 4 * bits, outputs), torch.randperm(128, generator=made)
    sizes = [size, 128 - size]
    rows = arrange(order, sizes, [bits, bits])
    source = torch.arange(128) if rows.source is None else rows.source.long()

    starts = torch.where(source < 0, -1, bits * source)
    found, plain = both(build, lambda: packing.pack_columns(words, starts, rows, outputs, packing.new_tiles))

    assert torch.equal(found, plain)
    assert torch.equal(found, pack(rows.gather(unstream(words, bits)), rows))


@given(st.integers(1, 40), st.sampled_from([4, 8, 16]), SEEDS, BUILDS)
def test_nibbles_along_rows_are_packed_in_their_order(eights: int, size: int, seed: int, build: NativePacking | None):
    made = torch.Generator().manual_seed(seed)
    words, nibble_of = words_of(made, 32, eights), torch.randperm(8, generator=made).int()
    rows = arrange(torch.arange(32), [size] * (32 // size), [4] * (32 // size))
    codes = torch.stack([(words >> int(4 * nibble)) & 15 for nibble in nibble_of], -1).flatten(1).byte()

    found, plain = both(build, lambda: packing.pack_nibbles(words, nibble_of, rows, 8 * eights, packing.new_tiles))

    assert torch.equal(found, plain)
    assert torch.equal(found, pack(rows.gather(codes), rows))


@given(st.sampled_from([2, 3, 4, 8]), st.integers(1, 3), st.integers(1, 5), SEEDS, BUILDS)
def test_zero_points_along_rows_are_unpacked(
    bits: int, blocks: int, groups: int, seed: int, build: NativePacking | None
):
    made = torch.Generator().manual_seed(seed)
    words = words_of(made, groups, blocks * bits)  # 32 * blocks outputs
    outputs = 32 * blocks - 5
    starts = bits * torch.arange(outputs, dtype=torch.int32)

    found, plain = both(build, lambda: packing.unpack_rows(words, starts, bits, 1, torch.int16))

    assert torch.equal(found, plain)
    assert torch.equal(found, tiled(unstream(words.t().contiguous(), bits).t()[:, :outputs].short() + 1))


@given(st.integers(1, 40), st.integers(1, 40), st.sampled_from([8, 16, 64]), SEEDS, BUILDS)
def test_pairs_of_codes_find_their_block_s_scale(
    outputs: int, eights: int, blocksize: int, seed: int, build: NativePacking | None
):
    made = torch.Generator().manual_seed(seed)
    inputs = 8 * eights
    run = 8 if inputs % blocksize else blocksize
    raw = torch.randint(0, 256, (outputs * inputs // 2,), generator=made, dtype=torch.uint8)
    scales = torch.rand(-(-outputs * inputs // blocksize), generator=made)

    found, plain = both(
        build, lambda: packing.pack_pairs(raw, scales, (outputs, inputs), blocksize, run, torch.arange(16.0))
    )

    assert torch.equal(found.codes, plain.codes)
    assert torch.equal(found.scales, plain.scales)
    codes = torch.stack((raw >> 4, raw & 15), 1).view(outputs, inputs)
    assert torch.equal(unpack_nf4(found).t(), codes)


@given(
    st.sampled_from([torch.float32, torch.bfloat16, torch.float16]),
    st.sampled_from([None, float("nan"), float("inf"), float("-inf")]),
    st.integers(1, 3000),
    SEEDS,
    BUILDS,
)
def test_a_copy_says_whether_all_numbers_are_finite(
    dtype: torch.dtype, wrong: float | None, count: int, seed: int, build: NativePacking | None
):
    numbers = torch.randn(count, generator=torch.Generator().manual_seed(seed)).to(dtype)
    numbers[0] = torch.finfo(dtype).max
    if wrong is not None:
        numbers[seed % count] = wrong

    for one in (build, None):
        with patch.object(packing, "_native", lambda one=one: one):
            target = torch.empty_like(numbers)
            assert packing.copy_finite(target, numbers) is (wrong is None)
            assert torch.equal(target.view(torch.uint8), numbers.view(torch.uint8))
