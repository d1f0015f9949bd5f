"""Quantized files that can't be right are refused before anything is served, in one line that names the tensor."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from checkout import TINY
from safetensors.torch import load_file, save_file
from torch import Tensor

from tightrope.backends.errors import BackendError
from tightrope.backends.files.hf_config import read_config
from tightrope.backends.files.safetensors import Checkpoint
from tightrope.backends.hf.load.blueprint import draw
from tightrope.backends.hf.load.model import build

pytestmark = pytest.mark.quick

EXL2, GPTQ, AWQ, NF4 = (
    "llama-exl2-mixed-h6",
    "llama-gptq-4bit-32g-actorder",
    "llama-awq-4bit-32g",
    "llama-untied-bnb-nf4",
)
DOWN = "model.layers.1.mlp.down_proj"
STATE = f"{DOWN}.weight.quant_state.bitsandbytes__nf4"

Tensors = dict[str, Tensor]
Change = Callable[[Tensors], None]


def without(part: str) -> Change:
    def change(tensors: Tensors) -> None:
        del tensors[f"{DOWN}.{part}"]

    return change


def value(part: str, at: int, new: float) -> Change:
    def change(tensors: Tensors) -> None:
        tensors[f"{DOWN}.{part}"].view(-1)[at] = new

    return change


def as_it(part: str, make: Callable[[Tensor], Tensor]) -> Change:
    def change(tensors: Tensors) -> None:
        tensors[f"{DOWN}.{part}"] = make(tensors[f"{DOWN}.{part}"]).contiguous()

    return change


def stated(**fields: object) -> Change:
    """The JSON beside an nf4 weight, with other fields."""

    def change(tensors: Tensors) -> None:
        state = json.loads(tensors[STATE].numpy().tobytes()) | fields
        tensors[STATE] = torch.tensor(list(json.dumps(state).encode()), dtype=torch.uint8)

    return change


def refusal(folder: Path) -> str:
    """The line with which a folder is refused."""
    with pytest.raises(BackendError) as error:
        build(draw(folder, read_config(folder), Checkpoint.open(folder)))
    line = str(error.value)
    assert str(folder) in line
    assert "\n" not in line
    return line


def copied(name: str, folder: Path) -> Path:
    """The folder's copy of a checkpoint; returns its file of tensors."""
    shutil.copytree(TINY / name, folder, dirs_exist_ok=True)
    return next(folder.glob("*.safetensors"))


INF, NAN = float("inf"), float("nan")

WRONG: list[tuple[str, Change, str]] = [
    (EXL2, value("q_invperm", 0, 7), "q_invperm' is no permutation of 0 to 351"),
    (EXL2, value("q_invperm", 0, -1), "q_invperm' is no permutation of 0 to 351"),
    (EXL2, as_it("q_invperm", lambda t: t[:-1]), "q_invperm' has shape [351]; it must be [352]"),
    (EXL2, as_it("q_invperm", lambda t: t.half()), "q_invperm' is F16; it must be I32"),
    (EXL2, as_it("q_groups", lambda t: t[:-2]), "q_groups' has shape [12]; it must be [14]"),
    (EXL2, value("q_groups", 0, 7), "q_groups' has 7 bits in group 0; 2, 3, 4, 5, 6, 8 are known"),
    (EXL2, value("q_groups", 0, 0), "q_groups' has 0 bits in group 0"),
    (EXL2, value("q_groups", 1, 4), "q_groups' has words 4 to"),
    (EXL2, value("q_groups", 3, 500), "q_groups' has words"),
    (EXL2, value("q_groups", -2, 4), "rows; the linear has 352 inputs"),
    (EXL2, as_it("q_weight", lambda t: t[:, :-32]), "q_weight' has shape [36, 96]; it must be [36, 128]"),
    (EXL2, as_it("q_weight", lambda t: t[0]), "q_weight' has shape [128]; it must have 2 dimensions"),
    (EXL2, as_it("q_weight", lambda t: t[:-2]), "q_groups"),
    (EXL2, as_it("q_scale", lambda t: t[:-1]), "q_scale' has shape [6, 16]; it must be [7, 16]"),
    (EXL2, without("q_scale"), "q_scale' is missing"),
    (EXL2, without("q_scale_max"), "q_scale_max' is missing"),
    (EXL2, without("q_weight"), "q_weight' is missing"),
    (EXL2, value("q_scale_max", 0, NAN), "q_scale_max' holds NaN"),
    (GPTQ, value("g_idx", 5, 11), "g_idx' names group 11; there are 11 groups"),
    (GPTQ, value("g_idx", 5, -3), "g_idx' names group -3; there are 11 groups"),
    (GPTQ, as_it("g_idx", lambda t: t[:-1]), "g_idx' has shape [351]; it must be [352]"),
    (GPTQ, without("scales"), "scales' is missing"),
    (GPTQ, without("qzeros"), "qzeros' is missing"),
    (GPTQ, without("qweight"), "qweight' is missing"),
    (GPTQ, value("scales", 3, INF), "scales' holds an infinite value"),
    (GPTQ, value("scales", 3, NAN), "scales' holds NaN"),
    (GPTQ, as_it("scales", lambda t: t.int()), "scales' is I32; it must be F16 or BF16 or F32"),
    (GPTQ, as_it("scales", lambda t: t[:-1]), "qzeros' has shape [11, 16]; it must be [10, 16]"),
    (GPTQ, as_it("qweight", lambda t: t[:-1]), "qweight' has shape [43, 128]; 352 inputs take 22, 33, 44, 88 rows"),
    (GPTQ, as_it("qweight", lambda t: t[:, 1:]), "qweight' has shape [44, 127]; it must be [44, 128]"),
    (GPTQ, as_it("qzeros", lambda t: t[:, 1:]), "qzeros' has shape [11, 15]; it must be [11, 16]"),
    (AWQ, without("qzeros"), "qzeros' is missing"),
    (AWQ, without("scales"), "scales' is missing"),
    (AWQ, value("scales", 0, NAN), "scales' holds NaN"),
    (AWQ, as_it("qweight", lambda t: t.t()), "qweight' has shape [16, 352]; it must be [352, 16]"),
    (AWQ, as_it("qzeros", lambda t: t[1:]), "qzeros' has shape [10, 16]; it must be [11, 16]"),
    (NF4, without("weight.absmax"), "weight.absmax' is missing"),
    (NF4, without("weight.quant_state.bitsandbytes__nf4"), "bitsandbytes__nf4' is missing"),
    (NF4, without("weight.nested_absmax"), "weight.nested_absmax' is missing"),
    (NF4, without("weight"), "weight' is missing"),
    (NF4, as_it("weight", lambda t: t[:-1]), "weight' has 22527 bytes; 128 x 352 codes take 22528"),
    (NF4, as_it("weight.absmax", lambda t: t[1:]), "weight.absmax' has shape [703]; it must be [704]"),
    (NF4, as_it("weight.quant_map", lambda t: t[1:]), "weight.quant_map' has shape [15]; it must be [16]"),
    (NF4, value("weight.nested_absmax", 0, NAN), "weight.nested_absmax' holds NaN"),
    (NF4, stated(shape=[352, 128]), "bitsandbytes__nf4' has shape [352, 128]; it must be [128, 352]"),
    (NF4, stated(shape="large"), "bitsandbytes__nf4' is no JSON object with"),
    (NF4, stated(blocksize=0), "bitsandbytes__nf4' has a blocksize or a nested_offset that can't be"),
    (NF4, value("weight.quant_state.bitsandbytes__nf4", 0, 200), "bitsandbytes__nf4' is no JSON object with"),
]


