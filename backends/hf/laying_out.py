"""Where a model's layers go, and with what window and cache: on as few cards as hold them, and the rest on the CPU."""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace

import torch

from tightrope.backends.errors import DoesNotFit
from tightrope.backends.files.hf_config import ModelShape
from tightrope.backends.hf.layer_split import Place, SplitRoom
from tightrope.backends.hf.load.blueprint import Blueprint
from tightrope.backends.hf.load.stages import Placement
from tightrope.backends.hf.plan import HFPlan, cache_dtype, make_plan, rope_of, served_window
from tightrope.backends.memory import GIB, spare_bytes
from tightrope.backends.planning import DeviceShare
from tightrope.backends.settings import ModelSettings
from tightrope.kernels.forms.layout import PAGE

# Where layers go to the CPU and nobody asks for a window, so many leave the cards that a chat has these tokens.
LEAST_BESIDE_HOST = 4096


@dataclass(frozen=True, slots=True)
class LaidOut:
    """A plan, and what each device has of it: places with layers, and how many."""

    plan: HFPlan
    room: SplitRoom
    placement: tuple[tuple[torch.device, int], ...]
    shares: tuple[DeviceShare, ...]

    @property
    def lay_out(self) -> Callable[[int], Placement]:
        """For the blueprint that is loaded."""
        return lambda num_layers: self.placement

    @property
    def notes(self) -> tuple[str, ...]:
        """What the start says of it."""
        if len(self.shares) == 1:
            return ()
        each = [
            f"{share.layers} on {share.device}, {_taken(share) / GIB:.2f} of {share.memory_bytes / GIB:.2f} GiB"
            for share in self.shares
        ]
        lines = [
            f"layers: {'; '.join(each)}; each step passes through all of them in turn",
            "graphs: off, as a step spans several devices",
        ]
        if self.shares[0].device == "cpu":
            lines.append("hidden states: float32 on the CPU, and rounded where the first card takes them over")
        return tuple(lines)


def _taken(share: DeviceShare) -> int:
    return share.weight_bytes + share.cache_bytes + share.workspace_bytes


def lay_out(
    settings: ModelSettings, blueprint: Blueprint, cards: Sequence[Place], host: Place | None, adapter_bytes: int,
    free_bytes: int,
) -> LaidOut:  # fmt: skip
    """Choose what lies where. blueprint: of the whole model, by `each_apart`.

    host: the machine's own memory where layers may lie there, too. free_bytes: of it. Raises DoesNotFit.
    """
    runs = spare_bytes(blueprint.host_bytes, free_bytes)
    refusal: DoesNotFit | None = None
    for number in range(1, len(cards) + 1):
        room = SplitRoom.of(settings, blueprint, cards[:number], adapter_bytes, runs)
        try:
            plan = make_plan(settings, blueprint.shape, room)
        except DoesNotFit as error:
            refusal = error
            continue
        if number == len(cards) or plan.window == _asked_window(settings, blueprint.shape):
            return _laid(plan, room)
    if host is not None:
        whole = SplitRoom.of(settings, blueprint, [host, *cards], adapter_bytes, None)
        for count in _host_counts(settings, whole):
            room = replace(whole, most_on_first=count)
            try:
                return _laid(make_plan(settings, blueprint.shape, room), room)
            except DoesNotFit:
                continue
    assert refusal is not None, "there is a card"
    raise refusal


def _asked_window(settings: ModelSettings, shape: ModelShape) -> int:
    return served_window(settings, shape, rope_of(settings, shape))


def _host_counts(settings: ModelSettings, room: SplitRoom) -> Iterator[int]:
    """How many layers on the CPU may do, the fewest first."""
    window = _asked_window(settings, room.shape)
    if not settings.max_model_len:
        window = min(window, LEAST_BESIDE_HOST)
    pages = -(-(settings.cache.tokens or window) // PAGE)
    dtype, step = cache_dtype(settings), room.step_tokens[-1]
    for count in range(1, room.shape.num_layers):
        if replace(room, most_on_first=count).counts(dtype, step, window, pages):
            yield count


def _laid(plan: HFPlan, room: SplitRoom) -> LaidOut:
    counts = room.counts(plan.cache_dtype, plan.step_tokens, plan.window, plan.num_pages)
    placement = tuple((where.device, count) for where, count in zip(room.places, counts, strict=True) if count)
    shares = room.shares(counts, plan.cache_dtype, plan.step_tokens, plan.window, plan.num_pages)
    return LaidOut(plan, room, placement, tuple(shares))
