"""Streams that outlive their connection: a client that was cut off comes back and reads on.

Such a stream is written by a task of its own into a list of events, and read from there, by whoever began it. Without a
reader it is kept, and written, for a bounded time; all of them together have a bounded number of bytes.
"""

import asyncio
import hmac
import logging
import secrets
from collections.abc import AsyncGenerator
from contextlib import aclosing, suppress

from tightrope.engine.errors import InvalidRequest
from tightrope.server.http.errors import Column, StreamNotFound

log = logging.getLogger("tightrope.server")

OVERHEAD_BYTES = 4096  # A stream without events is counted as so many.
AT_ONCE = 64  # So many events are written in one piece to a client that has some to catch up on.


class KeptStream:
    """One stream. Its events are numbered from 1; a reader says how many it has had."""

    def __init__(self, owner: bytes, column: Column, *, is_lines: bool) -> None:
        """is_lines: its events are lines of JSON, which can't be given an id."""
        self.id = secrets.token_urlsafe(12)
        self.owner, self.column, self.is_lines = owner, column, is_lines
        self.num_bytes = OVERHEAD_BYTES
        self.num_readers = 0
        self.is_over = False
        self.task: asyncio.Task[None] | None = None
        self.expiry: asyncio.TimerHandle | None = None
        self._events: list[bytes] = []
        self._num_dropped = 0  # So many of the first are gone.
        self._comment = b""  # It is for those who read now.
        self._changed = asyncio.Event()

    @property
    def num_events(self) -> int:
        return self._num_dropped + len(self._events)

    def add(self, event: bytes) -> int:
        """Add an event; returns its bytes. A comment is shown to those who read now, and not kept: it has none."""
        if event.startswith(b":") and not self.is_lines:
            self._comment, event = event, b""
        else:
            if not self.is_lines:
                event = b"id: %b.%d\n%b" % (self.id.encode(), self.num_events + 1, event)
            self._events.append(event)
            self.num_bytes += len(event)
        self._wake()
        return len(event)

    def end(self) -> None:
        """Nothing is added any more."""
        self.is_over = True
        self._wake()

    def drop(self, num_bytes: int) -> int:
        """Forget the first events, of so many bytes or more, but never the last one; returns their bytes."""
        count = dropped = 0
        while dropped < num_bytes and count < len(self._events) - 1:
            dropped += len(self._events[count])
            count += 1
        del self._events[:count]
        self._num_dropped += count
        self.num_bytes -= dropped
        return dropped

    async def read(self, num_read: int) -> AsyncGenerator[bytes, None]:
        """The events behind the first `num_read`, as they come, up to the end. Raises StreamNotFound for lost ones."""
        while True:
            changed, comment = self._changed, self._comment
            while num_read < self.num_events:
                self.check(num_read)
                place = num_read - self._num_dropped
                events = self._events[place : place + AT_ONCE]
                num_read += len(events)
                yield b"".join(events)
            if self.is_over:
                return
            await changed.wait()
            if self._comment is not comment:
                yield self._comment

    def check(self, num_read: int) -> None:
        """Raises StreamNotFound or InvalidRequest where the event behind the first `num_read` can't be given."""
        if num_read < self._num_dropped:
            raise StreamNotFound(f"the first {self._num_dropped} events of the stream are not kept any more")
        if num_read > self.num_events:
            raise InvalidRequest(f"from: the stream has {self.num_events} events so far, and not {num_read}", "from")

    def _wake(self) -> None:
        self._changed.set()
        self._changed = asyncio.Event()


class KeptStreams:
    """All that are kept. Belongs to one event loop."""

    def __init__(self, max_bytes: int, keep_s: float) -> None:
        """max_bytes: of all events together. keep_s: how long a stream that nobody reads is kept, and written."""
        self._max_bytes = max_bytes
        self._keep_s = keep_s
        self._streams: dict[str, KeptStream] = {}  # The oldest stands first.
        self.num_bytes = 0

    def __len__(self) -> int:
        return len(self._streams)

    def begin(
        self, pieces: AsyncGenerator[bytes, None], owner: bytes, column: Column, *, is_lines: bool = False
    ) -> KeptStream:
        """Keep what `pieces` gives: whole events, of which one piece may hold several. It raises nothing."""
        stream = KeptStream(owner, column, is_lines=is_lines)
        self._streams[stream.id] = stream
        self.num_bytes += stream.num_bytes
        stream.task = asyncio.create_task(self._write(stream, pieces), name=f"stream {stream.id}")
        self._expire_later(stream)
        return stream

    def find(self, stream_id: str, owner: bytes) -> KeptStream:
        """The stream of that id. Raises StreamNotFound for one that isn't kept, or that another key has begun."""
        stream = self._streams.get(stream_id)
        if stream is None or not hmac.compare_digest(stream.owner, owner):
            raise StreamNotFound(f"there is no stream {stream_id[:100]!r}, or it is not kept any more")
        return stream

    async def read(self, stream: KeptStream, num_read: int = 0) -> AsyncGenerator[bytes, None]:
        """The events behind the first `num_read`; closing it leaves the stream as it is. Raises StreamNotFound."""
        stream.num_readers += 1
        if stream.expiry is not None:
            stream.expiry.cancel()
        try:
            async with aclosing(stream.read(num_read)) as events:
                async for event in events:
                    yield event
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

    async def _write(self, stream: KeptStream, pieces: AsyncGenerator[bytes, None]) -> None:
        mark = b"\n" if stream.is_lines else b"\n\n"
        async with aclosing(pieces):
            async for piece in pieces:
                for event in piece.split(mark):
                    if event:
                        self.num_bytes += stream.add(event + mark)
                if self.num_bytes > self._max_bytes:
                    self._make_room(stream)
        stream.end()

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
        self.num_bytes -= growing.drop(self.num_bytes - self._max_bytes)
