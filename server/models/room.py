"""Whether a model fits beside those that are loaded, by the plans of all of them."""

import logging
import os
from collections.abc import Awaitable, Callable, Sequence

from tightrope.backends.memory import GIB, MEMORY_SHARE, at_most, free_memory
from tightrope.backends.settings import ModelSettings
from tightrope.engine.errors import BackendFailed
from tightrope.engine.process.planning import Need, Planned, plan
from tightrope.server.models.model import Model

log = logging.getLogger("tightrope.models")

ENGINE_BYTES = 512 << 20  # Python and the libraries of a model take so much in each engine's process.

Plan = Callable[[ModelSettings, int | None], Awaitable[Planned]]


class Room:
    """The machine's memory, and what of it is promised to the models that are loaded.

    An engine takes much of what it was planned with only when chats need it; until then it seems to be free.
    """

    def __init__(self, plan: Plan = plan, free: Callable[[], int] = free_memory) -> None:
        self._plan = plan
        self._free = free
        self._needs: dict[Model, tuple[float, Need]] = {}  # Beside each stands when its files were changed last.

    async def has_room(self, model: Model, others: Sequence[Model]) -> bool:
        """Whether it gets its whole window beside these. Raises BackendFailed where it can't be served without them."""
        need = await self._need(model)
        if need.card_bytes > need.card_free_bytes:
            return False
        promised = await self.promised_bytes(others)
        settings = model.settings.engine.model
        free = self._free() - (settings.keep_free_mib << 20)
        if need.host_bytes <= _usable(settings, free - promised):
            return True
        alone = _usable(settings, free + sum(other.engine.private_bytes for other in others))
        if need.host_bytes > alone:  # It will be smaller, if it can be served at all.
            told = await self._plan(settings, max(1, alone))
            if told.refusal is not None:
                raise _failed(model, told.refusal)
        return False

    async def promised_bytes(self, others: Sequence[Model]) -> int:
        """What these may still take of the machine's memory that is free now."""
        left = 0
        for other in others:
            need = await self._need(other)
            left += max(0, need.host_bytes + need.run_bytes + ENGINE_BYTES - other.engine.private_bytes)
        return left

    async def _need(self, model: Model) -> Need:
        """It is asked again where its files have changed, and of models for cards, which others use, too."""
        settings = model.settings.engine.model
        changed_s = _changed_s(settings.model)
        known = self._needs.get(model)
        if known is not None and known[0] == changed_s and (not known[1].card_bytes or model.state == "loaded"):
            return known[1]
        told = await self._plan(settings, None)
        if told.need is None:
            raise _failed(model, told.error or "it can't be planned for")
        need = told.need
        sizes = need.host_bytes / GIB, need.card_bytes / GIB
        log.info("model planned: name=%s gib=%.2f card_gib=%.2f", model.name, *sizes)
        self._needs[model] = changed_s, need
        return need


def _failed(model: Model, reason: str) -> BackendFailed:
    return BackendFailed(f"the model `{model.name}` can't be loaded: {reason}")


def _usable(settings: ModelSettings, free_bytes: int) -> int:
    """What of so much free memory an engine that is started now plans with."""
    return int(at_most(settings, free_bytes - ENGINE_BYTES) * MEMORY_SHARE)


def _changed_s(path: str | None) -> float:
    try:
        return 0.0 if path is None else os.stat(os.path.expanduser(path)).st_mtime
    except (OSError, ValueError):
        return 0.0
