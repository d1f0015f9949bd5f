"""How much a card expands at a time: slices of matrices, and one sequence's keys and values."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tightrope.backends.hf.modules.step import LayerInfo, scratch_bytes
from tightrope.kernels.forms.expanded import (
    SLICE_BYTES,
    SLICE_OUTPUTS,
    expanded_cache_bytes,
    slice_bytes,
    slice_outputs,
)
from tightrope.kernels.forms.layout import AttentionSpec

pytestmark = pytest.mark.quick


@given(st.integers(1, 1 << 15), st.integers(1, 1 << 18), st.sampled_from([2, 4]))
def test_slices_are_whole_matrices_or_as_large_as_they_should_be_and_even(inputs: int, outputs: int, itemsize: int):
    size = slice_outputs(inputs, outputs, itemsize)
    rounding = SLICE_OUTPUTS * inputs * itemsize

    assert 0 < size <= outputs
    assert size == outputs or size % SLICE_OUTPUTS == 0
    assert size == outputs or size * inputs * itemsize >= SLICE_BYTES
    assert slice_bytes(inputs, outputs, itemsize) == size * inputs * itemsize < 2 * SLICE_BYTES + rounding


@pytest.mark.parametrize(
    ("inputs", "outputs", "slices"), [(7168, 7168, 1), (7168, 20480, 2), (20480, 7168, 2), (7168, 40960, 4)]
)
def test_the_matrices_of_a_34b_model_are_cut_into_few_slices(inputs: int, outputs: int, slices: int):
    assert -(-outputs // slice_outputs(inputs, outputs, 2)) == slices


def test_the_scratch_holds_the_longest_sequence_in_the_widest_layer_that_is_expanded():
    plain, capped, windowed = AttentionSpec(0.1), AttentionSpec(0.1, softcap=30.0), AttentionSpec(0.1, window=512)
    layers = [LayerInfo(8, 128, plain, None), LayerInfo(2, 256, plain, None), LayerInfo(64, 128, windowed, None)]

    assert scratch_bytes(layers, 24_000) == expanded_cache_bytes(24_000, 8, 128) == 24_000 * 8 * 128 * 2 * 2
    assert scratch_bytes([LayerInfo(8, 128, capped, None), layers[2]], 24_000) == 0
