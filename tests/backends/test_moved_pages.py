"""Runs of tokens that the paged cache finds at other places than they stood at, over a storage that remembers all."""

from collections.abc import Sequence
from itertools import chain

import hypothesis.strategies as st
import pytest
from hypothesis import settings
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule
from pages_driver import Driver, short_moves

from tightrope.backends.reuse import Reuse, Run, Wanted

SYSTEM = list(range(1000, 1040))
OLDEST, SECOND, THIRD = list(range(100, 207)), list(range(300, 451)), list(range(500, 610))
NEW = list(range(900, 930))


def driver_after(*parts: Sequence[int], num_pages: int = 200, namespace: str = "") -> Driver:
    """A cache in which a chat of these parts has ended."""
    driver = Driver(num_pages)
    driver.run(1, [*chain(*parts)], namespace)
    driver.close(1)
    return driver


def found(driver: Driver, *parts: Sequence[int], seq_id: int = 2, namespace: str = "") -> tuple[Run, ...]:
    """What a prompt of these parts finds, all of which it then computes."""
    tokens = [*chain(*parts)]
    driver.open(seq_id, tokens, namespace, reuse="moved")
    runs = driver.reused.runs
    assert driver.extend(seq_id, tokens[len(driver.live[seq_id].cells) :])
    driver.check()
    return runs


def test_what_follows_a_dropped_message_is_found_but_for_its_first_tokens():
    driver = driver_after(SYSTEM, OLDEST, SECOND, THIRD)

    runs = found(driver, SYSTEM, SECOND, THIRD, NEW)

    assert runs == (Run(0, 0, 40), Run(40 + 107 + 64, 40 + 64, 151 + 110 - 64, is_exact=False))


@pytest.mark.parametrize(("num_front", "num_again"), [(40, 64), (448, 64), (480, 32), (600, 16)])
def test_fewer_tokens_behind_a_gap_are_computed_the_more_stands_in_front(num_front: int, num_again: int):
    front = range(5000, 5000 + num_front)
    driver = driver_after(front, OLDEST, SECOND)

    runs = found(driver, front, SECOND, NEW)

    assert runs[1:] == (Run(num_front + 107 + num_again, num_front + num_again, 151 - num_again, is_exact=False),)


def test_several_removals_of_one_turn_are_found():
    driver = driver_after(SYSTEM, OLDEST, SECOND, NEW, THIRD)

    runs = found(driver, SYSTEM, SECOND, THIRD)

    assert [run.source - run.start for run in runs] == [0, 107, 137]
    assert [run.length for run in runs] == [40, 151 - 64, 110 - 64 - 1]
    assert Reuse(runs).removals() == [40, 40 + 151]


def test_a_message_that_is_too_short_to_be_moved_between_two_removals_does_not_end_the_search():
    driver = driver_after(SYSTEM, OLDEST, NEW, THIRD, SECOND)

    runs = found(driver, SYSTEM, NEW, SECOND, [7])

    assert runs[1:] == (Run(40 + 107 + 30 + 110 + 64, 40 + 30 + 64, 151 - 64, is_exact=False),)


@pytest.mark.parametrize("changed", [[*SYSTEM, 7, *SECOND, *THIRD], [*SYSTEM, *NEW, *SECOND, *THIRD], SECOND + THIRD])
def test_nothing_is_moved_behind_an_insertion_or_a_change_or_without_the_beginning(changed: list[int]):
    driver = driver_after(SYSTEM, OLDEST, SECOND, THIRD)

    assert all(run.is_exact for run in found(driver, changed, NEW))


def test_after_a_removal_nothing_is_moved_behind_an_insertion():
    driver = driver_after(SYSTEM, OLDEST, SECOND, THIRD)

    runs = found(driver, SYSTEM, SECOND, NEW, THIRD)

    assert [run.stop for run in runs] == [40, 40 + 151]


def test_moved_tokens_are_taken_as_far_as_the_engine_accepts_them():
    driver = driver_after(SYSTEM, OLDEST, SECOND, THIRD)
    prompt = [*SYSTEM, *SECOND, *THIRD[10:], *NEW, 1]

    found = driver.cache.open(2, prompt, "", reuse="moved", accepts=lambda offer: offer.removals()[-1])

    assert [run.stop for run in found.runs] == [40, 40 + 151]
    assert driver.cache.open(3, prompt, "", reuse="moved", accepts=lambda offer: 0) == Reuse.prefix(40)
    driver.cache.check_integrity()


def test_moved_tokens_and_all_computed_over_them_are_found_by_those_alone_who_take_them():
    driver = driver_after(SYSTEM, OLDEST, SECOND, THIRD)
    found(driver, SYSTEM, SECOND, THIRD, NEW)
    driver.close(2)

    assert driver.open(3, [*SYSTEM, *SECOND, *THIRD, *NEW, 1], reuse="exact") == 96  # whole pages before the moved ones
    assert driver.open(4, [*SYSTEM, *SECOND, *THIRD, *NEW, 1], reuse="moved") == 40 + 151 + 110 + 30
    assert [run.is_exact for run in driver.reused.runs] == [True, False]
    assert driver.reused.removals() == []
    driver.check()


