"""HEAD wherever GET is: health checks and monitors ask so, and want the same answer without its body."""

from starlette.types import ASGIApp, Message, Receive, Scope, Send


class HeadAsGet:
    """Answer HEAD by what answers GET, which is told that its client has gone once it has begun."""

    def __init__(self, app: ASGIApp) -> None:
        self._app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http" or scope["method"] != "HEAD":
            return await self._app(scope, receive, send)
        has_begun = False

        async def head_alone(message: Message) -> None:
            nonlocal has_begun
            if has_begun:
                return
            await send(message)
            has_begun = message["type"] == "http.response.start"
            if has_begun:
                await send({"type": "http.response.body"})

        async def until_begun() -> Message:
            return {"type": "http.disconnect"} if has_begun else await receive()

        return await self._app({**scope, "method": "GET"}, until_begun, head_alone)
