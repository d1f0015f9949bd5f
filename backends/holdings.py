"""What a cache holds and what lies in its store, as hashes: so that others can tell where a prompt was read already.

Token ids are counted in blocks. A block's hash covers the model, the namespace and all tokens before it, so that one
who knows a prompt walks along it for as long as the hashes are there. Nothing is computed until somebody asks for it.

Tokens that were moved are told like all others, though a prompt that wants exact ones finds less of its chat then.

What is told is bounded: of more than MOST_BLOCKS every second one is told, then every fourth, of each text alike. So
a longer text is known to so many tokens less, and none is forgotten.
"""

import threading
from array import array
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from hashlib import blake2b
from typing import Literal

from tightrope.backends.sessions.piece import root_name

BLOCK = 16  # Tokens.
HASH_BYTES = 8
MOST_BLOCKS = 1 << 15  # Of each kind: half a million tokens, told in 256 KiB of hashes.
COPY_SHARE = 0.03  # To bring a token back from the machine's memory takes so much of the time that computing it does.
_BLOCK_BYTES = BLOCK * array("i").itemsize

Kind = Literal["cached", "stored"]


def root_of(fingerprint: bytes, namespace: str) -> bytes:
    """What stands before the first block of all texts that may share cached tokens: see root_name."""
    return root_name(fingerprint, namespace)


def next_hash(before: bytes, block: bytes) -> bytes:
    """The hash of a block: `before` is that of the one before it, or a root, and `block` its ids as int32."""
    return blake2b(before + block, digest_size=HASH_BYTES).digest()


def chain(root: bytes, token_ids: Iterable[int]) -> Iterator[bytes]:
    """The hashes of a text's whole blocks, one by one."""
    packed, before = array("i", token_ids).tobytes(), root
    for start in range(0, len(packed) - _BLOCK_BYTES + 1, _BLOCK_BYTES):
        before = next_hash(before, packed[start : start + _BLOCK_BYTES])
        yield before


def is_told(place: int, stride: int) -> bool:
    """Whether a text's block in this place is told where one of `stride` is."""
    return (place + 1) % stride == 0


@dataclass(frozen=True, slots=True)
class News:
    """Hashes of one kind that have come and gone since the last news; all that there are where `is_whole`.

    stride: one of so many blocks of each text is told.
    """

    is_whole: bool
    stride: int
    added: bytes
    removed: bytes

    def __bool__(self) -> bool:
        """Whether there are any."""
        return bool(self.is_whole or self.added or self.removed)


class _Books:
    """The blocks of one kind. Several pages may hold the same block."""

    def __init__(self) -> None:
        self.stride = 1
        self._counts: dict[bytes, tuple[int, int]] = {}  # How many hold a block, and its place in the text.
        self._num_told = 0
        self._num_then = 0  # There were so many when the stride was set.
        self._news: dict[bytes, bool] = {}  # Whether it has come or gone.
        self._is_whole = True  # The next news are.

    def add(self, block: bytes, place: int) -> None:
        count, _ = self._counts.get(block, (0, place))
        self._counts[block] = count + 1, place
        if not count and is_told(place, self.stride):
            self._num_told += 1
            self._note(block, has_come=True)
            if self._num_told > MOST_BLOCKS:
                self._set_stride()

    def remove(self, block: bytes) -> None:
        count, place = self._counts.pop(block)
        if count > 1:
            self._counts[block] = count - 1, place
        elif is_told(place, self.stride):
            self._num_told -= 1
            self._note(block, has_come=False)
        if self.stride > 1 and len(self._counts) <= self._num_then // 2:
            self._set_stride()

    def _note(self, block: bytes, *, has_come: bool) -> None:
        if self._news.get(block, has_come) is has_come:
            self._news[block] = has_come
        else:
            del self._news[block]  # Nobody has heard of it.

    def _set_stride(self) -> None:
        """Tell as many blocks of each text as may be told."""
        self.stride, self._is_whole, self._num_then = 1, True, len(self._counts)
        while True:
            self._num_told = sum(is_told(place, self.stride) for _, place in self._counts.values())
            if self._num_told <= MOST_BLOCKS:
                return
            self.stride *= 2

    def begin(self) -> None:
        self._is_whole = True

    def take(self) -> News:
        news, self._news = self._news, {}
        is_whole, self._is_whole = self._is_whole, False
        if is_whole:
            told = (block for block, (_, place) in self._counts.items() if is_told(place, self.stride))
            return News(True, self.stride, b"".join(told), b"")
        added = b"".join(block for block, has_come in news.items() if has_come)
        return News(False, self.stride, added, b"".join(block for block, has_come in news.items() if not has_come))


class Holdings:
    """The blocks that an engine's cache and its store hold. May be told and asked by any thread."""

    def __init__(self, on_stored: Callable[[], None] = lambda: None) -> None:
        """on_stored: hears, in whatever thread, that something has come into the store or gone from it."""
        self.fingerprint = b""  # What tells the model from others, where chats are kept on disk: see root_of.
        self.read_share = COPY_SHARE  # What a stored token takes to be brought back, of the time to compute it.
        self._lock = threading.Lock()
        self._books: dict[Kind, _Books] = {"cached": _Books(), "stored": _Books()}
        self._on_stored = on_stored

    def add(self, kind: Kind, blocks: Sequence[bytes], first_place: int) -> None:
        """Blocks that follow on one another in a text, the first of them in this place, can be found there now."""
        with self._lock:
            for place, block in enumerate(blocks, first_place):
                self._books[kind].add(block, place)
        if kind == "stored":
            self._on_stored()

    def remove(self, kind: Kind, blocks: Iterable[bytes]) -> None:
        """Blocks that were added can't be found there any more."""
        with self._lock:
            for block in blocks:
                self._books[kind].remove(block)
        if kind == "stored":
            self._on_stored()

    def begin(self) -> None:
        """Have the next news be all that there is."""
        with self._lock:
            for books in self._books.values():
                books.begin()

    def take(self) -> tuple[News, News]:
        """What is new in the cache, and in the store."""
        with self._lock:
            return self._books["cached"].take(), self._books["stored"].take()
