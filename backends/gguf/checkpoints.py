"""States of finished parts of prompts, for models that can't go back by themselves.

A recurrent layer holds one state, after the last token; a sliding one may have lost what stood before its window. So
the state is copied where a later prompt is likely to part from this one, and read back there. The last ones of a
finished chat are put into the store as well, so that it can go back in the next process.
"""

from collections.abc import Collection
from dataclasses import dataclass

import numpy as np

from tightrope.backends.sessions.piece import Bytes, Ints, Piece
from tightrope.backends.sessions.store import RunStore

MIN_PLACE = 32  # To run so few tokens again costs less than a copy, and places so close together serve as one.
MOST_STORED = 2  # Those of one chat in the store: a swipe begins at the last, and an edited message before that.
TURN_ENDS = 2  # Many templates end the person's message as well: the end before that is where the message begins.


@dataclass(frozen=True, slots=True, eq=False)
class Checkpoint:
    """What recurrent layers hold and sliding ones look at after these tokens."""

    namespace: str
    token_ids: Ints  # [place]
    saved: Bytes

    @property
    def place(self) -> int:
        return len(self.token_ids)

    @property
    def num_bytes(self) -> int:
        return self.saved.nbytes + self.token_ids.nbytes


class Checkpoints:
    """Room for so many bytes of them; the least recently used go first."""

    def __init__(self, num_bytes: int) -> None:
        self.num_bytes = num_bytes
        self.runs = RunStore(0)
        self._held: list[Checkpoint] = []  # They stand least recently used first.

    def put(self, checkpoint: Checkpoint) -> None:
        """Add one, unless it alone is too large."""
        if checkpoint.num_bytes > self.num_bytes:
            return
        if (same := self.at(checkpoint.token_ids, checkpoint.namespace)) is not None:
            self._held.remove(same)
        self._held.append(checkpoint)
        while self._used > self.num_bytes:
            self._held.pop(0)

    def at(self, token_ids: Ints, namespace: str) -> Checkpoint | None:
        """The one after exactly these tokens."""
        longest = self.longest(token_ids, namespace)
        return longest if longest is not None and longest.place == len(token_ids) else None

    def longest(self, token_ids: Ints, namespace: str) -> Checkpoint | None:
        """The one after most of these tokens, counted from the first."""
        best: Checkpoint | None = None
        for held in self._held:
            place = held.place
            if held.namespace != namespace or place > len(token_ids) or (best is not None and place <= best.place):
                continue
            if held.token_ids[-1] == token_ids[place - 1] and np.array_equal(held.token_ids, token_ids[:place]):
                best = held
        return best

    def place(self, token_ids: Ints, namespace: str) -> int:
        """After how many of these tokens there is one at most, here or in the store."""
        longest = self.longest(token_ids, namespace)
        stored = self._stored(token_ids, namespace)
        return max(longest.place if longest is not None else 0, stored.stop if stored is not None else 0)

    def get(self, token_ids: Ints, namespace: str) -> Checkpoint | None:
        """The one after exactly these tokens, from the store if need be; it goes last now."""
        checkpoint = self.at(token_ids, namespace)
        if checkpoint is not None:
            self.use(checkpoint)
            return checkpoint
        stored = self._stored(token_ids, namespace)
        saved = self.runs.read(stored) if stored is not None and stored.stop == len(token_ids) else None
        if stored is None or saved is None:
            return None
        self.runs.use([stored])
        checkpoint = Checkpoint(namespace, stored.token_ids, saved)
        self.put(checkpoint)
        return checkpoint

    def keep(self, token_ids: Ints, namespace: str) -> None:
        """Have the last ones of a finished chat outlive the process, if anything does."""
        if not self.runs.outlives:
            return
        mine = [
            held
            for held in self._held
            if held.namespace == namespace and np.array_equal(held.token_ids, token_ids[: held.place])
        ]
        root = self._root(namespace)
        for held in sorted(mine, key=lambda held: held.place)[-MOST_STORED:]:
            self.runs.put(Piece(root, root, 0, held.token_ids, held.saved.nbytes, is_whole=True), held.saved)
        self.runs.retire_beginnings(root, token_ids, MOST_STORED)

    def _stored(self, token_ids: Ints, namespace: str) -> Piece | None:
        """The one in the store after most of these tokens."""

        def usable(piece: Piece, length: int) -> int:
            return length if length == len(piece.token_ids) else 0

        found = self.runs.longest(self._root(namespace), token_ids, usable) if self.runs.num_pieces else []
        return found[0].piece if found else None

    def _root(self, namespace: str) -> bytes:
        return self.runs.root(namespace, "state")

    def use(self, checkpoint: Checkpoint) -> None:
        """Let one go last, because it was of use."""
        self._held.remove(checkpoint)
        self._held.append(checkpoint)

    @property
    def _used(self) -> int:
        return sum(held.num_bytes for held in self._held)


def places_to_save(token_ids: Ints, found: int, parted: int, turn_ends: Collection[int], least: int) -> list[int]:
    """Where states of a prompt are saved of which the first `found` tokens are there; rising, from place `least` on.

    That is before its last token, which is where the same prompt begins the next time; where it parted from an earlier
    one; and after each of the last TURN_ENDS tokens that end a turn.
    """
    last = len(token_ids) - 1
    ends = np.flatnonzero(np.isin(token_ids[:last], list(turn_ends)))[-TURN_ENDS:] + 1
    places = [found]  # What a prompt begins with there is saved, or too short to be.
    for place in sorted({parted, *(end for end in ends.tolist() if end <= last - MIN_PLACE)}):
        if max(least, places[-1] + MIN_PLACE) <= place < last:
            places.append(place)
    return [*places[1:], last] if last > found and last >= least else []
