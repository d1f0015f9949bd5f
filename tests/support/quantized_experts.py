"""Small mixtures of experts as files, their linears quantized in each format, with weights to compare with.

Nothing is calibrated: rows are rounded to the grids that the formats have.
"""

import json
import shutil
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from quantizers import awq, exl2, gptq, nf4
from quantizers.reading import dequantized
from safetensors.torch import load_file, save_file
from torch import Tensor

Parts = Callable[[str, Tensor], dict[str, Tensor]]  # of a matrix's name and its weight [N, K]


def _named(name: str, parts: Mapping[str, Tensor]) -> dict[str, Tensor]:
    return {f"{name}.{part}": tensor for part, tensor in parts.items()}


def _order(num_inputs: int) -> Tensor:
    return torch.randperm(num_inputs, generator=torch.Generator().manual_seed(num_inputs))


def _exl2(name: str, weight: Tensor) -> dict[str, Tensor]:
    """Widths by the expert's number, so that neighbours differ in the bytes that they take."""
    inputs = weight.shape[1]
    widths = (5, 4) if sum(map(int, filter(str.isdigit, name.split(".")))) % 2 else (6, 3)
    groups = [(widths[0], 32), *[(widths[1], 32)] * (inputs // 32 - 1)]
    return _named(name, exl2.matrix(weight.t(), torch.eye(inputs), _order(inputs), groups))


PARTS: dict[str, tuple[Parts, dict[str, Any]]] = {
    "gptq": (lambda name, w: _named(name, gptq.matrix(w.t(), torch.eye(w.shape[1]), _order(w.shape[1]))), gptq.CONFIG),
    "awq": (lambda name, w: _named(name, awq.tensors_of(*awq.rounded(w.t()))), awq.CONFIG),
    "exl2": (_exl2, {"quant_method": "exl2"}),
    "nf4": (lambda name, w: nf4.tensors_of(f"{name}.weight", w), nf4.CONFIG),
}


def quantized(plain: Path, form: str, folder: Path) -> Path:
    """A copy of a plain folder whose linears, but for head and routers, are in a form of PARTS."""
    parts, config = PARTS[form]
    tensors: dict[str, Tensor] = {}
    for name, weight in _tensors(plain).items():
        stem = name.removesuffix(".weight")
        is_packed = weight.dim() == 2 and not stem.endswith(("embed_tokens", "lm_head", ".gate"))
        tensors |= parts(stem, weight.float()) if is_packed else {name: weight}
    return _write(plain, folder, tensors, quantization_config=config)


def expanded(folder: Path, target: Path, change: Callable[[dict[str, Tensor]], None] = lambda weights: None) -> Path:
    """A float32 folder of the weights that a quantized one stands for, perhaps changed."""
    weights = {name: t for name, t in dequantized(folder).items() if not name.endswith(".bias")}
    change(weights)
    return _write(folder, target, weights, torch_dtype="float32", dtype="float32", quantization_config=None)


def _tensors(folder: Path) -> dict[str, Tensor]:
    [path] = folder.glob("*.safetensors")
    return load_file(path)


def _write(source: Path, folder: Path, tensors: Mapping[str, Tensor], **changes: object) -> Path:
    shutil.copytree(source, folder, ignore=shutil.ignore_patterns("*.safetensors", "quantize_config.json"))
    save_file({name: t.contiguous() for name, t in tensors.items()}, folder / "model.safetensors", {"format": "pt"})
    config = json.loads((source / "config.json").read_text("utf-8")) | changes
    text = json.dumps({name: value for name, value in config.items() if value is not None})
    (folder / "config.json").write_text(text, "utf-8")
    return folder
