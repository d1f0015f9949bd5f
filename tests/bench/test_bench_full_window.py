"""The replay of a chat that has filled its window: what its turns are, and what is made of the numbers."""

import json
from itertools import pairwise
from pathlib import Path

import pytest

from bench.full_window import NAMES, judge, make_room
from bench.full_window_plot import draw
from bench.story import LORE, NOTE, OTHERS, Turn, story

pytestmark = pytest.mark.quick

WINDOW = 12_000  # characters, which are counted as tokens here


def turns(count: int = 30) -> list[Turn]:
    return list(story(WINDOW, count, len))


def test_every_prompt_fits_the_window_and_nearly_fills_it() -> None:
    assert all(WINDOW - 1200 < len(turn.text) <= WINDOW for turn in turns())


def test_a_turn_that_loses_its_oldest_messages_keeps_the_card_and_all_the_others() -> None:
    plain = [(before, after) for before, after in pairwise(turns()) if after.what == "the oldest go"]

    assert len(plain) == 21
    for before, after in plain:
        kept = after.messages[1:-1]
        assert after.messages[0] == before.messages[0]
        assert kept == before.messages[len(before.messages) - len(kept) :]
    assert sum(len(after.messages) <= len(before.messages) for before, after in plain) > len(plain) / 2


def test_the_last_quarter_has_turns_of_all_other_kinds() -> None:
    found = {turn.what: turn for turn in turns()}

    assert set(OTHERS) < set(found)
    assert found["a note at depth 4"].messages[-5] == ("system", NOTE)
    assert found["a lore entry"].messages[1] == ("system", LORE)
    assert found["another card"].messages[0] != found["the first card"].messages[0]
    pairs = list(pairwise(turns()))
    assert all(before.text == after.text for before, after in pairs if after.what == "a swipe")


def rows(ttft_s: float, kld: float) -> list[dict[str, object]]:
    told = {"cache": "q8", "what": "the oldest go", "kld": kld, "first_kld": kld / 2, "first_kld_p99": 4 * kld}
    timed = {"part": "speed", "server": "torch engine", "tokens": 3000, "new_tokens": 100}
    return [
        {"part": "quality", "perplexity": 1.001, **told},
        {**timed, "turn": 0, "what": "cold", "ttft_s": 10.0, "cached": 0},
        {**timed, "turn": 1, "what": "the oldest go", "ttft_s": ttft_s, "cached": 2871},
    ]


def test_what_was_found_is_told_beside_the_bars(tmp_path: Path) -> None:
    good, bad = judge(rows(0.5, 0.001)), judge(rows(2.0, 0.01))

    assert good["torch engine"]["times sooner"] == 20.0
    assert good["torch engine"]["computed of the rest"] == 29 / 2900
    assert all(good["bars"].values())
    assert not any(held for name, held in bad["bars"].items() if name != "perplexity" and "computed" not in name)

    draw(rows(0.5, 0.001), good, tmp_path / "picture.png")
    assert (tmp_path / "picture.png").stat().st_size > 1000


def test_rows_of_what_is_measured_again_are_replaced_and_no_others(tmp_path: Path) -> None:
    path = tmp_path / "rows.jsonl"
    kinds = [("quality", {"cache": "q8"}), ("quality", {"cache": "q4"}), ("needle", {})]
    kinds += [("speed", {"server": name}) for name in NAMES]
    path.write_text("".join(json.dumps({"part": part, **more}) + "\n" for part, more in kinds))

    make_room(path, ["q4", "speed"], NAMES[1:])

    rows = [json.loads(line) for line in path.read_text("utf-8").splitlines()]
    assert rows == [
        {"part": "quality", "cache": "q8"},
        {"part": "needle"},
        {"part": "speed", "server": NAMES[0]},
    ]
