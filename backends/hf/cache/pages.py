"""The paged cache's bookkeeping: which page holds which tokens, who shares it, who is evicted.

Pages with tokens form a tree (page_tree.py). A live sequence holds a reference to every page of its path; a page
without references belongs to finished sequences, can still be found, and waits in a queue to be evicted.

Whoever finds part of a page, or a page that another sequence still writes, reads it as it is and gets a copy of its own
before it stores. Copies are queued and run before the next step stores anything, so a page may be given away while it
still waits to be copied.

A run of tokens that stands elsewhere in another sequence (moving.py) is copied into pages of the one that found it, and
what lies in the gaps between is computed. Such pages, and all that are computed over them, aren't exact, and are found
only by who takes them; what is computed exactly later replaces them, page by page.

Sliding-window layers have fewer pages (window_pages.py): a beginning is found as far as they can go on from there.

Nothing here knows of tensors; kernels.forms.layout says what a page is.
"""

from collections.abc import Callable, Hashable, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import accumulate, takewhile, zip_longest

import numpy as np

from tightrope.backends.errors import BackendError
from tightrope.backends.hf.cache.held_pages import HeldPages
from tightrope.backends.hf.cache.integrity import faults
from tightrope.backends.hf.cache.live import Ahead, Ints, LiveSequence
from tightrope.backends.hf.cache.moving import MIN_MOVED, Moved, by_last_use, copy_into, find_moved, spendable
from tightrope.backends.hf.cache.page_pool import PagePool
from tightrope.backends.hf.cache.page_tree import Page
from tightrope.backends.hf.cache.search import Match, find_path
from tightrope.backends.hf.cache.stored_pages import Found, root_parts
from tightrope.backends.holdings import Holdings
from tightrope.backends.protocol import KVUsage
from tightrope.backends.reuse import Accepts, Reuse, Wanted, always
from tightrope.backends.sessions.piece import root_name
from tightrope.kernels.forms.layout import PAGE

MOST_FETCHED = 8  # Prompts.
MIN_OUTPUT = 32  # So many tokens behind its prompt find room, or a sequence doesn't start.


@dataclass(slots=True)
class Fetched:
    """What is still to be brought back for a prompt, in so many pieces at most: others may need the room meanwhile."""

    texts: Sequence[tuple[Sequence[int], Found]]
    num_left: int


