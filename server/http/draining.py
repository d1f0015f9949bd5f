"""The end of a server: what is under way is finished, what comes meanwhile is told so, and then it is over."""

import asyncio
import math
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress

from starlette.types import ASGIApp, Receive, Scope, Send

from tightrope.server.http.errors import ShuttingDown
from tightrope.server.http.guards import refuse

OPEN_TO_THE_END = frozenset({"/metrics", "/version"})


class Drain:
    """Whether the server is ending, and the requests that it still owes an answer."""

    def __init__(self, most_s: float) -> None:
        """most_s: how long answers may go on once it has begun."""
        self._most_s = most_s
        self._ends_s: float | None = None  # It is a time of time.monotonic.
        self.num_open = 0
        self._has_begun = asyncio.Event()
        self._is_idle = asyncio.Event()
        self._is_idle.set()

    @property
    def is_on(self) -> bool:
        return self._ends_s is not None

    @property
    def rest_s(self) -> int:
        """Whole seconds after which it is over at the latest, at least 1; another server may be here then."""
        return max(1, math.ceil((self._ends_s or 0.0) - time.monotonic()))

    def begin(self) -> None:
        """Take nothing more from now on."""
        self._ends_s = time.monotonic() + self._most_s
        self._has_begun.set()

    async def over(self) -> None:
        """Return once it has begun and all requests have been answered, or its time is up."""
        await self._has_begun.wait()
        with suppress(TimeoutError):
            async with asyncio.timeout(self._most_s):
                await self._is_idle.wait()

    @contextmanager
    def owing(self) -> Iterator[None]:
        """A request under way."""
        self.num_open += 1
        self._is_idle.clear()
        try:
            yield
        finally:
            self.num_open -= 1
            if not self.num_open:
                self._is_idle.set()


class DrainGuard:
    """Count requests, and refuse those that come after the end has begun."""

    def __init__(self, app: ASGIApp, drain: Drain) -> None:
        self._app = app
        self._drain = drain

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            return await self._app(scope, receive, send)
        if self._drain.is_on and scope["path"] not in OPEN_TO_THE_END:
            error = ShuttingDown("the server is shutting down", retry_after_s=self._drain.rest_s)
            return await refuse(error, scope, receive, send)
        with self._drain.owing():
            return await self._app(scope, receive, send)
