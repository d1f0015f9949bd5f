"""A model whose layers lie on several devices of one process: found, planned, and laid out."""

from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path

import torch

from tightrope.backends.devices import faults
from tightrope.backends.errors import BackendError
from tightrope.backends.files.peft import room_for_adapters
from tightrope.backends.hf.layer_split import Place, each_apart
from tightrope.backends.hf.laying_out import LaidOut, lay_out
from tightrope.backends.hf.load.inspection import inspect
from tightrope.backends.hf.part import Part
from tightrope.backends.hf.plan import HFPlan, check_layers
from tightrope.backends.hf.room import check_host
from tightrope.backends.memory import GIB, CardMemory, free_for, spare_bytes
from tightrope.backends.planning import MemoryShares
from tightrope.backends.settings import ModelSettings, written
from tightrope.backends.tensor_parallel import ALONE
from tightrope.backends.threads import compute_threads


class Layered(Part):
    """All of a model, its layers on the devices that hold them: a Part whose devices follow from its plan."""

    laid: LaidOut

    def __init__(
        self, path: Path, settings: ModelSettings, cards: Sequence[Place], host: Place | None, free_bytes: int
    ) -> None:
        """Read all but the weights. host: the machine's own memory, of which `free_bytes` are free.

        host None: no layer goes there. Raises BackendError.
        """
        self.settings, self.device, self.share = settings, cards[0].device, ALONE
        self.num_threads = compute_threads(settings.threads)
        self._path, self._cards, self._host, self._free_bytes = path, tuple(cards), host, free_bytes
        self.found = inspect(path, settings, self.device, ALONE, partial(each_apart, self.device))
        self.adapter_bytes = room_for_adapters(settings, self.found.blueprint.adapters.read)

    def make_plan(self, settings: ModelSettings, host_bytes: int | None = None) -> HFPlan:
        """See Part. Files are looked at once more, as what is loaded depends on where it goes."""
        self.settings = settings
        free_bytes = self._free_bytes if host_bytes is None else host_bytes
        sized = self.found.blueprint
        self.laid = lay_out(settings, sized, self._cards, self._host, self.adapter_bytes, free_bytes)
        self.found = inspect(self._path, settings, self.laid.placement[0][0], ALONE, self.laid.lay_out)
        self.device = self.found.blueprint.device
        check_host(self.found.blueprint, free_bytes)
        self.plan, self.room = self.laid.plan, self.laid.room
        check_layers(self.plan, self.found.blueprint.layers)
        return self.plan

    @property
    def memory(self) -> MemoryShares:
        """See Part: of all cards together, and of the machine's own memory beside them."""
        cards = [share for share in self.laid.shares if share.device != "cpu"] or self.laid.shares
        others = [share for share in self.laid.shares if share not in cards]
        return MemoryShares(
            device=cards[0].device.partition(":")[0],
            memory_bytes=sum(share.memory_bytes for share in cards),
            weight_bytes=sum(share.weight_bytes for share in cards),
            host_bytes=sum(share.weight_bytes for share in others) or self.found.blueprint.host_bytes,
            workspace_bytes=sum(share.workspace_bytes for share in self.laid.shares),
            cache_bytes=self.plan.cache_bytes,
            run_bytes=self.plan.run_bytes,
            shares=self.laid.shares if len(self.laid.shares) > 1 else (),
        )


def cards_of(settings: ModelSettings, memories: Mapping[torch.device, CardMemory]) -> list[Place]:
    """What --gpu-split leaves of cards with these memories, in order. Raises BackendError."""
    split = settings.gpu_split
    given = () if split is None or split == "auto" else split
    if len(given) > len(memories):
        there = "1 card" if len(memories) == 1 else f"{len(memories)} cards"
        raise BackendError(f"--gpu-split {written(given)}: GiB for each of {len(given)} cards, and there is {there}")
    places = []
    for number, (card, memory) in enumerate(memories.items()):
        usable = memory.usable_bytes(settings.gpu_memory_fraction)
        if given:
            usable = min(usable, int(given[number] * GIB) if number < len(given) else 0)
        if usable:
            places.append(Place(card, usable))
    return places


def host_of(settings: ModelSettings, free_bytes: int) -> Place:
    """The machine's own memory, of which so much is free, as a place for layers."""
    return Place(torch.device("cpu"), spare_bytes(settings.cache.host_reserve_bytes, free_bytes))


def open_layered(path: Path, settings: ModelSettings, device: torch.device) -> Layered:
    """A folder's model for --gpu-split, with the cards that are here; `device` is what --device chose.

    Raises BackendError.
    """
    if device.type != "cuda":
        raise BackendError("--gpu-split: lays layers out on cards, and the model runs on the CPU; leave it out")
    if settings.device.startswith("cuda:"):
        devices = [device]
    else:
        devices = [torch.device("cuda", number) for number in range(faults.num_cards())]
    for other in devices[1:]:
        if (fault := faults.of_card(other)) is not None:
            raise BackendError(f"--gpu-split: {fault}")
    torch.cuda.set_device(device)  # Looking at the others has moved the thread there.
    places = cards_of(settings, {one: CardMemory(*torch.cuda.mem_get_info(one)) for one in devices})
    if not places:
        raise BackendError("--gpu-split: no card has room for anything; free some of their memory")
    free_bytes = free_for(settings)
    return Layered(path, settings, places, host_of(settings, free_bytes), free_bytes)
