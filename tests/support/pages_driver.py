"""A paged cache over a pretend storage that remembers what every place of every page was told."""

from collections.abc import Hashable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from unittest.mock import patch

import numpy as np
from told_blocks import Told

from tightrope.backends import removals
from tightrope.backends.errors import BackendError
from tightrope.backends.hf.cache import moving, pages, stored_pages
from tightrope.backends.hf.cache.pages import PagedKVCache
from tightrope.backends.hf.cache.stored_pages import Placed, StoredPages, root_parts
from tightrope.backends.holdings import chain
from tightrope.backends.reuse import Reuse, Wanted
from tightrope.backends.sessions import store as store_module
from tightrope.backends.sessions.piece import Bytes, root_name
from tightrope.backends.sessions.store import RunStore
from tightrope.kernels.forms.layout import PAGE

# namespace, frequencies, all tokens up to and with this one where it was computed, and whether that was over exact ones
Cell = tuple[Hashable, Hashable, tuple[int, ...], bool]
Storage = dict[int, list[Cell | None]]  # what the places of each page hold

MOST_LIVE, MOST_TOKENS = 5, 120  # sequences at a time, and tokens of a step, where layers have windows


@contextmanager
def short_moves() -> Iterator[None]:
    """Runs of few tokens are moved, so that small caches see many."""
    with (
        patch.object(removals, "MIN_MATCH", 3),
        patch.multiple(moving, COMPUTED_AGAIN=3, MIN_KEPT=2, MIN_RUN=2, MIN_MOVED=4),
        patch.object(pages, "MIN_MOVED", 4),
        patch.multiple(stored_pages, COMPUTED_AGAIN=3, MIN_MOVED=4),
        patch.object(store_module, "MIN_SHARED", 2),
    ):
        yield


@dataclass
class Held:
    """What a live sequence believes to have stored."""

    namespace: str
    opened_len: int
    tokens: list[int]  # of its places so far, also of those that are gaps
    cells: list[Cell | None]
    reserved: int = 0

    @property
    def length(self) -> int:
        """Tokens before the first gap."""
        return self.cells.index(None) if None in self.cells else len(self.cells)

    @property
    def num_missing(self) -> int:
        return self.cells.count(None)


class EagerStore(RunStore):
    """A store in memory that is given everything at once, as one is that outlives the process."""

    @property
    def outlives(self) -> bool:
        return True


class PretendMover:
    """Remembers what the pages of a pretend storage held, and puts it back."""

    def __init__(self, driver: "Driver") -> None:
        self._driver = driver
        self._saved: list[tuple[list[list[Cell | None]], list[list[Cell | None]]]] = []

    def read_pages(self, numbers: Sequence[int], window_numbers: Sequence[int]) -> Bytes:
        self._driver.copy()
        storage, window_storage = self._driver.storage, self._driver.window_storage
        self._saved.append(([list(storage[n]) for n in numbers], [list(window_storage[n]) for n in window_numbers]))
        payload = np.zeros(10 * (len(numbers) + len(window_numbers)), np.uint8)
        payload[:4] = np.frombuffer(np.int32(len(self._saved) - 1).tobytes(), np.uint8)
        return payload

    def write_pages(
        self, payload: Bytes, shape: tuple[int, int], pages: Sequence[Placed], window_pages: Sequence[Placed]
    ) -> None:
        self._driver.copy()
        saved, saved_windows = self._saved[payload[:4].view(np.int32)[0]]
        assert shape == (len(saved), len(saved_windows))
        for row, number in pages:
            self._driver.storage[number] = list(saved[row])
        for row, number in window_pages:
            self._driver.window_storage[number] = list(saved_windows[row])


