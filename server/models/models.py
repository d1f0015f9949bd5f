"""All models that are served: which of them a request means, and what they say together."""

import asyncio
import time
from collections.abc import Mapping, Sequence
from contextlib import suppress
from typing import Self

from tightrope.engine.errors import EngineError, EngineUnavailable, ModelNotFound, Overloaded
from tightrope.engine.protocol import Engine
from tightrope.server.models.loading import Loader, MarksOf
from tightrope.server.models.model import MakeEngine, Model
from tightrope.server.models.room import Room
from tightrope.server.served import ANY_MODEL, LATEST
from tightrope.server.settings.settings import ServerSettings

MOST_NAMES = 20  # An error lists so many.
AGAIN_S = 5.0  # A model that could not be loaded is tried again for those who ask so much later.
WAIT_S = 1800.0  # A request waits so long for its model, others' turns included.
SLEEPS_S = 1.0  # At least so often it is looked who idles.


class Models:
    """Belongs to one event loop.

    The only model of a server is loaded at its start, answers whatever it is called, and who asks for it earlier is
    told so; of several a request's name decides, and it waits until its model is loaded.
    """

    def __init__(
        self,
        models: Sequence[Model],
        settings: ServerSettings,
        room: Room,
        *,
        most_loaded: int = 1,
        sleep_idle_s: float | None = None,
        is_alone: bool = False,
    ) -> None:
        """models: at least one; the first is meant where none is named, and none was used yet.

        most_loaded: so many may be loaded side by side. sleep_idle_s: who idles so long is unloaded.
        """
        self._settings = settings
        self._sleep_idle_s = sleep_idle_s
        self._models = {model.name: model for model in models}
        self._first = models[0]
        self._loader = Loader(models, most_loaded, room)
        self._marks_of: MarksOf | None = None
        self._sleep: asyncio.Task[None] | None = None
        self._begin: asyncio.Task[None] | None = None
        self.is_alone = is_alone

    @classmethod
    def alone(cls, engine: Engine, settings: ServerSettings, make_engine: MakeEngine) -> Self:
        """One model. make_engine: makes the next engine once this one was unloaded."""
        model = Model(None, settings, make_engine, engine)
        return cls([model], settings, Room(), sleep_idle_s=settings.sleep_idle_s, is_alone=True)

    @classmethod
    def of(
        cls, catalog: Mapping[str, ServerSettings], settings: ServerSettings, make_engine: MakeEngine, room: Room
    ) -> Self:
        """Several, each with settings of its own. settings: the server's."""
        models = [Model(name, own, make_engine) for name, own in catalog.items()]
        return cls(models, settings, room, most_loaded=settings.models_max, sleep_idle_s=settings.sleep_idle_s)

    # ---- life ----

    async def start(self, marks_of: MarksOf) -> None:
        """Begin to load what is to be there at the start; returns at once."""
        self._marks_of = marks_of
        if self.is_alone:
            await self._first.start(marks_of(self._first))
        elif self._settings.engine.model.model is not None:
            self._begin = asyncio.create_task(self._load_first(), name="first model")
        self._sleep = asyncio.create_task(self._sleep_when_idle(), name="model sleep")

    async def close(self) -> None:
        """End all engines. What is still running ends with EngineUnavailable."""
        tasks = [self._sleep, self._begin, *(model.loading for model in self.all)]
        for task in tasks:
            if task is not None:
                task.cancel()
                with suppress(asyncio.CancelledError):
                    await task
        await asyncio.gather(*(model.close() for model in self.all))

    async def _load_first(self) -> None:
        with suppress(EngineError):  # It is in the log, and requests that name it are told.
            await self.load(self._first.name)

    async def _sleep_when_idle(self) -> None:
        """Unload who has idled for as long as its last request, or else the settings, say."""
        general_s = SLEEPS_S if self._sleep_idle_s is None else self._sleep_idle_s
        while not self.is_alone or self._sleep_idle_s is not None:
            await asyncio.sleep(min(SLEEPS_S, general_s / 4))
            now_s = time.monotonic()
            for model in self.loaded:
                idle_s = self.idle_s_of(model)
                if not model.is_idle:
                    model.used_s = now_s
                elif idle_s is not None and model.used_s < now_s - idle_s:
                    await self._loader.unload_idle(model, now_s - idle_s)

    def idle_s_of(self, model: Model) -> float | None:
        """After so many seconds without a request it is unloaded; None: never."""
        return self._sleep_idle_s if model.idle_s is None else model.idle_s

    # ---- which is meant ----

    @property
    def all(self) -> Sequence[Model]:
        """In the order of their list."""
        return list(self._models.values())

    @property
    def loaded(self) -> Sequence[Model]:
        return [model for model in self._models.values() if model.state == "loaded"]

    def check_known(self) -> None:
        """Raises EngineUnavailable while nothing is known of the only model, not even its name."""
        if self.is_alone and self._first.info is None:
            raise EngineUnavailable("the model is still loading", retry_after_s=self.retry_after_s)

    @property
    def current(self) -> Model:
        """Who is meant where nobody is named: the loaded one that was used last, or else the first."""
        return max(self.loaded, key=lambda model: model.used_s, default=self._first)

    def find(self, name: str | None) -> Model:
        """The model of this name, or that has an adapter of this name. Raises ModelNotFound, with names that are there.

        The only one of a server is meant by any name, of which those who read the request may think otherwise.
        """
        if self.is_alone:
            return self._first
        for meant in (name or "", (name or "").removesuffix(LATEST)):
            if (model := self._models.get(meant)) is not None:
                return model
            if (owner := next((m for m in self._models.values() if meant in m.adapters), None)) is not None:
                return owner
        if name in ANY_MODEL or self._settings.any_model_name:
            return self.current
        names = ", ".join(list(self._models)[:MOST_NAMES])
        more = f", and {len(self._models) - MOST_NAMES} more" if len(self._models) > MOST_NAMES else ""
        raise ModelNotFound(f"The model `{name:.200}` does not exist; there are {names}{more}.", "model")

    async def hold(self, name: str | None) -> Model:
        """The model of this name, loaded, and taken: `release` is to be called. It may be long in coming.

        Raises ModelNotFound, Overloaded where too many wait, BackendFailed where it can't be loaded, and
        EngineUnavailable where it took too long.
        """
        model = self.find(name)
        if self.is_ready(model):
            model.take()
            return model
        if model.failure is not None and time.monotonic() - model.changed_s < AGAIN_S:
            raise model.failure
        self.check_room()
        if self._marks_of is None:  # Embedding models are loaded before.
            raise EngineUnavailable("the model is still loading", retry_after_s=self.retry_after_s)
        place: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        model.waiting.append(place)
        self._loader.want(model, self._marks_of)
        try:
            async with asyncio.timeout(WAIT_S):
                await place
        except (asyncio.CancelledError, TimeoutError) as gone:
            if place not in model.waiting and not place.cancelled() and place.exception() is None:
                model.release()  # It came at the same moment.
            if isinstance(gone, TimeoutError):
                raise EngineUnavailable(f"the model `{model.name}` was not loaded in {WAIT_S:.0f} s") from None
            raise
        finally:
            with suppress(ValueError):
                model.waiting.remove(place)
        return model

    def is_ready(self, model: Model) -> bool:
        """Whether `hold` gives it at once."""
        return model.state == "loaded" and not model.is_leaving

    async def load(self, name: str | None) -> Model:
        """Load it if it isn't. Raises as `hold` does."""
        model = await self.hold(name)
        model.release()
        return model

    async def unload(self, name: str | None) -> Model:
        """Unload it as soon as nobody uses it. Raises ModelNotFound, and EngineUnavailable where it takes too long."""
        model = self.find(name)
        await self._loader.unload(model)
        return model

    # ---- what they say together ----

    @property
    def is_writing(self) -> bool:
        """Whether any of them writes an answer now."""
        return any(model.engine.num_running for model in self.loaded)

    @property
    def is_healthy(self) -> bool:
        """Whether requests are answered: by any that is loaded, or by one that would be loaded for them."""
        engines = [model.engine for model in self.loaded]
        is_started = self._marks_of is not None
        return is_started and (not engines or any(engine.is_healthy for engine in engines))

    def answers(self, name: str) -> bool:
        """Whether the model of this name is loaded and answers; False where there is none."""
        try:
            return self.find(name).engine.is_healthy
        except ModelNotFound:
            return False

    @property
    def retry_after_s(self) -> int:
        return self.current.engine.retry_after_s

    def check_room(self, num_coming: int = 0) -> None:
        """Raises Overloaded if no more requests may wait, beside so many that will be asked for in a moment."""
        if self.is_alone and self._first.state == "loaded":
            return self._first.engine.check_room(num_coming)
        engines = [model.engine for model in self.loaded]
        num_open = sum(engine.num_running + engine.num_waiting for engine in engines)
        num_open += sum(len(model.waiting) for model in self._models.values())
        num_places = sum(engine.info.max_num_seqs for engine in engines if engine.info is not None)
        num_waiting, most = num_open + num_coming - max(1, num_places), self._settings.engine.limits.max_waiting
        if num_waiting >= most:
            message = f"{num_waiting} requests are waiting already; the limit is {most}"
            raise Overloaded(message, retry_after_s=self.retry_after_s)
        return None
