"""A piece of what a model has computed for a text, and its name.

A piece is the cached tokens start .. start + n of some text, with the bytes that a model has stored for them. These
bytes depend on every token before them, on the model, on how it rotates and caches, and on nothing else; so a piece is
named by a hash of all that. Whoever finds a piece by its name has found the right bytes, whoever wrote them.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field
from hashlib import blake2b
from typing import Any

import numpy as np

from tightrope.backends.removals import num_left

Ints = np.ndarray[Any, np.dtype[np.int32]]
Bytes = np.ndarray[Any, np.dtype[np.uint8]]

NAME_BYTES = 20


def root_name(*parts: str | bytes) -> bytes:
    """The name under which all texts begin that may share pieces: a hash of `parts`, none of which can pass for two."""
    digest = blake2b(digest_size=NAME_BYTES)
    for part in parts:
        raw = part.encode() if isinstance(part, str) else part
        digest.update(b"%d:" % len(raw) + raw)
    return digest.digest()


@dataclass(frozen=True, slots=True, eq=False)
class Piece:
    """What is known of a piece without its bytes.

    root: see root_name. parent: the name of the piece that ends where this one begins, or the root. is_whole: a model
    can go on from its end alone, as what is stored is a state and not a row for each token. about: what the writer
    needs to know of the bytes.
    """

    root: bytes
    parent: bytes
    start: int
    token_ids: Ints  # [n]
    num_bytes: int
    is_whole: bool = False
    about: bytes = b""
    name: bytes = field(init=False)

    def __post_init__(self) -> None:
        digest = blake2b(self.token_ids.astype("<i4").tobytes(), digest_size=NAME_BYTES, key=self.parent)
        digest.update(b"whole" if self.is_whole else b"")
        object.__setattr__(self, "name", digest.digest())

    @property
    def stop(self) -> int:
        return self.start + len(self.token_ids)

    def begins(self, other: "Piece") -> bool:
        """Whether all that this piece is good for, `other` is good for as well."""
        if self.parent != other.parent or self.is_whole or other.is_whole:
            return self.name == other.name
        return num_common(self.token_ids, other.token_ids) == len(self.token_ids)


def tokens_of(text: Sequence[Piece]) -> Ints:
    """Those of pieces that stand behind one another."""
    return np.concatenate([piece.token_ids for piece in text])


def has_moved_on(window: Ints, token_ids: Ints) -> bool:
    """Whether `token_ids` is a later window of a chat, which has lost some of what this one has, but not most."""
    return 2 * num_left(window, token_ids) >= len(window)


def num_common(a: Ints, b: Ints) -> int:
    """How many leading tokens are equal."""
    size = min(len(a), len(b))
    differ = a[:size] != b[:size]
    place = int(differ.argmax()) if size else 0
    return place if size and differ[place] else size
