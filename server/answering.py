"""One HTTP request's work in the engine: start it, watch the client, give up when it hangs up."""

import asyncio
from contextlib import aclosing
from dataclasses import dataclass, field

from fastapi import Request

from tightrope.engine.types import Delta, Finish, PromptInfo, Token
from tightrope.server.deltas.side_by_side import Deltas
from tightrope.server.http.hangup import or_gone

FIRST_DELTA_S = 10.0  # after that, a stream begins with a comment


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
