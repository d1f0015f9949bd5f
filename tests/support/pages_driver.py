"""A paged cache over a pretend storage that remembers what every place of every page was told."""

from collections.abc import Hashable, Sequence
from dataclasses import dataclass

import numpy as np

from tightrope.backends.errors import BackendError
from tightrope.backends.hf.cache.pages import PagedKVCache
from tightrope.backends.hf.cache.stored_pages import Placed, StoredPages
from tightrope.backends.reuse import Reuse
from tightrope.backends.sessions.piece import Bytes
from tightrope.backends.sessions.store import RunStore
from tightrope.kernels.forms.layout import PAGE

Cell = tuple[Hashable, Hashable, tuple[int, ...]]  # namespace, frequencies, all tokens up to and with this one
Storage = dict[int, list[Cell | None]]  # what the places of each page hold

MOST_LIVE, MOST_TOKENS = 5, 120  # sequences at a time, and tokens of a step, where layers have windows


@dataclass
class Held:
    """What a live sequence believes to have stored."""

    namespace: str
    opened_len: int
    cells: list[Cell]
    reserved: int = 0

    @property
    def tokens(self) -> tuple[int, ...]:
        return self.cells[-1][2] if self.cells else ()


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
        self.cache = PagedKVCache(num_pages, self.frequencies, num_window_pages=num_window_pages, window=window)
        self.num_pages = num_pages
        self.storage: Storage = {page: [None] * PAGE for page in range(num_pages)}
        self.window_storage: Storage = {page: [None] * PAGE for page in range(num_window_pages)}
        self.live: dict[int, Held] = {}
        if store is not None:
            self.cache.stored = StoredPages(store, PretendMover(self))

    def frequencies(self, length: int) -> Hashable:
        return max(length, self.trained_len)

    def open(self, seq_id: int, tokens: Sequence[int], namespace: str = "", *, reuse: bool = True) -> int:
        """Open a sequence; returns how many tokens were cached."""
        reused = self.cache.open(seq_id, tokens, namespace, reuse="exact" if reuse else "nothing")
        found = reused.num_tokens
        assert reused == Reuse.prefix(found)
        assert 0 <= found < len(tokens)
        kind = self.frequencies(len(tokens))
        cells: list[Cell] = [(namespace, kind, tuple(tokens[: i + 1])) for i in range(found)]
        self.live[seq_id] = Held(namespace, len(tokens), cells)
        return found

    def reserve(self, seq_id: int, num_tokens: int) -> bool:
        before = self.cache.usage()
        if self.cache.reserve(seq_id, num_tokens):
            self.live[seq_id].reserved = max(self.live[seq_id].reserved, num_tokens)
            return True
        assert self.cache.usage() == before
        return False

    def store(self, seq_id: int, tokens: Sequence[int]) -> None:
        """A forward pass: copies first, then every token into its place, then the commit."""
        self.copy()
        held = self.live[seq_id]
        kind = self.frequencies(max(held.opened_len, len(held.cells) + len(tokens)))
        begin, end = len(held.cells), len(held.cells) + len(tokens)
        window_pages = self.cache.window_table(seq_id, end).tolist() if self.window else []
        for token in tokens:
            page, place = self.pages(seq_id)[len(held.cells) // PAGE], len(held.cells) % PAGE
            held.cells.append((held.namespace, kind, (*held.tokens, token)))
            self.storage[page][place] = held.cells[-1]
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
            while copies := waiting.next():
                for source, target in reversed(copies):  # in any order
                    storage[target] = list(storage[source])
                waiting.done(len(copies))

    def check_window(self, held: Held, window_pages: Sequence[int], begin: int) -> None:
        """All that a token at `begin` may look at, and the tokens after it, lie where the window's pages are."""
        assert self.window is not None
        for place in range(max(0, begin - self.window + 1), len(held.cells)):
            assert self.window_storage[window_pages[place // PAGE]][place % PAGE] == held.cells[place]

    def run(self, seq_id: int, tokens: Sequence[int], namespace: str = "", *, reuse: bool = True) -> int:
        """Open a sequence and run all its tokens; returns how many were cached."""
        found = self.open(seq_id, tokens, namespace, reuse=reuse)
        assert self.extend(seq_id, tokens[found:])
        return found

    def extend(self, seq_id: int, tokens: Sequence[int]) -> bool:
        if not self.reserve(seq_id, len(tokens)):
            return False
        self.store(seq_id, tokens)
        return True

    def truncate(self, seq_id: int, length: int) -> None:
        self.cache.truncate(seq_id, length)
        del self.live[seq_id].cells[length:]
        self.live[seq_id].reserved = 0

    def truncate_if_possible(self, seq_id: int, length: int) -> None:
        """Where it isn't, nothing changes."""
        before = self.cache.usage()
        try:
            self.truncate(seq_id, length)
        except BackendError:
            assert self.window is not None
            assert self.cache.usage() == before

    def close(self, seq_id: int, *, keep: bool = True) -> None:
        self.cache.close(seq_id, keep=keep)
        del self.live[seq_id]

    def pages(self, seq_id: int) -> list[int]:
        held = self.live[seq_id]
        return [int(page) for page in self.cache.block_table(seq_id, len(held.cells) + held.reserved)]

    def check(self) -> None:
        """Every sequence finds in its pages what it believes; pages add up."""
        self.copy()
        self.cache.check_integrity()
        used = set()
        for seq_id, held in self.live.items():
            pages = self.pages(seq_id)
            used.update(pages)
            assert len(set(pages)) == len(pages)
            assert held.cells == [self.storage[pages[i // PAGE]][i % PAGE] for i in range(len(held.cells))]
            if self.window:
                window_pages = self.cache.window_table(seq_id, len(held.cells)).tolist()
                self.check_window(held, window_pages, len(held.cells))
        usage = self.cache.usage()
        assert usage.capacity == self.num_pages * PAGE
        assert usage.used == len(used) * PAGE
        assert 0 <= usage.reusable <= usage.capacity - usage.used
