"""What a Hugging Face folder's config.json says about its model, checked before anything is loaded."""

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType
from typing import TYPE_CHECKING, Any, Literal, cast

from tightrope.backends.errors import BackendError
from tightrope.backends.files.config_fields import as_meant, computing
from tightrope.backends.files.json import check_finite, read_object
from tightrope.backends.files.lengths import other_lengths
from tightrope.backends.files.safetensors import Checkpoint

if TYPE_CHECKING:
    from transformers import PretrainedConfig

MAX_EXPERTS, MAX_EXPERT_SIZE = 1 << 14, 1 << 22
MAX_CONFIG = 16 << 20  # In bytes. Label lists make the largest real ones, of about 1 MB.

WeightDtype = Literal["bfloat16", "float16", "float32"]
# safetensors calls them so.
STORED: Mapping[str, WeightDtype] = {"F32": "float32", "F16": "float16", "BF16": "bfloat16"}

# Largest believable value of each size: anything above is a damaged file, found before memory is asked for.
LIMITS: Mapping[str, int] = {
    "num_hidden_layers": 1 << 12,
    "hidden_size": 1 << 20,
    "intermediate_size": 1 << 22,
    "num_attention_heads": 1 << 14,
    "num_key_value_heads": 1 << 14,
    "head_dim": 1 << 12,
    "vocab_size": 1 << 24,
    "max_position_embeddings": 1 << 28,
    "sliding_window": 1 << 28,
}
# Defaults of a transformers class are those of its first model, so these are never filled in.
REQUIRED = ("num_hidden_layers", "hidden_size", "num_attention_heads", "vocab_size")
REQUIRED_NESTED = ("num_hidden_layers", "hidden_size")  # Gemma 3's vision models leave the rest to the class.
# Model types from before a family had a class in transformers: the one that computes the same, and the defaults in
# which the two differ. Source for Yi: configuration_yi.py of the first uploads, whose norms are called ln1 and ln2.
ALIASES: Mapping[str, tuple[str, Mapping[str, object]]] = {
    "yi": (
        "llama",
        {"num_key_value_heads": 4, "max_position_embeddings": 4096, "rms_norm_eps": 1e-5, "rope_theta": 5_000_000.0},
    ),
}
ENDS = "eos_token_id"
LAYER_TYPES = ("full_attention", "sliding_attention")


@dataclass(frozen=True, slots=True)
class ModelShape:
    """The sizes of a decoder-only language model, as transformers' own config class resolves them."""

    architecture: str  # It is a class name, such as "LlamaForCausalLM".
    model_type: str  # It is that of the language model: "gemma3_text" also where config.json has it under text_config.
    num_layers: int
    hidden_size: int
    intermediate_size: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    vocab_size: int  # It is the width of the logits; the tokenizer may know fewer ids.
    trained_len: int  # These are the tokens of max_position_embeddings.
    windows: tuple[int | None, ...]  # Each layer's attention sees so many tokens, None for all.
    layer_types: tuple[str, ...]  # They are "full_attention" or "sliding_attention".
    dtype: WeightDtype  # Where config.json doesn't say it, it is that of the tensors, as transformers reads it.
    tie_embeddings: bool
    num_experts: int  # They are the routed experts of a layer, 0 for a dense model.
    experts_per_token: int
    expert_size: int  # It is the width between an expert's two products.
    # all of config.json, with the fields of text_config, if it has one, raised to the top; ends of both are joined
    raw: Mapping[str, Any]
    other_lengths: Mapping[str, float]  # Other fields and files give these tokens, by the fields' names.


def read_config(folder: Path) -> ModelShape:
    """Read and check config.json.

    Raises BackendError, naming the file, the field, and what would be right, when the file is missing or malformed,
    when transformers knows no causal language model of that type, or when a size is missing or can't be.
    """
    path = folder / "config.json"
    return shape_of(path, read_object(path, MAX_CONFIG, finite=False), folder)


