"""Requests in crowds, from a process of their own, which costs little beside the server that it measures.

While requests are under way it writes prepared bytes and notes when which bytes came; what they say is read afterwards.
"""

import asyncio
import gc
import json
import random
import time
from collections.abc import Awaitable, Callable, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass, field
from multiprocessing import get_context
from multiprocessing.sharedctypes import Synchronized
from urllib.parse import urlsplit

import uvloop

from bench.sse import ChunkedDecoder, EventParser, RequestFailed, read_events
from bench.workloads import prose

LOOK_EVERY_S = 0.02
NUM_PROMPTS = 4096  # different ones; each is sent with a number in front, so that no two requests share their beginning

_ended: "Synchronized[int] | None" = None  # in the process of the load: how many of its requests have ended


@dataclass(frozen=True, slots=True)
class Trial:
    """One request; times are seconds since the start. `status` is 0 without one, or if the answer broke off."""

    begin_s: float  # before the connection
    head_s: float  # when the status had come
    end_s: float
    status: int
    tpot_s: float | None = None  # of an answer that came whole
    says_when: bool = False  # there is a Retry-After


@dataclass(frozen=True, slots=True)
class Crowd:
    """Requests that were sent from one moment on, how late their own loop was, and the processor time that it took."""

    begin_s: float  # since the start
    trials: Sequence[Trial]
    lags_ms: Sequence[float]
    cpu_s: float


@dataclass(slots=True)
class Exchange(asyncio.Protocol):
    """Keeps what comes back for one request until the server closes the connection.

    Times are `time.perf_counter` seconds, which are the same in all processes.
    """

    begin_s: float
    end_s: float = 0.0
    pieces: list[tuple[float, bytes]] = field(default_factory=list)  # and when they came
    closed: asyncio.Event = field(default_factory=asyncio.Event)

    def data_received(self, data: bytes) -> None:
        self.pieces.append((time.perf_counter(), data))

    def connection_lost(self, exc: Exception | None) -> None:
        self.end_s = time.perf_counter()
        self.closed.set()

    def trial(self, start_s: float) -> Trial:
        """What it was, once it is over. start_s: what times count from."""
        head, _, _ = b"".join(data for _, data in self.pieces).partition(b"\r\n\r\n")
        status = int(head[9:12]) if head[:9] == b"HTTP/1.1 " and head[9:12].isdigit() else 0
        head_s = self.pieces[0][0] if self.pieces else self.end_s
        times_s = self.begin_s - start_s, head_s - start_s, self.end_s - start_s
        if status != 200:
            return Trial(*times_s, status, says_when=b"\r\nretry-after:" in head.lower())
        tpot_s = self._tpot_s(len(head) + 4)
        return Trial(*times_s, 0 if tpot_s is None else 200, tpot_s)

    def _tpot_s(self, num_head: int) -> float | None:
        """Seconds a token after the first, None if the answer is not whole."""
        decoder, parser = ChunkedDecoder(), EventParser()
        events: list[tuple[float, bytes]] = []
        for arrived_s, data in self.pieces:
            body, num_head = data[num_head:], max(0, num_head - len(data))
            events += ((arrived_s, event) for event in parser.feed(decoder.feed(body)))
        try:
            return read_events(self.begin_s, events).tpot_s if decoder.is_finished else None
        except RequestFailed:
            return None


