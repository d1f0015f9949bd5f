"""The file of a piece: what it is, its bytes, and a checksum over all. A file that is anything else is no piece.

8 bytes   MAGIC, whose last byte is the format's number
4 bytes   length of the header, little endian
header    msgpack of Header
bytes     as many as the header says
32 bytes  SHA-256 of everything before
"""

import os
import struct
from hashlib import sha256

import msgspec
import numpy as np

from tightrope.backends.sessions.piece import Bytes, Piece

FORMAT = 2
MAGIC = b"tr-run\0" + bytes([FORMAT])
MAX_HEADER = 16 << 20  # Four bytes for each token of the longest texts that are stored in one piece.
DIGEST_BYTES = 32
_PREFIX = struct.Struct("<8sI")


class Header(msgspec.Struct, frozen=True):
    """See Piece. fingerprint: what tells the model, and how it caches, from all others; model: what people call it."""

    fingerprint: bytes
    model: str
    root: bytes
    parent: bytes
    start: int
    token_ids: bytes  # int32, little endian
    num_bytes: int
    is_whole: bool
    about: bytes


def write_piece(file: int, piece: Piece, payload: Bytes, fingerprint: bytes, model: str) -> int:
    """Write a piece to an open file; returns how many bytes that were. Raises OSError."""
    header = msgspec.msgpack.encode(
        Header(
            fingerprint,
            model,
            piece.root,
            piece.parent,
            piece.start,
            piece.token_ids.astype("<i4").tobytes(),
            payload.nbytes,
            piece.is_whole,
            piece.about,
        )
    )
    digest, size = sha256(), 0
    for part in (_PREFIX.pack(MAGIC, len(header)), header, payload.data):
        digest.update(part)
        size += _write_all(file, part)
    return size + _write_all(file, digest.digest())


def _write_all(file: int, data: bytes | memoryview) -> int:
    left = memoryview(data)
    while left:
        left = left[os.write(file, left) :]
    return len(data)


def read_header(file: int, size: int) -> tuple[Header, Piece] | None:
    """What an open file of `size` bytes says that it is; None where it can't be. Its bytes aren't looked at.

    Raises OSError.
    """
    prefix = os.pread(file, _PREFIX.size, 0)
    if len(prefix) < _PREFIX.size:
        return None
    magic, length = _PREFIX.unpack(prefix)
    if magic != MAGIC or length > min(MAX_HEADER, size):
        return None
    try:
        header = msgspec.msgpack.decode(os.pread(file, length, _PREFIX.size), type=Header)
    except msgspec.MsgspecError:
        return None
    is_sound = len(header.token_ids) % 4 == 0 < len(header.token_ids) and header.start >= 0 and header.num_bytes >= 0
    if not is_sound or size != _PREFIX.size + length + header.num_bytes + DIGEST_BYTES:
        return None
    if not 0 < len(header.parent) <= 64:  # Longer ones are no keys of the hash.
        return None
    token_ids = np.frombuffer(header.token_ids, "<i4").astype(np.int32)
    return header, Piece(
        header.root, header.parent, header.start, token_ids, header.num_bytes, header.is_whole, header.about
    )


def is_stored_otherwise(file: int, size: int, piece: Piece, fingerprint: bytes) -> bool:
    """Whether a file holds the tokens of a piece, with other bytes of the model's: who wrote them had cached more."""
    found = read_header(file, size)
    if found is None or found[1].name != piece.name or found[0].fingerprint != fingerprint:
        return False
    return (found[1].num_bytes, found[1].about) != (piece.num_bytes, piece.about)


def read_payload(file: int, size: int, piece: Piece, fingerprint: bytes) -> Bytes | None:
    """The bytes of `piece` from an open file of `size` bytes; None unless it holds that piece, and every bit is right.

    Raises OSError, and MemoryError where there is no room for them.
    """
    found = read_header(file, size)
    if found is None or found[1].name != piece.name or found[0].fingerprint != fingerprint:
        return None
    if found[1].num_bytes != piece.num_bytes:  # The checksum would be right, and its bytes begin elsewhere.
        return None
    head = os.pread(file, size - DIGEST_BYTES - piece.num_bytes, 0)
    payload = np.empty(piece.num_bytes, np.uint8)
    view = payload.data
    with open(file, "rb", buffering=0, closefd=False) as raw:
        raw.seek(len(head))
        while view:
            num_read = raw.readinto(view)
            if not num_read:
                return None
            view = view[num_read:]
        digest = sha256(head)
        digest.update(payload.data)
        return payload if digest.digest() == raw.read(DIGEST_BYTES) else None
