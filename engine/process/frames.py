"""Frames between two processes: a 4-byte little-endian length and that many bytes. What they say is for others to read.

End-of-file means that the other side is gone.
"""

import struct
from typing import TYPE_CHECKING, BinaryIO

if TYPE_CHECKING:  # The processes that read grammars and templates start sooner without an event loop.
    from asyncio import StreamReader

_HEADER = struct.Struct("<I")


class FrameTooLong(ValueError):
    """The other side announces more than it may send."""


def pack(body: bytes) -> bytes:
    """One frame, header included."""
    return _HEADER.pack(len(body)) + body


def read_frame(stream: BinaryIO) -> bytes | None:
    """The next frame's body, waited for; None at the end of the stream, also of one that ends within a frame."""
    header = stream.read(_HEADER.size)
    if len(header) < _HEADER.size:
        return None
    (num_bytes,) = _HEADER.unpack(header)
    body = stream.read(num_bytes)
    return body if len(body) == num_bytes else None


async def receive_frame(reader: "StreamReader", most: int) -> bytes:
    """The next frame's body. Raises FrameTooLong for one above `most` bytes, and IncompleteReadError at the end."""
    (num_bytes,) = _HEADER.unpack(await reader.readexactly(_HEADER.size))
    if num_bytes > most:
        raise FrameTooLong(f"a frame of {num_bytes} bytes")
    return await reader.readexactly(num_bytes)
