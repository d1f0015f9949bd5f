"""Telling others which pages of the tree can be found: see backends/holdings.py."""

from collections.abc import Callable, Hashable, Iterable
from typing import NamedTuple

from tightrope.backends.hf.cache.page_tree import Page, Root
from tightrope.backends.holdings import BLOCK, Holdings, chain
from tightrope.kernels.forms.layout import PAGE

assert PAGE == BLOCK, "a page is told as a block"


class _Link(NamedTuple):
    block: bytes
    place: int


class HeldPages:
    """Tells of full pages, of a text those up to the first that isn't in the tree."""

    def __init__(self, holdings: Holdings, root_of: Callable[[Hashable], bytes], roots: Iterable[Root]) -> None:
        """root_of: what stands before the first block below the root of this key. roots: those that there are now."""
        self._holdings, self._root_of = holdings, root_of
        self._links: dict[Page, _Link] = {}
        waiting: list[Page | Root] = list(roots)
        while waiting:
            place = waiting.pop()
            if isinstance(place, Page):
                self.see(place)
            waiting += [*place.children, *place.inexact]

    def see(self, page: Page) -> None:
        """Tell of a page that has just been hung somewhere, or nowhere."""
        is_held = page.parent is not None and len(page.tokens) == PAGE
        link = self._links.get(page)
        if link is not None and not is_held:
            del self._links[page]
            self._holdings.remove("cached", [link.block])
        elif link is None and is_held:
            before = self._before(page.parent)
            if before is not None:
                (block,) = chain(before.block, page.tokens)
                self._links[page] = _Link(block, before.place + 1)
                self._holdings.add("cached", [block], before.place + 1)

    def _before(self, parent: Page | Root | None) -> _Link | None:
        if isinstance(parent, Root):
            return _Link(self._root_of(parent.key), -1)
        return None if parent is None else self._links.get(parent)
