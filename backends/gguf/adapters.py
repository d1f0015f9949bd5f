"""Adapters of a GGUF model."""

from collections.abc import Callable
from pathlib import Path

from tightrope.backends.errors import BackendError


class GGUFAdapters:
    """An AdapterStore that holds none."""

    def prepare(self, name: str, path: Path) -> Callable[[], None]:
        raise BackendError(f"{path}: adapters can be used with a model's folder, not with a GGUF file")

    def remove(self, name: str) -> None:
        """Nothing is there."""