class Load:
    """Requests to one server for answers of so many tokens, each with a prompt of its own."""

    def __init__(self, url: str, max_tokens: int, seed: int) -> None:
        split = urlsplit(url)
        self._host, self._port = split.hostname or "localhost", split.port or 80
        self._draw = random.Random(seed)
        self._prompts = [prose(str(self._draw.getrandbits(64)), 20) for _ in range(NUM_PROMPTS)]
        head = f"POST /v1/completions HTTP/1.1\r\nHost: {split.netloc}\r\nConnection: close\r\n"
        self._head = f"{head}Content-Type: application/json\r\nContent-Length: "
        fixed: dict[str, object] = {"max_tokens": max_tokens, "ignore_eos": True, "temperature": 0.7}
        fixed |= {"stream": True, "stream_options": {"include_usage": True}}
        self._fields = json.dumps(fixed)[1:]
        self._exchanges: list[Exchange] = []

    def _request(self) -> bytes:
        number = self._draw.getrandbits(32)
        prompt = f"{number} {self._prompts[number % NUM_PROMPTS]}"
        body = f'{{"prompt": "{prompt}", "seed": {number}, {self._fields}'
        return f"{self._head}{len(body)}\r\n\r\n{body}".encode()

    async def ask(self) -> None:
        """Send one request, and wait for the end of its answer."""
        request, exchange = self._request(), Exchange(time.perf_counter())
        self._exchanges.append(exchange)
        try:
            loop = asyncio.get_running_loop()
            transport, _ = await loop.create_connection(lambda: exchange, self._host, self._port)
            transport.write(request)
            await exchange.closed.wait()
        except OSError:
            exchange.end_s = time.perf_counter()
        if _ended is not None:
            _ended.value += 1

    async def full(self, num_clients: int, seconds: float) -> None:
        """A crowd of clients for so long; the next request of each follows its answer."""
        end_s = time.perf_counter() + seconds

        async def client() -> None:
            while time.perf_counter() < end_s:
                await self.ask()

        await asyncio.gather(*(client() for _ in range(num_clients)))

    async def open_loop(self, per_s: float, seconds: float) -> None:
        """Requests at random moments, `per_s` of them a second on average, until all have ended."""
        next_s, tasks = time.perf_counter(), []
        end_s = next_s + seconds
        while (next_s := next_s + self._draw.expovariate(per_s)) < end_s:
            if (rest_s := next_s - time.perf_counter()) > 0:
                await asyncio.sleep(rest_s)
            tasks.append(asyncio.create_task(self.ask()))
        await asyncio.gather(*tasks)

    def trials(self, start_s: float) -> list[Trial]:
        """What has become of all requests."""
        return [exchange.trial(start_s) for exchange in self._exchanges]


def _run(load: Load, start_s: float, work: Callable[[], Awaitable[None]]) -> Crowd:
    async def watched() -> list[float]:
        lags_ms: list[float] = []

        async def watch() -> None:
            while True:
                began_s = time.perf_counter()
                await asyncio.sleep(LOOK_EVERY_S)
                lags_ms.append(1e3 * (time.perf_counter() - began_s - LOOK_EVERY_S))

        watching = asyncio.create_task(watch())
        try:
            await work()
        finally:
            watching.cancel()
        return lags_ms

    gc.disable()  # its pauses would be taken for the server's
    try:
        begin_s, begin_cpu_s = time.perf_counter() - start_s, time.process_time()
        lags_ms = uvloop.run(watched())
        cpu_s = time.process_time() - begin_cpu_s
        return Crowd(begin_s, load.trials(start_s), lags_ms, cpu_s)
    finally:
        gc.enable()


def full(load: Load, start_s: float, num_clients: int, seconds: float) -> Crowd:
    """See Load.full; to be run in a process of its own. start_s: the `time.perf_counter` that times count from."""
    return _run(load, start_s, lambda: load.full(num_clients, seconds))


def open_loop(load: Load, start_s: float, per_s: float, seconds: float) -> Crowd:
    """See Load.open_loop, and `full`."""
    return _run(load, start_s, lambda: load.open_loop(per_s, seconds))


def _begin(ended: "Synchronized[int]") -> None:
    global _ended
    _ended = ended


def load_pool() -> tuple[ProcessPoolExecutor, "Synchronized[int]"]:
    """A process for `full` and `open_loop`, and the number of requests that have ended in it."""
    context = get_context("spawn")
    ended: Synchronized[int] = context.Value("q", 0, lock=False)  # one process writes it
    return ProcessPoolExecutor(1, mp_context=context, initializer=_begin, initargs=(ended,)), ended
