"""What stands behind a removed message, moved to where a prompt has it now."""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace

import numpy as np

from tightrope.backends.gguf.cell_store import CellStore
from tightrope.backends.gguf.cells import Cells, Ints
from tightrope.backends.gguf.entry import Entry
from tightrope.backends.removals import kept_runs
from tightrope.backends.reuse import Reuse, Run

MIN_KEPT = 16  # So many tokens stay in front: without them, what all others look at would be another token.
MIN_MOVED = 64  # To compute fewer takes about as long as to find and shift them.


@dataclass(frozen=True, slots=True)
class Move:
    """Runs of a prompt that stand in an entry, one behind the other; the first of them stays where it is."""

    entry: Entry
    runs: tuple[Run, ...]

    @property
    def num_kept(self) -> int:
        return self.runs[0].stop

    @property
    def length(self) -> int:
        return Reuse(self.runs).stop

    def before(self, place: int) -> "Move":
        """What of it comes before a place of the prompt."""
        return Move(self.entry, Reuse(self.runs).before(place).runs)


def best_move(entries: Iterable[Entry], wanted: Ints, found: int) -> Move | None:
    """The most that removals from one of the entries leave of a prompt, if that is MIN_MOVED more than `found`.

    The last token of `wanted` is never among them.
    """
    best: Move | None = None
    for entry in entries:
        runs = tuple(kept_runs(entry.tokens, wanted[:-1]))
        if len(runs) < 2 or not runs[0].is_exact or runs[0].length < MIN_KEPT:
            continue
        if runs[-1].stop >= (best.length + 1 if best is not None else found + MIN_MOVED):
            best = Move(entry, runs)
    return best


def splice(store: CellStore, cells: Cells, move: Move) -> None:
    """Let the entry of a move, which isn't live and shares nothing behind what stays, hold its runs alone."""
    entry, shifted = move.entry, 0
    for run in move.runs[1:]:
        store.move_cells(entry.slot, run.source - shifted, run.start)
        shifted = run.source - run.start
    store.remove_cells(entry.slot, move.length)
    places = np.concatenate([np.arange(run.source, run.source + run.length) for run in move.runs])
    token_ids, kept = entry.token_ids[places], entry.cells[places]
    cells.release(np.delete(entry.held(), places))
    entry.token_ids[: move.length], entry.cells[: move.length] = token_ids, kept
    entry.length, entry.num_exact = move.length, min(entry.num_exact, move.num_kept)
    entry.num_steady, entry.is_in_order = min(entry.num_steady, move.num_kept), False


def told(runs: Sequence[Run], num_exact: int) -> Reuse:
    """Runs as a cache tells of them, of which only the first `num_exact` tokens are exact."""
    parts: list[Run] = []
    for run in runs:
        exact = min(run.length, max(0, num_exact - run.start)) if run.is_exact else 0
        if exact:
            parts.append(replace(run, length=exact))
        if exact < run.length:
            parts.append(Run(run.source + exact, run.start + exact, run.length - exact, is_exact=False))
    return Reuse(tuple(parts))
