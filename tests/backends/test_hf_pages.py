"""The paged cache's bookkeeping, over a pretend storage that remembers what every place of every page was told."""

from unittest.mock import patch

import numpy as np
import pytest
from fakes import FakeKV
from hypothesis import given, settings
from hypothesis import strategies as st
from pages_driver import MOST_LIVE, MOST_TOKENS, Driver, EagerStore, short_moves

from tightrope.backends.errors import BackendError
from tightrope.backends.hf.cache import page_pool, stored_pages
from tightrope.backends.hf.cache.pages import PagedKVCache
from tightrope.backends.hf.cache.window_pages import most_needed
from tightrope.backends.protocol import KVUsage
from tightrope.backends.sessions.store import RunStore
from tightrope.kernels.forms.layout import PAGE

pytestmark = pytest.mark.quick


def test_the_next_turn_of_a_chat_computes_only_what_is_new() -> None:
    driver = Driver()
    driver.run(1, range(20))
    driver.close(1)
    assert driver.run(2, range(30)) == 20
    assert driver.cache.usage() == KVUsage(128, 32, 0, PAGE)  # the first turn was taken over, not copied
    driver.check()


def test_the_same_prompt_again_runs_its_last_token_only() -> None:
    driver = Driver()
    for seq_id, length in enumerate((20, 32)):
        driver.run(2 * seq_id, range(length), str(seq_id))
        driver.close(2 * seq_id)
        assert driver.run(2 * seq_id + 1, range(length), str(seq_id)) == length - 1
    driver.check()


def test_siblings_share_full_pages_and_copy_the_last_one() -> None:
    driver = Driver(num_pages=16)
    driver.run(1, range(40))
    for seq_id in (2, 3, 4):
        assert driver.open(seq_id, range(40)) == 39
        assert driver.reserve(seq_id, 5)
    tables = [driver.pages(seq_id) for seq_id in (1, 2, 3, 4)]
    assert len({tuple(table[:2]) for table in tables}) == 1
    assert len({table[2] for table in tables}) == 4
    assert driver.cache.copies.next().pages == [(tables[0][2], table[2]) for table in tables[1:]]
    driver.store(1, [7, 7])  # the one that was copied writes on
    for seq_id in (2, 3, 4):
        driver.store(seq_id, [39, seq_id])
    driver.check()


def test_a_page_is_copied_before_it_is_given_away() -> None:
    driver = Driver(num_pages=4)
    driver.run(1, range(20))
    driver.close(1)
    driver.open(2, [*range(18), 99])
    assert driver.reserve(2, 1)  # copies the second page
    driver.open(3, range(100, 132))
    assert driver.reserve(3, 32)
    assert driver.cache.copies.next().pages[0][0] in driver.pages(3)  # the page that is to be copied went to another
    driver.store(3, range(100, 132))
    driver.store(2, [99])
    driver.check()


def test_a_lone_sequence_gets_all_pages_even_where_it_borrows_one() -> None:
    driver = Driver(num_pages=4)
    driver.run(1, range(40))
    driver.close(1)
    assert driver.run(2, [*range(36), *range(100, 128)]) == 36  # all 64 places, 3 pages of which another held
    driver.check()


def test_namespaces_never_share() -> None:
    driver = Driver()
    driver.run(1, range(20), "alice")
    assert driver.run(2, range(20), "bob") == 0
    driver.close(1)
    assert driver.open(3, range(21), "bob") == 20
    assert driver.open(4, range(21), "alice") == 20


def test_without_reuse_nothing_is_found_and_twins_are_merged_at_the_end() -> None:
    driver = Driver()
    driver.run(1, range(40))
    assert driver.run(2, range(40), reuse="nothing") == 0
    assert driver.cache.usage().used == 6 * PAGE
    driver.close(1)
    driver.close(2)
    assert driver.cache.usage() == KVUsage(128, 0, 48, PAGE)
    assert driver.open(3, range(41)) == 40
    driver.check()


def test_a_merged_page_keeps_what_hangs_below_it() -> None:
    driver = Driver(num_pages=16)
    driver.run(1, range(16), reuse="nothing")
    driver.run(2, range(16), reuse="nothing")
    driver.extend(1, range(100, 116))
    driver.extend(2, range(200, 216))
    driver.close(1)
    driver.close(2)
    assert driver.cache.usage().reusable == 3 * PAGE
    assert driver.open(3, [*range(16), *range(100, 117)]) == 32
    assert driver.open(4, [*range(16), *range(200, 217)]) == 32
    driver.check()


