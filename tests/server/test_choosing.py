"""Which replica runs a prompt."""

import random

from hypothesis import given
from hypothesis import strategies as st

from tightrope.server.cluster.choosing import COMPUTED_WEIGHT, SESSION_TOKENS, Candidate, choose, cost

COUNTS = st.integers(0, 5000)
CANDIDATES = st.builds(
    Candidate, st.uuids().map(str), COUNTS, COUNTS, st.floats(0, 1), COUNTS, st.integers(0, 64), st.booleans()
)


@given(COUNTS, st.lists(CANDIDATES, min_size=1, max_size=8), st.randoms(use_true_random=False))
def test_nobody_has_the_first_token_sooner_than_the_one_that_is_chosen(
    prompt_tokens: int, candidates: list[Candidate], rng: random.Random
) -> None:
    chosen = choose(prompt_tokens, candidates, rng)
    costs = {candidate.replica: cost(prompt_tokens, candidate) for candidate in candidates}
    assert costs[chosen] == min(costs.values())


@given(st.lists(st.tuples(COUNTS, st.integers(0, 64)), min_size=1, max_size=8), st.randoms(use_true_random=False))
def test_where_nobody_holds_anything_the_least_loaded_is_chosen(
    loads: list[tuple[int, int]], rng: random.Random
) -> None:
    candidates = [Candidate(str(i), queued_tokens=tokens, num_running=n) for i, (tokens, n) in enumerate(loads)]
    chosen = candidates[int(choose(900, candidates, rng))]
    assert not any(
        (other.queued_tokens <= chosen.queued_tokens and other.num_running < chosen.num_running)
        or (other.queued_tokens < chosen.queued_tokens and other.num_running <= chosen.num_running)
        for other in candidates
    )  # fmt: skip


@given(COUNTS, CANDIDATES, st.integers(1, 1000))
def test_more_of_a_prompt_never_costs_more_and_more_load_never_less(
    prompt_tokens: int, candidate: Candidate, more: int
) -> None:
    def changed(**fields: int) -> float:
        values = {name: getattr(candidate, name) for name in Candidate.__slots__}
        return cost(prompt_tokens, Candidate(**{**values, **{k: values[k] + v for k, v in fields.items()}}))

    own = cost(prompt_tokens, candidate)
    assert changed(queued_tokens=more) > own
    assert changed(num_running=more) > own
    if candidate.cached + candidate.stored + more <= prompt_tokens:
        assert changed(cached=more) < own
        assert changed(stored=more) <= own
    if more <= candidate.stored:
        assert changed(stored=-more, cached=more) <= own


def test_what_is_held_wins_over_a_little_load_and_not_over_much() -> None:
    held = [Candidate("holder", cached=900, num_running=3), Candidate("idle")]
    assert choose(1000, held, random.Random(1)) == "holder"
    busy = [Candidate("holder", cached=900, queued_tokens=4000), Candidate("idle")]
    assert choose(1000, busy, random.Random(1)) == "idle"
    full = [Candidate("holder", cached=900, is_full=True), Candidate("idle")]
    assert choose(1000, full, random.Random(1)) == "idle"


def test_what_is_cached_goes_before_what_has_to_be_read_and_that_before_nothing() -> None:
    candidates = [Candidate("cached", cached=900), Candidate("stored", stored=900), Candidate("none")]
    assert choose(1000, candidates, random.Random(1)) == "cached"
    assert choose(1000, candidates[1:], random.Random(1)) == "stored"


def test_a_session_stays_where_it_was_among_about_equals() -> None:
    others = [Candidate(str(number), cached=16) for number in range(5)]
    session = Candidate("session", cached=16, is_session=True, num_running=2)
    assert choose(1000, [*others, session], random.Random(1)) == "session"
    loaded = Candidate("session", is_session=True, queued_tokens=2 * SESSION_TOKENS)
    assert choose(1000, [*others, loaded], random.Random(1)) != "session"


def test_a_chat_in_a_full_window_stays_where_it_can_be_moved() -> None:
    """Its beginning is all that hashes tell of it."""
    session = Candidate("session", cached=512, is_session=True, num_running=3)
    assert choose(3000, [Candidate("idle", cached=512), session], random.Random(1)) == "session"


def test_a_chat_whose_last_prompt_is_still_there_stays_though_others_wait_there() -> None:
    """All of a full window but the new message is moved, which takes little of what reading it elsewhere would."""
    session = Candidate("session", cached=512, is_session=True, session_tokens=2900, queued_tokens=1500)
    assert choose(3000, [Candidate("idle", cached=512), session], random.Random(1)) == "session"
    assert cost(3000, session) < cost(3000, Candidate("session", cached=512, is_session=True, queued_tokens=1500))


def test_a_session_whose_beginning_is_gone_has_nothing_to_be_moved() -> None:
    gone = Candidate("session", is_session=True, session_tokens=2900)
    assert cost(3000, gone) == cost(3000, Candidate("session", is_session=True))


def test_a_short_prompt_waits_for_no_more_of_long_ones_than_it_has_itself() -> None:
    """An engine reads the shortest first."""
    short = Candidate("holder", cached=2900, queued_tokens=6000, num_queued=2)
    assert cost(3000, short) == COMPUTED_WEIGHT * 100 + 2 * 100
    assert choose(3000, [short, Candidate("idle")], random.Random(1)) == "holder"
    long = Candidate("idle", queued_tokens=6000, num_queued=60)
    assert cost(3000, long) == COMPUTED_WEIGHT * 3000 + 6000


def test_equal_replicas_take_turns() -> None:
    rng = random.Random(1)
    assert {choose(10, [Candidate("a"), Candidate("b"), Candidate("c")], rng) for _ in range(50)} == {"a", "b", "c"}
