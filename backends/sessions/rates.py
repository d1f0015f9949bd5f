"""How long a token takes to be read from a folder, and to be computed: whichever takes less is done."""

import os
import time

import numpy as np

from tightrope.backends.protocol import Backend, Chunk
from tightrope.backends.sessions.folder import Folder
from tightrope.backends.sessions.piece import Piece, root_name

SAMPLE_BYTES = 8 << 20
LEAST_S = 0.2  # A step that takes so long tells what its tokens cost.
FIRST_STEP = 16  # Tokens.


def read_seconds(folder: Folder) -> float:
    """Seconds to read and check a byte from the disk itself; 0 where nothing can be read or written to find out."""
    sample = np.frombuffer(os.urandom(SAMPLE_BYTES), np.uint8)  # Some file systems pack what can be packed.
    root = root_name("how fast is this disk", os.urandom(16))  # Others may measure it, too.
    piece = Piece(root, root, 0, np.zeros(1, np.int32), sample.nbytes)
    try:
        folder.write(piece, sample, b"", "")
    except OSError:
        return _read_seconds_of_largest(folder)
    seconds = _timed(folder, piece, b"")
    folder.remove(piece.name)
    return seconds


def _read_seconds_of_largest(folder: Folder) -> float:
    largest = max(folder.scan(), key=lambda stored: stored.size, default=None)
    return 0.0 if largest is None else _timed(folder, largest.piece, largest.header.fingerprint)


def _timed(folder: Folder, piece: Piece, fingerprint: bytes) -> float:
    folder.leave_memory(piece.name)
    began_s = time.perf_counter()
    payload = folder.read(piece, fingerprint)
    return (time.perf_counter() - began_s) / max(1, piece.num_bytes) if payload is not None else 0.0


def compute_seconds(backend: Backend) -> float:
    """Seconds to compute a token of a prompt: of its first ones, than which none takes less."""
    usage, most = backend.kv.usage(), backend.capabilities.max_step_tokens
    num_tokens = min(FIRST_STEP, most, usage.capacity)
    while True:
        seconds = min(_step_seconds(backend, num_tokens) for _ in range(2))
        larger = min(4 * num_tokens, most, usage.capacity, backend.card.max_model_len)
        if seconds >= LEAST_S or larger <= num_tokens:
            return seconds / num_tokens
        num_tokens = larger


def _step_seconds(backend: Backend, num_tokens: int) -> float:
    token_ids = [token % backend.tokenizer.vocab_size for token in range(num_tokens)]
    backend.kv.open(-1, token_ids, "", reuse="nothing")
    try:
        assert backend.kv.reserve(-1, num_tokens), "an empty cache has room"
        began_s = time.perf_counter()
        backend.forward([Chunk(-1, token_ids, 0, "none")])
        return time.perf_counter() - began_s
    finally:
        backend.kv.close(-1, keep=False)
