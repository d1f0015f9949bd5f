"""Fields of adapter_config.json: each is honoured, says nothing about the arithmetic, or is refused by name."""

import dataclasses
import json
import shutil
from collections.abc import Mapping
from pathlib import Path

import pytest
import torch
from checkout import ADAPTERS
from safetensors.torch import load_file, save_file
from test_adapters import rename, with_config

from tightrope.backends.errors import BackendError
from tightrope.backends.files.peft import read_adapter

pytestmark = pytest.mark.quick

ADAPTER = ADAPTERS / "llama-lora-r4"

HARMLESS: Mapping[str, object] = {
    "auto_mapping": {"base_model_class": "LlamaForCausalLM", "unsloth_fixed": True},
    "base_model_name_or_path": "somebody/some-base",
    "corda_config": {"corda_method": "kpm"},
    "eva_config": {"rho": 2.0},
    "exclude_modules": ["lm_head"],
    "fan_in_fan_out": True,
    "inference_mode": False,
    "layers_pattern": ["layers"],
    "layers_to_transform": [0, 1],
    "loftq_config": {"loftq_bits": 4},
    "lora_dropout": 0.1,
    "lora_ga_config": {"direction": "ArB2r"},
    "megatron_core": "megatron.core",
    "peft_version": "0.21.2",
    "qalora_group_size": 16,
    "revision": "main",
    "runtime_config": {"ephemeral_gpu_offload": True},
    "target_modules": "all-linear",
    "task_type": "CAUSAL_LM",
    "velora_config": {"num_groups": 8},
    "something_new_that_is_off": False,
    "something_new_that_is_unset": None,
    "something_new_that_is_empty": [],
}
REFUSED: Mapping[str, object] = {
    "alora_invocation_tokens": [1, 2],
    "arrow_config": {"top_k": 3},
    "enable_lora": [True, False, True],
    "kasa_config": {"beta": 1e-4},
    "layer_replication": [[0, 2], [1, 2]],
    "lora_bias": True,
    "megatron_config": {"num_layers": 2},
    "monteclora_config": {"num_samples": 8},
    "target_parameters": ["mlp.experts.gate_up_proj"],
    "use_bdlora": {"nblocks": 2},
    "use_dora": True,
    "use_qalora": True,
    "bias": "lora_only",
    "something_new": 2,
}


@pytest.fixture
def adapter(tmp_path: Path) -> Path:
    return Path(shutil.copytree(ADAPTER, tmp_path / "adapter"))


@pytest.mark.parametrize("field", HARMLESS)
def test_fields_that_do_not_change_what_is_computed_are_taken(field: str, adapter: Path):
    with_config(adapter, **{field: HARMLESS[field]})

    assert read_adapter(adapter).deltas.keys() == read_adapter(ADAPTER).deltas.keys()


@pytest.mark.parametrize("field", REFUSED)
def test_fields_that_change_what_is_computed_or_are_not_known_are_refused_by_name(field: str, adapter: Path):
    with_config(adapter, **{field: REFUSED[field]})

    with pytest.raises(BackendError, match=rf"adapter_config\.json: {field}") as raised:
        read_adapter(adapter)
    assert "\n" not in str(raised.value)


@pytest.mark.parametrize("start", ["pissa", "pissa_niter_4", "olora", "OLoRA", "corda", "loftq", "lora_ga", "new", 3])
def test_beginnings_that_change_the_base_or_are_not_known_are_refused_by_name(start: object, adapter: Path):
    with_config(adapter, init_lora_weights=start)

    with pytest.raises(BackendError, match=rf"init_lora_weights is '{start}'"):
        read_adapter(adapter)


@pytest.mark.parametrize("start", [True, False, None, "gaussian", "eva", "orthogonal", "mica"])
def test_beginnings_that_leave_the_base_as_it_is_are_taken(start: object, adapter: Path):
    with_config(adapter, init_lora_weights=start)

    assert read_adapter(adapter).deltas


def test_every_field_that_peft_writes_is_known_and_taken_at_its_default(adapter: Path):
    from peft import LoraConfig  # takes seconds to import

    fields = {field.name for field in dataclasses.fields(LoraConfig)}
    written = json.loads(json.dumps(LoraConfig(r=4, lora_alpha=8).to_dict(), default=list))

    with_config(adapter, **written)

    assert fields - {"runtime_config"} <= written.keys()
    assert read_adapter(adapter).deltas


def test_null_means_what_peft_does_without_the_field(adapter: Path):
    nothing = ("rank_pattern", "alpha_pattern", "use_rslora", "bias", "modules_to_save", "ensure_weight_tying")
    with_config(adapter, trainable_token_indices=None, **dict.fromkeys(nothing))

    assert [delta.scaling for delta in read_adapter(adapter).deltas.values()] == [
        delta.scaling for delta in read_adapter(ADAPTER).deltas.values()
    ]


def test_an_adapter_for_gguf_models_is_called_that(tmp_path: Path):
    (tmp_path / "a.gguf").write_bytes(b"GGUF")

    with pytest.raises(BackendError, match=r"a\.gguf: a GGUF adapter, which fits GGUF models alone; name the folder"):
        read_adapter(tmp_path / "a.gguf")


def test_tensors_may_stand_under_the_model_s_own_names(adapter: Path):
    rename(adapter, "base_model.model.", "")

    assert read_adapter(adapter).deltas.keys() == read_adapter(ADAPTER).deltas.keys()


@pytest.mark.parametrize(
    ("nest", "tower"),
    [
        ("model.language_model.", "model.vision_tower."),
        ("model.text_model.", "model.vision_model."),
        ("language_model.model.", ""),
        ("model.", "visual."),
    ],
)
def test_the_part_of_an_adapter_that_is_of_a_tower_is_left_out_with_a_note(adapter: Path, nest: str, tower: str):
    file = adapter / "adapter_model.safetensors"
    rename(adapter, "base_model.model.model.", f"base_model.model.{nest}")
    tensors = load_file(file)
    seen = f"base_model.model.{tower or 'vision_tower.'}encoder.layers.0.self_attn.q_proj"
    extra = {f"{seen}.lora_A.weight": torch.ones(4, 8), f"{seen}.lora_B.weight": torch.ones(8, 4)}
    save_file({name: tensor.clone() for name, tensor in (tensors | extra).items()}, file)

    read = read_adapter(adapter)

    assert len(read.deltas) == len(read_adapter(ADAPTER).deltas)
    assert "2 tensors are left out" in read.notes[0]


@pytest.mark.parametrize(
    "names",
    [
        [f"base_model.model.model.layers.{i}.self_attn.rotary_emb.inv_freq" for i in (0, 1)],
        ["v_head.summary.weight", "v_head.summary.bias"],  # of trl, which trains with rewards
        ["base_model.model.model.layers.0.self_attn.k_scale", "base_model.model.model.layers.0.self_attn.v_scale"],
    ],
)
def test_what_was_saved_along_and_is_of_no_use_is_left_out_with_a_note(adapter: Path, names: list[str]):
    file = adapter / "adapter_model.safetensors"
    tensors = load_file(file)
    extra = dict.fromkeys(names, tensors[next(iter(tensors))])
    save_file({name: tensor.clone() for name, tensor in (tensors | extra).items()}, file)

    read = read_adapter(adapter)

    assert read.deltas.keys() == read_adapter(ADAPTER).deltas.keys()
    assert len(read.notes) == 1
    assert "2 tensors are left out" in read.notes[0]
