"""Streams over sse-starlette: events come in as finished bytes, comments keep silent connections alive."""

import asyncio
import logging
from collections.abc import AsyncGenerator, Callable, Mapping
from contextlib import aclosing
from functools import partial

from sse_starlette import EventSourceResponse, ServerSentEvent
from sse_starlette.sse import AppStatus
from starlette.types import Message, Send

from tightrope.engine.errors import EngineError
from tightrope.server.http.errors import Column, error_event, error_line, unexpected

log = logging.getLogger("tightrope.server")

NEVER_S = 366 * 86400
PING_S = 15  # Proxies cut lines that stay silent for longer than 30 to 60 s.
DONE = b"data: [DONE]\n\n"  # Only /v1 has it, and huggingface_hub compares it byte by byte.

# sse-starlette would cut every stream at SIGTERM; uvicorn's drain limit decides that, and running answers may finish.
AppStatus.enable_automatic_graceful_drain = False


def _ping() -> ServerSentEvent:
    return ServerSentEvent(comment="ping", sep="\n")


class _Stream(EventSourceResponse):
    """No time is set for one event: who takes nothing is dropped by its `Connection`."""

    async def _send_with_timeout(self, send: Send, message: Message) -> None:
        await send(message)


def event_stream(
    events: AsyncGenerator[bytes, None], column: Column, headers: Mapping[str, str], *, has_pings: bool = False
) -> EventSourceResponse:
    """The reply that writes `events` as they come and closes the iterator when the client hangs up.

    It gets a comment after every PING_S of silence, unless `has_pings` says that such are among the events already.
    """
    return _Stream(
        with_errors(events, partial(error_event, column=column)),
        headers={"cache-control": "no-cache", **headers},
        ping=NEVER_S if has_pings else PING_S,
        sep="\n",
        ping_message_factory=_ping,
    )


def line_stream(lines: AsyncGenerator[bytes, None], column: Column, headers: Mapping[str, str]) -> EventSourceResponse:
    """The same for lines of JSON, which have no comments; see `kept_alive`."""
    return _Stream(
        with_errors(lines, partial(error_line, column=column)),
        headers={"cache-control": "no-cache", **headers},
        media_type="application/x-ndjson",
        ping=NEVER_S,
        sep="\n",
    )


async def kept_alive(lines: AsyncGenerator[bytes, None], silence: Callable[[], bytes]) -> AsyncGenerator[bytes, None]:
    """The lines, and one of `silence` after every PING_S without any: clients give up what says nothing for minutes."""
    async with aclosing(lines):
        while True:
            coming = asyncio.ensure_future(anext(lines, None))
            try:
                while not (await asyncio.wait((coming,), timeout=PING_S))[0]:
                    yield silence()
            finally:
                if not coming.done():
                    coming.cancel()
                    await asyncio.wait((coming,))
            if (line := coming.result()) is None:
                return
            yield line


async def with_errors(
    events: AsyncGenerator[bytes, None], told: Callable[[EngineError], bytes]
) -> AsyncGenerator[bytes, None]:
    """The events; a failure in the middle becomes the last of them as it is `told`, for the status is spent."""
    async with aclosing(events):
        try:
            async for event in events:
                yield event
        except EngineError as exc:
            log.error("stream failed: error=%s", exc.message)
            yield told(exc)
        except Exception as exc:  # This is the outermost loop of a stream, above which nothing can still answer.
            yield told(unexpected(exc))
