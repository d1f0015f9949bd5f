"""The workspace that is planned for a card, against what a whole model's step holds there at a time."""

from collections.abc import Sequence
from dataclasses import dataclass, field, fields, is_dataclass

import pytest
import torch
from live_bytes import LiveBytes
from meta_models import KINDS, MetaStep, meta_model, pretending
from torch import Tensor

from tightrope.backends.allocator import held_bytes
from tightrope.backends.hf.load.arena import arena_bytes
from tightrope.backends.hf.modules.embedding import Embedding
from tightrope.backends.hf.room import card_room
from tightrope.backends.hf.workspace import CardWorkspace, logits_rows
from tightrope.backends.memory import CardMemory
from tightrope.backends.settings import ModelSettings
from tightrope.backends.tensor_parallel import ALONE, Share

CLOSE = 0.05  # of what is held
WINDOW = 4096


def held_and_planned(kind: str, num_tokens: int, *, all_rows: bool) -> tuple[int, int]:
    """Bytes that a prompt's step takes from the card at a time, rounded as torch's allocator does, and the plan's."""
    settings = ModelSettings()
    with pretending(), torch.inference_mode():
        model, blueprint = meta_model(kind, 2)
        rows = min(num_tokens, logits_rows(settings, blueprint.shape, num_tokens)) if all_rows else 1
        step = MetaStep.of(model, [(num_tokens, WINDOW)])
        with LiveBytes(held_bytes) as live:
            step.run(model, rows)
    workspace = card_room(settings, blueprint, 0, CardMemory(1 << 40, 1 << 40)).workspace
    assert isinstance(workspace, CardWorkspace)
    return live.most, workspace.step_bytes(num_tokens, rows)


@pytest.mark.parametrize("num_tokens", [256, 512, 1024, 2048])
@pytest.mark.parametrize("kind", KINDS)
def test_the_planned_workspace_is_what_a_step_holds_within_five_percent(kind: str, num_tokens: int):
    held, planned = held_and_planned(kind, num_tokens, all_rows=True)

    assert abs(planned - held) <= CLOSE * held


def on_card(value: object, found: dict[int, int]) -> dict[int, int]:
    """Sizes in bytes of the storages of all tensors in a value on the meta device."""
    if isinstance(value, Tensor):
        if value.is_meta:
            found[value.untyped_storage()._cdata] = value.untyped_storage().nbytes()
    elif isinstance(value, tuple | list):
        for part in value:
            on_card(part, found)
    elif is_dataclass(value) and type(value).__module__.startswith("tightrope.") and not isinstance(value, type):
        for part in fields(value):
            on_card(getattr(value, part.name, None), found)
    return found


@pytest.mark.parametrize("share", [ALONE, Share(0, 3), Share(2, 3)], ids=str)
@pytest.mark.parametrize("kind", KINDS)
def test_the_planned_weights_are_those_that_a_model_or_a_rank_holds_within_a_percent(kind: str, share: Share):
    found: dict[int, int] = {}
    with pretending():
        model, blueprint = meta_model(kind, 2, share)
    for module in model.tree.modules():
        if isinstance(module, Embedding):
            continue  # Its table is on the host.
        parts = [*module._parameters.values(), *module._buffers.values()]
        on_card([*parts, *(v for name, v in vars(module).items() if name in ("weight", "bias", "whole"))], found)

    planned = arena_bytes(blueprint.block_sizes) + sum(blueprint.other_sizes)
    assert planned == pytest.approx(sum(found.values()), rel=0.01)
    are_apart = sum(size for size in found.values() if size != arena_bytes(blueprint.block_sizes))
    assert are_apart <= 1.01 * sum(blueprint.other_sizes)
    table = blueprint.checkpoint.tensors["model.embed_tokens.weight"]
    begin, end = share.columns(table.shape[0])
    assert blueprint.host_bytes == table.num_bytes // table.shape[0] * (end - begin)


@pytest.mark.parametrize("num_tokens", [1, 4, 40])
@pytest.mark.parametrize("kind", KINDS)
def test_short_steps_hold_no_more_than_is_planned(kind: str, num_tokens: int):
    held, planned = held_and_planned(kind, num_tokens, all_rows=False)

    assert held <= (1 + CLOSE) * planned


@dataclass
class Noted:
    """A Gather that notes what it was asked, and gives memory of the right size."""

    share: Share
    asked: list[tuple[int, tuple[int, ...]]] = field(default_factory=list)
    shared: None = None

    def __call__(self, local: Tensor, sizes: Sequence[int]) -> Tensor:
        assert local.shape[1] == sizes[self.share.rank]
        self.asked.append((len(local), tuple(sizes)))
        return local.new_empty(len(local), sum(sizes))


@pytest.mark.parametrize("kind", KINDS)
def test_steps_of_all_ranks_run_by_the_kernels_of_a_card_and_gather_alike(kind: str):
    gathers = [Noted(Share(rank, 3)) for rank in range(3)]
    for gather in gathers:
        with pretending(), torch.inference_mode():
            model, _ = meta_model(kind, 2, gather.share)
            model.current.gather = gather
            for num_tokens in (1, 4, 300):
                MetaStep.of(model, [(num_tokens, WINDOW)]).run(model, 1)

    first, *others = (gather.asked for gather in gathers)
    assert all(other == first for other in others)
    assert len(first) >= 3 * (1 + 2 * 4 + 1)  # The embedding, four times a layer, and the head.
