"""GET and DELETE /v1/stream/{id}: to read on in a stream that one was cut off from, and to stop it."""

from fastapi import APIRouter, Query, Request, Response
from pydantic import BaseModel, Field

from tightrope.engine.errors import InvalidRequest
from tightrope.server.http.body import JsonRoute
from tightrope.server.http.error_docs import ERRORS, Documented, only
from tightrope.server.http.resuming import event_number, last_event, stream_reply
from tightrope.server.state import AppState

MISSING: Documented = {
    404: {**ERRORS[404], "description": "No such stream is kept for this key, or its events aren't."}
}


class StreamStopped(BaseModel):
    id: str
    stopped: bool = Field(description="Whether its answer was still being written.")


def streams_router(front: AppState) -> APIRouter:
    """Relative to /v1."""
    router = APIRouter(route_class=JsonRoute, tags=["streams"])

    @router.get(
        "/stream/{stream_id}",
        response_model=None,
        responses={
            **only(400, 401, "default"),
            **MISSING,
            200: {"content": {"text/event-stream": {}}, "description": "The rest of the stream."},
        },
    )
    async def read_on(
        stream_id: str,
        request: Request,
        number: str = Query("0", alias="from", description="So many events have come already."),
    ) -> Response:
        """The events behind the first `from`, or behind the one that Last-Event-ID names, to the stream's end."""
        stream = front.streams.find(stream_id, front.owner(request))
        last = last_event(request) or (stream_id, event_number(number, "from"))
        if last[0] != stream_id:
            raise InvalidRequest(f"Last-Event-ID is of another stream than {stream_id[:100]!r}", "Last-Event-ID")
        return stream_reply(front.streams, stream, last[1], {})

    @router.delete("/stream/{stream_id}", responses={**only(401, "default"), **MISSING})
    async def stop(stream_id: str, request: Request) -> StreamStopped:
        """Stop the answer, and forget the stream."""
        stream = front.streams.find(stream_id, front.owner(request))
        stopped = StreamStopped(id=stream.id, stopped=not stream.is_over)
        front.streams.end(stream)
        return stopped

    return router
