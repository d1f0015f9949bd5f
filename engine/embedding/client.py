"""The second engine as the front sees it: texts in, vectors out, supervised as the chat model's engine is.

Imports neither torch nor transformers nor llama_cpp.
"""

import logging
import socket
from collections.abc import Callable, Iterator, Sequence

from tightrope.backends.embedding.card import EmbedderCard
from tightrope.engine.embedding.protocol import Text, Vectors, Wanted
from tightrope.engine.errors import BackendFailed, EngineError, EngineUnavailable, InvalidRequest, Overloaded
from tightrope.engine.process.calls import Calls
from tightrope.engine.process.launch import EngineHandle, Launcher, ProcessHandle, run_process
from tightrope.engine.process.stream import MAX_TRIES
from tightrope.engine.process.supervisor import State, Supervisor
from tightrope.engine.process.wire import (
    CallFailed,
    Embed,
    Embedded,
    EmbedderReady,
    Ready,
    SetMarks,
    Start,
    ToEngine,
    ToFront,
)
from tightrope.engine.settings import EngineSettings
from tightrope.engine.types import ModelInfo
from tightrope.processes import child_command

log = logging.getLogger("tightrope.client")

# A message holds so little that another request's texts come in between, and that nobody waits long for one given up.
PORTION_TEXTS, PORTION_SIZE = 16, 1 << 13


def spawn_embedder(sock: socket.socket) -> ProcessHandle:
    """Start the process on its end of the socket pair; the caller closes its copy of `sock`."""
    return run_process(child_command("tightrope.engine.embedding.child", str(sock.fileno())), sock)


class EmbeddingClient:
    """The embedding and reranking models of one server, supervised. What it offers is described in EmbeddingEngine."""

    def __init__(
        self, settings: EngineSettings, is_busy: Callable[[], bool] = lambda: False, launch: Launcher = spawn_embedder
    ) -> None:
        """is_busy: whether the chat model writes answers now."""
        self._settings = settings
        self._is_busy = is_busy
        self._supervisor = Supervisor(settings.life, launch, self)
        self._calls: Calls[Embedded] = Calls(self._supervisor.send, self._supervisor.take_back)
        self.num_open = 0  # So many requests have not been answered.
        self.num_requests = self.num_texts = self.num_tokens = 0  # So many were answered, of texts and tokens.
        self._is_given_up = False  # Nobody waits for another process any more.
        self.cards: tuple[EmbedderCard, ...] = ()

    @property
    def is_there(self) -> bool:
        return bool(self._settings.model.embedding.models)

    async def start(self) -> None:
        if self.is_there:
            await self._supervisor.start()

    async def wait_ready(self) -> None:
        if self.is_there:
            await self._supervisor.wait_ready()

    async def close(self) -> None:
        await self._supervisor.close()
        self._calls.fail_all(EngineUnavailable("the server is shutting down"))

    @property
    def state(self) -> State:
        return self._supervisor.state

    @property
    def engine(self) -> EngineHandle | None:
        """The process that was started last."""
        return self._supervisor.handle

    @property
    def restarts(self) -> int:
        return self._supervisor.restarts

    @property
    def is_ready(self) -> bool:
        return self.state == "ready"

    @property
    def private_bytes(self) -> int:
        return 0 if self.engine is None else self.engine.private_bytes()

    async def embed(self, texts: Sequence[Text], wanted: Wanted) -> Vectors:
        self.check_ready()
        most = self._settings.limits.max_waiting
        if self.num_open > most:
            raise Overloaded(f"{self.num_open} requests for vectors are waiting already; the limit is {most}")
        self.num_open += 1
        try:
            rows: list[bytes] = []
            num_tokens: list[int] = []
            for first, portion in _portions(texts):
                found = await self._calls.ask(lambda call_id: self._message(call_id, first, portion, wanted))  # noqa: B023
                width = len(found.values) // len(portion)
                rows += (found.values[at : at + width] for at in range(0, len(found.values), width))
                num_tokens += found.num_tokens
            self.num_requests += 1
            self.num_texts += len(texts)
            self.num_tokens += sum(num_tokens)
            return Vectors(tuple(rows), tuple(num_tokens))
        finally:
            self.num_open -= 1

    def _message(self, call_id: int, first: int, texts: tuple[Text, ...], wanted: Wanted) -> Embed:
        return Embed(
            call_id,
            wanted.model,
            texts,
            first,
            wanted.query,
            wanted.cut,
            wanted.dimensions,
            wanted.norm,
            is_busy=self._is_busy(),
        )

    def check_ready(self) -> None:
        if self.state != "ready" and (self.state != "restarting" or self._is_given_up):
            reasons: dict[State, str] = {
                "loading": "the embedding model is still loading",
                "restarting": "the embedding model is being loaded again",
                "failed": f"the embedding model is gone: {self._supervisor.failure}",
                "closed": "the server is shutting down",
            }
            raise EngineUnavailable(reasons.get(self.state, self.state), retry_after_s=self._supervisor.back_in_s)

    # ---- what the supervisor tells ----

    def first_message(self) -> Start:
        return Start(self._settings.model_dump_json())

    async def on_loaded(self, info: ModelInfo) -> SetMarks:
        raise BackendFailed("an engine that embeds has told of a chat model")

    def on_ready(self, ready: Ready | EmbedderReady) -> None:
        assert isinstance(ready, EmbedderReady)
        self.cards = ready.cards
        self._is_given_up = False
        self._calls.send_again()

    def on_message(self, message: ToFront) -> None:
        match message:
            case Embedded(call_id=call_id):
                self._calls.answer(call_id, message)
            case CallFailed(call_id=call_id, error=error):
                self._calls.fail(call_id, error.rebuild())

    def on_loading(self, share: float) -> None:
        """Nobody is told."""

    def on_compiling(self) -> None:
        """Nothing is compiled there."""

    def on_unsent(self, message: ToEngine, reason: Exception) -> None:
        if isinstance(message, Embed):
            error: EngineError = InvalidRequest(str(reason))
            if not isinstance(reason, ValueError):
                log.error("texts can't be sent: error=%r", reason)
                error = BackendFailed("the texts can't be sent to the embedding model")
            self._calls.fail(message.call_id, error)

    def on_lost(self) -> None:
        """Texts wait for the next process, and those that have ended two are given up."""
        gone = EngineUnavailable("the embedding model has ended over these texts", retry_after_s=1)
        self._calls.lose_engine(lambda _, num_lost: num_lost < MAX_TRIES, gone)

    def on_given_up(self) -> None:
        self._is_given_up = True
        self._calls.fail_all(EngineUnavailable("the embedding model has ended, and could not be loaded again in time"))


def _portions(texts: Sequence[Text]) -> Iterator[tuple[int, tuple[Text, ...]]]:
    """The texts in messages, each with the number of its first one; a text is never parted."""
    portion: list[Text] = []
    size = 0
    for number, text in enumerate(texts):
        if portion and (len(portion) == PORTION_TEXTS or size + len(text) > PORTION_SIZE):
            yield number - len(portion), tuple(portion)
            portion, size = [], 0
        portion.append(text)
        size += len(text)
    if portion:
        yield len(texts) - len(portion), tuple(portion)
