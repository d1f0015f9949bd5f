"""Finished sequences outside the cache: copies of their cells in the store, until they are continued or too many.

Where every layer sees everything, a copy is pieces of PIECE tokens, so that of a chat that goes on its last piece is
copied anew and no more. States and windows of layers can't be cut, and then a sequence is one piece.
"""

import struct
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, replace

import numpy as np

from tightrope.backends.gguf.cell_store import CellStore
from tightrope.backends.gguf.entry import Entry, num_exact_of
from tightrope.backends.holdings import Holdings
from tightrope.backends.sessions.piece import Bytes, Ints, Piece
from tightrope.backends.sessions.store import RunStore

PIECE = 256  # Tokens.
MOST_STORED = 2  # Whole copies from which a chat has gone on.
AHEAD = 4  # Pieces that are read ahead of the one that is needed next.

# Of how many of so many first tokens of a copy, given with its tokens, namespace and first position, one can go on.
Usable = Callable[[Ints, str, int, int], int]
# Of a sequence up to the piece's end: the first position that sliding layers have not left, and how many tokens are
# exact, and steady.
ABOUT = struct.Struct("<qqq")


@dataclass(slots=True)
class Swapped:
    """A sequence outside the cache that is to be brought back, piece by piece, by so many attempts at most."""

    pieces: Sequence[Piece]
    namespace: str
    num_left: int = field(init=False)

    def __post_init__(self) -> None:
        self.num_left = 2 * len(self.pieces)  # Others may need the room meanwhile.

    def rest(self, entry: Entry) -> Sequence[Piece] | None:
        """What an entry lacks that holds the first of the pieces alone; None where it is another one."""
        number = next((i for i, piece in enumerate(self.pieces, 1) if piece.stop == entry.length), None)
        if number is None or entry.namespace != self.namespace:
            return None
        if entry.num_exact != min(ABOUT.unpack(piece.about)[1] for piece in self.pieces[:number]):
            return None
        held = all(
            np.array_equal(entry.tokens[piece.start : piece.stop], piece.token_ids) for piece in self.pieces[:number]
        )
        return self.pieces[number:] if held else None


