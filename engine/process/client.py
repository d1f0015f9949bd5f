"""The `Engine` behind a socket: requests and calls to whichever process or thread is there, supervised.

Imports neither torch nor transformers nor llama_cpp.
"""

import logging
import time
from collections.abc import AsyncGenerator, Callable, Mapping, Sequence

from tightrope.engine.errors import BackendFailed, EngineError, EngineUnavailable, InvalidRequest, Overloaded
from tightrope.engine.process.exchange import Answer, Exchange, marks_of
from tightrope.engine.process.launch import EngineHandle, Launcher, spawn_process
from tightrope.engine.process.stream import MAX_TRIES, Stream
from tightrope.engine.process.supervisor import State, Supervisor
from tightrope.engine.process.wire import (
    Cancel,
    Detokenize,
    EmbedderReady,
    LoadAdapter,
    Ready,
    SetMarks,
    Start,
    Submit,
    ToEngine,
    ToFront,
    Tokenize,
    UnloadAdapter,
)
from tightrope.engine.protocol import FindMarks
from tightrope.engine.settings import EngineSettings
from tightrope.engine.types import Delta, GenerateRequest, ModelInfo, Prompt, Stats, TokenRun

log = logging.getLogger("tightrope.client")


class EngineClient:
    """One engine, supervised. What an `Engine` offers is described there."""

    def __init__(
        self,
        settings: EngineSettings,
        launch: Launcher = spawn_process,
        clock: Callable[[], float] = time.monotonic,
        *,
        adapters: Mapping[str, str] | None = None,
    ) -> None:
        """adapters: paths, by name, of those that an earlier engine of the model served at last; None: as set."""
        self._settings = settings
        self._clock = clock
        self._exchange = Exchange(self._send, self._take_back, clock)
        self._find_marks: FindMarks | None = None
        self._supervisor = Supervisor(settings.life, launch, self)
        self._first_adapters = None if adapters is None else dict(adapters)
        self.load_share = 0.0

    # ---- life ----

    async def start(self, find_marks: FindMarks | None = None) -> None:
        self._find_marks = find_marks
        await self._supervisor.start()

    async def wait_ready(self) -> ModelInfo:
        await self._supervisor.wait_ready()
        assert self.info is not None
        return self.info

    async def wait_failed(self) -> str:
        return await self._supervisor.wait_failed()

    async def close(self) -> None:
        await self._supervisor.close()
        self._end_streams(EngineUnavailable("the server is shutting down"))

    @property
    def state(self) -> State:
        return self._supervisor.state

    @property
    def restarts(self) -> int:
        return self._supervisor.restarts

    @property
    def private_bytes(self) -> int:
        return 0 if self.engine is None else self.engine.private_bytes()

    @property
    def engine(self) -> EngineHandle | None:
        """The one that was started last."""
        return self._supervisor.handle

    @property
    def is_healthy(self) -> bool:
        return self.state == "ready" and not self._exchange.is_stuck

    # ---- what the engine has said ----

    @property
    def info(self) -> ModelInfo | None:
        return self._exchange.info

    @property
    def adapters(self) -> Mapping[str, str]:
        return self._exchange.adapters

    @property
    def stats(self) -> Stats:
        return self._exchange.stats

    # ---- what the supervisor tells ----

    def first_message(self) -> Start:
        adapters = self._first_adapters if self.info is None else self._exchange.adapters
        return Start(self._settings.model_dump_json(), adapters)

    async def on_loaded(self, info: ModelInfo) -> SetMarks:
        return await marks_of(self._find_marks, info)

    def on_ready(self, ready: Ready | EmbedderReady) -> None:
        assert isinstance(ready, Ready)
        self._exchange.begin(ready)
        for stream in self._exchange.streams.values():  # They were kept while the engine was away.
            if not stream.is_over:
                self._send(stream.submit())
        self._exchange.calls.send_again()

    def on_loading(self, share: float) -> None:
        self.load_share = share

    def on_compiling(self) -> None:
        """Such a step is long and not stuck: its time counts from the end of it."""
        self._exchange.step_begins()

    def on_lost(self) -> None:
        """Answers wait for the next engine, which goes on with them, and so do texts to be read."""
        error = BackendFailed(
            f"the engine process died {MAX_TRIES} times while this answer was being written; it is being restarted"
        )
        streams = self._exchange.streams
        for request_id, stream in list(streams.items()):
            if not stream.is_over and not stream.lose_engine():
                stream.fail(error)
                del streams[request_id]
        gone = EngineUnavailable("the engine has ended meanwhile", retry_after_s=self.retry_after_s)
        self._exchange.calls.lose_engine(
            lambda m, num_lost: isinstance(m, Tokenize | Detokenize) and num_lost < MAX_TRIES, gone
        )

    def on_given_up(self) -> None:
        self._end_streams(
            EngineUnavailable(
                "the engine has ended, and no other could be started in time", retry_after_s=self.retry_after_s
            )
        )

    def _end_streams(self, error: EngineError) -> None:
        self._exchange.end_streams(error)
        self._exchange.calls.fail_all(error)

    # ---- messages ----

    def _send(self, message: ToEngine) -> None:
        self._supervisor.send(message)

    def on_unsent(self, message: ToEngine, reason: Exception) -> None:
        """End what can't be sent."""
        error: EngineError = InvalidRequest(str(reason))
        if not isinstance(reason, ValueError):  # A ValueError tells of a frame that is too long.
            log.error("a message can't be sent: type=%s error=%r", type(message).__name__, reason)
            error = BackendFailed("the request can't be sent to the engine")
        if isinstance(message, Submit) and message.request.request_id in self._exchange.streams:
            self._exchange.streams[message.request.request_id].fail(error)
        elif isinstance(message, Tokenize | Detokenize | LoadAdapter | UnloadAdapter):
            self._exchange.calls.fail(message.call_id, error)

    def on_message(self, message: ToFront) -> None:
        self._exchange.hear(message)

    # ---- requests ----

    def _check_ready(self) -> None:
        if self.state == "ready":
            return
        reasons: dict[State, str] = {
            "loading": "the model is still loading",
            "restarting": "the engine is restarting",
            "failed": f"the model could not be loaded: {self._supervisor.failure}",
            "closed": "the server is shutting down",
        }
        raise EngineUnavailable(reasons.get(self.state, self.state), retry_after_s=self.retry_after_s)

    @property
    def num_running(self) -> int:
        return self._exchange.num_running

    @property
    def num_waiting(self) -> int:
        return self._exchange.num_waiting

    @property
    def retry_after_s(self) -> int:
        return self._exchange.retry_after_s if self.state == "ready" else self._supervisor.back_in_s

    def check_room(self, num_coming: int = 0) -> None:
        num_waiting = self._exchange.num_open + num_coming - self._exchange.num_places
        most = self._settings.limits.max_waiting
        if num_waiting >= most:
            message = f"{num_waiting} requests are waiting already; the limit is {most}"
            raise Overloaded(message, retry_after_s=self.retry_after_s)

    async def generate(self, request: GenerateRequest) -> AsyncGenerator[Delta, None]:
        self._check_ready()
        self.check_room()
        stream = Stream(request, self._clock())
        self._exchange.add(stream, request.request_id)
        self._send(stream.submit())
        try:
            while (delta := await stream.next()) is not None:
                yield delta
        finally:
            self._exchange.streams.pop(request.request_id, None)
            if not stream.is_over and not self._take_back(request.request_id):
                self._send(Cancel(request.request_id))

    async def tokenize(self, prompt: Prompt, adapter: str | None = None, *, last: int | None = None) -> TokenRun:
        tokens = await self._call(lambda call_id: Tokenize(call_id, prompt, adapter, last))
        assert isinstance(tokens, TokenRun)
        return tokens

    async def detokenize(self, token_ids: Sequence[int], adapter: str | None = None) -> str:
        text = await self._call(lambda call_id: Detokenize(call_id, tuple(token_ids), adapter))
        assert isinstance(text, str)
        return text

    async def load_adapter(self, name: str, path: str, *, in_place: bool = False) -> None:
        await self._call(lambda call_id: LoadAdapter(call_id, name, path, in_place))

    async def unload_adapter(self, name: str) -> None:
        await self._call(lambda call_id: UnloadAdapter(call_id, name))

    async def _call(self, make: Callable[[int], ToEngine]) -> Answer:
        self._check_ready()
        return await self._exchange.calls.ask(make)

    def _take_back(self, key: str | int) -> bool:
        return self._supervisor.take_back(key)