def shape_of(path: Path, whole: Mapping[str, Any], folder: Path | None = None) -> ModelShape:
    """The same of the fields of config.json, which stand in `path`. folder: whose other files tell more lengths."""
    raw = _raise_text(path, whole)
    model_type = raw.get("model_type")
    if model_type is None and isinstance(part := raw.get("_class_name"), str):
        raise BackendError(f"{path}: a {part:.40} of diffusers, part of what makes images; language models are served")
    if not isinstance(model_type, str):
        raise BackendError(f"{path}: model_type is missing; it must name the model's family, such as llama")
    if model_type.lower() in ALIASES:
        model_type, defaults = ALIASES[model_type.lower()]
        raw = {**defaults, **raw, "model_type": model_type}
    config_class = _config_class(path, model_type, raw)
    declared = _annotations(config_class)
    used = {field: value for field, value in computing(raw).items() if field in declared or field.startswith("rope_")}
    check_finite(path, used)
    reader = _Reader(path, as_meant(raw, declared), config_class, folder)
    return reader.shape(model_type, is_nested="text_config" in whole)


def _raise_text(path: Path, whole: Mapping[str, Any]) -> dict[str, Any]:
    text = whole.get("text_config", {})
    if not isinstance(text, dict):
        raise BackendError(f"{path}: text_config is {text!r:.80}; it must be an object")
    raised = {key: value for key, value in whole.items() if key != "text_config"} | text
    ends = [end for part in (whole, text) if (value := part.get(ENDS)) is not None for end in _as_list(value)]
    if ENDS in whole and ENDS in text:  # Either place may have the end of a turn alone, or that of a text.
        raised[ENDS] = ends[0] if ends and all(end == ends[0] for end in ends) else ends
    return raised


def _as_list(value: object) -> list[object]:
    return value if isinstance(value, list) else [value]


def _config_class(path: Path, model_type: str, raw: Mapping[str, Any]) -> type["PretrainedConfig"]:
    # importing transformers takes seconds: only once the file is known to be JSON with a model type
    from transformers import CONFIG_MAPPING, MODEL_FOR_CAUSAL_LM_MAPPING, __version__

    if model_type not in CONFIG_MAPPING:
        own_code = "; the folder's own code (auto_map) is never run" if "auto_map" in raw else ""
        raise BackendError(f"{path}: model_type {model_type!r} is not known to transformers {__version__}{own_code}")
    config_class = CONFIG_MAPPING[model_type]
    if config_class not in MODEL_FOR_CAUSAL_LM_MAPPING or config_class.is_encoder_decoder:
        raise BackendError(
            f"{path}: model_type {model_type!r} is no decoder-only language model; only those are served"
        )
    return config_class


