"""Pieces of texts whose bytes can be told from their names, so that whoever reads them knows what is right."""

from collections.abc import Sequence

import numpy as np

from tightrope.backends.sessions.piece import Bytes, Piece, root_name
from tightrope.backends.sessions.store import RunStore

ROOT = root_name("a test")
FINGERPRINT = b"the weights of a test"


def piece_of(
    token_ids: Sequence[int], *, after: Piece | None = None, num_bytes: int = 1000, is_whole: bool = False
) -> Piece:
    """A piece at the start of a text, or behind another."""
    parent, start = (ROOT, 0) if after is None else (after.name, after.stop)
    return Piece(ROOT, parent, start, np.asarray(token_ids, np.int32), num_bytes, is_whole)


def bytes_of(piece: Piece) -> Bytes:
    """What a model would have stored for a piece."""
    return np.random.default_rng(list(piece.name)).integers(0, 256, piece.num_bytes, np.uint8)


def found(store: RunStore, token_ids: Sequence[int], root: bytes = ROOT) -> int:
    """How many tokens a store finds, all of whose bytes are right."""
    length = 0
    for match in store.longest(root, np.asarray(token_ids, np.int32)):
        payload = store.read(match.piece)
        if payload is None:
            break
        assert np.array_equal(payload, bytes_of(match.piece))
        length += match.length
    return length
