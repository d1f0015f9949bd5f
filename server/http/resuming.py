"""How a client asks for a stream that it may come back to, and says where it was."""

from collections.abc import Mapping

from fastapi import Request, Response

from tightrope.engine.errors import InvalidRequest
from tightrope.server.http.kept_streams import KeptStream, KeptStreams
from tightrope.server.http.sse import event_stream, line_stream

RESUMABLE, STREAM_ID, LAST_EVENT_ID = "x-resumable", "x-stream-id", "last-event-id"
SESSION = "x-session-id"  # Routers of many engines know it.
CONVERSATION = "x-conversation-id"  # In llama.cpp's server it asks for the same, and names the stream.
_MOST_DIGITS = 15  # A number of more is none that was given to anybody.
_MOST_LETTERS = 256


def asks_to_resume(request: Request, field: bool | None) -> bool:
    """Whether the header or the body's field asks for it. Raises InvalidRequest for a header that says neither."""
    header = request.headers.get(RESUMABLE)
    if header is not None and header.strip() not in ("0", "1"):
        raise InvalidRequest(f"the header X-Resumable must be 1 or 0, not {header[:100]!r}", "X-Resumable")
    return bool(field) or (header is not None and header.strip() == "1")


def conversation_of(request: Request) -> str | None:
    """The name that the client gives its stream; None where it gives none. Raises InvalidRequest for a long one."""
    name = request.headers.get(CONVERSATION, "").encode("latin-1").decode("utf-8", "replace").strip()
    if len(name) > _MOST_LETTERS:
        raise InvalidRequest(f"X-Conversation-Id has {len(name)} letters; it may have {_MOST_LETTERS}", CONVERSATION)
    return name or None


def session_of(request: Request) -> str:
    """The name that the client gives its session; empty where it gives none. Raises InvalidRequest for a long one."""
    name = request.headers.get(SESSION, "")
    if len(name) > _MOST_LETTERS:
        raise InvalidRequest(f"X-Session-Id has {len(name)} letters; it may have {_MOST_LETTERS}", SESSION)
    return name


def last_event(request: Request) -> tuple[str, int] | None:
    """The stream and the number of its last event that the client had; None where it says none.

    Raises InvalidRequest for an id that isn't one of ours.
    """
    header = request.headers.get(LAST_EVENT_ID, "").strip()
    if not header:
        return None
    stream_id, _, number = header.rpartition(".")
    if not stream_id:
        raise InvalidRequest(f"Last-Event-ID must be the id of an event, not {header[:100]!r}", "Last-Event-ID")
    return stream_id, whole_number(number, "Last-Event-ID", "the number of an event")


def whole_number(text: str, name: str, what: str) -> int:
    """How many events or bytes a client had. Raises InvalidRequest."""
    if not (text.isascii() and text.isdecimal() and len(text) <= _MOST_DIGITS):
        raise InvalidRequest(f"{name}: expected {what}, from 0 on, not {text[:100]!r}", name)
    return int(text)


def stream_reply(streams: KeptStreams, stream: KeptStream, place: int, headers: Mapping[str, str]) -> Response:
    """The reply that reads on behind the first `place` bytes. Raises StreamNotFound and InvalidRequest."""
    stream.check(place)
    pieces, told = streams.read(stream, place), {**headers, STREAM_ID: stream.id}
    return (
        line_stream(pieces, stream.column, told)
        if stream.is_lines
        else event_stream(pieces, stream.column, told, has_pings=True)
    )
