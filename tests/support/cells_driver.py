"""A cache of llama.cpp's cells over a pretend store, used the way the engine does."""

from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np
from told_blocks import Told, blocks_of

from tightrope.backends.gguf import swap_space
from tightrope.backends.gguf.cache import SharedKVCache
from tightrope.backends.holdings import root_of
from tightrope.backends.reuse import Wanted
from tightrope.backends.sessions.store import RunStore


@dataclass
class PretendStore:
    """Slots and the cells in them, as llama.cpp would hold them; a shared cell is the same object in several slots.

    None stands where a slot has no cell, since its first one is of a later place.

    keeps_state: a slot has a state, which stands after one of its tokens. window: sliding layers need so many cells.
    """

    keeps_state: bool = False
    window: int = 0
    slots: dict[int, list[object | None]] = field(default_factory=dict)
    first: dict[int, int] = field(default_factory=dict)  # what sliding layers have left, or where the state stands
    loaded: int = 0  # So many checkpoints were read back.

    def copy_cells(self, source: int, target: int, num_tokens: int, start: int = 0) -> None:
        held = self.slots.setdefault(target, [])
        assert len(held) in (0, start), "a copy goes behind what a slot holds, or into an empty one"
        held += [None] * (start - len(held))
        held += self.slots[source][start:num_tokens]
        self.first[target] = self.first_position(source)

    def remove_cells(self, slot: int, start: int) -> bool:
        cells = self.slots.setdefault(slot, [])
        can_go_back = not (self.keeps_state and 0 < start <= self.first_position(slot))
        del cells[start:]
        if start == 0:
            self.first.pop(slot, None)
        return can_go_back

    def move_cells(self, slot: int, source: int, target: int) -> None:
        cells = self.slots[slot]
        others = {id(cell) for other, held in self.slots.items() if other != slot for cell in held}
        assert not others & {id(cell) for cell in cells[source:]}, "a cell that two slots share moves for both"
        del cells[target:source]

    def first_position(self, slot: int) -> int:
        return self.first.get(slot, 0) if self.slots.get(slot) else -1

    def last_position(self, slot: int) -> int:
        last = len(self.slots.get(slot, [])) - 1
        return min(last, self.first_position(slot)) if self.keeps_state else last

    def saved_bytes(self, slot: int) -> int:
        return sum(cell is not None for cell in self.slots.get(slot, []))

    def save_cells(self, slot: int) -> np.ndarray:
        """A byte for each cell, with the number of the piece."""
        start = len(self.slots.get(slot, [])) - self.saved_bytes(slot)
        return np.full(self.saved_bytes(slot), start // swap_space.PIECE, np.uint8)

    def load_cells(self, slot: int, saved: np.ndarray) -> bool:
        assert not self.slots.get(slot), "a copy goes into an empty slot"
        self.slots[slot] = [None] * (int(saved[0]) * swap_space.PIECE)
        self.append(slot, len(saved))
        if self.window:
            self.first[slot] = max(0, len(saved) - self.window)
        return True

    def state_bytes(self, slot: int) -> int:
        return 4

    def save_state(self, slot: int) -> np.ndarray:
        """The place after which it is the state."""
        return np.array([self.last_position(slot) + 1], np.int32).view(np.uint8)

    def load_state(self, slot: int, saved: np.ndarray) -> bool:
        place = int(saved.view(np.int32)[0])
        cells = self.slots[slot]
        assert place <= len(cells), "the cells of other layers are there"
        self.loaded += 1
        if self.keeps_state:
            self.first[slot] = place - 1
        else:
            self.first[slot] = max(0, place - self.window)
            cells[self.first[slot] : place] = [object() for _ in cells[self.first[slot] : place]]
        return True

    def append(self, slot: int, count: int) -> None:
        cells = self.slots.setdefault(slot, [])
        cells.extend(object() for _ in range(count))
        if self.keeps_state:
            self.first[slot] = len(cells) - 1

    def num_cells(self) -> int:
        return len({id(cell) for cells in self.slots.values() for cell in cells if cell is not None})


class Driver:
    """A cache with a pretend store, used the way the engine does."""

    def __init__(self, capacity: int = 64, slots: int = 4, swap_bytes: int = 0, **options: object) -> None:
        self.store = PretendStore(bool(options.get("whole_only")), int(str(options.get("swa_window", 0))))
        scratch = None if self.store.keeps_state or self.store.window else slots
        self.cache = SharedKVCache(self.store, capacity, slots, scratch=scratch, **options)  # type: ignore[arg-type]
        self.cache.swap_to(RunStore(swap_bytes))
        self.told = Told()
        self.cache.report_to(self.told.holdings)

    def run(self, seq_id: int, token_ids: Sequence[int], namespace: str = "", reuse: Wanted = "exact") -> int:
        """Open a sequence and run all its tokens; returns how many were cached."""
        found = self.cache.open(seq_id, token_ids, namespace, reuse=reuse).num_tokens
        assert self.extend(seq_id, token_ids[found:])
        return found

    def extend(self, seq_id: int, token_ids: Sequence[int]) -> bool:
        if not self.cache.reserve(seq_id, len(token_ids)):
            return False
        slot = self.cache.slot(seq_id)
        start = len(self.store.slots.get(slot, []))
        done = 0
        for place in self.cache.pauses(seq_id, start + len(token_ids)):
            self.store.append(slot, place - start - done)
            done = place - start
            self.cache.save_paused(seq_id, token_ids[:done])
        self.store.append(slot, len(token_ids) - done)
        self.cache.commit(seq_id, start, token_ids)
        self.cache.check_integrity()
        self.check_told()
        return True

    def check_told(self) -> None:
        """What was told are the whole blocks that sequences hold."""
        self.told.update()
        entries = (*self.cache._live.values(), *self.cache._kept)
        assert self.told.cached == blocks_of(
            (root_of(b"", entry.namespace), entry.tokens.tolist()) for entry in entries
        )
