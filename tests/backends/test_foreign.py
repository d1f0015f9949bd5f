"""A folder or a file that holds no model that is served is called what it is, with what would be right."""

import json
from collections.abc import Callable
from pathlib import Path

import pytest
from gguf import GGUFWriter

from tightrope.backends.detect import find_model, outline
from tightrope.backends.errors import BackendError
from tightrope.backends.files.foreign import model_files
from tightrope.backends.locate import pick_file, pick_files
from tightrope.backends.settings import ModelSettings

pytestmark = pytest.mark.quick

KINDS: list[tuple[list[str], str]] = [
    (["adapter_config.json", "adapter_model.safetensors", "tokenizer.json"], "a LoRA adapter, no model: serve the"),
    (["adapter_config.json", "adapter_model.bin", "config.json"], "a LoRA adapter, no model"),
    (["adapter_model.safetensors"], "a LoRA adapter, no model, and its adapter_config.json is missing"),
    (["params.json", "consolidated.safetensors", "tekken.json"], r"Mistral's own layout \(params.json, consolidated.s"),
    (["consolidated-00001-of-00002.safetensors", "consolidated-00002-of-00002.safetensors"], "Mistral's own layout"),
    (["params.json", "consolidated.00.pth", "tokenizer.model"], r"Meta's own layout \(params.json, consolidated.00"),
    (["m.Q6_K.gguf-split-a", "m.Q6_K.gguf-split-b"], r"cut up to be uploaded \(m.Q6_K.gguf-split-a\): join its parts"),
    (["m.gguf.part1of2", "m.gguf.part2of2"], "join its parts with cat"),
    (["m-f16-mmproj.gguf", "config.json"], r"the image half of a model alone \(m-f16-mmproj.gguf\)"),
    (["m-00002-of-00002.gguf"], r"a part of a GGUF model \(m-00002-of-00002.gguf\) without the first one"),
    (["weights.npz", "config.json"], "a model for MLX"),
    (["mlc-chat-config.json", "params_shard_0.bin"], "a model compiled for MLC-LLM"),
    (["model.onnx", "config.json"], "an ONNX model"),
    (["imatrix_unsloth.gguf", "README.md"], r"an importance matrix alone \(imatrix_unsloth.gguf\)"),
    (["openvino_model.xml", "openvino_model.bin", "config.json"], "an OpenVINO model"),
    (["rank0.engine", "config.json"], "an engine of TensorRT-LLM"),
    (["tf_model.h5", "config.json"], "TensorFlow weights"),
    (["flax_model.msgpack", "config.json"], "Flax weights"),
    (["model.bin", "shared_vocabulary.json", "config.json"], "a model converted for CTranslate2"),
    (["model_index.json"], "a pipeline of diffusers"),
    (["model.safetensors.index.json", "config.json"], r"an index without any of the .safetensors files"),
]


@pytest.mark.parametrize(("names", "reason"), KINDS, ids=[names[0] for names, _ in KINDS])
def test_a_folder_and_a_repository_of_another_kind_are_called_that(tmp_path: Path, names: list[str], reason: str):
    for name in names:
        (tmp_path / name).write_text("{}")

    with pytest.raises(BackendError, match=reason) as in_folder:
        find_model(tmp_path)
    with pytest.raises(BackendError, match=reason) as on_hub:
        pick_files(names, None, "org/name")

    assert str(in_folder.value).startswith(f"{tmp_path}: ")
    assert str(on_hub.value).startswith("org/name: ")
    assert "\n" not in f"{in_folder.value}{on_hub.value}"


def test_an_onnx_model_in_a_folder_of_its_own_is_called_that(tmp_path: Path):
    (tmp_path / "onnx").mkdir()
    for name in ("config.json", "onnx/model.onnx"):
        (tmp_path / name).touch()

    with pytest.raises(BackendError, match="an ONNX model"):
        find_model(tmp_path)
    with pytest.raises(BackendError, match="an ONNX model"):
        pick_files(["config.json", "onnx/model.onnx"], None, "org/name")


def test_an_adapter_a_consolidated_file_and_an_image_half_beside_a_model_are_left_aside(tmp_path: Path):
    names = ["config.json", "model.safetensors", "adapter_config.json", "adapter_model.safetensors", "params.json",
             "consolidated.safetensors", "consolidated.safetensors.index.json", "mmproj-f16.gguf"]  # fmt: skip
    for name in names:
        (tmp_path / name).touch()

    assert find_model(tmp_path) == tmp_path
    assert pick_files(names, None, "org/name") == ["config.json", "model.safetensors", "params.json"]


