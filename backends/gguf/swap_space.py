"""Finished sequences outside the cache: copies of their cells in the store, until they are continued or too many."""

import struct
from collections.abc import Callable, Iterator

from tightrope.backends.sessions.piece import Bytes, Ints, Piece
from tightrope.backends.sessions.store import RunStore

# Of how many of so many first tokens of a copy, given with its tokens, namespace and first position, one can go on.
Usable = Callable[[Ints, str, int, int], int]
_FIRST = struct.Struct("<q")  # The first position that sliding layers have not left.


class SwapSpace:
    """A RunStore in which a sequence is one piece."""

    def __init__(self, store: RunStore, usable: Usable, *, whole_only: bool) -> None:
        """whole_only: see SharedKVCache."""
        self._store = store
        self._usable, self._whole_only = usable, whole_only

    @property
    def num_bytes(self) -> int:
        """No sequence of more can be put in."""
        return self._store.host_bytes

    @property
    def outlives(self) -> bool:
        """Whether what is put in is there in the next process, too."""
        return self._store.outlives

    def holds(self, namespace: str, token_ids: Ints, first_position: int) -> bool:
        """Whether a sequence is there, or one that goes on from it."""
        return self._store.covers(self._piece(namespace, token_ids, 0, first_position))

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

        def usable(swapped: Piece, length: int) -> int:
            (first_position,) = _FIRST.unpack(swapped.about)
            return self._usable(swapped.token_ids, namespace, first_position, length)

        for match in self._store.longest(self._store.root(namespace), wanted[:-1], usable)[:1]:
            if match.length > found:
                best, found = match.piece, match.length
        return best, found

    def longest_common(self, wanted: Ints, namespace: str) -> int:
        """How many tokens the sequence that begins most like `wanted` has in common with it."""
        matches = self._store.longest(self._store.root(namespace), wanted, lambda _, length: length)
        return max((match.length for match in matches), default=0)

    def faults(self) -> Iterator[str]:
        """What contradicts itself, a line each."""
        return self._store.faults()

    def _piece(self, namespace: str, token_ids: Ints, num_bytes: int, first_position: int) -> Piece:
        root = self._store.root(namespace)
        is_whole = self._whole_only or first_position > 0  # Without a window's beginning it can't be cut.
        return Piece(root, root, 0, token_ids, num_bytes, is_whole, _FIRST.pack(first_position))
