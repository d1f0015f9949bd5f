"""What stands before every route: keys, the length of bodies. Plain ASGI, so that nothing is buffered."""

import asyncio
import hmac
import logging
from collections.abc import Callable, Collection
from contextlib import suppress
from ipaddress import ip_address

from fastapi import Request
from starlette.datastructures import Headers
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from tightrope.engine.errors import EngineError, Overloaded
from tightrope.server.http.errors import BodyTooLarge, SwitchedOff, Unauthorized, column_of, error_reply

log = logging.getLogger("tightrope.serve")

OPEN_ROUTES = frozenset({"/health", "/v1/health", "/ping", "/info", "/metrics", "/version", "/docs"})
OPEN_ROUTES |= {"/openapi.json", "/api-doc/openapi.json"}
ADMIN_ROUTES = frozenset({"/v1/load_lora_adapter", "/v1/unload_lora_adapter"})
LINGER_BYTES, LINGER_S = 1 << 20, 2.0  # So much of a refused body is read, and for so long.
SMALL_BYTES = 1024  # A body of so few is always taken: with as many connections as there may be, that is 4 MiB.


async def refuse(exc: EngineError, scope: Scope, receive: Receive, send: Send) -> None:
    """Answer with an error without looking at the body, and close the connection.

    A connection that is closed while its client still sends is reset, and the answer may be lost with it. So what
    comes behind the answer is thrown away first, up to LINGER_BYTES and for LINGER_S.
    """
    reply = error_reply(exc, column_of(Request(scope)))
    reply.headers["connection"] = "close"  # A body that nobody reads must not be taken for the next request.

    async def send_and_linger(message: Message) -> None:
        if message["type"] != "http.response.body" or _waits_with_its_body(scope):
            return await send(message)
        await send({**message, "more_body": True})
        with suppress(TimeoutError):
            async with asyncio.timeout(LINGER_S):
                await _throw_away(receive)
        return await send({"type": "http.response.body"})

    await reply(scope, receive, send_and_linger)


def _waits_with_its_body(scope: Scope) -> bool:
    """Whether the client sends its body only after a word from us, which it will not hear now."""
    return Headers(scope=scope).get("expect", "").lower() == "100-continue"


async def _throw_away(receive: Receive) -> None:
    """Read a request to its end, or its first LINGER_BYTES."""
    num_bytes = 0
    while num_bytes <= LINGER_BYTES:
        message = await receive()
        if not message.get("more_body", False):  # It is whole, or its client has gone.
            return
        num_bytes += len(message["body"])


def is_loopback(host: str) -> bool:
    """Whether an address to listen on can be reached from this machine alone."""
    try:
        return ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"


def warn_of_everybody(host: str, api_key: str | None) -> None:
    """Have the log say so where a server that asks for no key is there for others than this machine."""
    if api_key is None and not is_loopback(host):
        log.warning("anyone who can reach %s can use this server; --api-key asks for a key", host)


def sent_keys(scope: Scope) -> list[bytes]:
    """The keys that a request came with, right or wrong."""
    headers = Headers(scope=scope)
    scheme, _, bearer = headers.get("authorization", "").partition(" ")
    given = [bearer if scheme.lower() == "bearer" else "", headers.get("x-api-key", ""), headers.get("x-admin-key", "")]
    return [key.strip().encode("latin-1") for key in given if key.strip()]


def has_key(scope: Scope, *keys: str | None) -> bool:
    """Whether a request came with one of the keys; None is a key that nobody has."""
    # compare_digest takes the same time wherever the first difference is
    return any(hmac.compare_digest(sent, key.encode()) for key in keys if key for sent in sent_keys(scope))


def owner_of(scope: Scope, *keys: str | None) -> bytes:
    """The key by which a request was let in; where none is asked for, the one that it brought, or b""."""
    valid = [key.encode() for key in keys if key]
    sent = sent_keys(scope)
    return next((key for key in sent if key in valid), b"" if valid else next(iter(sent), b""))


