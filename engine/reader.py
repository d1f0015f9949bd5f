"""What the front asks for, read beside the loop: answered here where no model is needed, or prepared for the loop."""

import queue
from collections.abc import Callable

from tightrope.engine.adapters import Action, AdapterCalls
from tightrope.engine.core import EngineCore
from tightrope.engine.errors import EngineError, Overloaded
from tightrope.engine.sequence import Sequence
from tightrope.engine.settings import EngineSettings
from tightrope.engine.types import GenerateRequest
from tightrope.engine.wire import (
    CallFailed,
    Cancel,
    Detokenize,
    Detokenized,
    EngineEnd,
    ErrorFrame,
    LoadAdapter,
    Refused,
    SetMarks,
    Start,
    Submit,
    ToEngine,
    Tokenize,
    Tokenized,
    UnloadAdapter,
)


class FrontGone:
    """The last item of the inbox."""


Inbox = queue.SimpleQueue[list[Sequence] | Cancel | Action | FrontGone]


class Reader:
    """Answers what needs no model, prepares what does, and passes it to the loop."""

    def __init__(
        self, end: EngineEnd, core: EngineCore, settings: EngineSettings, on_front_gone: Callable[[], None]
    ) -> None:
        self._end = end
        self._core = core
        self._limits = settings.limits
        self._on_front_gone = on_front_gone
        self._num_passed = 0
        self.inbox: Inbox = queue.SimpleQueue()
        self._adapters = AdapterCalls(core.adapters, settings.model.adapter_folder, end, self.inbox.put)
        self.num_taken = 0  # written by the loop alone

    def run(self) -> None:
        while (message := self._end.receive()) is not None:
            self._handle(message)
        self.inbox.put(FrontGone())
        self._on_front_gone()

    def _handle(self, message: ToEngine) -> None:
        match message:
            case Submit(request=request):
                self._submit(request)
            case Cancel():
                self.inbox.put(message)
            case Tokenize(call_id=call_id, prompt=prompt, adapter=adapter):
                try:
                    self._end.send(Tokenized(call_id, self._core.tokenize(prompt, adapter)))
                except EngineError as error:
                    self._end.send(CallFailed(call_id, ErrorFrame.of(error)))
            case Detokenize(call_id=call_id, token_ids=token_ids, adapter=adapter):
                try:
                    self._end.send(Detokenized(call_id, self._core.detokenize(token_ids, adapter)))
                except EngineError as error:
                    self._end.send(CallFailed(call_id, ErrorFrame.of(error)))
            case LoadAdapter():
                self._adapters.load(message)
            case UnloadAdapter():
                self._adapters.unload(message)
            case Start() | SetMarks():
                raise AssertionError(f"a second {type(message).__name__}")

    def _submit(self, request: GenerateRequest) -> None:
        try:
            queued = self._core.num_unplaced + self._num_passed - self.num_taken
            if queued >= self._limits.max_waiting:
                raise Overloaded(f"{queued} requests are waiting already; the limit is {self._limits.max_waiting}")
            sequences = self._core.prepare(request)
        except EngineError as error:
            self._end.send(Refused(request.request_id, ErrorFrame.of(error)))
            return
        self._num_passed += len(sequences)
        self.inbox.put(sequences)
