"""One request's answer, whatever the dialect: read, run, explained, collected or streamed, aborted, given up."""

import asyncio
import time
from abc import ABC, abstractmethod
from collections.abc import AsyncGenerator, Callable, Coroutine, Mapping, Sequence
from contextlib import aclosing
from functools import partial
from typing import Any, ClassVar, Generic, Self, TypeVar

import msgspec
from fastapi import Request, Response

from tightrope.engine.errors import BackendFailed, EngineError, InvalidRequest
from tightrope.engine.types import Delta, Finish, PromptInfo, PromptRead
from tightrope.server.asking import Asked
from tightrope.server.deltas.choices import Choice, collect
from tightrope.server.deltas.one_token import one_token_each
from tightrope.server.deltas.side_by_side import Deltas, run
from tightrope.server.fields.explain import Explanation, explain
from tightrope.server.http.body import Body, JsonRequest
from tightrope.server.http.errors import ClientGone, Column, error_event, error_line
from tightrope.server.http.hangup import or_gone
from tightrope.server.http.resuming import asks_to_resume, conversation_of, last_event, stream_reply
from tightrope.server.http.sse import event_stream, kept_alive, line_stream, with_errors
from tightrope.server.models.model import Model
from tightrope.server.state import AppState

B = TypeVar("B", bound=Body)

FIRST_DELTA_S = 10.0  # A stream whose first delta takes longer begins with a comment.
HALVES = "halves of characters became U+FFFD"
COMMENT_S = 1.0  # At most one comment tells in this time how far a prompt has been read.


class Ending:
    """What is known when all choices have ended, and said with the last of them."""

    def __init__(self, prompts: Sequence[PromptInfo], num_tokens: int, explanation: Explanation | None) -> None:
        """prompts: what became of each; num_tokens: over all choices."""
        self.prompts = prompts
        self.num_tokens = num_tokens
        self.explained: dict[str, Any] = {} if explanation is None else {"explain": explanation.told(prompts)}


class Dialect(ABC, Generic[B]):
    """What one dialect says to one request: its reader makes it, and it has two writers, for an event and a whole."""

    column: ClassVar[Column] = "openai"  # The table of errors has such columns.
    is_lines: ClassVar[bool] = False  # A stream is lines of JSON then, and no server-sent events.
    is_stream: ClassVar[bool] = False  # Its route alone says that the answer is a stream.
    refuses_by_events: ClassVar[bool] = False  # What is asked for as a stream is refused by an event, under status 200.
    wants_single_tokens: bool = False  # Each event shows one token then, with the text that is its own.
    abort_key: str | None = None  # An abort under this key stops the answer.

    def __init__(self, asked: Asked) -> None:
        self.asked = asked

    @classmethod
    @abstractmethod
    async def read(cls, front: AppState, body: B, request: Request) -> Self:
        """What the body asks for. Raises EngineError."""

    @classmethod
    def asks_for_stream(cls, body: B) -> bool:
        return cls.is_stream or dict(body).get("stream") is True

    @classmethod
    def silence(cls, body: B) -> bytes:
        """A line that says nothing, where a stream is lines: it has no comments that could keep it alive."""
        return b""

    @abstractmethod
    def event(self, number: int, delta: Delta, ending: Ending | None) -> bytes:
        """What choice `number` has gained, as finished bytes, or none; `ending` comes with the last delta of all.

        This runs for every token.
        """

    def progress(self, number: int, read: PromptRead) -> bytes:
        """How far the prompt of choice `number` has been read, as finished bytes, where a client has asked for it."""
        return b""

    @abstractmethod
    def whole(self, choices: Sequence[Choice], ending: Ending) -> object:
        """The whole answer, as JSON will have it."""

    def headers(self, choices: Sequence[Choice]) -> Mapping[str, str]:
        """Headers of an answer; a stream begins without choices."""
        return {}

    def failed(self, error: EngineError) -> bytes:
        """The last event of a stream that failed, as finished bytes."""
        return (error_line if self.is_lines else error_event)(error, self.column)

    def reword(self, error: InvalidRequest) -> None:
        """Tell the engine's refusal in the dialect's own words and names."""


def checked(finish: Finish) -> Finish:
    """The finish, in dialects without a word for a failed one. Raises BackendFailed with what went wrong."""
    if finish.reason == "error":
        raise BackendFailed(finish.message or "the answer failed")
    return finish


