"""The replicas that an ingress knows: which run, which may be asked, and what they say together."""

import asyncio
import logging
from collections.abc import Callable, Coroutine, Iterable, Mapping, Sequence
from contextlib import suppress
from typing import Any, Protocol

from tightrope.engine.errors import EngineError, EngineUnavailable
from tightrope.engine.process.exchange import Answer
from tightrope.engine.process.stream import MAX_TRIES
from tightrope.engine.process.wire import LoadAdapter, TellHeld, ToEngine, UnloadAdapter
from tightrope.engine.types import ModelInfo
from tightrope.server.cluster.digests import Digest, DigestIndex
from tightrope.server.cluster.joined import is_same_model, joined_info
from tightrope.server.cluster.link import Link, Lost, Place
from tightrope.server.cluster.routing import least_busy

log = logging.getLogger("tightrope.ingress")


class User(Protocol):
    """Who has requests run by them."""

    def on_usable(self, is_other_model: bool) -> None:
        """One more takes requests, of another model than the last ones where only that is left."""

    def on_gone(self, link: Link) -> None:
        """One is gone, and with it what it was at."""

    def owes(self, link: Link) -> bool:
        """Whether anything under way is there."""


class Replicas:
    """All of it belongs to one event loop."""

    def __init__(self, user: User, digest_key: bytes, clock: Callable[[], float]) -> None:
        """digest_key: what replicas tell of the tokens that they hold is hashed with it."""
        self.index = DigestIndex(digest_key)
        self.info: ModelInfo | None = None  # Of those that are usable, together; of none the last is remembered.
        self.num_lost = 0
        self.usable: list[Link] = []  # They have one model and the same adapters, and take requests.
        self._user = user
        self._digest_key = digest_key
        self._clock = clock
        self._links: dict[str, Link] = {}
        self._adapters: Mapping[str, str] = {}
        self._tasks: set[asyncio.Task[None]] = set()
        self._is_closed = False

    @property
    def all(self) -> Sequence[Link]:
        """Those that run, as Ray says, or that still write."""
        return list(self._links.values())

    @property
    def candidates(self) -> list[Link]:
        """Those that may be asked for more."""
        return [link for link in self.usable if not link.is_draining]

    @property
    def adapters(self) -> Mapping[str, str]:
        """Those that every replica has."""
        if not self.usable:
            return self._adapters
        first, *others = (link.exchange.adapters for link in self.usable)
        return {name: path for name, path in first.items() if all(other.get(name) == path for other in others)}

    def set_places(self, places: Sequence[Place]) -> None:
        """These run, and no others."""
        now = {place.name: place for place in places}
        for name, place in now.items():
            if name not in self._links and not self._is_closed:
                self._links[name] = Link(place, self, self._digest_key, self._clock)
        for name in self._links.keys() - now.keys():  # They end, if they have not done so.
            self._links[name].is_draining = True
            self.drop_if_done(self._links[name])

    async def close(self) -> None:
        self._is_closed = True
        await asyncio.gather(*(link.close() for link in self._links.values()))
        for task in list(self._tasks):
            task.cancel()
            with suppress(asyncio.CancelledError):
                await task

    def begin(self, work: Coroutine[Any, Any, None]) -> asyncio.Task[None]:
        """Do this beside, to be cancelled by `close`."""
        task = asyncio.create_task(work)
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)
        return task

    # ---- what links tell ----

    def on_up(self, link: Link) -> None:
        if not self.usable or self._is_of_ours(link):  # Else a new version comes: this front goes on with its own.
            self.begin(self._welcome(link))

    def on_draining(self, link: Link) -> None:
        self.drop_if_done(link)

    def on_digest(self, link: Link, digest: Digest) -> None:
        if not self.index.apply(link.name, digest):
            link.send(TellHeld())

    def on_down(self, link: Link) -> None:
        self.index.forget(link.name)
        if link in self.usable:
            self.usable.remove(link)
            self.num_lost += not link.is_draining
            self._learn()
        link.exchange.streams.clear()
        self._user.on_gone(link)
        self.drop_if_done(link)
        for other in self._links.values() if not self.usable else ():  # Only those of a new version are left.
            if other.is_up:
                self.begin(self._welcome(other))

    def drop_if_done(self, link: Link) -> None:
        """Leave a replica that ends once it has gone, or owes nothing."""
        is_listed = self._links.get(link.name) is link
        if is_listed and link.is_draining and not link.is_up and not self._user.owes(link):
            del self._links[link.name]
            self.begin(link.close())

    # ---- a replica that comes ----

    def _is_of_ours(self, link: Link) -> bool:
        return self.info is None or (link.exchange.info is not None and is_same_model(link.exchange.info, self.info))

    async def _welcome(self, link: Link) -> None:
        """Give a replica the adapters of the others, and then requests."""
        if self.info is not None:
            with suppress(EngineError):  # One whose adapters can't be loaded says so to those who name them.
                await self._set_adapters(link, self._adapters)
        if not link.is_up or link in self.usable:
            return
        is_other_model = not self._is_of_ours(link)
        if is_other_model and self.usable:
            return
        self.usable.append(link)
        self._learn()
        self._user.on_usable(is_other_model)

    async def _set_adapters(self, link: Link, wanted: Mapping[str, str]) -> None:
        has = dict(link.exchange.adapters)
        for name in has.keys() - wanted.keys():
            await link.ask(unload(name))
        for name, path in wanted.items():
            if has.get(name) != path:
                await link.ask(load(name, path, in_place=True))

    def _learn(self) -> None:
        """Keep what those that are usable say together."""
        infos = [link.exchange.info for link in self.usable if link.exchange.info is not None]
        if infos:
            self.info, self._adapters = joined_info(infos), dict(self.usable[0].exchange.adapters)

    # ---- calls ----

    async def call(self, make: Callable[[int], ToEngine]) -> Answer:
        """Ask any, and another one where that goes. Raises EngineUnavailable, and what a replica raises."""
        for _ in range(MAX_TRIES):
            if candidates := self.candidates:
                with suppress(Lost):
                    return await least_busy(candidates).ask(make)
        raise EngineUnavailable("the replica has ended meanwhile")

    async def load_adapter(self, name: str, path: str, *, in_place: bool) -> None:
        """Load it on all, or, where one refuses, on none that had nothing of this name."""
        refusal, done = await self._call_all(load(name, path, in_place=in_place))
        if refusal is not None:
            for link in () if in_place else done:
                with suppress(EngineError):
                    await link.ask(unload(name))
            raise refusal
        self._learn()

    async def unload_adapter(self, name: str) -> None:
        refusal, _ = await self._call_all(unload(name))
        if refusal is not None:
            raise refusal
        self._learn()

    async def _call_all(self, make: Callable[[int], ToEngine]) -> tuple[EngineError | None, Iterable[Link]]:
        """What the first that refused has said, and those that did not refuse."""
        links = list(self.usable)
        answers = await asyncio.gather(*(link.ask(make) for link in links), return_exceptions=True)
        for answer in answers:
            if isinstance(answer, BaseException) and not isinstance(answer, EngineError):
                raise answer
        refusals = [answer for answer in answers if isinstance(answer, EngineError) and not isinstance(answer, Lost)]
        done = [link for link, answer in zip(links, answers, strict=True) if not isinstance(answer, EngineError)]
        return next(iter(refusals), None), done


def load(name: str, path: str, *, in_place: bool) -> Callable[[int], ToEngine]:
    return lambda call_id: LoadAdapter(call_id, name, path, in_place)


def unload(name: str) -> Callable[[int], ToEngine]:
    return lambda call_id: UnloadAdapter(call_id, name)
