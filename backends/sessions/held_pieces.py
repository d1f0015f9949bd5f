"""Telling others which pieces a store has: see backends/holdings.py."""

from collections.abc import Callable, Iterable

from tightrope.backends.holdings import BLOCK, Holdings, chain
from tightrope.backends.sessions.piece import Piece


class HeldPieces:
    """Tells of pieces to which all that stands before them is there."""

    def __init__(self, holdings: Holdings, below: Callable[[bytes], Iterable[Piece]]) -> None:
        """below: the pieces that there are behind the one of this name."""
        self._holdings, self._below = holdings, below
        self._told: dict[bytes, list[bytes]] = {}  # By name.

    def added(self, piece: Piece) -> None:
        """Tell of a piece that is there now, and of those behind it that were there before it."""
        waiting = [piece]
        while waiting:
            new = waiting.pop()
            before = self._before(new)
            if before is None or new.name in self._told:
                continue
            blocks = list(chain(before, new.token_ids.tolist()))
            self._told[new.name] = blocks
            self._holdings.add("stored", blocks, new.start // BLOCK)
            waiting += self._below(new.name)

    def removed(self, piece: Piece) -> None:
        """Tell that a piece is gone, without which those behind it are of no use."""
        waiting = [piece]
        while waiting:
            old = waiting.pop()
            if old.name in self._told:
                self._holdings.remove("stored", self._told.pop(old.name))
                waiting += self._below(old.name)

    def _before(self, piece: Piece) -> bytes | None:
        """The hash of the block before a piece; None where that isn't told."""
        if piece.parent == piece.root:
            return piece.root
        told = self._told.get(piece.parent)
        return told[-1] if told and piece.start % BLOCK == 0 else None
