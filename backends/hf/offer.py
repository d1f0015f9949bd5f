"""What the registry asks of this backend: which paths are its own, what they need, and to open them."""

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from tightrope.backends.errors import BackendError, DoesNotFit
from tightrope.backends.files.foreign import CONSOLIDATED, names_in
from tightrope.backends.memory import CardMemory
from tightrope.backends.planning import CACHE_NAMES, CacheChoice, Chosen, Outline
from tightrope.backends.protocol import Backend
from tightrope.backends.settings import ModelSettings
from tightrope.backends.warming import Warmed

if TYPE_CHECKING:
    from tightrope.backends.hf.load.inspection import Inspect

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


def warm(
    folder: Path, settings: ModelSettings, architectures: Sequence[int], progress: Callable[[float], None]
) -> list[Warmed]:
    """See BackendPackage."""
    from tightrope.backends.hf.warm import warm_folder

    return warm_folder(folder, settings, architectures, progress)


def outline(
    folder: Path, settings: ModelSettings, memory_bytes: int | None, device_bytes: tuple[int, ...] | None = None,
    inspect: "Inspect | None" = None,
) -> Outline:  # fmt: skip
    """See BackendPackage. inspect: of what isn't a folder, but runs as one."""
    import torch

    from tightrope.backends.devices.choice import choose_device
    from tightrope.backends.files.peft import room_for_adapters
    from tightrope.backends.hf import plan as hf
    from tightrope.backends.hf.load.inspection import inspect as inspect_folder
    from tightrope.backends.hf.room import CacheSizes, check_host, room_on
    from tightrope.backends.hf.workspace import token_bytes
    from tightrope.kernels.forms.layout import PAGE

    if device_bytes is not None and len(device_bytes) > 1:
        raise BackendError(f"--device-memory names {len(device_bytes)} cards; the model of a folder runs on one")
    device = choose_device(settings.device) if device_bytes is None else torch.device("cuda")
    found = (inspect or inspect_folder)(folder, settings, device)
    shape, blueprint = found.shape, found.blueprint
    card = None if device_bytes is None else CardMemory(device_bytes[0], device_bytes[0])
    adapter_bytes = room_for_adapters(settings, blueprint.adapters.read)
    room = room_on(device, settings, blueprint, adapter_bytes, host_bytes=memory_bytes, card=card)
    window = hf.served_window(settings, shape, hf.rope_of(settings, shape))
    step = room.step_tokens[0]
    workspace_bytes = room.workspace.num_bytes(step, window)
    chosen, refusal = None, None
    try:
        check_host(blueprint, memory_bytes)
        plan = hf.make_plan(settings, shape, room)
        hf.check_layers(plan, blueprint.layers)
        notes = (*plan.notes, *found.notes, *([] if found.tokenizer is not None else [NO_TOKENIZER]))
        window, step = plan.window, plan.step_tokens
        workspace_bytes = plan.workspace_bytes
        chosen = Chosen(plan.cache_dtype, plan.num_pages * PAGE, plan.cache_bytes, notes, step)
    except DoesNotFit as error:
        refusal = str(error)
    return Outline(
        path=folder,
        architecture=shape.model_type,
        format=blueprint.format,
        device=device.type,
        memory_bytes=room.usable_bytes,
        host_bytes=blueprint.host_bytes,
        weight_bytes=room.weight_bytes,
        workspace_bytes=workspace_bytes,
        trained_len=shape.trained_len,
        window=window,
        caches=tuple(
            CacheChoice(
                name,
                token_bytes(shape, name),
                CacheSizes.of(settings, shape, name, step).bytes_of(-(-window // PAGE)),
                room.largest_window(settings, shape, name),
            )
            for name in CACHE_NAMES
        ),
        chosen=chosen,
        refusal=refusal,
    )
