"""Finding tokens that stand elsewhere in another sequence, and what is copied to have them here.

Whatever a prompt has in common with a chat that has lost some of its messages hangs below the end of their common
beginning: that is where to look, and what is found there was computed over the same beginning.
"""

from collections.abc import Container, Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import chain

import numpy as np

from tightrope.backends.hf.cache.copies import Copies, Slots
from tightrope.backends.hf.cache.page_tree import Page, Root
from tightrope.backends.hf.cache.search import Match
from tightrope.backends.removals import kept_runs
from tightrope.backends.reuse import Run
from tightrope.kernels.forms.layout import PAGE

# So many tokens in front of what was moved are computed again: in them most of the difference lies, as they stand next
# to what was removed. Behind LONG_FRONT tokens, in which they see most of what they saw, MIN_AGAIN do: with a system
# message of 507 tokens 16 make no other difference than 96, with one of 70 twice as much as 64.
COMPUTED_AGAIN, MIN_AGAIN, LONG_FRONT = 64, 16, 512
MIN_KEPT = 16  # So many tokens stay in front: without them, what all others look at would be another token.
MIN_RUN = 16  # A shorter run is computed.
MIN_MOVED = 64  # To compute fewer takes about as long as to find and copy them.
MAX_SEARCHED = 1 << 16  # Tokens of all sequences that are looked at.


@dataclass(frozen=True, slots=True)
class Moved:
    """Runs of a prompt, and the path of the sequence in which their tokens stand, from a root to its end."""

    runs: tuple[Run, ...]
    path: Sequence[Page]

    @property
    def num_tokens(self) -> int:
        return sum(run.length for run in self.runs)

    def slots(self, match: Match, num_pages: int) -> Slots:
        """Where the tokens of so many pages behind the last full one of `match` lie, [num_pages, PAGE]; -1 in gaps."""
        first, rest = divmod(match.length, PAGE)
        slots = np.full(num_pages * PAGE, -1, np.int64)
        if rest:
            slots[:rest] = match.path[first].number * PAGE + np.arange(rest)
        numbers = np.array([page.number for page in self.path])
        for run in self.runs:
            places = np.arange(run.source, run.source + run.length)
            start = run.start - first * PAGE
            slots[start : start + run.length] = numbers[places // PAGE] * PAGE + places % PAGE
        return slots.reshape(num_pages, PAGE)


def find_moved(match: Match, wanted: Sequence[int]) -> Moved | None:
    """The most that removals from another sequence leave of what is `wanted` behind what `match` has found of it."""
    if len(wanted) - match.length < COMPUTED_AGAIN + MIN_MOVED:
        return None
    best: Moved | None = None
    prompt = np.array(wanted, np.int32)
    num_left = MAX_SEARCHED
    for base, path in _other_paths(match.levels):
        source = np.fromiter(chain.from_iterable(page.tokens for page in path), np.int32)
        runs = [
            replace(run, source=base + run.source, start=base + run.start) for run in kept_runs(source, prompt[base:])
        ]
        num_kept = runs[0].stop if runs and runs[0].is_exact else base
        moved = Moved(tuple(_behind(match.length, runs)), [*_path_to(path[0].parent), *path])
        if num_kept >= MIN_KEPT and moved.num_tokens >= (best.num_tokens + 1 if best else MIN_MOVED):
            best = moved
        num_left -= len(source)
        if num_left <= 0:
            break
    return best


def copy_into(copies: Copies, number: int, slots: Slots) -> None:
    """Queue what fills a page from slots [PAGE]; -1 leaves a place as it is."""
    are_given = slots >= 0
    if slots[0] % PAGE == 0 and np.array_equal(slots, np.arange(slots[0], slots[0] + PAGE)):
        copies.add(int(slots[0]) // PAGE, number)
    elif are_given.any():
        copies.add_slots(slots[are_given], number * PAGE + np.flatnonzero(are_given))


def spendable(
    path: Sequence[Page], kept: Container[Page] = (), most_beside: int | None = None
) -> tuple[list[Page], list[Page]]:
    """The pages at the end of a path that no live sequence holds, but for those kept, and all that hangs below them.

    most_beside: up to where so many pages at most hang below one of them, beside the path. Either begins with the ends,
    so that each page can go when those before it in both have gone.
    """
    pages: list[Page] = []
    beside: list[Page] = []
    for page in reversed(path):
        branches = [child for child in (*page.children, *page.inexact) if child not in pages[-1:]]
        each = [_all(child) for child in branches]
        if page in kept or page.refs or any(other.refs for others in each for other in others):
            break
        if most_beside is not None and any(len(others) > most_beside for others in each):
            break
        pages.append(page)
        beside += chain.from_iterable(each)
    return pages, beside


def _all(page: Page) -> list[Page]:
    """A page and all that hang below it, ends first."""
    pages = [page]
    for found in pages:  # It grows meanwhile.
        pages += (*found.children, *found.inexact)
    return pages[::-1]


def by_last_use(slots: Slots, pages: Iterable[Page]) -> list[list[Page]]:
    """By how many of the pages filled from slots [n, PAGE] must be filled before nothing of it is needed, 0 to n."""
    num_fills = {number: i for i, part in enumerate(slots // PAGE, 1) for number in part.tolist()}
    result: list[list[Page]] = [[] for _ in range(len(slots) + 1)]
    for page in pages:
        result[num_fills.get(page.number, 0)].append(page)
    return result


def _other_paths(levels: Sequence[Sequence[Page | Root]]) -> Iterator[tuple[int, list[Page]]]:
    """All paths that leave the matched one, from there to an end, and how many tokens they share with it in full pages.

    The longest shared beginnings come first, and among these exact paths.
    """
    matched: set[Page | Root] = set()
    for level in range(len(levels) - 1, MIN_KEPT // PAGE - 1, -1):
        nodes = levels[level]
        waiting = [[page] for node in nodes for page in (*node.inexact, *node.children) if page not in matched]
        waiting.sort(key=lambda path: path[0].is_exact)
        matched = {*nodes}
        while waiting:
            path = waiting.pop()
            while not path[-1].is_leaf:
                first, *others = (*path[-1].children, *path[-1].inexact)
                waiting += [[*path, other] for other in others]
                path.append(first)
            yield level * PAGE, path


def _path_to(node: Page | Root | None) -> list[Page]:
    path: list[Page] = []
    while isinstance(node, Page):
        path.append(node)
        node = node.parent
    return path[::-1]


def _behind(length: int, runs: Iterable[Run]) -> Iterator[Run]:
    """What is moved of runs: nothing of the beginning that is found, and no first tokens of each."""
    for run in runs:
        again = min(COMPUTED_AGAIN, max(MIN_AGAIN, LONG_FRONT - run.start))
        skipped = max(again, length - run.start)
        if not run.is_exact and run.length - skipped >= MIN_RUN:
            yield Run(run.source + skipped, run.start + skipped, run.length - skipped, is_exact=False)
