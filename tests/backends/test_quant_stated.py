"""What settings state of packed tensors is read as meant, and refused by name where it isn't known."""

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from checkout import TINY
from safetensors.torch import load_file, save_file

from tightrope.backends.errors import BackendError
from tightrope.backends.files.hf_config import read_config
from tightrope.backends.files.safetensors import Checkpoint
from tightrope.backends.hf.load.blueprint import draw
from tightrope.backends.hf.load.model import build
from tightrope.backends.quant.awq import Awq
from tightrope.backends.quant.find import find_quantization
from tightrope.backends.quant.format import Packed
from tightrope.backends.quant.gptq import Gptq
from tightrope.backends.quant.stated import PACKINGS
from tightrope.kernels.forms.quantized import dequantize

pytestmark = pytest.mark.quick

FILE = Path("config.json")
AUTO_ROUND = {"quant_method": "auto-round", "bits": 4, "group_size": 32, "sym": False}
LINEAR = "model.layers.0.mlp.down_proj"


@pytest.mark.parametrize("method", ["auto-round", "intel/auto-round", "auto_round", "AutoRound"])
@pytest.mark.parametrize(
    ("stated", "is_v2"),
    [
        ({"packing_format": "auto_round"}, True),
        ({"packing_format": "auto_round:gptqmodel"}, True),
        ({"packing_format": "auto_round:auto_gptq"}, False),
        ({"packing_format": "auto_round:gptq"}, False),
        ({"packing_format": "auto"}, False),
        ({"packing_format": None}, False),
        ({}, False),
        ({"backend": "auto"}, False),
        ({"backend": "auto_round:exllamav2"}, True),
        ({"backend": "autoround:exllamav2"}, True),
        ({"backend": "auto_round:gptq:exllamav2"}, False),
        ({"backend": "gptq:cuda"}, False),
        ({"backend": "marlin", "packing_format": "auto_round"}, True),  # what it was run with, beside its packing
    ],
)
def test_autoround_packings_tell_how_zero_points_are_stored(method: str, stated: dict[str, Any], is_v2: bool):
    assert Gptq.of(FILE, AUTO_ROUND | {"quant_method": method} | stated).is_v2 is is_v2


@pytest.mark.parametrize("method", ["gptq", "GPTQ", "gptq_marlin", None])
def test_files_of_other_tools_are_not_asked_for_a_backend(method: str | None):
    assert not Gptq.of(FILE, {"quant_method": method, "backend": "auto_round:exllamav2"}).is_v2


@pytest.mark.parametrize(
    ("settings", "bits_and_group"),
    [
        ({"bits": None, "group_size": 32.0}, 32),
        ({"bits": "4", "group_size": "128"}, 128),
        ({"bits": 4.0, "group_size": None}, -1),
        ({"group_size": "-1", "pack_dtype": None, "checkpoint_format": None}, -1),
    ],
)
def test_numbers_of_settings_are_read_as_meant(settings: dict[str, Any], bits_and_group: int):
    assert Gptq.of(FILE, settings).group_size == bits_and_group


