"""Pages beside the cache: what is evicted, or is to outlive the process, as pieces of a store.

A piece is up to PIECE pages behind one another, with the pages of sliding-window layers where these were still there.
What isn't exact is stored apart, with all that stands before it, so that exact prompts don't find it.
"""

from collections.abc import Hashable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import takewhile
from typing import Protocol

import numpy as np

from tightrope.backends.errors import BackendError
from tightrope.backends.hf.cache.moving import COMPUTED_AGAIN, MIN_MOVED
from tightrope.backends.hf.cache.page_tree import Page, Root
from tightrope.backends.holdings import Holdings
from tightrope.backends.sessions.catalogue import Match
from tightrope.backends.sessions.piece import Bytes, Piece
from tightrope.backends.sessions.store import RunStore
from tightrope.kernels.forms.layout import PAGE

PIECE = 16  # Pages; a chat that goes on writes its last piece anew each time.
MIN_GAIN = 32  # To run fewer tokens again costs less than to bring them back.
AHEAD = 4  # Pieces that are read ahead of the one that is needed next.
WINDOW, INEXACT = 1, 2  # Bits of what is said about each page of a piece.


class PageMover(Protocol):
    """Copies pages to and from the host's memory. What waits to be copied within the cache is copied first."""

    def read_pages(self, numbers: Sequence[int], window_numbers: Sequence[int]) -> Bytes:
        """The bytes of pages in the layers that see everything, and of window pages in those that don't."""

    def write_pages(
        self, payload: Bytes, shape: tuple[int, int], pages: Sequence["Placed"], window_pages: Sequence["Placed"]
    ) -> None:
        """Store some of the pages that `read_pages` gave. shape: so many pages and window pages those were.

        Raises BackendError.
        """


Placed = tuple[int, int]  # The row among the pages that were read, and the number of a page to write.