def test_a_reservation_that_can_not_be_met_changes_nothing() -> None:
    driver = Driver(num_pages=4)
    driver.run(1, range(16))
    driver.close(1)
    driver.run(2, range(100, 132))
    assert not driver.reserve(2, 33)
    assert driver.cache.usage() == KVUsage(64, 32, 16, PAGE)
    assert driver.reserve(2, 32)


def test_eviction_takes_the_end_of_the_least_recently_used_first() -> None:
    driver = Driver(num_pages=8)
    for seq_id, start in ((1, 100), (2, 200)):
        driver.run(seq_id, range(start, start + 48))
        driver.close(seq_id)
    driver.run(3, range(300, 348))  # one page short: the last of sequence 1 goes
    driver.close(3, keep=False)
    assert driver.open(4, range(100, 149)) == 32
    assert driver.open(5, range(200, 249)) == 48


def test_a_match_makes_a_kept_sequence_recent() -> None:
    driver = Driver(num_pages=5)
    for seq_id, start in ((1, 100), (2, 200)):
        driver.run(seq_id, range(start, start + 32))
        driver.close(seq_id)
    driver.run(3, range(100, 120))
    driver.close(3, keep=False)
    driver.run(4, range(400, 432))  # one page short: sequence 2 loses it, though 1 is older
    driver.close(4, keep=False)
    assert driver.open(5, range(100, 133)) == 32


def test_what_is_not_kept_can_not_be_found_but_what_it_had_found_can() -> None:
    driver = Driver()
    driver.run(1, range(20))
    driver.close(1)
    driver.run(2, [*range(16), *range(50, 90)])
    driver.close(2, keep=False)
    assert driver.cache.usage() == KVUsage(128, 0, 32, PAGE)
    assert driver.open(3, [*range(16), *range(50, 90)]) == 16
    assert driver.open(4, range(21)) == 20


def test_room_that_is_reserved_comes_back_when_a_sequence_ends_or_is_cut() -> None:
    driver = Driver()
    driver.run(1, range(10))
    assert driver.reserve(1, 100)
    assert driver.cache.usage().used == 112
    driver.truncate(1, 10)
    assert driver.cache.usage().used == 16
    assert driver.reserve(1, 100)
    driver.close(1)
    assert driver.cache.usage() == KVUsage(128, 0, 16, PAGE)


def test_a_sequence_that_is_cut_where_others_read_writes_elsewhere() -> None:
    driver = Driver()
    driver.run(1, range(30))
    driver.open(2, [*range(25), 99])
    driver.truncate(1, 20)
    assert driver.extend(1, [7, 8, 9, 10, 11, 12])
    assert driver.extend(2, [99])
    driver.check()


def test_what_was_cut_off_can_not_be_found() -> None:
    driver = Driver()
    driver.run(1, range(60))
    driver.truncate(1, 21)
    assert driver.open(2, range(60)) == 21


def test_beyond_the_trained_window_only_prompts_of_equal_length_share() -> None:
    driver = Driver(num_pages=32, trained_len=32)
    driver.run(1, range(50))
    driver.extend(1, range(50, 60))  # written with other frequencies than the prompt
    assert driver.open(2, range(60)) == 0
    assert driver.open(3, range(50)) == 49
    assert driver.run(4, range(30)) == 0
    driver.extend(4, [30, 31, 32, 33])  # leaves the window in the middle of a step
    driver.close(4)
    assert driver.open(5, range(31)) == 30
    assert driver.open(6, range(32)) == 30
    driver.check()


def test_a_sequence_cut_back_into_the_trained_window_is_shared_again() -> None:
    driver = Driver(trained_len=32)
    driver.run(1, range(30))
    driver.extend(1, range(30, 40))
    driver.truncate(1, 30)
    driver.extend(1, [30, 31])
    assert driver.open(2, range(32)) == 31
    driver.check()


def test_namespaces_that_hold_nothing_leave_nothing_behind() -> None:
    driver = Driver(num_pages=2)
    for seq_id in range(50):
        driver.run(seq_id, range(20), f"user {seq_id}")
        driver.close(seq_id)
    assert len(driver.cache._roots) == 1


