"""Request bodies: strict JSON, null means absent, and unknown fields are refused or ignored but listed."""

import asyncio
import logging
import re
from collections.abc import Callable, Container, Coroutine, Iterable, Iterator
from functools import cache, partial, wraps
from typing import Any, ClassVar, Self, get_args

import msgspec
from fastapi import Request, Response
from fastapi.routing import APIRoute
from pydantic import (
    BaseModel,
    ConfigDict,
    Discriminator,
    FailFast,
    ModelWrapValidatorHandler,
    PrivateAttr,
    model_validator,
)
from starlette.requests import ClientDisconnect
from starlette.types import Scope

from tightrope.server.fields.lost_fields import refuse_lost
from tightrope.server.fields.names import Bent
from tightrope.server.http.errors import SHARED_PATHS, BodyTimeout, ClientGone, MalformedBody, NotJson

log = logging.getLogger("tightrope.server")

Endpoint = Callable[..., Coroutine[Any, Any, object]]  # FastAPI calls a route's function with what it asks for.

READ_TIMEOUT_S = 60.0  # It is for the whole body: a client that sends a byte a second doesn't keep its connection.


class FirstErrorOnly(FailFast):
    """For lists that may be long: one error is told, not one for each of a million items."""

    __hash__ = object.__hash__  # A union of types needs its members hashable, and pydantic's own class isn't.


class _EveryName:
    """Holds every text."""

    def __contains__(self, name: object) -> bool:
        return True


EVERY_NAME: Container[str] = _EveryName()


def _whole(value: object) -> object:
    """16 for 16.0, in lists as well: JSON has one kind of number. Other values come back as they are."""
    if isinstance(value, float) and value.is_integer():
        return int(value)
    if isinstance(value, list) and any(isinstance(item, float | list) for item in value):
        made = [_whole(item) for item in value]
        return made if any(one is not other for one, other in zip(made, value, strict=True)) else value
    return value


def _types(annotation: object) -> Iterator[object]:
    """The types that an annotation is made of."""
    yield annotation
    for part in get_args(annotation):
        yield from _types(part)


@cache
def _whole_fields(body: type[BaseModel]) -> frozenset[str]:
    """The fields of a body that hold whole numbers alone."""
    types = {name: set(map(id, _types(field.annotation))) for name, field in body.model_fields.items()}
    return frozenset(name for name, kinds in types.items() if id(int) in kinds and id(float) not in kinds)


class Body(BaseModel):
    """Base of all request bodies. Types are strict; of duplicate keys the last counts."""

    without_effect: ClassVar[frozenset[str]] = frozenset()  # These fields are checked, and then change nothing.
    read_elsewhere: ClassVar[Container[str]] = ()  # These fields aren't declared here, and mean something yet.

    # Any other field that came is refused, or listed as ignored: see JsonRoute.

    model_config = ConfigDict(strict=True, extra="allow", allow_inf_nan=False)

    _made_whole: tuple[str, ...] = PrivateAttr(())

    @property
    def named_model(self) -> str | None:
        """The model that the body names, where it has a place for that."""
        name = dict(self).get("model")
        return name if isinstance(name, str) else None

    @model_validator(mode="wrap")
    @classmethod
    def _as_meant(cls, data: object, handler: ModelWrapValidatorHandler[Self]) -> Self:
        """Null is absent, and 16.0 is 16 where a whole number is wanted."""
        if not isinstance(data, dict):
            return handler(data)
        meant = {name: value for name, value in data.items() if value is not None}
        whole = {name: _whole(meant[name]) for name in _whole_fields(cls) & meant.keys()}
        body = handler(meant | whole)
        body._made_whole = tuple(name for name, value in whole.items() if value is not meant[name])
        return body


class ShownBody(Body):
    """A part of a body that the chat template is shown as it came: with the order of its keys, and with its nulls."""

    _given: dict[str, Any] = PrivateAttr(default_factory=dict)

    @model_validator(mode="wrap")
    @classmethod
    def _keep(cls, data: object, handler: ModelWrapValidatorHandler[Self]) -> Self:
        made = handler(data)
        if isinstance(data, dict):
            made._given = data
        return made

    @property
    def given(self) -> dict[str, Any]:
        """The JSON that this was read from; not to be changed."""
        return self._given


