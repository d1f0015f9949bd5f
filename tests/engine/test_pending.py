"""What is yet to be computed of a stream, against a plain list of places."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tightrope.backends.reuse import Reuse, Run
from tightrope.engine.pending import Pending
from tightrope.engine.track import Track

pytestmark = pytest.mark.quick


@st.composite
def prompts(draw: st.DrawFn) -> tuple[Reuse, list[int]]:
    """Runs of a prompt that end before its last token, and the places that are in none."""
    num_tokens = draw(st.integers(1, 60))
    ends = sorted(draw(st.sets(st.integers(0, num_tokens - 1), max_size=8)))
    pairs = zip(ends[::2], ends[1::2], strict=False)
    runs = tuple(Run(draw(st.integers(0, 99)), start, stop - start, draw(st.booleans())) for start, stop in pairs)
    found = {place for run in runs for place in range(run.start, run.stop)}
    return Reuse(runs), [place for place in range(num_tokens) if place not in found]


def places(ranges: list[range]) -> list[int]:
    return [place for part in ranges for place in part]


@given(prompts())
def test_a_prompt_is_the_runs_that_were_found_and_the_ranges_that_were_not(prompt: tuple[Reuse, list[int]]) -> None:
    reuse, missing = prompt
    num_tokens = missing[-1] + 1

    ranges = reuse.missing(num_tokens)

    assert places(ranges) == missing
    assert all(ranges)
    assert reuse.num_tokens == num_tokens - len(missing)


def test_a_prefix_is_one_exact_run_at_0_or_none() -> None:
    assert Reuse.prefix(7) == Reuse((Run(0, 0, 7),))
    assert Reuse.prefix(0) == Reuse()
    assert Reuse.prefix(7).missing(9) == [range(7, 9)]
    assert Reuse().missing(9) == [range(9)]


@given(prompts(), st.lists(st.one_of(st.integers(0, 30), st.just("append")), max_size=40))
def test_places_run_once_each_in_their_order_whatever_the_steps(
    prompt: tuple[Reuse, list[int]], actions: list[int | str]
) -> None:
    reuse, expected = prompt
    num_tokens = expected[-1] + 1
    pending = Pending(reuse.missing(num_tokens))

    for action in actions:
        if isinstance(action, str):
            pending.append(num_tokens)
            expected.append(num_tokens)
            num_tokens += 1
        else:
            first = pending.first(action)
            assert places(first) == expected[:action]
            assert pending.take(action) == first
            del expected[:action]
        assert places(pending.ranges) == expected
        assert all(before.stop < after.start for before, after in zip(pending.ranges, pending.ranges[1:], strict=False))
        assert pending.count == len(expected)
        for place in range(num_tokens + 1):
            assert pending.has_before(place) is any(one < place for one in expected)


def test_what_is_left_of_a_stream_ends_in_a_token_that_runs_again() -> None:
    track = Track(0, list(range(5)))
    track.begin(Reuse.prefix(4))
    track.pending.take(1)
    for token_id in (5, 6, 7):
        track.append(token_id)
        if token_id < 7:
            track.pending.take(1)

    track.take_back(2)

    assert track.token_ids == list(range(6))
    assert track.pending.ranges == [range(5, 6)]
