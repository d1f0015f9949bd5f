"""The front's view of the engine: start it, watch it, start it again, and pass requests to it.

Imports neither torch nor transformers nor llama_cpp.
"""

import asyncio
import logging
import socket
import time
from collections.abc import AsyncGenerator, Awaitable, Callable, Sequence
from contextlib import suppress
from itertools import count
from typing import Literal

from tightrope.engine.errors import BackendFailed, EngineError, EngineUnavailable, InvalidRequest, Overloaded
from tightrope.engine.launch import EngineHandle, Launcher, spawn_process
from tightrope.engine.outbox import Outbox
from tightrope.engine.queueing import QueueTimes
from tightrope.engine.settings import EngineSettings
from tightrope.engine.types import (
    Delta,
    GenerateRequest,
    ModelInfo,
    Prompt,
    Stats,
    TokenRun,
    TurnMarks,
    with_adapter_texts,
)
from tightrope.engine.wire import (
    HEADER,
    AdapterList,
    CallFailed,
    Cancel,
    Detokenize,
    Detokenized,
    LoadAdapter,
    Loaded,
    LoadFailed,
    Ready,
    Refused,
    SetMarks,
    Start,
    StepDone,
    Submit,
    ToEngine,
    ToFront,
    Tokenize,
    Tokenized,
    UnloadAdapter,
    decode_to_front,
)

log = logging.getLogger("tightrope.client")

Answer = TokenRun | str | dict[str, str]  # to a call
FindMarks = Callable[[ModelInfo], Awaitable[TurnMarks]]
State = Literal["loading", "ready", "restarting", "failed", "closed"]

MAX_BACKOFF_S = 10.0
STABLE_S = 30.0  # an engine that ran this long starts again without delay
STUCK_S = 30.0  # a step that takes longer than this is no step under way but a stuck engine


class _Stream:
    """One request under way."""

    def __init__(self, request: GenerateRequest, arrived_s: float) -> None:
        self.request = request
        self.items: asyncio.Queue[Delta | EngineError] = asyncio.Queue()
        self.has_output = False
        self.is_retry = False
        self.num_open = request.n  # choices that have not finished
        self.arrived_s = arrived_s


