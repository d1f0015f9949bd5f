"""The paged cache's bookkeeping: which page holds which tokens, who shares it, who is evicted.

Pages with tokens form a tree (page_tree.py). A live sequence holds a reference to every page of its path; a page
without references belongs to finished sequences, can still be found, and waits in a queue to be evicted.

Whoever finds part of a page, or a page that another sequence still writes, reads it as it is and gets a copy of its own
before it stores. Copies are queued and run before the next step stores anything, so a page may be given away while it
still waits to be copied.

Sliding-window layers have fewer pages (window_pages.py): a beginning is found as far as they can go on from there.

Nothing here knows of tensors; kernels.forms.layout says what a page is.
"""

from bisect import insort
from collections import OrderedDict
from collections.abc import Callable, Hashable, Sequence
from itertools import takewhile
from operator import itemgetter

import numpy as np

from tightrope.backends.errors import BackendError
from tightrope.backends.hf.cache.copies import Copies
from tightrope.backends.hf.cache.integrity import faults
from tightrope.backends.hf.cache.live import Ints, LiveSequence
from tightrope.backends.hf.cache.page_tree import Page, Root, equals, hang, neighbours, num_common, tokens_of, twin_of
from tightrope.backends.hf.cache.stored_pages import MIN_GAIN, Found, StoredPages
from tightrope.backends.hf.cache.window_pages import WindowPages
from tightrope.backends.protocol import KVUsage
from tightrope.backends.reuse import Reuse, Wanted
from tightrope.kernels.forms.layout import PAGE