class _Reader:
    """Checks the fields of one config.json as the file names them, and once more as transformers resolves them."""

    def __init__(
        self, path: Path, raw: Mapping[str, Any], config_class: type["PretrainedConfig"], folder: Path | None
    ) -> None:
        self._path, self._folder = path, folder
        self._raw = raw
        self._class = config_class

    def shape(self, model_type: str, *, is_nested: bool) -> ModelShape:
        given = {field: value for field in LIMITS if (value := self._given(field)) is not None}
        for field in REQUIRED_NESTED if is_nested else REQUIRED:
            if field not in given:
                raise self._wrong(field, "is missing; it must be a whole number above 0")
        self._check_sizes(given)
        self._check_epsilons()
        config = self._resolve()
        sizes = given | {field: value for field in LIMITS if (value := self._resolved(config, field)) is not None}
        for field in (*REQUIRED, "max_position_embeddings"):
            if field not in sizes:
                raise self._wrong(field, f"is missing, and {model_type} models have no usual value")
        sizes.setdefault("intermediate_size", 4 * sizes["hidden_size"])
        sizes.setdefault("num_key_value_heads", sizes["num_attention_heads"])
        self._check_sizes(sizes)
        sizes.setdefault("head_dim", sizes["hidden_size"] // sizes["num_attention_heads"])
        if self._resolved(config, "kv_lora_rank"):
            raise self._wrong("kv_lora_rank", "is set: latent attention is not served")
        layer_types, windows = self._layers(config, sizes["num_hidden_layers"])
        return ModelShape(
            architecture=self._architecture(config),
            model_type=model_type,
            num_layers=sizes["num_hidden_layers"],
            hidden_size=sizes["hidden_size"],
            intermediate_size=sizes["intermediate_size"],
            num_heads=sizes["num_attention_heads"],
            num_kv_heads=sizes["num_key_value_heads"],
            head_dim=sizes["head_dim"],
            vocab_size=sizes["vocab_size"],
            trained_len=sizes["max_position_embeddings"],
            windows=windows,
            layer_types=layer_types,
            dtype=self._dtype(),
            tie_embeddings=self._resolved(config, "tie_word_embeddings") is True,
            num_experts=self._count(config, ("num_local_experts", "num_experts", "n_routed_experts"), 0),
            experts_per_token=self._count(config, ("num_experts_per_tok", "moe_topk", "top_k_experts"), 1),
            expert_size=self._count(config, ("moe_intermediate_size",), sizes["intermediate_size"], MAX_EXPERT_SIZE),
            raw=MappingProxyType(dict(self._raw)),
            other_lengths=MappingProxyType({} if self._folder is None else other_lengths(self._folder, self._raw)),
        )

    def _name(self, field: str) -> str:
        """The name that the file uses for a field: gpt2's hidden_size is n_embd."""
        own = self._class.attribute_map.get(field, field)
        return own if own in self._raw or field not in self._raw else field

    def _given(self, field: str) -> Any:  # noqa: ANN401 - whatever JSON holds
        return self._raw.get(self._name(field))

    def _resolved(self, config: "PretrainedConfig", field: str) -> Any:  # noqa: ANN401 - whatever the class holds
        """A field's value if the config class declares it, else None: a leftover of another family means nothing."""
        own = self._class.attribute_map.get(field, field)
        return vars(config).get(own) if {field, own} & _annotations(self._class).keys() else None

    def _check_sizes(self, sizes: dict[str, Any]) -> None:
        """Each size is a whole number in its limits, and heads divide what they share."""
        for field, value in list(sizes.items()):
            if field == "sliding_window" and value == 0:  # Some families mean no window by it.
                del sizes[field]
            elif type(value) is not int or not 0 < value <= LIMITS[field]:
                raise self._wrong(field, f"is {value!r:.80}; it must be a whole number from 1 to {LIMITS[field]}")
        heads, kv_heads, hidden = (sizes.get(f) for f in ("num_attention_heads", "num_key_value_heads", "hidden_size"))
        if heads and kv_heads and heads % kv_heads:
            raise self._wrong("num_attention_heads", f"is {heads}, not a multiple of num_key_value_heads {kv_heads}")
        if heads and hidden and "head_dim" not in sizes and hidden % heads:
            raise self._wrong("hidden_size", f"is {hidden}, not a multiple of num_attention_heads {heads}")

    def _check_epsilons(self) -> None:
        """What norms add to a variance: below zero they give NaN, and far above nothing but noise."""
        for field, value in self._raw.items():
            is_number = isinstance(value, int | float) and not isinstance(value, bool)
            if field.endswith(("_eps", "_epsilon")) and is_number and not 0 <= value <= 1:
                raise self._wrong(field, f"is {value!r:.80}; it must be a number from 0 to 1")

    def _resolve(self) -> "PretrainedConfig":
        """transformers' config object, which fills in defaults and has checks of its own.

        RoPE scaling is left out: it is read and checked in one place, backends/rope/scaling.py, for both runners.
        """
        from huggingface_hub.errors import StrictDataclassError

        fields = {k: v for k, v in computing(self._raw).items() if k not in ("rope_scaling", "rope_parameters")}
        try:
            return self._class.from_dict(fields)
        except (StrictDataclassError, TypeError, ValueError, KeyError, AttributeError, ArithmeticError) as error:
            reason = re.sub(r"^Class validation error for validator '\w+': \w+: ", "", " ".join(str(error).split()))
            raise BackendError(f"{self._path}: {reason:.300}") from None

    def _layers(self, config: "PretrainedConfig", count: int) -> tuple[tuple[str, ...], tuple[int | None, ...]]:
        """Each layer's type and window. Families without layer_types (Mistral, Phi-3) use the window in all layers."""
        window = self._resolved(config, "sliding_window") or None
        if self._resolved(config, "use_sliding_window") is False:
            window = None
        types = self._resolved(config, "layer_types")
        if types is None:
            return (LAYER_TYPES[window is not None],) * count, (window,) * count
        if not isinstance(types, list) or len(types) != count:
            raise self._wrong("layer_types", f"must be a list of num_hidden_layers, {count}, types")
        for kind in types:
            if kind not in LAYER_TYPES:
                raise self._wrong("layer_types", f"holds {kind!r:.40}; {' and '.join(LAYER_TYPES)} are served")
            if kind == "sliding_attention" and window is None:
                raise self._wrong("sliding_window", "is missing, but layer_types has sliding_attention")
        return tuple(types), tuple(window if kind == "sliding_attention" else None for kind in types)

    def _dtype(self) -> WeightDtype:
        """As stated; null and "auto" mean that of the tensors."""
        name = "torch_dtype" if self._raw.get("dtype") is None else "dtype"
        dtype = self._raw.get(name)
        if dtype in (None, "auto"):
            return _stored_dtype(self._path.parent)
        plain = dtype.removeprefix("torch.") if isinstance(dtype, str) else dtype
        if plain not in STORED.values():
            raise self._wrong(name, f"is {dtype!r:.40}; bfloat16, float16 and float32 are served")
        return cast(WeightDtype, plain)  # It is one of the three, which mypy can't see through the union.

    def _count(self, config: "PretrainedConfig", fields: Sequence[str], default: int, most: int = MAX_EXPERTS) -> int:
        """The first of these fields of a mixture that has a value; of a list, one a layer, the largest."""
        for field in fields:
            value = self._resolved(config, field)
            if value is not None:
                counts = value if isinstance(value, list) and value else [value]
                if any(type(count) is not int or not 0 <= count <= most for count in counts):
                    raise self._wrong(field, f"is {value!r:.80}; it must be a whole number from 0 to {most}")
                largest: int = max(counts)
                return largest
        return default

    def _architecture(self, config: "PretrainedConfig") -> str:
        from transformers import MODEL_FOR_CAUSAL_LM_MAPPING

        # It is typed as a pair, which no language model has.
        model_class: Any = MODEL_FOR_CAUSAL_LM_MAPPING[type(config)]
        return str(model_class.__name__)

    def _wrong(self, field: str, reason: str) -> BackendError:
        return BackendError(f"{self._path}: {self._name(field)} {reason}")


def _stored_dtype(folder: Path) -> WeightDtype:
    """The floating-point type that most bytes of the weights are in; float32 where none can be read."""
    num_bytes: dict[WeightDtype, int] = dict.fromkeys(STORED.values(), 0)
    try:
        entries = Checkpoint.open(folder).tensors.values()
    except BackendError:  # Whoever needs the weights tells of it.
        return "float32"
    for entry in entries:
        if (dtype := STORED.get(entry.dtype)) is not None:
            num_bytes[dtype] += entry.num_bytes
    return max(num_bytes, key=lambda dtype: num_bytes[dtype])


def _annotations(config_class: type["PretrainedConfig"]) -> dict[str, object]:
    """The types that a config class declares of its fields, by the names that files have for them, too."""
    found: dict[str, object] = {}
    for base in reversed(config_class.__mro__):
        found |= vars(base).get("__annotations__", {})
    return found | {name: found[own] for name, own in config_class.attribute_map.items() if own in found}