class EngineClient:
    """One engine, supervised. All methods belong to one event loop."""

    def __init__(
        self,
        settings: EngineSettings,
        launch: Launcher = spawn_process,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._settings = settings
        self._launch = launch
        self._clock = clock
        self._step_began_s = 0.0  # by the clock: when the last step ended, or the first request came to an idle engine
        self._streams: dict[str, _Stream] = {}
        self._calls: dict[int, asyncio.Future[Answer]] = {}
        self._call_ids = count()
        self._writer: asyncio.StreamWriter | None = None
        self._outbox: Outbox | None = None
        self._times = QueueTimes()
        self._handle: EngineHandle | None = None
        self._find_marks: FindMarks | None = None
        self._supervisor: asyncio.Task[None] | None = None
        self._changed = asyncio.Condition()
        self._failure: str | None = None
        self.state: State = "loading"
        self.info: ModelInfo | None = None
        self.adapters: dict[str, str] = {}  # paths of those that requests may use, by name
        self.stats = Stats()
        self.restarts = 0

    # ---- life ----

    async def start(self, find_marks: FindMarks | None = None) -> None:
        """Spawn the engine and begin to watch it; returns at once.

        `find_marks` is asked of every model that an engine has loaded, before requests reach it. If it raises OSError,
        as a timeout does, that engine is not used: the first fails with a line, and a later one is started again.
        """
        self._find_marks = find_marks
        self._supervisor = asyncio.create_task(self._supervise(), name="engine supervisor")

    async def wait_ready(self) -> ModelInfo:
        """Wait until the model is loaded. Raises BackendFailed with one line if it can't be."""
        async with self._changed:
            await self._changed.wait_for(lambda: self.state in ("ready", "failed", "closed"))
        if self.state != "ready" or self.info is None:
            raise BackendFailed(self._failure or "the engine was closed")
        return self.info

    async def close(self) -> None:
        """End the engine. What is still running ends with EngineUnavailable."""
        await self._set_state("closed")
        if self._writer is not None:
            self._writer.close()
        if self._supervisor is not None:
            self._supervisor.cancel()
            with suppress(asyncio.CancelledError):
                await self._supervisor
        if self._handle is not None:
            self._handle.kill()
            await asyncio.to_thread(self._handle.wait)
        self._end_streams(EngineUnavailable("the server is shutting down"))

    @property
    def is_healthy(self) -> bool:
        """Whether the model answers: it is loaded, and no step has been under way for longer than STUCK_S."""
        return self.state == "ready" and not (self._has_work and self._clock() - self._step_began_s > STUCK_S)

    @property
    def _has_work(self) -> bool:
        """Whether the engine owes a step, as far as can be told from here."""
        is_busy = self.stats.num_running + self.stats.num_waiting > 0
        return is_busy or any(not stream.has_output for stream in self._streams.values())

    async def _set_state(self, state: State) -> None:
        async with self._changed:
            self.state = state
            self._changed.notify_all()

    async def _supervise(self) -> None:
        """Run engines one after another until one says that the model can't be loaded."""
        backoff_s = 0.0
        while self.state != "closed":
            began = time.monotonic()
            was_ready = await self._run_engine()
            if self.state in ("failed", "closed"):
                return
            if not was_ready and self.info is None:
                self._failure = f"the engine process ended while it loaded the model ({self._failure})"
                await self._set_state("failed")
                return
            backoff_s = 0.0 if time.monotonic() - began > STABLE_S else min(MAX_BACKOFF_S, 2 * backoff_s + 0.25)
            log.error("engine ended: how=%s restart_in_s=%.2f", self._failure, backoff_s)
            self.restarts += 1
            await asyncio.sleep(backoff_s)

    async def _run_engine(self) -> bool:
        """One engine from start to end; return whether it became ready."""
        ours, theirs = socket.socketpair()
        self._handle = self._launch(theirs)
        theirs.close()
        reader, self._writer = await asyncio.open_connection(sock=ours, limit=1 << 20)
        self._outbox = Outbox(self._unsent)
        writing = asyncio.create_task(self._outbox.write_to(self._writer), name="engine outbox")
        self._send(Start(self._settings.model_dump_json(), None if self.info is None else self.adapters))
        was_ready = False
        try:
            while True:
                header = await reader.readexactly(HEADER.size)
                message = decode_to_front(await reader.readexactly(*HEADER.unpack(header)))
                if isinstance(message, Loaded):
                    if not await self._send_marks(message.info):
                        break
                elif isinstance(message, Ready):
                    was_ready = True
                    await self._on_ready(message)
                elif isinstance(message, LoadFailed):
                    self._failure = message.message
                    await self._set_state("failed")
                else:
                    self._dispatch(message)
        except (asyncio.IncompleteReadError, ConnectionError):
            pass  # end-of-file: the engine is gone
        finally:
            writing.cancel()
            self._outbox = None
            self._writer.close()
            self._writer = None
        if self.state == "ready":
            await self._set_state("restarting")
        self._fail_started()
        how = await asyncio.to_thread(self._handle.wait)
        if self.state != "failed":
            self._failure = how
        return was_ready

    async def _send_marks(self, info: ModelInfo) -> bool:
        """Tell the engine what the chat template makes special; False if that can't be found out."""
        try:
            marks = TurnMarks() if self._find_marks is None else await self._find_marks(info)
        except OSError as error:
            reason = f"the chat template can't be asked what ends a turn: {str(error) or 'it did not answer in time'}"
            log.error("%s", reason)
            if self.info is None:
                self._failure = reason
                await self._set_state("failed")
            return False
        self._send(SetMarks(marks))
        return True

    async def _on_ready(self, ready: Ready) -> None:
        self.info, self.adapters = ready.info, ready.adapters
        self.stats = Stats()
        self._step_began_s = self._clock()
        await self._set_state("ready")
        for stream in self._streams.values():  # kept while the engine was away
            stream.is_retry = True
            self._send(Submit(stream.request))

    def _fail_started(self) -> None:
        """After the engine's end: answers under way have failed; requests without output wait for the next engine.

        A request is tried twice at most, lest one that kills the engine does so for ever.
        """
        error = BackendFailed("the engine process died while this answer was being written; it is being restarted")
        for stream in self._streams.values():
            if stream.has_output or stream.is_retry:
                stream.items.put_nowait(error)
        self._streams = {i: s for i, s in self._streams.items() if not (s.has_output or s.is_retry)}
        for call in self._calls.values():
            if not call.done():
                call.set_exception(error)
        self._calls.clear()

    def _end_streams(self, error: EngineError) -> None:
        for stream in self._streams.values():
            stream.items.put_nowait(error)
        self._streams.clear()

    # ---- messages ----

    def _send(self, message: ToEngine) -> None:
        if self._outbox is not None:
            self._outbox.put(message)

    def _unsent(self, message: ToEngine, reason: Exception) -> None:
        """End what can't be sent."""
        error: EngineError = InvalidRequest(str(reason))
        if not isinstance(reason, ValueError):  # which tells of a frame that is too long
            log.error("a message can't be sent: type=%s error=%r", type(message).__name__, reason)
            error = BackendFailed("the request can't be sent to the engine")
        if isinstance(message, Submit) and message.request.request_id in self._streams:
            self._streams[message.request.request_id].items.put_nowait(error)
        elif isinstance(message, Tokenize | Detokenize | LoadAdapter | UnloadAdapter):
            call = self._calls.pop(message.call_id, None)
            if call is not None and not call.done():
                call.set_exception(error)

    def _dispatch(self, message: ToFront) -> None:
        match message:
            case StepDone(deltas=deltas, stats=stats):
                self.stats = stats
                self._step_began_s = self._clock()
                for delta in deltas:
                    stream = self._streams.get(delta.request_id)
                    if delta.finish is not None:
                        self._times.observe(delta.finish)
                    if stream is not None:
                        stream.has_output = True
                        stream.num_open -= delta.finish is not None
                        stream.items.put_nowait(delta)
            case Refused(request_id=request_id, error=error):
                stream = self._streams.get(request_id)
                if stream is not None:
                    refusal = error.rebuild()
                    if isinstance(refusal, Overloaded):
                        refusal.retry_after_s = self.retry_after_s
                    stream.items.put_nowait(refusal)
            case Tokenized(call_id=call_id, tokens=tokens):
                self._answer(call_id, tokens)
            case Detokenized(call_id=call_id, text=text):
                self._answer(call_id, text)
            case AdapterList(call_id=call_id, adapters=adapters, special_texts=texts):
                self.adapters = adapters
                if self.info is not None:
                    self.info = with_adapter_texts(self.info, texts)
                self._answer(call_id, adapters)
            case CallFailed(call_id=call_id, error=error):
                call = self._calls.pop(call_id, None)
                if call is not None and not call.done():
                    call.set_exception(error.rebuild())

    def _answer(self, call_id: int, value: Answer) -> None:
        call = self._calls.pop(call_id, None)
        if call is not None and not call.done():
            call.set_result(value)

    # ---- requests ----

    def _check_ready(self) -> None:
        if self.state == "ready":
            return
        reasons: dict[State, str] = {
            "loading": "the model is still loading",
            "restarting": "the engine is restarting",
            "failed": f"the model could not be loaded: {self._failure}",
            "closed": "the server is shutting down",
        }
        raise EngineUnavailable(reasons.get(self.state, self.state))

    @property
    def num_open(self) -> int:
        """Answers that have been asked for and have not finished."""
        return sum(stream.num_open for stream in self._streams.values())

    @property
    def num_running(self) -> int:
        """Answers that the engine is writing now, as it said when its step began."""
        return min(self.stats.num_running, self.num_open)

    @property
    def num_waiting(self) -> int:
        """Answers that wait for a place now, those among them that the engine has not even read."""
        return self.num_open - self.num_running

    @property
    def retry_after_s(self) -> int:
        """Seconds after which one who is refused now may find a place."""
        now = self._clock()
        oldest_s = max(
            (now - stream.arrived_s for stream in self._streams.values() if not stream.has_output), default=0.0
        )
        return self._times.wait_s(max(0, self.num_open - self._num_places), self._num_places, oldest_s)

    @property
    def _num_places(self) -> int:
        return 1 if self.info is None else self.info.max_num_seqs

    def _check_room(self) -> None:
        num_waiting, most = self.num_open - self._num_places, self._settings.limits.max_waiting
        if num_waiting >= most:
            message = f"{num_waiting} requests are waiting already; the limit is {most}"
            raise Overloaded(message, retry_after_s=self.retry_after_s)

    async def generate(self, request: GenerateRequest) -> AsyncGenerator[Delta, None]:
        """Run a request; yield the deltas of its `n` choices as they come, until all have finished.

        A refused request raises an EngineError at the first step, a failing one later. Closing the iterator cancels
        the work.
        """
        self._check_ready()
        self._check_room()
        assert request.request_id not in self._streams, "request ids are unique"
        if not self._has_work:
            self._step_began_s = self._clock()
        stream = self._streams[request.request_id] = _Stream(request, self._clock())
        self._send(Submit(request))
        num_open = request.n
        try:
            while num_open:
                item = await stream.items.get()
                if isinstance(item, EngineError):
                    num_open = 0
                    raise item
                if item.finish is not None:
                    num_open -= 1
                yield item
        finally:
            self._streams.pop(request.request_id, None)
            if num_open and not self._take_back(request.request_id):
                self._send(Cancel(request.request_id))

    async def tokenize(self, prompt: Prompt, adapter: str | None = None, *, last: int | None = None) -> TokenRun:
        """The tokens of a prompt as it would be run, or the last few. Raises InvalidRequest and EngineUnavailable."""
        tokens = await self._call(lambda call_id: Tokenize(call_id, prompt, adapter, last))
        assert isinstance(tokens, TokenRun)
        return tokens

    async def detokenize(self, token_ids: Sequence[int], adapter: str | None = None) -> str:
        """The text of token ids, special ones included. Raises InvalidRequest and EngineUnavailable."""
        text = await self._call(lambda call_id: Detokenize(call_id, tuple(token_ids), adapter))
        assert isinstance(text, str)
        return text

    async def load_adapter(self, name: str, path: str, *, in_place: bool = False) -> None:
        """Load an adapter from the folder of the settings; when this returns, `adapters` has it.

        in_place: one of that name gives way to it. Raises InvalidRequest and EngineUnavailable.
        """
        await self._call(lambda call_id: LoadAdapter(call_id, name, path, in_place))

    async def unload_adapter(self, name: str) -> None:
        """Let no new request name an adapter; those that use it finish. Raises ModelNotFound and EngineUnavailable."""
        await self._call(lambda call_id: UnloadAdapter(call_id, name))

    async def _call(self, make: Callable[[int], ToEngine]) -> Answer:
        self._check_ready()
        call_id = next(self._call_ids)
        call: asyncio.Future[Answer] = asyncio.get_running_loop().create_future()
        self._calls[call_id] = call
        self._send(make(call_id))
        try:
            return await call
        finally:
            self._calls.pop(call_id, None)
            self._take_back(call_id)

    def _take_back(self, key: str | int) -> bool:
        return self._outbox is not None and self._outbox.take_back(key)
