"""What the measurement of stored chats makes of what it has seen."""

import json
from pathlib import Path

import pytest

from bench.session_kills import Said
from bench.sessions import merged, write_kills

pytestmark = pytest.mark.quick

LIKELY = {"a": -0.5, "b": -0.55, "c": -3.0}


def said(*tokens: str) -> Said:
    return Said(tokens, (LIKELY,) * len(tokens), 0)


def test_another_token_is_wrong_unless_it_was_about_as_likely():
    expected = said("a", "a", "a")
    assert not said("a", "b", "c").is_other_than(expected)
    assert said("a", "c", "a").is_other_than(expected)
    assert said("a", "d", "a").is_other_than(expected)
    assert said("a", "a").is_other_than(expected)


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