def test_other_namespaces_and_other_frequencies_move_nothing():
    driver = driver_after(SYSTEM, OLDEST, SECOND, THIRD, namespace="a")
    assert found(driver, SYSTEM, SECOND, THIRD, namespace="b") == ()

    driver = Driver(200, trained_len=200)
    driver.run(1, [*SYSTEM, *OLDEST, *SECOND])
    assert found(driver, SYSTEM, SECOND) == ()


def test_a_run_whose_first_tokens_another_sequence_has_follows_without_a_gap() -> None:
    driver = driver_after(SYSTEM, OLDEST, SECOND, THIRD)
    driver.run(2, [*SYSTEM, *SECOND[:90]], reuse="nothing")
    driver.close(2)

    runs = found(driver, SYSTEM, SECOND, THIRD, [7], seq_id=3)

    assert runs == (Run(0, 0, 130), Run(130 + 107, 130, 40 + 151 + 110 - 130, is_exact=False))


def test_a_live_sequence_can_be_moved_from_while_it_writes_on():
    driver = Driver(200)
    driver.run(1, [*SYSTEM, *OLDEST, *SECOND])

    runs = found(driver, SYSTEM, SECOND, NEW)
    driver.extend(1, NEW)

    assert runs[1].length == 151 - 64
    driver.check()


def test_a_shift_by_whole_pages_copies_whole_pages():
    driver = driver_after(SYSTEM, OLDEST[:96], SECOND)

    driver.cache.open(2, [*SYSTEM, *SECOND, 1], "", reuse="moved")
    batch = driver.cache.copies.next()

    assert len(batch.pages) == (151 - 64) // 16 - 1
    assert len(batch.sources) == 151 - 64 - 16 * len(batch.pages) + 40 % 16
    assert batch.count == len(driver.cache.copies._waiting)


def test_exact_tokens_take_the_place_of_moved_ones_page_by_page():
    chat = [*SYSTEM, *SECOND, *THIRD, *NEW]
    driver = driver_after(SYSTEM, OLDEST, SECOND, THIRD)
    found(driver, chat, [1])
    driver.close(2)
    reusable = driver.cache.usage().reusable

    half = driver.open(3, [*chat, 1], reuse="exact")
    assert driver.extend(3, chat[half:200])
    driver.close(3)

    assert driver.cache.usage().reusable <= reusable + 16, "a page that both hold the end of"
    assert driver.open(4, [*chat, 1], reuse="moved") == len(chat)
    assert [(run.start, run.length, run.is_exact) for run in driver.reused.runs] == [
        (0, 192, True),
        (192, len(chat) - 192, False),
    ]
    driver.check()


def test_a_cache_that_holds_one_chat_moves_within_it():
    driver = driver_after(SYSTEM, OLDEST, SECOND, THIRD, num_pages=27)

    runs = found(driver, SYSTEM, SECOND, THIRD, NEW)

    assert runs[1].length == 151 + 110 - 64


def test_a_cache_that_holds_one_chat_moves_within_it_although_its_earlier_turns_ended_elsewhere() -> None:
    """Each turn's prompt ends with the opening of an answer, beside which the next one goes on."""
    driver = Driver(num_pages=28)
    turns = [*SYSTEM, *OLDEST], [*SYSTEM, *OLDEST, *SECOND], [*SYSTEM, *OLDEST, *SECOND, *THIRD]
    for seq_id, chat in enumerate(turns):
        driver.open(seq_id, [*chat, 7, 8, 9, 7], reuse="moved")
        assert driver.extend(seq_id, [*chat, 7, 8, 9][len(driver.live[seq_id].cells) :])
        driver.close(seq_id)

    runs = found(driver, SYSTEM, SECOND, THIRD, NEW, seq_id=5)

    assert runs[1].length == 151 + 110 - 64


def test_copies_within_a_cache_that_holds_one_chat_are_made_many_at_once() -> None:
    driver = driver_after(SYSTEM, OLDEST, SECOND, THIRD, num_pages=30)

    driver.cache.open(2, [*SYSTEM, *SECOND, *THIRD, *NEW], "", reuse="moved")
    counts: list[int] = []
    while batch := driver.cache.copies.next():
        counts.append(batch.count)
        driver.cache.copies.done(batch.count)

    assert sum(counts) == (151 + 110 - 64) // 16 + 2, "one for each page that is moved into, or partly"
    assert len(counts) <= 4, "and not one by one"


