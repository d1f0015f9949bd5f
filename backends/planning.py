"""What a model needs and what fits, of any format, from headers alone: the numbers that `serve` decides by."""

import math
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from tightrope.backends.errors import DoesNotFit
from tightrope.backends.memory import MEMORY_SHARE, free_memory, spare_bytes
from tightrope.backends.settings import ModelSettings

NO_TOKENIZER = "tokenizer: the folder holds none, and serve refuses it without; copy the model's own"
CACHE_NAMES: tuple[Literal["q8", "q4", "f16"], ...] = ("q8", "q4", "f16")  # as they are shown, side by side


@dataclass(frozen=True, slots=True)
class CacheChoice:
    """One way to store keys and values; `fitting` is the largest context, in tokens, that memory holds with it."""

    name: str
    token_bytes: float
    window_bytes: float  # of the served window's tokens; less than all of them where layers slide
    fitting: int


@dataclass(frozen=True, slots=True)
class Chosen:
    """What `serve` would take: cache type, capacity in tokens, and start-up lines."""

    cache: str
    cache_tokens: int
    cache_bytes: int
    notes: tuple[str, ...]


@dataclass(frozen=True, slots=True)
class Outline:
    """A model in a memory. Sizes in bytes and tokens."""

    path: Path
    architecture: str
    format: str  # "gguf", "safetensors bfloat16", "EXL2, 4.65 bits per weight"
    memory_bytes: int  # for weights, cache and workspace together
    weight_bytes: int
    workspace_bytes: int
    trained_len: int
    window: int
    caches: tuple[CacheChoice, ...]
    chosen: Chosen | None
    refusal: str | None  # where nothing is chosen: one line with what would fit


def outline(settings: ModelSettings, memory_bytes: int | None) -> Outline:
    """Read the headers of the model that `settings` names, and plan.

    memory_bytes: a size that may be used up; None is this machine's free memory, of which `serve` leaves a share.
    Raises BackendError for a model or a setting that can't be; a plan that doesn't fit is no error here.
    """
    from tightrope.backends.locate import locate
    from tightrope.backends.registry import find_model

    path = find_model(locate(settings.model, settings.revision))
    if path.is_dir():
        return _of_folder(path, settings, memory_bytes)
    return _of_gguf(path, settings, memory_bytes)


def _of_folder(folder: Path, settings: ModelSettings, memory_bytes: int | None) -> Outline:
    from tightrope.backends.files.peft import room_for_adapters
    from tightrope.backends.hf import plan as hf
    from tightrope.backends.hf.load.inspection import inspect
    from tightrope.kernels.forms.layout import PAGE

    found = inspect(folder, settings)
    shape, blueprint = found.shape, found.blueprint
    weight_bytes = blueprint.weight_bytes + room_for_adapters(settings)
    free_bytes = _grossed_up(memory_bytes) if memory_bytes is not None else hf.free_bytes(hf.serving_device())
    spare = spare_bytes(weight_bytes, free_bytes)
    window = hf.served_window(settings, shape, hf.rope_of(settings, shape))
    chosen, refusal = None, None
    try:
        plan = hf.make_plan(settings, shape, weight_bytes, free_bytes)
        hf.check_layers(plan, blueprint.layers)
        notes = plan.notes if found.tokenizer is not None else (*plan.notes, NO_TOKENIZER)
        chosen = Chosen(plan.cache_dtype, plan.num_pages * PAGE, plan.cache_bytes, notes)
    except DoesNotFit as error:
        refusal = str(error)
    return Outline(
        path=folder,
        architecture=shape.model_type,
        format=blueprint.format,
        memory_bytes=spare + weight_bytes,
        weight_bytes=weight_bytes,
        workspace_bytes=hf.workspace_bytes(settings, shape),
        trained_len=shape.trained_len,
        window=window,
        caches=tuple(
            CacheChoice(
                name,
                hf.token_bytes(shape, name),
                hf.CacheSizes.of(settings, shape, name).bytes_of(-(-window // PAGE)),
                hf.largest_window(settings, shape, name, spare),
            )
            for name in CACHE_NAMES
        ),
        chosen=chosen,
        refusal=refusal,
    )


def _of_gguf(path: Path, settings: ModelSettings, memory_bytes: int | None) -> Outline:
    from tightrope.backends.gguf import plan as gguf
    from tightrope.backends.gguf.adapters import room_for_adapters
    from tightrope.backends.gguf.model_file import read_model
    from tightrope.backends.gguf.rope import plan_rope
    from tightrope.backends.gguf.shape import ModelShape
    from tightrope.backends.gguf.trial import try_load

    header = read_model(path, settings)
    shape = ModelShape.of(header)
    free_bytes = _grossed_up(memory_bytes) if memory_bytes is not None else free_memory()
    adapter_bytes = room_for_adapters(settings, header)
    weight_bytes = header.weight_bytes + adapter_bytes
    spare = spare_bytes(weight_bytes, free_bytes)
    workspace = gguf.workspace_bytes(settings, shape)
    window = settings.max_model_len or plan_rope(settings.rope, shape).window
    chosen, refusal = None, None
    try:
        plan = gguf.make_plan(settings, header, free_bytes, adapter_bytes)
        size = int(plan.num_cells * gguf.token_bytes(shape, plan.cache_type))
        notes = plan.notes + header.notes + try_load(path, gguf.context_options(settings, plan))
        chosen = Chosen(plan.cache_type.name, plan.num_cells, size, notes)
    except DoesNotFit as error:
        try_load(path, gguf.least_options())
        refusal = str(error)
    kinds = [gguf.CACHE_TYPES[name] for name in CACHE_NAMES]
    return Outline(
        path=path,
        architecture=shape.architecture,
        format="gguf",
        memory_bytes=spare + weight_bytes,
        weight_bytes=weight_bytes,
        workspace_bytes=workspace,
        trained_len=shape.trained_len,
        window=window,
        caches=tuple(
            CacheChoice(
                kind.name,
                gguf.token_bytes(shape, kind),
                window * gguf.token_bytes(shape, kind),
                gguf.fitting_tokens(shape, kind, spare - workspace),
            )
            for kind in kinds
        ),
        chosen=chosen,
        refusal=refusal,
    )


def _grossed_up(memory_bytes: int) -> int:
    """Free memory of which the share that `serve` takes is `memory_bytes`: a size that is given may be used up."""
    return math.ceil(memory_bytes / MEMORY_SHARE)
