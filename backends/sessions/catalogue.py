"""Which pieces there are, as a tree: a piece hangs below the one that ends where it begins."""

from collections.abc import Callable, Iterator
from dataclasses import dataclass

from tightrope.backends.holdings import Holdings
from tightrope.backends.sessions.held_pieces import HeldPieces
from tightrope.backends.sessions.piece import Ints, Piece, num_common

Usable = Callable[[Piece, int], int]  # Of so many first tokens of a piece, those behind which a model can go on.

MOST_SEARCHED = 1 << 18  # Tokens of all texts that are looked at.


@dataclass(frozen=True, slots=True)
class Match:
    """The first `length` tokens of a piece are those wanted, in their place."""

    piece: Piece
    length: int


class Catalogue:
    """Pieces by name, and by what stands before them."""

    def __init__(self) -> None:
        self._pieces: dict[bytes, Piece] = {}
        self._below: dict[bytes, dict[bytes, Piece]] = {}  # By the parent's name, and then by their own.
        self._held: HeldPieces | None = None

    def __contains__(self, name: bytes) -> bool:
        return name in self._pieces

    def __len__(self) -> int:
        return len(self._pieces)

    def get(self, name: bytes) -> Piece | None:
        return self._pieces.get(name)

    def add(self, piece: Piece) -> None:
        self._pieces[piece.name] = piece
        self._below.setdefault(piece.parent, {})[piece.name] = piece
        if self._held is not None:
            self._held.added(piece)

    def remove(self, name: bytes) -> None:
        """Forget a piece. Those below it can be found again once it has come back."""
        piece = self._pieces.pop(name, None)
        if piece is None:
            return
        siblings = self._below[piece.parent]
        del siblings[name]
        if not siblings:
            del self._below[piece.parent]
        if self._held is not None:
            self._held.removed(piece)

    def report_to(self, holdings: Holdings) -> None:
        """Tell from now on what is here."""
        self._held = HeldPieces(holdings, self.below)
        for piece in self._pieces.values():
            self._held.added(piece)

    def below(self, name: bytes) -> list[Piece]:
        """Those that begin where this one ends."""
        return list(self._below.get(name, {}).values())

    def roots(self, root: bytes) -> list[Piece]:
        """Those with which texts begin."""
        return self.below(root)

    def goes_on(self, piece: Piece) -> bool:
        """Whether there is a piece behind this one."""
        return piece.name in self._below

    def covering(self, piece: Piece) -> Piece | None:
        """One that is good for all that this one is good for."""
        if piece.name in self._pieces:
            return self._pieces[piece.name]
        return next((other for other in self._below.get(piece.parent, {}).values() if piece.begins(other)), None)

    def beginnings_of(self, piece: Piece) -> list[Piece]:
        """Those that this one makes needless."""
        siblings = self._below.get(piece.parent, {}).values()
        return [other for other in siblings if other is not piece and other.begins(piece)]

    def texts(self, root: bytes, wanted: Ints, num_common_least: int) -> Iterator[list[Piece]]:
        """All texts to their ends, as pieces, that begin with as many tokens of `wanted` at least; newer ones first."""
        num_left = MOST_SEARCHED
        waiting = [
            [piece]
            for piece in self._below.get(root, {}).values()
            if piece.root == root and num_common(piece.token_ids, wanted) >= num_common_least
        ]
        while waiting and num_left > 0:
            path = waiting.pop()
            longer = [[*path, piece] for piece in self._below.get(path[-1].name, {}).values()]
            waiting += longer
            if not longer:
                num_left -= path[-1].stop
                yield path

    def longest(self, root: bytes, wanted: Ints, usable: Usable = lambda piece, length: length) -> list[Match]:
        """The pieces that hold most of `wanted` [n], one behind another; `usable` says how much of each is of use."""
        path: list[Match] = []
        place, parent = 0, root
        while place < len(wanted):
            best: Match | None = None
            for piece in self._below.get(parent, {}).values():
                if piece.root == root and piece.start == place:
                    length = usable(piece, num_common(piece.token_ids, wanted[place:]))
                    if length > (best.length if best else 0):
                        best = Match(piece, length)
            if best is None:
                break
            path.append(best)
            if best.length < len(best.piece.token_ids):
                break
            place, parent = best.piece.stop, best.piece.name
        return path
