"""One model that is served: its settings, its engine while it is loaded, and who uses it."""

import asyncio
import logging
import time
from collections.abc import Callable, Mapping
from typing import Literal

from tightrope.backends.settings import MAX_HOST_MIB
from tightrope.engine.errors import BackendFailed, EngineError
from tightrope.engine.protocol import Engine, FindMarks
from tightrope.engine.settings import EngineSettings
from tightrope.engine.types import ModelInfo
from tightrope.server.settings.settings import ServerSettings

log = logging.getLogger("tightrope.models")

ModelState = Literal["unloaded", "loading", "loaded", "failed"]
# What is told the paths of adapters to begin with, by name, or None for those of the settings.
MakeEngine = Callable[[EngineSettings, Mapping[str, str] | None], Engine]


class Model:
    """Belongs to one event loop. It has an engine at any time; that of a model which isn't loaded has no process."""

    def __init__(
        self,
        name: str | None,
        settings: ServerSettings,
        make_engine: MakeEngine,
        engine: Engine | None = None,
    ) -> None:
        """name: what requests call it; None is what its files say. settings: the server's, with the model's own.

        engine: its first, where that is there already.
        """
        self.settings = settings
        self.engine = make_engine(settings.engine, None) if engine is None else engine
        self.state: ModelState = "unloaded"
        self.failure: BackendFailed | None = None  # Why it could not be loaded, or had to be given up.
        self.changed_s = time.monotonic()  # It came to its state then.
        self.used_s = 0.0  # Somebody used it last, by time.monotonic.
        self.idle_s: float | None = None  # It is unloaded when it has idled so long; None: as the settings say.
        self.num_loads = 0
        self.is_leaving = False  # It is to be unloaded as soon as nobody uses it, and who asks for it now waits.
        self.waiting: list[asyncio.Future[None]] = []  # They are to use it once it is loaded.
        self.loading: asyncio.Task[None] | None = None
        self._name = name
        self._make_engine = make_engine
        self._num_users = 0
        self._info: ModelInfo | None = None
        self._adapters: Mapping[str, str] = settings.engine.model.adapters  # As of when it was unloaded.
        self._watch: asyncio.Task[None] | None = None

    @property
    def name(self) -> str:
        """What requests call it; empty where that is what its files say, and they have not been read yet."""
        info = self.info
        return self._name or self.settings.served_model_name or ("" if info is None else info.model_id)

    @property
    def info(self) -> ModelInfo | None:
        """What is known of it since it was loaded last."""
        return self.engine.info or self._info

    @property
    def adapters(self) -> Mapping[str, str]:
        """Paths, by name, of the adapters that requests may use, or could once it is loaded."""
        return self._adapters if self.engine.info is None else self.engine.adapters

    # ---- its users ----

    @property
    def is_idle(self) -> bool:
        """Whether nobody uses it; a stream that its client may come back to counts as well."""
        return not self._num_users and not self.engine.num_running and not self.engine.num_waiting

    @property
    def is_wanted(self) -> bool:
        """Whether anybody waits until it is loaded."""
        return any(not place.done() for place in self.waiting)

    def take(self) -> None:
        """Use it until `release`: it isn't unloaded before."""
        self._num_users += 1
        self.used_s = time.monotonic()

    def release(self) -> None:
        """Undo one `take`."""
        self._num_users -= 1
        self.used_s = time.monotonic()

    def admit(self, error: EngineError | None = None) -> None:
        """Let everybody in who waits for it, or tell them why that can't be."""
        waiting, self.waiting = self.waiting, []
        for place in waiting:
            if place.done():  # Its client has gone.
                continue
            if error is not None:
                place.set_exception(error)
            else:
                self.take()
                place.set_result(None)

    # ---- its engine ----

    async def start(self, find_marks: FindMarks) -> None:
        """Begin to load it; returns at once. Until it is loaded its engine tells everybody that it is not."""
        self._set_state("loaded")
        self.num_loads += 1
        await self.engine.start(find_marks)

    async def load(self, find_marks: FindMarks, promised_mib: int = 0) -> None:
        """Load it. promised_mib: of the memory that is free now, what other engines will need.

        Raises BackendFailed with one line that names it.
        """
        self._set_state("loading")
        self.engine = self._new_engine(promised_mib)
        try:
            await self.engine.start(find_marks)
            self._info = await self.engine.wait_ready()
        except EngineError as error:
            failure = BackendFailed(f"the model `{self.name}` can't be loaded: {error.message}")
            await self.fail(failure)
            raise failure from None
        except asyncio.CancelledError:
            await self.unload()
            raise
        self._set_state("loaded")
        self.num_loads += 1
        self.used_s = time.monotonic()
        self._watch = asyncio.create_task(self._watch_engine(), name="model watch")

    async def unload(self) -> None:
        """End its engine, which writes what rests of chats first."""
        await self._drop("unloaded")

    async def close(self) -> None:
        """End its engine for good."""
        if self._watch is not None:
            self._watch.cancel()
        await self.engine.close()

    async def _watch_engine(self) -> None:
        reason = await self.engine.wait_failed()
        log.error("model given up: name=%s reason=%s", self.name, reason)
        self._watch = None
        await self.fail(BackendFailed(f"the model `{self.name}` had to be given up: {reason}"))

    async def fail(self, failure: BackendFailed) -> None:
        """It can't be loaded, or goes on no more."""
        self.failure = failure
        await self._drop("failed")

    async def _drop(self, state: ModelState) -> None:
        """Put a new engine in the place of this one, which is ended."""
        self._set_state(state)
        if self._watch is not None:
            self._watch.cancel()
            self._watch = None
        engine = self.engine
        self._info = engine.info or self._info
        if engine.info is not None:
            self._adapters = dict(engine.adapters)
        self.engine = self._new_engine()
        await engine.close()

    def _new_engine(self, promised_mib: int = 0) -> Engine:
        """One with the adapters of the last."""
        settings = self.settings.engine
        kept_mib = min(settings.model.keep_free_mib + promised_mib, MAX_HOST_MIB)
        model = settings.model.model_copy(update={"keep_free_mib": kept_mib})
        adapters = None if self._info is None else self._adapters
        return self._make_engine(settings.model_copy(update={"model": model}), adapters)

    def _set_state(self, state: ModelState) -> None:
        self.state = state
        self.changed_s = time.monotonic()
        if state != "failed":
            self.failure = None
