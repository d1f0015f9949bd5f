"""Which of the two engines runs a GGUF file, and why, in one line."""

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

from tightrope.backends.errors import BackendError
from tightrope.backends.settings import ModelSettings
from tightrope.backends.tensor_parallel import ALONE, Share

if TYPE_CHECKING:
    import torch

    from tightrope.backends.hf.load.inspection import Inspect, Inspection

_ON_A_CPU = "the torch engine runs such files on a CPU alone"


@dataclass(frozen=True, slots=True)
class Choice:
    """`inspect` is what the torch engine opens the file by; None where llama.cpp runs it. `line` says so."""

    line: str
    inspect: "Inspect | None"
    is_asked: bool  # Whether --gguf-engine names the engine; else the other may be taken where this one doesn't fit.

    @classmethod
    def own(cls, reason: str, inspect: "Inspect", *, is_asked: bool = False) -> "Choice":
        return cls(f"engine: the torch engine runs this GGUF file, as {reason}", inspect, is_asked)

    @classmethod
    def llama(cls, reason: str, *, is_asked: bool = False) -> "Choice":
        return cls(f"engine: llama.cpp runs this GGUF file, as {reason}", None, is_asked)


def choose(
    path: Path, settings: ModelSettings, *, has_cards: bool = False, try_first: Callable[[Path], object] | None = None
) -> Choice:
    """The engine that the settings name, or by what the file holds: ours where all of it is known, on a CPU.

    has_cards: whether the model is planned for cards. try_first: is called before the vocabulary is read in this
    process, which llama.cpp ends over some. Raises BackendError for what neither engine runs.
    """
    if settings.gguf_engine == "llama.cpp":
        return Choice.llama("--gguf-engine llama.cpp asks for", is_asked=True)
    if settings.gguf_engine == "auto":
        if has_cards or settings.gpu_layers or settings.device.startswith("cuda"):
            return Choice.llama(f"it is for a card, and {_ON_A_CPU}")
        if (unknown := _unknown(path, settings)) is not None:
            return Choice.llama(f"the torch engine does not: {unknown}")
        from tightrope.backends.devices.choice import choose_device
        from tightrope.kernels import dispatch

        if choose_device(settings.device).type != "cpu":
            return Choice.llama(f"there is a card, and {_ON_A_CPU}; --device cpu asks for it")
        if dispatch.fault() is not None:
            return Choice.llama("the torch engine is slow without C++ kernels; tightrope doctor says why none run")
    if try_first is not None:
        try_first(path)
    from tightrope.backends.own_gguf.inspection import inspect

    if settings.gguf_engine == "own":
        return Choice.own("--gguf-engine own asks for", inspect, is_asked=True)
    try:
        found = inspect(path, settings)
    except BackendError as error:
        return Choice.llama(f"the torch engine does not: {_said(path, error)}")
    reason = "it knows the architecture and all tensor types, and the device is a CPU"

    def once_more(
        path: Path, settings: ModelSettings, device: "torch.device | str" = "cpu", share: Share = ALONE, /
    ) -> "Inspection":
        return found if share == ALONE else inspect(path, settings, device, share)

    return Choice.own(reason, once_more)


def instead(path: Path, error: BackendError | str) -> Choice:
    """Llama.cpp, as the torch engine has too little memory for a file, which `error` tells."""
    return Choice.llama(f"the torch engine does not: {_said(path, error)}")


def _unknown(path: Path, settings: ModelSettings) -> str | None:
    """What of a file the torch engine doesn't know, as far as its header tells without transformers' classes."""
    from tightrope.backends.gguf.model_file import read_model
    from tightrope.backends.own_gguf.checkpoint import checkpoint_of, small_numbers
    from tightrope.backends.own_gguf.config import config_of

    header = read_model(path, settings)
    try:
        config_of(header, partial(small_numbers, header))
        checkpoint_of(header)
    except BackendError as error:
        return _said(path, error)
    return None


def _said(path: Path, error: BackendError | str) -> str:
    return str(error).removeprefix(f"{path}: ")
