"""How a model is split over ranks: every output is one rank's, and borders are where formats can be cut."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tightrope.backends.errors import BackendError
from tightrope.backends.tensor_parallel import BORDERS, Heads, Share, columns, heads, joined, size_of, within

counts = st.integers(2, 9)


@given(total=st.integers(1, 20_000), count=counts)
def test_columns_are_shared_out_evenly_at_the_borders_of_tiles(total: int, count: int):
    sizes = columns(total, count)

    if sizes is None:
        assert total < BORDERS[-1] * count  # Too few: each rank has all.
        assert Share(count - 1, count).columns(total) == (0, total)
        return
    assert sum(sizes) == total
    assert len(sizes) == count
    unit = BORDERS[0] if total >= BORDERS[0] * count else BORDERS[1]
    assert all(size % unit == 0 and size >= unit for size in sizes[:-1])
    assert max(sizes) - min(sizes) < 2 * unit
    spans = [Share(rank, count).columns(total) for rank in range(count)]
    assert joined(spans) == ((0, total),)


def test_one_rank_has_all_columns():
    assert columns(4096, 1) is None
    assert Share().columns(4096) == (0, 4096)


def test_uneven_groups_of_heads_go_whole_to_ranks():
    # SmolLM2 has nine heads of queries on three of keys.
    assert heads(9, 3, 2) == (Heads((0, 6), (0, 2)), Heads((6, 9), (2, 3)))


def test_ranks_beyond_the_heads_of_keys_share_a_group_and_hold_its_keys_each():
    assert heads(4, 1, 2) == (Heads((0, 2), (0, 1)), Heads((2, 4), (0, 1)))
    assert heads(9, 3, 4) == (
        Heads((0, 2), (0, 1)),
        Heads((2, 3), (0, 1)),
        Heads((3, 6), (1, 2)),
        Heads((6, 9), (2, 3)),
    )


@given(kv=st.integers(1, 9), group=st.integers(1, 9), count=counts)
def test_every_head_of_queries_is_one_ranks_which_has_the_keys_that_it_attends(kv: int, group: int, count: int):
    if count > kv * group:
        with pytest.raises(BackendError, match=rf"--tensor-parallel {count}: .* at most {kv * group}"):
            heads(kv * group, kv, count)
        return
    found = heads(kv * group, kv, count)

    assert joined([one.queries for one in found]) == ((0, kv * group),)
    for one in found:
        first, last = one.queries[0], one.queries[1] - 1
        assert one.num_queries > 0
        assert one.num_queries % one.num_keys == 0
        assert (first // group, last // group + 1) == one.keys


def test_spans_of_a_part_count_from_its_beginning():
    spans = ((32, 64), (96, 128))

    assert within(spans, 0, 96) == ((32, 64),)
    assert within(spans, 48, 112) == ((0, 16), (48, 64))
    assert size_of(within(spans, 64, 96)) == 0
