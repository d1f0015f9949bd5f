"""Where requests come in: a listening socket, and uvicorn behind it."""

import socket
from collections.abc import Iterator
from contextlib import contextmanager

import uvicorn
from starlette.types import ASGIApp

from tightrope.server.http.connections import Connection

CLOSE_S = 5  # At the end connections may take so long to close.


class CantListen(Exception):
    """The message is one line on the address."""


def bind(host: str, port: int) -> socket.socket:
    """A listening socket; port 0 takes a free one. Raises CantListen."""
    try:
        family, kind, protocol, _, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0]
    except (socket.gaierror, UnicodeError):
        raise CantListen(f"--host: {host!r} is no address of this machine") from None
    listener = socket.socket(family, kind, protocol)
    # Otherwise a restart waits for old connections to time out.
    listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    try:
        listener.bind(address)
        listener.listen(1024)
    except OSError as error:
        listener.close()
        hint = "choose another with --port, or 0 for a free one"
        raise CantListen(
            f"can't listen on {host} port {port}: {(error.strerror or 'refused').lower()}; {hint}"
        ) from None
    listener.setblocking(False)
    return listener


class HttpServer(uvicorn.Server):
    """uvicorn, with the signals left to us: it would end with the signal's own status after a clean drain."""

    @contextmanager
    def capture_signals(self) -> Iterator[None]:
        yield


def http_server(app: ASGIApp, *, access_log: bool) -> HttpServer:
    """A server of the app, whose `serve` runs it on sockets that listen until its `should_exit`."""
    return HttpServer(
        uvicorn.Config(
            app,
            http=Connection,
            ws="none",
            log_config=None,
            access_log=access_log,
            lifespan="on",  # The app starts the engine and closes it.
            timeout_graceful_shutdown=CLOSE_S,
            server_header=False,
        )
    )
