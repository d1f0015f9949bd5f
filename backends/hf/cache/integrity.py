"""What holds of the paged cache's books between any two operations; each fault is one line that says what is wrong."""

from collections import Counter
from collections.abc import Collection, Hashable, Iterator, Mapping
from itertools import pairwise

from tightrope.backends.hf.cache.live import LiveSequence
from tightrope.backends.hf.cache.page_tree import Page, Root
from tightrope.backends.hf.cache.window_pages import WindowPages
from tightrope.kernels.forms.layout import PAGE


def faults(
    num_pages: int,
    free: list[int],
    idle: Collection[Page],
    roots: Mapping[Hashable, Root],
    live: Mapping[int, LiveSequence],
    windows: WindowPages,
) -> Iterator[str]:
    """free: numbers without a page. idle: pages without references, that wait to be evicted."""
    held = Counter(page for sequence in live.values() for page in sequence.pages)
    known = {*held, *idle}
    numbers = Counter([*free, *(page.number for page in known)])
    for number in range(num_pages):
        if numbers[number] != 1:
            yield f"page {number} is free or in use {numbers[number]} times"
    if len(numbers) != num_pages:
        yield f"page {max(numbers)} of {num_pages} is in use"
    for page in known:
        if page.refs != held[page]:
            yield f"page {page.number} counts {page.refs} references, and {held[page]} sequences hold it"
        if (page in idle) == (page in held):
            yield f"page {page.number} is held by a live sequence and waits to be evicted"
        if page.writer is not None and not any(s is page.writer and page in s.pages for s in live.values()):
            yield f"page {page.number} is written by a sequence that doesn't hold it"
    yield from _tree_faults(roots, known)
    for seq_id, sequence in live.items():
        for fault in _sequence_faults(sequence, roots.get(sequence.root)):
            yield f"sequence {seq_id}: {fault}"
    yield from windows.faults(known, Counter(s.pages[place] for s in live.values() for place in s.held))


def _tree_faults(roots: Mapping[Hashable, Root], known: Collection[Page]) -> Iterator[str]:
    reached: set[Page] = set()
    parents: list[Page | Root] = [*roots.values()]
    for key, root in roots.items():
        if root.key != key or not (root.children or root.inexact):
            yield f"the root of {key!r} is called {root.key!r}, with {len(root.children)} pages below it"
    while parents:
        parent = parents.pop()
        for siblings in (parent.children, parent.inexact):
            for before, after in pairwise(siblings):
                if before.tokens > after.tokens:
                    yield f"pages {before.number} and {after.number} are not in the order of their tokens"
        for page in (*parent.children, *parent.inexact):
            if page.parent is not parent:
                yield f"page {page.number} hangs in two places"
            if page.is_exact != (parent.is_exact and page in parent.children):
                yield f"page {page.number} is exact or not, and hangs among those that are the opposite"
            if not 0 < len(page.tokens) <= PAGE or not (page.is_leaf or len(page.tokens) == PAGE):
                yield f"page {page.number} of {len(page.tokens)} tokens has others below it"
            if page in reached:
                return
            reached.add(page)
            parents.append(page)
    for page in known:
        if (page.parent is not None) != (page in reached) or (page.parent is None and (page.tokens or not page.refs)):
            yield f"page {page.number} can't be found, or can be where it isn't known"
    if not reached <= {*known}:
        yield f"page {next(iter(reached - {*known})).number} can be found, and belongs to nobody"


def _sequence_faults(sequence: LiveSequence, root: Root | None) -> Iterator[str]:
    pages, length = sequence.pages, sequence.length
    if sequence.table[: len(pages)].tolist() != [page.number for page in pages]:
        yield "its table names other pages than it holds"
    if len({*pages}) != len(pages):
        yield "a page stands in it twice"
    end = length
    for run in sequence.ahead:
        if run.start <= end or not run.token_ids:
            yield f"{len(run.token_ids)} of its tokens stand behind a gap at {run.start}, and others up to {end}"
        end = run.start + len(run.token_ids)
    for place, page in enumerate(pages):
        if page.is_exact and not sequence.is_exact_at(place):
            yield f"page {page.number} is exact, and only {sequence.num_exact} of its tokens are"
    if not 0 <= sequence.num_findable <= length <= len(pages) * PAGE:
        yield f"{sequence.num_findable} of {length} tokens may be found, in {len(pages)} pages"
        return
    if end > len(pages) * PAGE:
        yield f"its tokens reach to {end}, in {len(pages)} pages"
    parent: Page | Root | None = root
    for place in range(-(-sequence.num_findable // PAGE)):
        page = pages[place]
        if page.parent is not parent or len(page.tokens) < min(PAGE, sequence.num_findable - place * PAGE):
            yield f"its tokens from {place * PAGE} on can't be found in page {page.number}"
        parent = page
