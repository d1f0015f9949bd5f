"""Logical cells of llama.cpp's cache, counted: which are free, and how many sequences hold each of the others."""

from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np

Ints = np.ndarray[Any, np.dtype[np.int32]]


class Cells:
    """Two counts for each: `refs`, the sequences that hold it, and `pins`, those of them that are live.

    So pinned, reusable (held by finished sequences only) and free cells always add up to the capacity, and shared cells
    count once. The cells of one call are all different.
    """

    def __init__(self, capacity: int) -> None:
        self.capacity = capacity
        self.num_free = capacity
        self.num_pinned = 0
        self._refs = np.zeros(capacity, np.int32)
        self._pins = np.zeros(capacity, np.int32)
        self._free = np.arange(capacity - 1, -1, -1, dtype=np.int32)  # It is a stack, on which the first num_free are.

    @property
    def num_reusable(self) -> int:
        return self.capacity - self.num_pinned - self.num_free

    def take(self, count: int, *, pinned: bool) -> Ints:
        """Free cells, which their one holder gives back by `release`; a view, to be copied at once."""
        self.num_free -= count
        cells = self._free[self.num_free : self.num_free + count]
        self._refs[cells] = 1
        if pinned:
            self._pins[cells] = 1
            self.num_pinned += count
        return cells

    def share(self, cells: Ints) -> None:
        """Add a holder, who is live."""
        self._refs[cells] += 1
        self.pin(cells)

    def pin(self, cells: Ints) -> None:
        """A holder has become live."""
        self.num_pinned += int(np.count_nonzero(self._pins[cells] == 0))
        self._pins[cells] += 1

    def unpin(self, cells: Ints) -> None:
        """A holder isn't live any more."""
        self._pins[cells] -= 1
        self.num_pinned -= int(np.count_nonzero(self._pins[cells] == 0))

    def release(self, cells: Ints) -> None:
        """A holder that isn't live gives them up."""
        self._refs[cells] -= 1
        freed = cells[self._refs[cells] == 0]
        self._free[self.num_free : self.num_free + len(freed)] = freed
        self.num_free += len(freed)

    def own(self, cells: Ints, most: int, *, pinned: bool) -> bool:
        """Put others in the place of those of a holder's `cells` that it shares; False if that takes more than `most`.

        pinned: the holder is live.
        """
        places = np.flatnonzero(self._refs[cells] > 1)
        if len(places) > most:
            return False
        shared = cells[places]
        cells[places] = self.take(len(places), pinned=pinned)
        if pinned:
            self.unpin(shared)
        self.release(shared)
        return True

    def alone(self, cells: Ints) -> np.ndarray[Any, np.dtype[np.intp]]:
        """The places in `cells` of those with one holder."""
        return np.flatnonzero(self._refs[cells] == 1)

    def faults(self, live: Sequence[Ints], kept: Sequence[Ints]) -> Iterator[str]:
        """What contradicts the cells that live and finished sequences hold, a line each."""
        pins = np.bincount(np.concatenate([*live, np.empty(0, np.int32)]), minlength=self.capacity)
        refs = pins + np.bincount(np.concatenate([*kept, np.empty(0, np.int32)]), minlength=self.capacity)
        for name, counts, true in (("references", self._refs, refs), ("pins", self._pins, pins)):
            for cell in np.flatnonzero(counts != true)[:1]:
                yield f"cell {cell} counts {counts[cell]} {name} and has {true[cell]}"
        if sorted(self._free[: self.num_free].tolist()) != np.flatnonzero(refs == 0).tolist():
            yield f"the {self.num_free} free cells are not the {np.count_nonzero(refs == 0)} that nobody holds"
        if self.num_pinned != np.count_nonzero(pins):
            yield f"{self.num_pinned} cells are counted as pinned, and {np.count_nonzero(pins)} are"
        for cells in (*live, *kept):
            if len(np.unique(cells)) != len(cells):
                yield "a sequence holds a cell twice"
