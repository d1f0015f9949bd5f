"""Pages of sliding-window layers, which need no more than they can see: the last window of every sequence.

A page of tokens has a second number, for these layers alone. It gets it when its first token is about to be stored, and
live sequences hold it as long as they may look there. Then it stays, so that its tokens can be found, until another
page needs the number; the one that has waited longest loses it. So a beginning can be continued at a length where the
pages of the window before it have their numbers still.
"""

from collections import Counter, OrderedDict
from collections.abc import Collection, Iterator, Sequence

from tightrope.backends.hf.cache.page_tree import Page
from tightrope.kernels.forms.layout import PAGE

KEPT_WINDOWS = 4  # At most this many finished sequences keep their window pages, beside the live ones.


class WindowPages:
    """Who has which of the numbers, and who may lose it."""

    def __init__(self, num_pages: int, window: int | None) -> None:
        """window: tokens that a layer sees, the one it computes among them; None: no page needs a second number.

        There must be at least as many as `most_needed` says.
        """
        self._num_pages, self._window = num_pages, window
        self._free = list(range(num_pages - 1, -1, -1))  # A stack of numbers.
        self._idle: OrderedDict[Page, None] = OrderedDict()  # Nobody holds their number; first out in front.

    def needed(self, length: int) -> range:
        """Places of the pages that a sequence of `length` tokens looks at, or writes into, with its next token."""
        if self._window is None:
            return range(0)
        return range(max(0, length - self._window + 1) // PAGE, -(-length // PAGE))

    def continuable(self, path: Sequence[Page], length: int) -> int:
        """The most of the first `length` tokens of a path after which a sequence can go on."""
        while any(path[place].window_number is None for place in self.needed(length)):
            length = (length - 1) // PAGE * PAGE
        return length

    def hold(self, page: Page) -> None:
        """Keep a page's number for a live sequence; a page without gets one."""
        if page.window_number is None:
            if not self._free:
                self.forget(next(iter(self._idle)))
            page.window_number = self._free.pop()
        self._idle.pop(page, None)
        page.window_refs += 1

    def let_go(self, page: Page) -> None:
        """End what `hold` began."""
        page.window_refs -= 1
        if page.window_refs == 0:
            self._idle[page] = None

    def forget(self, page: Page) -> None:
        """Take the number from a page that nobody holds."""
        assert page.window_refs == 0, "a live sequence looks at these tokens"
        if page.window_number is not None:
            del self._idle[page]
            self._free.append(page.window_number)
            page.window_number = None

    def hand_over(self, page: Page, twin: Page) -> None:
        """Give the number of a page that nobody holds to one that has the same tokens and no number."""
        if page.window_number is not None and twin.window_number is None and page.tokens == twin.tokens:
            del self._idle[page]
            self._idle[twin] = None
            page.window_number, twin.window_number = None, page.window_number

    def faults(self, known: Collection[Page], held: Counter[Page]) -> Iterator[str]:
        """What contradicts itself, a line each. known: all pages; held: how many live sequences hold their number."""
        numbers = {page: page.window_number for page in known if page.window_number is not None}
        if sorted([*self._free, *numbers.values()]) != list(range(self._num_pages)):
            yield "a window page is lost, or in use twice"
        if {*self._idle} != {page for page in numbers if not held[page]}:
            yield "other window pages wait for a new use than those that nobody holds"
        for page in known:
            if page.window_refs != held[page] or (held[page] and page.window_number is None):
                yield f"page {page.number} counts {page.window_refs} windows, and {held[page]} sequences look at it"


def most_needed(window: int, num_seqs: int, step_tokens: int) -> int:
    """Pages that so many live sequences hold at most, in a step of so many tokens."""
    looked_at = (window + PAGE - 3) // PAGE + 1  # A sequence looks at window - 1 tokens, from anywhere in a page.
    return num_seqs * (looked_at + 1) + -(-step_tokens // PAGE)  # Its tokens begin a page more for each.
