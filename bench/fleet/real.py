"""Real servers of one thread each, before the same clients as in the simulation, and behind its routers or our own."""

import asyncio
import json
import random
import time
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path

from bench.cluster import server
from bench.fleet.clients import Clients
from bench.fleet.costs import Shape
from bench.fleet.held import Found
from bench.fleet.plan import Plan
from bench.fleet.prompts import Message, Prompt
from bench.fleet.requests import Request
from bench.fleet.routing import Loads, router_of
from bench.fleet.tally import Tally
from bench.fleet.traces import Turn
from bench.served import serving
from bench.sse import exchange

PLAIN_TOKENS = range(1000, 40000)  # of SmolLM2's vocabulary, without its special ones


def _options(shape: Shape, window: int) -> list[str]:
    """A cache of the simulated size, and none behind it."""
    sizes = ["--max-model-len", str(window), "--kv-cache-tokens", str(shape.cache_tokens), "--host-cache-mib", "0"]
    return ["--threads", "1", *sizes]


@contextmanager
def clustered(model: Path, number: int, shape: Shape, window: int) -> Iterator[list[str]]:
    """So many replicas behind the front that knows what each holds; yields its address alone."""
    options = _options(shape, window)
    with server("cluster", "--replicas", str(number), *options, model=[str(model)]) as url:
        yield [url]


@contextmanager
def servers(model: Path, folder: Path, number: int, shape: Shape, window: int) -> Iterator[list[str]]:
    """So many servers that know nothing of each other; yields their addresses."""
    options = _options(shape, window)
    with ExitStack() as stack:
        urls = []
        for place in range(number):
            own = folder / f"replica{place}"
            own.mkdir()
            urls.append(stack.enter_context(serving(model, own, f"fleet-{place}", options)).url)
        yield urls


class Texts:
    """The token ids that messages stand for: drawn from their keys, and for answers what the model has written."""

    def __init__(self) -> None:
        self._answers: dict[int, list[int]] = {}

    def of(self, prompt: Prompt) -> list[int]:
        return [token_id for message in prompt.messages for token_id in self._ids(message)]

    def answered(self, message: Message, token_ids: list[int]) -> None:
        self._answers[message.key] = token_ids

    def _ids(self, message: Message) -> list[int]:
        if message.key in self._answers:
            return self._answers[message.key]
        return random.Random(message.key).choices(PLAIN_TOKENS, k=message.tokens)


async def ask(
    url: str, token_ids: Sequence[int], num_tokens: int, session: str = ""
) -> tuple[float, float, list[int], Found]:
    """Seconds to the first event of an answer of so many tokens and to its end, its ids, and what was found."""
    body = {"prompt": list(token_ids), "max_tokens": num_tokens, "ignore_eos": True, "temperature": 1.0, "seed": None}
    body |= {"stream": True, "stream_options": {"include_usage": True}, "return_token_ids": True}
    headers = {"X-Session-Id": session} if session else {}
    reply = await exchange(url, "/v1/completions", json.dumps(body).encode(), headers)
    if reply.status != 200:
        raise SystemExit(f"{url} answered {reply.status}: {reply.body[:300]!r}")
    written: list[int] = []
    first_s, found = 0.0, Found()
    for came_s, data in reply.events:
        event = {} if data == b"[DONE]" else json.loads(data)
        for choice in event.get("choices") or ():
            ids = choice.get("token_ids") or []
            if ids and not written:
                first_s = came_s - reply.sent_s
            written += ids
        if usage := event.get("usage"):
            details = usage.get("prompt_tokens_details") or {}
            found = Found(cached=details.get("cached_tokens", 0), moved=details.get("moved_tokens", 0))
    return first_s, reply.done_s - reply.sent_s, written, found


async def play(plan: Plan, urls: Sequence[str], shape: Shape) -> Tally:
    """The plan's clients before real servers, in real time; where there is but one address, that chooses."""
    loads = Loads(len(urls), random.Random(f"{plan.seed} routes"), shape.max_num_seqs)
    router, tally, texts = router_of(plan.router, loads, plan.lag_s), Tally(), Texts()
    began_s = time.monotonic()

    def now_s() -> float:
        return time.monotonic() - began_s

    async def one(session: str, turn: Turn) -> None:
        request = Request(turn.prompt, turn.answer, session, now_s(), expected=turn.prompt.num_tokens)
        number = router.choose(request, now_s())
        loads.sent(number, request)
        first_s, _, written, request.found = await ask(urls[number], texts.of(turn.prompt), turn.answer.tokens, session)
        loads.wrote(number, request)
        loads.ended(number)
        texts.answered(turn.answer, written)
        request.first_s = request.arrived_s + first_s
        if request.arrived_s >= plan.warm_s:
            tally.add(request)

    async def stream(session: str, turns: Iterator[Turn]) -> None:
        for turn in turns:
            await asyncio.sleep(turn.pause_s)
            if now_s() >= plan.seconds:
                return
            await one(session, turn)

    async def place(clients: Clients) -> None:
        await asyncio.sleep(clients.begins_s)
        while now_s() < plan.seconds:
            await asyncio.gather(*(stream(*pair) for pair in clients.next()))
            await asyncio.sleep(clients.rest_s())

    await asyncio.gather(*(place(Clients(plan, number)) for number in range(plan.num_places)))
    return tally