def by_key(*keys: str) -> Discriminator:
    """Tells which of several bodies one is: the one tagged with the first of `keys` that is there, in brackets.

    Errors are told with the path of tags and keys, and a tag is to be no key.
    """

    def tag(body: object) -> str | None:
        there = body if isinstance(body, dict) else {}
        return next((f"<{key}>" for key in keys if there.get(key) is not None), None)

    message = f"one of {', '.join(keys[:-1])} and {keys[-1]} is required"
    return Discriminator(tag, custom_error_type="no_known_form", custom_error_message=message)


def _parts(body: Body, prefix: str = "") -> Iterator[tuple[str, Body]]:
    """The body and all bodies in it, each with the path that stands before its fields' names."""
    yield prefix, body
    for name in body.model_fields_set & type(body).model_fields.keys():
        value: object = getattr(body, name)
        if isinstance(value, Body):
            yield from _parts(value, f"{prefix}{name}.")
        elif isinstance(value, list) and not (value and isinstance(value[0], int)):  # Token ids may be millions.
            for index, item in enumerate(value):
                if isinstance(item, Body):
                    yield from _parts(item, f"{prefix}{name}[{index}].")


def ignored_fields(body: Body) -> Iterator[str]:
    """Names of the fields that came and mean nothing here, such as "metadata" or "messages[0].foo"."""
    for prefix, part in _parts(body):
        yield from (prefix + name for name in part.model_extra or () if name not in part.read_elsewhere)
        yield from (prefix + name for name in part.without_effect & part.model_fields_set)


def unread_fields(body: Body) -> list[tuple[str, str]]:
    """The same with the reason, in words."""
    return [(name, "no field of this route") for name in ignored_fields(body)]


def bent_fields(body: Body) -> list[Bent]:
    """What in the body was taken for what it plainly means, and how."""
    return [(prefix + name, "taken as a whole number") for prefix, part in _parts(body) for name in part._made_whole]


def refuse_unread(body: Body) -> None:
    """Raises InvalidRequest for a field that means nothing here and would have changed the answer."""
    refuse_lost(
        (prefix + name, name, value)
        for prefix, part in _parts(body)
        for name, value in (part.model_extra or {}).items()
        if name not in part.read_elsewhere and name not in part.without_effect
    )


def log_ignored(where: str, ignored: Callable[[], Iterable[str]]) -> None:
    """Say at debug level which fields of a request change nothing; `where` is its id, or the route that it came to."""
    if log.isEnabledFor(logging.DEBUG):
        names = sorted(ignored())
        if names:
            log.debug("fields ignored: %s fields=%r", where, names)


_HALF = re.compile(
    rb"(?<!\\)(?P<before>(?:\\\\)*)"  # An even number of backslashes stands for half as many.
    rb"(?:\\u[dD][89abAB][0-9a-fA-F]{2}\\u[dD][c-fC-F][0-9a-fA-F]{2}"  # a whole character
    rb"|(?P<half>\\u[dD][89a-fA-F][0-9a-fA-F]{2}))"
)


def _whole_characters(raw: bytes) -> bytes:
    """The JSON with U+FFFD in place of every escaped half of a character: clients cut texts in the middle of emojis."""
    return _HALF.sub(lambda match: match["before"] + rb"\ufffd" if match["half"] else match[0], raw)


def parse_json(raw: bytes) -> object:
    """Parse strict UTF-8 JSON: no NaN, no Infinity, no number beyond a float, no byte order mark.

    Halves of characters become U+FFFD. Raises MalformedBody with one line.
    """
    return _parsed(raw)[0]


