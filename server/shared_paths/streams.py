"""Paths of streams that one was cut off from: to read on in one, to stop it, and to ask which there are."""

from fastapi import APIRouter, Query, Request, Response
from pydantic import BaseModel, Field

from tightrope.engine.errors import InvalidRequest
from tightrope.server.http.body import Body, JsonRoute
from tightrope.server.http.error_docs import ERRORS, Documented, only
from tightrope.server.http.errors import StreamNotFound
from tightrope.server.http.kept_streams import KeptStream
from tightrope.server.http.resuming import last_event, stream_reply, whole_number
from tightrope.server.state import AppState

MISSING: Documented = {
    404: {**ERRORS[404], "description": "No such stream is kept for this key, or its events aren't."}
}
REST: Documented = {
    **only(400, 401, "default"),
    **MISSING,
    200: {"content": {"text/event-stream": {}}, "description": "The rest of the stream."},
}
FROM = Query("0", alias="from", description="So many bytes have come already.")
CONVERSATION = Query(min_length=1, description="What X-Conversation-Id was in the request that began the stream.")
MOST_NAMES = 10_000  # No list of chats is longer.


class StreamStopped(BaseModel):
    id: str
    stopped: bool = Field(description="Whether its answer was still being written.")


class StreamsAsked(Body):
    conversation_ids: list[str] = Field(max_length=MOST_NAMES)


class StreamFound(BaseModel):
    conversation_id: str
    is_done: bool
    total_bytes: int
    started_at: int = Field(description="Seconds since 1970.")
    completed_at: int = Field(description="Seconds since 1970; 0 while it is written.")


def streams_router(front: AppState) -> APIRouter:
    """Relative to /v1."""
    router = APIRouter(route_class=JsonRoute, tags=["streams"])
    streams = front.streams

    def rest(stream: KeptStream, request: Request, number: str) -> Response:
        if (last := last_event(request)) is None:
            return stream_reply(streams, stream, whole_number(number, "from", "a number of bytes"), {})
        if last[0] != stream.id:
            raise InvalidRequest("Last-Event-ID is of another stream than the one that is asked for", "Last-Event-ID")
        return stream_reply(streams, stream, stream.behind(last[1]), {})

    @router.get("/stream", response_model=None, responses=REST)
    async def read_on_in_conversation(request: Request, conv_id: str = CONVERSATION, number: str = FROM) -> Response:
        """What is behind the first `from` bytes of a conversation's stream, to its end, as in llama.cpp's server."""
        return rest(streams.of_conversation(conv_id, front.owner(request)), request, number)

    @router.delete("/stream", status_code=204, response_class=Response, responses=only(400, 401, "default"))
    async def stop_conversation(request: Request, conv_id: str = CONVERSATION) -> None:
        """Stop the answer of a conversation, if there is one, and forget the stream."""
        try:
            streams.end(streams.of_conversation(conv_id, front.owner(request)))
        except StreamNotFound:
            return  # Who stops it twice gets what was wanted.

    @router.post("/streams/lookup", responses=only(400, 401, 413, 415, "default"))
    async def look_up(body: StreamsAsked, request: Request) -> list[StreamFound]:
        """Which of these conversations have a stream, and how far it is."""
        return [
            StreamFound(
                conversation_id=stream.conversation or "",
                is_done=stream.is_over,
                total_bytes=stream.end_place,
                started_at=int(stream.began_s),
                completed_at=int(stream.ended_s),
            )
            for stream in streams.of_conversations(body.conversation_ids, front.owner(request))
        ]

    @router.get("/stream/{stream_id}", response_model=None, responses=REST)
    async def read_on(stream_id: str, request: Request, number: str = FROM) -> Response:
        """What is behind the first `from` bytes, or behind the event that Last-Event-ID names, to the stream's end."""
        return rest(streams.find(stream_id, front.owner(request)), request, number)

    @router.delete("/stream/{stream_id}", responses={**only(401, "default"), **MISSING})
    async def stop(stream_id: str, request: Request) -> StreamStopped:
        """Stop the answer, and forget the stream."""
        stream = streams.find(stream_id, front.owner(request))
        stopped = StreamStopped(id=stream.id, stopped=not stream.is_over)
        streams.end(stream)
        return stopped

    return router
