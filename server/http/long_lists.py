"""Answers with lists that may have millions of items."""

import asyncio
from collections.abc import Iterable, Mapping
from itertools import islice

import msgspec
from fastapi import Response

SLICE = 2000  # So many items take some milliseconds.


async def json_list(items: Iterable[object], slice_size: int = SLICE) -> bytes:
    """The list as JSON, made slice by slice of so many items, between which other requests are answered."""
    slices: list[bytes] = []
    rest = iter(items)
    while part := list(islice(rest, slice_size)):
        slices.append(msgspec.json.encode(part)[1:-1])
        await asyncio.sleep(0)
    return b"[" + b",".join(slices) + b"]"


def json_answer(content: bytes | Mapping[str, object]) -> Response:
    """An answer that is JSON already, or an object, of which values in bytes are."""
    if not isinstance(content, bytes):
        raw = {name: msgspec.Raw(value) if isinstance(value, bytes) else value for name, value in content.items()}
        content = msgspec.json.encode(raw)
    return Response(content, media_type="application/json")