def test_a_block_table_names_a_page_for_every_page_of_tokens() -> None:
    cache = PagedKVCache(200)
    cache.open(1, range(2000), "")
    assert cache.reserve(1, 2000)
    table = cache.block_table(1, 2000)
    assert table.dtype == np.int32
    assert len(set(table.tolist())) == 125
    assert len(cache.block_table(1, 17)) == 2


def windowed(window: int, *, num_seqs: int = 1) -> Driver:
    """A cache of plenty of pages, and of no more window pages than so many live sequences need."""
    return Driver(64, window=window, num_window_pages=most_needed(window, num_seqs, MOST_TOKENS))


def test_a_long_sequence_goes_through_few_window_pages() -> None:
    driver = windowed(40)
    driver.open(1, range(900))
    for start in range(0, 900, 90):
        assert driver.extend(1, range(start, start + 90))
        driver.check()
    assert len(driver.window_storage) < len(driver.storage) / 4


def test_the_next_turn_goes_on_where_the_last_window_still_is() -> None:
    driver = windowed(40)
    driver.run(1, range(100))
    driver.close(1)
    assert driver.open(2, range(110)) == 100
    assert driver.extend(2, range(100, 110))
    driver.check()


def test_a_beginning_whose_window_went_to_others_is_found_as_far_as_one_can_go_on() -> None:
    driver = windowed(40, num_seqs=2)
    driver.run(1, range(64))
    driver.open(2, [*range(64), *range(500, 800)])
    for start in range(500, 800, 100):
        assert driver.extend(2, range(start, start + 100))  # its windows push out those in the middle
    driver.close(2)
    assert driver.open(3, [*range(64), *range(500, 600)]) == 64  # where a live sequence still has its window
    driver.close(3)
    assert driver.open(4, [*range(64), *range(500, 900)]) == 364
    driver.check()


def test_a_beginning_without_any_window_is_computed_again() -> None:
    driver = windowed(40)
    driver.run(1, range(100))
    driver.close(1)
    for start in range(1000, 1400, 100):
        driver.run(start, range(start, start + 100))
        driver.close(start)
    assert driver.cache.usage().reusable == 5 * 7 * PAGE  # all tokens are there still
    assert driver.run(2, range(100)) == 0
    driver.check()


def test_a_sequence_goes_back_as_far_as_its_window_is_there_and_else_stays_as_it_was() -> None:
    driver = windowed(40)
    driver.run(1, range(100))
    driver.truncate(1, 70)
    for start in (200, 300, 400):
        assert driver.extend(1, range(start, start + 100))
    with pytest.raises(BackendError, match="can't go back to token 60"):
        driver.truncate(1, 60)
    assert driver.extend(1, [7, 8])
    driver.check()


def test_siblings_write_window_pages_of_their_own() -> None:
    driver = windowed(40, num_seqs=3)
    driver.run(1, range(100))
    for seq_id in (2, 3):
        assert driver.open(seq_id, range(100)) == 99
        assert driver.extend(seq_id, [99, seq_id])
    assert driver.extend(1, [55])
    driver.check()


