"""GGUF files that the torch engine can't run, or that can't be right: each is one line that says why."""

from collections.abc import Callable
from pathlib import Path

import gguf
import numpy as np
import pytest
import torch
from broken_gguf import BROKEN_KEYS, BROKEN_TENSORS
from checkout import ADAPTERS
from gguf import GGUFWriter
from gguf_files import write_model
from gguf_of_models import Encode, Encoded, as_float32, write_gguf
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray
from transformers import LlamaConfig, LlamaForCausalLM

from tightrope.backends.detect import open_backend, outline
from tightrope.backends.errors import BackendError
from tightrope.backends.files.gguf.header import read_header
from tightrope.backends.own_gguf.backend import open_own
from tightrope.backends.own_gguf.inspection import inspect
from tightrope.backends.settings import ModelSettings

SETTINGS = ModelSettings(gguf_engine="own", max_model_len=32, max_num_seqs=1, threads=1)


def llama(**config: object) -> LlamaForCausalLM:
    torch.manual_seed(3)
    sizes = {"hidden_size": 64, "intermediate_size": 64, "num_hidden_layers": 1, "num_attention_heads": 4}
    return LlamaForCausalLM(LlamaConfig(**sizes, vocab_size=64, max_position_embeddings=64, **config))  # type: ignore[arg-type]


def write(path: Path, encode: Encode = as_float32, keys: Callable[[GGUFWriter], None] = lambda _: None) -> Path:
    return write_gguf(llama(), "llama", path, encode=encode, keys=keys)


def q8_0(name: str, values: NDArray[np.float32]) -> Encoded:
    if values.ndim != 2:
        return values, None
    return gguf.quants.quantize(values, gguf.GGMLQuantizationType.Q8_0), gguf.GGMLQuantizationType.Q8_0


def refusal(path: Path, **options: object) -> str:
    with pytest.raises(BackendError) as caught:
        open_own(path, SETTINGS.model_copy(update=options), lambda share: None)
    assert "\n" not in str(caught.value)
    return str(caught.value)


def test_a_scale_that_is_no_number_is_refused(tmp_path: Path):
    def encode(name: str, values: NDArray[np.float32]) -> Encoded:
        encoded, kind = q8_0(name, values)
        if name == "blk.0.ffn_down.weight":
            encoded[5, 34:36] = np.frombuffer(b"\x00\x7e", np.uint8)
        return encoded, kind

    assert "NaN" in refusal(write(tmp_path / "m.gguf", encode))


@pytest.mark.parametrize("name", ["blk.0.ffn_down.weight", "blk.0.attn_norm.weight", "output_norm.weight"])
def test_a_tensor_of_another_shape_is_refused_by_its_name(name: str, tmp_path: Path):
    def encode(called: str, values: NDArray[np.float32]) -> Encoded:
        return (values[:32], None) if called == name else (values, None)

    assert "shape [32" in refusal(write(tmp_path / "m.gguf", encode))


def test_a_type_of_blocks_that_is_not_known_is_refused_by_its_name(tmp_path: Path):
    def encode(name: str, values: NDArray[np.float32]) -> Encoded:
        if name != "blk.0.ffn_down.weight":
            return values, None
        return gguf.quants.quantize(np.zeros((64, 256), np.float32), gguf.GGMLQuantizationType.TQ2_0), (
            gguf.GGMLQuantizationType.TQ2_0
        )

    said = refusal(write(tmp_path / "m.gguf", encode))

    assert "'blk.0.ffn_down.weight' is TQ2_0" in said


def test_an_architecture_that_is_not_known_is_refused_by_its_name(tmp_path: Path):
    path = write_gguf(llama(), "llama", tmp_path / "m.gguf")
    path.write_bytes(path.read_bytes().replace(b"llama", b"mamba"))

    assert "architecture 'mamba' is not known; llama, qwen2" in refusal(path)


def test_layers_that_differ_are_refused(tmp_path: Path):
    def keys(writer: GGUFWriter) -> None:
        writer.add_head_count_kv([2, 4])

    assert "head_count_kv" in refusal(write(tmp_path / "m.gguf", keys=keys))


def test_heads_that_do_not_share_the_rows_of_queries_are_refused(tmp_path: Path):
    def keys(writer: GGUFWriter) -> None:
        writer.add_head_count(64)
        writer.add_head_count_kv(64)

    assert "has 64 rows, which 64 heads don't share" in refusal(write(tmp_path / "m.gguf", keys=keys))


def test_a_factor_of_a_frequency_that_is_no_number_is_refused(tmp_path: Path):
    extra = {"rope_freqs.weight": np.full(8, np.nan, np.float32)}

    assert "rope_freqs" in refusal(write_gguf(llama(), "llama", tmp_path / "m.gguf", extra=extra))


def test_a_card_is_refused(tmp_path: Path):
    with pytest.raises(BackendError, match="--gguf-engine own: it runs GGUF files on a CPU, and the device is cuda"):
        inspect(write(tmp_path / "m.gguf"), SETTINGS, "cuda")


def planned_and_served(path: Path) -> tuple[str, str]:
    """What `plan` and `serve` say about a file that the torch engine is asked to run, each in one line."""
    options = SETTINGS.model_copy(update={"model": str(path)})
    with pytest.raises(BackendError) as planned:
        outline(options, None)
    with pytest.raises(BackendError) as served:
        open_backend(options, lambda share: None)
    for line in (str(planned.value), str(served.value)):
        assert line.startswith(f"{path}: ")
        assert "\n" not in line
    return str(planned.value), str(served.value)


@pytest.mark.parametrize("name", BROKEN_TENSORS)
def test_tensors_that_llama_cpp_does_not_take_are_refused_by_plan_as_by_serve(name: str, tmp_path: Path):
    change, _ = BROKEN_TENSORS[name]

    planned, served = planned_and_served(
        write_model(ADAPTERS / "llama-untied-bf16", tmp_path / "m.gguf", change=change)
    )

    assert planned == served


@pytest.mark.parametrize("name", BROKEN_KEYS)
def test_keys_that_llama_cpp_does_not_take_are_refused_by_plan_as_by_serve(name: str, tmp_path: Path):
    keys, _ = BROKEN_KEYS[name]

    planned, served = planned_and_served(write_model(ADAPTERS / "llama-bf16", tmp_path / "m.gguf", keys=keys))

    assert planned == served


def test_a_bias_that_the_architecture_does_not_add_is_refused(tmp_path: Path):
    extra = {"blk.0.ffn_down.bias": np.ones(64, np.float32)}

    said = refusal(write_gguf(llama(), "llama", tmp_path / "m.gguf", extra=extra))

    assert said.endswith("its architecture has no 'model.layers.0.mlp.down_proj.bias'")


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write(tmp_path_factory.mktemp("whole") / "m.gguf", q8_0)


@given(data=st.data())
@settings(max_examples=60, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_a_header_with_changed_bytes_is_read_or_refused_in_one_line(data: st.DataObject, whole: Path, tmp_path: Path):
    contents = bytearray(whole.read_bytes())
    end = read_header(whole).files[0].data_start
    for _ in range(data.draw(st.integers(1, 3))):
        contents[data.draw(st.integers(4, end - 1))] = data.draw(st.integers(0, 255))
    path = tmp_path / "changed.gguf"
    path.write_bytes(contents)

    said = ""
    try:
        inspect(path, SETTINGS)
    except BackendError as error:
        said = str(error)

    assert "\n" not in said