def test_a_chat_stays_as_it_is_where_what_it_has_become_would_have_to_wait() -> None:
    """Here a sequence that lives leaves no room for it."""
    driver = driver_after(SYSTEM, OLDEST, SECOND, THIRD, num_pages=32)
    driver.run(2, range(5000, 5000 + 6 * 16))

    assert driver.open(3, [*SYSTEM, *SECOND, *THIRD, *range(2000, 2110)], reuse="moved") == 40
    driver.close(3)

    assert driver.open(4, [*SYSTEM, *OLDEST, *SECOND, *THIRD, 7]) == 40 + 107 + 151 + 110
    driver.check()


KINDS: st.SearchStrategy[Wanted] = st.sampled_from(["moved", "moved", "moved", "exact", "nothing"])


class Chats(RuleBasedStateMachine):
    """Chats that lose messages, gain and change some, beside each other, in a cache of any size."""

    def __init__(self) -> None:
        super().__init__()
        self.moves = short_moves()
        self.moves.__enter__()

    @initialize(
        num_pages=st.integers(8, 60),
        trained_len=st.sampled_from([60, 1 << 20]),
        lengths=st.lists(st.integers(1, 40), max_size=5),
    )
    def begin(self, num_pages: int, trained_len: int, lengths: list[int]) -> None:
        self.driver = Driver(num_pages, trained_len)
        self.next_token, self.next_id = 10, 0
        system = [1, 2, 3, 4, 5]
        self.chats = [[system, *(self.message(length) for length in lengths)] for _ in range(2)]

    def message(self, length: int) -> list[int]:
        self.next_token += length
        return list(range(self.next_token, self.next_token + length))

    @rule(chat=st.integers(0, 1), length=st.integers(1, 40), place=st.floats(0, 1))
    def insert(self, chat: int, length: int, place: float) -> None:
        messages = self.chats[chat]
        if sum(map(len, messages)) < 150:
            messages.insert(max(1, round(place * len(messages))), self.message(length))

    @rule(chat=st.integers(0, 1), length=st.integers(1, 40))
    def append(self, chat: int, length: int) -> None:
        self.insert(chat, length, 1.0)

    @rule(chat=st.integers(0, 1), place=st.floats(0, 1))
    def remove(self, chat: int, place: float) -> None:
        messages = self.chats[chat]
        if len(messages) > 2:
            del messages[1 + int(place * (len(messages) - 2))]

    @rule(
        chat=st.integers(0, 1),
        kind=st.sampled_from(["moved", "moved", "moved", "exact", "nothing"]),
        closes=st.booleans(),
    )
    def run(self, chat: int, kind: str, closes: bool) -> None:
        if len(self.driver.live) == 3:
            self.driver.close(min(self.driver.live))
        tokens = [*chain(*self.chats[chat])]
        self.next_id += 1
        self.driver.open(self.next_id, tokens, reuse=kind)
        rest = tokens[len(self.driver.live[self.next_id].cells) :]
        if not self.driver.extend(self.next_id, rest) or closes:
            self.driver.close(self.next_id)

    @rule(chat=st.integers(0, 1), place=st.floats(0, 1), length=st.integers(1, 40), closes=st.booleans())
    def turn_of_a_full_window(self, chat: int, place: float, length: int, closes: bool) -> None:
        self.run(chat, "moved", closes=True)
        self.remove(chat, place)
        self.append(chat, length)
        self.run(chat, "moved", closes)

    @precondition(lambda self: self.driver.live)
    @rule(first=st.booleans(), length=st.floats(0, 1))
    def truncate(self, first: bool, length: float) -> None:
        seq_id = (min if first else max)(self.driver.live)
        self.driver.truncate(seq_id, int(length * len(self.driver.live[seq_id].cells)))

    @precondition(lambda self: self.driver.live)
    @rule(first=st.booleans(), num_tokens=st.integers(1, 20))
    def decode(self, first: bool, num_tokens: int) -> None:
        seq_id = (min if first else max)(self.driver.live)
        for token in self.message(num_tokens):
            self.driver.extend(seq_id, [token])

    @precondition(lambda self: self.driver.live)
    @rule(keep=st.booleans())
    def close(self, keep: bool) -> None:
        self.driver.close(min(self.driver.live), keep=keep)

    @invariant()
    def books_and_storage_agree(self) -> None:
        if hasattr(self, "driver"):
            self.driver.check()

    def teardown(self) -> None:
        self.moves.__exit__(None, None, None)
        if hasattr(self, "driver"):
            for seq_id in list(self.driver.live):
                self.driver.close(seq_id)
            self.driver.check()
            assert self.driver.cache.usage().used == 0
            total = self.driver.num_pages * 16
            assert self.driver.run(-1, range(10_000, 10_000 + total)) == 0, "all pages are there to be taken"


Chats.TestCase.settings = settings(max_examples=60, stateful_step_count=40, deadline=None)
TestChats = pytest.mark.plain(Chats.TestCase)
