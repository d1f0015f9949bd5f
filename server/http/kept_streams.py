"""Streams that outlive their connection: a client that was cut off comes back and reads on.

Such a stream is written by a task of its own into a buffer, and read from there, by whoever began it. Without a reader
it is kept, and written, for a bounded time; all of them together have a bounded number of bytes.
"""

import asyncio
import hmac
import logging
import secrets
import time
from array import array
from bisect import bisect_left
from collections.abc import AsyncGenerator, Coroutine, Iterable
from contextlib import aclosing, suppress
from typing import Any, TypeVar

from tightrope.engine.errors import InvalidRequest
from tightrope.server.http.errors import Column, StreamNotFound
from tightrope.server.http.hangup import unless
from tightrope.server.http.sse import PING_S

log = logging.getLogger("tightrope.server")

OVERHEAD_BYTES = 4096  # A stream without events is counted as so many.
AT_ONCE = 1 << 16  # About so many bytes are written in one piece to a client that has some to catch up on.
PING = b": ping\n\n"

T = TypeVar("T")


class KeptStream:
    """One stream, as bytes. Its events are numbered from 1; comments among them have no number.

    A place in it counts the bytes before it, those that are not kept any more among them.
    """

    def __init__(self, owner: bytes, column: Column, *, is_lines: bool, conversation: str | None) -> None:
        """is_lines: its events are lines of JSON, which have no ids. conversation: its client's name for it."""
        self.id = secrets.token_urlsafe(12)
        self.owner, self.column, self.is_lines, self.conversation = owner, column, is_lines, conversation
        self.num_readers = 0
        self.is_over = False
        self.is_silent = False  # Nothing has come since the last look.
        self.began_s = time.time()
        self.ended_s = 0.0  # It is 0 until then.
        self.task: asyncio.Task[None] | None = None
        self.expiry: asyncio.TimerHandle | None = None
        self.pinger: asyncio.TimerHandle | None = None
        self._mark = b"\n" if is_lines else b"\n\n"
        self._buffer = bytearray()
        self._first = 0  # The place of the first byte that is kept.
        self._ends = array("q")  # Places behind events.
        self._changed = asyncio.Event()

    @property
    def num_bytes(self) -> int:
        """What it takes."""
        return OVERHEAD_BYTES + len(self._buffer) + self._ends.itemsize * len(self._ends)

    @property
    def end_place(self) -> int:
        return self._first + len(self._buffer)

    def add(self, piece: bytes) -> None:
        """Add a piece of whole events, of which it may hold several, and comments."""
        for event in piece.split(self._mark):
            if not event:
                continue
            is_comment = event.startswith(b":") and not self.is_lines
            if not (is_comment or self.is_lines):
                self._buffer += b"id: %b.%d\n" % (self.id.encode(), len(self._ends) + 1)
            self._buffer += event + self._mark
            if not is_comment:
                self._ends.append(self.end_place)
        self.is_silent = False
        self._wake()

    def end(self) -> None:
        """Nothing is added any more."""
        if not self.is_over:
            self.is_over, self.ended_s = True, time.time()
        if self.pinger is not None:
            self.pinger.cancel()
        self._wake()

    async def unless_over(self, work: Coroutine[Any, Any, T]) -> T:
        """Await `work`, but cancel it and raise ClientGone as soon as the stream is stopped."""
        return await unless(self._until_over(), work)

    async def _until_over(self) -> None:
        while not self.is_over:
            await self._changed.wait()

    def drop(self, num_bytes: int) -> None:
        """Forget so many of the first bytes, but never the last event."""
        place = min(self._first + num_bytes, self._ends[-2] if len(self._ends) > 1 else 0)
        if place > self._first:
            place = self._ends[bisect_left(self._ends, place)]  # Of no event a part is left.
            del self._buffer[: place - self._first]
            self._first = place

    def behind(self, num_events: int) -> int:
        """The place behind so many events. Raises InvalidRequest where there aren't so many."""
        if num_events > len(self._ends):
            counts = f"the stream has {len(self._ends)} events so far, and not {num_events}"
            raise InvalidRequest(f"Last-Event-ID: {counts}", "Last-Event-ID")
        return self._ends[num_events - 1] if num_events else 0

    def check(self, place: int) -> None:
        """Raises StreamNotFound or InvalidRequest where what is behind a place can't be given."""
        if place < self._first:
            raise StreamNotFound(f"the first {self._first} bytes of the stream are not kept any more")
        if place > self.end_place:
            raise InvalidRequest(f"from: the stream has {self.end_place} bytes so far, and not {place}", "from")

    async def read(self, place: int) -> AsyncGenerator[bytes, None]:
        """What is behind a place, as it comes, in whole events up to the end. Raises StreamNotFound for lost ones."""
        while True:
            changed = self._changed
            while place < self.end_place:
                self.check(place)
                piece = self._piece(place - self._first)
                place += len(piece)
                yield piece
            if self.is_over:
                return
            await changed.wait()

    def _piece(self, start: int) -> bytes:
        """Some events, or the rest of one that `start` is in the middle of."""
        end = self._buffer.rfind(self._mark, start, start + AT_ONCE)
        if end < 0:
            end = self._buffer.find(self._mark, start)
        return bytes(self._buffer[start : end + len(self._mark) if end >= 0 else None])

    def _wake(self) -> None:
        self._changed.set()
        self._changed = asyncio.Event()


