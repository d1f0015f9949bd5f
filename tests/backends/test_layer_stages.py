"""A model whose layers lie on several devices gives the bits of one that lies on one; here each device is the CPU."""

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from checkout import FORMATS
from step_builder import rope_tables, step_of
from test_hf_families import FAMILIES, Family, write
from torch import Tensor

from tightrope.backends.files.hf_config import read_config
from tightrope.backends.files.safetensors import Checkpoint
from tightrope.backends.hf.load.blueprint import draw
from tightrope.backends.hf.load.inspection import inspect
from tightrope.backends.hf.load.model import LoadedModel, build
from tightrope.backends.hf.modules.embedding import Embedding
from tightrope.backends.hf.modules.linear import Linear
from tightrope.backends.hf.modules.step import StepOn
from tightrope.backends.hf.run.later import StageInputs
from tightrope.backends.hf.run.rotary import RotarySets
from tightrope.backends.hf.run.warmup import Steps, gather
from tightrope.backends.rope.scaling import resolve_rope
from tightrope.backends.settings import ModelSettings, RopeSettings
from tightrope.backends.tensor_parallel import ALONE
from tightrope.kernels import dispatch
from tightrope.kernels.forms.layout import CacheFormat, LayerCache

CPU, META = torch.device("cpu"), torch.device("meta")
TINY = FORMATS / "tiny"
NAMES = sorted(path.name for path in TINY.iterdir() if (path / "config.json").is_file())
PAGES = 4
PROMPT = torch.arange(3, 33)


def load(folder: Path, counts: Sequence[int]) -> LoadedModel:
    """With so many layers on each device."""
    shape = read_config(folder)
    rope = resolve_rope(shape.raw, RopeSettings(), 0)
    placement = [(CPU, count) for count in counts]
    return build(draw(folder, shape, Checkpoint.open(folder), rope, lay_out=lambda num_layers: placement))


def steps(model: LoadedModel, folder: Path, chunks: Sequence[int]) -> Tensor:
    """Logits [n, V] of every token of PROMPT, run in chunks of so many. Each device has a step of its own."""
    rope = resolve_rope(read_config(folder).raw, RopeSettings(), 0)
    caches = [
        LayerCache.allocate(CacheFormat("q8", layer.num_kv_heads, layer.head_dim), PAGES) for layer in model.layers
    ]
    found, done = [], 0
    for count in chunks:
        layout = step_of([(done, count)], PAGES)
        done += count
        tables = [rope_tables(rope, [done], PAGES) for _ in model.currents]
        later = [StepOn(replace(layout), table) for table in tables[1:]]
        ids = PROMPT[done - count : done]
        found.append(model.forward(caches, ids, layout, tables[0], torch.arange(count), later=later))
    return torch.cat(found)


@pytest.fixture(scope="module", params=FAMILIES.values(), ids=FAMILIES.keys())
def family(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    chosen: Family = request.param
    folder = tmp_path_factory.mktemp("family")
    write(chosen, folder)
    return folder


def test_a_family_gives_the_same_bits_on_two_devices_as_on_one(family: Path):
    """Classes that stay transformers' own included: theirs are handed what was computed before the first layer."""
    num_layers = read_config(family).num_layers
    whole, split = load(family, [num_layers]), load(family, [1, num_layers - 1])

    assert len(split.currents) == 2
    for chunks in ([30], [17, 12, 1]):
        assert torch.equal(steps(whole, family, chunks), steps(split, family, chunks))


@pytest.mark.parametrize("name", NAMES)
def test_every_format_gives_the_same_bits_on_two_devices_as_on_one(name: str):
    num_layers = read_config(TINY / name).num_layers
    whole, split = load(TINY / name, [num_layers]), load(TINY / name, [num_layers - 1, 1])

    assert torch.equal(steps(whole, TINY / name, [20, 10]), steps(split, TINY / name, [20, 10]))


def test_the_modules_of_a_device_share_a_step_and_no_other_device_has_it(tmp_path: Path):
    write(FAMILIES["llama, biases and tied head"], tmp_path)
    model = load(tmp_path, [1, 1])
    first, second = model.currents
    of = {name: getattr(module, "current", None) for name, module in model.tree.named_modules()}

    assert first is not second
    assert {id(step) for step in of.values() if step is not None} == {id(first), id(second)}
    (table,) = (module for module in model.tree.modules() if isinstance(module, Embedding))
    (head,) = (module for module in model.tree.modules() if isinstance(module, Linear) and module.is_head)
    assert (table.current, head.current) == (first, second)
    assert isinstance(table.weight, Tensor)
    assert isinstance(head.weight, Tensor)
    assert table.weight is not head.weight  # Tied, and each device has its own.
    assert torch.equal(table.weight, head.weight)
    assert model.layer_devices == (CPU, CPU)


@pytest.mark.parametrize("order", [(CPU, META), (META, META)])
@pytest.mark.parametrize("name", ["llama-exl2-mixed-h6", "llama-untied-bnb-nf4", "mixtral-gptq-4bit-32g-actorder"])
def test_nothing_of_one_device_is_computed_with_on_another(name: str, order: tuple[torch.device, torch.device]):
    """The meta device is a card that isn't there: torch refuses to compute with its memory and the CPU's together."""
    folder, settings = TINY / name, ModelSettings(max_model_len=64, adapter_folder=str(TINY))
    counts = [1, read_config(folder).num_layers - 1]
    placement = list(zip(order, counts, strict=True))
    found = inspect(folder, settings, order[0], ALONE, lambda num_layers: placement)
    model = build(found.blueprint)
    first, later = (StageInputs.of(found.rope, 64, device) for device in order)

    with dispatch.standing_in(86):
        launches = gather(Steps.of(settings, model, first.rotary, "q8", 64, [later]))

    assert launches
    assert model.layer_devices == tuple(device for device, count in placement for _ in range(count))
    assert [current.dtype for current in model.currents] == [
        torch.float32 if device == CPU else found.blueprint.parts[order.index(META)].current.dtype for device in order
    ]
    assert isinstance(first.rotary["default"], RotarySets)
