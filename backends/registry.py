"""The backends. Adding one takes a package with a module `offer`, and a line here."""

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Protocol

from tightrope.backends.hf import offer as hf
from tightrope.backends.own_gguf import offer as gguf
from tightrope.backends.planning import Outline
from tightrope.backends.protocol import Backend
from tightrope.backends.settings import ModelSettings
from tightrope.backends.warming import Warmed


class BackendPackage(Protocol):
    """A backend's module `offer`, which loads the libraries of its models only to outline or open one."""

    def claims(self, path: Path) -> Path | None:
        """The model that an existing path means, by names of files alone; None where another backend's may be there.

        Raises BackendError for what is surely meant for this backend and can't be served.
        """

    def outline(
        self, path: Path, settings: ModelSettings, memory_bytes: int | None, device_bytes: tuple[int, ...] | None = None
    ) -> Outline:
        """Read the headers of a model that `claims` gave, and plan: see the function `outline`."""

    def open_model(self, path: Path, settings: ModelSettings, progress: Callable[[float], None]) -> Backend:
        """Load such a model: see the function `open_backend`."""

    def warm(
        self, path: Path, settings: ModelSettings, architectures: Sequence[int], progress: Callable[[float], None]
    ) -> list[Warmed]:
        """Compile such a model's kernels: see the function `warm`."""


# Where a folder holds files of several, the first backend that claims it serves it.
BACKENDS: tuple[BackendPackage, ...] = (
    hf,
    gguf,
)
