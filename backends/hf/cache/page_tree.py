"""The tree of pages with tokens: a page hangs below the page that holds the tokens before its own.

A path from a root is a beginning that was computed, and a page can only be found through token ids that are equal all
the way. Pages with tokens that were moved, or computed over such, aren't exact. They hang apart from those that are,
and nothing exact hangs below them.
"""

from bisect import bisect_left, insort
from collections.abc import Hashable, Iterator
from dataclasses import dataclass, field
from operator import attrgetter
from typing import ClassVar

tokens_of = attrgetter("tokens")


@dataclass(slots=True, eq=False)
class Root:
    """Where all beginnings hang that may be shared with each other."""

    key: Hashable
    children: list["Page"] = field(default_factory=list)  # They are sorted by their tokens, and exact.
    inexact: list["Page"] = field(default_factory=list)  # So are these, which are not.
    is_exact: ClassVar[bool] = True


@dataclass(slots=True, eq=False)
class Page:
    """A page and its place in the tree."""

    number: int
    parent: "Page | Root | None" = None  # None while it isn't in the tree.
    tokens: tuple[int, ...] = ()  # What can be found here; a page with children is full.
    children: list["Page"] = field(default_factory=list)  # They are sorted by their tokens, and as exact as it is.
    inexact: list["Page"] = field(default_factory=list)  # So are those below an exact page that are not.
    is_exact: bool = True
    is_left: bool = False  # Its chat has gone on with copies of what is still of use.
    refs: int = 0  # So many live sequences hold it.
    writer: object | None = None  # The sequence that may store into it.
    window_number: int | None = None  # The page of sliding-window layers with the same tokens, if any.
    window_refs: int = 0  # So many live sequences hold that one.

    @property
    def is_leaf(self) -> bool:
        return not self.children and not self.inexact


def hang(page: Page, parent: Page | Root | None, tokens: tuple[int, ...]) -> None:
    """Put a page, wherever it was, below `parent` with these tokens; below nothing without."""
    if page.parent is not None:
        siblings = siblings_of(page, page.parent)
        del siblings[place_of(siblings, page)]
    page.parent, page.tokens = (parent, tokens) if tokens else (None, ())
    if page.parent is not None:
        insort(siblings_of(page, page.parent), page, key=tokens_of)


def siblings_of(page: Page, parent: Page | Root) -> list[Page]:
    """Those among which a page stands, or would stand, below `parent`."""
    return parent.children if page.is_exact is parent.is_exact else parent.inexact


def hand_over(page: Page, other: Page) -> None:
    """Hang all that is below a page below another with the same tokens instead."""
    for child in (*page.children, *page.inexact):
        child.parent = other
        insort(siblings_of(child, other), child, key=tokens_of)
    page.children, page.inexact = [], []


def below(parent: Page | Root, *, exact_only: bool) -> Iterator[list[Page]]:
    """The pages below one, in two sorted lists; all of an inexact page's are inexact."""
    yield parent.children
    if not exact_only:
        yield parent.inexact


def place_of(siblings: list[Page], page: Page) -> int:
    """Where a page is among its siblings."""
    place = bisect_left(siblings, page.tokens, key=tokens_of)
    while siblings[place] is not page:
        place += 1  # Go past pages with the same tokens.
    return place


def neighbours(siblings: list[Page], part: tuple[int, ...]) -> list[Page]:
    """The pages before and after which `part` would stand in order: none has more of its beginning in common."""
    place = bisect_left(siblings, part, key=tokens_of)
    return siblings[max(0, place - 1) : place + 1]


def equals(siblings: list[Page], part: tuple[int, ...]) -> list[Page]:
    """All pages with exactly these tokens."""
    place = end = bisect_left(siblings, part, key=tokens_of)
    while end < len(siblings) and siblings[end].tokens == part:
        end += 1
    return siblings[place:end]


def twin_of(page: Page) -> Page | None:
    """Another page in the same place of the tree that holds all tokens of `page`."""
    assert page.parent is not None
    siblings = siblings_of(page, page.parent)
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
