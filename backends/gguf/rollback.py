"""From which places sequences can be continued: some models can't drop a sequence's last tokens.

A recurrent layer holds one state, after the last token. A sliding one may have lost what stood before its window: the
cells of these tokens are given to others, and copies of sequences leave them out. Checkpoints lead back there.
"""

from collections.abc import Callable, Collection, Sequence

import numpy as np

from tightrope.backends.gguf.cell_store import CellStore
from tightrope.backends.gguf.cells import Ints
from tightrope.backends.gguf.checkpoints import MIN_PLACE, Checkpoint, Checkpoints, places_to_save
from tightrope.backends.gguf.entry import Entry
from tightrope.backends.sessions.store import RunStore


class Rollback:
    """The places of sequences in a store, and checkpoints in so many bytes beside it."""

    def __init__(
        self,
        store: CellStore,
        window: int,
        *,
        whole_only: bool,
        num_bytes: int,
        turn_ends: Callable[[], Collection[int]],
    ) -> None:
        """window, whole_only, turn_ends: see SharedKVCache."""
        self._store = store
        self._window, self._whole_only = window, whole_only
        self._checkpoints = Checkpoints(num_bytes)
        self._turn_ends = turn_ends
        self.saves = bool(num_bytes and (window or whole_only))

    def reaches(self, slot: int, length: int) -> bool:
        """Whether a slot holds all that a token at place `length` looks at."""
        if length == 0 or not (self._whole_only or self._window):
            return True
        first = self._store.first_position(slot)
        return first == length - 1 if self._whole_only else first <= max(0, length - self._window)

    def usable(self, entry: Entry, common: int) -> int:
        """After how many of its first `common` tokens an entry can be continued at most."""
        return common if self.reaches(entry.slot, common) else self._place(entry.tokens[:common], entry.namespace)

    def usable_copy(self, token_ids: Ints, namespace: str, first: int, common: int) -> int:
        """The same of a copy of a whole sequence, which sliding layers left at position `first`."""
        is_held = common == len(token_ids) if self._whole_only else first <= max(0, common - self._window)
        return (
            common if is_held or not (self._whole_only or self._window) else self._place(token_ids[:common], namespace)
        )

    def first_in_copy(self, entry: Entry) -> int:
        """Where sliding layers will be left in a copy of an entry: it holds no more than their window."""
        first = self._store.first_position(entry.slot)
        return max(first, entry.length - self._window) if self._window else first

    def go_back(self, slot: int, token_ids: Ints, namespace: str) -> bool:
        """Let a slot that begins with these tokens hold them alone; False if that fails, and it may then be spoilt."""
        if not self.reaches(slot, len(token_ids)):
            checkpoint = self._checkpoints.get(token_ids, namespace)
            if checkpoint is None or not self._store.load_state(slot, checkpoint.saved):
                return False
        return self._store.remove_cells(slot, len(token_ids))

    def store_in(self, runs: RunStore) -> None:
        """Have checkpoints of finished sequences outlive the process, if what is in `runs` does."""
        self._checkpoints.runs = runs

    def keep(self, entry: Entry) -> None:
        """Put the last checkpoints of a finished sequence there."""
        if self.saves:
            self._checkpoints.keep(entry.tokens, entry.namespace)

    # --- saving -------------------------------------------------------------------------------------------------

    def begin(self, entry: Entry, prompt: Ints, parted: int) -> None:
        """Decide where checkpoints are made of an entry that holds the beginning of a prompt; the first is made now.

        parted: so many of the prompt's tokens are the beginning of another sequence, too.
        """
        if not self.saves:
            return
        entry.to_save = places_to_save(prompt, entry.length, parted, self._turn_ends(), self._least)
        self._save(entry, entry.length, None)

    def pauses(self, entry: Entry, stop: int) -> list[int]:
        """The places up to `stop` at which a step has to pause for the states of recurrent layers."""
        return [place for place in entry.to_save if place <= stop] if self._whole_only else []

    def save_paused(self, entry: Entry, more: Sequence[int]) -> None:
        """Make the next checkpoint of an entry, after `more` tokens, which have run and are not committed yet."""
        entry.to_save.pop(0)
        self._put(entry.slot, entry.namespace, np.append(entry.tokens, np.asarray(more, np.int32)))

    def save_passed(self, entry: Entry, scratch: int | None) -> None:
        """Make the checkpoints of sliding layers that an entry has reached; scratch: an empty slot, if there is one."""
        while entry.to_save and entry.to_save[0] <= entry.length:
            self._save(entry, entry.to_save.pop(0), scratch)

    def _save(self, entry: Entry, place: int, scratch: int | None) -> None:
        """Make a checkpoint, unless it is there; one before the entry's end takes a slot to put the tokens up to it."""
        token_ids = entry.tokens[:place]
        if (
            place < self._least
            or self._checkpoints.at(token_ids, entry.namespace)
            or not self.reaches(entry.slot, place)
        ):
            return
        if place == entry.length:
            self._put(entry.slot, entry.namespace, token_ids.copy())
        elif scratch is not None:
            self._store.copy_cells(entry.slot, scratch, place)
            self._put(scratch, entry.namespace, token_ids.copy())
            self._store.remove_cells(scratch, 0)

    def _put(self, slot: int, namespace: str, token_ids: Ints) -> None:
        if self._store.state_bytes(slot) <= self._checkpoints.num_bytes:
            self._checkpoints.put(Checkpoint(namespace, token_ids, self._store.save_state(slot)))

    @property
    def _least(self) -> int:
        """Before this place there is nothing to win; sliding layers lose nothing before their window is full."""
        return MIN_PLACE if self._whole_only else max(MIN_PLACE, self._window + 1)

    def _place(self, token_ids: Ints, namespace: str) -> int:
        return self._checkpoints.place(token_ids, namespace)
