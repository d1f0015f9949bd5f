"""What the measurement of killed engines and cut sockets makes of what it has seen."""

import pytest

from bench.resume import ANSWER_TOKENS, Answer, Found, verdicts, whole_events

pytestmark = pytest.mark.quick

WHOLE = Answer(tuple(range(ANSWER_TOKENS)), "text", True)


def missed(answer: Answer, together: int = 1, grown_mib: float = 0.0) -> list[object]:
    return [bar["name"] for bar in verdicts(Found([WHOLE], [answer], grown_mib, []), together) if not bar["met"]]


def test_an_answer_that_is_the_same_meets_all_bars():
    assert missed(WHOLE) == []
    assert missed(WHOLE, grown_mib=5.0) == ["growth of the front in MiB"]


def test_another_text_misses_its_bar_only_where_it_was_alone():
    other = Answer((*range(1, ANSWER_TOKENS), 0), "next", True)
    assert missed(other) == ["answers that differ from the undisturbed"]
    assert missed(other, together=4) == []


def test_a_lost_token_and_an_end_with_an_error_miss_theirs():
    short = Answer(tuple(range(ANSWER_TOKENS - 1)), "tex", False)
    assert missed(short, together=4) == ["answers that did not end whole", "answers with tokens lost or doubled"]


def test_of_a_stream_that_was_cut_only_whole_events_count():
    assert whole_events(b"id: a.1\ndata: {}\n\n: ping\n\nid: a.2\ndata: {}\n\nid: a.3\nda") == [
        b"id: a.1\ndata: {}",
        b"id: a.2\ndata: {}",
    ]
