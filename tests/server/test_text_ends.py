"""A chat without a name is known by the end of its last prompt."""

import random

from tightrope.server.cluster.text_ends import MOST_SEARCHED, WINDOW, ends_of

RNG = random.Random(1)
CHAT = [RNG.randrange(50_000) for _ in range(600)]
ANSWER = [RNG.randrange(50_000) for _ in range(200)]


def test_the_end_of_the_last_prompt_is_found_behind_another_beginning() -> None:
    end = ends_of(CHAT)[-1]
    moved = [*CHAT[:50], *CHAT[200:], *ANSWER]
    assert ends_of(moved).index(end) == len(moved) - len(ANSWER) - WINDOW
    assert end not in ends_of([*CHAT[:-1], *ANSWER])
    assert end not in ends_of(sorted(moved))


def test_a_text_that_is_too_short_has_no_end_and_a_long_one_is_searched_from_its_end() -> None:
    assert ends_of(CHAT[: WINDOW - 1]) == []
    assert len(ends_of(CHAT[:WINDOW])) == 1
    long = [*CHAT, *range(MOST_SEARCHED)]
    assert len(ends_of(long)) == MOST_SEARCHED
    assert ends_of(CHAT)[-1] not in ends_of(long)
    assert ends_of(CHAT)[-1] in ends_of(long[:-1])
