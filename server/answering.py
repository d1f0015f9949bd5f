"""One HTTP request's work in the engine: start it, watch the client, give up when it hangs up."""

import asyncio
from collections.abc import AsyncGenerator, Callable, Coroutine, Sequence
from contextlib import aclosing
from dataclasses import dataclass, field
from typing import Any, TypeVar

from fastapi import Request

from tightrope.engine.types import Delta, Finish, GenerateRequest, PromptInfo, Token
from tightrope.server.http.errors import ClientGone

T = TypeVar("T")

FIRST_DELTA_S = 10.0  # after that, a stream begins with a comment

Generate = Callable[[GenerateRequest], AsyncGenerator[Delta, None]]
Deltas = AsyncGenerator[tuple[int, Delta], None]  # (choice number over all prompts, what it gained)


@dataclass(slots=True)
class Choice:
    """One whole answer."""

    prompt: PromptInfo
    text: str
    tokens: list[Token]
    finish: Finish

    def mean_logprob(self) -> float:
        """By which the best of several answers is found."""
        logprobs = [token.logprob for token in self.tokens if token.logprob is not None]
        return sum(logprobs) / len(logprobs) if logprobs else float("-inf")


@dataclass(slots=True)
class _Growing:
    texts: list[str] = field(default_factory=list)
    tokens: list[Token] = field(default_factory=list)
    prompt: PromptInfo | None = None


async def or_gone(request: Request, work: Coroutine[Any, Any, T]) -> T:
    """Await `work`, but cancel it and raise ClientGone as soon as the client hangs up."""
    task = asyncio.ensure_future(work)
    watcher = asyncio.ensure_future(_hung_up(request))
    try:
        await asyncio.wait((task, watcher), return_when=asyncio.FIRST_COMPLETED)
        if not task.done():
            raise ClientGone("the client closed the connection")
        return task.result()
    finally:
        task.cancel()
        watcher.cancel()
        await asyncio.gather(task, watcher, return_exceptions=True)


async def _hung_up(request: Request) -> None:
    while (await request.receive())["type"] != "http.disconnect":
        pass


async def run(generate: Generate, requests: Sequence[GenerateRequest]) -> Deltas:
    """Run requests side by side; choice i of request p has the number p * n + i.

    Nothing comes out before each request has given something, so a refusal of any of them is raised first. Closing the
    generator cancels the work.
    """
    if len(requests) == 1:  # the usual case needs no tasks and no queue
        async with aclosing(generate(requests[0])) as deltas:
            async for delta in deltas:
                yield delta.index, delta
        return
    streams = [generate(request) for request in requests]
    firsts = [asyncio.ensure_future(anext(stream)) for stream in streams]
    pumps: list[asyncio.Task[None]] = []
    try:
        await asyncio.wait(firsts, return_when=asyncio.FIRST_EXCEPTION)
        for place in (task for task in firsts if task.done()):
            place.result()
        queue: asyncio.Queue[tuple[int, Delta] | BaseException | None] = asyncio.Queue()
        for position, (request, first) in enumerate(zip(requests, firsts, strict=True)):
            queue.put_nowait((position * request.n + first.result().index, first.result()))
            pump = _pump(streams[position], position * request.n, queue)
            pumps.append(asyncio.create_task(pump))
        num_open = len(pumps)
        while num_open:
            item = await queue.get()
            if isinstance(item, BaseException):
                raise item
            if item is None:
                num_open -= 1
            else:
                yield item
    finally:
        for task in (*firsts, *pumps):
            task.cancel()
        await asyncio.gather(*firsts, *pumps, return_exceptions=True)
        for stream in streams:
            await stream.aclose()


async def _pump(
    stream: AsyncGenerator[Delta, None],
    first_number: int,
    queue: "asyncio.Queue[tuple[int, Delta] | BaseException | None]",
) -> None:
    try:
        async for delta in stream:
            queue.put_nowait((first_number + delta.index, delta))
    except Exception as exc:  # carried to the one who reads the queue, and raised there
        queue.put_nowait(exc)
    else:
        queue.put_nowait(None)


async def started(request: Request, deltas: Deltas) -> Deltas:
    """Wait for the first delta, so that a refusal still gets its own status; then go on from it.

    Refusals come at once, but a first delta waits for its prompt. After FIRST_DELTA_S the reply begins without it, so
    that comments can keep the line alive; what fails later is told by an event. Raises whatever the engine says to the
    request until then, and ClientGone.
    """
    first = asyncio.ensure_future(anext(deltas))
    try:
        await or_gone(request, asyncio.wait((first,), timeout=FIRST_DELTA_S))
        if first.done():
            first.result()
    except BaseException:
        first.cancel()
        await asyncio.gather(first, return_exceptions=True)
        await deltas.aclose()
        raise
    return _from(first, deltas)


async def _from(first: asyncio.Future[tuple[int, Delta]], rest: Deltas) -> Deltas:
    async with aclosing(rest):
        yield await first  # a client that hangs up now cancels it
        async for item in rest:
            yield item


async def collect(request: Request, deltas: Deltas) -> list[Choice]:
    """All choices, whole, in the order of their numbers. Raises what the engine raises, and ClientGone."""
    return await or_gone(request, _collect(deltas))


async def _collect(deltas: Deltas) -> list[Choice]:
    growing: dict[int, _Growing] = {}
    done: dict[int, Choice] = {}
    async with aclosing(deltas):
        async for number, delta in deltas:
            choice = growing.setdefault(number, _Growing())
            choice.texts.append(delta.text)
            choice.tokens += delta.tokens
            if delta.prompt is not None:
                choice.prompt = delta.prompt
            if delta.finish is not None:
                assert choice.prompt is not None, "the first delta of a choice tells of its prompt"
                done[number] = Choice(choice.prompt, "".join(choice.texts), choice.tokens, delta.finish)
    return [done[number] for number in sorted(done)]
