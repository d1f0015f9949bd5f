"""What the measurement of stored chats makes of what it has seen."""

import json
from pathlib import Path

import pytest

from bench.session_kills import Counts, Said, count
from bench.sessions import merged, write_kills

pytestmark = pytest.mark.quick

LIKELY = {"a": -0.5, "b": -0.55, "c": -3.0}


def said(*tokens: str) -> Said:
    return Said(tokens, (LIKELY,) * len(tokens), 0)


def test_another_token_is_wrong_unless_it_was_about_as_likely():
    counts, expected = Counts(), said("a", "a", "a")
    for tokens in (["a", "a", "a"], ["a", "b", "c"], ["a", "c", "a"], ["a", "d", "a"], ["a", "a"]):
        count(counts, said(*tokens), expected, {"chat": 1})
    assert (counts.answers, counts.equal, counts.ties, counts.wrong) == (5, 1, 1, 3)
    nats = [0.05, 2.5, None, None]
    places = [1, 1, 1, 2]
    assert counts.parted == [{"chat": 1, "place": p, "nats": n} for p, n in zip(places, nats, strict=True)]


def test_rows_take_the_place_of_those_of_their_model_and_engine():
    rows = [{"model": "m", "gguf_engine": engine, "of": "before"} for engine in ("own", "llama.cpp")]
    new = {"model": "m", "gguf_engine": "own", "of": "now"}
    assert merged(rows, [new]) == [rows[1], new]


def test_kills_are_counted_over_all_models_and_leave_the_rest_as_it_is(tmp_path: Path):
    path = tmp_path / "sessions.json"
    path.write_text(json.dumps({"date": "then", "results": {"chats": [1]}}))
    counts = {"kills": 3, "wrong": 0, "tracebacks": 0}
    for model, wrong in (("a", 0), ("b", 1), ("b", 0)):
        row = {"model": model, "gguf_engine": "own", **counts, "wrong": wrong}
        write_kills(path, {"date": "now", "models": [row]})
        written = json.loads(path.read_text())
        assert written["results"]["kills"]["bar"] == (not wrong)
    assert written["date"] == "then"
    assert written["results"]["chats"] == [1]
    assert written["results"]["kills"]["num_kills"] == 6
    assert written["results"]["kills"]["date"] == "now"
