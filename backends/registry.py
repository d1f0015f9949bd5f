"""Which backend serves a model, by what its files hold."""

from collections.abc import Callable
from pathlib import Path

from tightrope.backends.errors import BackendError
from tightrope.backends.files.foreign import CONSOLIDATED, PICKLES, check_is_no_ggml, model_files, no_weights
from tightrope.backends.locate import locate
from tightrope.backends.protocol import Backend
from tightrope.backends.settings import ModelSettings

MOST_FOLDERS = 200  # in which a model is looked for, to name it; it is never taken unasked


def open_backend(settings: ModelSettings, progress: Callable[[float], None]) -> Backend:
    """Find and load the model that `settings` names; `progress` is called with the share loaded, 0 to 1.

    Raises BackendError with one line for the person who named it.
    """
    path = find_model(locate(settings.model, settings.revision))
    # each backend loads libraries that the other doesn't need
    if path.is_dir():
        from tightrope.backends.hf.backend import HFBackend

        return HFBackend(path, settings, progress)
    from tightrope.backends.gguf.backend import GGUFBackend

    return GGUFBackend(path, settings, progress)


def find_model(path: Path) -> Path:
    """The GGUF file, or the folder of a Hugging Face model, that a path means.

    A folder with both means its safetensors: a GGUF file beside them is served when it is named itself. Raises
    BackendError when there is no model, or when there are several.
    """
    if path.is_dir():
        return _in_folder(path)
    if not path.exists() and not path.is_symlink():
        raise BackendError(f"{path}: no such file; name a .gguf file, a model's folder, or a hub id org/name")
    if path.suffix in (".safetensors", ".json"):
        raise BackendError(f"{path}: a part of a model; name its folder, {path.absolute().parent}")
    check_is_no_ggml(path)
    if path.suffix in PICKLES:
        raise BackendError(f"{path}: pickled weights can run code when they are read; convert the model to safetensors")
    return path  # what it holds is checked when it is read


def _in_folder(folder: Path) -> Path:
    try:
        names = sorted(entry.name for entry in folder.iterdir())
    except OSError as error:
        raise BackendError(f"{folder}: can't be read: {error.strerror or error}") from None
    weights = [name for name in names if name.endswith(".safetensors")]
    if any(not name.startswith(("adapter_", CONSOLIDATED)) for name in weights):
        return folder
    models = model_files(names)
    if len(models) == 1:
        return folder / models[0]
    if models:
        raise BackendError(f"{folder}: holds {len(models)} GGUF models, name one of them: {', '.join(models)}")
    for name in names:
        if name.endswith(".bin"):
            check_is_no_ggml(folder / name)
    if (reason := no_weights(folder, names)) is not None:
        raise reason
    raise BackendError(f"{folder}: holds neither a .gguf file nor a Hugging Face model{_below(folder)}")


def _below(folder: Path) -> str:
    """A hint for a person who named the folder above: which one below it holds a model."""
    for pattern in ("*/config.json", "*/*.gguf", "snapshots/*/config.json", "snapshots/*/*.gguf"):
        for _, path in zip(range(MOST_FOLDERS), folder.glob(pattern), strict=False):
            return f"; {path.parent} seems to"
    if (config := next(folder.glob("*/adapter_config.json"), None)) is not None:
        return f"; {config.parent} is a LoRA adapter, to be named with --lora beside the model that it was made for"
    return ""
