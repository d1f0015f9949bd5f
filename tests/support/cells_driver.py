"""A cache of llama.cpp's cells over a pretend store, used the way the engine does."""

from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np

from tightrope.backends.gguf.cache import SharedKVCache
from tightrope.backends.sessions.store import RunStore


@dataclass
class PretendStore:
    """Slots and the cells in them, as llama.cpp would hold them; a shared cell is the same object in several slots."""

    slots: dict[int, list[object]] = field(default_factory=dict)
    first: dict[int, int] = field(default_factory=dict)  # what sliding layers have left
    keeps_state: bool = False

    def copy_cells(self, source: int, target: int, num_tokens: int) -> None:
        assert not self.slots.get(target), "a copy goes into an empty slot"
        self.slots[target] = self.slots[source][:num_tokens]

    def remove_cells(self, slot: int, start: int) -> bool:
        cells = self.slots.setdefault(slot, [])
        if self.keeps_state and 0 < start < len(cells):
            return False
        del cells[start:]
        return True

    def first_position(self, slot: int) -> int:
        return self.first.get(slot, 0) if self.slots.get(slot) else -1

    def last_position(self, slot: int) -> int:
        return len(self.slots.get(slot, [])) - 1

    def saved_bytes(self, slot: int) -> int:
        return len(self.slots.get(slot, []))

    def save_cells(self, slot: int) -> np.ndarray:
        return np.zeros(self.saved_bytes(slot), np.uint8)

    def load_cells(self, slot: int, saved: np.ndarray) -> bool:
        assert not self.slots.get(slot), "a copy goes into an empty slot"
        self.append(slot, len(saved))
        return True

    def append(self, slot: int, count: int) -> None:
        self.slots.setdefault(slot, []).extend(object() for _ in range(count))

    def num_cells(self) -> int:
        return len({id(cell) for cells in self.slots.values() for cell in cells})


class Driver:
    """A cache with a pretend store, used the way the engine does."""

    def __init__(self, capacity: int = 64, slots: int = 4, swap_bytes: int = 0, **options: object) -> None:
        self.store = PretendStore(keeps_state=bool(options.get("whole_only")))
        self.cache = SharedKVCache(self.store, capacity, slots, **options)  # type: ignore[arg-type]
        self.cache.swap_to(RunStore(swap_bytes))

    def run(self, seq_id: int, token_ids: Sequence[int], namespace: str = "") -> int:
        """Open a sequence and run all its tokens; returns how many were cached."""
        found = self.cache.open(seq_id, token_ids, namespace).num_tokens
        assert self.extend(seq_id, token_ids[found:])
        return found

    def extend(self, seq_id: int, token_ids: Sequence[int]) -> bool:
        if not self.cache.reserve(seq_id, len(token_ids)):
            return False
        slot = self.cache.slot(seq_id)
        start = len(self.store.slots.get(slot, []))
        self.store.append(slot, len(token_ids))
        self.cache.commit(seq_id, start, token_ids)
        self.cache.check_integrity()
        return True
