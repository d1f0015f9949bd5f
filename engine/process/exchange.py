"""What is under way between a front and one engine: answers, questions, and what the engine has said of itself.

Imports neither torch nor transformers nor llama_cpp.
"""

import time
from collections.abc import Callable

from tightrope.engine.errors import EngineError, EngineUnavailable, Overloaded
from tightrope.engine.process.calls import Calls
from tightrope.engine.process.stream import Stream
from tightrope.engine.process.wire import (
    AdapterList,
    CallFailed,
    Detokenized,
    Progress,
    Ready,
    Refused,
    SetMarks,
    StepDone,
    ToEngine,
    ToFront,
    Tokenized,
)
from tightrope.engine.protocol import FindMarks
from tightrope.engine.queueing import QueueTimes
from tightrope.engine.types import ModelInfo, Stats, TokenRun, TurnMarks, with_adapter_texts

Answer = TokenRun | str | dict[str, str]  # A call has such an answer.

STUCK_S = 30.0  # While a step takes longer than this, health says no.


class Exchange:
    """All of it belongs to one event loop. Streams are those that the engine has, by what it calls them."""

    def __init__(
        self,
        send: Callable[[ToEngine], None],
        take_back: Callable[[int], bool],
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        """take_back: forgets a call that has not been sent."""
        self._clock = clock
        # By the clock the last step ended then, or the first request came to an idle engine, or a compile went on.
        self._step_began_s = 0.0
        self._times = QueueTimes()
        self.streams: dict[str, Stream] = {}
        self.calls: Calls[Answer] = Calls(send, take_back)
        self.info: ModelInfo | None = None
        self.adapters: dict[str, str] = {}  # Requests may use these, by name; each has its path.
        self.stats = Stats()

    # ---- what the engine says ----

    def begin(self, ready: Ready) -> None:
        """An engine takes requests."""
        self.info, self.adapters = ready.info, ready.adapters
        self.stats = Stats()
        self.step_begins()

    def step_begins(self) -> None:
        """What was under way so long is no stuck step."""
        self._step_began_s = self._clock()

    def hear(self, message: ToFront) -> None:
        match message:
            case Progress(request_id=request_id, stage=stage):
                if (stream := self.streams.get(request_id)) is not None:
                    stream.has_begun = stage != "waiting"
            case StepDone():
                self._take(message)
            case Refused(request_id=request_id, error=error):
                if (stream := self.streams.get(request_id)) is not None:
                    refusal = error.rebuild()
                    if isinstance(refusal, Overloaded):
                        refusal.retry_after_s = self.retry_after_s
                    stream.fail(refusal)
            case Tokenized(call_id=call_id, tokens=tokens):
                self.calls.answer(call_id, tokens)
            case Detokenized(call_id=call_id, text=text):
                self.calls.answer(call_id, text)
            case AdapterList(call_id=call_id, adapters=adapters, special_texts=texts):
                self.adapters = adapters
                if self.info is not None:
                    self.info = with_adapter_texts(self.info, texts)
                self.calls.answer(call_id, adapters)
            case CallFailed(call_id=call_id, error=error):
                self.calls.fail(call_id, error.rebuild())

    def _take(self, step: StepDone) -> None:
        self.stats = self.stats if step.stats is None else step.stats
        self.step_begins()
        for delta in step.deltas:
            if delta.finish is not None:
                self._times.observe(delta.finish)
            if (stream := self.streams.get(delta.request_id)) is not None:
                stream.take(delta, self._step_began_s)

    # ---- requests ----

    def add(self, stream: Stream, name: str) -> None:
        """The engine is asked for this, under this name."""
        assert name not in self.streams, "request ids are unique"
        if not self.has_work:
            self.step_begins()
        self.streams[name] = stream

    def end_streams(self, error: EngineError) -> None:
        for stream in self.streams.values():
            if not stream.is_over:
                stream.fail(error)
        self.streams.clear()

    # ---- how busy the engine is ----

    @property
    def has_work(self) -> bool:
        """Whether the engine owes a step, as far as can be told from here."""
        is_busy = self.stats.num_running + self.stats.num_waiting > 0
        return is_busy or any(stream.is_owed for stream in self.streams.values())

    @property
    def is_stuck(self) -> bool:
        return self.has_work and self._clock() - self._step_began_s > STUCK_S

    @property
    def num_open(self) -> int:
        """Answers that have been asked for and have not finished."""
        return sum(stream.num_open for stream in self.streams.values())

    @property
    def num_running(self) -> int:
        return min(self.stats.num_running, self.num_open)  # The engine said so when its step began.

    @property
    def num_waiting(self) -> int:
        return self.num_open - self.num_running  # Some of these the engine has not even read.

    @property
    def num_places(self) -> int:
        return 1 if self.info is None else self.info.max_num_seqs

    @property
    def retry_after_s(self) -> int:
        """Seconds after which one who comes now would get a place."""
        now = self._clock()
        oldest_s = max((now - stream.arrived_s for stream in self.streams.values() if stream.is_owed), default=0.0)
        return self._times.wait_s(max(0, self.num_open - self.num_places), self.num_places, oldest_s)


async def marks_of(find_marks: FindMarks | None, info: ModelInfo) -> SetMarks:
    """What the chat template makes special. Raises EngineUnavailable if that can't be found out."""
    try:
        return SetMarks(TurnMarks() if find_marks is None else await find_marks(info))
    except OSError as error:
        words = str(error) or "it did not answer in time"
        raise EngineUnavailable(f"the chat template can't be asked what ends a turn: {words}") from None
