"""The life of engines: start one, hear it, and start another when it has ended, whatever it ended by.

Imports neither torch nor transformers nor llama_cpp.
"""

import asyncio
import logging
import socket
import time
from asyncio import IncompleteReadError, StreamReader, StreamWriter
from contextlib import suppress
from typing import Literal, Protocol

from tightrope.engine.errors import BackendFailed, EngineError
from tightrope.engine.process.frames import receive_frame
from tightrope.engine.process.launch import EngineHandle, Launcher
from tightrope.engine.process.outbox import Outbox
from tightrope.engine.process.wire import (
    MAX_FRAME_BYTES,
    Alive,
    EmbedderReady,
    Loaded,
    LoadFailed,
    Loading,
    Progress,
    Ready,
    SetMarks,
    Start,
    ToEngine,
    ToFront,
    decode_to_front,
)
from tightrope.engine.queueing import back_in_s
from tightrope.engine.settings import BEATS, PATIENCE, LifeSettings
from tightrope.engine.types import ModelInfo

log = logging.getLogger("tightrope.client")

State = Literal["loading", "ready", "restarting", "failed", "closed"]

MAX_PAUSE_S = 10.0
STABLE_S = 30.0  # An engine that ran this long is followed at once, as one that has answered is.
WAITING_S = 60.0  # Requests wait at least so long for another engine.
END_GRACE_S = 10.0  # An engine that has closed its socket, or was killed, may take so long to end.
LOADING_S = 120.0  # It is at least so long, as an engine that imports its libraries from a slow disk says nothing.
_POLL_S = 0.02


class Listener(Protocol):
    """Who speaks with the engines."""

    def first_message(self) -> Start:
        """What an engine is told at its start."""

    async def on_loaded(self, info: ModelInfo) -> SetMarks:
        """What it is told of the model that it has loaded. An EngineError says why it can't be used."""

    def on_ready(self, ready: Ready | EmbedderReady) -> None:
        """It takes requests; an engine that embeds has no Loaded before."""

    def on_message(self, message: ToFront) -> None:
        """It has said something else."""

    def on_loading(self, share: float) -> None:
        """So much of the model is loaded, from 0 to 1."""

    def on_compiling(self) -> None:
        """The step that runs waits for a kernel to be compiled."""

    def on_unsent(self, message: ToEngine, reason: Exception) -> None:
        """A message makes no frame that it would take."""

    def on_lost(self) -> None:
        """It is gone, with all that it had to do."""

    def on_given_up(self) -> None:
        """Whoever waits for an engine has waited long enough."""


