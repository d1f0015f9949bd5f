"""The sequences in llama.cpp's cache: their slots and cells, how finished ones are swapped out, and come back.

Every cell in use makes ggml's attention slower for everybody, masked or not: with 8,000 cells of finished chats a
decode step of eight streams took 50 ms instead of 34. So while others run, finished sequences are swapped out: copied
to memory beside the cache (swap_space.py), and back when a prompt continues them.
"""

from collections import deque
from collections.abc import Callable, Collection, Iterator, Sequence
from functools import partial

from tightrope.backends.errors import BackendError
from tightrope.backends.gguf.cell_store import CellStore
from tightrope.backends.gguf.cells import Cells, Ints
from tightrope.backends.gguf.entry import ALL, Entry, num_exact_of
from tightrope.backends.gguf.held_entries import HeldEntries
from tightrope.backends.gguf.moves import MIN_MOVED, best_move
from tightrope.backends.gguf.rollback import Rollback
from tightrope.backends.gguf.swap_space import Swapped, SwapSpace
from tightrope.backends.reuse import Wanted
from tightrope.backends.sessions.piece import Piece, num_common
from tightrope.backends.sessions.store import RunStore

MAX_IDLE_CELLS = 512  # Cells of so many finished sequences may stay in the cache while others run.
MIN_RESTORE_GAIN = 32  # To run fewer tokens again costs less than the copy.

INEXACT = "\0moved"  # Added to the namespace of copies that hold moved tokens, so that exact prompts don't find them.


