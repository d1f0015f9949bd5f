"""Pages of the torch engine beside the cache: they come back as what they were, or are computed again."""

import pytest
from pages_driver import MOST_TOKENS, Driver, EagerStore, PretendMover

from tightrope.backends.errors import BackendError
from tightrope.backends.hf.cache.moving import COMPUTED_AGAIN
from tightrope.backends.hf.cache.page_pool import MOST_BESIDE
from tightrope.backends.hf.cache.page_tree import Page
from tightrope.backends.hf.cache.stored_pages import PIECE, StoredPages
from tightrope.backends.hf.cache.window_pages import most_needed
from tightrope.backends.reuse import Reuse
from tightrope.backends.sessions.piece import Bytes, Piece
from tightrope.backends.sessions.store import RunStore
from tightrope.kernels.forms.layout import PAGE

pytestmark = pytest.mark.quick

LONG = PIECE * PAGE + 100  # Tokens of a chat of two pieces.


def successor(driver: Driver, store: RunStore, num_pages: int = 0) -> Driver:
    """What runs in the next process: an empty cache over the same store."""
    after = Driver(
        num_pages or driver.num_pages, window=driver.window, num_window_pages=len(driver.window_storage), store=store
    )
    assert driver.cache.stored is not None
    assert after.cache.stored is not None
    before, now = driver.cache.stored._mover, after.cache.stored._mover
    assert isinstance(before, PretendMover)
    assert isinstance(now, PretendMover)
    now._saved = before._saved
    return after


def test_two_chats_that_alternate_on_a_cache_for_one_are_read_once() -> None:
    driver = Driver(num_pages=26, store=RunStore(100_000))
    for start in (0, 10_000):
        assert driver.run(start, range(start, start + LONG)) == 0
        driver.close(start)
    for turn in range(1, 4):
        for start in (0, 10_000):
            length = LONG + 5 * turn
            assert driver.run(start + turn, range(start, start + length)) == length - 5
            driver.close(start + turn)
            driver.check()


def after_a_chat(num_pages: int) -> Driver:
    """The next process behind one that has run LONG tokens."""
    store = EagerStore(100_000)
    driver = Driver(num_pages=num_pages, store=store)
    driver.run(1, range(LONG))
    driver.close(1)
    return successor(driver, store)


def test_a_chat_that_leaves_the_cache_page_by_page_is_looked_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """What it takes to look at a page grows with all that stands before it."""
    driver = Driver(20, store=RunStore(1 << 20))
    driver.run(1, range(300))
    driver.close(1)
    evicted = counted_evictions(monkeypatch)

    driver.run(2, range(1000, 1300))
    driver.close(2)

    assert len(evicted) == 1
    assert driver.open(3, [*range(300), 7]) == 300
    driver.check()


def counted_evictions(monkeypatch: pytest.MonkeyPatch) -> list[Page]:
    """The pages that the store is asked to keep as they leave the cache, with those before them."""
    evicted: list[Page] = []
    evicting = StoredPages.evicting

    def told(stored: StoredPages, page: Page) -> None:
        evicted.append(page)
        evicting(stored, page)

    monkeypatch.setattr(StoredPages, "evicting", told)
    return evicted


SYSTEM, OLDEST, REST = [*range(40)], [*range(100, 300)], [*range(1000, 1320)]  # 35 pages, and 23 without OLDEST.


def test_a_chat_of_moved_tokens_is_looked_at_once_as_well(monkeypatch: pytest.MonkeyPatch) -> None:
    driver = Driver(60, store=RunStore(1 << 20))
    driver.run(1, [*SYSTEM, *OLDEST, *REST])
    driver.close(1)
    driver.run(2, [*SYSTEM, *REST, 7], reuse="moved")
    driver.close(2)
    evicted = counted_evictions(monkeypatch)

    driver.run(3, range(5000, 5000 + 58 * PAGE))
    driver.close(3)

    assert len(evicted) == 1
    assert driver.open(4, [*SYSTEM, *REST, 7, 8], reuse="moved") == 361
    driver.check()


