"""adapter_config.json: which of its fields change what an adapter's tensors mean.

A field is honoured, or says nothing about the arithmetic, or is refused by name; so is one that isn't known, unless it
is null, false or empty, as peft writes what is off. Source: LoraConfig of huggingface/peft, 0.2 to 0.21.
"""

import math
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tightrope.backends.errors import BackendError
from tightrope.backends.files.json import read_object

CONFIG = "adapter_config.json"
MAX_CONFIG = 1_000_000  # It is in bytes.
MAX_NUMBER = 65536  # Rank and alpha are at most so large.
MAX_PATTERN = 500  # So many characters are served.
MAX_TOKEN = 1 << 24  # No vocabulary has so many.

_REPEATED_GROUP = re.compile(r"\)\s*[*+{]")  # It may take exponential time.
DEFAULT_RANK = DEFAULT_ALPHA = 8  # peft has these where a file doesn't say.

_HONOURED = frozenset(
    {
        *("peft_type", "r", "lora_alpha", "rank_pattern", "alpha_pattern", "use_rslora", "init_lora_weights"),
        *("bias", "modules_to_save", "trainable_token_indices", "ensure_weight_tying"),
    }
)
_HARMLESS = frozenset(
    {
        # These are about training, velora_config about its gradients alone.
        *("lora_dropout", "lorap_emb_lr", "lorap_lr_ratio", "velora_config", "corda_config", "eva_config"),
        *("loftq_config", "lora_ga_config", "lora_dtype", "inference_mode", "runtime_config"),
        # These say where the adapter comes from, and what for.
        *("base_model_name_or_path", "revision", "peft_version", "task_type", "auto_mapping", "merge_weights"),
        # The tensors tell which modules were chosen.
        *("target_modules", "exclude_modules", "layers_pattern", "layers_to_transform"),
        # Transposed weights are none of ours; peft sets it back for linears.
        "fan_in_fan_out",
        # These are read only with a field that is refused.
        *("megatron_core", "qalora_group_size"),
    }
)

# under which B A x, scaled, isn't what peft computes
_OTHER_FORMULAS: Mapping[str, str] = {
    "alora_invocation_string": "activation by tokens (aLoRA)",
    "alora_invocation_tokens": "activation by tokens (aLoRA)",
    "arrow_config": "Arrow routing",
    "enable_lora": "parts of fused linears left out (enable_lora)",
    "kasa_config": "KaSA",
    "layer_replication": "replicated layers",
    "lora_bias": "biases in its low-rank parts",
    "megatron_config": "Megatron's parallel linears",
    "monteclora_config": "Monte Carlo sampling (MonteCLoRA)",
    "target_parameters": "parameters of fused experts (target_parameters)",
    "use_bdlora": "BD-LoRA",
    "use_dora": "DoRA",
    "use_qalora": "QALoRA",
}

# beginnings that leave the base's weights as they are; others take the adapter's first value out of them
_PLAIN_STARTS = frozenset({"gaussian", "eva", "orthogonal", "mica"})
_SHIFTED_STARTS = ("pissa", "olora", "corda", "loftq", "lora_ga")


@dataclass(frozen=True, slots=True)
class PeftConfig:
    """What adapter_config.json says of an adapter's tensors."""

    path: Path
    rank: float
    alpha: float
    rank_pattern: Mapping[str, float]
    alpha_pattern: Mapping[str, float]
    is_rank_stabilised: bool
    ties_tables: bool  # whether a change of the embedding is one of a head that is tied to it
    modules_to_save: tuple[str, ...]
    tokens: Mapping[str, tuple[int, ...]]  # ids of single trained tokens, by the end of the module's name; "": any

    def rank_of(self, module: str) -> float:
        return _by_pattern(self.rank_pattern, module, self.rank)

    def scaling_of(self, module: str) -> float:
        """alpha / rank, or alpha / sqrt(rank) where rank-stabilised (Kalajdzievski 2023, arXiv 2312.03732)."""
        rank, alpha = self.rank_of(module), _by_pattern(self.alpha_pattern, module, self.alpha)
        return alpha / (math.sqrt(rank) if self.is_rank_stabilised else rank)

    def saves(self, module: str) -> bool:
        """Whether the module's own weights stand beside those of the base, which stay as they are."""
        return any(module.endswith(name) for name in self.modules_to_save)

    def tokens_of(self, module: str) -> tuple[int, ...] | None:
        """The ids of a module's single trained tokens, in the order of their rows."""
        for name, token_ids in self.tokens.items():
            if not name or module == name or module.endswith(f".{name}"):
                return token_ids
        return None


