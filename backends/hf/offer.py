"""What the registry asks of this backend: which paths are its own, what they need, and to open them."""

from collections.abc import Callable
from pathlib import Path

from tightrope.backends.errors import BackendError, DoesNotFit
from tightrope.backends.files.foreign import CONSOLIDATED, names_in
from tightrope.backends.planning import CACHE_NAMES, CacheChoice, Chosen, Outline, grossed_up
from tightrope.backends.protocol import Backend
from tightrope.backends.settings import ModelSettings

NO_TOKENIZER = "tokenizer: the folder holds none, and serve refuses it without; copy the model's own"


def claims(path: Path) -> Path | None:
    """A folder with weights in safetensors. Raises BackendError for a file that belongs into one."""
    if path.is_dir():
        weights = [name for name in names_in(path) if name.endswith(".safetensors")]
        return path if any(not name.startswith(("adapter_", CONSOLIDATED)) for name in weights) else None
    if path.suffix in (".safetensors", ".json"):
        raise BackendError(f"{path}: a part of a model; name its folder, {path.absolute().parent}")
    return None


def open_model(folder: Path, settings: ModelSettings, progress: Callable[[float], None]) -> Backend:
    """See BackendPackage."""
    from tightrope.backends.hf.backend import HFBackend

    return HFBackend(folder, settings, progress)


def outline(folder: Path, settings: ModelSettings, memory_bytes: int | None) -> Outline:
    """See BackendPackage."""
    from tightrope.backends.devices.choice import choose_device
    from tightrope.backends.files.peft import room_for_adapters
    from tightrope.backends.hf import plan as hf
    from tightrope.backends.hf.load.inspection import inspect
    from tightrope.backends.memory import spare_bytes
    from tightrope.kernels.forms.layout import PAGE

    found = inspect(folder, settings)
    shape, blueprint = found.shape, found.blueprint
    weight_bytes = blueprint.weight_bytes + room_for_adapters(settings)
    free_bytes = grossed_up(memory_bytes) if memory_bytes is not None else hf.free_bytes(choose_device(settings.device))
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
