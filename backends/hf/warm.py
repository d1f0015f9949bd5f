"""The kernels of a folder's model, compiled by its headers and the little of its contents that sizes depend on."""

from collections.abc import Callable, Sequence
from pathlib import Path

import torch

from tightrope.backends.errors import BackendError
from tightrope.backends.hf.load.inspection import inspect
from tightrope.backends.hf.load.model import build
from tightrope.backends.hf.plan import cache_dtype, served_window
from tightrope.backends.hf.run.rotary import RotarySets
from tightrope.backends.hf.run.warmup import Steps, compile_kernels, gather
from tightrope.backends.settings import Dtype, ModelSettings
from tightrope.backends.threads import compute_threads
from tightrope.backends.warming import ARCHITECTURES, OLDEST_WITH_BFLOAT16, Warmed
from tightrope.kernels import dispatch

META = torch.device("meta")  # It stands for the card: the same modules and forms of weights, and no memory.


def warm_folder(
    folder: Path, settings: ModelSettings, architectures: Sequence[int], progress: Callable[[float], None]
) -> list[Warmed]:
    """See detect.warm."""
    if not dispatch.can_compile():
        raise BackendError("warm: Triton, which compiles kernels for cards, is not installed: pip install triton")
    chosen = architectures or [_architecture_here()]  # Before the folder is read, which takes seconds.
    steps_in: dict[Dtype, Steps] = {}
    done: list[Warmed] = []
    for architecture in chosen:
        dtype = _dtype_on(architecture, settings.dtype)
        if dtype not in steps_in:
            steps_in[dtype] = meta_steps(folder, settings.model_copy(update={"dtype": dtype}))
        with dispatch.standing_in(architecture):
            launches = gather(steps_in[dtype])
            num_compiled = compile_kernels(
                launches, compute_threads(settings.threads), lambda share: progress((len(done) + share) / len(chosen))
            )
        done.append(Warmed(architecture, len(launches), num_compiled, dispatch.compiled_folder()))
    return done


def meta_steps(folder: Path, settings: ModelSettings) -> Steps:
    """The steps of a folder's model as `serve` would run them on a card. Raises BackendError."""
    found = inspect(folder, settings, META)
    model = build(found.blueprint)
    window = served_window(settings, found.shape, found.rope)
    rotary = {name: RotarySets(spec, window, META) for name, spec in found.rope.items()}
    return Steps.of(settings, model, rotary, cache_dtype(settings), window)


def _dtype_on(architecture: int, asked: Dtype) -> Dtype:
    """What --dtype comes to on such a card: see activation_dtype. Raises BackendError for what it doesn't have."""
    if architecture >= OLDEST_WITH_BFLOAT16:
        return asked
    if asked == "bfloat16":
        raise BackendError(f"--dtype bfloat16: sm_{architecture} has none; take float16")
    return "float16" if asked == "auto" else asked


def _architecture_here() -> int:
    """That of this machine's card. Raises BackendError where there is none."""
    if not torch.cuda.is_available():
        known = ", ".join(f"sm_{number}" for number in ARCHITECTURES)
        raise BackendError(f"--arch: this machine has no card to compile for; name one: {known}")
    major, minor = torch.cuda.get_device_capability()
    return 10 * major + minor
