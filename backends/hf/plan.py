"""What the torch engine decides before loading: window, cache type and capacity, and whether it all fits in memory."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch

from tightrope.backends.errors import BackendError
from tightrope.backends.files.hf_config import ModelShape
from tightrope.backends.hf.cache.window_pages import KEPT_WINDOWS, most_needed
from tightrope.backends.hf.modules.step import LayerInfo
from tightrope.backends.memory import GIB, default_tokens, does_not_fit, free_memory, prompt_rows, spare_bytes
from tightrope.backends.rope.scaling import RopeSpec, resolve_rope
from tightrope.backends.settings import ModelSettings
from tightrope.kernels.forms.layout import PAGE, CacheDtype, CacheFormat
from tightrope.kernels.reference import TILE_ROWS, attention_bytes

CACHE_DTYPES: tuple[CacheDtype, ...] = ("f16", "q8", "q4")  # They stand largest first.
CALIBRATION_TOKENS = 512  # backends/hf/run/calibrate.py runs so many at load, in an f16 cache.
MOST_TOKENS = 1 << 28  # The longest window that is believed where tokens beyond the layers' windows take no room.
FIXED_BYTES = 128 << 20  # Libraries take this once they run, and rotary tables.


@dataclass(frozen=True, slots=True)
class HFPlan:
    """Everything a load needs; sizes in tokens and bytes."""

    window: int
    num_pages: int  # Pages have kernels.forms.layout.PAGE tokens.
    cache_dtype: CacheDtype
    token_bytes: int  # Those of keys and values in all layers.
    cache_bytes: int
    windowed: tuple[bool, ...]  # Layers that have `num_window_pages` instead.
    num_window_pages: int
    window_tokens: int | None  # Such layers see so many; None where all layers have as many pages.
    workspace_bytes: int  # An upper bound.
    step_tokens: int
    rope: Mapping[str, RopeSpec]  # By kind of layer, as resolve_rope gives them.
    notes: tuple[str, ...]


@dataclass(frozen=True, slots=True)
class CacheSizes:
    """What pages of the cache take, and how many fit. Layers with a sliding window stop at `most_window_pages`."""

    full_bytes: int  # For a token in the layers that see everything.
    windowed_bytes: int  # For a token in those with a window.
    window_tokens: int | None
    most_window_pages: int

    @classmethod
    def of(cls, settings: ModelSettings, shape: ModelShape, dtype: CacheDtype) -> "CacheSizes":
        layer_bytes = CacheFormat(dtype, shape.num_kv_heads, shape.head_dim).bytes_per_token
        windows = [window for window in shape.windows if window is not None]
        if not windows:
            return cls(shape.num_layers * layer_bytes, 0, None, 0)
        most = most_needed(max(windows), settings.max_num_seqs + KEPT_WINDOWS, settings.step_tokens_on("cpu"))
        return cls((shape.num_layers - len(windows)) * layer_bytes, len(windows) * layer_bytes, max(windows), most)

    def bytes_of(self, num_pages: int) -> int:
        return PAGE * (num_pages * self.full_bytes + min(num_pages, self.most_window_pages) * self.windowed_bytes)

    def fitting(self, room: int) -> int:
        """The most pages that `room` bytes hold."""
        num_pages = max(0, room) // (PAGE * (self.full_bytes + self.windowed_bytes))
        if num_pages <= self.most_window_pages:
            return num_pages
        if not self.full_bytes:
            return MOST_TOKENS // PAGE
        return (room - PAGE * self.most_window_pages * self.windowed_bytes) // (PAGE * self.full_bytes)


def make_plan(settings: ModelSettings, shape: ModelShape, weight_bytes: int, free_bytes: int) -> HFPlan:
    """Decide what to allocate, given `free_bytes` of memory for weights, cache and workspace.

    Raises DoesNotFit, with what would fit, when what is asked for doesn't, and BackendError when config.json or
    settings make no sense.
    """
    rope, notes = _choose_rope(settings, shape)
    window = served_window(settings, shape, rope)
    dtype = cache_dtype(settings)
    spare = spare_bytes(weight_bytes, free_bytes)
    num_pages = _choose_pages(settings, shape, window, dtype, spare)
    sizes = CacheSizes.of(settings, shape, dtype)
    size = sizes.bytes_of(num_pages)
    has_windows = sizes.window_tokens is not None and sizes.most_window_pages < num_pages
    windowed = tuple(has_windows and tokens is not None for tokens in shape.windows)
    why = "as asked" if settings.cache.dtype != "auto" else "half the room of f16, and next to no loss"
    notes.append(f"cache: {num_pages * PAGE} tokens as {dtype}, {size / GIB:.2f} GiB; {why}")
    if has_windows:
        notes.append(
            f"cache: {sum(windowed)} of {len(windowed)} layers see {sizes.window_tokens} tokens, and keep "
            f"{sizes.most_window_pages * PAGE}"
        )
    return HFPlan(
        window=window,
        num_pages=num_pages,
        cache_dtype=dtype,
        token_bytes=token_bytes(shape, dtype),
        cache_bytes=size,
        windowed=windowed,
        num_window_pages=sizes.most_window_pages if has_windows else 0,
        window_tokens=sizes.window_tokens if has_windows else None,
        workspace_bytes=workspace_bytes(settings, shape),
        step_tokens=min(settings.step_tokens_on("cpu"), num_pages * PAGE),
        rope=rope,
        notes=tuple(notes),
    )


def check_layers(plan: HFPlan, layers: Sequence[LayerInfo]) -> None:
    """Raise BackendError where a layer of the model sees more than the pages that it is planned with."""
    for number, (layer, is_windowed) in enumerate(zip(layers, plan.windowed, strict=True)):
        if is_windowed and (layer.spec.window or plan.window + 1) > (plan.window_tokens or 0):
            raise BackendError(f"config.json: layer {number} sees more than its sliding_window")


def free_bytes(device: torch.device) -> int:
    """Bytes of a device's memory that weights, cache and workspace may be put into."""
    return torch.cuda.mem_get_info(device)[0] if device.type == "cuda" else free_memory()


