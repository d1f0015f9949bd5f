"""Replicas with the fake engine and the pool that asks them, over sockets of this machine and without Ray."""

import asyncio
import os
import signal
from collections.abc import AsyncIterator, Callable, Sequence
from contextlib import AsyncExitStack, asynccontextmanager
from dataclasses import dataclass, field

from engine_clients import fake_process, settings

from tightrope.engine.process.launch import Launcher, ProcessHandle
from tightrope.engine.settings import EngineSettings
from tightrope.engine.types import ModelInfo, TurnMarks
from tightrope.server.cluster.link import Link, Place
from tightrope.server.cluster.pool import Pool
from tightrope.server.cluster.relay import Relay

LOOPBACK = "127.0.0.1"
START_S = 300.0


@dataclass
class FixedWatch:
    """Knows the replicas that a test names."""

    places: list[Place] = field(default_factory=list)
    changed: Callable[[Sequence[Place]], None] | None = None

    def start(self, changed: Callable[[Sequence[Place]], None]) -> None:
        self.changed = changed
        changed(self.places)

    async def settle(self) -> int:
        return len(self.places)

    def close(self) -> None:
        self.changed = None

    def set(self, places: list[Place]) -> None:
        self.places = places
        if self.changed is not None:
            self.changed(places)


@dataclass
class Cluster:
    """A pool and its replicas by name."""

    pool: Pool
    watch: FixedWatch
    relays: dict[str, Relay]
    stack: AsyncExitStack

    async def add(self, name: str, launch: Launcher = fake_process, own: EngineSettings | None = None) -> Relay:
        """One more replica, of which Ray has told."""
        relay, place = await started(name, own or settings(), launch)
        self.stack.push_async_callback(relay.close)
        self.relays[name] = relay
        self.watch.set([*self.watch.places, place])
        return relay

    def link(self, name: str) -> Link:
        return next(link for link in self.pool.replicas.all if link.name == name)

    async def usable(self, *names: str) -> None:
        """Wait until just these may be asked."""
        async with asyncio.timeout(START_S):
            while sorted(link.name for link in self.pool.replicas.candidates) != sorted(names):
                await asyncio.sleep(0.02)  # A busier loop would keep the engines from starting.

    def kill(self, name: str) -> None:
        """End its engine with -9."""
        handle = self.relays[name]._supervisor.handle
        assert isinstance(handle, ProcessHandle)
        os.kill(handle.pid, signal.SIGKILL)

    def place_of(self, request_id: str) -> str | None:
        """The replica that writes this."""
        link = self.pool._asked[request_id].link
        return None if link is None else link.name


async def no_marks(info: ModelInfo) -> TurnMarks:
    return TurnMarks()


async def started(name: str, own: EngineSettings, launch: Launcher = fake_process) -> tuple[Relay, Place]:
    secret = name.encode() * 8
    relay = Relay(own, launch, secret, no_marks)
    host, port = await relay.start(LOOPBACK)
    await relay.wait_ready()
    return relay, Place(name, host, port, secret)


@asynccontextmanager
async def cluster(
    *names: str, launch: Launcher = fake_process, own: EngineSettings | None = None
) -> AsyncIterator[Cluster]:
    """A pool of these replicas, all of which may be asked."""
    async with AsyncExitStack() as stack:
        watch = FixedWatch()
        every = await asyncio.gather(*(started(name, own or settings(), launch) for name in names))
        for relay, _ in every:
            stack.push_async_callback(relay.close)
        watch.places = [place for _, place in every]
        pool = Pool(own or settings(), watch, os.urandom(32))
        await pool.start()
        stack.push_async_callback(pool.close)
        await pool.wait_ready()
        relays = {name: relay for name, (relay, _) in zip(names, every, strict=True)}
        yield Cluster(pool, watch, relays, stack)
