"""What the README and the pages in docs/ say about the code is so."""

import ast
import re
from pathlib import Path

import pytest
from checkout import ROOT

from tightrope.server.settings.options import OPTIONS

pytestmark = pytest.mark.quick

README = (ROOT / "README.md").read_text("utf-8")
PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").glob("*.md"))]


def test_the_table_of_options_is_the_one_of_the_code():
    page = (ROOT / "docs/options.md").read_text("utf-8")
    rows = re.findall(r"^\| (`--.*) \| (.*) \|$", page, re.MULTILINE)
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

    places = [*(ROOT / path for path in named), *(page.parent / path for path in linked)]  # links go from their page
    missing = [str(place) for place in places if not place.exists()]
    assert [path for path in missing if "/NAME" not in path] == []  # which a recipe leaves to its reader


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_every_heading_that_a_page_links_to_exists(page: Path):
    linked = re.findall(r"\]\((?!http)([^)#]*)#([^)]+)\)", page.read_text("utf-8"))

    missing = [(file, anchor) for file, anchor in linked if anchor not in anchors(page.parent / file if file else page)]
    assert missing == []


def anchors(page: Path) -> set[str]:
    """What headings of a page are called in links, as GitHub makes it of them."""
    headings = re.findall(r"^#+ (.*)$", page.read_text("utf-8"), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


def test_the_targets_of_make_that_the_readme_names_exist():
    targets = set(re.findall(r"^([a-z]+):", (ROOT / "Makefile").read_text("utf-8"), re.MULTILINE))
    named = set(re.findall(r"(?:^|`)make ([a-z]+)", README, re.MULTILINE))

    assert {"serve", "test"} <= named <= targets


def defined(path: Path) -> set[str]:
    """Names of classes and functions of a file."""
    nodes = ast.walk(ast.parse(path.read_text("utf-8")))
    return {node.name for node in nodes if isinstance(node, (ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef))}


def test_the_way_of_a_request_names_files_and_what_is_in_them():
    """A class or function stands in a file that its step names, or one before it; files are checked above."""
    steps = re.split(r"^\d\. ", (ROOT / "docs/request.md").read_text("utf-8"), flags=re.MULTILINE)
    known: set[str] = set()
    for step in steps:
        known |= {name for path in re.findall(r"`([\w/]+\.py)`", step) for name in defined(ROOT / path)}
        named = re.findall(r"`([A-Za-z_]\w*)(?:\(\))?`", step)

        assert [name for name in named if name not in known] == []


def test_the_way_of_a_request_is_told_in_numbered_steps():
    numbers = re.findall(r"^(\d)\. ", (ROOT / "docs/request.md").read_text("utf-8"), re.MULTILINE)

    assert numbers == list("123456789")
