"""The `Engine` that is a pool of replicas: each request goes to one of them, and on to another where that one goes."""

import asyncio
import time
from collections.abc import AsyncGenerator, Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Protocol

from tightrope.engine.errors import BackendFailed, EngineError, EngineUnavailable, Overloaded
from tightrope.engine.process.stream import MAX_TRIES, Stream
from tightrope.engine.process.supervisor import WAITING_S
from tightrope.engine.process.wire import Detokenize, Tokenize
from tightrope.engine.protocol import FindMarks
from tightrope.engine.queueing import back_in_s
from tightrope.engine.settings import EngineSettings
from tightrope.engine.types import Delta, GenerateRequest, ModelInfo, Prompt, Stats, TokenRun
from tightrope.server.cluster.joined import joined_stats
from tightrope.server.cluster.link import Link, Place
from tightrope.server.cluster.replicas import Replicas
from tightrope.server.cluster.routing import Router

LOST = f"{MAX_TRIES} replicas died while this answer was being written"


class Watch(Protocol):
    """Who knows which replicas run."""

    def start(self, changed: Callable[[Sequence[Place]], None]) -> None:
        """Tell of them whenever there are others, in the event loop that this was called in."""

    async def settle(self) -> int:
        """Wait until all run that will at first; returns how many. Raises RuntimeError in one line where none can."""

    def close(self) -> None:
        """Tell nothing more."""


@dataclass(slots=True, eq=False)
class _Asked:
    """One request under way, and where it is; `moving` looks for another place."""

    stream: Stream
    link: Link | None = None
    moving: asyncio.Task[None] | None = None