def _parsed(raw: bytes) -> tuple[object, bool]:
    """The same, and whether there were halves."""
    try:
        try:
            return msgspec.json.decode(raw), False
        except msgspec.DecodeError:
            if (whole := _whole_characters(raw)) == raw:
                raise
            return msgspec.json.decode(whole), True
    except RecursionError:
        raise MalformedBody("JSON is nested too deeply") from None
    except (UnicodeDecodeError, msgspec.MsgspecError) as exc:
        raise MalformedBody(_bad_utf8(raw) or (str(exc) if raw else "the body is empty")) from None


def _bad_utf8(raw: bytes) -> str | None:
    """What of the body is not UTF-8. The parser counts from the string and words it by its version."""
    try:
        raw.decode()
    except UnicodeDecodeError as exc:
        return f"the body is not UTF-8: {exc.reason} (byte {exc.start})"
    return None


def _is_json(content_type: str) -> bool:
    media = content_type.split(";")[0].strip().lower()
    return media == "application/json" or (media.startswith("application/") and media.endswith("+json"))


def _declared_json(scope: Scope) -> Scope:
    """The same with the Content-Type of JSON, for which FastAPI looks."""
    others = [(name, value) for name, value in scope["headers"] if name != b"content-type"]
    return {**scope, "headers": [*others, (b"content-type", b"application/json")]}


class JsonRequest(Request):
    """A request whose body was read and parsed before FastAPI asks for it."""

    raw: bytes
    data: object
    has_halves: bool  # Halves of characters were in its texts.

    @classmethod
    async def read(cls, request: Request, *, takes_any_type: bool = False) -> "JsonRequest":
        """Read and parse; takes_any_type: whatever the header Content-Type says, or without one.

        Raises NotJson, BodyTimeout, ClientGone and MalformedBody.
        """
        if not takes_any_type and not _is_json(request.headers.get("content-type", "")):
            raise NotJson("expected a request with the header Content-Type: application/json")
        made = cls(_declared_json(request.scope) if takes_any_type else request.scope, request.receive)
        try:
            async with asyncio.timeout(READ_TIMEOUT_S):
                made.raw = await request.body()
        except ClientDisconnect:
            raise ClientGone("the client hung up in the middle of its body") from None
        except TimeoutError:
            raise BodyTimeout(f"the body did not arrive within {READ_TIMEOUT_S:.0f} s") from None
        made.data, made.has_halves = _parsed(made.raw)
        key, column = SHARED_PATHS.get(request.url.path, ("", None))
        if column is not None and isinstance(made.data, dict) and made.data.get(key) is not None:
            request.state.column = column
        return made

    async def body(self) -> bytes:
        return self.raw or b"null"  # FastAPI takes an empty body for a missing one and would not ask for its JSON.

    async def json(self) -> object:
        return self.data


class JsonRoute(APIRoute):
    """A route that reads its body by our rules, and passes over no field in silence."""

    takes_any_type: ClassVar[bool] = False  # Whether a body is JSON whatever its Content-Type.

    def __init__(self, path: str, endpoint: Endpoint, **settings: Any) -> None:  # noqa: ANN401  # FastAPI's own
        super().__init__(path, _accounting(path, endpoint), **settings)

    def get_route_handler(self) -> Callable[[Request], Coroutine[Any, Any, Response]]:
        handle = super().get_route_handler()
        has_body = self.body_field is not None

        async def read_then_handle(request: Request) -> Response:
            if has_body:
                request = await JsonRequest.read(request, takes_any_type=self.takes_any_type)
            return await handle(request)

        return read_then_handle


class AnyTypeRoute(JsonRoute):
    """The same in dialects whose servers never look at the Content-Type, so that their clients needn't send it.

    Forms of foreign web pages are kept out by their Origin, as everywhere.
    """

    takes_any_type = True


def _accounting(path: str, endpoint: Endpoint) -> Endpoint:
    """The endpoint, behind the one place where a body's unread fields are refused or logged."""

    @wraps(endpoint)  # FastAPI asks for the signature.
    async def account_then_answer(**given: object) -> object:
        for body in given.values():
            if isinstance(body, Body):
                refuse_unread(body)
                log_ignored(f"path={path}", partial(ignored_fields, body))
        return await endpoint(**given)

    return account_then_answer
