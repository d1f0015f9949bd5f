"""What the torch engine decides before loading: window, cache type and capacity, and whether it all fits in memory."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from tightrope.backends.errors import BackendError, DoesNotFit
from tightrope.backends.files.hf_config import ModelShape
from tightrope.backends.hf.modules.step import LayerInfo
from tightrope.backends.hf.room import Asked, CacheSizes, Space
from tightrope.backends.hf.workspace import token_bytes
from tightrope.backends.memory import GIB, default_tokens
from tightrope.backends.planning import LEAST_WINDOW, MemoryShares
from tightrope.backends.rope.scaling import RopeSpec, resolve_rope
from tightrope.backends.settings import STEP_TOKENS, ModelSettings
from tightrope.kernels.forms.layout import PAGE, CacheDtype

CACHE_DTYPES: tuple[CacheDtype, ...] = ("f16", "q8", "q4")  # They stand largest first.


@dataclass(frozen=True, slots=True)
class HFPlan:
    """Everything a load needs; sizes in tokens and bytes."""

    window: int
    run_bytes: int  # Of the machine's memory finished chats may take so many beside the cache.
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


def make_plan(settings: ModelSettings, shape: ModelShape, room: Space) -> HFPlan:
    """Decide what to allocate, where there is `room` beside the weights.

    Where no window is asked for, it is what the model is made for, or what fits. Raises DoesNotFit, with what would
    fit, when what is asked for doesn't, and BackendError when config.json or settings make no sense.
    """
    if room.host_bytes is not None and room.run_reserve_bytes > room.host_bytes:
        need, free = room.run_reserve_bytes / GIB, max(0, room.host_bytes) / GIB
        raise DoesNotFit(f"--host-cache-mib: {need:.2f} GiB, and {free:.2f} GiB of the machine's memory is free")
    dtype = cache_dtype(settings)
    step, asked = _choose_step(settings, shape, room, dtype)
    rope, notes = _choose_rope(asked, shape)
    window = served_window(asked, shape, rope)
    if asked is not settings:
        reach = served_window(settings, shape, rope_of(settings, shape))
        notes.append(f"window: {window} tokens, what memory holds of the {reach} that the model is made for")
    if step < room.step_tokens[0]:
        notes.append(f"steps: {step} tokens at most; memory is short for the workspace of {room.step_tokens[0]}")
    sizes = CacheSizes.of(asked, shape, dtype, step)
    wanted = asked.cache.tokens or default_tokens(window, asked.max_num_seqs)
    num_pages = min(-(-wanted // PAGE), room.fitting(asked, shape, dtype, step, window))
    size = sizes.bytes_of(num_pages)
    has_windows = sizes.window_tokens is not None and sizes.most_window_pages < num_pages
    windowed = tuple(has_windows and tokens is not None for tokens in shape.windows)
    workspace_bytes = room.workspace.num_bytes(step, window)
    run_bytes = settings.cache.host_run_bytes(size, room.host_left(size + workspace_bytes))
    why = "as asked" if settings.cache.dtype != "auto" else "half the room of f16, and next to no loss"
    notes.append(f"cache: {num_pages * PAGE} tokens as {dtype}, {size / GIB:.2f} GiB; {why}")
    notes.append(f"beside the cache: {run_bytes / GIB:.2f} GiB of the machine's memory for chats that have left it")
    if has_windows:
        notes.append(
            f"cache: {sum(windowed)} of {len(windowed)} layers see {sizes.window_tokens} tokens, and keep "
            f"{sizes.most_window_pages * PAGE}"
        )
    return HFPlan(
        window=window,
        run_bytes=run_bytes,
        num_pages=num_pages,
        cache_dtype=dtype,
        token_bytes=token_bytes(shape, dtype),
        cache_bytes=size,
        windowed=windowed,
        num_window_pages=sizes.most_window_pages if has_windows else 0,
        window_tokens=sizes.window_tokens if has_windows else None,
        workspace_bytes=workspace_bytes,
        step_tokens=min(step, num_pages * PAGE),
        rope=rope,
        notes=tuple(notes),
    )


def _choose_step(
    settings: ModelSettings, shape: ModelShape, room: Space, dtype: CacheDtype
) -> tuple[int, ModelSettings]:
    """Most tokens of a step, and the settings with the window that fits where none is asked for. Raises DoesNotFit."""
    window = served_window(settings, shape, rope_of(settings, shape))
    least = settings.cache.tokens or window
    for step in room.step_tokens:
        if least <= room.fitting(settings, shape, dtype, step, window) * PAGE:
            return step, settings
    if not settings.max_model_len and not settings.cache.tokens:
        step = next((step for step in room.step_tokens if step <= STEP_TOKENS), room.step_tokens[-1])
        fitting = room.fitting(settings, shape, dtype, step) * PAGE
        if fitting >= min(LEAST_WINDOW, window):
            return step, settings.model_copy(update={"max_model_len": fitting})
    raise _refusal(settings, shape, room, dtype, window)


def _refusal(settings: ModelSettings, shape: ModelShape, room: Space, dtype: CacheDtype, window: int) -> DoesNotFit:
    step, least = room.step_tokens[-1], settings.cache.tokens or window
    cheaper = CACHE_DTYPES[CACHE_DTYPES.index(dtype) + 1 :]
    smaller = [kind for kind in cheaper if least <= room.fitting(settings, shape, kind, step, window) * PAGE]
    if settings.cache.tokens:
        most = room.fitting(settings, shape, dtype, step, window) * PAGE
    else:
        most = room.largest_window(settings, shape, dtype)
    return room.refusal(Asked(settings, shape, dtype, least, step, window), smaller, most)


def memory_shares(plan: HFPlan, room: Space, device: str, host_bytes: int) -> MemoryShares:
    """What a plan takes. host_bytes: of weights in the machine's own memory beside a card."""
    return MemoryShares(
        device=device,
        memory_bytes=room.usable_bytes + (room.run_reserve_bytes if room.host_bytes is None else 0),
        weight_bytes=room.weight_bytes,
        host_bytes=host_bytes,
        workspace_bytes=plan.workspace_bytes,
        cache_bytes=plan.cache_bytes,
        run_bytes=plan.run_bytes,
    )


def check_layers(plan: HFPlan, layers: Sequence[LayerInfo]) -> None:
    """Raise BackendError where a layer of the model sees more than the pages that it is planned with."""
    for number, (layer, is_windowed) in enumerate(zip(layers, plan.windowed, strict=True)):
        if is_windowed and (layer.spec.window or plan.window + 1) > (plan.window_tokens or 0):
            raise BackendError(f"config.json: layer {number} sees more than its sliding_window")


def cache_dtype(settings: ModelSettings) -> CacheDtype:
    """How keys and values are stored: as asked, and else in 8 bits, which lose next to nothing before rotation."""
    return "q8" if settings.cache.dtype == "auto" else settings.cache.dtype


def served_window(settings: ModelSettings, shape: ModelShape, rope: Mapping[str, RopeSpec]) -> int:
    """The window in tokens, the same for all kinds of layers."""
    return next((spec.window for spec in rope.values()), settings.max_model_len or shape.trained_len)


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