@pytest.mark.parametrize(("name", "change", "reason"), WRONG, ids=[f"{n}: {r[:40]}" for n, _, r in WRONG])
def test_tensors_that_cannot_be_right_are_named_with_the_reason(tmp_path: Path, name: str, change: Change, reason: str):
    path = copied(name, tmp_path)
    tensors = {key: tensor.clone() for key, tensor in load_file(path).items()}
    change(tensors)
    save_file(tensors, path)

    line = refusal(tmp_path)

    assert reason in line
    assert DOWN in line


def test_an_expert_with_a_bias_is_named(tmp_path: Path):
    """Zeros are what AutoGPTQ writes where there is none; anything else would be left out of the sum."""
    path = copied("mixtral-gptq-4bit-32g-actorder", tmp_path)
    tensors = {key: tensor.clone() for key, tensor in load_file(path).items()}
    expert = "model.layers.1.block_sparse_moe.experts.2.w1"
    tensors[f"{expert}.bias"] = torch.ones(tensors[f"{expert}.scales"].shape[1]).half()
    save_file(tensors, path)

    assert refusal(tmp_path).endswith(f"tensor '{expert}.bias' must be all zero: experts of this model add no bias")


@pytest.mark.parametrize(
    ("name", "settings", "reason"),
    [
        (GPTQ, {"bits": 5}, "bits 5 are not known in GPTQ; 2, 3, 4, 8 are"),
        (GPTQ, {"checkpoint_format": "marlin"}, "checkpoint_format 'marlin' is not known; gptq and gptq_v2 are"),
        (GPTQ, {"is_marlin_format": True}, "checkpoint_format 'marlin' is not known"),
        (GPTQ, {"checkpoint_format": "bitblas"}, "checkpoint_format 'bitblas' is not known"),
        (GPTQ, {"pack_dtype": "int16"}, "pack_dtype 'int16' is not known; int32 is"),
        (GPTQ, {"group_size": "many"}, "group_size 'many' must be a whole number"),
        (
            GPTQ,
            {"packing_format": "auto_round:llm_compressor"},
            "packing_format 'auto_round:llm_compressor' is not known",
        ),
        (GPTQ, {"quant_method": "awq", "version": "gemv"}, "said to be in AWQ, of version 'gemv', and no tensor is in"),
        (
            GPTQ,
            {"packing_format": "auto_round:auto_awq"},
            "said to be in AWQ, of version None, and no tensor is in the",
        ),
        (AWQ, {"packing_format": "auto_round:mlx"}, "packing_format 'auto_round:mlx' is not known; auto_round, "),
        (AWQ, {"bits": 8}, "bits 8 are not known in AWQ; 4 are"),
    ],
)
def test_settings_of_layouts_that_are_not_known_are_refused(
    tmp_path: Path, name: str, settings: dict[str, object], reason: str
):
    copied(name, tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    config["quantization_config"] |= settings
    (tmp_path / "config.json").write_text(json.dumps(config))

    line = refusal(tmp_path)

    assert reason in line
    assert "config.json" in line


@pytest.mark.parametrize(
    ("method", "tensors", "reason"),
    [
        ("hqq", {}, "quantized in format hqq, and no tensor is in one that can be read"),
        ("gptq", {}, "quantized in format gptq, and no tensor is in one that can be read"),
        ("bitsandbytes", {f"{DOWN}.SCB": torch.ones(4)}, f"'{DOWN}.SCB' is of bitsandbytes' 8 bits"),
    ],
)
def test_methods_that_are_not_known_are_named(tmp_path: Path, method: str, tensors: Tensors, reason: str):
    path = copied(AWQ, tmp_path)
    save_file({"model.norm.weight": torch.ones(4)} | tensors, path)
    config = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps(config | {"quantization_config": {"quant_method": method}}))

    assert reason in refusal(tmp_path)
