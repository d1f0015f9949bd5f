"""Damage to the caches' books, a kind at a time: each is noticed, in a line that says what is wrong."""

from collections.abc import Callable

import pytest
from cells_driver import Driver as Cells
from fakes import FakeKV
from pages_driver import Driver as Pages

from tightrope.backends.gguf.cache import SharedKVCache
from tightrope.backends.hf.cache.live import Ahead
from tightrope.backends.hf.cache.page_tree import Page
from tightrope.backends.hf.cache.pages import PagedKVCache

pytestmark = pytest.mark.quick


@pytest.fixture
def pages() -> PagedKVCache:
    """Two live sequences that share two pages, and a finished one of three pages; with window pages."""
    driver = Pages(16, window=20, num_window_pages=12)
    driver.run(1, range(100, 140))
    driver.close(1)
    driver.run(2, range(40))
    driver.run(3, [*range(32), 99])
    driver.check()
    return driver.cache


def first(pages: PagedKVCache) -> Page:
    return pages._live[2].pages[0]


PAGE_DAMAGE: dict[str, tuple[Callable[[PagedKVCache], object], str]] = {
    "a page that is free and in use": (
        lambda c: c._free.append(first(c).number),
        r"page \d+ is free or in use 2 times",
    ),
    "a page that is lost": (lambda c: c._free.pop(), r"page \d+ is free or in use 0 times"),
    "a page that doesn't exist": (lambda c: c._free.append(16), "page 16 of 16 is in use"),
    "a reference too many": (
        lambda c: setattr(first(c), "refs", 3),
        r"counts 3 references, and 2 sequences hold it",
    ),
    "a held page that may be evicted": (lambda c: c._idle.update({first(c): None}), "waits to be evicted"),
    "a writer who has left": (lambda c: setattr(first(c), "writer", object()), "written by a sequence that doesn't"),
    "a wrong table": (lambda c: c._live[2].table.__setitem__(0, 15), "sequence 2: its table names other pages"),
    "more findable than stored": (lambda c: setattr(c._live[2], "num_findable", 41), "41 of 40 tokens may be found"),
    "more stored than there is room for": (lambda c: setattr(c._live[2], "length", 49), "of 49 tokens .* in 3 pages"),
    "a page out of the tree": (
        lambda c: next(iter(c._idle)).parent.children.clear(),  # type: ignore[union-attr]
        r"can't be found|belongs to nobody|with 0 pages below it",
    ),
    "a page below another": (lambda c: setattr(first(c), "parent", next(iter(c._idle))), "hangs in two places"),
    "tokens out of order": (lambda c: _root(c).children.reverse(), "not in the order of their tokens"),
    "a short page with others below": (
        lambda c: setattr(first(c), "tokens", first(c).tokens[:3]),
        r"page \d+ of 3 tokens has others below it",
    ),
    "findable tokens that aren't in the tree": (
        lambda c: setattr(c._live[2].pages[2], "tokens", (32,)),
        "sequence 2: its tokens from 32 on can't be found",
    ),
    "an exact page below one that isn't": (
        lambda c: setattr(first(c), "is_exact", False),
        "is exact or not, and hangs",
    ),
    "an exact page where its sequence isn't": (lambda c: setattr(c._live[2], "num_exact", 20), "only 20 of its tokens"),
    "a run that lies behind no gap": (
        lambda c: c._live[2].ahead.append(Ahead(40, (1, 2))),
        "sequence 2: 2 of its tokens stand behind a gap at 40, and others up to 40",
    ),
    "a run that lies behind its pages": (
        lambda c: c._live[2].ahead.append(Ahead(45, (1, 2, 3, 4))),
        "sequence 2: its tokens reach to 49, in 3 pages",
    ),
    "a root under a wrong name": (lambda c: setattr(_root(c), "key", "other"), "is called 'other'"),
    "a window too many": (lambda c: setattr(c._live[2].pages[2], "window_refs", 2), "counts 2 windows, and 1"),
    "a window page that is lost": (lambda c: c._windows._free.pop(), "a window page is lost"),
    "a window page that nobody can reclaim": (lambda c: c._windows._idle.clear(), "wait for a new use"),
}


