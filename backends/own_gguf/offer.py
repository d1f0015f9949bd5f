"""What the registry asks of GGUF files, which either of two engines runs."""

from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path

from tightrope.backends.errors import BackendError, DoesNotFit
from tightrope.backends.gguf import offer as gguf
from tightrope.backends.gguf.offer import claims as claims
from tightrope.backends.hf import offer as hf
from tightrope.backends.own_gguf.choice import choose, instead
from tightrope.backends.planning import Outline
from tightrope.backends.protocol import Backend
from tightrope.backends.settings import ModelSettings
from tightrope.backends.warming import Warmed


def open_model(path: Path, settings: ModelSettings, progress: Callable[[float], None]) -> Backend:
    """See BackendPackage."""
    choice = choose(path, settings)
    backend: Backend | None = None
    if choice.inspect is not None:
        from tightrope.backends.own_gguf.backend import open_own

        try:
            backend = open_own(path, settings, progress, choice.inspect)
        except DoesNotFit as error:
            if choice.is_asked:
                raise
            choice = instead(path, error)
    if backend is None:
        backend = gguf.open_model(path, settings, progress)
    backend.card = replace(backend.card, notes=(choice.line, *backend.card.notes))
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
    from tightrope.backends.gguf.model_file import read_model
    from tightrope.backends.gguf.trial import try_vocabulary

    read_model(path, settings)
    # Llama.cpp ends the process over some vocabularies, and what is planned for ends no server.
    choice = choose(path, settings, has_cards=device_bytes is not None, try_first=try_vocabulary)
    found: Outline | None = None
    if choice.inspect is not None:
        found = hf.outline(path, settings, memory_bytes, device_bytes, choice.inspect)
        if found.refusal is not None and not choice.is_asked:
            choice, found = instead(path, found.refusal), None
    if found is None:
        found = gguf.outline(path, settings, memory_bytes, device_bytes)
    if found.chosen is None:
        return found
    return replace(found, chosen=replace(found.chosen, notes=(choice.line, *found.chosen.notes)))