class SwapSpace:
    """Sequences as pieces of a RunStore, one behind another."""

    def __init__(
        self, store: RunStore, cells: CellStore, usable: Usable, *, scratch: int | None, whole_only: bool
    ) -> None:
        """scratch: an empty slot, through which pieces are copied; without it sequences aren't cut.

        whole_only: see SharedKVCache.
        """
        self._store, self._cells = store, cells
        self._usable, self._scratch, self._whole_only = usable, scratch, whole_only

    def root(self, namespace: str) -> bytes:
        """The name under which texts of this namespace begin."""
        return self._store.root(namespace)

    def report_to(self, holdings: Holdings) -> None:
        """See RunStore."""
        self._store.report_to(holdings)

    @property
    def outlives(self) -> bool:
        """Whether what is put in is there in the next process, too."""
        return self._store.outlives

    def save(self, namespace: str, entry: Entry, first_position: int, *, may_copy: bool = True) -> bool:
        """Have a copy of what an entry holds, in place of its own beginnings.

        False if there is no room for it, or for its end, or if there is none and it may not be copied now.
        """
        pieces = self._pieces(namespace, entry, first_position)
        missing = [number for number, piece in enumerate(pieces) if not self._has(piece)]
        for number in missing:
            piece = pieces[number]
            saved = self._copy(entry.slot, piece) if may_copy else None
            if saved is None:
                return False
            if not self._store.put(replace(piece, num_bytes=saved.nbytes), saved, pieces[:number]):
                return False
        self._store.use(pieces)
        if missing:
            self._store.retire(self.root(namespace), entry.tokens)
            self._store.retire_beginnings(self.root(namespace), entry.tokens, MOST_STORED)
        return True

    def load(self, entry: Entry, piece: Piece, take: Callable[[int], Ints]) -> bool:
        """Put a piece behind what an entry holds; False where it can't be had any more, or there is no room for it.

        take: logical cells for so many tokens.
        """
        if not self._load(entry.slot, piece):
            return False
        entry.append(piece.token_ids, take(len(piece.token_ids)))
        _, num_exact, num_steady = ABOUT.unpack(piece.about)
        entry.num_exact = min(entry.num_exact, num_exact)
        if entry.num_steady == piece.start:
            entry.num_steady = max(piece.start, num_steady)
        return True

    def _has(self, piece: Piece) -> bool:
        """Whether a piece need not be put in. One of the same tokens that has fewer steady ones goes."""
        stored = self._store.covering(piece)
        if stored is None or stored.name != piece.name or ABOUT.unpack(stored.about)[2] >= ABOUT.unpack(piece.about)[2]:
            return stored is not None
        self._store.forget(stored)
        return False

    def _load(self, slot: int, piece: Piece) -> bool:
        saved = self._store.read(piece)
        if saved is None:
            return False
        if self._scratch is None:
            return self._cells.load_cells(slot, saved)
        is_there = self._cells.load_cells(self._scratch, saved)
        if is_there:
            self._cells.copy_cells(self._scratch, slot, piece.stop, piece.start)
        self._cells.remove_cells(self._scratch, 0)
        return is_there

    def fetch(self, pieces: Sequence[Piece]) -> bool:
        """Have pieces read ahead; whether the first of them can be had at once, or not sooner by waiting."""
        return self._store.fetch(pieces[:AHEAD])

    def use(self, pieces: Sequence[Piece]) -> None:
        """Have these go last."""
        self._store.use(pieces)

    def longest(self, wanted: Ints, namespace: str, num_least: int) -> list[Piece]:
        """The pieces with the longest usable beginning of `wanted`, if that has so many tokens.

        The last token of `wanted` is never among them.
        """

        def usable(piece: Piece, length: int) -> int:
            first_position = ABOUT.unpack(piece.about)[0]
            return self._usable(piece.token_ids, namespace, first_position, length)

        matches = self._store.longest(self.root(namespace), wanted[:-1], usable)
        return [match.piece for match in matches] if sum(match.length for match in matches) >= num_least else []

    def source(self, wanted: Ints, namespace: str, num_least: int) -> list[Piece]:
        """The pieces of the text of which removals leave most of `wanted`, and no fewer of its first tokens."""
        return self._store.source(self.root(namespace), wanted, num_least)[0]

    def longest_common(self, wanted: Ints, namespace: str) -> int:
        """How many tokens the sequence that begins most like `wanted` has in common with it."""
        return sum(match.length for match in self._store.longest(self.root(namespace), wanted))

    def faults(self) -> Iterator[str]:
        """What contradicts itself, a line each."""
        return self._store.faults()

    def _pieces(self, namespace: str, entry: Entry, first_position: int) -> list[Piece]:
        """Those that an entry is stored as, without their sizes."""
        root = parent = self.root(namespace)
        is_cut = self._scratch is not None
        is_whole = not is_cut and (self._whole_only or first_position > 0)  # A window can't be cut.
        size = PIECE if is_cut else max(1, entry.length)
        pieces: list[Piece] = []
        for start in range(0, entry.length, size):
            part = entry.tokens[start : start + size].copy()
            stop = start + len(part)
            about = ABOUT.pack(first_position, num_exact_of(entry, stop), min(entry.num_steady, stop))
            pieces.append(Piece(root, parent, start, part, 0, is_whole, about))
            parent = pieces[-1].name
        return pieces

    def _copy(self, slot: int, piece: Piece) -> Bytes | None:
        """The cells of a part of what a slot holds; None where they are more than can be put in."""
        source = slot if self._scratch is None else self._scratch
        if source != slot:
            self._cells.copy_cells(slot, source, piece.stop, piece.start)
        is_small = self._cells.saved_bytes(source) <= self._store.host_bytes
        saved = self._cells.save_cells(source) if is_small else None
        if source != slot:
            self._cells.remove_cells(source, 0)
        return saved
