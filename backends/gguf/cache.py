"""The key-value cache's bookkeeping: who holds which tokens, who shares them, who is evicted.

llama.cpp stores keys and values in cells; a cell can belong to several sequence slots and is free when it belongs to
none. This module mirrors that with logical cells (cells.py).
"""

from collections import deque
from collections.abc import Iterable, Sequence
from itertools import chain

import numpy as np

from tightrope.backends.errors import BackendError
from tightrope.backends.gguf.cells import Ints
from tightrope.backends.gguf.entry import ALL, Entry, num_exact_of
from tightrope.backends.gguf.entry_pool import EntryPool
from tightrope.backends.gguf.held_entries import HeldEntries
from tightrope.backends.gguf.integrity import faults
from tightrope.backends.gguf.moves import MIN_MOVED, Move, best_move, splice, told
from tightrope.backends.holdings import Holdings
from tightrope.backends.protocol import KVUsage
from tightrope.backends.reuse import Accepts, Reuse, Run, Wanted, always
from tightrope.backends.sessions.piece import num_common
from tightrope.backends.sessions.store import RunStore

MOST_FETCHED = 8  # Prompts.


class SharedKVCache(EntryPool):
    """KVCache over llama.cpp's sequence slots. Finished sequences stay matchable until their room or slot is needed."""

    # --- the protocol -------------------------------------------------------------------------------------------

    def open(
        self,
        seq_id: int,
        token_ids: Sequence[int],
        namespace: str,
        *,
        reuse: Wanted = "exact",
        accepts: Accepts = always,
        reproducible: bool = False,
        steady: bool = False,
    ) -> Reuse:
        """See KVCache. Raises BackendError when more sequences are open than the model has slots."""
        assert seq_id not in self._live, f"sequence {seq_id} is open already"
        wanted = np.asarray(token_ids, np.int32)
        is_alone = (reproducible or steady) and not self._live
        if is_alone and not self._stands_as_alone(wanted, namespace):
            self._swap_out_idle(0)  # Attention adds up in the order of the cells.
        parted = self._longest_common(wanted, namespace) if self._rollback.saves else 0
        source, runs = self._find(wanted, namespace, reuse, accepts) if reuse != "nothing" else (None, ())
        if steady and is_alone and self._steady_tokens and source and not told(runs, source.num_exact).num_inexact:
            source, runs = self._find_steady(wanted, namespace)
        found = runs[-1].stop if runs else 0
        if source is None and not self._live:
            self._swap_out_idle(0)  # So it has the numbers that it would have in another engine's empty cache.
        if source is not None and (self._can_take_over(source, found) or (is_alone and source in self._kept)):
            entry = source
            self._kept.remove(entry)
            self._shorten(entry, found, pinned=False)
            self._cells.pin(entry.held())
        else:
            entry = Entry.empty(self._take_slot(spare=source), namespace)
            if source is not None:
                self._copy(source, entry, found)
        self._live[seq_id] = entry
        self._fetched.pop(seq_id, None)
        self._rollback.begin(entry, wanted, parted)
        self._swap_out_idle()
        return told(runs if entry.length else (), entry.num_exact)

    def fetch(self, seq_id: int, token_ids: Sequence[int], namespace: str, *, reuse: Wanted = "exact") -> bool:
        """See KVCache."""
        if reuse == "nothing":
            return True
        fetched = self._fetched.get(seq_id)
        if fetched is None:
            fetched = deque(self._swapped(np.asarray(token_ids, np.int32), namespace, reuse))
            self._fetched = {**dict(list(self._fetched.items())[1 - MOST_FETCHED :]), seq_id: fetched}
        while fetched:
            _, rest = self._brought(fetched[0])
            if rest and (not self._swap.fetch(rest) or self._swap_in(fetched[0])):
                return False
            fetched.popleft()
        return True

    def reserve(self, seq_id: int, num_tokens: int) -> bool:
        """See KVCache. What was reserved before and not yet committed counts towards `num_tokens`."""
        entry = self._live[seq_id]
        wanted = self._reserved + max(0, num_tokens - entry.reserved)
        if self._cells.num_pinned + wanted > self._cells.capacity:
            return False
        self._evict(wanted - self._cells.num_free)
        entry.reserved += wanted - self._reserved
        self._reserved = wanted
        return True

    def commit(self, seq_id: int, start: int, token_ids: Sequence[int]) -> None:
        """See KVCache."""
        entry, count = self._live[seq_id], len(token_ids)
        assert start == entry.length, f"sequence {seq_id} holds {entry.length} tokens, and stores from {start} on"
        assert count <= entry.reserved, f"sequence {seq_id} commits {count} tokens, and reserved {entry.reserved}"
        if start == entry.num_steady and len(self._live) == 1 and 0 < self._steady_tokens <= count:
            entry.num_steady += count
        entry.is_in_order = self._takes_in_order(entry)
        entry.append(token_ids, self._cells.take(count, pinned=True))
        entry.reserved -= count
        self._reserved -= count
        self._is_moving = False
        self._see(entry)
        self._rollback.save_passed(entry, self._free_slots[-1] if self._free_slots else None)

    def truncate(self, seq_id: int, num_tokens: int) -> None:
        """See KVCache. Raises BackendError when the model's state can't go back there: then it went back farther."""
        entry = self._live[seq_id]
        self._reserved -= entry.reserved
        entry.reserved = 0
        if num_tokens < entry.length and not self._shorten(entry, num_tokens, pinned=True):
            raise BackendError(f"this model's cache can't go back to token {num_tokens} of a sequence")

    def close(self, seq_id: int, *, keep: bool) -> None:
        """See KVCache."""
        entry = self._live.pop(seq_id)
        self._reserved -= entry.reserved
        entry.reserved = 0
        self._cells.unpin(entry.held())
        if not keep or entry.length == 0 or self._is_redundant(entry):
            self._drop(entry)
            return
        self._store.remove_cells(entry.slot, entry.length)  # A failed step may have left these behind.
        self._kept.append(entry)
        if self._swap.outlives and entry.num_exact == ALL:  # Others may yet be computed exactly: see `leave`.
            self._save(entry)
            self._rollback.keep(entry)
        if self._live:
            self._swap_out_idle()
        self._evict(self._cells.num_reusable - self._max_reusable)

    def leave(self, token_ids: Sequence[int], namespace: str) -> None:
        """See KVCache."""
        wanted = np.asarray(token_ids, np.int32)
        for entry in self._kept:
            is_inexact = entry.namespace == namespace and entry.num_exact != ALL
            if self._swap.outlives and is_inexact and num_common(entry.tokens, wanted) == len(wanted):
                self._save(entry)

    def report_to(self, holdings: Holdings) -> None:
        """See KVCache. Of a model that can't go back, what is told can be found to its end and at checkpoints alone."""
        self._swap.report_to(holdings)
        self._held = HeldEntries(holdings, self._swap.root, (*self._live.values(), *self._kept))

    def usage(self) -> KVUsage:
        return KVUsage(self._cells.capacity, self._cells.num_pinned, self._cells.num_reusable)

    def check_integrity(self) -> None:
        """See KVCache. Between a forward pass and its commit llama.cpp holds more than the books say."""
        entries, slots = (list(self._live.values()), self._kept), (self._free_slots, self._num_slots)
        found = faults(self._store, self._cells, *entries, self._reserved, *slots)
        fault = next(chain(found, self._swap.faults()), None)
        assert fault is None, fault

    # --- for the backend ----------------------------------------------------------------------------------------

    def swap_to(self, runs: RunStore) -> None:
        """Say where finished sequences go outside the cache; none does before."""
        self._swap = self._swap_space(runs)
        self._rollback.store_in(runs)

    def slot(self, seq_id: int) -> int:
        """The llama.cpp sequence that holds `seq_id`."""
        return self._live[seq_id].slot

    def pauses(self, seq_id: int, stop: int) -> list[int]:
        """The places up to `stop`, rising, at which a step that runs there has to pause and call `save_paused`."""
        return self._rollback.pauses(self._live[seq_id], stop)

    def save_paused(self, seq_id: int, token_ids: Sequence[int]) -> None:
        """Keep the state after `token_ids`, which have run and are not committed yet."""
        self._rollback.save_paused(self._live[seq_id], token_ids)

    def forget_uncommitted(self, seq_ids: Iterable[int]) -> None:
        """Remove what a failed forward pass may have stored beyond the committed tokens."""
        for seq_id in seq_ids:
            entry = self._live[seq_id]
            self._shorten(entry, entry.length, pinned=True)

    # --- matching -----------------------------------------------------------------------------------------------

    def _find(
        self, wanted: Ints, namespace: str, reuse: Wanted, accepts: Accepts
    ) -> tuple[Entry | None, tuple[Run, ...]]:
        """A sequence to begin a prompt with, if there is one, and runs from 0 on that it holds, moved if need be."""
        source, found = self._swapped_match(wanted, namespace, reuse, *self._best_match(wanted, namespace, reuse))
        runs = Reuse.prefix(found).runs
        if reuse == "exact" or source is None:
            return source, runs
        others = (entry for entry in (*self._kept, *self._live.values()) if entry.namespace == namespace)
        move = best_move(others, wanted, found) if self._can_move else None
        entry, offered = (source, runs) if move is None else (move.entry, move.runs)
        offer = told(offered, entry.num_exact)
        most = accepts(offer) if offer.num_inexact else offer.stop
        if most < offer.stop and (move is None or (move := move.before(most)).length < found + MIN_MOVED):
            return self._find(wanted, namespace, "exact", accepts)
        if move is None or (movable := self._apart(move)) is None:
            return source, runs
        self._see(movable, is_gone=True)
        splice(self._store, self._cells, Move(movable, move.runs))
        self._see(movable)
        self._is_moving = True
        return movable, move.runs

    def _find_steady(self, wanted: Ints, namespace: str) -> tuple[Entry | None, tuple[Run, ...]]:
        """The same of what is steady, with nothing else in the cache: attention is shared out by the cells in use."""
        if len(self._kept) > 1:
            self._swap_out_idle(0)
            self._swapped_match(wanted, namespace, "exact", None, 0)
        source, found = self._steady_match(wanted, namespace)
        return source, Reuse.prefix(found).runs

    def _apart(self, move: Move) -> Entry | None:
        """The entry of a move, or a copy of it, that is kept and shares nothing that moves; None without room."""
        moving = move.entry.held(move.num_kept)
        if any(np.isin(entry.held(), moving).any() for entry in self._live.values()):
            return self._twin(move.entry)
        for other in [other for other in self._kept if other is not move.entry]:
            if np.isin(other.held(), moving).any() and not self._swap_out(other):
                self._kept.remove(other)
                self._drop(other)
        return move.entry

    def _twin(self, entry: Entry) -> Entry | None:
        """A kept copy of an entry in cells of its own; None where there is no room for it."""
        length = entry.length
        if self._is_moving or not self._free_slots or length > self._cells.num_free - self._reserved:
            return None
        twin = Entry.empty(self._free_slots.pop(), entry.namespace)
        if not self._store.load_cells(twin.slot, self._store.save_cells(entry.slot)):
            self._drop(twin)
            return None
        twin.append(entry.tokens, self._cells.take(length, pinned=False))
        twin.num_exact, twin.num_steady, twin.is_in_order = entry.num_exact, entry.num_steady, False
        self._kept.append(twin)
        self._see(twin)
        return twin

    def _longest_common(self, wanted: Ints, namespace: str) -> int:
        """How many tokens a prompt has in common with another sequence, whether or not it can be continued there."""
        entries = [entry.tokens for entry in (*self._live.values(), *self._kept) if entry.namespace == namespace]
        return max([self._swap.longest_common(wanted, namespace), *(num_common(held, wanted) for held in entries)])

    def _can_take_over(self, source: Entry, found: int) -> bool:
        """Whether the new sequence continues a kept one, or has to, because no slot is left for a copy of it."""
        has_room_beside = bool(self._free_slots) or len(self._kept) > 1
        return source in self._kept and (found == source.length or not has_room_beside)

    def _is_redundant(self, entry: Entry) -> bool:
        """Whether another sequence holds all of `entry`; drops kept ones that `entry` holds all of."""
        for other in [*self._kept, *self._live.values()]:
            if other.namespace != entry.namespace:
                continue
            common = num_common(other.tokens, entry.tokens)
            is_there = common == entry.length and num_exact_of(other, common) >= entry.num_exact
            if is_there and self._rollback.usable(other, common) == common:
                return True
            is_here = common == other.length and num_exact_of(entry, common) >= other.num_exact
            if is_here and other in self._kept and self._rollback.usable(entry, common) == common:
                self._kept.remove(other)
                self._drop(other)
        return False

    def _copy(self, source: Entry, target: Entry, length: int) -> None:
        """Let a new, live entry begin with the first `length` tokens of another."""
        if source in self._kept:
            self._kept.remove(source)
            self._kept.append(source)  # It was of use, so that it goes last now.
        self._store.copy_cells(source.slot, target.slot, length)
        shared = source.cells[:length]
        target.append(source.token_ids[:length], shared)
        target.num_exact, target.num_steady = source.num_exact, min(source.num_steady, length)
        target.is_in_order = source.is_in_order
        self._cells.share(shared)
        self._shorten(target, length, pinned=True)