@dataclass(frozen=True, slots=True)
class Found:
    """The beginning of a text in the store: `length` tokens of it."""

    matches: tuple[Match, ...]
    length: int

    @property
    def are_exact(self) -> bool:
        """Whether all of it is."""
        return not any(about & INEXACT for match in self.matches for about in match.piece.about)

    def up_to(self, place: int) -> "Found":
        """What is found up to the end of the piece that holds the page in this place."""
        matches = self.matches[: place // PIECE + 1]
        return Found(matches, sum(match.length for match in matches))

    def tokens(self, place: int) -> tuple[int, ...]:
        """Those of the page in this place, also behind the last that is wanted."""
        piece = self.matches[place // PIECE].piece
        start = place * PAGE - piece.start
        return tuple(piece.token_ids[start : start + PAGE].tolist())

    def has_window(self, place: int) -> bool:
        """Whether the page in this place was stored with its window page."""
        return bool(self._about(place) & WINDOW)

    def is_exact(self, place: int) -> bool:
        """Whether the page in this place was."""
        return not self._about(place) & INEXACT

    def _about(self, place: int) -> int:
        match = self.matches[place // PIECE] if place // PIECE < len(self.matches) else None
        return match.piece.about[place % PIECE] if match and place % PIECE < len(match.piece.about) else 0


def root_parts(key: Hashable) -> tuple[str, ...]:
    """What names a root of the tree: its namespace alone, which the front knows, unless a text's length tells more."""
    match key:
        case (str() as namespace, None):
            return (namespace,)
        case (str() as namespace, frequencies):
            return namespace, repr(frequencies)
    return (repr(key),)


class StoredPages:
    """A store as the books of a paged cache use it."""

    def __init__(self, store: RunStore, mover: PageMover) -> None:
        self._store, self._mover = store, mover

    @property
    def outlives(self) -> bool:
        """Whether what is stored is there in the next process, too."""
        return self._store.outlives

    def faults(self) -> Iterator[str]:
        """What contradicts itself, a line each."""
        return self._store.faults()

    def keep(self, key: Hashable, path: Sequence[Page]) -> None:
        """Store what isn't there of a path of pages below the root of this key, from its start as far as there is room.

        A piece is of no use without those before it.
        """
        exact = list(takewhile(lambda page: page.is_exact, path))
        self._keep(self._root(key), exact)
        if len(exact) < len(path):
            self._keep(self._root(key, are_exact=False), path)

    def report_to(self, holdings: Holdings) -> None:
        """See RunStore."""
        self._store.report_to(holdings)

    def _root(self, key: Hashable, *, are_exact: bool = True) -> bytes:
        return self._store.root(*root_parts(key), *(() if are_exact else ("moved",)))

    def _keep(self, root: bytes, path: Sequence[Page]) -> None:
        parent, pieces, num_new = root, list[Piece](), 0
        for start in range(0, len(path), PIECE):
            pages = path[start : start + PIECE]
            token_ids = np.fromiter((token for page in pages for token in page.tokens), np.int32)
            windows = [page.window_number for page in pages if page.window_number is not None]
            about = bytes(WINDOW * (page.window_number is not None) + INEXACT * (not page.is_exact) for page in pages)
            piece = Piece(root, parent, start * PAGE, token_ids, 0, about=about)
            if not self._store.covers(piece):
                try:
                    payload = self._mover.read_pages([page.number for page in pages], windows)
                except BackendError:  # It can be computed again.
                    break
                piece = replace(piece, num_bytes=payload.nbytes)
                if not self._store.put(piece, payload, behind=pieces):
                    break
                num_new += 1
            parent = piece.name
            pieces.append(piece)
        self._store.use(pieces)
        if num_new:
            self._store.retire(root, np.concatenate([piece.token_ids for piece in pieces]))

    def evicting(self, page: Page) -> None:
        """Store a page that is about to leave the cache, with those before it."""
        path: list[Page] = []
        place: Page | Root | None = page
        while isinstance(place, Page):
            path.append(place)
            place = place.parent
        if place is not None:
            self.keep(place.key, path[::-1])

    def find(self, key: Hashable, wanted: Sequence[int], *, are_exact: bool = True) -> Found:
        """The longest beginning of `wanted` in the store, among exact tokens or the others."""
        if not self._store.num_pieces:
            return Found((), 0)
        matches = self._store.longest(self._root(key, are_exact=are_exact), np.asarray(wanted, np.int32))
        self._store.use([match.piece for match in matches])
        return Found(tuple(matches), sum(match.length for match in matches))

    def find_source(self, key: Hashable, wanted: Sequence[int]) -> tuple[list[int], Found] | None:
        """The stored text of which removals leave most of `wanted` behind their common beginning, and its tokens.

        It may also be one whose beginning `wanted` is, and which isn't exact.
        """
        prompt, least = np.asarray(wanted, np.int32), self.find(key, wanted).length + MIN_MOVED
        found = self.find(key, wanted, are_exact=False)
        best, most = list[Piece](), least
        if found.length >= least:
            best, most = [match.piece for match in found.matches], found.length + COMPUTED_AGAIN
        for are_exact in (True, False):
            text, length = self._store.source(self._root(key, are_exact=are_exact), prompt, most + bool(best))
            if text:
                best, most = text, length
        if not best:
            return None
        self._store.use(best)
        matches = tuple(Match(piece, len(piece.token_ids)) for piece in best)
        return np.concatenate([piece.token_ids for piece in best]).tolist(), Found(matches, best[-1].stop)

    def fetch(self, found: Found, place: int) -> bool:
        """Have what is behind a place read ahead; whether it can be had at once, or not sooner by waiting."""
        return self._store.fetch([match.piece for match in found.matches[place // PIECE :][:AHEAD]])

    def restore(self, found: Found, pages: Mapping[int, int], windows: Mapping[int, int]) -> int:
        """Bring back pages and window pages: numbers to write, by their places.

        Returns how many tokens of what was found are there now, with those before them. Raises BackendError.
        """
        for match in found.matches:
            piece, first = match.piece, match.piece.start // PAGE
            window_rows = np.cumsum([0, *(about & WINDOW for about in piece.about)])
            rows = range(len(piece.about))
            placed = [(row, pages[first + row]) for row in rows if first + row in pages]
            in_window = [(int(window_rows[row]), windows[first + row]) for row in rows if first + row in windows]
            if not placed and not in_window:
                continue
            payload = self._store.read(piece)
            if payload is None:
                return piece.start
            self._mover.write_pages(payload, (len(piece.about), int(window_rows[-1])), placed, in_window)
        return found.length
