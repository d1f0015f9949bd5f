"""A model in several ranks as a Part: each finds its own, all agree on one plan, and do the rest at the same time."""

import importlib
import os
import tempfile
from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import cached_property
from pathlib import Path

import torch
from torch import Tensor

from tightrope.backends.hf.load.inspection import Inspect
from tightrope.backends.hf.modules.gather import Gather
from tightrope.backends.hf.part import Part
from tightrope.backends.hf.plan import HFPlan
from tightrope.backends.hf.ranks.adapters import RankedAdapters
from tightrope.backends.hf.ranks.gather import new_memory, open_gather, way_on
from tightrope.backends.hf.ranks.messages import Found, Load, Loaded, MakePlan, Open, Planned, WarmUp
from tightrope.backends.hf.ranks.processes import OnLost, Ranks, answers, answers_of, end_with_rank
from tightrope.backends.hf.ranks.rooms import host_rooms
from tightrope.backends.hf.ranks.runner import RunnersOfAll
from tightrope.backends.hf.ranks.steps import Steps
from tightrope.backends.hf.room import host_workspace
from tightrope.backends.hf.runner import Runner
from tightrope.backends.memory import free_for
from tightrope.backends.planning import DeviceShare, MemoryShares, rank_name
from tightrope.backends.settings import ModelSettings
from tightrope.backends.tensor_parallel import Share
from tightrope.backends.threads import compute_threads
from tightrope.kernels.forms.layout import PAGE, LayerCache

SUMMED = ("memory_bytes", "weight_bytes", "host_bytes", "workspace_bytes", "cache_bytes", "run_bytes")
STORE = "ranks"  # The name of the file by which a group finds itself.


