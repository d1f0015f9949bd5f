"""The ingress's side of one replica: a connection that is made anew whenever it breaks, and what is under way on it."""

import asyncio
import logging
import time
from asyncio import StreamReader, StreamWriter
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass, field
from typing import Protocol

from msgspec import MsgspecError

from tightrope.engine.errors import BackendFailed, EngineError, EngineUnavailable, InvalidRequest
from tightrope.engine.process.exchange import Answer, Exchange
from tightrope.engine.process.frames import FrameTooLong, receive_frame
from tightrope.engine.process.stream import Stream
from tightrope.engine.process.wire import (
    MAX_FRAME_BYTES,
    Alive,
    Cancel,
    Detokenize,
    LoadAdapter,
    Ready,
    Submit,
    ToEngine,
    Tokenize,
    UnloadAdapter,
)
from tightrope.server.cluster.digests import Digest
from tightrope.server.cluster.handshake import greet_replica
from tightrope.server.cluster.messages import Draining, decode_from_replica, encode
from tightrope.server.cluster.relay import BEAT_S

log = logging.getLogger("tightrope.ingress")

SILENT_BEATS = 5  # A replica that has missed so many is taken for gone; ticks of this process are counted.
MAX_PAUSE_S = 5.0


@dataclass(frozen=True, slots=True)
class Place:
    """Where a replica listens. name: what Ray calls it. secret: whoever knows it may use the replica."""

    name: str
    host: str
    port: int
    secret: bytes = field(repr=False)


class Owner(Protocol):
    """Who asks replicas."""

    def on_up(self, link: "Link") -> None:
        """The replica takes requests."""

    def on_down(self, link: "Link") -> None:
        """It has gone, or its connection; what it was at stands in `link.exchange`."""

    def on_draining(self, link: "Link") -> None:
        """It will end, and is to be asked nothing more."""

    def on_digest(self, link: "Link", digest: Digest) -> None:
        """It tells which tokens it holds."""


class Lost(EngineUnavailable):
    """The replica went before it had answered."""


