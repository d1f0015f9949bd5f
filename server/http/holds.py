"""What a request holds on to until it has ended, streams included."""

from collections.abc import Callable
from contextlib import ExitStack

from starlette.types import ASGIApp, Receive, Scope, Send

_HOLDS = "holds"  # A request's ExitStack stands in its scope's state under this name.


def release_at_end(scope: Scope, release: Callable[[], None]) -> None:
    """Call `release` when the request has ended, however it ends."""
    holds = scope["state"][_HOLDS]
    assert isinstance(holds, ExitStack)
    holds.callback(release)


class HoldGuard:
    """Give every request what `release_at_end` needs."""

    def __init__(self, app: ASGIApp) -> None:
        self._app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            return await self._app(scope, receive, send)
        with ExitStack() as holds:
            scope.setdefault("state", {})[_HOLDS] = holds
            return await self._app(scope, receive, send)
