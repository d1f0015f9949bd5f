"""Copies in the cache that wait for the next step, in the order in which they were asked for."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from tightrope.kernels.forms.layout import PAGE

Slots = np.ndarray[Any, np.dtype[np.int64]]
_NONE: Slots = np.empty(0, np.int64)


@dataclass(frozen=True, slots=True)
class Batch:
    """Copies to make in any order: whole pages as (source, target), and single slots [n] to slots [n].

    No page is written twice or both read and written, so they may be repeated if something interrupts them. `count`
    copies are made by it.
    """

    pages: Sequence[tuple[int, int]]
    sources: Slots
    targets: Slots
    count: int

    def __bool__(self) -> bool:
        return self.count > 0


NOTHING = Batch((), _NONE, _NONE, 0)


@dataclass(frozen=True, slots=True, eq=False)
class _Copy:
    """Into one page: all of `reads`, which is one page then, or only `targets` from `sources`."""

    reads: frozenset[int]
    target: int
    sources: Slots | None = None
    targets: Slots | None = None


class Copies:
    """Copies of whole pages, and of single slots, which are numbered PAGE to a page.

    A page may be given away, and even be the target of another copy, while it still waits to be copied itself.
    """

    def __init__(self) -> None:
        self._waiting: list[_Copy] = []

    def add(self, source: int, target: int) -> None:
        """Queue a page. Where its source itself waits to be written, what that is copied from is copied instead."""
        if all(copy.sources is None for copy in self._waiting):
            origins = {copy.target: next(iter(copy.reads)) for copy in self._waiting}
            origin = origins.get(source, source)
            source = source if origin in origins else origin
        self._waiting.append(_Copy(frozenset((source,)), target))

    def add_slots(self, sources: Slots, targets: Slots) -> None:
        """Queue slots [n], n > 0, to slots [n] of one page that holds none of the sources."""
        self._waiting.append(_Copy(frozenset((sources // PAGE).tolist()), int(targets[0]) // PAGE, sources, targets))

    def next(self) -> Batch:
        """Copies to make before anything is stored; then tell `done` and ask again, until there are none."""
        if not self._waiting:
            return NOTHING
        read: set[int] = set()
        written: set[int] = set()
        count = 0
        for copy in self._waiting:
            if copy.target in written or copy.target in read or not written.isdisjoint(copy.reads):
                break
            read |= copy.reads
            written.add(copy.target)
            count += 1
        batch = self._waiting[:count]
        pages = [(source, copy.target) for copy in batch if copy.sources is None for source in copy.reads]
        sources = [copy.sources for copy in batch if copy.sources is not None]
        targets = [copy.targets for copy in batch if copy.targets is not None]
        return Batch(pages, np.concatenate([_NONE, *sources]), np.concatenate([_NONE, *targets]), count)

    def done(self, count: int) -> None:
        """Say that the first `count` of the copies have been made."""
        del self._waiting[:count]
