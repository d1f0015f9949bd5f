"""States of finished parts of prompts, for models that can't go back by themselves.

A recurrent layer holds one state, after the last token; a sliding one may have lost what stood before its window. So
the state is copied where a later prompt is likely to part from this one, and read back there.
"""

from collections.abc import Collection
from dataclasses import dataclass

import numpy as np

from tightrope.backends.sessions.piece import Bytes, Ints

MIN_PLACE = 32  # To run so few tokens again costs less than a copy, and places so close together serve as one.
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
