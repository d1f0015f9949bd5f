"""Copies of single tokens and of pages within a layer's cache, against plain tensors of one token each."""

from dataclasses import replace
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from tightrope.kernels.forms.layout import PAGE, CacheFormat, LayerCache

pytestmark = pytest.mark.quick

NUM_PAGES = 5
NUM_SLOTS = NUM_PAGES * PAGE


def filled(dtype: str, seed: int) -> LayerCache:
    """A cache of 2 heads of 40 values, whose groups of 32 are partly empty, with any bits in it."""
    kind: Any = "f16" if dtype == "float32" else dtype
    cache = LayerCache.allocate(CacheFormat(kind, 2, 40), NUM_PAGES)
    if dtype == "float32":
        cache = replace(cache, key_codes=cache.key_codes.float(), value_codes=cache.value_codes.float())
    rng = torch.Generator().manual_seed(seed)
    for tensor in cache.stored:
        if tensor.numel():
            bits = tensor.view(torch.uint8)
            bits.copy_(torch.randint(0, 256, bits.shape, generator=rng))
    return cache


def tokens(cache: LayerCache) -> list[Tensor]:
    """The bytes of every slot [slots, n], for each part of what is stored."""
    parts = [part.transpose(1, 2).reshape(NUM_SLOTS, -1) for part in cache.stored if part.numel()]
    return [part.contiguous().view(torch.uint8) for part in parts]


@st.composite
def copies(draw: st.DrawFn) -> tuple[list[int], list[int]]:
    """Sources, with repetitions, and different targets: any slots, or one run moved by any offset onto another."""
    if draw(st.booleans()):
        length = draw(st.integers(0, NUM_SLOTS))
        source, target = (draw(st.integers(0, NUM_SLOTS - length)) for _ in range(2))
        return list(range(source, source + length)), list(range(target, target + length))
    targets = draw(st.lists(st.integers(0, NUM_SLOTS - 1), unique=True))
    return [draw(st.integers(0, NUM_SLOTS - 1)) for _ in targets], targets


@pytest.mark.parametrize("dtype", ["q8", "q4", "f16", "float32"])
@settings(max_examples=60)
@given(pair=copies(), seed=st.integers(0, 99))
def test_copied_tokens_have_the_bits_of_their_sources_and_others_are_left_alone(
    dtype: str, pair: tuple[list[int], list[int]], seed: int
) -> None:
    sources, targets = pair
    cache = filled(dtype, seed)
    expected = tokens(cache)
    for part in expected:
        part[targets] = part[sources]  # all are read before one is written

    cache.copy_slots(torch.tensor(sources, dtype=torch.int64), torch.tensor(targets, dtype=torch.int64))

    for part, wanted in zip(tokens(cache), expected, strict=True):
        assert torch.equal(part, wanted)


@pytest.mark.parametrize("dtype", ["q8", "q4", "f16"])
def test_copying_pages_is_copying_all_of_their_slots(dtype: str) -> None:
    by_page, by_slot = filled(dtype, 1), filled(dtype, 1)
    sources, targets = torch.tensor([0, 0, 3]), torch.tensor([1, 4, 2])

    by_page.copy_pages(sources, targets)
    by_slot.copy_slots(*((pages[:, None] * PAGE + torch.arange(PAGE)).flatten() for pages in (sources, targets)))

    for part, other in zip(tokens(by_page), tokens(by_slot), strict=True):
        assert torch.equal(part, other)
