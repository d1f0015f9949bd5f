"""What the measurement of killed engines and cut sockets makes of what it has seen."""

import json
from pathlib import Path

import pytest

from bench.resume import ANSWER_TOKENS, Answer, Found, row, verdicts, whole_events, with_row

pytestmark = pytest.mark.quick

WHOLE = Answer(tuple(range(ANSWER_TOKENS)), "text", True)


def missed(answer: Answer, together: int = 1, grown_mib: float = 0.0) -> list[object]:
    found = Found([WHOLE], [answer] * 9, [40.0] * 8 + [40.0 + grown_mib], [])
    return [bar["name"] for bar in verdicts(found, together) if not bar["met"]]


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


def test_a_run_that_was_cut_misses_what_it_has_not_done():
    bars = verdicts(Found([WHOLE], [WHOLE], [40.0], [], num_missing=3), 1)
    assert [bar["name"] for bar in bars if not bar["met"]] == ["kills or cuts that are missing"]


def test_of_a_stream_that_was_cut_only_whole_events_count():
    assert whole_events(b"id: a.1\ndata: {}\n\n: ping\n\nid: a.2\ndata: {}\n\nid: a.3\nda") == [
        b"id: a.1\ndata: {}",
        b"id: a.2\ndata: {}",
    ]


def test_a_run_takes_the_place_of_the_one_of_its_setup_and_tells_where_a_text_parted(tmp_path: Path):
    path = tmp_path / "resume.json"
    other = Answer((*range(20), 0, *range(21, ANSWER_TOKENS)), "next", True, at_kill=10)
    for name, answer in (("a", WHOLE), ("b", WHOLE), ("a", other)):
        new = row(Found([WHOLE], [WHOLE, answer], [40.0, 41.0], []), [], {"model": name})
        path.write_text(json.dumps({"results": {"rows": with_row(path, new)}}))
    rows = json.loads(path.read_text())["results"]["rows"]
    assert [(one["setup"]["model"], one["equal"]) for one in rows] == [("b", 2), ("a", 1)]
    assert rows[1]["parted"] == [{"number": 1, "at_kill": 10, "parts_at": 20, "token_ids": [[20], [0]]}]
    assert rows[1]["front_mib"] == [40.0, 41.0]
