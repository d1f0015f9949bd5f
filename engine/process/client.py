"""The `Engine` behind a socket: requests and calls to whichever process or thread is there, supervised.

Imports neither torch nor transformers nor llama_cpp.
"""

import logging
import time
from collections.abc import AsyncGenerator, Callable, Mapping, Sequence

from tightrope.engine.errors import BackendFailed, EngineError, EngineUnavailable, InvalidRequest, Overloaded
from tightrope.engine.process.calls import Calls
from tightrope.engine.process.launch import EngineHandle, Launcher, spawn_process
from tightrope.engine.process.stream import MAX_TRIES, Stream
from tightrope.engine.process.supervisor import State, Supervisor
from tightrope.engine.process.wire import (
    AdapterList,
    CallFailed,
    Cancel,
    Detokenize,
    Detokenized,
    EmbedderReady,
    LoadAdapter,
    Progress,
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
)
from tightrope.engine.protocol import FindMarks
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

log = logging.getLogger("tightrope.client")

Answer = TokenRun | str | dict[str, str]  # A call has such an answer.

STUCK_S = 30.0  # While a step takes longer than this, health says no.


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
        # By the clock the last step ended then, or the first request came to an idle engine, or a compile went on.
        self._step_began_s = 0.0
        self._streams: dict[str, Stream] = {}
        self._times = QueueTimes()
        self._find_marks: FindMarks | None = None
        self._supervisor = Supervisor(settings.life, launch, self)
        self.load_share = 0.0
        self._calls: Calls[Answer] = Calls(self._send, self._take_back)
        self.info: ModelInfo | None = None
        self.adapters: dict[str, str] = {}  # Requests may use these, by name; each has its path.
        self._first_adapters = None if adapters is None else dict(adapters)
        self.stats = Stats()

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
        return self.state == "ready" and not (self._has_work and self._clock() - self._step_began_s > STUCK_S)

    @property
    def _has_work(self) -> bool:
        """Whether the engine owes a step, as far as can be told from here."""
        is_busy = self.stats.num_running + self.stats.num_waiting > 0
        return is_busy or any(stream.is_owed for stream in self._streams.values())

    # ---- what the supervisor tells ----

    def first_message(self) -> Start:
        adapters = self._first_adapters if self.info is None else self.adapters
        return Start(self._settings.model_dump_json(), adapters)

    async def on_loaded(self, info: ModelInfo) -> SetMarks:
        """Find out what the chat template makes special. Raises EngineUnavailable if that can't be."""
        try:
            return SetMarks(TurnMarks() if self._find_marks is None else await self._find_marks(info))
        except OSError as error:
            words = str(error) or "it did not answer in time"
            raise EngineUnavailable(f"the chat template can't be asked what ends a turn: {words}") from None

    def on_ready(self, ready: Ready | EmbedderReady) -> None:
        assert isinstance(ready, Ready)
        self.info, self.adapters = ready.info, ready.adapters
        self.stats = Stats()
        self._step_began_s = self._clock()
        for stream in self._streams.values():  # They were kept while the engine was away.
            if not stream.is_over:
                self._send(stream.submit())
        self._calls.send_again()

    def on_loading(self, share: float) -> None:
        self.load_share = share

    def on_compiling(self) -> None:
        """Such a step is long and not stuck: its time counts from the end of it."""
        self._step_began_s = self._clock()

    def on_lost(self) -> None:
        """Answers wait for the next engine, which goes on with them, and so do texts to be read."""
        error = BackendFailed(
            f"the engine process died {MAX_TRIES} times while this answer was being written; it is being restarted"
        )
        for request_id, stream in list(self._streams.items()):
            if not stream.is_over and not stream.lose_engine():
                stream.fail(error)
                del self._streams[request_id]
        gone = EngineUnavailable("the engine has ended meanwhile", retry_after_s=self.retry_after_s)
        self._calls.lose_engine(lambda m, num_lost: isinstance(m, Tokenize | Detokenize) and num_lost < MAX_TRIES, gone)

    def on_given_up(self) -> None:
        self._end_streams(
            EngineUnavailable(
                "the engine has ended, and no other could be started in time", retry_after_s=self.retry_after_s
            )
        )

    def _end_streams(self, error: EngineError) -> None:
        for stream in self._streams.values():
            if not stream.is_over:
                stream.fail(error)
        self._streams.clear()
        self._calls.fail_all(error)

    # ---- messages ----

    def _send(self, message: ToEngine) -> None:
        self._supervisor.send(message)

    def on_unsent(self, message: ToEngine, reason: Exception) -> None:
        """End what can't be sent."""
        error: EngineError = InvalidRequest(str(reason))
        if not isinstance(reason, ValueError):  # A ValueError tells of a frame that is too long.
            log.error("a message can't be sent: type=%s error=%r", type(message).__name__, reason)
            error = BackendFailed("the request can't be sent to the engine")
        if isinstance(message, Submit) and message.request.request_id in self._streams:
            self._streams[message.request.request_id].fail(error)
        elif isinstance(message, Tokenize | Detokenize | LoadAdapter | UnloadAdapter):
            self._calls.fail(message.call_id, error)

    def on_message(self, message: ToFront) -> None:
        match message:
            case Progress(request_id=request_id, stage=stage):
                if (stream := self._streams.get(request_id)) is not None:
                    stream.has_begun = stage != "waiting"
            case StepDone(deltas=deltas, stats=stats):
                self.stats = stats
                self._step_began_s = self._clock()
                for delta in deltas:
                    stream = self._streams.get(delta.request_id)
                    if delta.finish is not None:
                        self._times.observe(delta.finish)
                    if stream is not None:
                        stream.take(delta, self._step_began_s)
            case Refused(request_id=request_id, error=error):
                stream = self._streams.get(request_id)
                if stream is not None:
                    refusal = error.rebuild()
                    if isinstance(refusal, Overloaded):
                        refusal.retry_after_s = self.retry_after_s
                    stream.fail(refusal)
            case Tokenized(call_id=call_id, tokens=tokens):
                self._calls.answer(call_id, tokens)
            case Detokenized(call_id=call_id, text=text):
                self._calls.answer(call_id, text)
            case AdapterList(call_id=call_id, adapters=adapters, special_texts=texts):
                self.adapters = adapters
                if self.info is not None:
                    self.info = with_adapter_texts(self.info, texts)
                self._calls.answer(call_id, adapters)
            case CallFailed(call_id=call_id, error=error):
                self._calls.fail(call_id, error.rebuild())

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
    def num_open(self) -> int:
        """Answers that have been asked for and have not finished."""
        return sum(stream.num_open for stream in self._streams.values())

    @property
    def num_running(self) -> int:
        return min(self.stats.num_running, self.num_open)  # The engine said so when its step began.

    @property
    def num_waiting(self) -> int:
        return self.num_open - self.num_running  # Some of these the engine has not even read.

    @property
    def retry_after_s(self) -> int:
        if self.state != "ready":
            return self._supervisor.back_in_s
        now = self._clock()
        oldest_s = max((now - stream.arrived_s for stream in self._streams.values() if stream.is_owed), default=0.0)
        return self._times.wait_s(max(0, self.num_open - self._num_places), self._num_places, oldest_s)

    @property
    def _num_places(self) -> int:
        return 1 if self.info is None else self.info.max_num_seqs

    def check_room(self, num_coming: int = 0) -> None:
        num_waiting = self.num_open + num_coming - self._num_places
        most = self._settings.limits.max_waiting
        if num_waiting >= most:
            message = f"{num_waiting} requests are waiting already; the limit is {most}"
            raise Overloaded(message, retry_after_s=self.retry_after_s)

    async def generate(self, request: GenerateRequest) -> AsyncGenerator[Delta, None]:
        self._check_ready()
        self.check_room()
        assert request.request_id not in self._streams, "request ids are unique"
        if not self._has_work:
            self._step_began_s = self._clock()
        stream = self._streams[request.request_id] = Stream(request, self._clock())
        self._send(stream.submit())
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
        return await self._calls.ask(make)

    def _take_back(self, key: str | int) -> bool:
        return self._supervisor.take_back(key)
