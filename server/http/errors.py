"""The only table from an error to status and body, a column for each shape of them; routes build no error replies."""

import logging
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, ClassVar, Literal

import msgspec
from fastapi import FastAPI, Request, Response
from fastapi.exceptions import RequestValidationError
from starlette.exceptions import HTTPException

from tightrope.engine.errors import (
    BackendFailed,
    ContextLengthExceeded,
    EngineError,
    EngineUnavailable,
    InvalidRequest,
    ModelNotFound,
    Overloaded,
)

log = logging.getLogger("tightrope.server")

Column = Literal["openai", "tgi", "tei", "ollama", "anthropic"]  # The table has these columns.

# What is at any other path says errors as OpenAI does.
PATHS: Mapping[str, Column] = {
    **dict.fromkeys(
        ("/", "/generate", "/generate_stream", "/chat_tokenize", "/info", "/health", "/v1/health", "/ping"), "tgi"
    ),
    "/embed": "tei",
    **dict.fromkeys(("/api/embed", "/api/embeddings"), "ollama"),
    **dict.fromkeys(("/api/version", "/api/tags", "/api/ps", "/api/show", "/api/generate", "/api/chat"), "ollama"),
    **dict.fromkeys(("/v1/messages", "/messages", "/v1/messages/count_tokens", "/messages/count_tokens"), "anthropic"),
}
# By path it has the key of a body that another dialect than OpenAI's has there, and that dialect's column.
SHARED_PATHS: Mapping[str, tuple[str, Column]] = {
    **dict.fromkeys(("/tokenize", "/invocations"), ("inputs", "tgi")),
    "/rerank": ("texts", "tei"),
}


class MalformedBody(InvalidRequest):
    """The body is no JSON."""


class WrongBody(InvalidRequest):
    """The body is JSON of another shape: a missing key, a wrong type."""


class TemplateFailed(InvalidRequest):
    """The chat template refuses these messages, or had to be stopped."""


class TemplateRefused(TemplateFailed):
    """The chat template itself says that it can't render these messages."""


class TemplateStopped(TemplateFailed):
    """The chat template took too long, or too much memory."""


class Unauthorized(EngineError):
    """The key is missing or wrong."""

    code: ClassVar[str] = "invalid_api_key"


class ForeignHost(EngineError):
    """The Host header has a name that is not this server's: maybe that of a page, pointed at it (DNS rebinding)."""

    code: ClassVar[str] = "foreign_host"


class AmbiguousHost(EngineError):
    """The request has several Host headers."""

    code: ClassVar[str] = "ambiguous_host"


class ForeignOrigin(EngineError):
    """A web page of another site asks for something to be done."""

    code: ClassVar[str] = "foreign_origin"


class SwitchedOff(EngineError):
    """The route changes what is served, and the settings don't allow that."""

    code: ClassVar[str] = "switched_off"


class NotServed(EngineError):
    """The route wants a model of another kind than those that are loaded."""

    code: ClassVar[str] = "not_served"


class NoSuchRoute(EngineError):
    """Nothing is served at this path."""

    code: ClassVar[str] = "not_found"


class StreamNotFound(EngineError):
    """No such stream is kept for this key, or the events that are asked for aren't any more."""

    code: ClassVar[str] = "stream_not_found"


class WrongMethod(EngineError):
    """The path is served, but not by this method."""

    code: ClassVar[str] = "method_not_allowed"


class BodyTimeout(EngineError):
    """The body came too slowly."""

    code: ClassVar[str] = "request_timeout"


class BodyTooLarge(EngineError):
    """The body is longer than the limit."""

    code: ClassVar[str] = "body_too_large"


class NotJson(EngineError):
    """The content type is not JSON. Requiring it keeps forms of foreign web pages out."""

    code: ClassVar[str] = "unsupported_media_type"


class ShuttingDown(EngineError):
    """The server finishes what is under way, and takes nothing more."""

    code: ClassVar[str] = "shutting_down"
    retry_after_s = 1


class ClientGone(EngineError):
    """The client hung up; nobody reads the reply."""

    code: ClassVar[str] = "client_closed_request"


@dataclass(frozen=True, slots=True)
class TGIRow:
    """`fixed` replaces the message. Without `kind` the body is plain text."""

    status: int
    kind: str | None
    prefix: str = ""
    fixed: str | None = None