def test_what_a_chat_has_gone_on_from_leaves_first_and_for_good(monkeypatch: pytest.MonkeyPatch) -> None:
    driver = Driver(80, store=RunStore(1 << 20))
    other = [*range(9000, 9000 + 20 * PAGE)]
    for seq_id, tokens in enumerate((other, [*SYSTEM, *OLDEST, *REST], [*SYSTEM, *REST, 7])):
        driver.run(seq_id, tokens, reuse="moved")
        driver.close(seq_id)
    evicted = counted_evictions(monkeypatch)

    driver.run(3, range(5000, 5000 + 32 * PAGE))
    driver.close(3)

    assert evicted == []
    assert driver.open(4, [*other, 7]) == len(other), "which was used longer ago"
    assert driver.open(5, [*SYSTEM, *REST, 7, 8], reuse="moved") == 361
    driver.check()


def test_what_a_chat_goes_back_to_is_kept_again(monkeypatch: pytest.MonkeyPatch) -> None:
    driver = Driver(80, store=RunStore(1 << 20))
    turns = [*SYSTEM, *OLDEST, *REST], [*SYSTEM, *REST, 7], [*SYSTEM, *OLDEST, *REST, 8]
    for seq_id, tokens in enumerate(turns):
        driver.run(seq_id, tokens, reuse="moved")
        driver.close(seq_id)

    driver.run(3, range(5000, 5000 + 80 * PAGE))
    driver.close(3)

    assert driver.open(4, [*turns[2], 9]) == len(turns[2])


def test_what_another_chat_goes_on_from_stays_where_it_is() -> None:
    driver = Driver(130, store=RunStore(1 << 20))
    branch = [*SYSTEM, *OLDEST, *REST[:50], *range(3000, 3000 + (MOST_BESIDE + 1) * PAGE)]
    for seq_id, tokens in enumerate(([*SYSTEM, *OLDEST, *REST], branch, [*SYSTEM, *REST, 7])):
        driver.run(seq_id, tokens, reuse="moved")
        driver.close(seq_id)

    driver.run(3, range(5000, 5000 + 60 * PAGE))
    driver.close(3)

    assert driver.open(4, [*branch, 9]) == len(branch)
    driver.check()


