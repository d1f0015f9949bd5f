"""The ingress as Ray Serve runs it: the same front as a single server's, that asks a pool of replicas."""

import asyncio
import secrets
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
from tightrope.server.http.listening import bind, http_server
from tightrope.server.models.model import MakeEngine
from tightrope.server.models.models import Models
from tightrope.server.settings.settings import ServerSettings
from tightrope.server.state import front_of


def pools_of(handle: DeploymentHandle[Any]) -> MakeEngine:
    """What makes an engine of all replicas of a deployment."""

    def make(settings: EngineSettings, adapters: Mapping[str, str] | None = None) -> Engine:
        return Pool(settings, RayWatch(handle), secrets.token_bytes(KEY_BYTES))

    return make


class Front:
    """Listens itself, on the host and port of the settings: Ray's proxy would copy every event of every stream."""

    async def __init__(  # type: ignore[misc]  # Ray Serve awaits it.
        self, settings: str, replicas: DeploymentHandle[Any]
    ) -> None:
        """settings: a ServerSettings as JSON. Raises CantListen."""
        listen_at_home_only()
        own = ServerSettings.model_validate_json(settings)
        log_to_stderr(own.log_level)
        listener = bind(own.host, own.port)
        make_engine = pools_of(replicas)
        models = Models.alone(make_engine(own.engine, None), own, make_engine)
        front = front_of(models, own, EmbeddingClient(own.engine, lambda: models.is_writing))
        front.metrics.add(PoolMetrics(models))
        self._drain = Drain(DRAIN_S)
        self._server = http_server(create_app(front, self._drain), access_log=own.log_level == "debug")
        self._serving = asyncio.create_task(self._server.serve([listener]), name="front")

    # ---- what Ray Serve asks, under names of its own ----

    def check_health(self) -> None:
        """Raises RuntimeError when it listens no more."""
        if self._serving.done():
            raise RuntimeError("the front has ended")

    async def __del__(self) -> None:
        """The end, once all that is under way has been answered."""
        self._drain.begin()
        await self._drain.over()
        self._server.should_exit = True
        await self._serving