class PagedKVCache:
    """KVCache over numbered pages. Capacity and usage are whole pages, in tokens."""

    def __init__(
        self,
        num_pages: int,
        frequencies_at: Callable[[int], Hashable] = lambda length: None,
        *,
        num_window_pages: int = 0,
        window: int | None = None,
    ) -> None:
        """num_window_pages and window: see WindowPages.

        frequencies_at: what tells apart the rotary frequencies of a sequence of so many tokens. Keys are cached before
        rotation, but what they are made of has been through rotated layers: tokens are shared only among sequences that
        compute with the same frequencies.
        """
        self._num_pages = num_pages
        self._frequencies_at = frequencies_at
        self._free = list(range(num_pages - 1, -1, -1))  # A stack of page numbers.
        self._idle: OrderedDict[Page, None] = OrderedDict()  # In the tree, without references; first out in front.
        self._roots: dict[Hashable, Root] = {}
        self._live: dict[int, LiveSequence] = {}
        self._windows = WindowPages(num_window_pages, window)
        self.has_windows = window is not None
        self.copies, self.window_copies = Copies(), Copies()  # Those of pages, and of window pages.
        self.stored: StoredPages | None = None  # Where evicted pages go, and come back from.

    # --- the protocol -----------------------------------------------------------------------------------------------

    def open(
        self,
        seq_id: int,
        token_ids: Sequence[int],
        namespace: str,
        *,
        reuse: Wanted = "exact",
        reproducible: bool = False,
    ) -> Reuse:
        """See KVCache. len(token_ids) is remembered: see `effective_len`."""
        assert seq_id not in self._live, f"sequence {seq_id} is open already"
        frequencies = self._frequencies_at(len(token_ids))
        sequence = LiveSequence((namespace, frequencies), len(token_ids), frequencies)
        if reuse != "nothing":
            self._restore(sequence.root, token_ids[:-1])
            path, found = self._find(sequence.root, token_ids[:-1])
            sequence.length = sequence.num_findable = self._windows.continuable(path, found)
            for page in path[: -(-sequence.length // PAGE)]:
                self._idle.pop(page, None)
                page.refs += 1
                sequence.append(page)
            self._hold(sequence, self._windows.needed(sequence.length))
        self._live[seq_id] = sequence
        return Reuse.prefix(sequence.length)

    def reserve(self, seq_id: int, num_tokens: int) -> bool:
        """See KVCache. A borrowed page at the end is exchanged for one to write."""
        sequence = self._live[seq_id]
        borrows = num_tokens > 0 and sequence.borrows_tail
        missing = -(-(sequence.length + num_tokens) // PAGE) - len(sequence.pages) + borrows
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
        assert end <= len(sequence.pages) * PAGE, f"sequence {seq_id} stores {len(token_ids)} tokens without room"
        sequence.length = end
        self._hold(sequence, self._windows.needed(end))
        if (
            sequence.num_findable < start
            or self._frequencies_at(self.effective_len(seq_id, end)) != sequence.frequencies
        ):
            return
        sequence.num_findable = end
        for place in range(start // PAGE, -(-end // PAGE)):
            page = sequence.pages[place]
            new = token_ids[max(start, place * PAGE) - start : (place + 1) * PAGE - start]
            hang(page, self._parent(sequence, place), page.tokens + tuple(new))

    def truncate(self, seq_id: int, num_tokens: int) -> None:
        """See KVCache. Reserved room is given back too. Raises BackendError where windows of layers have moved on."""
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
        if length % PAGE == 0:
            return
        page, used = sequence.pages[-1], length % PAGE
        if page.writer is sequence and len(page.tokens) > used:
            if page.refs == 1 and not page.children:
                hang(page, page.parent, page.tokens[:used])
            else:
                page.writer = None  # Others read what would be overwritten.

    def close(self, seq_id: int, *, keep: bool) -> None:
        """See KVCache. What is kept twice is merged."""
        sequence = self._live.pop(seq_id)
        self._hold(sequence, range(0))
        if keep:
            sequence.pages = self._merge(sequence)
            if self.stored is not None and self.stored.outlives:
                self.stored.keep(sequence.root, list(takewhile(lambda page: page.tokens, sequence.pages)))
        for page in reversed(sequence.pages):  # Ends first: a page leaves after all that hang below it.
            self._let_go(sequence, page, keep=keep)

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

    # --- finding ----------------------------------------------------------------------------------------------------

    def _find(self, root: Hashable, wanted: Sequence[int]) -> tuple[list[Page], int]:
        """The path that holds most of `wanted`, and how many tokens that is.

        Several pages may hold the same tokens while their sequences live, so all equal paths are followed together.
        """
        parents: list[Page | Root] = [self._roots[root]] if root in self._roots else []
        end: Page | Root | None = None
        length = 0
        while parents:
            part = tuple(wanted[length : length + PAGE])
            found = [(num_common(page.tokens, part), page) for parent in parents for page in neighbours(parent, part)]
            common, best = max(found, key=itemgetter(0), default=(0, None))
            if common == 0:
                break
            length, end = length + common, best
            parents = [page for parent in parents for page in equals(parent, part)] if common == PAGE else []
        path: list[Page] = []
        while isinstance(end, Page):
            path.append(end)
            end = end.parent
        return path[::-1], length

    def _parent(self, sequence: LiveSequence, place: int) -> Page | Root:
        """What the page in this place of a sequence hangs below."""
        if place:
            return sequence.pages[place - 1]
        return self._roots.setdefault(sequence.root, Root(sequence.root))

    # --- giving and taking ------------------------------------------------------------------------------------------

    def _take(self, writer: LiveSequence) -> Page:
        """A page to write. The caller has made sure that there is one."""
        return Page(self._take_number(), refs=1, writer=writer)

    def _take_number(self) -> int:
        """That of a page to write, evicting if none is free."""
        if not self._free:
            evicted = next(iter(self._idle))
            if self.stored is not None:
                self.stored.evicting(evicted)
            self._discard(evicted)
        return self._free.pop()

    def _restore(self, root: Hashable, wanted: Sequence[int]) -> None:
        """Bring back what the store has of `wanted` beyond what is here, as if it had never been evicted."""
        if self.stored is None or (found := self.stored.find(root, wanted)).length < MIN_GAIN:
            return
        path, here = self._find(root, wanted)
        here_usable = self._windows.continuable(path, here)
        kept = path[: here // PAGE]
        room = len(self._free) + len(self._idle) - sum(page.refs == 0 for page in kept)
        length = min(found.length, (len(kept) + room) * PAGE)
        numbers = [page.window_number for page in kept]
        while any(
            (place >= len(kept) or numbers[place] is None) and not found.has_window(place)
            for place in self._windows.needed(length)
        ):
            length = (length - 1) // PAGE * PAGE
        if length < max(here, here_usable + MIN_GAIN):
            return
        self._use_last(kept)
        new = [Page(self._take_number()) for _ in range(len(kept), -(-length // PAGE))]
        self._write_back(root, found, kept, new, self._windows.needed(length))

    def _write_back(self, root: Hashable, found: Found, kept: list[Page], new: list[Page], needed: range) -> None:
        """Fill new pages, and window pages where `needed`, from the store; hang what could be had behind `kept`."""
        assert self.stored is not None
        pages = [*kept, *new]
        missing = [place for place in needed if pages[place].window_number is None]
        for place in needed:
            self._windows.hold(pages[place])
        try:
            restored = self.stored.restore(
                found,
                {place: page.number for place, page in enumerate(new, len(kept))},
                {place: number for place in missing if (number := pages[place].window_number) is not None},
            )
        except BackendError:  # It is computed then.
            restored = 0
        for place in needed:
            self._windows.let_go(pages[place])
        for place in missing:
            if place * PAGE >= restored:
                self._windows.forget(pages[place])
        for place, page in enumerate(new, len(kept)):
            if place * PAGE >= restored:
                self._free.append(page.number)
                continue
            parent = pages[place - 1] if place else self._roots.setdefault(root, Root(root))
            hang(page, parent, found.tokens(place))
        self._use_last([page for page in pages if page.parent is not None])

    def _use_last(self, path: Sequence[Page]) -> None:
        """Have the pages of a path be evicted after all others, ends first."""
        for page in reversed(path):
            if page.refs == 0:
                self._idle[page] = None
                self._idle.move_to_end(page)

    def _own_tail(self, sequence: LiveSequence) -> None:
        """Exchange a borrowed last page for one to write; the page itself where nobody else would miss anything."""
        held = self._windows.needed(sequence.length)  # The last of them is what is exchanged.
        window_source = sequence.pages[-1].window_number
        self._hold(sequence, held[:-1])
        source, used = sequence.pages.pop(), sequence.length % PAGE
        tokens = source.tokens[:used]  # It may be evicted here.
        source.refs -= 1
        if source.refs == 0 and source.tokens == tokens:
            source.refs, source.writer = 1, sequence
            sequence.append(source)
            self._hold(sequence, held)
            return
        if source.refs == 0:
            self._idle[source] = None
        target = self._take(sequence)
        if target.number != source.number:
            self.copies.add(source.number, target.number)
        hang(target, self._parent(sequence, len(sequence.pages)), tokens)
        sequence.append(target)
        self._hold(sequence, held)
        if held and window_source != target.window_number:
            assert window_source is not None
            assert target.window_number is not None
            self.window_copies.add(window_source, target.window_number)

    def _hold(self, sequence: LiveSequence, places: range) -> None:
        """Have a sequence hold the window numbers of the pages in these places, and no others."""
        if places == sequence.held:
            return
        for place in places:
            if place not in sequence.held:
                self._windows.hold(sequence.pages[place])
        for place in sequence.held:
            if place not in places:
                self._windows.let_go(sequence.pages[place])
        sequence.held = places

    def _let_go(self, sequence: LiveSequence, page: Page, *, keep: bool) -> None:
        """Drop a reference; without `keep`, nothing stays of what only this sequence has written."""
        was_written = page.writer is sequence
        if was_written:
            page.writer = None
        page.refs -= 1
        if page.refs > 0:
            return
        if not page.tokens or (was_written and not keep and not page.children):
            self._discard(page)
        else:
            self._idle[page] = None

    def _merge(self, sequence: LiveSequence) -> list[Page]:
        """The pages of a closing sequence, those that another page could stand for replaced by it."""
        path: list[Page] = []
        for page in sequence.pages:
            twin = twin_of(page) if page.refs == 1 and page.tokens else None
            if twin is None:
                path.append(page)
                continue
            for child in page.children:
                child.parent = twin
                insort(twin.children, child, key=tokens_of)
            page.children = []
            self._windows.hand_over(page, twin)
            self._discard(page)
            self._idle.pop(twin, None)
            twin.refs += 1
            path.append(twin)
        return path

    def _discard(self, page: Page) -> None:
        """Take a page out of the tree and give its number back."""
        assert not page.children, "a page goes after all that hang below it"
        parent = page.parent
        self._idle.pop(page, None)
        self._windows.forget(page)
        hang(page, None, ())
        self._free.append(page.number)
        if isinstance(parent, Root) and not parent.children:
            del self._roots[parent.key]
