"""The token ids of texts that were read lately: a chat comes again with every turn, and only its end is new."""

import threading
from array import array
from collections.abc import Callable, Hashable

MOST_BYTES = 8 << 20  # Of text and token ids together.


class ReadTexts:
    """What was read last, up to a number of bytes. Safe to call from any thread."""

    def __init__(self, most_bytes: int = MOST_BYTES) -> None:
        self._most_bytes = most_bytes
        self._lock = threading.Lock()
        self._num_bytes = 0
        self._known: dict[tuple[bytes, Hashable], array[int]] = {}  # They stand last used last.

    def token_ids(self, text: bytes, how: Hashable, read: Callable[[], list[int]]) -> list[int]:
        """The token ids of a text, which `read` gives where they aren't known; `how` tells apart ways to read it."""
        key = text, how
        with self._lock:
            known = self._known.pop(key, None)
            if known is not None:
                self._known[key] = known
                return known.tolist()
        token_ids = read()
        self._keep(key, array("i", token_ids))
        return token_ids

    def _keep(self, key: tuple[bytes, Hashable], token_ids: "array[int]") -> None:
        size = _size(key, token_ids)
        with self._lock:
            if key in self._known or size > self._most_bytes:  # Another thread may have read it meanwhile.
                return
            self._known[key] = token_ids
            self._num_bytes += size
            while self._num_bytes > self._most_bytes:
                oldest = next(iter(self._known))
                self._num_bytes -= _size(oldest, self._known.pop(oldest))


def _size(key: tuple[bytes, Hashable], token_ids: "array[int]") -> int:
    return len(key[0]) + token_ids.itemsize * len(token_ids)
