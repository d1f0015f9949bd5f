"""Finding the beginning of a prompt in the tree of pages."""

from collections.abc import Sequence
from typing import NamedTuple

from tightrope.backends.hf.cache.page_tree import Page, Root, below, equals, neighbours, num_common
from tightrope.backends.reuse import Run
from tightrope.kernels.forms.layout import PAGE


class Match(NamedTuple):
    """A path that holds the first `length` tokens of a prompt.

    `levels`: the root, and then all pages with the tokens of each page of the path that is full of them.
    """

    path: list[Page]
    length: int
    levels: list[list[Page | Root]]

    @property
    def runs(self) -> tuple[Run, ...]:
        """The exact part, and what follows; neither is empty."""
        num_exact = min(self.length, sum(page.is_exact for page in self.path) * PAGE)
        runs = Run(0, 0, num_exact), Run(num_exact, num_exact, self.length - num_exact, is_exact=False)
        return tuple(run for run in runs if run.length)


def find_path(root: Root | None, wanted: Sequence[int], *, exact_only: bool) -> Match:
    """The path below a root that holds most of `wanted`, and is exact if there is a choice.

    Several pages may hold the same tokens while their sequences live, so all equal paths are followed together.
    """
    parents: list[Page | Root] = [] if root is None else [root]
    levels: list[list[Page | Root]] = []
    end: Page | Root | None = None
    length = 0
    while parents:
        levels.append(parents)
        part = tuple(wanted[length : length + PAGE])
        families = [pages for parent in parents for pages in below(parent, exact_only=exact_only)]
        found = [(num_common(page.tokens, part), page) for pages in families for page in neighbours(pages, part)]
        common, best = max(found, key=lambda pair: (pair[0], pair[1].is_exact), default=(0, None))
        if common == 0:
            break
        length, end = length + common, best
        parents = [page for pages in families for page in equals(pages, part)] if common == PAGE else []
    path: list[Page] = []
    while isinstance(end, Page):
        path.append(end)
        end = end.parent
    return Match(path[::-1], length, levels)
