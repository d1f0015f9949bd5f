"""What contradicts itself in the books of llama.cpp's cache."""

from collections.abc import Iterator, Sequence

from tightrope.backends.gguf.cell_store import CellStore
from tightrope.backends.gguf.cells import Cells
from tightrope.backends.gguf.entry import Entry


def faults(
    store: CellStore,
    cells: Cells,
    live: Sequence[Entry],
    kept: Sequence[Entry],
    num_reserved: int,
    free_slots: Sequence[int],
    num_slots: int,
) -> Iterator[str]:
    """What contradicts itself, or llama.cpp's own view, a line each; num_reserved: as it is counted."""
    reserved = sum(entry.reserved for entry in live)
    yield from cells.faults([entry.held() for entry in live], [entry.held() for entry in kept])
    if reserved != num_reserved or reserved > cells.num_free:
        yield f"{reserved} tokens have room, {num_reserved} are counted, {cells.num_free} cells are free"
    lengths = [*((entry.slot, entry.length) for entry in (*live, *kept)), *((slot, 0) for slot in free_slots)]
    if sorted(slot for slot, _ in lengths) != list(range(num_slots)):
        yield "a slot is lost, or in use twice"
    for slot, length in lengths:
        if (last := store.last_position(slot)) != length - 1:
            yield f"slot {slot} should hold {length} tokens, and its last position is {last}"
