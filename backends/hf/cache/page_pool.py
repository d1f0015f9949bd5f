"""The pages of a paged cache: who holds them, which are free, which go next, and how those that went come back."""

from collections import OrderedDict
from collections.abc import Hashable, Sequence

from tightrope.backends.errors import BackendError
from tightrope.backends.hf.cache.copies import Copies
from tightrope.backends.hf.cache.held_pages import HeldPages
from tightrope.backends.hf.cache.live import LiveSequence
from tightrope.backends.hf.cache.moving import spendable
from tightrope.backends.hf.cache.page_tree import Page, Root, hand_over, hang, twin_of
from tightrope.backends.hf.cache.search import find_path
from tightrope.backends.hf.cache.stored_pages import MIN_GAIN, Found, StoredPages
from tightrope.backends.hf.cache.window_pages import WindowPages
from tightrope.kernels.forms.layout import PAGE

MOST_BESIDE = 32  # Pages of an answer that was swiped away.


class PagePool:
    """Pages in the tree or out of it, held by sequences or by nobody."""

    def __init__(self, num_pages: int, num_window_pages: int, window: int | None) -> None:
        """num_window_pages and window: see WindowPages."""
        self._num_pages = num_pages
        self._free = list(range(num_pages - 1, -1, -1))  # A stack of page numbers.
        self._idle: OrderedDict[Page, None] = OrderedDict()  # In the tree, without references; first out in front.
        self._roots: dict[Hashable, Root] = {}
        self._windows = WindowPages(num_window_pages, window)
        self.copies, self.window_copies = Copies(), Copies()  # Those of pages, and of window pages.
        self.stored: StoredPages | None = None  # Where evicted pages go, and come back from.
        self._stored_up_to: Page | Root | None = None  # It went there with the page that was evicted last.
        self._held: HeldPages | None = None  # Somebody wants to know which pages can be found.

    def _parent(self, sequence: LiveSequence, place: int) -> Page | Root:
        """What the page in this place of a sequence hangs below."""
        if place:
            return sequence.pages[place - 1]
        return self._roots.setdefault(sequence.root, Root(sequence.root))

    def _take(self, writer: LiveSequence) -> Page:
        """A page to write. The caller has made sure that there is one."""
        return Page(self._take_number(), refs=1, writer=writer, is_exact=writer.is_exact_at(len(writer.pages)))

    def _take_number(self) -> int:
        """That of a page to write, evicting if none is free."""
        if not self._free:
            self._evict(next(iter(self._idle)))
        return self._free.pop()

    def _evict(self, page: Page) -> None:
        """Take a page out of the cache to where it may come back from."""
        is_stored = page is self._stored_up_to  # Ends go first, page by page.
        if self.stored is not None and not is_stored and not page.is_left:
            self.stored.evicting(page)
            is_stored = True
        self._stored_up_to = page.parent if is_stored else None
        self._discard(page)

    def _leave(self, path: Sequence[Page]) -> None:
        """Have the end of a path go before all others, and not come back: its chat has gone on with copies of it.

        So do other answers that hang beside; where more does, another chat goes on from there.
        """
        pages, beside = spendable(path, most_beside=MOST_BESIDE)
        for page in reversed([*beside, *pages]):  # Ends first.
            if page in self._idle:
                page.is_left = True
                self._idle.move_to_end(page, last=False)

    def _restore(self, root: Hashable, wanted: Sequence[int]) -> None:
        """Bring back what the store has of `wanted` beyond what is here, as if it had never been evicted."""
        if self.stored is not None and (found := self.stored.find(root, wanted)).length >= MIN_GAIN:
            self._bring_back(root, wanted, found)

    def _restore_source(self, root: Hashable, wanted: Sequence[int]) -> bool:
        """Bring back a text that most of `wanted` can be moved from; False where the store has none."""
        source = None if self.stored is None else self.stored.find_source(root, wanted)
        if source is None:
            return False
        self._bring_back(root, *source)
        return True

    def _stored_texts(self, root: Hashable, wanted: Sequence[int], *, moved: bool) -> list[tuple[Sequence[int], Found]]:
        """What the store has for a prompt: its beginning, and a text that most of it can be moved from, with tokens."""
        assert self.stored is not None
        source = self.stored.find_source(root, wanted) if moved else None
        return [(wanted, self.stored.find(root, wanted)), *([source] if source is not None else [])]

    def _bring_part(self, root: Hashable, wanted: Sequence[int], found: Found) -> bool | None:
        """Bring back the next piece of what the store has `found` of a text, or have it read.

        None where there is nothing more to be had. Otherwise whether something is there now that wasn't.
        """
        assert self.stored is not None
        here = self._length_here(root, wanted, found)
        if found.length < here + MIN_GAIN:
            return None
        place = here // PAGE
        if not self.stored.fetch(found, place):
            return False
        self._bring_back(root, wanted, found.up_to(place))
        return True if self._length_here(root, wanted, found) > here else None

    def _length_here(self, root: Hashable, wanted: Sequence[int], found: Found) -> int:
        return find_path(self._roots.get(root), wanted, exact_only=found.are_exact).length

    def _bring_back(self, root: Hashable, wanted: Sequence[int], found: Found) -> None:
        """Hang what the store has `found` of a text behind what is here of it, if that is worth it and has room."""
        path, here, _ = find_path(self._roots.get(root), wanted, exact_only=found.are_exact)
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
            page.is_exact = parent.is_exact and found.is_exact(place)
            self._hang(page, parent, found.tokens(place))
        self._use_last([page for page in pages if page.parent is not None])

    def _use_last(self, path: Sequence[Page]) -> None:
        """Have the pages of a path be evicted after all others, ends first."""
        for page in reversed(path):
            if page.refs == 0:
                self._idle[page] = None
                self._idle.move_to_end(page)

    def _pin(self, page: Page) -> None:
        """Add a reference."""
        self._idle.pop(page, None)
        page.is_left = False
        page.refs += 1

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
        self._hang(target, self._parent(sequence, len(sequence.pages)), tokens)
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
        if not page.tokens or (was_written and not keep and page.is_leaf):
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
            hand_over(page, twin)
            self._windows.hand_over(page, twin)
            self._discard(page)
            self._idle.pop(twin, None)
            twin.refs += 1
            path.append(twin)
        return path

    def _hang(self, page: Page, parent: Page | Root | None, tokens: tuple[int, ...]) -> None:
        """See page_tree.hang."""
        hang(page, parent, tokens)
        if self._held is not None:
            self._held.see(page)

    def _discard(self, page: Page) -> None:
        """Take a page out of the tree and give its number back."""
        self._unhang(page)
        self._free.append(page.number)

    def _unhang(self, page: Page) -> None:
        """Take a page out of the tree."""
        assert page.is_leaf, "a page goes after all that hang below it"
        parent = page.parent
        self._idle.pop(page, None)
        self._windows.forget(page)
        self._hang(page, None, ())
        if isinstance(parent, Root) and not parent.children and not parent.inexact:
            del self._roots[parent.key]

    def _replace_inexact(self, page: Page) -> None:
        """Let an exact page take the place of those that have its tokens and aren't, with all that is below them."""
        assert page.parent is not None
        for other in page.parent.inexact[:]:
            covers = page.tokens[: len(other.tokens)] == other.tokens
            if covers and other.refs == 0 and (other.is_leaf or len(page.tokens) == PAGE):
                hand_over(other, page)
                self._discard(other)