async def answer(front: AppState, dialect: type[Dialect[B]], body: B, request: Request) -> Response:
    """The reply, whole or as a stream. Raises EngineError while a status can still be chosen, and the dialect does."""
    try:
        return await _answer(front, dialect, body, request)
    except ClientGone:
        raise
    except EngineError as error:
        if not (dialect.refuses_by_events and dialect.asks_for_stream(body)):
            raise
        front.metrics.refused(error)
        return event_stream(_one(error_event(error, dialect.column)), dialect.column, {})


async def _one(event: bytes) -> AsyncGenerator[bytes, None]:
    yield event


async def _answer(front: AppState, dialect: type[Dialect[B]], body: B, request: Request) -> Response:
    """The same. Raises EngineError while a status can still be chosen."""
    if (last := last_event(request)) is not None:  # The client was cut off, and has asked the same again.
        kept = front.streams.find(last[0], front.owner(request))
        return stream_reply(front.streams, kept, kept.behind(last[1]), {})
    conversation = conversation_of(request)
    is_kept = asks_to_resume(request, dict(body).get("resumable") is True) or conversation is not None
    may_begin = dialect.asks_for_stream(body) and not is_kept
    if may_begin and (loading := await _still_loading(front, body.named_model, request)) is not None:
        return _stream(_behind(loading, front, dialect, body, request), dialect, body, {})
    front = await front.at(request, body.named_model)
    spoken, deltas, explanation = await _asked(front, dialect, body, request)
    asked = spoken.asked
    is_kept = asks_to_resume(request, asked.is_resumable) or conversation is not None
    try:
        if not asked.is_stream:
            choices = await or_gone(request, collect(deltas, asked.n * len(asked.requests)))
            prompts = [choice.prompt for choice in choices[:: asked.n]]
            made = spoken.whole(choices, Ending(prompts, sum(c.finish.num_tokens for c in choices), explanation))
            return Response(msgspec.json.encode(made), headers=spoken.headers(choices), media_type="application/json")
        if spoken.wants_single_tokens:
            deltas = one_token_each(deltas)
        if is_kept:
            return await _kept(front, request, deltas, spoken, explanation, conversation)
        first = await _begun(partial(or_gone, request), deltas, spoken)
    except InvalidRequest as error:
        spoken.reword(error)
        raise
    pieces = with_errors(_pieces(first, deltas, spoken, explanation), spoken.failed)
    return _stream(pieces, dialect, body, spoken.headers(()))


def _stream(
    pieces: AsyncGenerator[bytes, None], dialect: type[Dialect[B]], body: B, headers: Mapping[str, str]
) -> Response:
    if dialect.is_lines:
        return line_stream(kept_alive(pieces, partial(dialect.silence, body)), dialect.column, headers)
    return event_stream(pieces, dialect.column, headers)


Running = tuple[Dialect[B], Deltas, Explanation | None]


async def _asked(front: AppState, dialect: type[Dialect[B]], body: B, request: Request) -> Running[B]:
    """What a body asks for, of a model that is loaded, and its deltas, which run when they are read."""
    spoken = await dialect.read(front, body, request)
    halves = [("body", HALVES)] if isinstance(request, JsonRequest) and request.has_halves else []
    explanation = await or_gone(request, explain(front, spoken.asked, halves)) if spoken.asked.explain else None
    deltas = run(front.generate_for(request), spoken.asked.requests)
    if spoken.abort_key is not None:
        deltas = front.aborts.until_aborted(deltas, spoken.abort_key, front.owner(request))
    return spoken, deltas, explanation


async def _still_loading(front: AppState, name: str | None, request: Request) -> asyncio.Future[Model] | None:
    """The load of a model that isn't done after FIRST_DELTA_S; None for one that is loaded. Raises as Models.load."""
    if front.models.is_ready(front.models.find(name)):
        return None
    loading = asyncio.ensure_future(front.models.load(name))
    try:
        await or_gone(request, asyncio.wait((loading,), timeout=FIRST_DELTA_S))
    except BaseException:
        loading.cancel()
        raise
    if not loading.done():
        return loading
    loading.result()
    return None