def test_an_answer_that_was_swiped_away_goes_with_what_its_chat_has_gone_on_from(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    driver = Driver(130, store=RunStore(1 << 20))
    swiped = [*SYSTEM, *OLDEST, *REST[:300], *range(3000, 3000 + 10 * PAGE)]
    other = [*range(9000, 9000 + 20 * PAGE)]
    for seq_id, tokens in enumerate((other, swiped, [*SYSTEM, *OLDEST, *REST], [*SYSTEM, *REST, 7])):
        driver.run(seq_id, tokens, reuse="moved")
        driver.close(seq_id)
    evicted = counted_evictions(monkeypatch)

    driver.run(4, range(5000, 5000 + 71 * PAGE))
    driver.close(4)

    assert evicted == []
    assert driver.open(5, [*other, 9]) == len(other)
    driver.check()


def test_what_was_computed_is_there_in_the_next_process() -> None:
    after = after_a_chat(num_pages=40)
    assert after.run(1, [*range(LONG), 7]) == LONG
    after.check()
    assert after.open(2, [*range(60), 7]) == 60
    assert after.open(3, [*range(LONG), 7], "of another key") == 0


def test_a_prompt_that_leaves_a_stored_text_in_the_middle_of_a_page_goes_on_there() -> None:
    after = after_a_chat(num_pages=60)
    assert after.run(1, [*range(PIECE * PAGE + 21), 7, 7, 7]) == PIECE * PAGE + 21
    after.check()
    assert after.run(2, [*range(LONG), 7]) == LONG
    after.check()


def test_what_has_no_room_stays_where_it_is() -> None:
    after = after_a_chat(num_pages=30)
    after.run(1, range(10_000, 10_000 + 18 * PAGE))
    assert after.open(2, [*range(LONG), 7]) == 12 * PAGE
    after.close(1)
    after.close(2)
    after.check()


@pytest.mark.parametrize("first_bad", [0, 1])
def test_what_can_not_be_read_any_more_is_computed(first_bad: int, monkeypatch: pytest.MonkeyPatch) -> None:
    store = EagerStore(100_000)
    driver = Driver(num_pages=40, store=store)
    driver.run(1, range(LONG))
    driver.close(1)
    after = successor(driver, store)
    plain = store.read

    def read(piece: Piece) -> Bytes | None:
        return None if piece.start >= first_bad * PIECE * PAGE else plain(piece)

    monkeypatch.setattr(store, "read", read)
    assert after.run(1, [*range(LONG), 7]) == first_bad * PIECE * PAGE
    after.check()


def test_a_device_without_memory_for_the_copy_computes(monkeypatch: pytest.MonkeyPatch) -> None:
    store = EagerStore(100_000)
    driver = Driver(num_pages=40, store=store)
    driver.run(1, range(LONG))
    driver.close(1)
    after = successor(driver, store)

    def fail(*args: object) -> None:
        raise BackendError("out of memory")

    monkeypatch.setattr(PretendMover, "write_pages", fail)
    monkeypatch.setattr(PretendMover, "read_pages", fail)
    assert after.run(1, [*range(LONG), 7]) == 0
    after.close(1)
    after.check()


def test_sliding_layers_go_on_from_their_stored_window() -> None:
    store = EagerStore(100_000)
    driver = Driver(64, window=40, num_window_pages=most_needed(40, 1, MOST_TOKENS), store=store)
    driver.open(1, range(LONG))
    for start in range(0, LONG, 89):
        assert driver.extend(1, range(start, min(start + 89, LONG)))
    driver.close(1)
    after = successor(driver, store)
    assert after.open(1, [*range(LONG), 7]) == LONG
    assert after.extend(1, [7])
    after.check()
    after.close(1)
    again = successor(after, store)
    assert again.open(1, [*range(100), 7]) == 0  # The window there was not kept.
    again.check()


def test_sliding_layers_that_lost_their_window_here_get_it_back() -> None:
    store = EagerStore(100_000)
    driver = Driver(200, window=40, num_window_pages=most_needed(40, 1, MOST_TOKENS), store=store)
    driver.run(1, range(100))
    driver.close(1)
    for start in range(1000, 1400, 100):
        driver.run(start, range(start, start + 100))
        driver.close(start)
    assert driver.run(2, range(110)) == 100
    driver.check()


def test_a_chat_that_lost_its_oldest_message_comes_back_to_be_moved() -> None:
    system, oldest, rest = list(range(40)), list(range(100, 300)), list(range(1000, 1000 + LONG))
    store = EagerStore(100_000)
    driver = Driver(num_pages=100, store=store)
    driver.run(1, [*system, *oldest, *rest])
    driver.close(1)
    for num_pages in (100, 40):  # There is room for both, or for the chat alone.
        after = successor(driver, store, num_pages)
        after.open(2, [*system, *rest, 7], reuse="exact")
        assert after.reused.num_tokens == len(system)
        after.close(2)
        after.open(3, [*system, *rest, 7], reuse="moved")
        assert after.reused.num_tokens == len(system) + len(rest) - COMPUTED_AGAIN
        tokens = [*system, *rest, 7]
        assert after.extend(3, tokens[len(after.live[3].cells) :])
        after.check()


def test_a_chat_of_moved_tokens_that_nobody_heals_comes_back_as_one() -> None:
    system, oldest, rest, new = [*range(40)], [*range(100, 300)], [*range(1000, 1000 + LONG)], [*range(50, 90)]
    store = EagerStore(100_000)
    driver = Driver(num_pages=100, store=store)
    driver.run(1, [*system, *oldest, *rest])
    driver.close(1)
    driver.run(2, [*system, *rest, *new], reuse="moved")
    driver.close(2)
    after = successor(driver, store)
    assert after.open(1, [*system, *rest, *new, 7], reuse="moved") < len(system) + LONG
    driver.cache.leave([*system, *rest, *new], "")
    after = successor(driver, store)
    after.open(1, [*system, *rest, *new, 7], reuse="exact")
    assert after.reused == Reuse.prefix((len(system) + COMPUTED_AGAIN) // PAGE * PAGE)
    after.open(2, [*system, *rest, *new, 7], "of another key", reuse="moved")
    assert after.reused == Reuse()
    found = after.open(3, [*system, *rest, *new, 7], reuse="moved")
    assert found == len(system) + LONG + len(new)
    assert after.reused.num_inexact == len(system) + LONG + len(new) - 96
    assert after.extend(3, [7])
    after.check()

    again = successor(driver, store)
    found = again.open(1, [*system, *rest[200:], *new, 7], reuse="moved")
    assert found == len(system) + LONG - 200 + len(new) - COMPUTED_AGAIN
    assert again.extend(1, [*system, *rest[200:], *new, 7][len(again.live[1].cells) :])
    again.check()


def test_a_stored_chat_comes_back_piece_by_piece_or_at_once() -> None:
    after = after_a_chat(num_pages=60)
    assert not after.cache.fetch(1, [*range(LONG), 7], "")
    assert after.cache.usage().reusable == PIECE * PAGE
    after.check()
    assert after.open(1, [*range(LONG), 7]) == LONG
    after.check()
    again = after_a_chat(num_pages=60)
    num_parts = 0
    while not again.cache.fetch(1, [*range(LONG), 7], ""):
        num_parts += 1
    assert num_parts == 2
    assert again.cache.fetch(2, [*range(LONG), 7], "of another key")
    assert again.open(1, [*range(LONG), 7]) == LONG


def test_a_stored_chat_to_be_moved_comes_back_piece_by_piece() -> None:
    system, oldest, rest = [*range(40)], [*range(100, 300)], [*range(1000, 1000 + LONG)]
    store = EagerStore(100_000)
    driver = Driver(num_pages=100, store=store)
    driver.run(1, [*system, *oldest, *rest])
    driver.close(1)
    after = successor(driver, store)
    num_parts = 0
    while not after.cache.fetch(2, [*system, *rest, 7], "", reuse="moved"):
        num_parts += 1
        after.check()
    assert num_parts == 4  # The beginning that is exact, and what is left of three pieces.
    before = after.cache.usage().reusable
    assert after.open(2, [*system, *rest, 7], reuse="moved") == len(system) + LONG - COMPUTED_AGAIN
    assert after.cache.usage().reusable <= before


def test_what_others_need_the_room_of_is_not_fetched_for_ever() -> None:
    after = after_a_chat(num_pages=40)
    num_parts = 0
    while not after.cache.fetch(1, [*range(LONG), 7], ""):
        num_parts += 1
        after.run(2, range(10_000, 10_000 + 39 * PAGE))
        after.close(2, keep=False)
    assert num_parts < 10
    assert after.open(1, [*range(LONG), 7]) == LONG


def test_of_a_chat_that_moves_on_the_latest_windows_are_kept() -> None:
    messages = [[*range(1000 * number, 1000 * number + 100)] for number in range(12)]
    store = EagerStore(100_000)
    driver = Driver(num_pages=200, store=store)
    driver.run(100, [*range(40), *range(50_000, 50_000 + LONG)])
    driver.close(100)
    for first in range(1, 6):
        tokens = [token for message in (messages[0], *messages[first : first + 6]) for token in message]
        driver.run(first, tokens)
        driver.close(first)
    after = successor(driver, store)
    for first, is_kept in ((5, True), (4, True), (3, True), (2, False), (1, False)):
        tokens = [token for message in (messages[0], *messages[first : first + 6]) for token in message]
        assert (after.open(first, [*tokens, 7]) == len(tokens)) is is_kept
        after.close(first, keep=False)
    assert after.open(100, [*range(40), *range(50_000, 50_000 + LONG), 7]) == 40 + LONG


def test_a_chat_is_found_in_memory_also_where_its_beginning_has_not_left_the_cache() -> None:
    driver = Driver(num_pages=60, store=RunStore(100_000))
    length = 3 * PIECE * PAGE + 100
    driver.run(1, range(length))
    driver.close(1)
    driver.run(2, range(10_000, 10_000 + 30 * PAGE))
    driver.close(2)
    assert driver.run(3, range(length + 5)) == length
    driver.check()


def test_memory_that_is_too_small_for_a_chat_keeps_its_beginning() -> None:
    store = EagerStore(500)  # 50 pages of this driver.
    driver = Driver(num_pages=100, store=store)
    driver.run(1, range(80 * PAGE))
    driver.close(1)
    after = successor(driver, store)
    assert after.run(1, [*range(80 * PAGE), 7]) == 48 * PAGE
    after.check()


def test_nothing_is_stored_of_a_chat_that_is_not_to_be_kept() -> None:
    store = EagerStore(100_000)
    driver = Driver(num_pages=40, store=store)
    driver.run(1, range(LONG))
    driver.close(1, keep=False)
    assert store.num_pieces == 0
    assert isinstance(driver.cache.stored, StoredPages)
