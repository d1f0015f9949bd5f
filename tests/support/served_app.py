"""The application of fake_api on a real port, and raw requests to it."""

import asyncio
import socket
from collections.abc import AsyncGenerator, Iterator
from contextlib import asynccontextmanager, contextmanager

import msgspec
import uvicorn
from fake_api import NextToken, application

from tightrope.server.http.connections import Connection

PATIENCE_S = 120


class Server(uvicorn.Server):
    """uvicorn's server, which leaves the test's signals alone."""

    @contextmanager
    def capture_signals(self) -> Iterator[None]:
        yield


@asynccontextmanager
async def serving(
    answer: str | NextToken = "fine", *, send_buffer: int | None = None, **settings: object
) -> AsyncGenerator[int, None]:
    """The application on a real port of this machine; yields the port."""
    with socket.create_server(("127.0.0.1", 0)) as listener:
        if send_buffer is not None:
            listener.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, send_buffer)  # accepted connections inherit it
        listener.setblocking(False)
        async with application(answer, **settings) as app:
            server = Server(uvicorn.Config(app, http=Connection, ws="none", lifespan="off", log_config=None))
            running = asyncio.create_task(server.serve([listener]))
            try:
                yield listener.getsockname()[1]
            finally:
                server.should_exit = server.force_exit = True
                await running


def request(path: str, body: dict[str, object] | bytes, *headers: str, method: str = "POST") -> bytes:
    raw = body if isinstance(body, bytes) else msgspec.json.encode(body)
    lines = [f"{method} {path} HTTP/1.1", "host: localhost", "content-type: application/json", *headers]
    if not any(header.startswith("content-length") for header in headers):
        lines.append(f"content-length: {len(raw)}")
    return "\r\n".join([*lines, "", ""]).encode() + raw


async def reply_to(port: int, raw: bytes) -> bytes:
    """All that comes back on a connection of its own, up to its end."""
    reader, writer = await asyncio.open_connection("127.0.0.1", port)
    try:
        writer.write(raw)
        async with asyncio.timeout(PATIENCE_S):
            return await reader.read()
    finally:
        writer.close()
