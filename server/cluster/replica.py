"""One replica as Ray Serve runs it: an engine in a child process, and the relay through which ingresses ask it."""

import logging
import secrets
from typing import Any

from tightrope.engine.console import log_to_stderr
from tightrope.engine.errors import EngineError
from tightrope.engine.process.launch import Launcher, spawn_process
from tightrope.engine.types import ModelInfo, TurnMarks
from tightrope.server.cluster.fitting import within
from tightrope.server.cluster.load import load_of
from tightrope.server.cluster.ray_address import listen_at_home_only
from tightrope.server.cluster.relay import Relay
from tightrope.server.prompts.template_renderer import TemplateRenderer
from tightrope.server.prompts.templates import ChatTemplate
from tightrope.server.prompts.turn_marks import checked_turn_marks
from tightrope.server.settings.settings import ServerSettings

log = logging.getLogger("tightrope.replica")

SECRET_BYTES = 32
DRAIN_S = 60.0  # What is being written when a replica is to end may go on for so long; then another goes on with it.
END_S = 20.0  # It may take so long to end behind that: the engine writes what rests of chats.


class LoadFailed(Exception):
    """The model can't be loaded; the message is one line."""


class Replica:
    """Its constructor returns once the model is loaded, so that Ray counts it as one that runs only then."""

    async def __init__(  # type: ignore[misc]  # Ray Serve awaits it.
        self, settings: str, memory_bytes: int | None = None, launch: Launcher = spawn_process
    ) -> None:
        """settings: a ServerSettings as JSON. memory_bytes: what it may take of the machine's; None: what is free."""
        self._settings = ServerSettings.model_validate_json(settings)
        log_to_stderr(self._settings.log_level)
        self._renderer = TemplateRenderer()
        self._secret = secrets.token_bytes(SECRET_BYTES)
        engine = self._settings.engine if memory_bytes is None else within(self._settings.engine, memory_bytes)
        self._relay = Relay(engine, launch, self._secret, self._find_marks)
        self._address = await self._relay.start(listen_at_home_only())
        try:
            await self._relay.wait_ready()
        except EngineError as error:
            await self._end()
            raise LoadFailed(error.message) from None
        log.info("replica is ready: address=%s:%d", *self._address)

    async def _find_marks(self, info: ModelInfo) -> TurnMarks:
        template = ChatTemplate(info, self._settings.chat_template, self._settings.chat_template_args, {})
        return await checked_turn_marks(self._renderer, template, info)

    async def _end(self) -> None:
        await self._relay.close()
        await self._renderer.close()

    # ---- what Ray Serve asks, under names of its own ----

    def record_replica_metadata(self) -> dict[str, Any]:
        """What every router of this deployment is told of this replica, once."""
        host, port = self._address
        return {"host": host, "port": port, "secret": self._secret.hex()}

    def record_autoscaling_stats(self) -> dict[str, float]:
        return {"load": load_of(self._relay.num_open, self._relay.num_places, self._relay.unread_bytes)}

    def check_health(self) -> None:
        """Raises RuntimeError when no engine will be started here any more: Ray puts another replica in its place."""
        if (failure := self._relay.failure) is not None:
            raise RuntimeError(failure)

    async def __del__(self) -> None:
        """The end, once no router may ask this replica any more."""
        await self._relay.drain(DRAIN_S)
        await self._end()
