"""From what a person names to a model that embeds or ranks, and to what it takes."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from tightrope.backends.detect import find_model
from tightrope.backends.embedding.protocol import Embedder
from tightrope.backends.errors import BackendError
from tightrope.backends.locate import locate
from tightrope.backends.settings import ModelSettings
from tightrope.backends.threads import compute_threads

OPTION = "--embedding-model"
# What the process itself takes, with the libraries of its kind. `python -m bench.embedding` measures it.
_GGUF_BYTES, _FOLDER_BYTES = 48 << 20, 320 << 20


@dataclass(frozen=True, slots=True)
class Footprint:
    """What one model takes of the machine's memory, in bytes."""

    path: Path
    kind: str
    weight_bytes: int
    workspace_bytes: int


def open_embedders(settings: ModelSettings) -> list[Embedder]:
    """Load all models that the settings name. Raises BackendError, naming the option, for the first that can't be."""
    threads = compute_threads(settings.threads)
    opened: list[Embedder] = []
    for path in _paths(settings):
        opened.append(_open(path, settings.embedding.max_tokens, threads))
        names = [embedder.card.model_id for embedder in opened]
        if names.count(names[-1]) > 1:
            raise BackendError(f"{OPTION}: two models are called {names[-1]!r}; rename the file or folder of one")
    return opened


def footprints(settings: ModelSettings) -> list[Footprint]:
    """What the models take, from their headers alone. Raises BackendError as `open_embedders` does."""
    return [_footprint(path, settings.embedding.max_tokens) for path in _paths(settings)]


def taken_bytes(found: Sequence[Footprint]) -> int:
    """All that their process takes."""
    if not found:
        return 0
    base = _GGUF_BYTES if all(_is_gguf(one.path) for one in found) else _FOLDER_BYTES
    return base + sum(one.weight_bytes + one.workspace_bytes for one in found)


def _paths(settings: ModelSettings) -> list[Path]:
    return [find_model(locate(name, None, settings.hub_cache)) for name in settings.embedding.models]


def _is_gguf(path: Path) -> bool:
    return not path.is_dir()


def _open(path: Path, max_tokens: int, threads: int) -> Embedder:
    """The libraries of one kind alone are loaded: those of the other take hundreds of MiB."""
    try:
        if _is_gguf(path):
            from tightrope.backends.embedding.gguf import GGUFEmbedder

            return GGUFEmbedder(path, max_tokens, threads)
        from tightrope.backends.embedding.folder import FolderEmbedder

        return FolderEmbedder(path, max_tokens, threads)
    except BackendError as error:
        raise BackendError(f"{OPTION}: {error}") from None


def _footprint(path: Path, max_tokens: int) -> Footprint:
    from tightrope.backends.embedding.folder_files import VectorFolder

    try:
        if _is_gguf(path):
            from tightrope.backends.embedding.gguf_file import VectorFile

            file = VectorFile.read(path, max_tokens)
            return Footprint(path, file.kind, file.header.weight_bytes, file.workspace_bytes)
        folder = VectorFolder.read(path, max_tokens)
        return Footprint(path, folder.kind, folder.weight_bytes, folder.workspace_bytes)
    except BackendError as error:
        raise BackendError(f"{OPTION}: {error}") from None
