"""Packed tensors of real quantizers become exactly the weights that they stand for."""

import hashlib
import json
from typing import Any

import pytest
from checkout import FORMATS
from torch import Tensor

from tightrope.backends.files.safetensors import Checkpoint, Shard, read_header
from tightrope.backends.quant.find import find_quantization
from tightrope.backends.quant.format import Packed
from tightrope.backends.quant.gptq import Gptq
from tightrope.kernels.forms.quantized import dequantize

pytestmark = pytest.mark.quick

CASES: dict[str, list[dict[str, Any]]] = json.loads((FORMATS / "golden.json").read_text("utf-8"))


def checkpoint(name: str) -> Checkpoint:
    path = FORMATS / f"golden_{name}.safetensors"
    entries = read_header(path)
    return Checkpoint(FORMATS, {entry.name: entry for entry in entries}, (Shard(path, tuple(e.name for e in entries)),))


def is_exact(weight: Tensor, case: dict[str, Any]) -> bool:
    """Whether the bits are those expected; zero is zero, of either sign."""
    assert list(weight.shape) == case["shape"]
    return hashlib.sha256((weight + 0.0).contiguous().numpy().tobytes()).hexdigest() == case["sha256"]


@pytest.mark.parametrize(
    ("name", "case"),
    [pytest.param(name, case, id=f"{name}-{case['name']}") for name, cases in CASES.items() for case in cases],
)
def test_packed_tensors_give_their_weights_to_the_bit(name: str, case: dict[str, Any]):
    found = find_quantization(FORMATS, {"quantization_config": case}, checkpoint(name))
    assert found is not None
    packed, sizes = found.packed(case["name"]), (case["in_features"], case["out_features"])

    found.format.check(packed, *sizes)
    built = found.format.build(packed, *sizes)

    weight = built if isinstance(built, Tensor) else dequantize(built).t()  # [N, K]
    assert is_exact(weight.t() if case["shape"] == [*sizes] else weight, case)


def test_symmetric_files_need_no_zero_points_in_memory():
    case = next(case for case in CASES["gptq"] if case["sym"])
    packed = Packed(checkpoint("gptq"), case["name"])

    matrix = Gptq(case["group_size"], False, True).build(packed, case["in_features"], case["out_features"])

    assert matrix.zeros is None
