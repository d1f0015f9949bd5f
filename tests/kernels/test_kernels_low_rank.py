"""Low-rank additions of mixed batches: C++, a card's kernels and the reference against plain float64."""

from collections.abc import Iterator, Mapping
from dataclasses import replace
from types import ModuleType

import numpy as np
import pytest
import rounded
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from interpreted import interpreted
from rounded import Rounded
from torch import Tensor

from tightrope.kernels import reference
from tightrope.kernels.cpu import native
from tightrope.kernels.forms.low_rank import (
    NONE,
    AdapterRows,
    LowRank,
    LowRankPart,
    LowRankSlots,
    LowRankTable,
    make_low_rank,
)

pytestmark = pytest.mark.quick

DTYPES = (torch.float32, torch.bfloat16, torch.float16)
SOME = settings(max_examples=25)

Case = tuple[Tensor, Tensor, Mapping[int, LowRank], AdapterRows]


@pytest.fixture(scope="module", params=native.usable() or ["none"])
def kernels(request: pytest.FixtureRequest) -> native.NativeKernels:
    built = native.NativeKernels(request.param)
    built.set_threads(2)
    return built


@st.composite
def cases(draw: st.DrawFn) -> Case:
    """Outputs, inputs, adapters in some slots, and rows that use those, others, or none."""
    torch.manual_seed(draw(st.integers(0, 2**32 - 1)))
    rows, inputs = draw(st.integers(1, 40)), draw(st.integers(1, 150))
    sizes = draw(st.lists(st.integers(1, 300), min_size=1, max_size=3))  # of the linears side by side
    firsts = np.cumsum([0, *sizes]).tolist()
    adapters: dict[int, LowRank] = {}
    for slot in draw(st.sets(st.integers(0, 5), max_size=4)):
        chosen = draw(st.sets(st.integers(0, len(sizes) - 1), min_size=1))
        rank, dtype = draw(st.integers(1, 40)), draw(st.sampled_from(DTYPES))
        pieces = [
            (firsts[i], torch.randn(rank, inputs) / inputs**0.5, torch.randn(sizes[i], rank), draw(st.floats(-2, 2)))
            for i in chosen
        ]
        adapters[slot] = make_low_rank(pieces, dtype)
    slots = torch.tensor(draw(st.lists(st.integers(NONE, 6), min_size=rows, max_size=rows)), dtype=torch.int32)
    present = tuple(sorted(set(slots.tolist()) - {NONE}))
    return (
        torch.randn(rows, firsts[-1]),
        torch.randn(rows, inputs),
        adapters,
        AdapterRows(slots, torch.rand(rows), present),
    )


def exact(case: Case) -> Rounded:
    """In float64, whatever the order of its sums in float32."""
    out, x, adapters, rows = case
    return rounded.low_rank(Rounded.exact(out), Rounded.exact(x), adapters, rows)


@SOME
@given(case=cases())
def test_each_row_gets_what_its_adapter_makes_of_it(kernels: native.NativeKernels, case: Case) -> None:
    expected = exact(case)
    kernels.add_low_rank(*case)
    expected.check(case[0])


@SOME
@given(case=cases())
def test_the_reference_is_the_formula(case: Case) -> None:
    expected = exact(case)
    reference.add_low_rank(*case)
    expected.check(case[0])


@pytest.fixture(scope="module")
def card() -> Iterator[ModuleType]:
    with interpreted("low_rank") as module:
        yield module


def of_one_dtype(adapters: Mapping[int, LowRank], dtype: torch.dtype) -> dict[int, LowRank]:
    """As those of one model are on a card."""
    return {
        slot: LowRank(tuple(replace(part, down=part.down.to(dtype), up=part.up.to(dtype)) for part in low_rank.parts))
        for slot, low_rank in adapters.items()
    }


@pytest.mark.plain
@settings(max_examples=8)
@given(case=cases(), dtype=st.sampled_from(DTYPES))
def test_the_kernels_of_a_card_are_the_formula(card: ModuleType, case: Case, dtype: torch.dtype) -> None:
    out, x, adapters, rows = case
    same = out, x, of_one_dtype(adapters, dtype), rows
    expected = exact(same)
    card.add_low_rank(*same)
    expected.check(out)


@pytest.mark.plain
@settings(max_examples=8)
@given(case=cases())
def test_a_slot_that_is_written_anew_changes_what_the_same_launches_add(card: ModuleType, case: Case) -> None:
    out, x, adapters, rows = case
    slots = LowRankSlots(of_one_dtype(adapters, torch.float16))
    if not slots:
        return
    slots.table = LowRankTable.of(slots)
    for slot in slots:
        slots.table.write(slot, None)
    before = out.clone()

    card.add_low_rank(out, x, slots, rows)
    assert torch.equal(out, before)

    slots.table.write(min(slots), slots[min(slots)])
    expected = exact((out, x, {min(slots): slots[min(slots)]}, rows))
    card.add_low_rank(out, x, slots, rows)
    expected.check(out)


def on_card(rank: int, outputs: int) -> LowRank:
    """Matrices whose memory is nobody's."""
    return LowRank((LowRankPart(0, torch.empty(rank, 8, device="meta"), torch.empty(rank, outputs, device="meta")),))


def test_slots_say_when_kernels_are_launched_otherwise() -> None:
    slots = LowRankSlots()

    assert slots.put(0, on_card(8, 32))  # The first is launched at all.
    assert not slots.put(1, on_card(16, 32))
    assert slots.put(2, on_card(17, 32))  # Of a larger rank.
    assert not slots.put(3, on_card(20, 32))
    assert slots.put(3, on_card(20, 33))  # Of more outputs.
    assert slots.put(4, on_card(1, 1))  # In a slot beyond the table.
    for slot in range(5):
        slots.drop(slot)
    assert slots.put(0, on_card(8, 32))  # What was recorded meanwhile launches nothing.
    assert not slots.put(1, on_card(8, 32))
    assert not LowRankSlots().put(0, LowRank((LowRankPart(0, torch.ones(1, 8), torch.ones(1, 4)),)))  # On a CPU.
