"""Formats of weights that aren't served, told by the tensors in a checkpoint, so that a refusal can name them.

Sources: what the tools write. EXL3: exllamav3; HQQ: hqq's and transformers' own; compressed-tensors: llm-compressor;
modelopt: NVIDIA ModelOpt; MLX: mlx-lm; AQLM, QuIP#, QTIP, VPTQ, SqueezeLLM, SpQR, EETQ, Quanto, Marlin, MXFP4: the
modules of the same name, most of them in transformers' integrations.
"""

import re
from collections.abc import Mapping, Sequence
from typing import Any

from tightrope.backends.errors import BackendError
from tightrope.backends.files.safetensors import Checkpoint, TensorEntry
from tightrope.backends.quant.find import FORMATS

READ = f"{', '.join(kind.name for kind in FORMATS)} and plain weights can, and GGUF files"

# (the end of a tensor's name, one that must stand beside it or None, the format); the first that fits counts
_BY_NAME: tuple[tuple[str, str | None, str], ...] = (
    ("trellis", "SU", "QTIP"),
    ("trellis", None, "EXL3"),
    ("suh", "svh", "EXL3"),
    ("W_q", None, "HQQ"),
    ("weight_packed", "weight_global_scale", "NVFP4 (compressed-tensors)"),
    ("weight_packed", None, "compressed-tensors"),
    ("weight_scale_2", None, "NVFP4 or fp8 of ModelOpt"),
    ("biases", "scales", "MLX"),
    ("codebooks", "codes", "AQLM"),
    ("Qidxs", None, "QuIP#"),
    ("centroids.weight", "indices", "VPTQ"),
    ("lookup_table", "qweight", "SqueezeLLM"),
    ("dense_weights", "row_offsets", "SpQR"),
    ("oweight", "qweight", "OWQ"),
    ("SCB", None, "bitsandbytes' 8 bits"),
    ("weight_scales", "weight", "EETQ"),
    ("weight._data", None, "Quanto"),
    ("weight_qdata", None, "torchao"),
    ("tables2", None, "HIGGS"),
    ("B", "s", "Marlin"),
    ("weight_scale_inv", "weight", "fp8 in blocks"),
)
_UNMERGED = re.compile(r"\.lora_(embedding_)?[AB]($|\.)|\.lora_magnitude_vector($|\.)")
_BLOCKS = re.compile(r"(gate_up_proj|down_proj)_blocks$")  # These are of gpt-oss.
# They tell that a tensor `weight` beside them is no plain one but a linear's codes.
_BESIDE_CODES = tuple(part for kind in FORMATS if "weight" in kind.optional for part in kind.parts)
_BY_DTYPE: Mapping[str, str] = {
    "F8_E4M3": "fp8",
    "F8_E5M2": "fp8",
    "I8": "integers of 8 bits",
    "U8": "packed integers",
    "U32": "packed integers",
}


def check_packing(checkpoint: Checkpoint, names: Sequence[str], config: Mapping[str, Any]) -> None:
    """Raise BackendError, which names the format, if one of the tensors `names` is in one that isn't served.

    config: that of config.json, which may say what dtypes alone don't.
    """
    tensors = checkpoint.tensors
    for name in names:
        if _UNMERGED.search(name):
            raise BackendError(
                f"{tensors[name].file}: tensor {name!r} is of a LoRA adapter that was never merged into the weights: "
                "merge it, or save it by itself and name it with --lora"
            )
        if (format := _format(tensors, name)) is not None:
            raise BackendError(f"{tensors[name].file}: tensor {name!r} is of {format}, which can't be read; {READ}")
    for name in names:
        if name.endswith(".weight") and (what := _BY_DTYPE.get(tensors[name].dtype)) is not None:
            if any(name.removesuffix("weight") + part in tensors for part in _BESIDE_CODES):
                continue  # These are the codes of a format that is read, which checks them itself.
            said = _said(config)
            format = what if said is None else f"{said} ({what})"
            raise BackendError(f"{tensors[name].file}: tensor {name!r} is of {format}, which can't be read; {READ}")


def _format(tensors: Mapping[str, TensorEntry], name: str) -> str | None:
    for end, beside, format in _BY_NAME:
        if name.endswith(f".{end}"):
            module = name.removesuffix(end)
            if beside is None or module + beside in tensors:
                return format
    return "MXFP4" if _BLOCKS.search(name) else None


def _said(config: Mapping[str, Any]) -> str | None:
    """The method that config.json names; `quantization` is a field of mlx-lm alone."""
    if isinstance(config.get("quantization"), dict):
        return "MLX"
    block = config.get("quantization_config")
    method = block.get("quant_method") if isinstance(block, dict) else None
    return method if isinstance(method, str) else None