INVALID = TGIRow(422, "validation", "Input validation error: ")
FAILED = TGIRow(424, "generation", "Request failed during generation: ")
TABLE: Mapping[type[EngineError], tuple[int, TGIRow]] = {  # The status goes first with which all but TGI answer.
    InvalidRequest: (400, INVALID),
    TemplateFailed: (400, TGIRow(422, "template_error", "Template error: ")),
    MalformedBody: (400, TGIRow(400, None, "Failed to parse the request body as JSON: ")),
    WrongBody: (400, TGIRow(422, None, "Failed to deserialize the JSON body into the target type: ")),
    Unauthorized: (401, TGIRow(401, None, fixed="")),
    ForeignHost: (403, TGIRow(403, "foreign_host")),
    AmbiguousHost: (400, TGIRow(400, "ambiguous_host")),
    ForeignOrigin: (403, TGIRow(403, "foreign_origin")),
    SwitchedOff: (403, TGIRow(403, "switched_off")),
    NoSuchRoute: (404, TGIRow(404, "not_found")),
    StreamNotFound: (404, TGIRow(404, "stream_not_found")),
    ModelNotFound: (404, INVALID),
    WrongMethod: (405, TGIRow(405, "method_not_allowed")),
    BodyTimeout: (408, TGIRow(408, None)),
    BodyTooLarge: (413, TGIRow(413, None)),
    NotJson: (415, TGIRow(415, None, fixed="Expected request with `Content-Type: application/json`")),
    Overloaded: (429, TGIRow(429, "overloaded", fixed="Model is overloaded")),
    ClientGone: (499, TGIRow(499, None)),
    NotServed: (501, TGIRow(501, "not_served")),
    BackendFailed: (500, FAILED),
    ShuttingDown: (503, TGIRow(503, "shutting_down")),
    EngineUnavailable: (503, FAILED),
}


def column_of(request: Request) -> Column:
    """That of the dialect which the request speaks; on shared paths the body tells, once it is read."""
    told: Column | None = request.scope.get("state", {}).get("column")
    return told or PATHS.get(request.url.path, "openai")


def _row(exc: EngineError) -> tuple[int, TGIRow]:
    return next(TABLE[cls] for cls in type(exc).__mro__ if cls in TABLE)


Told = tuple[int, dict[str, Any] | str]  # What is said about an error: a status, and an object or plain text.


def _openai(exc: EngineError) -> Told:
    """The type is one for each kind of status, and the code the error's own; a plain invalid request has none."""
    status, _ = _row(exc)
    kind = {429: Overloaded.code}.get(status, InvalidRequest.code if status < 500 else BackendFailed.code)
    code = None if exc.code == InvalidRequest.code else exc.code
    return status, {"error": {"message": exc.message, "type": kind, "param": exc.param, "code": code}}


def _tgi(exc: EngineError) -> Told:
    _, row = _row(exc)
    text = row.prefix + exc.message if row.fixed is None else row.fixed
    return row.status, text if row.kind is None else {"error": text, "error_type": row.kind}


def _ollama(exc: EngineError) -> Told:
    """Its clients show the error as it is, so that it is text."""
    status, _ = _row(exc)
    return status, {"error": exc.message}


_KINDS = {  # Anthropic's types of errors by status; others are the client's fault, or from 500 on ours.
    401: "authentication_error",
    403: "permission_error",
    404: "not_found_error",
    408: "timeout_error",
    413: "request_too_large",
    429: "rate_limit_error",
}


def _anthropic(exc: EngineError) -> Told:
    status, _ = _row(exc)
    kind = _KINDS.get(status, "invalid_request_error" if status < 500 else "api_error")
    return status, {"type": "error", "error": {"type": kind, "message": exc.message}}


# Text Embeddings Inference's statuses, and its words for kinds of errors. Source: its router/src/http/server.rs.
_TEI: Mapping[type[EngineError], tuple[int, str]] = {
    InvalidRequest: (413, "Validation"),
    MalformedBody: (400, "Validation"),
    WrongBody: (422, "Validation"),
    Overloaded: (429, "Overloaded"),
    BackendFailed: (424, "Backend"),
    EngineUnavailable: (503, "Unhealthy"),
}


def _tei(exc: EngineError) -> Told:
    status, kind = next((_TEI[cls] for cls in type(exc).__mro__ if cls in _TEI), (_row(exc)[0], exc.code))
    message = exc.message
    if isinstance(exc, ContextLengthExceeded):
        message = f"`inputs` must have less than {exc.max_model_len} tokens. Given: {exc.prompt_tokens}"
    return status, {"error": message, "error_type": kind}


COLUMNS: Mapping[Column, Callable[[EngineError], Told]] = {
    "openai": _openai,
    "tgi": _tgi,
    "tei": _tei,
    "ollama": _ollama,
    "anthropic": _anthropic,
}
NAMED_EVENTS: frozenset[Column] = frozenset({"anthropic"})  # Their events have names in a line of their own.


