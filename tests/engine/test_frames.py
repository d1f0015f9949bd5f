"""Frames between processes: whole ones are read as they were written, and a stream that ends within one has ended."""

import asyncio
from io import BytesIO

import pytest

from tightrope.engine.process.frames import FrameTooLong, pack, read_frame, receive_frame

pytestmark = pytest.mark.quick


def test_frames_are_read_one_by_one_as_they_were_written():
    bodies = [b"one", b"", b"\x00" * 1000]
    stream = BytesIO(b"".join(map(pack, bodies)))

    assert [read_frame(stream) for _ in range(4)] == [*bodies, None]


@pytest.mark.parametrize("missing", [1, 3, 4, 6])
def test_a_stream_that_ends_within_a_frame_has_ended(missing: int):
    assert read_frame(BytesIO(pack(b"abc")[:-missing])) is None


async def test_a_frame_above_what_may_be_sent_is_not_waited_for():
    reader = asyncio.StreamReader()
    reader.feed_data(pack(b"abc") + pack(b"abcd")[:4])

    assert await receive_frame(reader, 3) == b"abc"
    with pytest.raises(FrameTooLong, match="a frame of 4 bytes"):
        await receive_frame(reader, 3)
