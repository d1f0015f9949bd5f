"""config.json becomes the shape that transformers would build, or one line naming file and field."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors.torch import save_file

from tightrope.backends.errors import BackendError
from tightrope.backends.files.hf_config import LIMITS, MAX_CONFIG, ModelShape, read_config

pytestmark = pytest.mark.quick

LLAMA: dict[str, Any] = {
    "architectures": ["LlamaForCausalLM"],
    "model_type": "llama",
    "hidden_size": 64,
    "intermediate_size": 160,
    "num_hidden_layers": 4,
    "num_attention_heads": 8,
    "num_key_value_heads": 2,
    "vocab_size": 512,
    "max_position_embeddings": 2048,
    "rope_theta": 50000.0,
    "rope_scaling": {"type": "linear", "factor": 8.0},
    "tie_word_embeddings": False,
    "torch_dtype": "bfloat16",
}
WINDOWED = {"num_hidden_layers": 4, "sliding_window": 32}


def folder_of(folder: Path, config: object) -> Path:
    (folder / "config.json").write_text(json.dumps(config))
    return folder


def test_the_shape_is_what_the_file_says(tmp_path: Path):
    shape = read_config(folder_of(tmp_path, LLAMA))

    assert (shape.architecture, shape.model_type) == ("LlamaForCausalLM", "llama")
    assert (shape.num_layers, shape.hidden_size, shape.intermediate_size) == (4, 64, 160)
    assert (shape.num_heads, shape.num_kv_heads, shape.head_dim) == (8, 2, 8)
    assert (shape.vocab_size, shape.trained_len) == (512, 2048)
    assert shape.windows == (None,) * 4
    assert shape.layer_types == ("full_attention",) * 4
    assert (shape.dtype, shape.tie_embeddings, shape.num_experts) == ("bfloat16", False, 0)
    assert shape.raw == LLAMA


@pytest.mark.parametrize(
    ("fields", "dtype"),
    [
        ({"torch_dtype": "float16"}, "float16"),
        ({"dtype": "bfloat16", "torch_dtype": None}, "bfloat16"),
        ({"torch_dtype": "torch.float16"}, "float16"),
        ({"torch_dtype": None}, "float32"),
    ],
)
def test_the_dtype_is_read_under_its_old_and_its_new_name(tmp_path: Path, fields: dict[str, Any], dtype: str):
    assert read_config(folder_of(tmp_path, LLAMA | fields)).dtype == dtype


@pytest.mark.parametrize("stated", [{"torch_dtype": "auto"}, {"dtype": "auto"}, {"torch_dtype": None}, {"dtype": None}])
def test_a_dtype_that_is_left_open_is_that_of_the_tensors(tmp_path: Path, stated: dict[str, Any]):
    tensors = {"model.norm.weight": torch.ones(4), "lm_head.weight": torch.ones(8, 4).half(), "ids": torch.arange(999)}
    save_file(tensors, tmp_path / "model.safetensors")
    without = {name: value for name, value in LLAMA.items() if name != "torch_dtype"}

    assert read_config(folder_of(tmp_path, without | stated)).dtype == "float16"


@pytest.mark.parametrize(
    ("fields", "windows"),
    [
        ({"model_type": "mistral"} | WINDOWED, (32,) * 4),
        ({"model_type": "mistral", "sliding_window": None}, (None,) * 4),
        ({"model_type": "phi3"} | WINDOWED, (32,) * 4),
        ({"model_type": "qwen2", "use_sliding_window": False} | WINDOWED, (None,) * 4),
        ({"model_type": "qwen2", "use_sliding_window": True, "max_window_layers": 3} | WINDOWED, (None,) * 3 + (32,)),
        ({"model_type": "qwen3_moe", "use_sliding_window": False} | WINDOWED, (None,) * 4),
        ({"model_type": "gemma2"} | WINDOWED, (32, None, 32, None)),
        ({"model_type": "gemma3_text", "sliding_window_pattern": 2} | WINDOWED, (32, None, 32, None)),
        ({"model_type": "gemma3_text", "layer_types": ["full_attention"] * 3 + ["sliding_attention"]} | WINDOWED,
         (None, None, None, 32)),
        ({"model_type": "cohere2"} | WINDOWED, (32, 32, 32, None)),
        ({"model_type": "llama"} | WINDOWED, (None,) * 4),  # left over from another family, which its code ignores
        ({"model_type": "qwen2_moe", "sliding_window": 0}, (None,) * 4),
    ],
    ids=str,
)  # fmt: skip
def test_each_layers_window_is_the_familys(tmp_path: Path, fields: dict[str, Any], windows: tuple[int | None, ...]):
    shape = read_config(folder_of(tmp_path, LLAMA | fields))

    assert shape.windows == windows
    assert shape.layer_types == tuple("full_attention" if w is None else "sliding_attention" for w in windows)


def test_numbers_that_the_arithmetic_never_asks_for_may_be_anything(tmp_path: Path):
    other = {"time_step_limit": [0.0, float("inf")], "vision_config": {"scale": float("nan")}}

    shape = read_config(folder_of(tmp_path, LLAMA | other | {"initializer_range": float("nan")}))

    assert shape.hidden_size == LLAMA["hidden_size"]


def test_a_head_dimension_of_its_own_goes_before_the_share_of_the_hidden_size(tmp_path: Path):
    shape = read_config(folder_of(tmp_path, LLAMA | {"model_type": "gemma3_text", "head_dim": 32}))

    assert (shape.hidden_size, shape.num_heads, shape.head_dim) == (64, 8, 32)


def test_without_kv_heads_every_head_has_its_own(tmp_path: Path):
    config = {key: value for key, value in LLAMA.items() if key != "num_key_value_heads"}

    assert read_config(folder_of(tmp_path, config)).num_kv_heads == 8


@pytest.mark.parametrize(
    ("model_type", "field"), [("mixtral", "num_local_experts"), ("qwen3_moe", "num_experts"), ("olmoe", "num_experts")]
)
def test_experts_are_counted_under_each_familys_name(tmp_path: Path, model_type: str, field: str):
    assert read_config(folder_of(tmp_path, LLAMA | {"model_type": model_type, field: 4})).num_experts == 4


def test_fields_are_found_under_a_familys_own_names(tmp_path: Path):
    config = {"model_type": "gpt2", "n_embd": 64, "n_layer": 3, "n_head": 4, "n_positions": 128, "vocab_size": 100}

    shape = read_config(folder_of(tmp_path, config | {"bos_token_id": 1, "eos_token_id": 1}))

    assert (shape.hidden_size, shape.num_layers, shape.head_dim, shape.trained_len) == (64, 3, 16, 128)
    assert shape.intermediate_size == 256


def test_the_language_model_of_an_image_model_is_found_under_text_config(tmp_path: Path):
    text = {"model_type": "gemma3_text", "hidden_size": 2560, "num_hidden_layers": 6, "sliding_window": 1024}
    whole = {"model_type": "gemma3", "architectures": ["Gemma3ForConditionalGeneration"], "torch_dtype": "bfloat16",
             "eos_token_id": [1, 106], "text_config": text, "vision_config": {"hidden_size": 1152}}  # fmt: skip

    shape = read_config(folder_of(tmp_path, whole))

    assert (shape.architecture, shape.model_type) == ("Gemma3ForCausalLM", "gemma3_text")
    assert (shape.num_layers, shape.hidden_size, shape.head_dim, shape.dtype) == (6, 2560, 256, "bfloat16")
    assert shape.windows == (1024,) * 5 + (None,)
    assert shape.raw["hidden_size"] == 2560
    assert shape.raw["eos_token_id"] == [1, 106]


REMOVED = "(removed)"
BAD_FIELDS: list[tuple[dict[str, Any], str]] = [
    ({"hidden_size": 60}, "hidden_size is 60, not a multiple of num_attention_heads 8"),
    ({"model_type": REMOVED, "_class_name": "UNet2DConditionModel"}, "a UNet2DConditionModel of diffusers, part of"),
    ({"hidden_size": 60, "head_dim": 8}, r"The hidden size \(60\) is not a multiple of the number of attention heads"),
    ({"num_key_value_heads": 3}, "num_attention_heads is 8, not a multiple of num_key_value_heads 3"),
    ({"hidden_size": -64}, "hidden_size is -64; it must be a whole number from 1 to"),
    ({"num_hidden_layers": 0}, "num_hidden_layers is 0; it must be a whole number from 1 to 4096"),
    ({"num_hidden_layers": 10**6}, "num_hidden_layers is 1000000; it must be a whole number from 1 to 4096"),
    ({"num_attention_heads": "8"}, "num_attention_heads is '8'; it must be a whole number"),
    ({"vocab_size": 512.5}, "vocab_size is 512.5; it must be a whole number"),
    ({"vocab_size": True}, "vocab_size is True; it must be a whole number"),
    ({"intermediate_size": [160]}, r"intermediate_size is \[160\]; it must be a whole number"),
    ({"max_position_embeddings": 10**12}, "max_position_embeddings is 1000000000000; it must be a whole number"),
    ({"head_dim": 10**5}, "head_dim is 100000; it must be a whole number from 1 to 4096"),
    ({"hidden_size": float("nan")}, "hidden_size is nan; it must be a finite number"),
    ({"rms_norm_eps": float("inf")}, "rms_norm_eps is inf; it must be a finite number"),
    ({"rms_norm_eps": -1e-5}, "rms_norm_eps is -1e-05; it must be a number from 0 to 1"),
    ({"model_type": "gpt_neox", "layer_norm_eps": 1e5}, "layer_norm_eps is 100000.0; it must be a number from 0 to 1"),
    ({"rope_scaling": {"type": "linear", "factor": float("nan")}}, r"rope_scaling\.factor is nan; it must be a finite"),
    ({"rope_scaling": {"type": "longrope", "short_factor": [1.0, float("nan")]}}, r"short_factor\[1\] is nan; it m"),
    ({"torch_dtype": float("nan")}, "torch_dtype is nan; bfloat16, float16 and float32 are served"),
    ({"hidden_size": REMOVED}, "hidden_size is missing"),
    ({"num_hidden_layers": None}, "num_hidden_layers is missing"),
    ({"num_attention_heads": REMOVED}, "num_attention_heads is missing"),
    ({"vocab_size": REMOVED}, "vocab_size is missing"),
    ({"model_type": REMOVED}, "model_type is missing; it must name the model's family"),
    ({"model_type": "llama9000"}, "model_type 'llama9000' is not known to transformers"),
    ({"model_type": "own", "auto_map": {"AutoModel": "m.M"}}, r"'own' is not known .* \(auto_map\) is never run"),
    ({"model_type": "bart"}, "model_type 'bart' is no decoder-only language model"),
    ({"model_type": "vit"}, "model_type 'vit' is no decoder-only language model"),
    ({"torch_dtype": "int8"}, "torch_dtype is 'int8'; bfloat16, float16 and float32 are served"),
    ({"dtype": 16}, "dtype is 16; bfloat16, float16 and float32 are served"),
    ({"text_config": 7}, "text_config is 7; it must be an object"),
    ({"hidden_act": 7}, "hidden_act"),
    ({"model_type": "gemma2", "layer_types": ["full_attention"]}, "layer_types"),
    ({"model_type": "gemma2", "layer_types": "full_attention"}, "layer_types"),
    ({"model_type": "gemma2", "layer_types": ["linear_attention"] * 4},
     "layer_types holds 'linear_attention'; full_attention and sliding_attention are served"),
    ({"model_type": "gemma2", "sliding_window": None}, "sliding_window is missing, but layer_types has"),
    ({"model_type": "mistral", "sliding_window": -1}, "sliding_window is -1; it must be a whole number"),
    ({"model_type": "mixtral", "num_local_experts": -4}, "num_local_experts is -4; it must be a whole number"),
    ({"model_type": "deepseek_v3"}, "kv_lora_rank is set: latent attention is not served"),
]  # fmt: skip


@pytest.mark.parametrize(("fields", "line"), BAD_FIELDS, ids=lambda value: str(value)[:60])
def test_a_wrong_field_is_one_line_naming_file_and_field(tmp_path: Path, fields: dict[str, Any], line: str):
    config = {key: value for key, value in (LLAMA | fields).items() if value is not REMOVED}

    with pytest.raises(BackendError, match=rf"^{tmp_path}/config\.json: .*{line}") as caught:
        read_config(folder_of(tmp_path, config))

    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("content", "line"),
    [
        (b"", "not JSON: it is empty; copy or download it again"),
        (b"Entry not found", "not JSON: it is a text, perhaps of a failed download: b'Entry not found'"),
        (b"\n<!doctype html>", "not JSON: it is a web page"),
        (b'{"model_type": "llama",\n}', "not JSON: .* in line [12]"),
        (b'{"model_type": "\xff"}', "not JSON in UTF-8"),
        (b"[" * 100_000, "not JSON"),
        (b'{"vocab_size": ' + b"9" * 5000 + b"}", "not JSON"),
        (b'["llama"]', "holds list instead of a JSON object"),
    ],
    ids=lambda value: str(value)[:30],
)
def test_a_file_that_is_no_json_object_is_one_line(tmp_path: Path, content: bytes, line: str):
    (tmp_path / "config.json").write_bytes(content)

    with pytest.raises(BackendError, match=rf"config\.json: {line}") as caught:
        read_config(tmp_path)

    assert "\n" not in str(caught.value)


def test_a_file_that_is_far_too_large_is_not_read(tmp_path: Path):
    with (tmp_path / "config.json").open("wb") as file:
        file.truncate(MAX_CONFIG + 1)

    with pytest.raises(BackendError, match=r"config\.json: 16777217 bytes are too many"):
        read_config(tmp_path)


def test_a_missing_file_is_one_line(tmp_path: Path):
    with pytest.raises(BackendError, match=r"config\.json: no such file"):
        read_config(tmp_path)


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=8),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=8), inner, max_size=3),
    max_leaves=4,
)


@given(st.sampled_from(sorted({*LIMITS, *LLAMA, "layer_types", "hidden_act"})), JSON)
@settings(max_examples=150, suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow])
def test_whatever_a_field_holds_is_a_shape_or_one_line(tmp_path: Path, field: str, value: object):
    folder_of(tmp_path, LLAMA | {"model_type": "gemma2", field: value})

    outcome = shape_or_line(tmp_path)

    if isinstance(outcome, str):
        assert "config.json: " in outcome
        assert "\n" not in outcome
    else:
        assert len(outcome.windows) == len(outcome.layer_types) == outcome.num_layers > 0
        assert outcome.num_heads % outcome.num_kv_heads == 0


def shape_or_line(folder: Path) -> ModelShape | str:
    try:
        return read_config(folder)
    except BackendError as error:
        return str(error)
