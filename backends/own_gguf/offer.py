"""What the registry asks of GGUF files: which of the two engines runs one, said in one line with the reason."""

from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path

from tightrope.backends.errors import BackendError
from tightrope.backends.gguf import offer as gguf
from tightrope.backends.gguf.offer import claims as claims
from tightrope.backends.hf import offer as hf
from tightrope.backends.planning import Outline
from tightrope.backends.protocol import Backend
from tightrope.backends.settings import ModelSettings
from tightrope.backends.warming import Warmed

_OWN = "engine: the torch engine runs this GGUF file, as --gguf-engine own asks for"
_LLAMA = "engine: llama.cpp runs this GGUF file, as --gguf-engine llama.cpp asks for"
_USUAL = "engine: llama.cpp runs this GGUF file, as it does unless --gguf-engine own asks for the torch engine"


def open_model(path: Path, settings: ModelSettings, progress: Callable[[float], None]) -> Backend:
    """See BackendPackage."""
    if settings.gguf_engine == "own":
        from tightrope.backends.own_gguf.backend import open_own

        backend: Backend = open_own(path, settings, progress)
    else:
        backend = gguf.open_model(path, settings, progress)
    backend.card = replace(backend.card, notes=(_line(settings), *backend.card.notes))
    return backend


def warm(
    path: Path, settings: ModelSettings, architectures: Sequence[int], progress: Callable[[float], None]
) -> list[Warmed]:
    """See BackendPackage."""
    if settings.gguf_engine == "own":
        raise BackendError(f"{path}: with --gguf-engine own a GGUF file runs on a CPU, where nothing needs warming")
    return gguf.warm(path, settings, architectures, progress)


def outline(
    path: Path, settings: ModelSettings, memory_bytes: int | None, device_bytes: tuple[int, ...] | None = None
) -> Outline:
    """See BackendPackage."""
    if settings.gguf_engine == "own":
        from tightrope.backends.gguf.model_file import read_model
        from tightrope.backends.gguf.trial import try_vocabulary
        from tightrope.backends.own_gguf.inspection import inspect

        read_model(path, settings)
        try_vocabulary(path)  # llama.cpp ends the process over some, and what is planned for ends no server.
        found = hf.outline(path, settings, memory_bytes, device_bytes, inspect)
    else:
        found = gguf.outline(path, settings, memory_bytes, device_bytes)
    if found.chosen is None:
        return found
    return replace(found, chosen=replace(found.chosen, notes=(_line(settings), *found.chosen.notes)))


def _line(settings: ModelSettings) -> str:
    return {"own": _OWN, "llama.cpp": _LLAMA, "auto": _USUAL}[settings.gguf_engine]
