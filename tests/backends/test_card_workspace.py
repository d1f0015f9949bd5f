"""The workspace that is planned for a card, against what a whole model's step holds there at a time."""

from dataclasses import fields, is_dataclass

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


@pytest.mark.parametrize("kind", KINDS)
def test_the_planned_weights_are_those_that_a_model_holds_within_a_percent(kind: str):
    found: dict[int, int] = {}
    with pretending():
        model, blueprint = meta_model(kind, 2)
    for module in model.tree.modules():
        if isinstance(module, Embedding):
            continue  # Its table is on the host.
        parts = [*module._parameters.values(), *module._buffers.values()]
        on_card([*parts, *(v for name, v in vars(module).items() if name in ("weight", "bias", "whole"))], found)

    planned = arena_bytes(blueprint.block_sizes) + sum(blueprint.other_sizes)
    assert planned == pytest.approx(sum(found.values()), rel=0.01)
    are_apart = sum(size for size in found.values() if size != arena_bytes(blueprint.block_sizes))
    assert are_apart <= 1.01 * sum(blueprint.other_sizes)
    assert blueprint.host_bytes == blueprint.checkpoint.tensors["model.embed_tokens.weight"].num_bytes


@pytest.mark.parametrize("num_tokens", [1, 4, 40])
@pytest.mark.parametrize("kind", KINDS)
def test_short_steps_hold_no_more_than_is_planned(kind: str, num_tokens: int):
    held, planned = held_and_planned(kind, num_tokens, all_rows=False)

    assert held <= (1 + CLOSE) * planned
