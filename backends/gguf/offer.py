"""What the registry asks of this backend: which paths are its own, what they need, and to open them."""

from collections.abc import Callable, Sequence
from pathlib import Path

from tightrope.backends.errors import BackendError, DoesNotFit
from tightrope.backends.files.foreign import PICKLES, check_is_no_ggml, model_files, names_in
from tightrope.backends.planning import CACHE_NAMES, CacheChoice, Chosen, DeviceShare, Outline
from tightrope.backends.protocol import Backend
from tightrope.backends.settings import ModelSettings
from tightrope.backends.warming import Warmed


def claims(path: Path) -> Path | None:
    """Any file, as what it holds is checked when it is read; or the one model in a folder of GGUF files.

    Raises BackendError for files that tell by name or start that they are something else, and where there are several.
    """
    if path.is_dir():
        models = model_files(names_in(path))
        if len(models) > 1:
            raise BackendError(f"{path}: holds {len(models)} GGUF models, name one of them: {', '.join(models)}")
        return path / models[0] if models else None
    check_is_no_ggml(path)
    if path.suffix in PICKLES:
        raise BackendError(f"{path}: pickled weights can run code when they are read; convert the model to safetensors")
    return path


def open_model(path: Path, settings: ModelSettings, progress: Callable[[float], None]) -> Backend:
    """See BackendPackage."""
    from tightrope.backends.gguf.backend import GGUFBackend

    return GGUFBackend(path, settings, progress)


def warm(
    path: Path, settings: ModelSettings, architectures: Sequence[int], progress: Callable[[float], None]
) -> list[Warmed]:
    """See BackendPackage."""
    raise BackendError(f"{path}: a GGUF file needs no warming: llama.cpp's kernels were compiled when it was built")


def outline(
    path: Path, settings: ModelSettings, memory_bytes: int | None, device_bytes: tuple[int, ...] | None = None
) -> Outline:
    """See BackendPackage."""
    from tightrope.backends.gguf import plan as gguf
    from tightrope.backends.gguf.adapters import room_for_adapters
    from tightrope.backends.gguf.cache_types import CACHE_TYPES
    from tightrope.backends.gguf.layout import Layout, memory_of
    from tightrope.backends.gguf.model_file import notes_on, read_model
    from tightrope.backends.gguf.rope import plan_rope
    from tightrope.backends.gguf.trial import try_load

    header = read_model(path, settings)
    memory = memory_of(settings, memory_bytes, device_bytes)
    adapter_bytes = room_for_adapters(settings, header)
    layout = Layout.of(settings, header, memory, adapter_bytes)
    window = settings.max_model_len or plan_rope(settings.rope, layout.shape).window
    chosen, refusal = None, None
    shares: tuple[DeviceShare, ...] = ()
    try:
        plan = gguf.make_plan(settings, header, memory, adapter_bytes)
        size = int(plan.num_cells * layout.token_bytes(plan.cache_type))
        notes = plan.notes + notes_on(settings) + header.notes + try_load(path, gguf.context_options(settings, plan))
        chosen = Chosen(plan.cache_type.name, plan.num_cells, size, notes, plan.step_tokens)
        window = plan.window
        shares = gguf.device_shares(plan)
    except DoesNotFit as error:
        try_load(path, gguf.least_options())
        refusal = str(error)
    kinds = [CACHE_TYPES[name] for name in CACHE_NAMES]
    is_on_cards = layout.num_on_cards > 0
    workspace = layout.card_workspace_bytes(window, kinds[0]) if is_on_cards else layout.workspace_bytes(window)
    return Outline(
        path=path,
        architecture=layout.shape.architecture,
        format="gguf",
        memory_bytes=layout.usable_bytes,
        weight_bytes=layout.card_weight_bytes if is_on_cards else header.weight_bytes + adapter_bytes,
        workspace_bytes=workspace,
        trained_len=layout.shape.trained_len,
        window=window,
        caches=tuple(
            CacheChoice(
                kind.name, layout.token_bytes(kind), window * layout.token_bytes(kind), layout.fitting_tokens(kind)
            )
            for kind in kinds
        ),
        chosen=chosen,
        refusal=refusal,
        device=layout.device,
        host_bytes=layout.host_weight_bytes if is_on_cards else 0,
        shares=shares,
    )