def error_reply(exc: EngineError, column: Column) -> Response:
    """The whole reply for an error."""
    status, body = COLUMNS[column](exc)
    headers = {}
    if exc.retry_after_s is not None:
        headers["retry-after"] = str(exc.retry_after_s)
    if isinstance(exc, Unauthorized):
        headers["www-authenticate"] = "Bearer"
    if isinstance(body, str):
        return Response(body, status, headers, "text/plain" if body else None)
    return Response(msgspec.json.encode(body), status, headers, "application/json")


def error_event(exc: EngineError, column: Column) -> bytes:
    """The last event of a stream that failed."""
    name = b"event: error\n" if column in NAMED_EVENTS else b""
    return name + b"data: " + msgspec.json.encode(COLUMNS[column](exc)[1]) + b"\n\n"


def error_line(exc: EngineError, column: Column) -> bytes:
    """The same for a stream of JSON lines."""
    return msgspec.json.encode(COLUMNS[column](exc)[1]) + b"\n"


def unexpected(exc: Exception) -> BackendFailed:
    """The error that a client is told of when our own code broke; the reason is in the log alone."""
    log.error("request failed: error=%r", exc, exc_info=exc)
    return BackendFailed("internal server error")


# ---- what FastAPI and Starlette raise ----


def _field_path(loc: tuple[int | str, ...], body: object, is_missing: bool) -> str:
    """Pydantic's location as messages[0].content, without the names of union branches that it puts in between."""
    path = ""
    here = body
    for place, part in enumerate(loc[1:], 2):
        if isinstance(part, int):
            if not isinstance(here, list) or part >= len(here):
                continue
            path, here = f"{path}[{part}]", here[part]
        elif isinstance(here, dict) and (part in here or (is_missing and place == len(loc))):
            path, here = f"{path}.{part}" if path else part, here.get(part)
    return path


def wrong_body(exc: RequestValidationError) -> WrongBody:
    """One line for the first field at fault; a field that fits none of several types names them all."""
    errors = exc.errors()
    field = _field_path(errors[0]["loc"], exc.body, errors[0]["type"] == "missing")
    reasons: dict[str, None] = {}
    for error in errors[:16]:
        is_missing = error["type"] == "missing"
        if _field_path(error["loc"], exc.body, is_missing) == field:
            message = "field required" if is_missing else str(error["msg"])
            if error["type"] == "too_short" and error["ctx"]["actual_length"] == 0:
                message = "must not be empty"
            reasons[message.replace("Input should be", "should be").removeprefix("Value error, ")] = None
    text = " or ".join(reasons)
    return WrongBody(f"{field}: {text}" if field else f"body: {text}", field or None)


def _allowed(methods: str) -> str:
    """A route's methods as a header tells them, with those that are served wherever it is."""
    names = {name.strip() for name in methods.split(",")} - {""}
    return ", ".join(sorted(names | {"OPTIONS"} | ({"HEAD"} if "GET" in names else set())))


def install_handlers(app: FastAPI, refused: Callable[[EngineError], None]) -> None:
    """Make every error of `app` leave through the table; `refused` hears of those that requests are answered with."""

    @app.exception_handler(EngineError)
    async def engine_error(request: Request, exc: EngineError) -> Response:
        if isinstance(exc, BackendFailed):
            log.error("request failed: path=%s error=%s", request.url.path, exc.message)
        refused(exc)
        return error_reply(exc, column_of(request))

    @app.exception_handler(RequestValidationError)
    async def validation_error(request: Request, exc: RequestValidationError) -> Response:
        error = wrong_body(exc)
        refused(error)
        return error_reply(error, column_of(request))

    @app.exception_handler(HTTPException)
    async def http_error(request: Request, exc: HTTPException) -> Response:
        if exc.status_code == 405:
            allowed = _allowed((exc.headers or {}).get("Allow", ""))
            exc.headers = {"Allow": allowed}
            if request.method == "OPTIONS":
                return Response(status_code=204, headers=exc.headers)
            error: EngineError = WrongMethod(f"{request.method} is not allowed on {request.url.path}; use {allowed}")
        elif exc.status_code == 404:
            error = NoSuchRoute(f"there is nothing at {request.url.path}")
        else:
            error = InvalidRequest(str(exc.detail))
        reply = error_reply(error, column_of(request))
        reply.headers.update(exc.headers or {})
        return reply

    @app.exception_handler(Exception)
    async def any_error(request: Request, exc: Exception) -> Response:
        return error_reply(unexpected(exc), column_of(request))
