"""From what a person names to the model that is meant, and to the backend that serves it."""

from collections.abc import Callable, Sequence
from pathlib import Path

from tightrope.backends.errors import BackendError
from tightrope.backends.files.foreign import check_is_no_ggml, names_in, no_weights
from tightrope.backends.locate import locate
from tightrope.backends.planning import Outline
from tightrope.backends.protocol import Backend
from tightrope.backends.registry import BACKENDS, BackendPackage
from tightrope.backends.settings import ModelSettings
from tightrope.backends.warming import Warmed

MOST_FOLDERS = 200  # A model is looked for in at most so many, to name it; it is never taken unasked.


def open_backend(settings: ModelSettings, progress: Callable[[float], None]) -> Backend:
    """Find and load the model that `settings` names; `progress` is called with the share loaded, 0 to 1.

    Raises BackendError with one line for the person who named it.
    """
    package, path = find_claim(locate(settings.model, settings.revision, settings.hub_cache))
    return package.open_model(path, settings, progress)


def outline(settings: ModelSettings, memory_bytes: int | None, device_bytes: tuple[int, ...] | None = None) -> Outline:
    """Read the headers of the model that `settings` names, and plan.

    memory_bytes: a size of the machine's memory that may be used up; None is what is free, of which `serve` leaves a
    share. device_bytes: what is free on each card to plan for, as its driver says while a context is open; None means
    those that are here. Raises BackendError for a model or setting that can't be; a plan that doesn't fit is no error.
    """
    if device_bytes is not None and settings.device == "cpu":
        cards = "cards that --devices or --device-memory names"
        raise BackendError(f"--device cpu and {cards} contradict each other; give only one of them")
    package, path = find_claim(locate(settings.model, settings.revision, settings.hub_cache))
    return package.outline(path, settings, memory_bytes, device_bytes)


def warm(settings: ModelSettings, architectures: Sequence[int], progress: Callable[[float], None]) -> list[Warmed]:
    """Compile the kernels that serving the model takes for these cards, 86 for sm_86, or without any for the one here.

    `progress` is called with the share done. Raises BackendError in one line for a model or a card that can't be.
    """
    package, path = find_claim(locate(settings.model, settings.revision, settings.hub_cache))
    return package.warm(path, settings, architectures, progress)


def find_model(path: Path) -> Path:
    """The model that a path means: a file or a folder. Raises BackendError as `find_claim` does."""
    return find_claim(path)[1]


def find_claim(path: Path) -> tuple[BackendPackage, Path]:
    """The model that a path means, and who serves it.

    A folder with both means its safetensors: a GGUF file beside them is served when it is named itself. Raises
    BackendError when there is no model, or when there are several.
    """
    if not path.exists() and not path.is_symlink():
        raise BackendError(f"{path}: no such file; name a .gguf file, a model's folder, or a hub id org/name")
    for package in BACKENDS:
        if (model := package.claims(path)) is not None:
            return package, model
    raise _no_model(path)


def _no_model(folder: Path) -> BackendError:
    """Why nobody claims a folder."""
    names = names_in(folder)
    for name in names:
        if name.endswith(".bin"):
            check_is_no_ggml(folder / name)
    reason = no_weights(folder, names)
    return reason or BackendError(f"{folder}: holds neither a .gguf file nor a Hugging Face model{_below(folder)}")


def _below(folder: Path) -> str:
    """A hint for a person who named the folder above: which one below it holds a model."""
    for pattern in ("*/config.json", "*/*.gguf", "snapshots/*/config.json", "snapshots/*/*.gguf"):
        for _, path in zip(range(MOST_FOLDERS), folder.glob(pattern), strict=False):
            return f"; {path.parent} seems to"
    if (config := next(folder.glob("*/adapter_config.json"), None)) is not None:
        return f"; {config.parent} is a LoRA adapter, to be named with --lora beside the model that it was made for"
    return ""
