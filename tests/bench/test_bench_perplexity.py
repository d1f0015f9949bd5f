"""The measurements of perplexity on sizes that take seconds."""

import json
from pathlib import Path

import pytest
from hf_models import smollm2_bf16

from bench import kv_quality, report, rope
from bench.english import english_text
from tightrope.backends.hf.backend import HFBackend
from tightrope.backends.locate import bundled_model
from tightrope.backends.settings import CacheSettings, ModelSettings
from tightrope.engine.perplexity import compare, cut_windows


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


def test_layouts_of_the_cache_are_measured_side_by_side(results: Path, capsys: pytest.CaptureFixture[str]):
    arguments = [str(smollm2_bf16()), "--context", "64", "--tokens", "64"]

    kv_quality.main(arguments)
    first = (results / "kv_quality.json").read_text()
    kv_quality.main(arguments)  # has nothing left to do

    [found] = json.loads(first)["results"]["models"]
    assert (results / "kv_quality.json").read_text() == first
    assert {(row["cache"], row["keys"]) for row in found["rows"]} == {
        (kind, layout) for kind in ("q8", "q4") for layout in (kv_quality.FACTOR, kv_quality.PLAIN, kv_quality.AFTER)
    }
    assert all(row["mean_kl"] > 0 for row in found["rows"])
    assert [sizes["allocated"] for sizes in found["bytes_per_token"].values()] == [
        sizes["planned"] for sizes in found["bytes_per_token"].values()
    ]
    served = found["rows"][0]
    assert f"{served['mean_kl']:.6f} | {served['perplexity']:.4f}" in capsys.readouterr().out


def test_a_layout_after_rotation_that_rounds_nothing_changes_nothing(monkeypatch: pytest.MonkeyPatch):
    settings = ModelSettings(max_model_len=64, step_tokens=24, cache=CacheSettings(tokens=64, dtype="f16"))
    base = HFBackend(smollm2_bf16(), settings, lambda _: None)
    after = kv_quality.AfterRotation(base, "q4")
    windows = cut_windows(
        base.tokenizer.encode(english_text()[:2000], parse_special=False, is_start=True), 64, None, 64
    )

    rounded = compare(base, [after], windows, lambda _: None)[1]
    monkeypatch.setattr(kv_quality.AfterRotation, "_rounded", lambda self, x: x)
    exact = compare(base, [after], windows, lambda _: None)[1]

    base.close()
    assert rounded.mean_divergence > 0.01
    assert exact.mean_divergence < 1e-5


def test_verdicts_hold_the_served_layout_to_its_bars():
    def row(cache: str, keys: str, kl: float) -> dict[str, object]:
        return {"cache": cache, "keys": keys, "mean_kl": kl, "perplexity_change": -0.002}

    rows = [
        row("q8", kv_quality.FACTOR, 0.0003),
        row("q8", kv_quality.AFTER, 0.001),
        row("q4", kv_quality.FACTOR, 0.07),
        row("q4", kv_quality.AFTER, 0.1),
    ]

    assert {name: verdict["met"] for name, verdict in kv_quality.judge(rows).items()} == {
        "mean KL of q8": True,
        "change of perplexity by q8": False,
        "mean KL of q8 over that after rotation": True,
        "mean KL of q4 over that after rotation": False,
    }
