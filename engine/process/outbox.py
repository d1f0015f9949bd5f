"""Messages on their way to the engine process: one that stands still holds up what follows, and no memory piles up."""

import asyncio
from collections.abc import Callable
from contextlib import suppress

from tightrope.engine.process.wire import Embed, Submit, ToEngine, Tokenize, encode_frame

Unsent = Callable[[ToEngine, Exception], None]


class Outbox:
    """A queue that is written as fast as the engine reads. What is given up before that leaves nothing behind."""

    def __init__(self, unsent: Unsent) -> None:
        """unsent: hears of a message that makes no frame, and why."""
        self._messages: dict[object, ToEngine] = {}  # They stand in their order.
        self._has_more = asyncio.Event()
        self._unsent = unsent

    def put(self, message: ToEngine) -> None:
        """Send a message behind those that wait."""
        match message:
            case Submit(request=request):
                key: object = request.request_id
            case Tokenize(call_id=call_id) | Embed(call_id=call_id):
                key = call_id
            case _:
                key = object()
        self._messages[key] = message
        self._has_more.set()

    def take_back(self, key: str | int) -> bool:
        """Forget a request or a call, by its id; False if it is on its way already."""
        return self._messages.pop(key, None) is not None

    async def write_to(self, writer: asyncio.StreamWriter) -> None:
        """Write until the engine is gone."""
        with suppress(ConnectionError):  # The reader of the same socket tells of it.
            while True:
                await self._has_more.wait()
                while self._messages:
                    message = self._messages.pop(next(iter(self._messages)))
                    try:
                        writer.write(encode_frame(message))
                    except Exception as error:  # It is of one message, and those behind it are to go on.
                        self._unsent(message, error)
                    del message  # Otherwise its text stays in memory for as long as the next one waits.
                    await writer.drain()
                self._has_more.clear()
