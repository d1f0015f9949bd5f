"""Copies of pages that wait for the next step, in the order in which they were asked for."""

from collections.abc import Sequence


class Copies:
    """(source, target) pairs of page numbers.

    A page may be given away, and even be the target of another copy, while it still waits to be copied itself.
    """

    def __init__(self) -> None:
        self._waiting: list[tuple[int, int]] = []

    def add(self, source: int, target: int) -> None:
        """Queue a copy. Where its source itself waits to be written, what that is copied from is copied instead."""
        targets = {target: origin for origin, target in self._waiting}
        origin = targets.get(source, source)
        self._waiting.append((source if origin in targets else origin, target))

    def next(self) -> Sequence[tuple[int, int]]:
        """Copies to make in any order, before anything is stored; then tell `done` and ask again.

        No page is written twice or both read and written, so they may be repeated if something interrupts them.
        """
        read: set[int] = set()
        written: set[int] = set()
        for i, (source, target) in enumerate(self._waiting):
            if source in written or target in written or target in read:
                return self._waiting[:i]
            read.add(source)
            written.add(target)
        return self._waiting[:]

    def done(self, count: int) -> None:
        """Say that the first `count` of the copies have been made."""
        del self._waiting[:count]