class Supervisor:
    """One engine at a time. All methods belong to one event loop."""

    def __init__(self, settings: LifeSettings, launch: Launcher, listener: Listener) -> None:
        self._settings = settings
        self._launch = launch
        self._listener = listener
        self._changed = asyncio.Condition()
        self._task: asyncio.Task[None] | None = None
        self._writer: StreamWriter | None = None
        self._outbox: Outbox | None = None
        self._expiry: asyncio.Task[None] | None = None
        self._num_silent = 0  # It counts ticks of the watch since the engine was heard.
        self._has_answered = False  # The present engine has answered somebody.
        self._began_s = time.monotonic()  # The present engine was started then, or the next one will be.
        self._load_s = 0.0  # The last one that was ready took so long.
        self._lost_s: float | None = None  # The last engine that was ready ended then; it is None where there was none.
        self.handle: EngineHandle | None = None
        self.state: State = "loading"
        self.failure: str | None = None
        self.restarts = 0

    @property
    def back_in_s(self) -> int:
        """Whole seconds until an engine may take requests, while none does."""
        return back_in_s(self._load_s, time.monotonic() - self._began_s)

    @property
    def _waiting_s(self) -> float:
        """Requests wait so long for another engine: as long as a large model needs, and it may load more slowly."""
        return max(WAITING_S, 3 * self._load_s)

    async def start(self) -> None:
        """Start an engine and begin to hear it; returns at once."""
        self._task = asyncio.create_task(self._supervise(), name="engine supervisor")

    async def wait_ready(self) -> None:
        """Wait until an engine takes requests. Raises BackendFailed with one line if none will."""
        await self._wait_for("ready", "failed", "closed")
        if self.state != "ready":
            raise BackendFailed(self.failure or "the engine was closed")

    async def wait_failed(self) -> str:
        """Wait until no engine will be started any more, other than by `close`; returns the reason."""
        await self._wait_for("failed")
        return self.failure or "the engine failed"

    async def _wait_for(self, *states: State) -> None:
        async with self._changed:
            await self._changed.wait_for(lambda: self.state in states)

    async def close(self) -> None:
        """End the engine. One that is ready sees its socket close, and writes what rests of chats first."""
        was_ready = self.state == "ready"
        await self._set_state("closed")
        if self._expiry is not None:
            self._expiry.cancel()
        if self._task is not None:
            self._task.cancel()
            with suppress(asyncio.CancelledError):
                await self._task
        if self.handle is not None:
            if not was_ready:
                self.handle.kill("it was not to be loaded any more")
            await _end_of(self.handle)

    def send(self, message: ToEngine) -> None:
        """Tell the engine, if there is one."""
        if self._outbox is not None:
            self._outbox.put(message)

    def take_back(self, key: str | int) -> bool:
        """Forget a request or a call, by its id, that has not been sent; False if it is on its way already."""
        return self._outbox is not None and self._outbox.take_back(key)

    async def _set_state(self, state: State) -> None:
        async with self._changed:
            self.state = state
            self._changed.notify_all()

    async def _fail(self, reason: str) -> None:
        self.failure = reason
        await self._set_state("failed")
        self._listener.on_given_up()

    async def _supervise(self) -> None:
        try:
            await self._run_engines()
        except Exception as error:  # Nobody else would hear of it.
            log.exception("the engine can't be supervised any more")
            await self._fail(f"the engine can't be supervised any more: {error!r}")

    async def _run_engines(self) -> None:
        """Run engines until the first can't load the model, or none could be started for as long as is allowed.

        The pause before the next one doubles, and starts anew behind an engine that has answered somebody.
        """
        pause_s = 0.0
        while True:
            began_s = self._began_s = time.monotonic()
            how = await self._run_engine()
            if self._lost_s is None:
                await self._fail(how)
                return
            now_s = time.monotonic()
            if now_s - self._lost_s > self._settings.restart_limit_s:
                limit = f"no engine could be started for {self._settings.restart_limit_s:g} s (--restart-limit)"
                await self._fail(f"{limit}; the last one: {how}")
                return
            is_good = self._has_answered or now_s - began_s > STABLE_S
            pause_s = 0.0 if is_good else min(MAX_PAUSE_S, 2 * pause_s + 0.25)
            self.failure = how
            log.error("engine ended: how=%s restart_in_s=%.2f", how, pause_s)
            self.restarts += 1
            self._began_s = now_s + pause_s
            await asyncio.sleep(pause_s)

    async def _run_engine(self) -> str:
        """One engine from start to end; returns how it ended, in words, whatever went wrong."""
        self._has_answered, self.handle, reason = False, None, ""
        beside: list[asyncio.Task[None]] = []
        try:
            reader, self._writer = await self._start()
            self._outbox = Outbox(self._listener.on_unsent)
            beside = [
                asyncio.create_task(self._write(self._outbox, self._writer), name="engine outbox"),
                asyncio.create_task(self._watch(self.handle), name="engine watch"),
            ]
            self.send(self._listener.first_message())
            reason = await self._hear(reader)
        except (IncompleteReadError, ConnectionError):
            pass  # At its end of file it is ending, and tells how by its status.
        except EngineError as error:
            reason = error.message
        except Exception as error:  # There is no descriptor, memory or process, or a frame that is none.
            reason = f"it can't be started or heard: {error!r}"
        finally:
            for task in beside:
                task.cancel()
            self._outbox = None
            if self._writer is not None:
                self._writer.close()
                self._writer = None
        was_ready = self.state == "ready"
        if was_ready:
            self._lost_s = self._began_s = time.monotonic()
            await self._set_state("restarting")
            self._expiry = asyncio.create_task(self._give_up_in_time(), name="engine expiry")
        self._listener.on_lost()
        how = "it was never there" if self.handle is None else await _end_of(self.handle)
        if not reason and not was_ready:
            return f"the engine process ended while it loaded the model ({how})"
        return reason or how

    async def _start(self) -> tuple[StreamReader, StreamWriter]:
        ours, theirs = socket.socketpair()
        try:
            with theirs:
                self.handle = self._launch(theirs)
            return await asyncio.open_connection(sock=ours, limit=1 << 20)
        except BaseException:
            ours.close()
            raise

    @staticmethod
    async def _write(outbox: Outbox, writer: StreamWriter) -> None:
        """Write what is to be sent. If that breaks, the engine is left: it would never hear anything again."""
        try:
            await outbox.write_to(writer)
        except Exception:
            log.exception("nothing can be written to the engine")
            writer.close()

    async def _hear(self, reader: StreamReader) -> str:
        """Pass on what the engine says until it can't load the model; returns why not."""
        self._num_silent = 0
        while True:
            message = decode_to_front(await receive_frame(reader, MAX_FRAME_BYTES))
            self._num_silent = 0
            match message:
                case Loading(share=share):
                    self._listener.on_loading(share)
                case Loaded(info=info):
                    self.send(await self._listener.on_loaded(info))
                case Ready() | EmbedderReady():
                    if self._expiry is not None:
                        self._expiry.cancel()
                    self._load_s = time.monotonic() - self._began_s
                    self._listener.on_ready(message)
                    await self._set_state("ready")
                case LoadFailed(message=reason):
                    return reason
                case Alive(is_compiling=is_compiling):
                    if is_compiling:
                        self._listener.on_compiling()
                case _:
                    self._has_answered = self._has_answered or not isinstance(message, Progress)
                    self._listener.on_message(message)

    async def _give_up_in_time(self) -> None:
        """Have requests wait no longer. Ticks are counted: while all processes are stopped no engine loads."""
        tick_s = self._waiting_s / BEATS
        for _ in range(BEATS):
            await asyncio.sleep(tick_s)
        self._listener.on_given_up()

    async def _watch(self, handle: EngineHandle | None) -> None:
        """Kill an engine that gives no sign of life. Ticks are counted: a stop of all processes is no silence."""
        tick_s = self._settings.stuck_s / BEATS
        while handle is not None:
            await asyncio.sleep(tick_s)
            self._num_silent += 1
            silent_s = self._num_silent * tick_s
            loading_s = max(LOADING_S, PATIENCE * self._settings.stuck_s)
            if silent_s > (self._settings.stuck_s if self.state == "ready" else loading_s):
                log.error("engine is stuck: no sign of life for_s=%.1f", silent_s)
                handle.kill(f"it gave no sign of life for {silent_s:.0f} s")
                return


async def _end_of(handle: EngineHandle) -> str:
    """How it has ended; one that doesn't end by itself is killed."""
    for is_killed in (False, True):
        deadline_s = time.monotonic() + END_GRACE_S
        while time.monotonic() < deadline_s:
            if (how := handle.poll()) is not None:
                return how
            await asyncio.sleep(_POLL_S)
        if not is_killed:
            log.warning("engine has not ended by itself, and is killed: after_s=%.0f", END_GRACE_S)
            handle.kill(f"it had not ended within {END_GRACE_S:.0f} s")
    return "killed, but it has not ended yet"
