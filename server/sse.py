"""Server-sent events over sse-starlette: events come in as finished bytes, comments keep silent lines alive."""

import logging
from collections.abc import AsyncGenerator, Mapping
from contextlib import aclosing

from sse_starlette import EventSourceResponse, ServerSentEvent
from sse_starlette.sse import AppStatus

from tightrope.engine.errors import EngineError
from tightrope.server.errors import Dialect, error_event, unexpected

log = logging.getLogger("tightrope.server")

PING_S = 15  # proxies cut lines that stay silent for longer than 30 to 60 s
DONE = b"data: [DONE]\n\n"  # /v1 alone; compared byte by byte by huggingface_hub

# sse-starlette would cut every stream at SIGTERM; uvicorn's drain limit decides that, and running answers may finish.
AppStatus.enable_automatic_graceful_drain = False


def _ping() -> ServerSentEvent:
    return ServerSentEvent(comment="ping", sep="\n")


def event_stream(
    events: AsyncGenerator[bytes, None], dialect: Dialect, headers: Mapping[str, str] | None = None
) -> EventSourceResponse:
    """The reply that writes `events` as they come and closes the iterator when the client hangs up."""
    return EventSourceResponse(
        with_errors(events, dialect),
        headers={"cache-control": "no-cache", **(headers or {})},
        ping=PING_S,
        sep="\n",
        ping_message_factory=_ping,
    )


async def with_errors(events: AsyncGenerator[bytes, None], dialect: Dialect) -> AsyncGenerator[bytes, None]:
    """The events; a failure in the middle becomes the last of them, for the status is spent."""
    async with aclosing(events):
        try:
            async for event in events:
                yield event
        except EngineError as exc:
            log.error("stream failed: error=%s", exc.message)
            yield error_event(exc, dialect)
        except Exception as exc:  # the outermost loop of a stream: nothing above it can still answer
            yield error_event(unexpected(exc), dialect)
