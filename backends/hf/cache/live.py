"""A live sequence of the paged cache."""

from collections.abc import Hashable, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import numpy as np

from tightrope.backends.hf.cache.page_tree import Page
from tightrope.kernels.forms.layout import PAGE

Ints = np.ndarray[Any, np.dtype[np.int32]]


class Ahead(NamedTuple):
    """Tokens that are stored from place `start` on, behind a gap that is yet to be computed."""

    start: int
    token_ids: tuple[int, ...]


@dataclass(slots=True, eq=False)
class LiveSequence:
    """Its tokens are in `pages`, and so is the room that is reserved for more."""

    root: Hashable
    opened_len: int
    frequencies: Hashable
    pages: list[Page] = field(default_factory=list)
    table: Ints = field(default_factory=lambda: np.zeros(64, np.int32))  # [>= len(pages)] their numbers
    length: int = 0  # So many tokens are stored, from the first without a gap.
    ahead: list[Ahead] = field(default_factory=list)
    moved_from: Sequence[Page] = ()  # The path that runs of it were copied from.
    num_exact: int | None = None  # So many are what computing them here gives; None: all.
    num_findable: int = 0  # So many of them, from the first, may be found by others.
    held: range = range(0)  # Places in `pages` of those whose window number it holds.

    @property
    def num_stored(self) -> int:
        return self.length + sum(len(run.token_ids) for run in self.ahead)

    def is_exact_at(self, place: int) -> bool:
        """Whether all tokens that the page in this place has, or will have, are exact."""
        return self.num_exact is None or (place + 1) * PAGE <= self.num_exact

    def join(self) -> tuple[int, ...]:
        """The tokens that follow without a gap on those stored, which become stored themselves."""
        joined: tuple[int, ...] = ()
        while self.ahead and self.ahead[0].start == self.length:
            run = self.ahead.pop(0)
            joined += run.token_ids
            self.length += len(run.token_ids)
        return joined

    def append(self, page: Page) -> None:
        if len(self.pages) == len(self.table):
            self.table = np.resize(self.table, 2 * len(self.table))
        self.table[len(self.pages)] = page.number
        self.pages.append(page)

    @property
    def borrows_tail(self) -> bool:
        """Whether the next token would go into a page that isn't this sequence's to write."""
        return self.length % PAGE != 0 and self.pages[self.length // PAGE].writer is not self
