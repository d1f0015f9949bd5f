"""How many ranks a model has, and which devices: as asked, and else one where it fits, or all cards that there are."""

from pathlib import Path
from typing import TypeVar

import torch

from tightrope.backends.devices import faults
from tightrope.backends.devices.spread import are_alike
from tightrope.backends.errors import BackendError, DoesNotFit
from tightrope.backends.hf.layered import Layered, open_layered
from tightrope.backends.hf.load.inspection import Inspect
from tightrope.backends.hf.part import Part
from tightrope.backends.hf.ranks.team import Team
from tightrope.backends.settings import MAX_RANKS, ModelSettings
from tightrope.backends.threads import usable_cpus

Opened = TypeVar("Opened", Part, Layered, Team)


def open_part(
    path: Path, settings: ModelSettings, device: torch.device, inspect: Inspect, source: str
) -> tuple[Part | Team, list[str]]:
    """The model found and planned, in one rank or several, and lines for the start.

    source: the module whose `inspect` finds the same in other ranks. Raises BackendError, and DoesNotFit where no
    way of holding it fits.
    """
    if settings.gpu_split is not None:
        layered = _planned(open_layered(path, settings, device), settings)
        return layered, list(layered.laid.notes)
    if (asked := num_asked(settings, device)) > 1:
        devices = asked_devices(settings, device, asked)
        return _planned(Team(path, settings, devices, source), settings), [_asked_line(device, asked)]
    num_cards = faults.num_cards() if device.type == "cuda" and not settings.device.startswith("cuda:") else 1
    try:
        part = _planned(Part(path, settings, device, inspect), settings)
    except DoesNotFit as error:
        if asked or num_cards < 2:
            raise
        return _over_all(path, settings, device, source, num_cards, str(error))
    return part, [f"devices: {device} of {num_cards} cards, as it holds the model"] if num_cards > 1 else []


def _over_all(
    path: Path, settings: ModelSettings, device: torch.device, source: str, num_cards: int, reason: str
) -> tuple[Part | Team, list[str]]:
    """A model that one card doesn't hold: a rank on each where they are alike and hold it so, or its layers over all.

    reason: why one does not. Raises BackendError, and DoesNotFit.
    """
    count = min(num_cards, MAX_RANKS)
    why = f"as one does not hold it: {reason}"
    are_of_a_size = are_alike([torch.cuda.mem_get_info(number)[0] for number in range(num_cards)])
    if are_of_a_size:
        try:
            team = _planned(Team(path, settings, _cards(count), source), settings)
            return team, [f"devices: {count} cards, a rank of the model on each, {why}"]
        except DoesNotFit as error:
            why = f"{why}; nor a rank on each of {count}: {error}"
    layered = _planned(open_layered(path, settings, device), settings)
    sizes = "" if are_of_a_size else " of different sizes"
    return layered, [f"devices: layers of the model over {num_cards} cards{sizes}, {why}", *layered.laid.notes]


def _planned(part: Opened, settings: ModelSettings) -> Opened:
    """The same with its plan made, or closed where there is none."""
    try:
        part.make_plan(settings)
    except BaseException:
        part.close()
        raise
    return part


def num_asked(settings: ModelSettings, device: torch.device) -> int:
    """How many ranks --tensor-parallel asks for; 0 where it doesn't say."""
    if settings.tensor_parallel >= 0:
        return settings.tensor_parallel
    return min(faults.num_cards(), MAX_RANKS) if device.type == "cuda" else 1


def asked_devices(settings: ModelSettings, device: torch.device, count: int) -> list[torch.device]:
    """A device for each of `count` ranks. Raises BackendError where there are too few."""
    if device.type == "cpu":
        return [device] * count
    check_no_card_is_named(settings, count)
    if (num_cards := faults.num_cards()) < count:
        raise BackendError(f"--tensor-parallel {count}: torch finds {num_cards} card{'s' * (num_cards > 1)}")
    return _cards(count)


def check_no_card_is_named(settings: ModelSettings, count: int) -> None:
    """Raise BackendError where --device names one card, and there are to be several ranks."""
    if settings.device.startswith("cuda:"):
        raise BackendError(
            f"--tensor-parallel {count} takes cards from cuda:0 on, and --device {settings.device} is one card; leave "
            "it out, and name the cards that may be used by CUDA_VISIBLE_DEVICES"
        )


def _cards(count: int) -> list[torch.device]:
    return [torch.device("cuda", number) for number in range(count)]


def _asked_line(device: torch.device, count: int) -> str:
    if device.type != "cpu":
        return f"devices: {count} cards, a rank of the model on each, as asked"
    crowded = f", more than the {len(usable_cpus())} CPUs" if count > len(usable_cpus()) else ""
    return f"devices: {count} ranks of the model on this CPU, as asked{crowded}"
