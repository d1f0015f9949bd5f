"""uvicorn's HTTP connection with bounds: on how many there are, how large heads get, and how slow clients may be."""

import asyncio
import resource
from typing import Any, ClassVar
from weakref import WeakKeyDictionary

from starlette.types import Message
from uvicorn.config import Config
from uvicorn.protocols.http.httptools_impl import HttpToolsProtocol, RequestResponseCycle
from uvicorn.server import ServerState

from tightrope.server.http.plain_parser import PlainParser

HEAD_TIMEOUT_S = 20.0  # It runs from a connection's begin, or a request's first byte, to the end of its headers.
SEND_TIMEOUT_S = 30.0  # A client that takes nothing for so long, with its buffer full, is dropped.
MAX_HEAD_BYTES = 32 << 10  # The first line and all headers have at most so many.
MAX_CONNECTIONS = 4096
TOO_LARGE = (
    b"HTTP/1.1 431 Request Header Fields Too Large\r\n"
    b"content-type: application/json\r\nconnection: close\r\ncontent-length: %d\r\n\r\n"
)
SPARE_FILES = 64  # The model, the engine and the log need some of the descriptors.


def most_connections() -> int:
    """How many connections may be open, by this process' limit of file descriptors."""
    soft, _ = resource.getrlimit(resource.RLIMIT_NOFILE)
    return max(SPARE_FILES // 4, min(MAX_CONNECTIONS, soft - SPARE_FILES))


class _HeadTooLarge(Exception):
    """Raised inside the parser; it comes out as a parser's error."""


class Connection(HttpToolsProtocol):
    """One client. Above the most, the connection that has been without a request for longest makes room."""

    # By server, the connections that are without a request, for longest first: thousands of newcomers look for one.
    _idle_of: ClassVar[WeakKeyDictionary[ServerState, dict["Connection", None]]] = WeakKeyDictionary()

    def __init__(
        self,
        config: Config,
        server_state: ServerState,
        app_state: dict[str, Any],  # uvicorn has it so.
        _loop: asyncio.AbstractEventLoop | None = None,
    ) -> None:
        super().__init__(config, server_state, app_state, _loop)
        self.parser = PlainParser(self)  # type: ignore[assignment]  # It does what uvicorn asks of httptools' own.
        self._head_timer: asyncio.TimerHandle | None = None
        self._send_timer: asyncio.TimerHandle | None = None
        self._head_bytes: int | None = 0  # It counts the head that is coming in, and is None while a body does.
        self._is_head_too_large = False
        self._idle = self._idle_of.setdefault(server_state, {})

    # ---- life ----

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]  # as uvicorn has it
        super().connection_made(transport)
        self._head_timer = self.loop.call_later(HEAD_TIMEOUT_S, self._abort)
        self._idle[self] = None
        if len(self.connections) > most_connections():
            oldest = next(iter(self._idle))  # This one is idle itself.
            del self._idle[oldest]  # Several newcomers may come before it is lost.
            oldest.transport.abort()

    def connection_lost(self, exc: Exception | None) -> None:
        for timer in (self._head_timer, self._send_timer):
            if timer is not None:
                timer.cancel()
        self._idle.pop(self, None)
        super().connection_lost(exc)

    def _abort(self) -> None:
        """Close at once; what is still to be sent is dropped, and the work for it is cancelled."""
        self.transport.abort()

    def on_response_complete(self) -> None:
        super().on_response_complete()
        if self.cycle is None or self.cycle.response_complete:  # Otherwise the next request of a pipeline is under way.
            self._idle[self] = None

    # ---- heads ----

    def data_received(self, data: bytes) -> None:
        if self._head_bytes is not None:
            self._head_bytes += len(data)
        super().data_received(data)
        if self._head_bytes is not None and self._head_bytes > MAX_HEAD_BYTES and not self.transport.is_closing():
            self._is_head_too_large = True
            self.send_400_response("the first line and the headers are too long")

    def on_message_begin(self) -> None:
        super().on_message_begin()
        if self._head_timer is None:
            self._head_timer = self.loop.call_later(HEAD_TIMEOUT_S, self._abort)

    def on_headers_complete(self) -> None:
        if self.parser.should_upgrade():  # The parser reads the head once more.
            return
        self._head_bytes = None
        if self._head_timer is not None:
            self._head_timer.cancel()
            self._head_timer = None
        if len(self.url) + sum(len(name) + len(value) for name, value in self.headers) > MAX_HEAD_BYTES:
            self._is_head_too_large = True
            raise _HeadTooLarge
        self._idle.pop(self, None)
        super().on_headers_complete()
        if self.scope["http_version"] == "1.0":
            _end_by_closing(self.cycle)

    def on_message_complete(self) -> None:
        if self.parser.should_upgrade():
            return
        self._head_bytes = 0
        super().on_message_complete()

    def send_400_response(self, msg: str) -> None:
        """uvicorn's reply to what is no HTTP, and ours to what is too much of it."""
        if not self._is_head_too_large:
            super().send_400_response(msg)
            return
        text = f"the first line and the headers are longer than {MAX_HEAD_BYTES} bytes"
        body = b'{"error":{"message":"%b","type":"invalid_request_error","param":null,"code":null}}' % text.encode()
        self.transport.write(TOO_LARGE % len(body) + body)
        self.transport.close()

    # ---- slow readers ----

    def pause_writing(self) -> None:
        super().pause_writing()
        self._send_timer = self.loop.call_later(SEND_TIMEOUT_S, self._abort)

    def resume_writing(self) -> None:
        if self._send_timer is not None:
            self._send_timer.cancel()
            self._send_timer = None
        super().resume_writing()


def _end_by_closing(cycle: RequestResponseCycle) -> None:
    """Have an answer of unknown length end with its connection: HTTP/1.0 knows no chunks, which uvicorn would send."""
    plain_send = cycle.send
    ends_by_closing = False

    async def send(message: Message) -> None:
        nonlocal ends_by_closing
        if message["type"] == "http.response.start":
            ends_by_closing = all(name.lower() != b"content-length" for name, _ in message.get("headers", ()))
            if ends_by_closing:
                cycle.chunked_encoding = False
        elif ends_by_closing:
            cycle.expected_content_length = len(message.get("body", b""))  # So much is right, each time.
        await plain_send(message)  # type: ignore[arg-type]  # uvicorn has types of its own for the same

    cycle.send = send  # type: ignore[method-assign, assignment]
