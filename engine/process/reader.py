"""What the front asks for, read beside the loop: answered where no model is needed, or prepared for the loop."""

import logging
import queue
import threading
from collections.abc import Callable

from tightrope.backends.errors import BackendError
from tightrope.engine.adapters import Action, AdapterCalls
from tightrope.engine.core import EngineCore
from tightrope.engine.errors import BackendFailed, EngineError, Overloaded
from tightrope.engine.process.held import HeldTeller
from tightrope.engine.process.lanes import SHORT_BYTES, Lanes
from tightrope.engine.process.watch import Watch
from tightrope.engine.process.wire import (
    CallFailed,
    Cancel,
    Detokenize,
    Detokenized,
    Embed,
    EngineEnd,
    ErrorFrame,
    LoadAdapter,
    Progress,
    Refused,
    SetMarks,
    Start,
    Submit,
    TellHeld,
    ToEngine,
    ToFront,
    Tokenize,
    Tokenized,
    UnloadAdapter,
)
from tightrope.engine.prompt_bytes import prompt_bytes, request_bytes
from tightrope.engine.sequence import Sequence
from tightrope.engine.settings import EngineSettings

log = logging.getLogger("tightrope.engine")


class FrontGone:
    """The last item of the inbox."""


Inbox = queue.SimpleQueue[list[Sequence] | Cancel | Action | FrontGone]


class Reader:
    """Reads what the front sends and does none of it itself: the loop runs requests, `Lanes` read their texts.

    Whatever goes wrong with a request is an answer to it. If reading itself goes wrong, nothing would ever be read
    again: the engine ends, and is started anew.
    """

    def __init__(
        self,
        end: EngineEnd,
        core: EngineCore,
        settings: EngineSettings,
        watch: Watch,
        on_end: Callable[[int], None],
    ) -> None:
        """on_end: called when nothing more is read, with the status that the process should end with."""
        self._end = end
        self._core = core
        self._limits = settings.limits
        self._on_end = on_end
        self._watch = watch
        self._lanes = Lanes()
        self._lock = threading.Lock()
        self._num_passed = 0
        self._preparing: dict[str, int] = {}  # It counts answers, by request.
        self.inbox: Inbox = queue.SimpleQueue()
        self._adapters = AdapterCalls(core.adapters, settings.model.adapter_folder, end, self.inbox.put)
        self.held = HeldTeller(core, end, wake=lambda: self.inbox.put(lambda: None))
        self.num_taken = 0  # The loop alone writes it.
        self.status = 0

    def run(self) -> None:
        """Read until the front is gone."""
        try:
            activity = self._watch.activity()
            while (message := self._end.receive()) is not None:
                activity.begin(type(message).__name__)
                self._handle(message)
                activity.end()
        except BaseException:
            log.critical("the engine can read no more requests, and ends", exc_info=True)
            self.status = 1
        self.inbox.put(FrontGone())
        self._on_end(self.status)

    def close(self) -> None:
        """Wait for the text that is being read, if there is one; to be called before the model goes."""
        self._lanes.close()

    def _handle(self, message: ToEngine) -> None:
        match message:
            case Submit():
                self._submit(message)
            case Cancel(request_id=request_id):
                with self._lock:
                    if self._preparing.pop(request_id, None) is None:
                        self.inbox.put(message)
            case Tokenize(call_id=call_id):
                self._call(call_id, prompt_bytes(message.prompt), lambda: self._tokenized(message))
            case Detokenize(call_id=call_id, token_ids=token_ids, adapter=adapter):
                size = len(token_ids)
                self._call(call_id, size, lambda: Detokenized(call_id, self._core.detokenize(token_ids, adapter)))
            case LoadAdapter():
                self._adapters.load(message)
            case UnloadAdapter():
                self._adapters.unload(message)
            case TellHeld():
                self.inbox.put(self.held.begin)
            case Start() | SetMarks() | Embed():
                raise AssertionError(f"a {type(message).__name__} out of place")

    def _call(self, call_id: int, num_bytes: int, answer: Callable[[], ToFront]) -> None:
        def job() -> None:
            try:
                self._end.send(answer())
            except BaseException as error:
                self._end.send(CallFailed(call_id, ErrorFrame.of(_as_engine_error(error, f"call_id={call_id}"))))

        self._read(num_bytes, job)

    def _tokenized(self, message: Tokenize) -> Tokenized:
        tokens = self._core.tokenize(message.prompt, message.adapter, message.last, is_bare=message.is_bare)
        return Tokenized(message.call_id, tokens)

    def _read(self, num_bytes: int, job: Callable[[], None]) -> None:
        """Run what reads a text of so many bytes, beside this thread."""

        def watched() -> None:
            with self._watch.over("text"):
                job()

        self._lanes.put(num_bytes, watched)

    def _submit(self, message: Submit) -> None:
        request, request_id = message.request, message.request.request_id
        with self._lock:
            preparing = sum(self._preparing.values())
            queued = self._core.num_unplaced + self._num_passed - self.num_taken + preparing
            is_refused = queued >= self._limits.max_waiting
            if not is_refused:
                self._preparing[request_id] = max(1, min(request.n, self._limits.max_best_of))
        if is_refused:
            full = Overloaded(f"{queued} requests are waiting already; the limit is {self._limits.max_waiting}")
            self._end.send(Refused(request_id, ErrorFrame.of(full)))
        else:
            least = 0 if self._core.is_quick(request) else SHORT_BYTES + 1  # A new grammar may take seconds.
            self._read(max(least, request_bytes(request)), lambda: self._prepare(message))

    def _prepare(self, message: Submit) -> None:
        request_id = message.request.request_id
        if request_id not in self._preparing:  # It was cancelled.
            return
        self._end.send(Progress(request_id, "preparing"))
        try:
            sequences = self._core.prepare(message.request, message.written)
        except BaseException as error:
            if self._preparing.pop(request_id, None) is not None:
                refusal = _as_engine_error(error, f"request_id={request_id}")
                self._end.send(Refused(request_id, ErrorFrame.of(refusal)))
            return
        with self._lock:
            if self._preparing.pop(request_id, None) is not None:
                self._end.send(Progress(request_id, "waiting"))  # The loop must not say before this that it runs.
                self._num_passed += len(sequences)
                self.inbox.put(sequences)


def _as_engine_error(error: BaseException, where: str) -> EngineError:
    """What a client is told; what nobody foresaw is logged. Tokenizers panic with what is no Exception."""
    if isinstance(error, EngineError):
        return error
    log.error("not read: %s reason=%s", where, error, exc_info=None if isinstance(error, BackendError) else error)
    reason = " ".join(str(error).split()) or type(error).__name__
    return BackendFailed(f"the request can't be read: {reason:.200}")
