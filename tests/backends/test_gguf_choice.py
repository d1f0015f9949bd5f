"""Which engine runs a GGUF file that nobody has chosen one for, and the line that says so."""

from pathlib import Path

import gguf
import numpy as np
import pytest
import torch
from checkout import ADAPTERS
from gguf_files import write_model
from gguf_of_models import Encoded, write_gguf
from numpy.typing import NDArray
from recurrent_gguf import write_mamba
from transformers import LlamaConfig, LlamaForCausalLM

from tightrope.backends.detect import open_backend, outline
from tightrope.backends.errors import BackendError
from tightrope.backends.gguf.backend import GGUFBackend
from tightrope.backends.hf.backend import HFBackend
from tightrope.backends.hf.host_workspace import HostWorkspace
from tightrope.backends.own_gguf.choice import choose
from tightrope.backends.settings import CacheSettings, ModelSettings

OURS = (
    "engine: the torch engine runs this GGUF file, as it knows the architecture and all tensor types, and the "
    "device is a CPU"
)


def settings(path: Path, **more: object) -> ModelSettings:
    return ModelSettings.model_validate(
        {"model": str(path), "device": "cpu", "max_model_len": 64, "max_num_seqs": 1, "threads": 1, **more}
    )


@pytest.fixture(scope="module")
def known(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_model(ADAPTERS / "llama-bf16", tmp_path_factory.mktemp("known") / "m.gguf")


def test_a_file_that_is_known_throughout_runs_in_the_torch_engine_and_plan_says_so(known: Path):
    planned = outline(settings(known), None).chosen
    backend = open_backend(settings(known), lambda share: None)

    assert isinstance(backend, HFBackend)
    assert backend.card.notes[0] == OURS
    assert planned is not None
    assert planned.notes[0] == OURS
    backend.close()


def test_llama_cpp_runs_a_file_with_a_type_of_tensors_that_is_not_known(tmp_path: Path):
    torch.manual_seed(3)
    config = LlamaConfig(
        hidden_size=64, intermediate_size=256, num_hidden_layers=1, num_attention_heads=4, vocab_size=64
    )

    def encode(name: str, values: NDArray[np.float32]) -> Encoded:
        if name != "blk.0.ffn_down.weight":
            return values, None
        return gguf.quants.quantize(values, gguf.GGMLQuantizationType.TQ2_0), gguf.GGMLQuantizationType.TQ2_0

    path = write_gguf(LlamaForCausalLM(config), "llama", tmp_path / "m.gguf", encode=encode)
    backend = open_backend(settings(path), lambda share: None)

    assert isinstance(backend, GGUFBackend)
    assert backend.card.notes[0] == (
        "engine: llama.cpp runs this GGUF file, as the torch engine does not: tensor 'blk.0.ffn_down.weight' is "
        "TQ2_0, which is not known"
    )
    backend.close()


def test_llama_cpp_runs_an_architecture_that_is_not_known(tmp_path: Path):
    choice = choose(path := write_mamba(tmp_path / "m.gguf"), settings(path))

    assert choice.inspect is None
    assert "as the torch engine does not: architecture 'mamba' is not known; llama, qwen2" in choice.line


def test_llama_cpp_runs_what_the_torch_engine_has_no_place_for(tmp_path: Path):
    """It is refused there, and perhaps here as well: this one knows more of it."""

    def add(writer: gguf.GGUFWriter) -> None:
        writer.add_tensor("blk.0.ffn_down.bias", np.ones(64, np.float32))

    choice = choose(path := write_model(ADAPTERS / "llama-bf16", tmp_path / "m.gguf", keys=add), settings(path))

    assert choice.inspect is None
    assert "its architecture has no 'model.layers.0.mlp.down_proj.bias'" in choice.line


@pytest.mark.parametrize("more", [{"gpu_layers": -1}, {"device": "cuda"}, {"device": "cuda:1"}])
def test_llama_cpp_runs_what_is_for_a_card(more: dict[str, object], known: Path):
    choice = choose(known, settings(known, **more))

    assert choice.inspect is None
    assert choice.line.endswith("as it is for a card, and the torch engine runs such files on a CPU alone")


def test_llama_cpp_runs_what_the_torch_engine_has_no_memory_for(known: Path, monkeypatch: pytest.MonkeyPatch):
    """As it would be for a model whose steps take more here than there, which this one's don't."""
    taken = HostWorkspace.num_bytes
    monkeypatch.setattr(HostWorkspace, "num_bytes", lambda *asked: taken(*asked) + (128 << 20))
    chosen = settings(known, cache=CacheSettings(tokens=64))

    def needed(engine: str) -> int:
        found = outline(chosen.model_copy(update={"gguf_engine": engine}), 1 << 30)
        assert found.chosen is not None
        return found.weight_bytes + found.workspace_bytes + found.chosen.cache_bytes

    sizes = needed("llama.cpp"), needed("own")
    assert sizes[0] < sizes[1]

    planned = outline(chosen, sum(sizes) // 2)

    assert planned.chosen is not None
    assert planned.chosen.notes[0].startswith("engine: llama.cpp runs this GGUF file, as the torch engine does not: ")


def test_what_neither_engine_runs_is_refused_in_the_words_of_llama_cpp(tmp_path: Path):
    path = write_model(
        ADAPTERS / "llama-bf16", tmp_path / "m.gguf",
        change=lambda name, values: None if name == "output_norm.weight" else values,
    )  # fmt: skip
    with pytest.raises(BackendError, match=r"tensor 'output_norm\.weight' not found"):
        open_backend(settings(path), lambda share: None)
