"""What stands before the routes that queue: a request that finds no place is refused by its head alone.

Reading a body, parsing it and rendering its template take many times as long as a refusal. Under overload most requests
are refused, and the answers that are being written share their event loop with them.
"""

from collections.abc import Callable

from starlette.types import ASGIApp, Message, Receive, Scope, Send

from tightrope.engine.errors import EngineError, Overloaded
from tightrope.server.http.guards import refuse

QUEUEING_ROUTES = frozenset({"/v1/chat/completions", "/chat/completions", "/v1/completions", "/completions"})
QUEUEING_ROUTES |= {"/v1/responses", "/responses", "/v1/messages", "/messages"}
QUEUEING_ROUTES |= {"/", "/generate", "/generate_stream", "/completion", "/api/generate", "/api/chat"}
QUEUEING_ROUTES |= {"/api/v1/generate", "/api/extra/generate/stream"}
# /invocations queues as well, but only its body tells in which dialect it is to be refused.

_ARRIVAL = "arrival"  # A request's Arrival stands in its scope's state under this name.


class Arrival:
    """A request on its way from its last byte to the engine, where the engine counts it."""

    def __init__(self, coming: "set[Arrival]") -> None:
        self._coming = coming

    def has_come(self) -> None:
        """Its body is here."""
        self._coming.add(self)

    def is_handed_over(self) -> None:
        """It counts as one that waits or runs, or has ended."""
        self._coming.discard(self)


def hand_over(scope: Scope) -> None:
    """To be called when the engine is asked for a request's answers."""
    arrival = scope.get("state", {}).get(_ARRIVAL)
    if isinstance(arrival, Arrival):
        arrival.is_handed_over()


class QueueGuard:
    """Refuse what would wait behind too many others, without reading its body.

    Those that are between their last byte and the engine count as waiting, so that of many that come at once no more
    are read than there is room for. A body that is still being sent takes nobody's place.
    """

    def __init__(self, app: ASGIApp, check_room: Callable[[int], None], refused: Callable[[EngineError], None]) -> None:
        """check_room: raises Overloaded if no more may wait beside so many that are coming. refused: hears of it."""
        self._app = app
        self._check_room = check_room
        self._refused = refused
        self._coming: set[Arrival] = set()

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http" or scope["method"] != "POST" or scope["path"] not in QUEUEING_ROUTES:
            return await self._app(scope, receive, send)
        try:
            self._check_room(len(self._coming))
        except Overloaded as error:
            self._refused(error)
            return await refuse(error, scope, receive, send)
        arrival = scope.setdefault("state", {})[_ARRIVAL] = Arrival(self._coming)

        async def watched() -> Message:
            message = await receive()
            if message["type"] == "http.request" and not message.get("more_body", False):
                arrival.has_come()
            return message

        try:
            return await self._app(scope, watched, send)
        finally:
            arrival.is_handed_over()