class KeyGuard:
    """Ask for the key on every route but the open ones; a route that is added later is closed until listed."""

    def __init__(self, app: ASGIApp, api_key: str, admin_key: str | None, also_open: Collection[str] = ()) -> None:
        """admin_key: which opens what the other one does, too. also_open: paths of what is the same for everybody."""
        self._app = app
        self._keys = (api_key, admin_key)
        self._open = OPEN_ROUTES.union(also_open)

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http" or self._is_open(scope) or has_key(scope, *self._keys):
            return await self._app(scope, receive, send)
        return await refuse(
            Unauthorized("the API key is missing or wrong; send it as `Authorization: Bearer KEY` or `X-API-Key: KEY`"),
            scope,
            receive,
            send,
        )

    def _is_open(self, scope: Scope) -> bool:
        return scope["path"] in self._open or (scope["path"] == "/" and scope["method"] in ("GET", "HEAD"))


class AdminGuard:
    """Ask for the admin key on routes that change what is served; without one in the settings they are closed."""

    def __init__(self, app: ASGIApp, admin_key: str | None) -> None:
        self._app = app
        self._key = admin_key

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http" or scope["path"] not in ADMIN_ROUTES or has_key(scope, self._key):
            return await self._app(scope, receive, send)
        refusal: EngineError = Unauthorized(
            "this needs the admin key; send it as `Authorization: Bearer KEY` or `X-Admin-Key: KEY`"
        )
        if self._key is None:
            refusal = SwitchedOff(
                "adapters can't be changed while this server runs: "
                "it was started without --admin-key KEY and --lora-folder DIR"
            )
        return await refuse(refusal, scope, receive, send)


class BodyLimit:
    """Bound the bytes of each body, and of all that are held at the same time.

    One that is too long, or finds no room, is refused unread by its declared length, or when it gets there. A body is
    held until its request is answered, whether it is being read, waits or runs; one that has no others beside it may
    stay, and those of at most SMALL_BYTES always: one that cancels a request must get through.
    """

    def __init__(
        self,
        app: ASGIApp,
        max_bytes: int,
        max_held_bytes: int,
        retry_after_s: Callable[[], int],
        refused: Callable[[EngineError], None],
    ) -> None:
        """refused: hears of what is refused for the sake of others, and unread."""
        self._app = app
        self._max = max_bytes
        self._max_held = max_held_bytes
        self._num_held = 0
        self._retry_after_s = retry_after_s
        self._refused = refused

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            return await self._app(scope, receive, send)
        declared = Headers(scope=scope).get("content-length", "")
        length = int(declared) if declared.isdecimal() else 0
        if length > self._max:
            return await refuse(self._too_large(), scope, receive, send)
        if self._num_held and self._is_full(length, self._num_held + length):
            error = self._full()
            self._refused(error)
            return await refuse(error, scope, receive, send)
        num_bytes = 0

        async def counted() -> Message:
            nonlocal num_bytes
            message = await receive()
            num_more = len(message.get("body", b""))
            num_bytes += num_more
            self._num_held += num_more
            if num_bytes > self._max:
                raise self._too_large()
            if num_more and self._is_full(num_bytes, self._num_held):
                raise self._full()
            return message

        try:
            return await self._app(scope, counted, send)
        finally:
            self._num_held -= num_bytes

    def _is_full(self, num_bytes: int, num_all: int) -> bool:
        """Whether a body of so many bytes is too much, where it and all others have `num_all`."""
        return num_bytes > SMALL_BYTES and num_all > max(self._max_held, num_bytes)

    def _too_large(self) -> BodyTooLarge:
        return BodyTooLarge(f"the body is longer than {self._max} bytes")

    def _full(self) -> Overloaded:
        message = f"the bodies of requests under way have {self._num_held} bytes; the limit is {self._max_held}"
        return Overloaded(message, retry_after_s=self._retry_after_s())