class Team:
    """The ranks of one model: this process has the first one's part, `own`, and others have theirs.

    All of a model's plan, cards and books are kept here; what the ranks hold is the same but for heads and columns.
    """

    def __init__(
        self,
        path: Path,
        settings: ModelSettings,
        devices: Sequence[torch.device],
        source: str,
        on_lost: OnLost = end_with_rank,
    ) -> None:
        """Start a rank for each of the devices, and have all read all but the weights.

        source: the module whose `inspect` finds the model. on_lost: see RankProcess. Raises BackendError.
        """
        count = len(devices)
        self._threads = shared_out(compute_threads(settings.threads), count)
        self._way, self._memory = way_on(devices[0]), new_memory(count)
        self._folder = tempfile.TemporaryDirectory(prefix="tightrope-") if self._way != "shared" else None
        self._store = "" if self._folder is None else str(Path(self._folder.name, STORE))
        self._gather: Gather | None = None
        self.ranks = Ranks.start(count, self._memory, on_lost)
        try:
            text = _without_host_cache(settings).model_dump_json()
            asked = [
                process.ask(
                    Open(
                        str(path.absolute()), source, text, rank, count, str(devices[rank]), self._threads[rank],
                        self._way, self._store,
                    )
                )
                for rank, process in enumerate(self.ranks.processes, 1)
            ]  # fmt: skip
            inspect: Inspect = importlib.import_module(source).inspect
            self.own = Part(path, settings, devices[0], inspect, Share(0, count), self._threads[0])
            self._found = [Found(self.own.weight_bytes, self.own.cache_bytes), *answers_of(Found, asked)]
        except BaseException:
            self.close()
            raise

    def make_plan(self, settings: ModelSettings) -> HFPlan:
        """The plan of all ranks: what the one with the least room has. Raises BackendError, and DoesNotFit."""
        plan, planned = self._plan_all(settings)
        window, num_pages = min(p.window for p in planned), min(p.num_pages for p in planned)
        step_tokens = min(p.step_tokens for p in planned)
        if all((p.window, p.num_pages, p.step_tokens) == (window, num_pages, step_tokens) for p in planned):
            return plan
        cache = settings.cache.model_copy(update={"tokens": num_pages * PAGE})
        least = {"max_model_len": window, "step_tokens": step_tokens, "cache": cache}
        return self._plan_all(settings.model_copy(update=least))[0]

    def _plan_all(self, settings: ModelSettings) -> tuple[HFPlan, list[Planned]]:
        rooms = self._host_rooms(settings)
        text = _without_host_cache(settings).model_dump_json()
        asked = [
            process.ask(MakePlan(text, room)) for process, room in zip(self.ranks.processes, rooms[1:], strict=True)
        ]
        plan = self.own.make_plan(settings, rooms[0])
        own = Planned(plan.window, plan.num_pages, plan.step_tokens, self.own.memory)
        self._planned = [own, *answers_of(Planned, asked)]
        return plan, self._planned

    def _host_rooms(self, settings: ModelSettings) -> list[int | None]:
        """How much of the machine's memory is for each rank on its CPU; None where each asks its own card."""
        if self.own.device.type != "cpu":
            return [None] * len(self._found)
        first = host_workspace(settings, self.own.found.blueprint)
        weights, tokens = [f.weight_bytes for f in self._found], [f.cache_bytes for f in self._found]
        return [*host_rooms(settings, first, weights, tokens, free_for(settings))]

    @property
    def memory(self) -> MemoryShares:
        """What all ranks take together, of the machine's memory or of their cards, and each of them."""
        kind, planned = self.own.device.type, [p.memory for p in self._planned]
        shares = [
            DeviceShare(rank_name(rank, kind), m.memory_bytes, m.weight_bytes, m.cache_bytes, m.workspace_bytes)
            for rank, m in enumerate(planned)
        ]
        sums = {name: sum(getattr(m, name) for m in planned) for name in SUMMED}
        return replace(self.own.memory, **sums, shares=tuple(shares))

    def load(self, progress: Callable[[float], None]) -> None:
        """See Part; with the adapters of the settings in the other ranks. Raises BackendError."""
        asked = self.ranks.ask(Load())
        gather = open_gather(self._way, self.own.share, self._threads[0], self._memory, self._store, self.own.device)
        self._gather = gather
        self.own.load(progress, gather)
        kept = [found.kept for found in answers_of(Loaded, asked)]
        layers = [(layer.first_kv_head, layer.num_kv_heads) for layer in self.own.model.layers]
        self._runners = RunnersOfAll(self.ranks, Steps(self.ranks, gather), [layers, *kept])
        self._release()
        self.ranks.begin()

    @cached_property
    def adapters(self) -> RankedAdapters:
        """Those of all ranks."""
        return RankedAdapters(self.own.model.adapters, self.ranks)

    def warm_up(self, progress: Callable[[float], None]) -> None:
        """See Part."""
        asked = self.ranks.ask(WarmUp(), do_meet=True)
        self.own.warm_up(progress)
        answers(asked)

    def runner_over(self, caches: Sequence[LayerCache]) -> Runner:
        """See Part."""
        return self._runners.beside(self.own.runner_over(caches))

    def cached_runner(self, factors: Sequence[Tensor]) -> Runner:
        """See Part; factors: of this rank's heads."""
        return self._runners.main(self.own.cached_runner(factors))

    def close(self) -> None:
        """End the other ranks."""
        self.ranks.close()
        if self._gather is not None:
            self._gather.close()
            self._gather = None
        self._release()

    def _release(self) -> None:
        """What ranks have found each other by; they have it open."""
        if self._memory >= 0:
            os.close(self._memory)
            if self._folder is not None:
                self._folder.cleanup()
        self._memory = -1


def shared_out(num_threads: int, count: int) -> list[int]:
    """How many of these threads each rank has, the first ones one more; none has less than one."""
    return [max(1, num_threads // count + (rank < num_threads % count)) for rank in range(count)]


def _without_host_cache(settings: ModelSettings) -> ModelSettings:
    """The same for a rank that keeps no chats."""
    cache = settings.cache.model_copy(update={"host_mib": 0, "session_dir": None})
    return settings.model_copy(update={"cache": cache})
