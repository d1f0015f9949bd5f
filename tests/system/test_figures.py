"""Figures in the README and in docs/ are roundings of numbers in the committed results that they name."""

import json
import re
from collections.abc import Iterator
from decimal import Decimal
from pathlib import Path

import pytest
from checkout import ROOT

pytestmark = pytest.mark.quick

PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
NAMED = re.compile(r"`bench/results/(\w+)\.json`")
# "8,192", "-0.02%", "1.25"; not what belongs to a name, as in q8, int4 or SmolLM2-135M
NUMBER = re.compile(r"(?<![\w.`/-])[-+]?\d+(?:,\d{3})*(?:\.\d+)?(?![\w/]|\.\d|-bit|,\d)%?")


def leaves(value: object) -> Iterator[float]:
    """All numbers of a result, those in names such as "4,000 tokens" among them."""
    match value:
        case bool() | None:
            return
        case int() | float():
            yield float(value)
        case str():
            yield from (float(found.replace(",", "")) for found in re.findall(r"\d+(?:,\d{3})*(?:\.\d+)?", value))
        case dict():
            for key, inner in value.items():
                yield from leaves(key)
                yield from leaves(inner)
        case list():
            for inner in value:
                yield from leaves(inner)


def is_a_rounding(text: str, numbers: set[float]) -> bool:
    """Whether a figure is one of the numbers, to as many places as it is written with; percentages are shares."""
    figure = Decimal(text.strip("%").replace(",", "").lstrip("+"))
    exponent = figure.as_tuple().exponent
    assert isinstance(exponent, int)
    half = 0.5000001 * 10.0**exponent
    scale = 100 if text.endswith("%") else 1
    return any(abs(abs(number * scale) - abs(float(figure))) <= half for number in numbers)


def figures(page: Path) -> Iterator[tuple[str, list[str]]]:
    """Each result that a page names, with the figures of the paragraph that does so and of the table behind it."""
    blocks = re.split(r"\n\s*\n", page.read_text("utf-8"))
    for block, behind in zip(blocks, [*blocks[1:], ""], strict=True):
        names = NAMED.findall(block)
        text = block + "\n" + (behind if behind.startswith("|") else "")
        text = re.sub(r"`[^`]*`|\]\([^)]*\)", " ", text)
        if names:
            yield "+".join(names), NUMBER.findall(text)


CASES = [(page, names, found) for page in PAGES for names, found in figures(page)]


@pytest.mark.parametrize(("page", "names", "found"), CASES, ids=[f"{page.name}-{names}" for page, names, _ in CASES])
def test_every_figure_is_a_number_of_the_result_that_is_named(page: Path, names: str, found: list[str]) -> None:
    documents = [json.loads((ROOT / "bench/results" / f"{name}.json").read_text("utf-8")) for name in names.split("+")]
    numbers = {number for document in documents for number in leaves(document)}

    assert [figure for figure in found if not is_a_rounding(figure, numbers)] == []


def test_a_figure_that_is_not_so_is_found() -> None:
    assert is_a_rounding("1.08", {1.0810309})
    assert is_a_rounding("-0.02%", {-0.0001792})
    assert is_a_rounding("45", {44.8})
    assert not is_a_rounding("1.09", {1.0810309})
    assert not is_a_rounding("0.03%", {-0.0001792})
