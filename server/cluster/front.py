"""The ingress as Ray Serve runs it: the same front as a single server's, that asks a pool of replicas."""

import asyncio
import secrets
import socket
import time
from collections.abc import Mapping
from typing import Any

from ray.serve.handle import DeploymentHandle

from tightrope.engine.console import log_to_stderr
from tightrope.engine.embedding.client import EmbeddingClient
from tightrope.engine.protocol import Engine
from tightrope.engine.settings import EngineSettings
from tightrope.server.app import create_app
from tightrope.server.cluster.handshake import KEY_BYTES
from tightrope.server.cluster.metrics import PoolMetrics
from tightrope.server.cluster.pool import Pool
from tightrope.server.cluster.ray_address import listen_at_home_only
from tightrope.server.cluster.ray_router import RayWatch
from tightrope.server.cluster.replica import DRAIN_S
from tightrope.server.http.draining import Drain
from tightrope.server.http.guards import warn_of_everybody
from tightrope.server.http.listening import CantListen, bind, http_server
from tightrope.server.models.model import MakeEngine
from tightrope.server.models.models import Models
from tightrope.server.settings.settings import ServerSettings
from tightrope.server.state import front_of

HANDOVER_S = 20.0  # Ray tells a front that it is to end as it starts the next one, and that may take some seconds.
POLL_S = 0.2


def pools_of(handle: DeploymentHandle[Any]) -> MakeEngine:
    """What makes an engine of all replicas of a deployment."""

    def make(settings: EngineSettings, adapters: Mapping[str, str] | None = None) -> Engine:
        return Pool(settings, RayWatch(handle), secrets.token_bytes(KEY_BYTES))

    return make


async def _listen(host: str, port: int) -> socket.socket:
    """A listening socket, as soon as the front that this one takes the place of has let go. Raises CantListen."""
    deadline_s = time.monotonic() + HANDOVER_S
    while True:
        try:
            return bind(host, port)
        except CantListen:
            if time.monotonic() > deadline_s:
                raise
        await asyncio.sleep(POLL_S)


class Front:
    """Listens itself, on the host and port of the settings: Ray's proxy would copy every event of every stream."""

    async def __init__(  # type: ignore[misc]  # Ray Serve awaits it.
        self, settings: str, replicas: DeploymentHandle[Any]
    ) -> None:
        """settings: a ServerSettings as JSON. Raises CantListen."""
        listen_at_home_only()
        own = ServerSettings.model_validate_json(settings)
        log_to_stderr(own.log_level)
        listener = await _listen(own.host, own.port)
        warn_of_everybody(own.host, own.api_key)
        make_engine = pools_of(replicas)
        self._models = models = Models.alone(make_engine(own.engine, None), own, make_engine)
        front = front_of(models, own, EmbeddingClient(own.engine, lambda: models.is_writing))
        front.metrics.add(PoolMetrics(models))
        self._drain = Drain(DRAIN_S)
        self._server = http_server(create_app(front, self._drain), access_log=own.log_level == "debug")
        self._serving = asyncio.create_task(self._server.serve([listener]), name="front")

    # ---- what Ray Serve asks, under names of its own ----

    def check_health(self) -> None:
        """Raises RuntimeError when it listens no more, or waits for no replica any more: Ray starts another one."""
        if self._serving.done():
            raise RuntimeError("the front has ended")
        engine = self._models.current.engine
        if isinstance(engine, Pool) and engine.failure is not None:
            raise RuntimeError(engine.failure)

    async def __del__(self) -> None:
        """The end, once all that is under way has been answered; the next one listens meanwhile."""
        for listening in self._server.servers:
            listening.close()
        self._drain.begin()
        await self._drain.over()
        self._server.should_exit = True
        await self._serving