class EntryPool:
    """Live and finished sequences in so many slots and cells."""

    def __init__(
        self,
        store: CellStore,
        capacity: int,
        num_slots: int,
        *,
        max_reusable: int | None = None,
        swa_window: int = 0,
        whole_only: bool = False,
        checkpoint_bytes: int = 0,
        turn_ends: Callable[[], Collection[int]] = tuple,
        can_move: bool = False,
        scratch: int | None = None,
        steady_tokens: int = 0,
    ) -> None:
        """capacity and max_reusable in tokens; max_reusable bounds what finished sequences may hold.

        swa_window: tokens that sliding layers look back, 0 if there are none. whole_only: the model keeps a running
        state, so that a kept sequence can be continued from its end and from checkpoints only. checkpoint_bytes: memory
        for these, of either kind of layers. turn_ends: tokens that end a person's or the model's turn. can_move: keys
        can be rotated to other positions. scratch: a slot that no sequence has, through which parts of sequences are
        copied; without it, or where layers have windows or states, they are copied whole. steady_tokens: see
        Capabilities.
        """
        self._store = store
        self._cells = Cells(capacity)
        self._rollback = Rollback(
            store, swa_window, whole_only=whole_only, num_bytes=checkpoint_bytes, turn_ends=turn_ends
        )
        self._scratch = None if whole_only or swa_window else scratch
        self._whole_only = whole_only
        self._swap = self._swap_space(RunStore(0))
        self._max_reusable = capacity if max_reusable is None else max_reusable
        self._swa_window = swa_window
        self._can_move = can_move
        self._steady_tokens = steady_tokens
        self._is_moving = False  # Keys are yet to be rotated to where they stand, which the next step does.
        self._num_slots = num_slots
        self._free_slots = list(range(num_slots - 1, -1, -1))
        self._fetched: dict[int, deque[Swapped]] = {}  # By sequence, what is to be brought back; those asked for last.
        self._live: dict[int, Entry] = {}
        self._kept: list[Entry] = []  # They stand least recently used first.
        self._reserved = 0  # It is the sum over the live.
        self._held: HeldEntries | None = None  # Somebody wants to know which tokens can be found.

    def _best_match(self, wanted: Ints, namespace: str, reuse: Wanted) -> tuple[Entry | None, int]:
        """The sequence with the longest usable common prefix, the most recent among equals, and the prefix's length."""
        best: Entry | None = None
        longest = 0
        for entry in (*self._live.values(), *self._kept):
            if entry.namespace != namespace or min(entry.length, len(wanted) - 1) < max(longest, 1):
                continue
            tokens = entry.tokens if reuse == "moved" else entry.tokens[: entry.num_exact]
            common = self._rollback.usable(entry, num_common(tokens, wanted[:-1]))
            if common and common >= longest:
                best, longest = entry, common
        return best, longest

    def _steady_match(self, wanted: Ints, namespace: str) -> tuple[Entry | None, int]:
        """The kept sequence with most steady tokens of a prompt, and how many, where enough of it is left to run."""
        beginning = wanted[: max(0, len(wanted) - self._steady_tokens)]
        best: Entry | None = None
        longest = 0
        for entry in self._kept:
            if entry.namespace == namespace:
                common = num_common(entry.tokens[: min(entry.num_exact, entry.num_steady)], beginning)
                if (usable := self._rollback.usable(entry, common)) > longest:
                    best, longest = entry, usable
        return best, longest

    # --- cells and slots ----------------------------------------------------------------------------------------

    def _shorten(self, entry: Entry, length: int, *, pinned: bool) -> bool:
        """Keep the first `length` tokens; False if that can't be, and then those are left after which it can go on."""
        kept = self._rollback.usable(entry, length)
        is_held = True
        if self._swa_window and not self._rollback.reaches(entry.slot, kept):
            window = entry.cells[max(0, kept - self._swa_window) : kept]  # A checkpoint brings it back in other cells.
            is_held = self._cells.own(window, self._cells.num_free - self._reserved, pinned=pinned)
        if not (is_held and self._rollback.go_back(entry.slot, entry.tokens[:kept], entry.namespace)):
            self._store.remove_cells(entry.slot, 0)
            kept = 0
        dropped = entry.held(kept)
        if pinned:
            self._cells.unpin(dropped)
        self._cells.release(dropped)
        entry.length, entry.num_exact = kept, num_exact_of(entry, kept)
        entry.num_steady = min(entry.num_steady, kept)
        self._see(entry)
        return kept == length

    def _see(self, entry: Entry, *, is_gone: bool = False) -> None:
        """Tell what has become of an entry, to whom it matters."""
        if self._held is not None:
            self._held.see(entry, is_gone=is_gone)

    def _drop(self, entry: Entry) -> None:
        self._see(entry, is_gone=True)
        self._cells.release(entry.held())
        self._store.remove_cells(entry.slot, 0)
        self._free_slots.append(entry.slot)

    def _evict(self, num_cells: int) -> None:
        """Free `num_cells` cells of kept sequences, least recently used first and each from its end."""
        goal = self._cells.num_free + num_cells
        while self._cells.num_free < goal and self._kept:
            entry = self._kept[0]
            if self._swap_out(entry):
                continue
            alone = self._cells.alone(entry.held())
            missing = goal - self._cells.num_free
            if self._whole_only or len(alone) <= missing or alone[-missing] == 0:
                self._drop(self._kept.pop(0))
            else:
                self._shorten(entry, int(alone[-missing]), pinned=False)

    def _takes_in_order(self, entry: Entry) -> bool:
        """Whether its cells are llama.cpp's first ones in order, with those that it takes next: the first free ones."""
        return entry.is_in_order and self._cells.num_free + entry.length == self._cells.capacity

    def _stands_as_alone(self, wanted: Ints, namespace: str) -> bool:
        """Whether the cache holds a beginning of a prompt and nothing else, where it would be in an empty cache."""
        if len(self._kept) != 1 or self._scratch is None:  # Of windows and states there is more than the cells.
            return False
        [entry] = self._kept
        is_beginning = entry.namespace == namespace and num_common(entry.tokens, wanted[:-1]) == entry.length
        return is_beginning and entry.num_exact == ALL and self._takes_in_order(entry)

    # --- swapping ------------------------------------------------------------------------------------------------

    def _swap_out_idle(self, most: int | None = None) -> None:
        """Leave no more than MAX_IDLE_CELLS, or `most`, to finished sequences, as far as there is memory to swap to."""
        most = MAX_IDLE_CELLS if most is None else most
        for entry in list(self._kept):
            if self._cells.num_reusable <= most:
                return
            self._swap_out(entry)

    def _swap_out(self, entry: Entry) -> bool:
        """Move a kept sequence out of the cache; False if it can't be."""
        if not self._save(entry):
            return False
        self._kept.remove(entry)
        self._drop(entry)
        return True

    def _save(self, entry: Entry) -> bool:
        """Have a copy of a sequence outside the cache; False if there is no room for it, or for its end."""
        namespace = entry.namespace if entry.num_exact == ALL else entry.namespace + INEXACT
        first = self._rollback.first_in_copy(entry)
        return self._swap.save(namespace, entry, first, may_copy=not self._is_moving)

    def _swapped_match(
        self, wanted: Ints, namespace: str, reuse: Wanted, source: Entry | None, found: int
    ) -> tuple[Entry | None, int]:
        """The best match, if need be of a swapped-out sequence, of which a copy is brought back for it."""
        for swapped in self._swapped(wanted, namespace, reuse):
            while self._swap_in(swapped):
                pass
            source, found = self._best_match(wanted, namespace, reuse)  # The one before may have made room.
        return source, found

    def _swapped(self, wanted: Ints, namespace: str, reuse: Wanted) -> Iterator[Swapped]:
        """What is worth being brought back for a prompt, each beside what is here once those before it are."""
        marks = ("", INEXACT) if reuse == "moved" else ("",)
        for mark in marks:
            _, found = self._best_match(wanted, namespace, reuse)
            if pieces := self._swap.longest(wanted, namespace + mark, found + MIN_RESTORE_GAIN):
                yield Swapped(pieces, namespace)
        for mark in marks if reuse == "moved" and self._can_move else ():
            _, found = self._best_match(wanted, namespace, reuse)
            kept = (entry for entry in (*self._kept, *self._live.values()) if entry.namespace == namespace)
            here = best_move(kept, wanted, found)
            least = (found if here is None else here.length) + MIN_MOVED
            if pieces := self._swap.source(wanted[:-1], namespace + mark, least):
                yield Swapped(pieces, namespace)

    def _brought(self, swapped: Swapped) -> tuple[Entry | None, Sequence[Piece]]:
        """The kept entry that holds the first pieces of a swapped-out sequence, if there is one, and the others."""
        for entry in self._kept:
            if (rest := swapped.rest(entry)) is not None:
                return entry, rest
        return None, swapped.pieces

    def _swap_in(self, swapped: Swapped) -> bool:
        """Bring the next piece of a swapped-out sequence back, whose entry is the most recent kept one then.

        False where there is none, or it can't be had, or has no room now.
        """
        entry, rest = self._brought(swapped)
        if not rest or not swapped.num_left:
            return False
        swapped.num_left -= 1
        cells, length = self._cells, len(rest[0].token_ids)
        has_room = cells.num_pinned + self._reserved + rest[-1].stop <= cells.capacity
        if not has_room or not (self._free_slots or self._kept):
            return False
        if entry is not None:
            self._kept.remove(entry)
            self._kept.append(entry)
        self._evict(self._reserved + length - cells.num_free)
        if entry is None:
            entry = Entry.empty(self._take_slot(spare=None), swapped.namespace)
        elif entry not in self._kept or swapped.rest(entry) != rest:
            return False  # It had to make room for itself.
        is_in_order = self._takes_in_order(entry)
        if not self._swap.load(entry, rest[0], partial(cells.take, pinned=False)):
            if not entry.length:
                self._drop(entry)
            return False
        entry.is_in_order = is_in_order
        if entry not in self._kept:
            self._kept.append(entry)
        self._see(entry)
        self._swap.use(swapped.pieces)
        return True

    def _swap_space(self, runs: RunStore) -> SwapSpace:
        usable = self._rollback.usable_copy
        return SwapSpace(runs, self._store, usable, scratch=self._scratch, whole_only=self._whole_only)

    def _take_slot(self, spare: Entry | None) -> int:
        """A free slot, or that of the least recently used kept sequence other than `spare`."""
        if not self._free_slots:
            victim = next((entry for entry in self._kept if entry is not spare), None)
            if victim is None:
                raise BackendError("every sequence slot of the model is in use; close a sequence first")
            self._kept.remove(victim)
            self._drop(victim)
        return self._free_slots.pop()
