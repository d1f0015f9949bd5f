"""A sequence in llama.cpp's cache as the books have it."""

from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np

from tightrope.backends.sessions.piece import Ints

ALL = 1 << 62  # More tokens than a sequence can have.


@dataclass(slots=True, eq=False)
class Entry:
    """A sequence, live or kept: its slot in llama.cpp, and its tokens and their logical cells, [length] of [room]."""

    slot: int
    namespace: str
    token_ids: Ints
    cells: Ints
    length: int = 0
    reserved: int = 0  # So many tokens beyond `length` have room.
    num_exact: int = ALL  # The tokens behind these were computed at other places, or over such ones.
    num_steady: int = 0  # So many of the first ran in large steps while nothing else did: see KVCache.open.
    is_in_order: bool = True  # Its cells are llama.cpp's first ones, in the order of its tokens.
    to_save: list[int] = field(default_factory=list)  # Checkpoints are made at these places, which rise.

    @classmethod
    def empty(cls, slot: int, namespace: str) -> "Entry":
        return cls(slot, namespace, np.empty(256, np.int32), np.empty(256, np.int32))

    @property
    def tokens(self) -> Ints:
        """Those that are stored, [length]."""
        return self.token_ids[: self.length]

    def append(self, token_ids: Sequence[int] | Ints, cells: Ints) -> None:
        end = self.length + len(cells)
        if end > len(self.token_ids):
            room = max(end, 2 * len(self.token_ids))
            self.token_ids = np.resize(self.token_ids, room)
            self.cells = np.resize(self.cells, room)
        self.token_ids[self.length : end] = token_ids
        self.cells[self.length : end] = cells
        self.length = end

    def held(self, start: int = 0) -> Ints:
        return self.cells[start : self.length]


def num_exact_of(entry: Entry, length: int) -> int:
    """What is exact of a sequence that begins with `length` tokens of an entry."""
    return entry.num_exact if entry.num_exact < length else ALL
