"""PEFT adapters as files: a folder with adapter_config.json and adapter_model.safetensors, checked by their headers.

Source: the files that huggingface/peft writes. y += scaling * up(down(x)) with scaling = alpha / rank, or
alpha / sqrt(rank) where rank-stabilised (Kalajdzievski 2023, arXiv 2312.03732).
"""

import math
import re
from collections.abc import Mapping
from dataclasses import dataclass
from math import prod
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tightrope.backends.errors import BackendError
from tightrope.backends.hf.checkpoint import Checkpoint, TensorEntry
from tightrope.backends.hf.jsonfile import read_object

if TYPE_CHECKING:
    from tightrope.backends.settings import ModelSettings  # which needs pydantic; the benchmarks of a card do not

CONFIG, WEIGHTS = "adapter_config.json", "adapter_model.safetensors"
MAX_CONFIG = 1_000_000  # bytes
MAX_NUMBER = 65536  # rank and alpha
MAX_PATTERN = 500  # characters

_PREFIX = "base_model.model."
_PART = re.compile(r"(?P<module>.+)\.lora_(?P<part>A|B)(\.default)?\.weight")
_SAVED = re.compile(r"(?P<module>.*(?:lm_head|embed_tokens))(\.modules_to_save(\.default)?)?\.weight")
_REPEATED_GROUP = re.compile(r"\)\s*[*+{]")  # may take exponential time
_ORIGINAL = re.compile(r".*\.(original_module|base_layer)\.(weight|bias)")  # of the base, saved along

# settings under which the formula above isn't what peft computes, and their neutral values
_OTHER_FORMULAS: Mapping[str, str] = {
    "use_dora": "DoRA",
    "use_qalora": "QALoRA",
    "use_bdlora": "BD-LoRA",
    "lora_bias": "biases in its low-rank parts",
    "fan_in_fan_out": "weights transposed (fan_in_fan_out)",
    "layer_replication": "replicated layers",
    "trainable_token_indices": "single trained tokens",
    "target_parameters": "parameters of fused experts (target_parameters)",
    "alora_invocation_tokens": "activation by tokens (aLoRA)",
    "arrow_config": "Arrow routing",
}


@dataclass(frozen=True, slots=True)
class Delta:
    """What is added to one linear: tensors A [rank, inputs] and B [outputs, rank], by their names, and the scaling."""

    down: TensorEntry
    up: TensorEntry
    scaling: float


@dataclass(frozen=True, slots=True)
class PeftAdapter:
    """An adapter whose headers are checked. Keys are paths of modules in the base model."""

    folder: Path
    checkpoint: Checkpoint
    deltas: Mapping[str, Delta]
    saved: Mapping[str, TensorEntry]  # whole weights of the head or the embedding


def read_adapter(folder: Path) -> PeftAdapter:
    """Raises BackendError, naming file and field, for what is no LoRA, or one that computes something else."""
    config = _read_config(folder)
    path = folder / WEIGHTS
    if not path.is_file():
        pickle = folder / "adapter_model.bin"
        if pickle.exists():
            raise BackendError(
                f"{pickle}: pickled weights can run code when they are read, so they are not; "
                "convert the adapter to safetensors"
            )
        raise BackendError(f"{folder}: {WEIGHTS} is missing")
    checkpoint = Checkpoint.of_file(path)
    halves: dict[str, dict[str, TensorEntry]] = {}
    saved: dict[str, TensorEntry] = {}
    for name, entry in checkpoint.tensors.items():
        if not name.startswith(_PREFIX):
            raise BackendError(f"{path}: tensor {name!r} is not of a PEFT adapter, whose names begin with {_PREFIX}")
        inner = name.removeprefix(_PREFIX)
        if match := _PART.fullmatch(inner):
            halves.setdefault(match["module"], {})[match["part"]] = entry
        elif match := _SAVED.fullmatch(inner):
            saved[match["module"]] = entry
        elif not _ORIGINAL.fullmatch(inner):
            raise BackendError(f"{path}: tensor {name!r} can't be used; lora_A and lora_B of linears, and whole "
                               "lm_head and embed_tokens, can")  # fmt: skip
    deltas = {module: _delta(path, module, parts, config) for module, parts in halves.items()}
    if not deltas and not saved:
        raise BackendError(f"{path}: holds no adapter")
    return PeftAdapter(folder, checkpoint, deltas, saved)


