"""Which layers go where, by sizes alone: for every cut of a row of layers that some devices hold, one is found."""

from itertools import combinations_with_replacement

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tightrope.backends.devices.spread import are_alike
from tightrope.backends.hf.placement import left_over, place

pytestmark = pytest.mark.quick

SIZES = st.integers(0, 30)


@st.composite
def rows(draw: st.DrawFn) -> tuple[list[list[int]], list[int]]:
    """Costs by device and layer, and rooms by device."""
    num_devices, num_layers = draw(st.integers(1, 3)), draw(st.integers(1, 7))
    mine = st.lists(SIZES, min_size=num_layers, max_size=num_layers)
    costs = draw(st.lists(mine, min_size=num_devices, max_size=num_devices))
    return costs, draw(st.lists(st.integers(-5, 90), min_size=num_devices, max_size=num_devices))


def fits(counts: tuple[int, ...], costs: list[list[int]], rooms: list[int]) -> bool:
    start = 0
    for mine, room, count in zip(costs, rooms, counts, strict=True):
        if count and sum(mine[start : start + count]) > room:
            return False
        start += count
    return start == len(costs[0])


@given(rows())
def test_a_placement_holds_every_layer_once_and_no_device_more_than_it_has(row: tuple[list[list[int]], list[int]]):
    costs, rooms = row
    found = place(costs, rooms)

    assert found == () or fits(found, costs, rooms)
    assert bool(found) == (left_over(costs, rooms) == 0 and (bool(found) or sum(costs[-1]) == 0))


@given(rows())
def test_where_devices_count_layers_alike_one_is_found_if_there_is_any(row: tuple[list[list[int]], list[int]]):
    costs, rooms = row
    alike = [costs[0]] * len(rooms)
    num_layers = len(costs[0])
    cuts = combinations_with_replacement(range(num_layers + 1), len(rooms) - 1)
    counts = (tuple(b - a for a, b in zip((0, *cut), (*cut, num_layers), strict=True)) for cut in cuts)
    is_possible = any(fits(one, alike, rooms) for one in counts)

    assert bool(place(alike, rooms)) == is_possible


@given(rows(), st.integers(0, 40))
def test_more_room_never_makes_a_placement_impossible(row: tuple[list[list[int]], list[int]], more: int):
    costs, rooms = row
    alike = [costs[0]] * len(rooms)

    if place(alike, rooms):
        assert place(alike, [room + more for room in rooms])


@given(rows(), st.data())
def test_a_device_takes_no_more_layers_than_it_may(row: tuple[list[list[int]], list[int]], data: st.DataObject):
    costs, rooms = row
    most = [data.draw(st.integers(0, len(costs[0]))) for _ in rooms]
    found = place(costs, rooms, most)

    assert all(count <= limit for count, limit in zip(found, most, strict=False))
    assert found == () or fits(found, costs, rooms)


def test_devices_are_filled_in_order():
    assert place([[10] * 6] * 2, [40, 100]) == (4, 2)
    assert place([[10] * 6] * 3, [40, 100, 100]) == (4, 2, 0)
    assert place([[10] * 6] * 2, [5, 100]) == (0, 6)
    assert place([[10] * 6] * 2, [40, 10]) == ()
    assert left_over([[10] * 6] * 2, [40, 10]) == 10


@pytest.mark.parametrize(("free", "alike"), [((24, 24), True), ((24, 22), True), ((24, 12), False), ((8,), True)])
def test_cards_are_alike_where_the_smallest_wastes_little_of_the_largest(free: tuple[int, ...], alike: bool):
    assert are_alike(free) is alike
