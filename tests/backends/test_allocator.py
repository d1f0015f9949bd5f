"""How much of a card torch's allocator takes for tensors: by its own rules for blocks and segments."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tightrope.backends.allocator import held_bytes

pytestmark = pytest.mark.quick

KIB, MIB = 1 << 10, 1 << 20


@pytest.mark.parametrize(
    ("sizes", "held"),
    [
        ([], 0),
        ([0, 0], 0),
        ([1], 2 * MIB),
        ([512 * KIB] * 4, 2 * MIB),
        ([512 * KIB] * 5, 4 * MIB),
        ([MIB], 2 * MIB),
        ([MIB + 1], 20 * MIB),
        ([9 * MIB] * 2, 20 * MIB),
        ([9 * MIB] * 3, 40 * MIB),
        ([10 * MIB], 10 * MIB),
        ([10 * MIB + 1], 12 * MIB),
        ([10 * MIB + 1, MIB + 1], 12 * MIB),  # the second one fits into what the first leaves
        ([11 * MIB, MIB + 1], 32 * MIB),  # of which less than a mebibyte is left
        ([15 * MIB, 10 * MIB], 26 * MIB),
    ],
)
def test_tensors_take_segments_as_torchs_allocator_does(sizes: list[int], held: int):
    assert held_bytes(sizes) == held


@given(st.lists(st.integers(0, 100 * MIB), max_size=30))
def test_no_more_is_taken_than_each_would_alone_and_no_less_than_all_have(sizes: list[int]):
    assert sum(sizes) <= held_bytes(sizes) <= sum(held_bytes([size]) for size in sizes)
