"""Several engine requests run side by side, as one stream of deltas."""

import asyncio
from collections.abc import AsyncGenerator, Callable, Sequence
from contextlib import aclosing

from tightrope.engine.types import Delta, GenerateRequest

Generate = Callable[[GenerateRequest], AsyncGenerator[Delta, None]]
# A choice has one number over all prompts, and beside it stands what it gained.
Deltas = AsyncGenerator[tuple[int, Delta], None]


async def run(generate: Generate, requests: Sequence[GenerateRequest]) -> Deltas:
    """Run requests side by side; choice i of request p has the number p * n + i.

    Nothing comes out before each request has given something, so a refusal of any of them is raised first. Closing the
    generator cancels the work.
    """
    if len(requests) == 1:  # The usual case needs no tasks and no queue.
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
    except Exception as exc:  # The reader of the queue raises it.
        queue.put_nowait(exc)
    else:
        queue.put_nowait(None)