@pytest.mark.parametrize("value", [True, 0.5, [128], "128g", "", float("nan")])
def test_what_is_no_whole_number_is_refused(value: object):
    with pytest.raises(BackendError, match=r"^config.json: group_size .* must be a whole number$"):
        Gptq.of(FILE, {"group_size": value})


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        (
            {"packing_format": "auto_round:fp8"},
            f"packing_format 'auto_round:fp8' is not known; {', '.join(PACKINGS)} are",
        ),
        ({"packing_format": 3}, "packing_format 3 is not known"),
        ({"packing_format": "auto_round:gptq:marlin"}, "packing_format 'auto_round:gptq:marlin' is not known"),
        ({"backend": "auto_round:marlin"}, "backend 'auto_round:marlin' is not known"),
        (
            {"packing_format": "auto_round", "checkpoint_format": "gptq"},
            "packing_format 'auto_round' and checkpoint_format 'gptq' contradict each other",
        ),
        ({"quant_method": "exl3"}, "quant_method 'exl3' is not known here; gptq, awq, auto-round are"),
        ({"quant_method": 3}, "quant_method 3 is not known here"),
        ({"data_type": "mx_fp"}, "data_type 'mx_fp' is not known; int, int_sym"),
        ({"data_type": "int_asym_float_zp"}, "data_type 'int_asym_float_zp' is not known"),
        ({"act_bits": 8}, "act_bits are 8: quantized activations are not served"),
        ({"rotation_config": {"block_size": 32}}, "rotation_config is set, which is not known; it must be null"),
        ({"super_bits": 6}, "super_bits is set"),
        ({"extra_config": {LINEAR: {"act_bits": 8}}}, f"extra_config.{LINEAR}.act_bits are 8"),
        ({"extra_config": {LINEAR: {"data_type": "fp8"}}}, f"extra_config.{LINEAR}.data_type 'fp8' is not known"),
        ({"extra_config": {LINEAR: {"clip": 3}}}, f"extra_config.{LINEAR}.clip is not known; bits, group_size"),
        ({"extra_config": {LINEAR: {"group_size": "many"}}}, "group_size 'many' must be a whole number"),
        ({"extra_config": [LINEAR]}, f"extra_config is ['{LINEAR}']; it must be an object"),
        ({"extra_config": {LINEAR: 4}}, f"extra_config.{LINEAR} is 4; it must be an object"),
        ({"dynamic": {"+:.*down": {"pack_dtype": "int8"}}}, "dynamic.+:.*down.pack_dtype 'int8' can't be read"),
        ({"dynamic": {"+:.*down": {"adapter": {"rank": 8}}}}, "dynamic.+:.*down.adapter {'rank': 8} can't be read"),
    ],
)
def test_settings_that_change_what_integers_mean_are_refused_by_name(settings: dict[str, Any], message: str):
    with pytest.raises(BackendError) as caught:
        Gptq.of(FILE, AUTO_ROUND | settings)

    assert str(caught.value).startswith(f"config.json: {message}")
    assert "\n" not in str(caught.value)


def test_linears_left_as_they_were_may_have_any_type():
    settings = AUTO_ROUND | {"extra_config": {"lm_head": {"bits": 16, "data_type": "float", "act_bits": 16}}}

    assert Gptq.of(FILE, settings | {"data_type": "opt_rtn_int_asym", "act_bits": 16}).group_size == 32


