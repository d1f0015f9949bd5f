"""A live sequence of the paged cache."""

from collections.abc import Hashable
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from tightrope.backends.hf.cache.page_tree import Page
from tightrope.kernels.forms.layout import PAGE

Ints = np.ndarray[Any, np.dtype[np.int32]]


@dataclass(slots=True, eq=False)
class LiveSequence:
    """Its tokens are in `pages`, and so is the room that is reserved for more."""

    root: Hashable
    opened_len: int
    frequencies: Hashable
    pages: list[Page] = field(default_factory=list)
    table: Ints = field(default_factory=lambda: np.zeros(64, np.int32))  # [>= len(pages)] their numbers
    length: int = 0  # Tokens stored.
    num_findable: int = 0  # So many of them, from the first, may be found by others.
    held: range = range(0)  # Places in `pages` of those whose window number it holds.

    def append(self, page: Page) -> None:
        if len(self.pages) == len(self.table):
            self.table = np.resize(self.table, 2 * len(self.table))
        self.table[len(self.pages)] = page.number
        self.pages.append(page)

    @property
    def borrows_tail(self) -> bool:
        """Whether the next token would go into a page that isn't this sequence's to write."""
        return self.length % PAGE != 0 and self.pages[self.length // PAGE].writer is not self