class Driver:
    """A cache used as the engine does, with a storage that is checked after every operation."""

    def __init__(
        self, num_pages: int = 8, trained_len: int = 1 << 20, *, window: int | None = None, num_window_pages: int = 0,
        store: RunStore | None = None,
    ) -> None:  # fmt: skip
        """Sequences beyond trained_len have frequencies of their own length, as with dynamic NTK."""
        self.trained_len, self.window = trained_len, window
        self.cache = PagedKVCache(
            num_pages, self.frequencies, num_window_pages=num_window_pages, window=window, moves=True
        )
        self.num_pages = num_pages
        self.storage: Storage = {page: [None] * PAGE for page in range(num_pages)}
        self.window_storage: Storage = {page: [None] * PAGE for page in range(num_window_pages)}
        self.live: dict[int, Held] = {}
        if store is not None:
            self.cache.stored = StoredPages(store, PretendMover(self))
        self.told = Told()
        self.cache.report_to(self.told.holdings)
        self.reused = Reuse()  # what was found by the last that was opened

    def frequencies(self, length: int) -> Hashable:
        return max(length, self.trained_len)

    def open(self, seq_id: int, tokens: Sequence[int], namespace: str = "", *, reuse: Wanted = "exact") -> int:
        """Open a sequence; returns how many tokens were cached."""
        reused = self.reused = self.cache.open(seq_id, tokens, namespace, reuse=reuse)
        found = reused.num_tokens
        assert 0 <= found < len(tokens)
        assert reused == Reuse.prefix(found) or reuse == "moved"
        held = self.live[seq_id] = Held(namespace, len(tokens), [], [])
        for run in reused.runs:
            assert run.start >= len(held.cells)
            held.cells += [None] * (run.start - len(held.cells))
            held.cells += [
                self.found(seq_id, tokens, place, is_exact=run.is_exact) for place in range(run.start, run.stop)
            ]
        held.tokens = list(tokens[: len(held.cells)])
        return found

    def found(self, seq_id: int, tokens: Sequence[int], place: int, *, is_exact: bool) -> Cell:
        """What the sequence holds in this place, which is of the same token, namespace and frequencies."""
        held = self.live[seq_id]
        expected = (held.namespace, self.frequencies(len(tokens)), tuple(tokens[: place + 1]), True)
        if is_exact:
            return expected
        self.copy()
        page = int(self.cache.block_table(seq_id, place + 1)[place // PAGE])
        cell = self.storage[page][place % PAGE]
        assert cell is not None
        assert cell[:2] == expected[:2]
        assert cell[2][-1] == tokens[place]
        return cell

    def reserve(self, seq_id: int, num_tokens: int) -> bool:
        before = self.cache.usage()
        if self.cache.reserve(seq_id, num_tokens):
            self.live[seq_id].reserved = max(self.live[seq_id].reserved, num_tokens)
            return True
        assert self.cache.usage() == before
        return False

    def store(self, seq_id: int, tokens: Sequence[int]) -> None:
        """A forward pass: copies first, then every token into its place, then the commit, gap by gap."""
        held = self.live[seq_id]
        while tokens:
            begin = held.length
            end = next((i for i in range(begin, len(held.cells)) if held.cells[i]), begin + len(tokens))
            self._store(seq_id, begin, tokens[: end - begin])
            tokens = tokens[end - begin :]

    def _store(self, seq_id: int, begin: int, tokens: Sequence[int]) -> None:
        self.copy()
        held = self.live[seq_id]
        end = begin + len(tokens)
        kind = self.frequencies(max(held.opened_len, end))
        window_pages = self.cache.window_table(seq_id, end).tolist() if self.window else []
        numbers = self.cache.block_table(seq_id, end).tolist()
        if begin == len(held.tokens):
            held.tokens += tokens
            held.cells += [None] * len(tokens)
        for place, token in enumerate(tokens, begin):
            assert held.tokens[place] == token
            before = held.cells[place - 1] if place else None
            is_exact = place == 0 or (before is not None and before[2:] == (tuple(held.tokens[:place]), True))
            held.cells[place] = self.storage[numbers[place // PAGE]][place % PAGE] = (
                held.namespace, kind, tuple(held.tokens[: place + 1]), is_exact
            )  # fmt: skip
        held.reserved = max(0, held.reserved - len(tokens))
        if self.window:
            for place in range(begin, end):
                self.window_storage[window_pages[place // PAGE]][place % PAGE] = held.cells[place]
            self.check_window(held, window_pages, begin)  # of the step's first token; those after it see less far back
        self.cache.commit(seq_id, begin, tokens)

    def copy(self) -> None:
        for waiting, storage in (
            (self.cache.copies, self.storage),
            (self.cache.window_copies, self.window_storage),
        ):
            while batch := waiting.next():
                for source, target in reversed(batch.pages):  # in any order
                    storage[target] = list(storage[source])
                for source, target in zip(batch.sources.tolist(), batch.targets.tolist(), strict=True):
                    storage[target // PAGE][target % PAGE] = storage[source // PAGE][source % PAGE]
                waiting.done(batch.count)

    def check_window(self, held: Held, window_pages: Sequence[int], begin: int) -> None:
        """All that a token at `begin` may look at, and the tokens after it, lie where the window's pages are."""
        assert self.window is not None
        for place in range(max(0, begin - self.window + 1), len(held.cells)):
            assert self.window_storage[window_pages[place // PAGE]][place % PAGE] == held.cells[place]

    def run(self, seq_id: int, tokens: Sequence[int], namespace: str = "", *, reuse: Wanted = "exact") -> int:
        """Open a sequence and run all its tokens; returns how many were cached."""
        found = self.open(seq_id, tokens, namespace, reuse=reuse)
        assert self.extend(seq_id, tokens[len(self.live[seq_id].cells) :])
        return found

    def extend(self, seq_id: int, tokens: Sequence[int]) -> bool:
        """Run what is missing in gaps, and then these; False if there is no room for them."""
        held = self.live[seq_id]
        missing = [token for token, cell in zip(held.tokens, held.cells, strict=True) if cell is None]
        if not self.reserve(seq_id, len(missing) + len(tokens)):
            return False
        self.store(seq_id, [*missing, *tokens])
        return True

    def truncate(self, seq_id: int, length: int) -> None:
        self.cache.truncate(seq_id, length)
        held = self.live[seq_id]
        length = min(length, held.length)
        del held.cells[length:], held.tokens[length:]
        held.reserved = 0

    def truncate_if_possible(self, seq_id: int, length: int) -> None:
        """Where it isn't, nothing changes."""
        before = self.cache.usage()
        try:
            self.truncate(seq_id, length)
        except BackendError:
            assert self.window is not None
            assert self.cache.usage() == before

    def close(self, seq_id: int, *, keep: bool = True, leave: bool = False) -> None:
        """leave: what isn't exact won't be computed anew."""
        self.cache.close(seq_id, keep=keep)
        held = self.live.pop(seq_id)
        if leave:
            self.cache.leave(held.tokens[: held.length], held.namespace)

    def check_told(self) -> None:
        """What was told are the full pages, each behind all that its text begins with."""
        self.told.update()
        held: set[bytes] = set()
        waiting = [
            (root_name(b"", *root_parts(root.key)), page)
            for root in self.cache._roots.values()
            for page in (*root.children, *root.inexact)
        ]
        while waiting:
            before, page = waiting.pop()
            for block in chain(before, page.tokens):
                held.add(block)
                waiting += [(block, child) for child in (*page.children, *page.inexact)]
        assert self.told.cached == held

    def pages(self, seq_id: int) -> list[int]:
        held = self.live[seq_id]
        num_tokens = max(len(held.cells), len(held.cells) - held.num_missing + held.reserved)
        return [int(page) for page in self.cache.block_table(seq_id, num_tokens)]

    def check(self) -> None:
        """Every sequence finds in its pages what it believes; pages add up."""
        self.copy()
        self.cache.check_integrity()
        used = set()
        for seq_id, held in self.live.items():
            numbers = self.pages(seq_id)
            used.update(numbers)
            assert len(set(numbers)) == len(numbers)
            for place, cell in enumerate(held.cells):
                assert cell is None or cell == self.storage[numbers[place // PAGE]][place % PAGE]
            if self.window:
                window_pages = self.cache.window_table(seq_id, len(held.cells)).tolist()
                self.check_window(held, window_pages, len(held.cells))
        self.check_told()
        usage = self.cache.usage()
        assert usage.capacity == self.num_pages * PAGE
        assert usage.used == len(used) * PAGE
        assert 0 <= usage.reusable <= usage.capacity - usage.used
