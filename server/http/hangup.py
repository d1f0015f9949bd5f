"""Work for a client that may hang up while it is done."""

import asyncio
from collections.abc import Coroutine
from typing import Any, TypeVar

from fastapi import Request

from tightrope.server.http.errors import ClientGone

T = TypeVar("T")


async def or_gone(request: Request, work: Coroutine[Any, Any, T]) -> T:
    """Await `work`, but cancel it and raise ClientGone as soon as the client hangs up."""
    return await unless(_hung_up(request), work)


async def unless(ending: Coroutine[Any, Any, None], work: Coroutine[Any, Any, T]) -> T:
    """Await `work`, but cancel it and raise ClientGone as soon as `ending` is done."""
    task = asyncio.ensure_future(work)
    watcher = asyncio.ensure_future(ending)
    try:
        await asyncio.wait((task, watcher), return_when=asyncio.FIRST_COMPLETED)
        if not task.done():
            raise ClientGone("the client closed the connection")
        return task.result()
    finally:
        task.cancel()
        watcher.cancel()
        await asyncio.gather(task, watcher, return_exceptions=True)


async def _hung_up(request: Request) -> None:
    while (await request.receive())["type"] != "http.disconnect":
        pass