def cache_dtype(settings: ModelSettings) -> CacheDtype:
    """How keys and values are stored: as asked, and else in 8 bits, which lose next to nothing before rotation."""
    return "q8" if settings.cache.dtype == "auto" else settings.cache.dtype


def token_bytes(shape: ModelShape, dtype: CacheDtype) -> int:
    """Bytes of a token's keys and values in all layers."""
    return shape.num_layers * CacheFormat(dtype, shape.num_kv_heads, shape.head_dim).bytes_per_token


def served_window(settings: ModelSettings, shape: ModelShape, rope: Mapping[str, RopeSpec]) -> int:
    """The window in tokens, the same for all kinds of layers."""
    return next((spec.window for spec in rope.values()), settings.max_model_len or shape.trained_len)


def largest_window(settings: ModelSettings, shape: ModelShape, dtype: CacheDtype, spare: int) -> int:
    """The largest window, in tokens, that `spare` bytes beside the weights hold; whole pages."""
    return CacheSizes.of(settings, shape, dtype).fitting(spare - workspace_bytes(settings, shape)) * PAGE


def workspace_bytes(settings: ModelSettings, shape: ModelShape) -> int:
    """A bound on what a step needs beside weights and cache, with activations in float32."""
    tokens, hidden, ffn = settings.step_tokens_on("cpu"), shape.hidden_size, shape.intermediate_size
    kv_width = shape.num_kv_heads * shape.head_dim
    qkv = shape.num_heads * shape.head_dim + 2 * kv_width
    # A prompt whose logprobs are wanted yields a row for each token, copied once; the sampler's steps copy their rows.
    logits = 4 * shape.vocab_size * (2 * prompt_rows(shape.vocab_size, tokens) + 4 * settings.max_num_seqs)
    # Hidden states, residual and norm with their copies; heads before and after rotation, and their output; the MLP.
    activations = 4 * tokens * (6 * hidden + 3 * qkv + 3 * ffn)
    # Rows of a weight are expanded to float32 so many at a time, where no kernel reads them as they are.
    tile = 4 * TILE_ROWS * max(hidden, ffn, qkv)
    # The other kernels need less than the reference.
    attention = attention_bytes(tokens, shape.num_heads, shape.num_kv_heads, shape.head_dim)
    calibration = CALIBRATION_TOKENS * token_bytes(shape, "f16")
    return logits + activations + tile + attention + calibration + FIXED_BYTES


def rope_of(settings: ModelSettings, shape: ModelShape) -> dict[str, RopeSpec]:
    """The rotations, by kind of layer, as resolve_rope."""
    return resolve_rope(shape.raw, settings.rope, settings.max_model_len, shape.other_lengths)


def _choose_rope(settings: ModelSettings, shape: ModelShape) -> tuple[dict[str, RopeSpec], list[str]]:
    """The rotations, and what to say about them at start."""
    rope = rope_of(settings, shape)
    if not rope:
        if settings.max_model_len > shape.trained_len:
            raise BackendError(
                f"a window of {settings.max_model_len} tokens is more than this model has positions for: ask for at "
                f"most {shape.trained_len}"
            )
        return rope, []
    reach = served_window(settings, shape, rope_of(settings.model_copy(update={"max_model_len": 0}), shape))
    window = served_window(settings, shape, rope)
    specs = [spec for name, spec in rope.items() if name != "sliding_attention"]
    notes = [spec.describe() for spec in specs]
    notes.extend(dict.fromkeys(spec.note for spec in specs if spec.note))
    if window > reach:
        notes.append(f"window: {window} tokens, more than the {reach} that the model is made for")
    return rope, notes


def _choose_pages(settings: ModelSettings, shape: ModelShape, window: int, dtype: CacheDtype, spare: int) -> int:
    """Pages of the cache, given `spare` bytes for cache and workspace. Raises DoesNotFit."""
    room = spare - workspace_bytes(settings, shape)
    sizes = {kind: CacheSizes.of(settings, shape, kind) for kind in CACHE_DTYPES}
    fitting = {kind: sizes[kind].fitting(room) for kind in CACHE_DTYPES}  # In pages.
    least = settings.cache.tokens or window
    if least > fitting[dtype] * PAGE:
        cheaper = CACHE_DTYPES[CACHE_DTYPES.index(dtype) + 1 :]
        smaller = [kind for kind in cheaper if least <= fitting[kind] * PAGE]
        most = fitting[dtype] * PAGE if settings.cache.tokens else largest_window(settings, shape, dtype, spare)
        raise does_not_fit(least, dtype, sizes[dtype].bytes_of(-(-least // PAGE)), room, smaller, most)
    wanted = settings.cache.tokens or default_tokens(window, settings.max_num_seqs)
    return min(-(-wanted // PAGE), fitting[dtype])
