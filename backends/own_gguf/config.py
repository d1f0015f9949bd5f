"""The configuration that transformers would have for a GGUF file, out of its metadata and the shapes of its tensors.

Sources: the keys that llama.cpp's converter writes (gguf-py, constants.py), and for what no key says, the values that
llama.cpp's own code has for an architecture.
"""

from collections.abc import Callable, Mapping
from typing import Any

from tightrope.backends.errors import BackendError
from tightrope.backends.files.gguf.header import Header, TensorInfo

Fields = dict[str, Any]  # They are as config.json would have them.
Read = Callable[[TensorInfo], list[float]]  # It gives the numbers of a small tensor.

_SIZES = {
    "block_count": "num_hidden_layers",
    "embedding_length": "hidden_size",
    "feed_forward_length": "intermediate_size",
    "attention.head_count": "num_attention_heads",
    "attention.head_count_kv": "num_key_value_heads",
    "attention.key_length": "head_dim",
    "context_length": "max_position_embeddings",
    "expert_used_count": "num_experts_per_tok",
    "expert_feed_forward_length": "moe_intermediate_size",
    "expert_shared_feed_forward_length": "shared_expert_intermediate_size",
}
_GEMMA = {"hidden_act": "gelu_pytorch_tanh", "hidden_activation": "gelu_pytorch_tanh"}
_ALL_SPARSE = {"decoder_sparse_step": 1, "mlp_only_layers": []}
# By architecture: transformers' model type, and what no key of the metadata says.
_KINDS: Mapping[str, tuple[str, Fields]] = {
    "llama": ("llama", {"attention_bias": False, "mlp_bias": False}),
    "qwen2": ("qwen2", {"use_sliding_window": False}),
    "qwen3": ("qwen3", {"use_sliding_window": False, "attention_bias": False}),
    "qwen2moe": ("qwen2_moe", {"norm_topk_prob": False, "use_sliding_window": False, **_ALL_SPARSE}),
    "qwen3moe": ("qwen3_moe", {"norm_topk_prob": True, "use_sliding_window": False, **_ALL_SPARSE}),
    "gemma": ("gemma", _GEMMA),
    "gemma2": ("gemma2", _GEMMA),
    "gemma3": ("gemma3_text", _GEMMA),
    "phi3": ("phi3", {}),
    "command-r": ("cohere", {}),
    "granite": ("granite", {"attention_bias": False, "mlp_bias": False}),
    "olmo2": ("olmo2", {"attention_bias": False}),
}
_SLIDING_EVERY = {"gemma2": 2, "gemma3": 6}  # Of so many layers the last sees everything, the others a window.
_OF_27B = {"gemma2": 46, "gemma3": 62}  # Of so many layers are those whose queries are scaled by hidden_size / heads.
_SCALINGS = ("none", "linear", "yarn", "longrope")
_ORIGINAL = "original_max_position_embeddings"


def config_of(header: Header, read: Read) -> Fields:
    """The fields of config.json. Raises BackendError for what the torch engine doesn't know of this architecture."""
    metadata = header.metadata
    architecture = str(metadata["general.architecture"])
    if architecture not in _KINDS:
        raise BackendError(f"{header.path}: architecture {architecture!r} is not known; {', '.join(_KINDS)} are")
    reader = _Reader(header, architecture)
    model_type, fixed = _KINDS[architecture]
    fields: Fields = {"model_type": model_type, **fixed, **reader.sizes()}
    fields |= _norms(reader, architecture) | _experts(reader, architecture) | _own(reader, architecture, fields)
    fields["tie_word_embeddings"] = "output.weight" not in reader.tensors
    fields["vocab_size"] = reader.tensors["token_embd.weight"].dims[-1] if reader.has("token_embd.weight") else 0
    if reader.has("blk.0.attn_q.bias") and "attention_bias" in fields:
        fields["attention_bias"] = True
    if "head_dim" not in fields and "num_attention_heads" in fields:
        fields["head_dim"] = fields["hidden_size"] // fields["num_attention_heads"]
    return fields | _rotation(reader, architecture, fields, read)


class _Reader:
    """Metadata by its short key, and tensors by name."""

    def __init__(self, header: Header, architecture: str) -> None:
        self.header, self._architecture = header, architecture
        self.tensors = {tensor.name: tensor for tensor in header.tensors}

    def has(self, tensor: str) -> bool:
        return tensor in self.tensors

    def get(self, key: str) -> Any:  # noqa: ANN401 - whatever the metadata holds
        return self.header.metadata.get(f"{self._architecture}.{key}")

    def sizes(self) -> Fields:
        """One number for all layers. Raises BackendError where layers differ."""
        found: Fields = {}
        for key, field in _SIZES.items():
            value = self.get(key)
            if isinstance(value, tuple):
                if len(set(value)) != 1:
                    raise self.wrong(key, value, "the torch engine knows one number for all layers")
                value = value[0]
            if value is not None:
                found[field] = value
        if (value := self.get("attention.value_length")) not in (None, found.get("head_dim")):
            raise self.wrong("attention.value_length", value, "the torch engine knows keys and values of one length")
        return found

    def wrong(self, key: str, value: object, reason: str) -> BackendError:
        return BackendError(f"{self.header.path}: {self._architecture}.{key} is {value!r:.80}; {reason}")


