"""What the README and the pages in docs/ say about the code is so."""

import re
from pathlib import Path

import pytest
from checkout import ROOT

from tightrope.server.settings.options import OPTIONS

README = (ROOT / "README.md").read_text("utf-8")
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]


def test_the_table_of_options_is_the_one_of_the_code():
    rows = re.findall(r"^\| (`--.*) \| (.*) \|$", README, re.MULTILINE)
    expected = [
        (", ".join(f"`{spelling}`" for spelling in (f"--{name}", *option.aliases)), option.help)
        for name, option in OPTIONS.items()
    ]

    assert rows == expected


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_every_file_that_a_page_names_exists(page: Path):
    named = re.findall(
        r"`((?:server|engine|backends|kernels|tests|bench|docs|tightrope)/[\w/.]*)`", page.read_text("utf-8")
    )
    linked = re.findall(r"\]\((?!http)([^)#]+)\)", page.read_text("utf-8"))

    assert named
    assert [path for path in [*named, *linked] if not (ROOT / path).exists()] == []


def test_the_targets_of_make_that_the_readme_names_exist():
    targets = set(re.findall(r"^([a-z]+):", (ROOT / "Makefile").read_text("utf-8"), re.MULTILINE))
    named = set(re.findall(r"(?:^|`)make ([a-z]+)", README, re.MULTILINE))

    assert {"serve", "test"} <= named <= targets


def test_the_way_of_a_request_is_told_in_nine_sentences():
    numbers = re.findall(r"^(\d)\. ", (ROOT / "docs/request.md").read_text("utf-8"), re.MULTILINE)

    assert numbers == list("123456789")