def read_peft_config(folder: Path) -> PeftConfig:
    """Raises BackendError, naming file and field, for what is no LoRA, or one that computes something else."""
    path = folder / CONFIG
    if folder.suffix == ".gguf" and folder.is_file():
        raise BackendError(
            f"{folder}: a GGUF adapter, which fits GGUF models alone; name the folder of the PEFT adapter that it was "
            "made of"
        )
    if not path.is_file():
        raise BackendError(f"{folder}: no PEFT adapter: {CONFIG} is missing")
    config = read_object(path, MAX_CONFIG)
    kind = config.get("peft_type")
    if kind != "LORA":
        raise BackendError(f"{path}: peft_type is {str(kind)[:40]!r}; LORA can be served")
    _check_fields(path, config)
    patterns = {field: _patterns(path, field, config.get(field)) for field in ("rank_pattern", "alpha_pattern")}
    return PeftConfig(
        path,
        _number(path, "r", config.get("r", DEFAULT_RANK)),
        _number(path, "lora_alpha", config.get("lora_alpha", DEFAULT_ALPHA)),
        patterns["rank_pattern"],
        patterns["alpha_pattern"],
        _switch(path, config, "use_rslora"),
        _switch(path, config, "ensure_weight_tying"),
        _names(path, config.get("modules_to_save")),
        _tokens(path, config.get("trainable_token_indices")),
    )


def _check_fields(path: Path, config: Mapping[str, Any]) -> None:
    for field, value in config.items():
        if field in _HONOURED or field in _HARMLESS or not value:
            continue
        what = _OTHER_FORMULAS.get(field)
        if what is None:
            raise BackendError(f"{path}: {field[:60]} is {str(value)[:40]!r}, whose meaning isn't known here")
        raise BackendError(f"{path}: {field}: an adapter with {what} can't be served")
    bias = config.get("bias")
    if bias not in (None, "none"):
        raise BackendError(f"{path}: bias is {str(bias)[:40]!r}; only an adapter with none can be served")
    start = config.get("init_lora_weights")
    if start is None or isinstance(start, bool) or (isinstance(start, str) and start.lower() in _PLAIN_STARTS):
        return
    if str(start).lower().startswith(_SHIFTED_STARTS):
        raise BackendError(
            f"{path}: init_lora_weights is {str(start)[:40]!r}: the adapter was trained beside other base weights; "
            "save it by peft once more with path_initial_model_for_weight_conversion, which writes a plain one"
        )
    raise BackendError(f"{path}: init_lora_weights is {str(start)[:40]!r}, whose meaning isn't known here")


def _number(path: Path, field: str, value: object) -> float:
    if isinstance(value, bool) or not isinstance(value, int | float) or not 0 < value <= MAX_NUMBER:
        raise BackendError(f"{path}: {field} is {str(value)[:40]}; it must be a number above 0")
    return float(value)


def _switch(path: Path, config: Mapping[str, Any], field: str) -> bool:
    value = config.get(field)
    if value is not None and not isinstance(value, bool):
        raise BackendError(f"{path}: {field} is {str(value)[:40]!r}; it must be true or false")
    return value is True


def _patterns(path: Path, field: str, patterns: object) -> Mapping[str, float]:
    if patterns is None:
        return {}
    if not isinstance(patterns, dict):
        raise BackendError(f"{path}: {field} must be an object of patterns and numbers")
    for pattern in patterns:
        _check_pattern(path, field, pattern)
    return {pattern: _number(path, f"{field}[{pattern[:60]!r}]", value) for pattern, value in patterns.items()}


def _check_pattern(path: Path, field: str, pattern: str) -> None:
    if len(pattern) > MAX_PATTERN or _REPEATED_GROUP.search(pattern):
        raise BackendError(f"{path}: {field}: {pattern[:60]!r} is too long or too costly a pattern to match")
    try:
        re.compile(pattern)
    except re.error as error:
        raise BackendError(f"{path}: {field}: {pattern[:60]!r} is no pattern: {error}") from None


def _by_pattern(patterns: Mapping[str, float], module: str, default: float) -> float:
    """The value of the first pattern that matches the module's path, or its end from a dot on."""
    for pattern, value in patterns.items():
        if re.fullmatch(rf"(.*\.)?({pattern})", module):
            return value
    return default


def _names(path: Path, names: object) -> tuple[str, ...]:
    if names is None:
        return ()
    if not isinstance(names, list) or not all(isinstance(name, str) for name in names):
        raise BackendError(f"{path}: modules_to_save must be a list of names")
    return tuple(names)


def _tokens(path: Path, given: object) -> Mapping[str, tuple[int, ...]]:
    if given is None:
        return {}
    by_name: dict[str, object] = given if isinstance(given, dict) else {"": given}
    found: dict[str, tuple[int, ...]] = {}
    for name, token_ids in by_name.items():
        ids = [i for i in token_ids if type(i) is int and 0 <= i < MAX_TOKEN] if isinstance(token_ids, list) else []
        if not isinstance(token_ids, list) or len(set(ids)) < len(token_ids):
            whose = f" of {name[:60]!r}" if name else ""
            raise BackendError(f"{path}: trainable_token_indices{whose} must be a list of token ids, each once")
        found[name] = tuple(ids)
    return found
