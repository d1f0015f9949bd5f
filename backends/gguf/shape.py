"""The sizes of a model, from its GGUF header alone."""

from dataclasses import dataclass

from tightrope.backends.errors import BackendError
from tightrope.backends.files.gguf.header import Header, LongArray, Value
from tightrope.backends.files.gguf.tensor_types import TENSOR_TYPES

MAX_LAYERS = 512  # llama.cpp ends the process beyond this.
MAX_WINDOW = 1 << 28
MAX_HEADS = 1 << 16
MAX_WIDTH = 1 << 24
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
    """What planning needs to know."""

    architecture: str
    trained_len: int  # The file's own RoPE scaling is in it.
    unscaled_len: int  # It is the window before any RoPE scaling.
    vocab_size: int
    embedding: int
    num_heads: int  # These are the query heads of the layer that has most.
    kv_heads: tuple[int, ...]  # One number a layer; 0 where it has no attention.
    key_dim: int
    value_dim: int
    state_values: tuple[int, ...]  # Of one sequence in each layer, in float32; 0 where a layer keeps none.
    step_width: int  # A bound on the values that llama.cpp holds at a time for each token of a step.
    window: int  # Sliding layers see so many tokens at most; 0 where there are none.
    rope_base: float
    rope_dims: int
    own_scaling: str | None  # It says in words what the file says of RoPE scaling.
    has_freq_factors: bool  # Llama 3.1's scaling and longrope have a factor for each rotary frequency.

    @classmethod
    def of(cls, header: Header) -> "ModelShape":
        """Raises BackendError when a size is missing or can't be."""
        return _Reader(header).shape()

    @property
    def num_masks(self) -> int:
        """One says which tokens see which, and a second one where some layers see a window of them."""
        return (2 if self.window else 1) if any(self.kv_heads) else 0

    @property
    def state_bytes(self) -> int:
        """Recurrent states of a sequence, in all layers."""
        return 4 * sum(self.state_values)

    def cache_bytes(self, key_type: int, value_type: int) -> float:
        """Bytes of cache a token takes, given GGUF type ids for keys and values."""
        return sum(self.kv_heads) * self.head_bytes(key_type, value_type)

    def head_bytes(self, key_type: int, value_type: int) -> float:
        """Bytes of a token's key and value of one head."""
        return self.key_dim * _bytes_per_value(key_type) + self.value_dim * _bytes_per_value(value_type)


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
        if interval := self._widest("full_attention_interval"):
            kv_heads = [kv if (number + 1) % interval == 0 else 0 for number, kv in enumerate(kv_heads)]
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
            num_heads=max(heads),
            kv_heads=tuple(kv_heads),
            key_dim=key_dim,
            value_dim=value_dim,
            state_values=self._state_values(embedding, kv_heads),
            step_width=self._step_width(embedding, max(heads) * (key_dim + value_dim)),
            window=self._widest("attention.sliding_window"),
            rope_base=self._float("rope.freq_base", default=10000.0),
            rope_dims=self._int("rope.dimension_count", default=key_dim),
            own_scaling=self._own_scaling(),
            has_freq_factors=any("rope_f" in tensor.name for tensor in self._header.tensors),
        )

    def _step_width(self, embedding: int, heads: int) -> int:
        """Values a token: the residual and its copies, heads before and after attention, and the larger MLP.

        A dense MLP holds gate, up and their product; so does each expert of a token, beside its output and that
        weighted. tests/backends/test_gguf_workspace.py holds the sum to what llama.cpp reserves.
        """
        dense, used = self._widest("feed_forward_length"), self._widest("expert_used_count")
        expert = self._widest("expert_feed_forward_length") or dense
        shared = self._widest("expert_shared_feed_forward_length") or expert * self._widest("expert_shared_count")
        experts = used * (3 * expert + 2 * embedding) + 3 * shared if used else 0
        return 6 * embedding + 2 * heads + max(3 * dense, experts) + 6 * self._widest("ssm.inner_size")

    def _state_values(self, embedding: int, kv_heads: list[int]) -> tuple[int, ...]:
        """The last inputs of a recurrent layer's convolution, and its state.

        Such layers are those without attention, or all where none is without. Source: llama_hparams's n_embd_r and
        n_embd_s.
        """
        inner, state = self._widest("ssm.inner_size"), self._widest("ssm.state_size")
        inputs = max(0, self._widest("ssm.conv_kernel") - 1) * (inner + 2 * self._widest("ssm.group_count") * state)
        inputs += max(0, self._widest("shortconv.l_cache") - 1) * embedding
        if wkv := self._widest("wkv.head_size"):
            inputs, inner, state = (self._widest("token_shift_count") or 2) * embedding, embedding, wkv
        is_mixed = 0 in kv_heads
        return tuple(0 if is_mixed and kv else inputs + inner * state for kv in kv_heads)

    def _widest(self, key: str) -> int:
        """The largest of the numbers that layers have under a key, or the one for all; 0 where there is none."""
        value = self._get(key)
        numbers = value if isinstance(value, tuple) else (value or 0,)
        found = [number for number in numbers if isinstance(number, int) and 0 <= number <= MAX_WIDTH]
        if len(found) < len(numbers):
            raise self._error(key, value, f"it must be a number from 0 to {MAX_WIDTH}")
        return max(found, default=0)

    def _get(self, key: str) -> Value | None:
        return self._header.metadata.get(f"{self._architecture}.{key}")

    def _int(self, key: str, default: int | None = None, most: int = MAX_WIDTH) -> int:
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
        # A model of recurrent layers alone has no heads.
        is_recurrent = self._widest("ssm.state_size") or self._widest("wkv.head_size")
        return [0 if value == 0 and is_recurrent else self._int(key, most=MAX_HEADS)] * layers

    def _vocab_size(self) -> int:
        tokens = self._header.metadata.get("tokenizer.ggml.tokens")
        if isinstance(tokens, LongArray):
            return tokens.count
        return len(tokens) if isinstance(tokens, tuple) else self._int("vocab_size", default=1)
