"""Finished sequences outside the cache: copies of their cells in memory, until they are continued or too many."""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np

from tightrope.backends.gguf.cells import Ints

Bytes = np.ndarray[Any, np.dtype[np.uint8]]


@dataclass(frozen=True, slots=True, eq=False)
class Swapped:
    """A finished sequence outside the cache."""

    namespace: str
    token_ids: Ints  # [length]
    saved: Bytes
    first_position: int  # Sliding layers have left these.


class SwapSpace:
    """Room for so many bytes of copies; the least recently used go first."""

    def __init__(self, num_bytes: int, window: int, *, whole_only: bool) -> None:
        """window, whole_only: see SharedKVCache."""
        self.num_bytes = num_bytes
        self._window, self._whole_only = window, whole_only
        self._swapped: list[Swapped] = []  # They stand least recently used first.

    def put(self, swapped: Swapped) -> None:
        """Add one that fits, in place of its own beginnings, which are of no more use."""
        self._swapped = [other for other in self._swapped if not self._continues(swapped, other)]
        self._swapped.append(swapped)
        while self._used > self.num_bytes:
            self._swapped.pop(0)

    def take(self, swapped: Swapped) -> None:
        """Let go of one that has come back to the cache."""
        self._swapped.remove(swapped)

    def longest(self, wanted: Ints, namespace: str, found: int) -> tuple[Swapped | None, int]:
        """The sequence with the longest usable beginning of `wanted` beyond `found` tokens, and that one's length.

        The last token of `wanted` is never among them.
        """
        best: Swapped | None = None
        for swapped in self._swapped:
            length = len(swapped.token_ids)
            if swapped.namespace != namespace or min(length, len(wanted) - 1) <= found:
                continue
            common = min(common_prefix(swapped.token_ids, wanted), len(wanted) - 1)
            if common > found and self._can_continue(swapped, common):
                best, found = swapped, common
        return best, found

    def faults(self) -> Iterator[str]:
        """What contradicts itself, a line each."""
        if self._used > self.num_bytes:
            yield f"{self._used} bytes are swapped out to {self.num_bytes}"

    @property
    def _used(self) -> int:
        return sum(swapped.saved.nbytes for swapped in self._swapped)

    def _continues(self, swapped: Swapped, other: Swapped) -> bool:
        """Whether `other` is a beginning of `swapped`."""
        is_prefix = common_prefix(other.token_ids, swapped.token_ids) == len(other.token_ids)
        return is_prefix and other.namespace == swapped.namespace and not self._whole_only

    def _can_continue(self, swapped: Swapped, length: int) -> bool:
        """Whether a sequence can go on after the first `length` tokens."""
        if self._whole_only:
            return length == len(swapped.token_ids)
        return not self._window or swapped.first_position <= max(0, length - self._window)


def common_prefix(a: Ints, b: Ints) -> int:
    """How many leading tokens are equal."""
    size = min(len(a), len(b))
    differ = a[:size] != b[:size]
    place = int(differ.argmax()) if size else 0
    return place if size and differ[place] else size
