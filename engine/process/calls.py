"""Questions to an engine that have no answer yet, kept by the front, so that another engine can be asked again."""

import asyncio
from collections.abc import Callable
from itertools import count
from typing import Generic, TypeVar

from tightrope.engine.errors import EngineError
from tightrope.engine.process.wire import ToEngine

T = TypeVar("T")


class _Call(Generic[T]):
    """One question. Belongs to the running event loop."""

    def __init__(self, message: ToEngine) -> None:
        self.message = message
        self.answer: asyncio.Future[T] = asyncio.get_running_loop().create_future()
        self.num_lost = 0  # So many engines have ended meanwhile.

    def fail(self, error: EngineError) -> None:
        if not self.answer.done():
            self.answer.set_exception(error)


class Calls(Generic[T]):
    """All questions to one engine, by their numbers; T is what answers are."""

    def __init__(self, send: Callable[[ToEngine], None], take_back: Callable[[int], bool]) -> None:
        """take_back: forgets a message that has not been sent."""
        self._send, self._take_back = send, take_back
        self._open: dict[int, _Call[T]] = {}
        self._ids = count()

    def __len__(self) -> int:
        return len(self._open)

    async def ask(self, make: Callable[[int], ToEngine]) -> T:
        """Send what `make` gives for a number, and wait for the answer. Raises what the engine or `fail` says."""
        call_id = next(self._ids)
        call = self._open[call_id] = _Call(make(call_id))
        self._send(call.message)
        try:
            return await call.answer
        finally:
            self._open.pop(call_id, None)
            self._take_back(call_id)

    def answer(self, call_id: int, value: T) -> None:
        call = self._open.pop(call_id, None)
        if call is not None and not call.answer.done():
            call.answer.set_result(value)

    def fail(self, call_id: int, error: EngineError) -> None:
        call = self._open.pop(call_id, None)
        if call is not None:
            call.fail(error)

    def fail_all(self, error: EngineError) -> None:
        for call in self._open.values():
            call.fail(error)
        self._open.clear()

    def send_again(self) -> None:
        """To the next engine."""
        for call in self._open.values():
            self._send(call.message)

    def lose_engine(self, keeps: Callable[[ToEngine, int], bool], error: EngineError) -> None:
        """Fail the others than `keeps` wants, which is told each message and how many engines have ended over it."""
        for call_id, call in list(self._open.items()):
            call.num_lost += 1
            if not keeps(call.message, call.num_lost):
                call.fail(error)
                del self._open[call_id]
