"""Whole quantized checkpoints by the kernels of a card: the model that CUDA gets, in Triton's interpreter on a CPU."""

from collections.abc import Iterator, Sequence
from pathlib import Path

import pytest
import torch
from checkout import FORMATS
from interpreted import interpreted
from step_builder import rope_tables, step_of
from test_quant_tiny import AS_FLOAT32, AS_HALVES, EXPECTED, PAGES, last_logits, load

from tightrope.backends.files.hf_config import read_config
from tightrope.backends.hf.load.model import LoadedModel
from tightrope.backends.hf.modules.experts import Experts
from tightrope.backends.hf.modules.linear import Linear
from tightrope.backends.hf.modules.matrices import Columns
from tightrope.backends.rope.scaling import resolve_rope
from tightrope.backends.settings import RopeSettings
from tightrope.kernels import dispatch, reference
from tightrope.kernels.forms.layout import CacheFormat, LayerCache

CHECKPOINTS = (
    "llama-untied-gptq-v2-4bit-32g-actorder-asym",
    "llama-awq-4bit-32g",
    "llama-untied-bnb-nf4",
    "mixtral-gptq-4bit-32g-actorder",
)

# numpy, which interprets, warns where a card yields the infinity that is meant
pytestmark = pytest.mark.filterwarnings("ignore:overflow encountered in exp:RuntimeWarning")


@pytest.fixture(scope="module")
def card() -> Iterator[None]:
    """Every kernel is Triton's, and matrices are as a card reads them."""
    with interpreted("ops") as ops, pytest.MonkeyPatch.context() as patch:
        patch.setattr(dispatch, "_kernels_for", lambda x: ops)
        patch.setattr(dispatch, "reads_columns", lambda device: True)
        yield


def quantized(model: LoadedModel) -> list[object]:
    """The weights of its linears that are no tensors."""
    found: list[object] = []
    for module in model.tree.modules():
        if isinstance(module, Linear):
            found.append(module.weight)
        elif isinstance(module, Experts):
            found += [*module.gate_up, *module.down]
    return [weight for weight in found if not isinstance(weight, torch.Tensor)]


@pytest.mark.usefixtures("card")
@pytest.mark.parametrize("name", CHECKPOINTS)
def test_a_checkpoint_gives_its_logits_by_triton(name: str, monkeypatch: pytest.MonkeyPatch):
    for kernel in ("attention", "store_kv", "linear"):  # torch can hold keys and values, and sums, in float32
        monkeypatch.setattr(dispatch, kernel, getattr(reference, kernel))
    folder = FORMATS / "tiny" / name
    model = load(folder)

    assert quantized(model)
    assert all(isinstance(weight, Columns) for weight in quantized(model))
    assert model.picks_experts_on_card == name.startswith("mixtral")
    prompt = EXPECTED[name][0]
    found = last_logits(model, folder, prompt["ids"])
    torch.testing.assert_close(
        found[prompt["top20_ids"]], torch.tensor(prompt["top20_logits"]), atol=AS_FLOAT32, rtol=0
    )


def run(model: LoadedModel, caches: Sequence[LayerCache], folder: Path, ids: list[int], before: int) -> torch.Tensor:
    """Logits [V] after ids, of which `before` tokens are cached already."""
    tables = rope_tables(resolve_rope(read_config(folder).raw, RopeSettings(), 0), [len(ids)], PAGES)
    count = len(ids) - before
    step, rows = step_of([(before, count)], PAGES), torch.tensor([count - 1])
    return model.forward(caches, torch.tensor(ids[before:]), step, tables, rows)[0]


@pytest.mark.usefixtures("card")
def test_prompt_and_next_tokens_give_the_expected_logits_with_the_cache_of_a_card():
    name = "llama-exl2-mixed-h6"
    folder = FORMATS / "tiny" / name
    model = load(folder)
    caches = [LayerCache.allocate(CacheFormat("f16", i.num_kv_heads, i.head_dim), PAGES) for i in model.layers]
    prompt = EXPECTED[name][0]
    ids, wanted = prompt["ids"], torch.tensor(prompt["top20_logits"])

    run(model, caches, folder, ids[:-2], 0)
    run(model, caches, folder, ids[:-1], len(ids) - 2)
    found = run(model, caches, folder, ids, len(ids) - 1)

    torch.testing.assert_close(found[prompt["top20_ids"]], wanted, atol=AS_HALVES, rtol=0)