class PagedKVCache(PagePool):
    """KVCache over numbered pages. Capacity and usage are whole pages, in tokens."""

    def __init__(
        self,
        num_pages: int,
        frequencies_at: Callable[[int], Hashable] = lambda length: None,
        *,
        num_window_pages: int = 0,
        window: int | None = None,
        moves: bool = False,
    ) -> None:
        """num_window_pages and window: see WindowPages.

        moves: tokens may be found at other places than where they stood, and copied; not where layers have windows.

        frequencies_at: what tells apart the rotary frequencies of a sequence of so many tokens. Keys are cached before
        rotation, but what they are made of has been through rotated layers: tokens are shared only among sequences that
        compute with the same frequencies.
        """
        super().__init__(num_pages, num_window_pages, window)
        self._frequencies_of, self._usual = frequencies_at, frequencies_at(1)
        self._live: dict[int, LiveSequence] = {}
        self._fetched: dict[int, Fetched] = {}  # By sequence; those that were asked for last.
        self.has_windows = window is not None
        self._moves = moves and window is None

    # --- the protocol -----------------------------------------------------------------------------------------------

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
        """See KVCache. len(token_ids) is remembered: see `effective_len`."""
        assert seq_id not in self._live, f"sequence {seq_id} is open already"
        frequencies = self._frequencies_at(len(token_ids))
        sequence = LiveSequence((namespace, frequencies), len(token_ids), frequencies)
        self._live[seq_id] = sequence
        self._fetched.pop(seq_id, None)
        wanted = token_ids[:-1]
        if reuse != "nothing":
            self._restore(sequence.root, wanted)
        if reuse == "moved" and self._moves:
            found = self._begin_inexact(sequence, wanted, accepts)
            if found is None and self._restore_source(sequence.root, wanted):
                found = self._begin_inexact(sequence, wanted, accepts)
            if found is not None:
                return found
        if reuse != "nothing":
            path, length, _ = self._find(sequence, wanted, exact_only=True)
            self._begin(sequence, path, self._windows.continuable(path, length))
            self._hold(sequence, self._windows.needed(sequence.length))
        return Reuse.prefix(sequence.length)

    def fetch(self, seq_id: int, token_ids: Sequence[int], namespace: str, *, reuse: Wanted = "exact") -> bool:
        """See KVCache. Where layers have windows, pieces are only read ahead."""
        if self.stored is None or reuse == "nothing":
            return True
        root, wanted = (namespace, self._frequencies_at(len(token_ids))), token_ids[:-1]
        fetched = self._fetched.get(seq_id)
        if fetched is None:
            texts = self._stored_texts(root, wanted, moved=reuse == "moved" and self._moves)
            fetched = Fetched(texts, 2 * sum(len(found.matches) for _, found in texts))
            self._fetched = {**dict(list(self._fetched.items())[1 - MOST_FETCHED :]), seq_id: fetched}
        while fetched.texts and fetched.num_left > 0:
            text, found = fetched.texts[0]
            if self.has_windows:
                is_there = None if self.stored.fetch(found, 0) else False
            else:
                is_there = self._bring_part(root, text, found)
            if is_there is not None:
                fetched.num_left -= is_there
                return False
            fetched.texts = fetched.texts[1:]
        return True

    def reserve(self, seq_id: int, num_tokens: int) -> bool:
        """See KVCache. A borrowed page at the end is exchanged for one to write."""
        sequence = self._live[seq_id]
        borrows = num_tokens > 0 and sequence.borrows_tail
        missing = -(-(sequence.num_stored + num_tokens) // PAGE) - len(sequence.pages) + borrows
        if missing <= 0:
            return True
        given_back = borrows and sequence.pages[-1].refs == 1
        if missing > len(self._free) + len(self._idle) + given_back:
            return False
        if borrows:
            self._own_tail(sequence)
        for _ in range(missing - borrows):
            sequence.append(self._take(sequence))
        return True

    def commit(self, seq_id: int, start: int, token_ids: Sequence[int]) -> None:
        """See KVCache. Tokens that were computed with other frequencies than the first can't be found later."""
        sequence = self._live[seq_id]
        assert start == sequence.length, f"sequence {seq_id} holds {sequence.length} tokens, and stores from {start} on"
        end = start + len(token_ids)
        most = sequence.ahead[0].start if sequence.ahead else len(sequence.pages) * PAGE
        assert end <= most, f"sequence {seq_id} stores {len(token_ids)} tokens without room"
        sequence.length = end
        stored = (*token_ids, *sequence.join())
        self._hold(sequence, self._windows.needed(sequence.length))
        self._make_findable(sequence, start, stored)

    def truncate(self, seq_id: int, num_tokens: int) -> None:
        """See KVCache. Reserved room is given back too, and runs behind a gap.

        Raises BackendError where windows of layers have moved on.
        """
        sequence = self._live[seq_id]
        length = min(num_tokens, sequence.length)
        if self._windows.continuable(sequence.pages, length) < length:
            raise BackendError(f"the cache of sliding-window layers can't go back to token {length} of a sequence")
        self._hold(sequence, self._windows.needed(length))
        num_kept = -(-length // PAGE)
        for page in reversed(sequence.pages[num_kept:]):
            self._let_go(sequence, page, keep=False)
        del sequence.pages[num_kept:]
        sequence.length, sequence.num_findable = length, min(length, sequence.num_findable)
        sequence.ahead.clear()
        if length % PAGE == 0:
            return
        page, used = sequence.pages[-1], length % PAGE
        if page.writer is sequence and len(page.tokens) > used:
            if page.refs == 1 and page.is_leaf:
                self._hang(page, page.parent, page.tokens[:used])
            else:
                page.writer = None  # Others read what would be overwritten.

    def close(self, seq_id: int, *, keep: bool) -> None:
        """See KVCache. What is kept twice is merged."""
        sequence = self._live.pop(seq_id)
        self._hold(sequence, range(0))
        if keep and not sequence.ahead:
            self._leave(sequence.moved_from)
        if keep:
            sequence.pages = self._merge(sequence)
            if self.stored is not None and self.stored.outlives:
                self.stored.keep(sequence.root, list(takewhile(_is_storable, sequence.pages)))
        for page in reversed(sequence.pages):  # Ends first: a page leaves after all that hang below it.
            self._let_go(sequence, page, keep=keep)

    def leave(self, token_ids: Sequence[int], namespace: str) -> None:
        """See KVCache."""
        if self.stored is not None and self.stored.outlives:
            root = namespace, self._frequencies_at(len(token_ids))
            self.stored.keep(root, find_path(self._roots.get(root), token_ids, exact_only=False).path)

    def report_to(self, holdings: Holdings) -> None:
        """See KVCache. Windows of layers aren't looked at: what is told may have lost them."""
        if self.stored is not None:
            self.stored.report_to(holdings)
        root_of = partial(root_name, holdings.fingerprint)
        self._held = HeldPages(holdings, lambda key: root_of(*root_parts(key)), self._roots.values())

    def usage(self) -> KVUsage:
        used = self._num_pages - len(self._free) - len(self._idle)
        return KVUsage(self._num_pages * PAGE, used * PAGE, len(self._idle) * PAGE, PAGE)

    def check_integrity(self) -> None:
        """See KVCache."""
        fault = next(faults(self._num_pages, self._free, self._idle, self._roots, self._live, self._windows), None)
        fault = fault if fault is not None or self.stored is None else next(self.stored.faults(), None)
        assert fault is None, fault

    # --- for the backend --------------------------------------------------------------------------------------------

    def block_table(self, seq_id: int, num_tokens: int) -> Ints:
        """Page numbers [ceil(num_tokens / PAGE)] of a sequence's first tokens; a view, to be read at once."""
        return self._live[seq_id].table[: -(-num_tokens // PAGE)]

    def window_table(self, seq_id: int, num_tokens: int) -> Ints:
        """Window page numbers [ceil(num_tokens / PAGE)] for a step up to `num_tokens`; 0 where no layer looks."""
        sequence, num_pages = self._live[seq_id], -(-num_tokens // PAGE)
        self._hold(sequence, range(self._windows.needed(sequence.length).start, num_pages))
        table = np.zeros(num_pages, np.int32)
        for place in sequence.held:
            number = sequence.pages[place].window_number
            assert number is not None  # It is held.
            table[place] = number
        return table

    def effective_len(self, seq_id: int, num_tokens: int) -> int:
        """The length whose frequencies a sequence computes with when it holds `num_tokens`: its prompt's at least.

        All chunks of a prompt compute with those of the whole, as if it were run in one piece.
        """
        return max(self._live[seq_id].opened_len, num_tokens)

    def _frequencies_at(self, length: int) -> Hashable:
        """What tells them apart; None for the usual ones, those of short texts."""
        found = self._frequencies_of(length)
        return None if found == self._usual else found

    # --- beginning -------------------------------------------------------------------------------------------------

    def _find(self, sequence: LiveSequence, wanted: Sequence[int], *, exact_only: bool) -> Match:
        return find_path(self._roots.get(sequence.root), wanted, exact_only=exact_only)

    def _begin(self, sequence: LiveSequence, path: Sequence[Page], length: int) -> None:
        """Have a sequence begin with the first `length` tokens of a path."""
        sequence.length = sequence.num_findable = length
        for page in path[: -(-length // PAGE)]:
            self._pin(page)
            sequence.append(page)

    def _begin_inexact(self, sequence: LiveSequence, wanted: Sequence[int], accepts: Accepts) -> Reuse | None:
        """Have a sequence begin with what is found for it at any place; None where exact tokens do, or are better."""
        match = self._find(sequence, wanted, exact_only=False)
        moved = find_moved(match, wanted)
        reuse = Reuse(match.runs + (moved.runs if moved else ()))
        least = self._find(sequence, wanted, exact_only=True).length + MIN_MOVED
        if reuse.num_inexact and reuse.num_tokens >= least:
            reuse = reuse.before(accepts(reuse))
        if not reuse.num_inexact or reuse.num_tokens < least or reuse.stop < match.length:
            return None
        if moved is not None:
            runs = reuse.runs[len(match.runs) :]
            moved = Moved(runs, moved.path) if runs else None
        # What is computed before the first inexact token stands on exact ones.
        sequence.num_exact = next(run.start for run in reuse.runs if not run.is_exact)
        if moved is None:
            self._begin(sequence, match.path, match.length)
        elif not self._begin_moved(sequence, match, moved, wanted):
            sequence.num_exact = None
            return None
        return reuse

    def _begin_moved(self, sequence: LiveSequence, match: Match, moved: Moved, wanted: Sequence[int]) -> bool:
        """Have a sequence begin with a path, and copies of moved runs behind it; nothing changes if there is no room.

        The last page of the path is copied too where the sequence is to write into it. Where room is short, the pages
        that tokens are moved from are given up, each as soon as nothing of it is to be copied any more.
        """
        first, rest = divmod(match.length, PAGE)
        slots = moved.slots(match, -(-moved.runs[-1].stop // PAGE) - first)
        kept = dict.fromkeys((*match.path, *moved.path))
        num_room = len(self._free) + len(self._idle) - sum(page in self._idle for page in kept)
        spent: list[Page] = []
        beside: list[Page] = []
        if num_room < len(slots):
            spent, beside = spendable(moved.path, {*match.path})
            if num_room + len(spent) < -(-(sequence.opened_len + MIN_OUTPUT) // PAGE) - first:
                return False  # It would have to wait, and what it was moved from would be gone.
        given_up = by_last_use(slots, spent)
        if min(accumulate((len(pages) - 1 for pages in given_up[:-1]), initial=num_room)) < 0:
            return False
        for page in beside:
            self._evict(page)
        spent_pages = {*spent}
        sources = [page for page in kept if page not in spent_pages]
        for page in sources:
            self._pin(page)
        self._begin(sequence, match.path, first * PAGE)
        sequence.length = sequence.num_findable = match.length
        sequence.moved_from = moved.path
        sequence.ahead += [Ahead(run.start, tuple(wanted[run.start : run.stop])) for run in moved.runs]
        for page in spent:
            self._unhang(page)
        while len(self._free) < len(slots) and self._idle:  # To store pages has the copies before them made.
            self._evict(next(iter(self._idle)))
        for part, pages in zip_longest(slots, given_up):
            # What is given up is taken again last, so that many copies can be made at once.
            self._free[:0] = [page.number for page in pages]
            if part is not None:
                sequence.append(self._take(sequence))
                copy_into(self.copies, sequence.pages[-1].number, part)
        if rest:
            beginning = tuple(wanted[first * PAGE : match.length])
            self._hang(sequence.pages[first], self._parent(sequence, first), beginning)
        self._make_findable(sequence, match.length, sequence.join())
        for page in reversed(sources):  # Ends first.
            self._let_go(sequence, page, keep=True)
        return True

    def _make_findable(self, sequence: LiveSequence, start: int, token_ids: tuple[int, ...]) -> None:
        """Put tokens that are stored from place `start` on into the tree, unless other frequencies were used so far."""
        end = start + len(token_ids)
        frequencies = self._frequencies_at(max(sequence.opened_len, end))
        if sequence.num_findable < start or frequencies != sequence.frequencies:
            return
        sequence.num_findable = end
        for place in range(start // PAGE, -(-end // PAGE)):
            page = sequence.pages[place]
            new = token_ids[max(start, place * PAGE) - start : (place + 1) * PAGE - start]
            self._hang(page, self._parent(sequence, place), page.tokens + new)
            if page.is_exact:
                self._replace_inexact(page)


def _is_storable(page: Page) -> bool:
    """What isn't exact may yet be computed anew: see `leave`."""
    return page.is_exact and page.tokens != ()