def packed(folder: Path, inputs: int, size: int) -> tuple[Packed, torch.Tensor]:
    """A linear of 4 bits and 32 outputs without g_idx, symmetric, and the weight [K, N] that it stands for."""
    groups = -(-inputs // size)
    generator = torch.Generator().manual_seed(inputs + size)
    codes = torch.randint(16, (inputs, 32), generator=generator)
    scales = torch.rand(groups, 32, generator=generator).half() + 0.5
    words = torch.zeros(inputs // 8, 32, dtype=torch.int64)
    for nibble in range(8):
        words |= codes[nibble::8] << (4 * nibble)
    tensors = {"qweight": words.to(torch.int32), "scales": scales, "qzeros": torch.zeros(groups, 4, dtype=torch.int32)}
    tensors["qzeros"].fill_(0x77777777)  # less one
    save_file({f"{LINEAR}.{part}": tensor for part, tensor in tensors.items()}, folder / "model.safetensors")
    weight = (codes - 8) * scales.float()[torch.arange(inputs) // size]
    return Packed(Checkpoint.open(folder), LINEAR), weight


@pytest.mark.parametrize("field", ["extra_config", "dynamic"])
@pytest.mark.parametrize(("inputs", "size"), [(96, 96), (96, 32), (96, 64), (96, 48), (160, 64), (128, 128)])
def test_the_group_size_of_a_single_linear_is_honoured(tmp_path: Path, field: str, inputs: int, size: int):
    linear, weight = packed(tmp_path, inputs, size)
    stated = size if size < inputs else -1

    read = Gptq.of(FILE, {"group_size": 64, field: {LINEAR: {"group_size": stated}, "lm_head": {"group_size": 32}}})

    assert torch.equal(dequantize(read.build(linear, inputs, 32)), weight)


def test_the_group_size_of_a_pattern_is_told_by_the_number_of_groups(tmp_path: Path):
    linear, weight = packed(tmp_path, 160, 64)

    read = Gptq.of(FILE, {"group_size": 32, "dynamic": {r"+:.*\.down_proj": {"group_size": 64, "bits": 8}}})

    assert torch.equal(dequantize(read.build(linear, 160, 32)), weight)


def test_a_pattern_that_leaves_the_group_size_open_is_refused(tmp_path: Path):
    linear, _ = packed(tmp_path, 96, 64)

    with pytest.raises(BackendError, match=r"scales' has 2 groups, which group_size 48 and 64 of the settings make"):
        Gptq.of(FILE, {"group_size": 64, "dynamic": {"+:.*": {"group_size": 48}}}).build(linear, 96, 32)


def test_one_asymmetric_linear_is_planned_for():
    symmetric = {"sym": True, "extra_config": {"lm_head": {"bits": 8}}}

    assert Gptq.of(FILE, symmetric).is_symmetric
    assert not Gptq.of(FILE, symmetric | {"extra_config": {LINEAR: {"sym": False}}}).is_symmetric


def copied(name: str, folder: Path, **settings: object) -> Path:
    """A checkpoint whose quantization_config has these fields, too; None leaves one out."""
    shutil.copytree(TINY / name, folder, dirs_exist_ok=True)
    config = json.loads((folder / "config.json").read_text("utf-8"))
    config["quantization_config"] |= settings
    (folder / "config.json").write_text(json.dumps(config), "utf-8")
    return folder


@pytest.mark.parametrize("version", ["GEMV", "exllama", "gemv_fast", None, 2])
def test_awq_over_tensors_of_the_gemm_layout_loads_whatever_its_version_says(tmp_path: Path, version: object):
    folder = copied("llama-awq-4bit-32g", tmp_path, version=version, bits=None, group_size="32")

    model = build(draw(folder, read_config(folder), Checkpoint.open(folder)))

    assert model.vocab_size == 512


@pytest.mark.parametrize("settings", [{"bits": 4.0}, {"bits": "4"}, {"w_bit": 4}, {"bits": None, "w_bit": None}])
def test_bits_of_awq_are_read_as_meant(settings: dict[str, Any]):
    assert Awq.of(FILE, settings).name == "AWQ"


def test_autorounds_own_settings_file_is_read_where_config_json_has_none(tmp_path: Path):
    name = "llama-autoround-gptqmodel-4bit-asym"
    shutil.copytree(TINY / name, tmp_path, dirs_exist_ok=True)
    config = json.loads((tmp_path / "config.json").read_text("utf-8"))
    (tmp_path / "quantization_config.json").write_text(json.dumps(config.pop("quantization_config")), "utf-8")

    found = find_quantization(tmp_path, config, Checkpoint.open(tmp_path))

    assert found is not None
    assert isinstance(found.format, Gptq)
    assert found.format.is_v2


def test_the_data_would_tell_if_zero_points_were_read_as_stored_less_one():
    """Guards the expected logits of these checkpoints: no zero point of theirs may be all the same."""
    for name in ("llama-autoround-4bit-asym-mixed", "llama-autoround-gptqmodel-4bit-asym", "llama-autoround-3bit-asym"):
        zeros = load_file(TINY / name / "model.safetensors")["model.layers.0.self_attn.q_proj.qzeros"]
        assert len(zeros.unique()) > 4
