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
    path = find_gguf(locate(settings.model, settings.revision))
    from tightrope.backends.gguf.backend import GGUFBackend  # loads llama.cpp: only once it is known to be needed

    return GGUFBackend(path, settings, progress)


def find_gguf(path: Path) -> Path:
    """The GGUF file that a path means: itself, or the one model in a folder. Raises BackendError otherwise."""
    if path.is_dir():
        return _in_folder(path)
    if not path.is_file():
        raise BackendError(f"{path}: no such file; name a .gguf file, a folder that holds one, or a hub id org/name")
    return path  # what it holds is checked when it is read


def _in_folder(folder: Path) -> Path:
    files = sorted(folder.glob("*.gguf"))
    models = [f for f in files if "-of-" not in f.stem or "-00001-of-" in f.stem]
    models = [f for f in models if not f.name.startswith("mmproj")]  # the image half of a vision model
    if len(models) == 1:
        return models[0]
    if models:
        names = ", ".join(f.name for f in models)
        raise BackendError(f"{folder}: holds {len(models)} GGUF models, name one of them: {names}")
    if any(folder.glob("*.safetensors")) or (folder / "config.json").is_file():
        raise BackendError(f"{folder}: holds a Hugging Face model; this version serves GGUF files")
    raise BackendError(f"{folder}: holds no .gguf file")
