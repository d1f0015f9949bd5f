"""Finished sequences outside the cache: copies of their cells in the store, until they are continued or too many.

Where every layer sees everything, a copy is pieces of PIECE tokens, so that a chat that goes on has its last piece copied
anew and no more. States and windows of layers can't be cut, and then a sequence is one piece.
"""

import struct
from collections.abc import Callable, Collection, Iterator, Sequence
from dataclasses import replace

from tightrope.backends.sessions.piece import Bytes, Ints, Piece
from tightrope.backends.sessions.store import RunStore

PIECE = 256  # Tokens.

# Of how many of so many first tokens of a copy, given with its tokens, namespace and first position, one can go on.
Usable = Callable[[Ints, str, int, int], int]
_FIRST = struct.Struct("<q")  # The first position that sliding layers have not left.


class SwapSpace:
    """Sequences as pieces of a RunStore, one behind another."""

    def __init__(self, store: RunStore, usable: Usable, *, is_cut: bool, whole_only: bool) -> None:
        """is_cut: sequences are cut into pieces. whole_only: see SharedKVCache."""
        self._store = store
        self._usable, self._is_cut, self._whole_only = usable, is_cut, whole_only

    @property
    def num_bytes(self) -> int:
        """No piece of more can be put in."""
        return self._store.host_bytes

    @property
    def outlives(self) -> bool:
        """Whether what is put in is there in the next process, too."""
        return self._store.outlives

    def pieces(self, namespace: str, token_ids: Ints, first_position: int) -> list[Piece]:
        """Those that a sequence is stored as, without their sizes."""
        root = parent = self._store.root(namespace)
        is_whole = not self._is_cut and (self._whole_only or first_position > 0)  # A window can't be cut.
        pieces: list[Piece] = []
        for start in range(0, len(token_ids), PIECE) if self._is_cut else [0]:
            part = token_ids[start : start + PIECE] if self._is_cut else token_ids
            pieces.append(Piece(root, parent, start, part.copy(), 0, is_whole, _FIRST.pack(first_position)))
            parent = pieces[-1].name
        return pieces

    def holds(self, piece: Piece) -> bool:
        """Whether a piece is there, or one that is good for all that it is good for."""
        return self._store.covers(piece)

    def put(self, piece: Piece, saved: Bytes, behind: Collection[Piece]) -> bool:
        """Add a piece in place of its own beginnings; False where it has no room beside those it is behind."""
        return self._store.put(replace(piece, num_bytes=saved.nbytes), saved, behind)

    def load(self, piece: Piece) -> Bytes | None:
        """The copy of a piece; None where it can't be had any more."""
        return self._store.read(piece)

    def use(self, pieces: Sequence[Piece]) -> None:
        """Have these go last."""
        self._store.use(pieces)

    def retire(self, namespace: str, token_ids: Ints) -> None:
        """Forget windows that a chat has moved on from, but for the latest of them."""
        self._store.retire(self._store.root(namespace), token_ids)

    def longest(self, wanted: Ints, namespace: str, found: int) -> tuple[list[Piece], int]:
        """The pieces with the longest usable beginning of `wanted` beyond `found` tokens, and that one's length.

        The last token of `wanted` is never among them.
        """

        def usable(piece: Piece, length: int) -> int:
            (first_position,) = _FIRST.unpack(piece.about)
            return self._usable(piece.token_ids, namespace, first_position, length)

        matches = self._store.longest(self._store.root(namespace), wanted[:-1], usable)
        length = sum(match.length for match in matches)
        return ([match.piece for match in matches], length) if length > found else ([], found)

    def source(self, wanted: Ints, namespace: str, num_least: int) -> list[Piece]:
        """The pieces of the text of which removals leave most of `wanted`, and no fewer of its first tokens."""
        return self._store.source(self._store.root(namespace), wanted, num_least)[0]

    def longest_common(self, wanted: Ints, namespace: str) -> int:
        """How many tokens the sequence that begins most like `wanted` has in common with it."""
        return sum(match.length for match in self._store.longest(self._store.root(namespace), wanted))

    def faults(self) -> Iterator[str]:
        """What contradicts itself, a line each."""
        return self._store.faults()