class Pool:
    """What an `Engine` offers is described there. Replicas find their turn marks themselves."""

    def __init__(
        self, settings: EngineSettings, watch: Watch, digest_key: bytes, clock: Callable[[], float] = time.monotonic
    ) -> None:
        """digest_key: what replicas tell of the tokens that they hold is hashed with it."""
        self._settings = settings
        self._watch = watch
        self._clock = clock
        self.replicas = Replicas(self, digest_key, clock)
        self._router = Router(self.replicas.index, settings.limits.max_waiting)
        self._asked: dict[str, _Asked] = {}
        self._expiry: asyncio.Task[None] | None = None
        self._changed = asyncio.Condition()
        self._has_started = asyncio.Event()
        self._failure: str | None = None  # Why there will be no replica any more.
        self._is_closed = False
        self._began_s = clock()  # No replica was usable since then, if none is.
        self._load_s = 0.0  # The last time it took so long until one was.

    # ---- life ----

    async def start(self, find_marks: FindMarks | None = None) -> None:
        self._watch.start(self.replicas.set_places)
        self._has_started.set()

    async def wait_ready(self) -> ModelInfo:
        await self._has_started.wait()
        try:
            number = await self._watch.settle()
        except RuntimeError as error:
            self._fail(str(error))
            raise BackendFailed(str(error)) from None
        async with self._changed:
            await self._changed.wait_for(lambda: len(self.replicas.usable) >= number or self._is_over)
        if self._is_over or self.info is None:
            raise BackendFailed(self._failure or "the engine was closed")
        return self.info

    async def wait_failed(self) -> str:
        async with self._changed:
            await self._changed.wait_for(lambda: self._failure is not None)
        return self._failure or "the replicas failed"

    async def close(self) -> None:
        self._is_closed = True
        self._watch.close()
        self._end_streams(EngineUnavailable("the server is shutting down"))
        await self.replicas.close()
        await self._tell_of_change()

    def _fail(self, reason: str) -> None:
        """There will be no replica any more."""
        self._failure = reason
        self._end_streams(EngineUnavailable(reason))
        self.replicas.begin(self._tell_of_change())

    async def _tell_of_change(self) -> None:
        async with self._changed:
            self._changed.notify_all()

    @property
    def _is_over(self) -> bool:
        return self._is_closed or self._failure is not None

    def _end_streams(self, error: EngineError) -> None:
        for asked in self._asked.values():
            if not asked.stream.is_over:
                asked.stream.fail(error)

    async def _expire(self) -> None:
        """Have nobody wait for ever for a replica where none is."""
        waiting_s = max(WAITING_S, 3 * self._load_s)
        await asyncio.sleep(waiting_s)
        self._end_streams(EngineUnavailable("no replica came back in time", retry_after_s=self.retry_after_s))
        await asyncio.sleep(max(0.0, self._settings.life.restart_limit_s - waiting_s))
        self._fail(f"no replica could be started for {self._settings.life.restart_limit_s:g} s (--restart-limit)")

    # ---- what the replicas tell ----

    def on_usable(self, is_other_model: bool) -> None:
        if len(self.replicas.usable) == 1:
            self._load_s = self._clock() - self._began_s
        if self._expiry is not None:
            self._expiry.cancel()
            self._expiry = None
        if is_other_model:
            for asked in self._asked.values():  # It can't end what another model began.
                if asked.stream.has_tokens and not asked.stream.is_over:
                    asked.stream.fail(EngineUnavailable("another model is served now"))
        for asked in self._asked.values():
            if asked.link is None and asked.moving is None:
                self._move(asked)
        self.replicas.begin(self._tell_of_change())

    def on_gone(self, link: Link) -> None:
        """Have what it was at go on elsewhere."""
        for asked in [asked for asked in self._asked.values() if asked.link is link]:
            asked.link = None
            if asked.stream.is_over:
                continue
            if asked.stream.lose_engine(may_be_guilty=not link.is_draining):
                self._move(asked)
            else:
                asked.stream.fail(BackendFailed(LOST))
        if not self.replicas.usable and not self._is_closed and self._expiry is None:
            self._began_s = self._clock()
            self._expiry = self.replicas.begin(self._expire())

    def owes(self, link: Link) -> bool:
        return any(asked.link is link for asked in self._asked.values())

    # ---- state ----

    @property
    def failure(self) -> str | None:
        """Why it waits for no replica any more; None while it does, or serves."""
        return self._failure

    @property
    def info(self) -> ModelInfo | None:
        return self.replicas.info

    @property
    def load_share(self) -> float:
        return float(self.info is not None)

    @property
    def adapters(self) -> Mapping[str, str]:
        return self.replicas.adapters

    @property
    def stats(self) -> Stats:
        return joined_stats([link.exchange.stats for link in self.replicas.all if link.is_up])

    @property
    def is_healthy(self) -> bool:
        return any(not link.exchange.is_stuck for link in self.replicas.candidates)

    @property
    def private_bytes(self) -> int:
        return 0  # It is that of other processes, which may be on other machines.

    @property
    def restarts(self) -> int:
        return self.replicas.num_lost

    @property
    def _num_open(self) -> int:
        return sum(asked.stream.num_open for asked in self._asked.values() if not asked.stream.is_over)

    @property
    def num_running(self) -> int:
        return min(self._num_open, sum(link.exchange.num_running for link in self.replicas.all if link.is_up))

    @property
    def num_waiting(self) -> int:
        return self._num_open - self.num_running

    @property
    def retry_after_s(self) -> int:
        if candidates := self.replicas.candidates:
            return min(link.exchange.retry_after_s for link in candidates)
        return back_in_s(self._load_s, self._clock() - self._began_s)

    def check_room(self, num_coming: int = 0) -> None:
        num_places = sum(link.exchange.num_places for link in self.replicas.candidates)
        num_waiting, most = self._num_open + num_coming - num_places, self._settings.limits.max_waiting
        if num_waiting >= most:
            message = f"{num_waiting} requests are waiting already; the limit is {most}"
            raise Overloaded(message, retry_after_s=self.retry_after_s)

    def _check_up(self) -> None:
        if self.replicas.candidates and not self._is_over:
            return
        reason = self._failure or ("the model is still loading" if self.info is None else "no replica is there")
        raise EngineUnavailable(
            "the server is shutting down" if self._is_closed else reason, retry_after_s=self.retry_after_s
        )

    # ---- requests ----

    async def generate(self, request: GenerateRequest) -> AsyncGenerator[Delta, None]:
        self._check_up()
        self.check_room()
        assert request.request_id not in self._asked, "request ids are unique"
        asked = self._asked[request.request_id] = _Asked(Stream(request, self._clock()))
        try:
            await self._place(asked)
            while (delta := await asked.stream.next()) is not None:
                yield delta
        finally:
            del self._asked[request.request_id]
            if asked.moving is not None:
                asked.moving.cancel()
            if asked.link is not None:
                asked.link.leave(asked.stream)
                self.replicas.drop_if_done(asked.link)

    async def _place(self, asked: _Asked) -> None:
        """Ask a replica for what is missing of an answer; where none is there, the next one will be asked."""
        while candidates := self.replicas.candidates:
            link, num_tokens = await self._router.choose(asked.stream.request, candidates)
            if link in self.replicas.candidates:
                asked.link = link
                return link.submit(asked.stream, num_tokens)
        return None

    def _move(self, asked: _Asked) -> None:
        async def move() -> None:
            await self._place(asked)
            asked.moving = None

        asked.moving = self.replicas.begin(move())

    # ---- calls ----

    async def tokenize(self, prompt: Prompt, adapter: str | None = None, *, last: int | None = None) -> TokenRun:
        self._check_up()
        tokens = await self.replicas.call(lambda call_id: Tokenize(call_id, prompt, adapter, last))
        assert isinstance(tokens, TokenRun)
        return tokens

    async def detokenize(self, token_ids: Sequence[int], adapter: str | None = None) -> str:
        self._check_up()
        text = await self.replicas.call(lambda call_id: Detokenize(call_id, tuple(token_ids), adapter))
        assert isinstance(text, str)
        return text

    async def load_adapter(self, name: str, path: str, *, in_place: bool = False) -> None:
        self._check_up()
        await self.replicas.load_adapter(name, path, in_place=in_place)

    async def unload_adapter(self, name: str) -> None:
        self._check_up()
        await self.replicas.unload_adapter(name)
