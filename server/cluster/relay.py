"""The replica's side: one supervised engine, of which several ingresses ask over sockets.

A connection lives as long as the engine behind it: when that ends, all are closed, so that the ingresses take what they
had asked for to another replica at once, and come back when the next engine is there.
"""

import asyncio
import logging
from asyncio import StreamReader, StreamWriter
from collections.abc import Iterable
from contextlib import suppress
from itertools import count

from msgspec import MsgspecError
from msgspec.structs import replace

from tightrope.engine.errors import BackendFailed, InvalidRequest
from tightrope.engine.process.exchange import marks_of
from tightrope.engine.process.frames import FrameTooLong, receive_frame
from tightrope.engine.process.launch import Launcher
from tightrope.engine.process.supervisor import Supervisor
from tightrope.engine.process.wire import (
    MAX_FRAME_BYTES,
    AdapterList,
    Alive,
    CallFailed,
    Cancel,
    Detokenized,
    EmbedderReady,
    ErrorFrame,
    Held,
    Progress,
    Ready,
    Refused,
    SetMarks,
    Start,
    StepDone,
    Submit,
    TellHeld,
    ToEngine,
    ToFront,
    Tokenized,
)
from tightrope.engine.prompt_bytes import prompt_bytes
from tightrope.engine.protocol import FindMarks
from tightrope.engine.settings import EngineSettings
from tightrope.engine.types import Delta, ModelInfo, Stats
from tightrope.server.cluster.digests import ReplicaHoldings
from tightrope.server.cluster.handshake import greet_ingress
from tightrope.server.cluster.messages import Draining, FromReplica, ToReplica, decode_to_replica, encode

log = logging.getLogger("tightrope.replica")

BEAT_S = 2.0  # So often an ingress is told that this replica lives.
MAX_BACKLOG_BYTES = 256 << 20  # An ingress that reads so much too slowly is left.
MAX_GUESTS = 256  # A cluster has an ingress a machine at most; more connections wait in the system's queue.


class Guest:
    """One ingress. What it calls its requests and calls is its own affair, and no other's."""

    def __init__(self, writer: StreamWriter, digest_key: bytes) -> None:
        self.digest_key = digest_key
        self._writer = writer

    def tell(self, message: FromReplica) -> None:
        if self._writer.is_closing():
            return
        self._writer.write(encode(message))
        if self._writer.transport.get_write_buffer_size() > MAX_BACKLOG_BYTES:
            log.warning("an ingress reads too slowly, and is left")
            self._writer.transport.abort()

    def leave(self) -> None:
        self._writer.close()


