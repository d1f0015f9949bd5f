"""Paths as they are meant: base URLs are typed with a slash at their end, or with a /v1 that the client adds itself."""

import re

from starlette.types import ASGIApp, Receive, Scope, Send

_SLASHES = re.compile("//+")
_DOUBLED = re.compile(r"(/v1|/api)(?:\1)+(?=/|$)")
_LATEST = re.compile("^/api/latest(?=/)")  # KoboldAI has its newest version under this name, too.


def plain_path(path: str) -> str:
    """The path without doubled slashes, without a doubled /v1 or /api, and without a slash at its end."""
    path = _LATEST.sub("/api/v1", _DOUBLED.sub(r"\1", _SLASHES.sub("/", path)))
    return path if path == "/" else path.removesuffix("/")


class PlainPaths:
    """Send every request to the plain form of its path. It stands before all that decides by paths."""

    def __init__(self, app: ASGIApp) -> None:
        self._app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "http" and (path := plain_path(scope["path"])) != scope["path"]:
            scope = {**scope, "path": path}
        await self._app(scope, receive, send)
