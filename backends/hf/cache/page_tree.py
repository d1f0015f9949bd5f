"""The tree of pages with tokens: a page hangs below the page that holds the tokens before its own.

A path from a root is a beginning that was computed, and a page can only be found through token ids that are equal all
the way.
"""

from bisect import bisect_left, insort
from collections.abc import Hashable
from dataclasses import dataclass, field
from operator import attrgetter

tokens_of = attrgetter("tokens")


@dataclass(slots=True, eq=False)
class Root:
    """Where all beginnings hang that may be shared with each other."""

    key: Hashable
    children: list["Page"] = field(default_factory=list)  # They are sorted by their tokens.


@dataclass(slots=True, eq=False)
class Page:
    """A page and its place in the tree."""

    number: int
    parent: "Page | Root | None" = None  # None while it isn't in the tree.
    tokens: tuple[int, ...] = ()  # What can be found here; a page with children is full.
    children: list["Page"] = field(default_factory=list)  # They are sorted by their tokens.
    refs: int = 0  # So many live sequences hold it.
    writer: object | None = None  # The sequence that may store into it.
    window_number: int | None = None  # The page of sliding-window layers with the same tokens, if any.
    window_refs: int = 0  # So many live sequences hold that one.


def hang(page: Page, parent: Page | Root | None, tokens: tuple[int, ...]) -> None:
    """Put a page, wherever it was, below `parent` with these tokens; below nothing without."""
    if page.parent is not None:
        siblings = page.parent.children
        del siblings[place_of(siblings, page)]
    page.parent, page.tokens = (parent, tokens) if tokens else (None, ())
    if page.parent is not None:
        insort(page.parent.children, page, key=tokens_of)


def place_of(siblings: list[Page], page: Page) -> int:
    """Where a page is among its siblings."""
    place = bisect_left(siblings, page.tokens, key=tokens_of)
    while siblings[place] is not page:
        place += 1  # Go past pages with the same tokens.
    return place


def neighbours(parent: Page | Root, part: tuple[int, ...]) -> list[Page]:
    """The children before and after which `part` would stand in order: none has more of its beginning in common."""
    place = bisect_left(parent.children, part, key=tokens_of)
    return parent.children[max(0, place - 1) : place + 1]


def equals(parent: Page | Root, part: tuple[int, ...]) -> list[Page]:
    """All children with exactly these tokens."""
    place = end = bisect_left(parent.children, part, key=tokens_of)
    while end < len(parent.children) and parent.children[end].tokens == part:
        end += 1
    return parent.children[place:end]


def twin_of(page: Page) -> Page | None:
    """Another page in the same place of the tree that holds all tokens of `page`."""
    assert page.parent is not None
    siblings = page.parent.children
    place = place_of(siblings, page)
    for other in siblings[max(0, place - 1) : place] + siblings[place + 1 : place + 2]:
        if other.tokens[: len(page.tokens)] == page.tokens:
            return other
    return None


def num_common(a: tuple[int, ...], b: tuple[int, ...]) -> int:
    """How many leading tokens are equal."""
    if a == b:
        return len(a)
    return next((i for i, (x, y) in enumerate(zip(a, b, strict=False)) if x != y), min(len(a), len(b)))
