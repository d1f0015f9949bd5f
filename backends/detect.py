"""Which backend serves a model, by what its files hold."""

from collections.abc import Callable
from pathlib import Path

from tightrope.backends.errors import BackendError
from tightrope.backends.locate import locate
from tightrope.backends.protocol import Backend
from tightrope.backends.settings import ModelSettings


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
    if not path.is_file():
        raise BackendError(f"{path}: no such file; name a .gguf file, a model's folder, or a hub id org/name")
    if path.suffix in (".safetensors", ".json"):
        raise BackendError(f"{path}: a part of a model; name its folder, {path.absolute().parent}")
    if path.suffix in (".bin", ".pt", ".pth", ".ckpt"):
        raise BackendError(f"{path}: pickled weights can run code when they are read; convert the model to safetensors")
    return path  # what it holds is checked when it is read


def _in_folder(folder: Path) -> Path:
    files = sorted(folder.glob("*.gguf"))
    models = [f for f in files if "-of-" not in f.stem or "-00001-of-" in f.stem]
    models = [f for f in models if not f.name.startswith("mmproj")]  # the image half of a vision model
    if any(not f.name.startswith("adapter_") for f in folder.glob("*.safetensors")):  # of a LoRA, which is no model
        return folder
    if len(models) == 1:
        return models[0]
    if models:
        names = ", ".join(f.name for f in models)
        raise BackendError(f"{folder}: holds {len(models)} GGUF models, name one of them: {names}")
    if (folder / "config.json").is_file():
        return folder  # what is missing is said by the one who looks for it
    raise BackendError(f"{folder}: holds neither a .gguf file nor a Hugging Face model")