# Prompts branch off two texts of few different tokens, so that beginnings meet in the middle of pages.
TEXTS = [[i * i // 7 % 3 for i in range(120)], [i * i // 5 % 2 for i in range(120)]]
REUSE = st.sampled_from(["nothing", "exact", "moved"])
PROMPTS = st.builds(
    lambda text, length, tail: TEXTS[text][:length] + tail,
    st.integers(0, 1),
    st.integers(0, 100),
    st.lists(st.integers(0, 2), min_size=1, max_size=20),
)
TOKENS = st.lists(st.integers(0, 2), min_size=1, max_size=40)
OPERATIONS = st.one_of(
    st.tuples(st.just("open"), PROMPTS, st.sampled_from(["", "a"]), REUSE),
    st.tuples(st.just("run"), PROMPTS, st.sampled_from(["", "a"]), REUSE),
    st.tuples(st.just("extend"), st.integers(0, 99), TOKENS, st.booleans()),
    st.tuples(st.just("decode"), st.integers(0, 99), st.integers(1, 20), st.just(True)),
    st.tuples(st.just("reserve"), st.integers(0, 99), st.integers(0, 60), st.just(True)),
    st.tuples(st.just("truncate"), st.integers(0, 99), st.floats(0, 1), st.just(True)),
    st.tuples(st.just("close"), st.integers(0, 99), st.booleans(), st.just(True)),
)


@pytest.mark.plain
@patch.multiple(stored_pages, PIECE=2)  # So that a short text has several pieces.
@patch.multiple(page_pool, MIN_GAIN=1)
@settings(max_examples=400)
@given(
    st.lists(OPERATIONS, max_size=40),
    st.integers(3, 24),
    st.sampled_from([40, 1 << 20]),
    st.sampled_from([None, None, 1, 2, 16, 17, 18, 19, 40]),
    st.sampled_from([None, None, RunStore, EagerStore]),
    st.integers(0, 600),
)
def test_whatever_is_done_every_sequence_reads_back_what_it_stored(
    operations: list[tuple], num_pages: int, trained_len: int, window: int | None,
    make_store: type[RunStore] | None, host_bytes: int,
) -> None:  # fmt: skip
    """And reads all that it may look at in layers with a window, of which there are no more pages than needed.

    Some of it comes back from beside the cache.
    """
    num_window_pages = 0 if window is None else most_needed(window, MOST_LIVE, MOST_TOKENS)
    store = None if make_store is None else make_store(host_bytes)
    driver = Driver(num_pages, trained_len, window=window, num_window_pages=num_window_pages, store=store)
    with short_moves():
        _operate(driver, operations, window)


def _operate(driver: Driver, operations: list[tuple], window: int | None) -> None:
    num_pages = driver.num_pages
    for seq_id, (kind, first, second, flag) in enumerate(operations):
        if kind in ("open", "run"):
            if window is not None and len(driver.live) == MOST_LIVE:
                driver.close(min(driver.live))
            for _ in range(seq_id % 4):  # Not all of it is there yet, or it is.
                driver.cache.fetch(seq_id, first, second, reuse=flag)
            driver.open(seq_id, first, second, reuse=flag)
            if kind == "run" and not driver.extend(seq_id, first[len(driver.live[seq_id].cells) :]):
                driver.close(seq_id)
        elif driver.live:
            chosen = sorted(driver.live)[first % len(driver.live)]
            length = len(driver.live[chosen].cells)
            if kind == "extend":
                driver.extend(chosen, second)
            elif kind == "decode":
                for token in range(second):
                    driver.extend(chosen, [token % 3])
            elif kind == "reserve":
                driver.reserve(chosen, second)
            elif kind == "truncate":
                driver.truncate_if_possible(chosen, int(second * length))
            else:
                driver.close(chosen, keep=second, leave=second and first % 2 == 0)
        driver.check()
    for seq_id in list(driver.live):
        driver.close(seq_id)
    assert driver.cache.usage().used == 0
    driver.open(-1, range(1000, 1000 + num_pages * PAGE))
    for start in range(1000, 1000 + num_pages * PAGE, MOST_TOKENS):
        assert driver.extend(-1, range(start, min(start + MOST_TOKENS, 1000 + num_pages * PAGE)))  # nothing was lost
    driver.check()


@pytest.mark.plain
@settings(max_examples=200)
@given(st.lists(st.tuples(PROMPTS, st.sampled_from(["", "a"]), st.booleans(), st.booleans()), max_size=20))
def test_where_nothing_is_evicted_the_longest_beginning_is_found(prompts: list[tuple]) -> None:
    """Against a plain model that compares with every sequence there was."""
    driver, plain = Driver(num_pages=400), FakeKV(10_000)
    for seq_id, (tokens, namespace, reuse, closes) in enumerate(prompts):
        expected = plain.open(seq_id, tokens, namespace, reuse="exact" if reuse else "nothing").num_tokens
        assert plain.reserve(seq_id, len(tokens))
        plain.commit(seq_id, expected, tokens[expected:])
        assert driver.run(seq_id, tokens, namespace, reuse="exact" if reuse else "nothing") == expected
        if closes:
            plain.close(seq_id, keep=True)
            driver.close(seq_id)
    driver.check()


@pytest.mark.parametrize("num_tokens", [1, 16, 17])
def test_a_whole_prompt_is_never_found(num_tokens: int) -> None:
    driver = Driver()
    driver.run(1, range(40))
    assert driver.open(2, range(num_tokens)) == num_tokens - 1
