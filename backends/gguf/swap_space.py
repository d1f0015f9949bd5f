"""Finished sequences outside the cache: copies of their cells in the store, until they are continued or too many."""

import struct
from collections.abc import Iterator

from tightrope.backends.sessions.piece import Bytes, Ints, Piece
from tightrope.backends.sessions.store import RunStore

_FIRST = struct.Struct("<q")  # The first position that sliding layers have not left.


class SwapSpace:
    """A RunStore in which a sequence is one piece."""

    def __init__(self, store: RunStore, window: int, *, whole_only: bool) -> None:
        """window, whole_only: see SharedKVCache."""
        self._store = store
        self._window, self._whole_only = window, whole_only

    @property
    def num_bytes(self) -> int:
        """No sequence of more can be put in."""
        return self._store.host_bytes

    @property
    def outlives(self) -> bool:
        """Whether what is put in is there in the next process, too."""
        return self._store.outlives

    def holds(self, namespace: str, token_ids: Ints) -> bool:
        """Whether a sequence is there, or one that goes on from it."""
        return self._store.covers(self._piece(namespace, token_ids, 0, 0))

    def put(self, namespace: str, token_ids: Ints, saved: Bytes, first_position: int) -> bool:
        """Add a sequence in place of its own beginnings, which are of no more use; False where it has no room."""
        return self._store.put(self._piece(namespace, token_ids.copy(), saved.nbytes, first_position), saved)

    def load(self, swapped: Piece) -> Bytes | None:
        """The copy of a sequence, which goes last now; None where it can't be had any more."""
        self._store.use([swapped])
        return self._store.read(swapped)

    def longest(self, wanted: Ints, namespace: str, found: int) -> tuple[Piece | None, int]:
        """The sequence with the longest usable beginning of `wanted` beyond `found` tokens, and that one's length.

        The last token of `wanted` is never among them.
        """
        best: Piece | None = None
        for match in self._store.longest(self._store.root(namespace), wanted[:-1], self._usable)[:1]:
            if match.length > found:
                best, found = match.piece, match.length
        return best, found

    def faults(self) -> Iterator[str]:
        """What contradicts itself, a line each."""
        return self._store.faults()

    def _piece(self, namespace: str, token_ids: Ints, num_bytes: int, first_position: int) -> Piece:
        root = self._store.root(namespace)
        return Piece(root, root, 0, token_ids, num_bytes, self._whole_only, _FIRST.pack(first_position))

    def _usable(self, swapped: Piece, length: int) -> int:
        """How many of the first `length` tokens a sequence can go on from: all of them, or none."""
        if self._whole_only:
            return length if length == len(swapped.token_ids) else 0
        (first_position,) = _FIRST.unpack(swapped.about)
        return length if not self._window or first_position <= max(0, length - self._window) else 0
