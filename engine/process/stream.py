"""One request under way, as the front keeps it, so that another engine can go on with its answer.

Imports neither torch nor transformers nor llama_cpp.
"""

import asyncio
from array import array
from dataclasses import dataclass, field

from msgspec.structs import replace

from tightrope.engine.errors import EngineError
from tightrope.engine.process.wire import Submit
from tightrope.engine.types import Delta, Finish, GenerateRequest, Layout, Timings, Written

MAX_TRIES = 2  # A request that kills the engine is not to do so for ever.


@dataclass(slots=True)
class _Choice:
    """What has come of one choice."""

    seed: int
    token_ids: "array[int]" = field(default_factory=lambda: array("i"))
    mu: float | None = None
    layout: Layout = Layout(is_exact=False)  # noqa: RUF009  # It never changes.
    is_finished: bool = False
    is_resumed: bool = False

    def written(self) -> Written:
        return Written(self.token_ids.tobytes(), self.seed, self.mu, self.layout, self.is_finished)


class Stream:
    """What one request asks for and what came of it. Tokens count as given out once they are here."""

    def __init__(self, request: GenerateRequest, arrived_s: float) -> None:
        self.has_begun = False  # The present engine may end because of it.
        self.num_open = request.n  # So many choices have not finished.
        self.arrived_s = arrived_s
        self.request = request
        self.items: asyncio.Queue[Delta | EngineError] = asyncio.Queue()
        self._num_unread = request.n  # So many choices have not been read to their end.
        self._num_tries = 0  # So many engines have ended while it had begun.
        self._is_over = False
        self._has_output = False  # The present engine has written some of it.
        self._choices: list[_Choice | None] = [None] * request.n
        self._first_s = arrived_s  # By the clock the first token came then.

    @property
    def is_over(self) -> bool:
        """Whether an engine has nothing more to do for it."""
        return self._is_over or not self.num_open

    @property
    def is_owed(self) -> bool:
        """Whether the present engine has written nothing of it yet."""
        return not self.is_over and not self._has_output

    @property
    def has_tokens(self) -> bool:
        """Whether something has been given out, by whichever engine."""
        return any(choice is not None for choice in self._choices)

    def submit(self) -> Submit:
        """What the present engine is to be asked."""
        if not self.has_tokens:
            return Submit(self.request)
        return Submit(self.request, tuple(None if one is None else one.written() for one in self._choices))

    def take(self, delta: Delta, now_s: float) -> None:
        """Give a delta out, and keep what another engine would need of it."""
        if delta.read is None:
            self._has_output = True
            if not self.has_tokens:
                self._first_s = now_s
            delta = self._kept(delta, now_s)
        self.items.put_nowait(delta)

    async def next(self) -> Delta | None:
        """What is given out next; None behind the end of the last choice. Raises what the stream has failed with."""
        if not self._num_unread:
            return None
        item = await self.items.get()
        if isinstance(item, EngineError):
            raise item
        self._num_unread -= item.finish is not None
        return item

    def _kept(self, delta: Delta, now_s: float) -> Delta:
        choice = self._choices[delta.index]
        if choice is None:
            assert delta.prompt is not None, "the first delta of a choice tells its seed"
            choice = self._choices[delta.index] = _Choice(delta.prompt.seed)
        choice.token_ids.extend(token.token_id for token in delta.tokens)
        if delta.carry is not None:
            choice.mu = delta.carry.mu
            choice.layout = choice.layout if delta.carry.layout is None else delta.carry.layout
        if delta.finish is None:
            return delta
        choice.is_finished = True
        self.num_open -= 1
        return replace(delta, finish=self._timed(delta.finish, now_s)) if choice.is_resumed else delta

    def _timed(self, finish: Finish, now_s: float) -> Finish:
        """With the times of all engines: the last one knows of its own alone."""
        return replace(finish, timings=Timings(0.0, self._first_s - self.arrived_s, now_s - self._first_s))

    def fail(self, error: EngineError) -> None:
        """Nothing more comes."""
        self._is_over = True
        self.items.put_nowait(error)

    def lose_engine(self, *, may_be_guilty: bool = True) -> bool:
        """The engine has ended, or has to; whether another one is to go on with this.

        An engine that ends while a request runs may have ended because of it, unless that is known to be otherwise.
        One that only waits for its turn is kept for any number of them.
        """
        self._num_tries += self.has_begun and may_be_guilty
        self.has_begun = self._has_output = False
        for choice in self._choices:
            if choice is not None:
                choice.is_resumed = True
        return self._num_tries < MAX_TRIES
