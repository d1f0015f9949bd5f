"""The measurements of perplexity on sizes that take seconds."""

import json
from pathlib import Path

import pytest

from bench import report, rope
from bench.english import english_text
from tightrope.backends.locate import bundled_model


@pytest.fixture(autouse=True)
def results(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setattr(report, "RESULTS", tmp_path)
    return tmp_path


def test_the_text_is_long_prose_that_holds_no_paragraph_twice():
    text = english_text()
    paragraphs = text.split("\n\n")

    assert len(text) > 250_000
    assert len(paragraphs) == len(set(paragraphs))
    assert "::=" not in text


def run_rope(scalings: str) -> None:
    rope.main([str(bundled_model()), "--contexts", "32,64", "--tokens", "64", "--scalings", scalings])


def test_scalings_are_measured_drawn_and_listed(results: Path, capsys: pytest.CaptureFixture[str]):
    run_rope("none,linear 4")

    found = json.loads((results / "rope.json").read_text())["results"]
    assert [(row["scaling"], row["context"], row["windows"]) for row in found["rows"]] == [
        ("none", 32, 2),
        ("none", 64, 1),
        ("linear 4", 32, 2),
        ("linear 4", 64, 1),
    ]
    none, linear = (found["rows"][i]["perplexity"] for i in (1, 3))
    assert linear > 2 * none  # within the trained window an untrained scaling can only harm
    assert (results / "rope.png").read_bytes().startswith(b"\x89PNG")
    assert capsys.readouterr().out.splitlines()[2] == (f"| none | {found['rows'][0]['perplexity']:.2f} | {none:.2f} |")


def test_an_interrupted_run_goes_on_with_what_is_missing(results: Path, monkeypatch: pytest.MonkeyPatch):
    run_rope("none")
    before = json.loads((results / "rope.json").read_text())["results"]["rows"]
    opened: list[str] = []
    really = rope._open
    monkeypatch.setattr(
        rope, "_open", lambda model, scaling, window: opened.append(scaling.name) or really(model, scaling, window)
    )

    run_rope("none,yarn 2")

    assert opened == ["yarn 2"]
    assert json.loads((results / "rope.json").read_text())["results"]["rows"][:2] == before