def _root(cache: PagedKVCache):  # noqa: ANN202
    return next(iter(cache._roots.values()))


@pytest.mark.parametrize(("damage", "says"), PAGE_DAMAGE.values(), ids=PAGE_DAMAGE)
def test_damage_to_the_books_of_pages_is_noticed(
    pages: PagedKVCache, damage: Callable[[PagedKVCache], object], says: str
) -> None:
    damage(pages)

    with pytest.raises(AssertionError, match=says) as caught:
        pages.check_integrity()
    assert "\n" not in str(caught.value)


@pytest.fixture
def cells() -> Cells:
    """Two live sequences that share their beginning, and a finished one."""
    driver = Cells(capacity=64, slots=5, swap_bytes=100)
    driver.run(2, range(20))
    driver.run(1, range(100, 110))
    driver.cache.close(1, keep=True)  # It stays in its cells beside a live one.
    driver.run(3, [*range(15), 99])
    assert driver.cache.reserve(2, 3)
    driver.cache.check_integrity()
    return driver


def _swap_too_much(cache: SharedKVCache) -> None:
    cache._swap_out_idle(0)
    cache._swap._store.host_bytes = 9


CELL_DAMAGE: dict[str, tuple[Callable[[Cells], object], str]] = {
    "a reference too many": (lambda d: d.cache._cells._refs.__iadd__(1), r"cell 0 counts \d references and has \d"),
    "a pin too few": (
        lambda d: d.cache._cells._pins.__setitem__(d.cache._live[2].cells[0], 1),
        r"cell \d+ counts 1 pins and has 2",
    ),
    "a free cell that is held": (
        lambda d: d.cache._cells._free.__setitem__(0, d.cache._live[2].cells[0]),
        "free cells are not the",
    ),
    "a free cell too few": (lambda d: setattr(d.cache._cells, "num_free", 1), "the 1 free cells are not the"),
    "a wrong count of pinned cells": (lambda d: setattr(d.cache._cells, "num_pinned", 5), "5 cells are counted"),
    "a cell that a sequence holds twice": (
        lambda d: d.cache._kept[0].cells.__setitem__(1, d.cache._kept[0].cells[0]),
        r"references and has|holds a cell twice",
    ),
    "room that nobody asked for": (lambda d: setattr(d.cache, "_reserved", 9), "3 tokens have room, 9 are counted"),
    "a slot that is lost": (lambda d: d.cache._free_slots.pop(), "a slot is lost"),
    "a slot in use twice": (lambda d: d.cache._free_slots.append(d.cache.slot(2)), "a slot is lost, or in use twice"),
    "cells that llama.cpp has not": (
        lambda d: d.store.remove_cells(d.cache.slot(2), 12),
        "should hold 20 tokens, and its last position is 11",
    ),
    "cells in a free slot": (lambda d: d.store.append(d.cache._free_slots[0], 1), "should hold 0 tokens"),
    "more swapped out than there is memory": (
        lambda d: _swap_too_much(d.cache),
        "10 bytes are kept beside the cache, 10 are counted, of 9",
    ),
}


@pytest.mark.parametrize(("damage", "says"), CELL_DAMAGE.values(), ids=CELL_DAMAGE)
def test_damage_to_the_books_of_cells_is_noticed(cells: Cells, damage: Callable[[Cells], object], says: str) -> None:
    damage(cells)

    with pytest.raises(AssertionError, match=says) as caught:
        cells.cache.check_integrity()
    assert "\n" not in str(caught.value)


def test_damage_to_the_books_of_the_fake_cache_is_noticed() -> None:
    kv = FakeKV(50)
    for seq_id, namespace in enumerate("ab"):
        kv.open(seq_id, range(10), namespace)
        assert kv.reserve(seq_id, 10)
        kv.commit(seq_id, 0, range(10))
    kv.check_integrity()
    kv.live[1].cells[3] = kv.live[0].cells[3]

    with pytest.raises(AssertionError, match="shared by what differs"):
        kv.check_integrity()