class KeptStreams:
    """All that are kept. Belongs to one event loop."""

    def __init__(self, max_bytes: int, keep_s: float) -> None:
        """max_bytes: of all streams together. keep_s: how long a stream that nobody reads is kept, and written."""
        self._max_bytes = max_bytes
        self._keep_s = keep_s
        self._streams: dict[str, KeptStream] = {}  # The oldest stands first.
        self.num_bytes = 0

    def __len__(self) -> int:
        return len(self._streams)

    def open(
        self, owner: bytes, column: Column, *, is_lines: bool = False, conversation: str | None = None
    ) -> KeptStream:
        """A stream that nothing is in yet. One of the same conversation is stopped: each has one at most."""
        for earlier in self._of(owner, conversation):
            self.end(earlier)
        stream = KeptStream(owner, column, is_lines=is_lines, conversation=conversation)
        self._streams[stream.id] = stream
        self.num_bytes += stream.num_bytes
        return stream

    def write(self, stream: KeptStream, pieces: AsyncGenerator[bytes, None]) -> None:
        """Keep what `pieces` gives: whole events, of which one piece may hold several. It raises nothing."""
        stream.task = asyncio.create_task(self._write(stream, pieces), name=f"stream {stream.id}")
        self._expire_later(stream)
        if not stream.is_lines:
            self._ping(stream)

    def find(self, stream_id: str, owner: bytes) -> KeptStream:
        """The stream of that id. Raises StreamNotFound for one that isn't kept, or that another key has begun."""
        stream = self._streams.get(stream_id)
        if stream is None or not hmac.compare_digest(stream.owner, owner):
            raise StreamNotFound(f"there is no stream {stream_id[:100]!r}, or it is not kept any more")
        return stream

    def of_conversation(self, conversation: str, owner: bytes) -> KeptStream:
        """The stream that its client gave this name. Raises StreamNotFound as `find` does."""
        for stream in self._of(owner, conversation):
            return stream
        raise StreamNotFound(f"there is no stream of conversation {conversation[:100]!r}, or it is not kept any more")

    def of_conversations(self, names: Iterable[str], owner: bytes) -> list[KeptStream]:
        """Those of these conversations; one that goes on with ::MODEL belongs to that without."""
        wanted = set(names)
        named = (stream for stream in self._streams.values() if stream.conversation is not None)
        mine = [stream for stream in named if hmac.compare_digest(stream.owner, owner)]
        return [s for s in mine if s.conversation in wanted or (s.conversation or "").partition("::")[0] in wanted]

    async def read(self, stream: KeptStream, place: int = 0) -> AsyncGenerator[bytes, None]:
        """What is behind a place; closing it leaves the stream as it is. Raises StreamNotFound."""
        stream.num_readers += 1
        if stream.expiry is not None:
            stream.expiry.cancel()
        try:
            async with aclosing(stream.read(place)) as pieces:
                async for piece in pieces:
                    yield piece
        finally:
            stream.num_readers -= 1
            self._expire_later(stream)

    def end(self, stream: KeptStream) -> None:
        """Stop what is written, and forget it."""
        if self._streams.pop(stream.id, None) is None:
            return
        self.num_bytes -= stream.num_bytes
        if stream.expiry is not None:
            stream.expiry.cancel()
        if stream.task is not None:
            stream.task.cancel()
        stream.end()

    async def close(self) -> None:
        """End all."""
        tasks = [stream.task for stream in self._streams.values() if stream.task is not None]
        for stream in list(self._streams.values()):
            self.end(stream)
        with suppress(asyncio.CancelledError):
            await asyncio.gather(*tasks, return_exceptions=True)

    def _of(self, owner: bytes, conversation: str | None) -> list[KeptStream]:
        if conversation is None:
            return []
        named = [stream for stream in self._streams.values() if stream.conversation == conversation]
        return [stream for stream in named if hmac.compare_digest(stream.owner, owner)]

    async def _write(self, stream: KeptStream, pieces: AsyncGenerator[bytes, None]) -> None:
        async with aclosing(pieces):
            async for piece in pieces:
                self._add(stream, piece)
        stream.end()

    def _add(self, stream: KeptStream, piece: bytes) -> None:
        if stream.id not in self._streams:
            return  # It was stopped.
        self.num_bytes -= stream.num_bytes
        stream.add(piece)
        self.num_bytes += stream.num_bytes
        if self.num_bytes > self._max_bytes:
            self._make_room(stream)

    def _ping(self, stream: KeptStream) -> None:
        """Add a comment to a stream that stays silent: who counts bytes has to find all that was sent."""
        if stream.is_over:
            return
        if stream.is_silent:
            self._add(stream, PING)
        stream.is_silent = True
        stream.pinger = asyncio.get_running_loop().call_later(PING_S / 2, self._ping, stream)

    def _expire_later(self, stream: KeptStream) -> None:
        if stream.num_readers == 0 and stream.id in self._streams:
            stream.expiry = asyncio.get_running_loop().call_later(self._keep_s, self._expire, stream)

    def _expire(self, stream: KeptStream) -> None:
        if not stream.is_over:
            log.info("stream is given up: id=%s nobody has read it for_s=%g", stream.id, self._keep_s)
        self.end(stream)

    def _make_room(self, growing: KeptStream) -> None:
        """Forget what nobody reads, first of all what has ended; if that isn't enough, the beginning of this one."""
        others = [stream for stream in self._streams.values() if stream is not growing and not stream.num_readers]
        for stream in sorted(others, key=lambda stream: not stream.is_over):
            if self.num_bytes <= self._max_bytes:
                return
            self.end(stream)
        if self.num_bytes > self._max_bytes:
            self.num_bytes -= growing.num_bytes
            growing.drop(self.num_bytes + growing.num_bytes - self._max_bytes)
            self.num_bytes += growing.num_bytes
