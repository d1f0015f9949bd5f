"""Packed tensors of real quantizers become exactly the weights that they stand for."""

import hashlib
import json
from typing import Any

import pytest
from checkout import FORMATS
from torch import Tensor

from tightrope.backends.files.safetensors import Checkpoint, Shard, read_header
from tightrope.backends.quant.awq import Awq
from tightrope.backends.quant.exl2 import Exl2
from tightrope.backends.quant.format import Format, Packed
from tightrope.backends.quant.gptq import Gptq
from tightrope.backends.quant.nf4 import Nf4
from tightrope.kernels.forms.quantized import dequantize

pytestmark = pytest.mark.quick

CASES: dict[str, list[dict[str, Any]]] = json.loads((FORMATS / "golden.json").read_text("utf-8"))


def checkpoint(name: str) -> Checkpoint:
    path = FORMATS / f"golden_{name}.safetensors"
    entries = read_header(path)
    return Checkpoint(FORMATS, {entry.name: entry for entry in entries}, (Shard(path, tuple(e.name for e in entries)),))


def weight(name: str, case: dict[str, Any], read: Format) -> Tensor:
    """[K, N] float32, or [N, K] for nf4, as the checksums are."""
    packed = Packed(checkpoint(name), case["name"])
    sizes = case["in_features"], case["out_features"]
    read.check(packed, *sizes)
    built = read.build(packed, *sizes)
    if isinstance(built, Tensor):
        return built
    found = dequantize(built)
    return found.t() if name == "nf4" else found


def is_exact(weight: Tensor, case: dict[str, Any]) -> bool:
    """Whether the bits are those expected; zero is zero, of either sign."""
    assert list(weight.shape) == case["shape"]
    return hashlib.sha256((weight + 0.0).contiguous().numpy().tobytes()).hexdigest() == case["sha256"]


@pytest.mark.parametrize("case", CASES["exl2"], ids=lambda case: case["name"])
def test_exl2_tensors_give_their_weights_to_the_bit(case: dict[str, Any]):
    assert is_exact(weight("exl2", case, Exl2()), case)


@pytest.mark.parametrize("case", CASES["gptq"], ids=lambda case: case["name"])
def test_gptq_tensors_give_their_weights_to_the_bit(case: dict[str, Any]):
    read = Gptq.of(FORMATS, {key: case[key] for key in ("checkpoint_format", "bits", "group_size", "sym")})

    assert is_exact(weight("gptq", case, read), case)


@pytest.mark.parametrize("case", CASES["awq"], ids=lambda case: case["name"])
def test_awq_tensors_give_their_weights_to_the_bit(case: dict[str, Any]):
    assert is_exact(weight("awq", case, Awq.of(FORMATS, case)), case)


@pytest.mark.parametrize("case", CASES["nf4"], ids=lambda case: case["name"])
def test_nf4_tensors_give_their_weights_to_the_bit(case: dict[str, Any]):
    assert is_exact(weight("nf4", case, Nf4()), case)


def test_symmetric_files_need_no_zero_points_in_memory():
    case = next(case for case in CASES["gptq"] if case["sym"])
    packed = Packed(checkpoint("gptq"), case["name"])

    matrix = Gptq(case["group_size"], False, True).build(packed, case["in_features"], case["out_features"])

    assert matrix.zeros is None
