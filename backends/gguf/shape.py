"""The sizes of a model, from its GGUF header alone."""

from dataclasses import dataclass

from tightrope.backends.errors import BackendError
from tightrope.backends.gguf.header import Header, LongArray, Value
from tightrope.backends.gguf.tensor_types import TENSOR_TYPES

MAX_LAYERS = 512  # llama.cpp ends the process beyond this.
MAX_WINDOW = 1 << 28
MAX_HEADS = 1 << 16
MAX_EXPERTS = 512  # llama.cpp ends the process beyond this, too.
# metadata floats by their short key, and the values they can have: above the first number, up to the second
_RANGES = {
    "attention.layer_norm_epsilon": (0.0, 1.0),
    "attention.layer_norm_rms_epsilon": (0.0, 1.0),
    "attention.group_norm_epsilon": (0.0, 1.0),
    "rope.freq_base": (1.0, 1e18),
    "rope.freq_base_swa": (1.0, 1e18),
}
_FACTORS = ("rope.scaling.factor", "rope.scale_linear")  # 0 says that there is none.
_MAX_FACTOR = 1e6


@dataclass(frozen=True, slots=True)
class ModelShape:
    """What planning needs to know. `key_width` and `value_width` are values a token over all layers' cache."""

    architecture: str
    trained_len: int  # The file's own RoPE scaling is in it.
    unscaled_len: int  # It is the window before any RoPE scaling.
    vocab_size: int
    embedding: int
    key_width: int
    value_width: int
    rope_base: float
    rope_dims: int
    own_scaling: str | None  # It says in words what the file says of RoPE scaling.
    has_freq_factors: bool  # Llama 3.1's scaling and longrope have a factor for each rotary frequency.

    @classmethod
    def of(cls, header: Header) -> "ModelShape":
        """Raises BackendError when a size is missing or can't be."""
        return _Reader(header).shape()

    def cache_bytes(self, key_type: int, value_type: int) -> float:
        """Bytes of cache a token takes, given GGUF type ids for keys and values."""
        return self.key_width * _bytes_per_value(key_type) + self.value_width * _bytes_per_value(value_type)


def _bytes_per_value(type_id: int) -> float:
    kind = TENSOR_TYPES[type_id]
    return kind.num_bytes / kind.values


class _Reader:
    """Metadata by its short key, checked."""

    def __init__(self, header: Header) -> None:
        self._header = header
        architecture = header.metadata.get("general.architecture")
        if not isinstance(architecture, str) or not architecture:
            raise BackendError(f"{header.path}: it names no general.architecture, so it holds no model")
        self._architecture = architecture

    def shape(self) -> ModelShape:
        self._check_floats()
        self._check_experts()
        layers = self._int("block_count", most=MAX_LAYERS)
        embedding = self._int("embedding_length")
        heads = self._per_layer("attention.head_count", layers, default=1)
        kv_heads = self._per_layer("attention.head_count_kv", layers, default=heads)
        head_dim = embedding // max(1, max(heads))
        key_dim = self._int("attention.key_length", default=head_dim)
        value_dim = self._int("attention.value_length", default=head_dim)
        trained = self._int("context_length", most=MAX_WINDOW)
        return ModelShape(
            architecture=self._architecture,
            trained_len=trained,
            unscaled_len=self._int("rope.scaling.original_context_length", default=trained, most=MAX_WINDOW),
            vocab_size=self._vocab_size(),
            embedding=embedding,
            key_width=sum(kv_heads) * key_dim,
            value_width=sum(kv_heads) * value_dim,
            rope_base=self._float("rope.freq_base", default=10000.0),
            rope_dims=self._int("rope.dimension_count", default=key_dim),
            own_scaling=self._own_scaling(),
            has_freq_factors=any("rope_f" in tensor.name for tensor in self._header.tensors),
        )

    def _get(self, key: str) -> Value | None:
        return self._header.metadata.get(f"{self._architecture}.{key}")

    def _int(self, key: str, default: int | None = None, most: int = 1 << 24) -> int:
        value = self._get(key)
        if value is None and default is not None:
            return default
        if not isinstance(value, int) or not 1 <= value <= most:
            raise self._error(key, value, f"it must be a number from 1 to {most}")
        return value

    def _check_floats(self) -> None:
        for key, (above, most) in _RANGES.items():
            value = self._float(key, default=most)
            if not above < value <= most:
                raise self._error(key, value, f"it must be more than {above:g} and at most {most:g}")
        for key in _FACTORS:
            if not 0 <= (value := self._float(key, default=0.0)) <= _MAX_FACTOR:
                raise self._error(key, value, f"it must be a number from 0 to {_MAX_FACTOR:g}")

    def _check_experts(self) -> None:
        """llama.cpp ends the process over numbers of experts that can't be."""
        experts, used = self._get("expert_count") or 0, self._get("expert_used_count") or 0
        if not isinstance(experts, int) or not 0 <= experts <= MAX_EXPERTS:
            raise self._error("expert_count", experts, f"it must be a number from 0 to {MAX_EXPERTS}")
        most = max(used, default=0) if isinstance(used, tuple) else used  # Some models have a number for each layer.
        if not isinstance(most, int) or not (0 < most <= experts or most == experts == 0):
            wanted = (
                f"with {experts} experts it must be a number from 1 to {experts}" if experts else "there are no experts"
            )
            raise self._error("expert_used_count", used, wanted)

    def _float(self, key: str, default: float) -> float:
        value = self._get(key)
        if value is None:
            return default
        if isinstance(value, bool) or not isinstance(value, int | float):
            raise self._error(key, value, "it must be a number")
        return float(value)

    def _error(self, key: str, value: object, reason: str) -> BackendError:
        return BackendError(f"{self._header.path}: {self._architecture}.{key} is {value!r}; {reason}")

    def _own_scaling(self) -> str | None:
        kind = self._get("rope.scaling.type")
        factor = next((factor for key in _FACTORS if (factor := self._float(key, default=0.0))), 1.0)
        return None if kind in (None, "none") and factor == 1 else f"{kind or 'linear'} scaling by {factor:g}"

    def _per_layer(self, key: str, layers: int, default: int | list[int]) -> list[int]:
        """One number a layer; a layer without attention has 0."""
        value = self._get(key)
        if isinstance(value, tuple) and len(value) >= layers:
            if not all(isinstance(v, int) and 0 <= v <= MAX_HEADS for v in value):
                raise self._error(key, value, f"it must hold numbers from 0 to {MAX_HEADS}")
            return [int(v) for v in value[:layers]]
        if value is None:
            return default if isinstance(default, list) else [default] * layers
        return [self._int(key, most=MAX_HEADS)] * layers

    def _vocab_size(self) -> int:
        tokens = self._header.metadata.get("tokenizer.ggml.tokens")
        if isinstance(tokens, LongArray):
            return tokens.count
        return len(tokens) if isinstance(tokens, tuple) else self._int("vocab_size", default=1)
