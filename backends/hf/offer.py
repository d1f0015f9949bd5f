"""What the registry asks of this backend: which paths are its own, what they need, and to open them."""

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from tightrope.backends.errors import BackendError
from tightrope.backends.files.foreign import CONSOLIDATED, names_in
from tightrope.backends.planning import Outline
from tightrope.backends.protocol import Backend
from tightrope.backends.settings import ModelSettings
from tightrope.backends.warming import Warmed

if TYPE_CHECKING:
    from tightrope.backends.hf.load.inspection import Inspect


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
    from tightrope.backends.hf.outlining import outline_folder

    return outline_folder(folder, settings, memory_bytes, device_bytes, inspect)
