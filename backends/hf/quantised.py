"""Which quantised format a model folder is in, if any: by config.json, older settings files, or tensor names."""

from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from tightrope.backends.errors import BackendError
from tightrope.backends.hf.checkpoint import Checkpoint
from tightrope.backends.hf.jsonfile import read_object

MAX_FILE = 16 << 20  # bytes
SETTINGS_FILES = {"quantize_config.json": "gptq", "quant_config.json": "awq"}  # AutoGPTQ's and old AutoAWQ's


def refuse_quantised(folder: Path) -> None:
    """Raise BackendError, naming the format, when a folder's weights are quantised; those are not served yet."""
    path = folder / "config.json"
    method = quant_method(folder, read_object(path, MAX_FILE), Checkpoint.open(folder).tensors)
    if method is not None:
        raise BackendError(
            f"{folder}: its weights are quantised in format {method}; "
            "bfloat16, float16 and float32 weights are served, and quantised ones as GGUF files"
        )


def quant_method(folder: Path, config: Mapping[str, Any], tensor_names: Iterable[str]) -> str | None:
    """The format's name, such as gptq; None for plain weights.

    Tensor names come last, and are needed: EXL2 files written before version 0.0.16 say nothing anywhere else.
    """
    quantization = config.get("quantization_config")
    if isinstance(quantization, dict):
        return str(quantization.get("quant_method") or "bitsandbytes")  # whose older blocks have no quant_method
    for file, method in SETTINGS_FILES.items():
        if (folder / file).is_file():
            return method
    for name in tensor_names:
        if name.endswith(".q_weight"):
            return "exl2"
        if name.endswith(".qweight"):
            return "gptq or awq"
        if ".quant_state.bitsandbytes__" in name or name.endswith(".SCB"):
            return "bitsandbytes"
    return None