class Relay:
    """Hands what ingresses ask to one engine, and what it says to those who have asked."""

    def __init__(self, settings: EngineSettings, launch: Launcher, secret: bytes, find_marks: FindMarks) -> None:
        self._settings = settings
        self._secret = secret
        self._find_marks = find_marks
        self._supervisor = Supervisor(settings.life, launch, self)
        self._server: asyncio.Server | None = None
        self._beat: asyncio.Task[None] | None = None
        self._has_engine = asyncio.Event()
        self._is_idle = asyncio.Event()
        self._is_idle.set()
        self._ready: Ready | None = None  # The engine's own, with the adapters of now.
        self._guests: set[Guest] = set()
        self._connections: dict[
            asyncio.Task[None] | None, StreamWriter
        ] = {}  # Of these some have not proved to be guests.
        self._is_closed = False
        self._names = count()
        self._calls: dict[int, tuple[Guest, int]] = {}  # Of the engine's calls, whose each is, and what it is there.
        self._requests: dict[str, tuple[Guest, str]] = {}  # The same of its requests.
        self._open: dict[str, int] = {}  # So many choices of each have not finished.
        self._unread: dict[str, int] = {}  # The bytes of their prompts, until they have begun.
        self._holdings = ReplicaHoldings()
        self._draining: Draining | None = None

    # ---- life ----

    async def start(self, host: str) -> tuple[str, int]:
        """Begin to load the model, and to listen; returns the address."""
        await self._supervisor.start()
        self._server = await asyncio.start_server(self._receive_guest, host, 0, limit=1 << 20)
        self._beat = asyncio.create_task(self._tell_of_life(), name="replica beat")
        address: tuple[str, int] = self._server.sockets[0].getsockname()[:2]
        return address

    async def wait_ready(self) -> ModelInfo:
        """Wait until the model is loaded. Raises BackendFailed with one line if it can't be."""
        await self._supervisor.wait_ready()
        assert self._ready is not None
        return self._ready.info

    @property
    def failure(self) -> str | None:
        """Why no engine will be started any more; None while that isn't so."""
        return self._supervisor.failure if self._supervisor.state == "failed" else None

    async def drain(self, most_s: float) -> None:
        """Have the ingresses ask nothing more, and wait until all is written, or for so long."""
        self._draining = Draining(most_s)
        self._tell_all(self._draining)
        with suppress(TimeoutError):
            async with asyncio.timeout(most_s):
                await self._is_idle.wait()

    async def close(self) -> None:
        """End the engine, which writes what rests of chats, and all connections."""
        if self._beat is not None:
            self._beat.cancel()
        if self._server is not None:
            self._server.close()
        self._is_closed = True
        self._has_engine.set()  # Those who wait for one leave.
        for writer in self._connections.values():
            writer.close()
        await self._supervisor.close()
        await asyncio.gather(*(task for task in self._connections if task is not None))

    async def _tell_of_life(self) -> None:
        while True:
            await asyncio.sleep(BEAT_S)
            self._tell_all(Alive())

    # ---- how busy it is ----

    @property
    def num_open(self) -> int:
        """Answers that have been asked for and have not finished."""
        return sum(self._open.values())

    @property
    def num_places(self) -> int:
        return 1 if self._ready is None else self._ready.info.max_num_seqs

    @property
    def unread_bytes(self) -> int:
        """Of the prompts that wait, about so many."""
        return sum(self._unread.values())

    # ---- what the supervisor tells ----

    def first_message(self) -> Start:
        return Start(self._settings.model_dump_json(), None if self._ready is None else self._ready.adapters)

    async def on_loaded(self, info: ModelInfo) -> SetMarks:
        return await marks_of(self._find_marks, info)

    def on_ready(self, ready: Ready | EmbedderReady) -> None:
        assert isinstance(ready, Ready)
        self._ready, self._holdings = ready, ReplicaHoldings()
        self._supervisor.send(TellHeld())
        self._has_engine.set()

    def on_loading(self, share: float) -> None:
        pass

    def on_compiling(self) -> None:
        self._tell_all(Alive(is_compiling=True))

    def on_lost(self) -> None:
        self._has_engine.clear()
        self._leave_all()

    def on_given_up(self) -> None:
        pass

    def on_unsent(self, message: ToEngine, reason: Exception) -> None:
        """End what can't be sent, which no ingress could have sent either."""
        log.error("a message can't be sent: type=%s error=%r", type(message).__name__, reason)
        is_long = isinstance(reason, ValueError)
        error = ErrorFrame.of(InvalidRequest(str(reason)) if is_long else BackendFailed("the engine can't be asked"))
        if isinstance(message, Submit):
            self.on_message(Refused(message.request.request_id, error))
        elif not isinstance(message, Start | SetMarks | Cancel | TellHeld):
            self.on_message(CallFailed(message.call_id, error))

    def on_message(self, message: ToFront) -> None:
        match message:
            case StepDone(deltas=deltas, stats=stats):
                self._pass_on(deltas, stats)
            case Held():
                self._tell_of_held(message)
            case Progress(request_id=name, stage=stage):
                if stage == "running":
                    self._unread.pop(name, None)
                if name in self._requests:
                    guest, own_name = self._requests[name]
                    guest.tell(Progress(own_name, stage))
            case Refused(request_id=name, error=error):
                if name in self._requests:
                    guest, own_name = self._requests[name]
                    self._forget(name)
                    guest.tell(Refused(own_name, error))
            case AdapterList(call_id=call_id, adapters=adapters, special_texts=texts):
                assert self._ready is not None
                self._ready = replace(self._ready, adapters=adapters)
                asker, own_id = self._calls.pop(call_id, (None, -1))
                for guest in self._guests:  # All of them name adapters in requests.
                    guest.tell(AdapterList(own_id if guest is asker else -1, adapters, texts))
            case Tokenized(call_id=call_id) | Detokenized(call_id=call_id) | CallFailed(call_id=call_id):
                if call_id in self._calls:
                    guest, own_id = self._calls.pop(call_id)
                    guest.tell(replace(message, call_id=own_id))

    def _pass_on(self, deltas: Iterable[Delta], stats: Stats | None) -> None:
        """What one step brought, to those whose requests it ran; to all others that there was one."""
        theirs: dict[Guest, list[Delta]] = {guest: [] for guest in self._guests}
        for delta in deltas:
            if delta.request_id not in self._requests:
                continue
            guest, own_name = self._requests[delta.request_id]
            theirs[guest].append(replace(delta, request_id=own_name))
            self._unread.pop(delta.request_id, None)
            if delta.finish is not None:
                self._open[delta.request_id] -= 1
                if not self._open[delta.request_id]:
                    self._forget(delta.request_id)
        for guest, own in theirs.items():
            guest.tell(StepDone(tuple(own), stats))

    def _tell_of_held(self, held: Held) -> None:
        """Each ingress is told in hashes of its own; after a gap the engine is to tell everything."""
        if not self._holdings.apply(held):
            self._supervisor.send(TellHeld())
            return
        for guest in self._guests:
            guest.tell(self._holdings.changes(held, guest.digest_key))

    def _tell_all_held(self, guest: Guest) -> None:
        if (digest := self._holdings.snapshot(guest.digest_key)) is not None:
            guest.tell(digest)

    # ---- ingresses ----

    async def _receive_guest(self, reader: StreamReader, writer: StreamWriter) -> None:
        """One ingress, from its greeting to its end."""
        guest: Guest | None = None
        task = asyncio.current_task()
        self._connections[task] = writer
        try:
            guest = Guest(writer, await greet_ingress(reader, writer, self._secret))
            await self._has_engine.wait()
            if self._is_closed or len(self._guests) >= MAX_GUESTS:
                return
            self._guests.add(guest)
            assert self._ready is not None
            guest.tell(self._ready)
            self._tell_all_held(guest)
            if self._draining is not None:
                guest.tell(self._draining)
            while True:
                self._ask(guest, decode_to_replica(await receive_frame(reader, MAX_FRAME_BYTES)))
        except (asyncio.IncompleteReadError, ConnectionError, TimeoutError) as error:
            log.debug("an ingress has gone: %r", error)
        except (FrameTooLong, MsgspecError) as error:
            log.error("an ingress speaks otherwise, and is left: %s", error)
        finally:
            writer.close()
            del self._connections[task]
            if guest is not None:
                self._lose(guest)

    def _ask(self, guest: Guest, message: ToReplica) -> None:
        match message:
            case Submit(request=request):
                name = str(next(self._names))
                self._requests[name] = guest, request.request_id
                self._open[name] = request.n - sum(one is not None and one.is_finished for one in message.written)
                self._unread[name] = prompt_bytes(request.prompt)
                self._is_idle.clear()
                self._supervisor.send(Submit(replace(request, request_id=name), message.written))
            case Cancel(request_id=own_name):
                for name in [name for name, whose in self._requests.items() if whose == (guest, own_name)]:
                    self._cancel(name)
            case TellHeld():
                self._tell_all_held(guest)
            case _:
                call_id = next(self._names)
                self._calls[call_id] = guest, message.call_id
                self._supervisor.send(replace(message, call_id=call_id))

    def _cancel(self, name: str) -> None:
        self._forget(name)
        if not self._supervisor.take_back(name):
            self._supervisor.send(Cancel(name))

    def _forget(self, name: str) -> None:
        """It has ended."""
        for kept in (self._requests, self._open, self._unread):
            kept.pop(name, None)
        if not self._requests:
            self._is_idle.set()

    def _lose(self, guest: Guest) -> None:
        """Whoever asked for this is gone."""
        self._guests.discard(guest)
        for name in [name for name, (whose, _) in self._requests.items() if whose is guest]:
            self._cancel(name)
        for call_id in [number for number, (whose, _) in self._calls.items() if whose is guest]:
            del self._calls[call_id]
            self._supervisor.take_back(call_id)

    def _leave_all(self) -> None:
        for guest in list(self._guests):
            guest.leave()
            self._lose(guest)

    def _tell_all(self, message: FromReplica) -> None:
        for guest in self._guests:
            guest.tell(message)