@pytest.mark.parametrize(
    "half",
    ["mmproj-f16.gguf", "m.mmproj-f16.gguf", "m-f16-mmproj.gguf", "M.MMPROJ.gguf", "m-mmproj-00001-of-00002.gguf"],
)
def test_an_image_half_is_no_model_wherever_its_name_says_so(tmp_path: Path, half: str):
    names = ["m-Q8_0.gguf", half, half.replace("00001-of", "00002-of")]
    for name in names:
        (tmp_path / name).touch()

    assert find_model(tmp_path).name == "m-Q8_0.gguf"
    assert pick_file(names, None, "org/name") == "m-Q8_0.gguf"
    assert pick_file([*names, f"q/{half.replace('f16', 'Q8_0')}"], "Q8_0", "org/name") == "m-Q8_0.gguf"


def test_statistics_of_a_quantizer_are_no_model_and_models_made_with_them_are():
    statistics = ["imatrix.gguf", "imatrix_unsloth.gguf", "m-imatrix.gguf", "m.imatrix.gguf"]
    models = ["m-imatrix-Q4_K_M.gguf", "m.Q5_K_M-imatrix.gguf", "m-Q6_K.gguf"]

    assert model_files(statistics + models) == sorted(models)


@pytest.mark.parametrize("magic", [b"lmgg", b"fmgg", b"tjgg"])
@pytest.mark.parametrize("name", ["llama-13b.ggmlv3.q4_0.bin", "model.gguf", "model"])
def test_a_file_of_llama_cpp_from_before_gguf_is_called_that(tmp_path: Path, name: str, magic: bytes):
    (tmp_path / name).write_bytes(magic + b"\x03\0\0\0" + bytes(200))

    with pytest.raises(BackendError, match=rf"{name}: a model in llama.cpp's format from before GGUF \(gg\w+\): conv"):
        find_model(tmp_path / name)


def test_a_folder_or_repository_with_one_is_called_that_too(tmp_path: Path):
    (tmp_path / "ggml-model-q4_0.bin").write_bytes(b"tjgg" + bytes(200))

    with pytest.raises(BackendError, match=r"q4_0.bin: a model in llama.cpp's format from before GGUF \(ggjt\)"):
        find_model(tmp_path)
    with pytest.raises(BackendError, match=r"org/name: a model in llama.cpp's format from before GGUF"):
        pick_files(["llama.ggmlv3.q4_0.bin", "config.json"], None, "org/name")


def write_gguf(path: Path, architecture: str, **fields: str) -> None:
    writer = GGUFWriter(path, architecture)
    for key, value in fields.items():
        writer.add_string(key.replace("_", "."), value)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.close()


@pytest.mark.parametrize(
    ("write", "reason"),
    [
        (lambda path: write_gguf(path, "clip"), r"the image half of a model \(mmproj\); name the language model's own"),
        (lambda path: write_gguf(path, "llama", general_type="adapter"), "a LoRA adapter, no model: name it with --lo"),
    ],
)
def test_a_gguf_file_that_holds_no_whole_model_is_called_what_it_is(
    tmp_path: Path, write: Callable[[Path], None], reason: str
):
    write(tmp_path / "m.gguf")

    with pytest.raises(BackendError, match=reason):
        outline(ModelSettings(model=str(tmp_path / "m.gguf")), 1 << 30)


def test_weights_that_are_missing_beside_a_config_are_asked_for(tmp_path: Path):
    (tmp_path / "config.json").write_text("{}")

    with pytest.raises(BackendError, match=r"holds no .safetensors file; download or copy the model's weights too"):
        find_model(tmp_path)


@pytest.mark.parametrize("below", ["Yi-34B", "snapshots/0123"])
def test_a_person_who_named_the_folder_above_a_model_is_told_the_one_below(tmp_path: Path, below: str):
    (tmp_path / below).mkdir(parents=True)
    (tmp_path / below / "config.json").write_text(json.dumps({}))

    with pytest.raises(BackendError, match=rf"holds neither .*; {tmp_path / below} seems to"):
        find_model(tmp_path)


def test_a_person_who_named_the_folder_above_an_adapter_is_told_so(tmp_path: Path):
    (tmp_path / "checkpoint-100").mkdir()
    (tmp_path / "checkpoint-100" / "adapter_config.json").write_text("{}")

    with pytest.raises(
        BackendError, match=rf"{tmp_path / 'checkpoint-100'} is a LoRA adapter, to be named with --lora"
    ):
        find_model(tmp_path)