class Link:
    """One replica, as long as Ray says that it runs. Belongs to one event loop."""

    def __init__(self, place: Place, owner: Owner, digest_key: bytes, clock: Callable[[], float]) -> None:
        self.place = place
        self.is_draining = False
        self._owner = owner
        self._digest_key = digest_key
        self._clock = clock
        self._writer: StreamWriter | None = None
        self._num_silent = 0
        self._is_missed = False  # It is away, and that was told.
        self._to_read: dict[str, int] = {}
        self.exchange = Exchange(self.send, lambda call_id: False, clock)
        self._task = asyncio.create_task(self._run(), name=f"link to {place.name}")

    @property
    def name(self) -> str:
        return self.place.name

    @property
    def is_up(self) -> bool:
        """Whether it has a model that takes requests, as far as is known."""
        return self._writer is not None

    async def close(self) -> None:
        self._task.cancel()
        with suppress(asyncio.CancelledError):
            await self._task

    # ---- what it is asked ----

    def submit(self, stream: Stream, num_tokens: int) -> None:
        """Ask for an answer, or for what is missing of it; about so many tokens are to be read for that."""
        self._to_read[stream.request.request_id] = num_tokens
        self.exchange.add(stream, stream.request.request_id)
        self.send(stream.submit())

    @property
    def queued_tokens(self) -> list[int]:
        """How many are to be read for each of those of whom nothing has been written yet."""
        streams = self.exchange.streams.items()
        return [self._to_read.get(name, 0) for name, stream in streams if stream.is_owed]

    def leave(self, stream: Stream) -> None:
        """Nobody wants more of it from here."""
        self._to_read.pop(stream.request.request_id, None)
        if self.exchange.streams.pop(stream.request.request_id, None) is not None and not stream.is_over:
            self.send(Cancel(stream.request.request_id))

    async def ask(self, make: Callable[[int], ToEngine]) -> Answer:
        """A call. Raises Lost where no answer came, and what the replica raises."""
        if not self.is_up:
            raise Lost("the replica has gone")
        return await self.exchange.calls.ask(make)

    def send(self, message: ToEngine) -> None:
        """Tell the replica, if it is there."""
        if self._writer is None:
            return
        try:
            self._writer.write(encode(message))  # type: ignore[arg-type]  # Start and SetMarks are not among them.
        except Exception as reason:  # It is of one message, and those behind it are to go on.
            error: EngineError = InvalidRequest(str(reason))
            if not isinstance(reason, ValueError):  # A ValueError tells of a frame that is too long.
                log.error("a message can't be sent: type=%s error=%r", type(message).__name__, reason)
                error = BackendFailed("the request can't be sent to a replica")
            if isinstance(message, Submit):
                self.exchange.streams[message.request.request_id].fail(error)
            elif isinstance(message, Tokenize | Detokenize | LoadAdapter | UnloadAdapter):
                self.exchange.calls.fail(message.call_id, error)

    # ---- its connection ----

    async def _run(self) -> None:
        """Connect, hear until the end of the connection, and again; a replica without an engine lets it wait."""
        pause_s = 0.0
        while True:
            began_s = time.monotonic()
            try:
                await self._connect()
            except (OSError, TimeoutError, asyncio.IncompleteReadError) as error:
                self._tell_missed(logging.INFO, "is away", repr(error))
            except (FrameTooLong, MsgspecError) as error:
                self._tell_missed(logging.ERROR, "speaks otherwise", str(error))
            pause_s = 0.0 if time.monotonic() - began_s > MAX_PAUSE_S else min(MAX_PAUSE_S, 2 * pause_s + 0.1)
            await asyncio.sleep(pause_s)

    def _tell_missed(self, level: int, what: str, reason: str) -> None:
        """Once until it is back: it is tried again every few seconds. Of one that is to end nobody wants to know."""
        if not (self._is_missed or self.is_draining):
            log.log(level, "replica %s: name=%s reason=%s", what, self.name, reason)
            self._is_missed = True

    async def _connect(self) -> None:
        reader, writer = await asyncio.open_connection(self.place.host, self.place.port, limit=1 << 20)
        watch: asyncio.Task[None] | None = None
        try:
            await greet_replica(reader, writer, self.place.secret, self._digest_key)
            ready = decode_from_replica(await receive_frame(reader, MAX_FRAME_BYTES))
            if not isinstance(ready, Ready):
                raise ConnectionError(f"a {type(ready).__name__} out of place")
            self.exchange.begin(ready)
            self.is_draining, self._num_silent, self._writer = False, 0, writer
            if self._is_missed:
                log.info("replica is back: name=%s", self.name)
                self._is_missed = False
            watch = asyncio.create_task(self._watch(writer), name=f"watch of {self.name}")
            self._owner.on_up(self)
            await self._hear(reader)
        finally:
            if watch is not None:
                watch.cancel()
            writer.close()
            if self._writer is not None:
                self._writer = None
                self._to_read.clear()
                self.exchange.calls.fail_all(Lost("the replica has gone"))
                self._owner.on_down(self)

    async def _hear(self, reader: StreamReader) -> None:
        while True:
            message = decode_from_replica(await receive_frame(reader, MAX_FRAME_BYTES))
            self._num_silent = 0
            match message:
                case Alive(is_compiling=is_compiling):
                    if is_compiling:
                        self.exchange.step_begins()
                case Draining():
                    self.is_draining = True
                    self._owner.on_draining(self)
                case Digest():
                    self._owner.on_digest(self, message)
                case Ready():
                    raise ConnectionError("a Ready out of place")
                case _:
                    self.exchange.hear(message)

    async def _watch(self, writer: StreamWriter) -> None:
        """Leave a replica that gives no sign of life: of a machine that is gone nobody tells."""
        while True:
            await asyncio.sleep(BEAT_S)
            self._num_silent += 1
            if self._num_silent > SILENT_BEATS:
                log.error("replica is silent: name=%s for_s=%.0f", self.name, self._num_silent * BEAT_S)
                writer.transport.abort()
                return