def adapter_bytes(adapter: PeftAdapter) -> int:
    """What an adapter takes in memory: two bytes a number of low rank, whole weights as they are in the file."""
    low_rank = sum(prod(entry.shape) for delta in adapter.deltas.values() for entry in (delta.down, delta.up))
    return 2 * low_rank + sum(entry.num_bytes for entry in adapter.saved.values())


def room_for_adapters(settings: "ModelSettings") -> int:
    """Bytes of the adapters that are loaded at the start, and of the room for more. Raises BackendError."""
    at_start = sum(adapter_bytes(read_adapter(Path(path).expanduser())) for path in settings.adapters.values())
    return at_start + settings.adapter_reserve_bytes


def _read_config(folder: Path) -> Mapping[str, Any]:
    path = folder / CONFIG
    if not path.is_file():
        raise BackendError(f"{folder}: no PEFT adapter: {CONFIG} is missing")
    config = read_object(path, MAX_CONFIG)
    kind = config.get("peft_type")
    if kind != "LORA":
        raise BackendError(f"{path}: peft_type is {str(kind)[:40]!r}; LORA can be served")
    for field, what in _OTHER_FORMULAS.items():
        if config.get(field):
            raise BackendError(f"{path}: {field}: an adapter with {what} can't be served")
    if config.get("bias", "none") != "none":
        raise BackendError(f"{path}: bias is {str(config['bias'])[:40]!r}; only an adapter with none can be served")
    _check_number(path, "r", config.get("r"))
    _check_number(path, "lora_alpha", config.get("lora_alpha"))
    for field in ("rank_pattern", "alpha_pattern"):
        patterns = config.get(field) or {}
        if not isinstance(patterns, dict):
            raise BackendError(f"{path}: {field} must be an object of patterns and numbers")
        for pattern, value in patterns.items():
            _check_number(path, f"{field}[{pattern[:60]!r}]", value)
            _check_pattern(path, field, pattern)
    return config


def _check_number(path: Path, field: str, value: object) -> None:
    if isinstance(value, bool) or not isinstance(value, int | float) or not 0 < value <= MAX_NUMBER:
        raise BackendError(f"{path}: {field} is {str(value)[:40]}; it must be a number above 0")


def _check_pattern(path: Path, field: str, pattern: str) -> None:
    if len(pattern) > MAX_PATTERN or _REPEATED_GROUP.search(pattern):
        raise BackendError(f"{path}: {field}: {pattern[:60]!r} is too long or too costly a pattern to match")
    try:
        re.compile(pattern)
    except re.error as error:
        raise BackendError(f"{path}: {field}: {pattern[:60]!r} is no pattern: {error}") from None


def _delta(path: Path, module: str, parts: Mapping[str, TensorEntry], config: Mapping[str, Any]) -> Delta:
    if parts.keys() != {"A", "B"}:
        there, missing = ("A", "B") if "A" in parts else ("B", "A")
        raise BackendError(f"{path}: {module!r} has lora_{there} but no lora_{missing}")
    down, up = parts["A"], parts["B"]
    rank = _by_pattern(config, "rank_pattern", module, config["r"])
    if len(down.shape) != 2 or len(up.shape) != 2 or down.shape[0] != rank or up.shape[1] != rank:
        raise BackendError(
            f"{path}: lora_A {list(down.shape)} and lora_B {list(up.shape)} of {module!r} don't fit rank {rank}, "
            f"which {CONFIG} gives"
        )
    alpha = _by_pattern(config, "alpha_pattern", module, config["lora_alpha"])
    return Delta(down, up, alpha / (math.sqrt(rank) if config.get("use_rslora") else rank))


def _by_pattern(config: Mapping[str, Any], field: str, module: str, default: float) -> float:
    """The value of the first pattern that matches the module's path, or its end from a dot on."""
    for pattern, value in (config.get(field) or {}).items():
        if re.fullmatch(rf"(.*\.)?({pattern})", module):
            return float(value)
    return float(default)