async def _behind(
    loading: asyncio.Future[Model], front: AppState, dialect: type[Dialect[B]], body: B, request: Request
) -> AsyncGenerator[bytes, None]:
    """A stream that begins while its model is loaded; comments, if it has any, tell how far. Raises EngineError."""
    model = front.models.find(body.named_model)
    try:
        while not loading.done():
            if not dialect.is_lines:
                yield b": loading %s, %d %%\n\n" % (model.name.encode(), 100 * model.engine.load_share)
            await asyncio.wait((loading,), timeout=COMMENT_S)
        model = loading.result()
    finally:
        loading.cancel()
    spoken, deltas, explanation = await _asked(await front.at(request, model.name), dialect, body, request)
    if spoken.wants_single_tokens:
        deltas = one_token_each(deltas)

    def told(error: EngineError) -> bytes:
        if isinstance(error, InvalidRequest):
            spoken.reword(error)
        return spoken.failed(error)

    first = asyncio.ensure_future(anext(deltas, None))
    async with aclosing(with_errors(_pieces(first, deltas, spoken, explanation), told)) as pieces:
        async for piece in pieces:
            yield piece


async def _kept(
    front: AppState,
    request: Request,
    deltas: Deltas,
    spoken: Dialect[B],
    explanation: Explanation | None,
    conversation: str | None,
) -> Response:
    """The reply that is a stream to come back to. Raises whatever the engine says until it begins, and ClientGone.

    Who has named it can find it without a reply, and so it is begun also for a client that is gone by then.
    """
    streams = front.streams
    stream = streams.open(front.owner(request), spoken.column, is_lines=spoken.is_lines, conversation=conversation)
    try:
        if_wanted: Wanted = partial(or_gone, request) if conversation is None else stream.unless_over
        first = await _begun(if_wanted, deltas, spoken)
    except BaseException:
        streams.end(stream)
        raise
    streams.write(stream, with_errors(_pieces(first, deltas, spoken, explanation), spoken.failed))
    return stream_reply(streams, stream, 0, spoken.headers(()))


First = asyncio.Future[tuple[int, Delta] | None]  # It is None where an abort came before it.
Wanted = Callable[[Coroutine[Any, Any, Any]], Coroutine[Any, Any, Any]]  # Cancels work that nobody wants any more.


async def _begun(if_wanted: Wanted, deltas: Deltas, spoken: Dialect[B]) -> First:
    """Wait for the first delta, so that a refusal still gets its own status.

    Refusals come at once, but a first delta waits for its prompt. After FIRST_DELTA_S the reply begins without it, so
    that comments can keep the line alive; what fails later is told by an event. How far the prompt is then is a first
    delta only where a client has asked for it. Raises whatever the engine says to the request until then, and
    ClientGone.
    """
    began_s = time.monotonic()
    first = asyncio.ensure_future(anext(deltas, None))
    try:
        while (left_s := FIRST_DELTA_S + began_s - time.monotonic()) > 0:
            await if_wanted(asyncio.wait((first,), timeout=left_s))
            item = first.result() if first.done() else None
            if item is None or item[1].read is None or spoken.asked.requests[0].wants_progress:
                break
            first = asyncio.ensure_future(anext(deltas, None))
    except BaseException:
        first.cancel()
        await asyncio.gather(first, return_exceptions=True)
        await deltas.aclose()
        raise
    return first


async def _pieces(
    first: First, deltas: Deltas, spoken: Dialect[B], explanation: Explanation | None
) -> AsyncGenerator[bytes, None]:
    """The stream, piece by piece. Raises what the engine raises."""
    n, prompts, num_tokens = spoken.asked.n, dict[int, PromptInfo](), 0
    num_open = n * len(spoken.asked.requests)
    told_s = 0.0

    def progress(number: int, read: PromptRead) -> bytes:
        nonlocal told_s
        if spoken.asked.requests[0].wants_progress and number // n not in prompts:
            return spoken.progress(number, read)
        if spoken.is_lines or time.monotonic() - told_s < COMMENT_S:
            return b""
        told_s = time.monotonic()
        return b": read %d of %d tokens\n\n" % (read.num_read, read.num_tokens)

    def ending(number: int, delta: Delta) -> Ending | None:
        nonlocal num_open, num_tokens
        if delta.prompt is not None and number % n == 0:
            prompts[number // n] = delta.prompt
        if delta.finish is None:
            return None
        num_open -= 1
        num_tokens += delta.finish.num_tokens
        return None if num_open else Ending([prompts[place] for place in sorted(prompts)], num_tokens, explanation)

    async with aclosing(deltas):
        if (item := await first) is None:  # A client that hangs up now cancels it.
            return
        number, delta = item
        while True:
            if delta.read is not None:
                piece = progress(number, delta.read)
            else:
                is_plain = delta.finish is None and delta.prompt is None
                piece = spoken.event(number, delta, None if is_plain else ending(number, delta))
            if piece:
                yield piece
            if (item := await anext(deltas, None)) is None:
                return
            number, delta = item
