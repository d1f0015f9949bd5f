"""A GGUF file opened by the torch engine, every float of it looked at while it loads."""

from collections.abc import Callable
from pathlib import Path

from tightrope.backends.errors import BackendError
from tightrope.backends.files.gguf.header import read_header
from tightrope.backends.gguf.values import ValueScan
from tightrope.backends.hf.backend import HFBackend
from tightrope.backends.hf.load.inspection import Inspect
from tightrope.backends.own_gguf.inspection import inspect
from tightrope.backends.settings import ModelSettings

SOURCE = inspect.__module__  # Where other ranks find a file, too.


def open_own(
    path: Path, settings: ModelSettings, progress: Callable[[float], None], inspect: Inspect = inspect
) -> HFBackend:
    """Load a file, calling `progress` with the share done. Raises BackendError, having freed everything."""
    with ValueScan(read_header(path)) as scan:
        backend = HFBackend(path, settings, progress, inspect, SOURCE)
        try:
            scan.finish()
        except BackendError:
            backend.close()
            raise
    return backend
