"""Many clients that ask a server at the same time, and somebody who kills its engine meanwhile."""

import asyncio
import random
import time
from collections.abc import Callable, Coroutine
from contextlib import suppress
from dataclasses import dataclass, replace

import psutil

from bench.asks import Ask, draw_asks
from bench.outcomes import Kill, Outcome, perform
from bench.sse import RequestFailed, exchange
from bench.watch import Reading, engine_process, read

KILL_EVERY_S = 30.0  # on average
QUICK_KILLS = 0.25  # the share that comes within QUICK_S of the one before, while the next engine loads
QUICK_S = 4.0
RETRY_S = 0.5  # a client that got an error, or nothing, asks again after this
BACK_S = 120.0  # an engine that is not back by then never will be
GAUGES_S, SETTLE_S = 30.0, 12.0  # idle threads of the front's pool end after ten seconds
_POLL_S = 0.2
_GAUGES = {
    "waiting": "tgi_queue_size ",
    "running": "tgi_batch_current_size ",
    "cached tokens in use": 'tightrope_cache_tokens{state="used"} ',
    "cached tokens to reuse": 'tightrope_cache_tokens{state="reusable"} ',
    "free tokens": 'tightrope_cache_tokens{state="free"} ',
}
OWED = ("waiting", "running", "cached tokens in use")  # gauges that are 0 while nothing runs


@dataclass(frozen=True, slots=True)
class Rest:
    """The server after a while without requests."""

    gauges: dict[str, float]
    reading: Reading


class Crowd:
    """Clients of one server; `outcomes` and `kills` grow while they ask."""

    def __init__(self, url: str, front: int, clients: int, seed: int) -> None:
        self._url = url
        self._front = front
        self._draw = random.Random(seed)
        self._clients = clients
        self.began_s = time.perf_counter()
        self.outcomes: list[Outcome] = []
        self.kills: list[Kill] = []
        self._killed = 0  # the last engine's id
        self._back: asyncio.Task[None] | None = None
        self.num_answered = 0  # of all but those that were told to come back later

    async def busy(
        self, seconds: float, meanwhile: Callable[[float], Coroutine[None, None, None]] | None = None
    ) -> None:
        """Ask for so long, then let what is under way end. `meanwhile` is run beside it, with the time it has."""
        is_over = asyncio.Event()
        seeds = [self._draw.getrandbits(64) for _ in range(self._clients)]
        async with asyncio.TaskGroup() as group:
            for seed in seeds:
                group.create_task(self._client(random.Random(seed), is_over))
            if meanwhile is not None:
                group.create_task(meanwhile(seconds))
            await asyncio.sleep(seconds)
            is_over.set()
        await self._until_back()

    async def _client(self, draw: random.Random, is_over: asyncio.Event) -> None:
        while not is_over.is_set():
            for ask in draw_asks(draw):
                await self._ask(ask)

    async def _ask(self, ask: Ask) -> None:
        """Send it, and again while the engine is away if it must be done."""
        outcome = await perform(self._url, ask, self.began_s)
        while True:
            self.outcomes.append(outcome)
            self.num_answered += outcome.status != 503
            if outcome.end not in ("failed", "lost"):
                return
            await asyncio.sleep(RETRY_S)
            if not ask.is_tried_again:
                return
            outcome = await perform(self._url, ask, self.began_s)
            if outcome.end == "refused":  # the try that failed had been done all the same
                outcome = replace(outcome, end="answered")

    # ---- kills ----

    async def kill_once(self, seconds: float) -> None:
        """Kill the engine in the middle of this time."""
        await asyncio.sleep(seconds / 2)
        await self._kill()

    async def kill_at_random(self, seconds: float) -> None:
        """Kill engine after engine, whatever each is doing, until the time is over."""
        end_s = time.perf_counter() + seconds
        while True:
            is_quick = self._draw.random() < QUICK_KILLS
            pause_s = self._draw.uniform(0, QUICK_S) if is_quick else self._draw.expovariate(1 / KILL_EVERY_S)
            if time.perf_counter() + pause_s > end_s:
                return
            await asyncio.sleep(pause_s)
            await self._kill()

    async def _kill(self) -> None:
        was = "serving" if await self._is_healthy() else "loading"
        while (engine := engine_process(self._front)) is None:
            await asyncio.sleep(_POLL_S)
        with suppress(psutil.NoSuchProcess):
            engine.kill()
        self._killed = engine.pid
        self.kills.append(Kill(time.perf_counter() - self.began_s, was))
        if self._back is None or self._back.done():
            self._back = asyncio.create_task(self._see_back())

    async def _see_back(self) -> None:
        """Note when a later engine answers."""
        began_s = time.perf_counter()
        while time.perf_counter() - began_s < BACK_S:
            engine = engine_process(self._front)
            if engine is not None and engine.pid != self._killed and await self._is_healthy():
                for kill in self.kills:
                    if kill.back_s is None:
                        kill.back_s = time.perf_counter() - self.began_s
                return
            await asyncio.sleep(_POLL_S)

    async def _until_back(self) -> None:
        if self._back is not None:
            await self._back

    async def _is_healthy(self) -> bool:
        try:
            return (await exchange(self._url, "/health", None)).status == 200
        except RequestFailed:
            return False

    # ---- rest ----

    async def rest(self) -> Rest:
        """Wait until the gauges owe nothing, or for GAUGES_S, then let threads and buffers go, and look."""
        began_s = time.perf_counter()
        while time.perf_counter() - began_s < GAUGES_S:
            gauges = await self._gauges()
            if not any(gauges[name] for name in OWED):
                break
            await asyncio.sleep(1)
        await asyncio.sleep(SETTLE_S)
        found = read(self._front, time.perf_counter() - self.began_s, self.num_answered)
        if found is None:
            raise RequestFailed("the server has ended")
        return Rest(await self._gauges(), found)

    async def _gauges(self) -> dict[str, float]:
        reply = await exchange(self._url, "/metrics", None)
        lines = reply.body.decode().splitlines()
        return {
            name: next(float(line.removeprefix(start)) for line in lines if line.startswith(start))
            for name, start in _GAUGES.items()
        }