def _norms(reader: _Reader, architecture: str) -> Fields:
    key, field = "attention.layer_norm_rms_epsilon", "rms_norm_eps"
    if architecture == "command-r":
        key, field = "attention.layer_norm_epsilon", "layer_norm_eps"
    if (value := reader.get(key)) is None:
        raise reader.wrong(key, value, "the norms need it")
    return {field: value}


def _experts(reader: _Reader, architecture: str) -> Fields:
    count = reader.get("expert_count") or 0
    if not count:
        return {}
    if architecture == "llama":
        return {"model_type": "mixtral", "num_local_experts": count}
    if architecture in ("qwen2moe", "qwen3moe"):
        return {"num_experts": count}
    raise reader.wrong("expert_count", count, "the torch engine knows no experts of this architecture")


def _own(reader: _Reader, architecture: str, fields: Fields) -> Fields:
    """What single architectures have beside sizes."""
    own: Fields = {}
    if architecture == "granite":
        names = {
            "embedding_scale": "embedding_multiplier",
            "residual_scale": "residual_multiplier",
            "attention.scale": "attention_multiplier",
            "logit_scale": "logits_scaling",
        }
        own |= {field: value for key, field in names.items() if (value := reader.get(key)) is not None}
    if architecture == "command-r":
        own |= {
            "logit_scale": reader.get("logit_scale") or 0.0625,
            "use_qk_norm": reader.has("blk.0.attn_q_norm.weight"),
        }
    if architecture in ("gemma2", "gemma3"):
        layers, every = fields["num_hidden_layers"], _SLIDING_EVERY[architecture]
        own["layer_types"] = [
            "sliding_attention" if number % every else "full_attention" for number in range(1, layers + 1)
        ]
        own["sliding_window"] = reader.get("attention.sliding_window")
        own["attn_logit_softcapping"] = reader.get("attn_logit_softcapping")
        own["final_logit_softcapping"] = reader.get("final_logit_softcapping")
        is_27b = layers == _OF_27B[architecture]
        heads, hidden = fields["num_attention_heads"], fields["hidden_size"]
        own["query_pre_attn_scalar"] = hidden // heads if is_27b else fields.get("head_dim", hidden // heads)
    elif (window := reader.get("attention.sliding_window")) and architecture == "phi3":
        own["sliding_window"] = window
    return own


def _rotation(reader: _Reader, architecture: str, fields: Fields, read: Read) -> Fields:
    """Rotation and its scaling, in the style of today's files."""
    section: Fields = {"rope_type": "default", "rope_theta": float(reader.get("rope.freq_base") or 10000.0)}
    dims, head_dim = reader.get("rope.dimension_count"), fields["head_dim"]
    if dims is not None and dims != head_dim:
        section["partial_rotary_factor"] = dims / head_dim
    kind = reader.get("rope.scaling.type") or "none"
    factor = reader.get("rope.scaling.factor") or reader.get("rope.scale_linear") or 1.0
    original = reader.get("rope.scaling.original_context_length")
    if kind not in _SCALINGS:
        raise reader.wrong("rope.scaling.type", kind, f"{', '.join(_SCALINGS)} are known")
    factors = {name: tensor for name, tensor in reader.tensors.items() if name.startswith("rope_f")}
    if factors:
        section |= _factors(reader, factors, read, fields, original)
    elif kind == "yarn":
        section |= {"rope_type": "yarn", "factor": factor}
        if original is not None:
            section[_ORIGINAL] = original
    elif kind != "none" or factor != 1.0:
        section |= {"rope_type": "linear", "factor": factor}
    if architecture != "gemma3":
        original = {key: section[key] for key in (_ORIGINAL,) if key in section}  # Phi-3's class has a default there.
        return {"rope_parameters": section, **original}
    near = {"rope_type": "default", "rope_theta": float(reader.get("rope.freq_base_swa") or 10000.0)}
    return {"rope_parameters": {"full_attention": section, "sliding_attention": near}}


def _factors(
    reader: _Reader, factors: Mapping[str, TensorInfo], read: Read, fields: Fields, original: int | None
) -> Fields:
    """Tensors by whose numbers frequencies are divided: one for all lengths, or one each for long and short chats."""
    if "rope_freqs.weight" in factors:
        numbers = read(factors["rope_freqs.weight"])
        lists, length, scale = (numbers, numbers), fields["max_position_embeddings"], 1.0
    elif {"rope_factors_short.weight", "rope_factors_long.weight"} <= factors.keys():
        lists = read(factors["rope_factors_short.weight"]), read(factors["rope_factors_long.weight"])
        length, scale = original or fields["max_position_embeddings"], reader.get("rope.scaling.attn_factor")
    else:
        raise BackendError(f"{reader.header.path}: tensors {', '.join(factors)} are not known together")
    section = {"rope_type": "longrope", "short_factor": lists[0], "long_factor": lists[1]}
    section[_ORIGINAL] = length
    section["factor"] = fields["max_position_embeddings"] / length
    return section if scale is None else section | {"attention_factor": scale}
