"""Loading models one after another, and unloading those that give way: the least recently used that nobody uses."""

import asyncio
import logging
import time
from collections.abc import Callable, Sequence

from tightrope.engine.errors import BackendFailed, EngineError, EngineUnavailable
from tightrope.engine.protocol import FindMarks
from tightrope.server.models.model import Model
from tightrope.server.models.room import Room

log = logging.getLogger("tightrope.models")

LEAVE_S = 600.0  # Answers of a model that is to give way may go on for so long while others wait.
LOOK_S = 0.05  # So often it is looked whether they have ended.

MarksOf = Callable[[Model], FindMarks]


class Loader:
    """One model is loaded or unloaded at a time, in the order in which that was asked for."""

    def __init__(self, models: Sequence[Model], most_loaded: int, room: Room) -> None:
        """most_loaded: so many models may be loaded side by side."""
        self._models = models
        self._most_loaded = most_loaded
        self._room = room
        self._turn = asyncio.Lock()

    def want(self, model: Model, marks_of: MarksOf) -> None:
        """Load it for those who wait for it, unless that is under way already."""
        if model.loading is None:
            model.loading = asyncio.create_task(self._load(model, marks_of), name="model load")

    async def _load(self, model: Model, marks_of: MarksOf) -> None:
        try:
            async with self._turn:
                if model.state != "loaded" and model.is_wanted:
                    promised_bytes = await self._make_room(model)
                    began_s = time.monotonic()
                    log.info("model loads: name=%s", model.name)
                    await model.load(marks_of(model), promised_bytes >> 20)
                    log.info("model loaded: name=%s in_s=%.1f", model.name, time.monotonic() - began_s)
                model.admit()
        except EngineError as error:
            log.error("model not loaded: name=%s reason=%s", model.name, error.message)
            model.admit(error)
        except Exception:  # Nobody else would hear of it, and those who wait would wait for ever.
            log.exception("model not loaded: name=%s", model.name)
            model.admit(BackendFailed("internal server error"))
        finally:
            model.loading = None

    async def unload(self, model: Model) -> None:
        """Unload it when nobody uses it any more; who asks for it meanwhile waits until it is loaded again.

        Raises EngineUnavailable where answers go on for too long.
        """
        model.is_leaving = True
        try:
            async with self._turn:
                if model.state == "loaded":
                    await self._idle([model])
                    log.info("model unloaded: name=%s", model.name)
                    await model.unload()
        finally:
            model.is_leaving = False

    async def unload_idle(self, model: Model, since_s: float) -> None:
        """Unload it if nobody has used it since then, by time.monotonic."""
        async with self._turn:
            if model.state == "loaded" and model.is_idle and model.used_s < since_s and model.engine.info is not None:
                log.info("model sleeps: name=%s", model.name)
                await model.unload()

    def _others(self, model: Model) -> list[Model]:
        return [other for other in self._models if other.state == "loaded" and other is not model]

    async def _make_room(self, model: Model) -> int:
        """Unload others until it fits beside those that are left. It is planned first, so that none goes in vain.

        Returns how many bytes of the machine's memory these may still take.
        """
        while others := self._others(model):
            try:
                has_room = await self._room.has_room(model, others)
            except BackendFailed as error:
                await model.fail(error)
                raise
            if has_room and len(others) < self._most_loaded:
                return await self._room.promised_bytes(others)
            idle = [other for other in others if other.is_idle]
            last = min(idle or others, key=lambda other: other.used_s)
            if not idle:
                last.is_leaving = True
                try:
                    last = await self._idle(others, model)
                finally:
                    for other in others:
                        other.is_leaving = False
            log.info("model makes room: name=%s for=%s", last.name, model.name)
            await last.unload()
        return 0

    async def _idle(self, models: Sequence[Model], wanted: Model | None = None) -> Model:
        """The first of these that nobody uses any more. wanted: the model that needs its room.

        Raises EngineUnavailable.
        """
        try:
            async with asyncio.timeout(LEAVE_S):
                while not (idle := [model for model in models if model.is_idle]):
                    if wanted is not None and not wanted.is_wanted:
                        raise EngineUnavailable("nobody waits for the model any more")
                    await asyncio.sleep(LOOK_S)
        except TimeoutError:
            names = ", ".join(model.name for model in models)
            raise EngineUnavailable(f"answers of {names} have not ended within {LEAVE_S:.0f} s") from None
        return min(idle, key=lambda model: model.used_s)
