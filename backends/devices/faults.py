"""Why a card that is there can't be used, and what would help: one clause for the line that a person reads."""

import os
import warnings
from pathlib import Path

import torch

from tightrope.backends.devices import toolchain
from tightrope.backends.devices.host import Host
from tightrope.kernels import dispatch
from tightrope.kernels.trial import run as trial

# The oldest driver for each CUDA that torch is built for. Source: CUDA Toolkit release notes, "CUDA Toolkit and Minimum
# Required Driver Version for CUDA Minor Version Compatibility".
OLDEST_DRIVER = {12: 525, 13: 580}
_ERRORS = (RuntimeError, AssertionError, torch.cuda.DeferredCudaCallError)  # What torch raises where CUDA can't begin.


def num_cards() -> int:
    """How many cards torch can use; it warns where it can't for a fault, which is told better by `no_cards`."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return torch.cuda.device_count() if torch.cuda.is_available() else 0


def no_cards(host: Host) -> str:
    """Why torch finds no card on a machine."""
    if not host.has_card:
        return "there is no NVIDIA card on this machine"
    if torch.version.cuda is None:
        build = "install torch's build for CUDA, as make serve DEVICE=cuda does"
        return f"torch {torch.__version__} is built without CUDA: {build}"
    return _driver(host) or _nodes(host) or _torch()


def _driver(host: Host) -> str | None:
    built, cuda = torch.version.cuda or "", int((torch.version.cuda or "0").partition(".")[0])
    oldest = OLDEST_DRIVER.get(cuda, max(OLDEST_DRIVER.values()))
    package = f"driver {oldest} or newer (nvidia-driver-{oldest} on Debian and Ubuntu)"
    if host.is_wsl:
        return None
    if host.driver is None:
        return f"no NVIDIA driver is loaded: install {package}"
    version = int(host.driver.partition(".")[0])
    if version >= oldest:
        return None
    others = [str(older) for older, driver in OLDEST_DRIVER.items() if driver <= version]
    other = f", or a torch built for CUDA {others[-1]}" if others else ""
    return (
        f"its driver {host.driver} is too old for torch {torch.__version__}, which is built for CUDA {built}: install "
        f"{package}{other}"
    )


def _nodes(host: Host) -> str | None:
    if host.is_wsl:
        return None
    if not host.nodes:
        return "/dev/nvidia0 is not there: start the container with --gpus all, or load the driver (modprobe nvidia)"
    closed = [node for node in host.nodes if not os.access(node, os.R_OK | os.W_OK)]
    if closed:
        return f"{closed[0]} may not be opened by this user: add the user to the group {_group(closed[0])}"
    if not host.has_memory_node:
        return "/dev/nvidia-uvm is not there: load it (modprobe nvidia-uvm)"
    return None


def _group(path: Path) -> str:
    try:
        return path.group()
    except (OSError, KeyError):  # Nobody has given that number a name.
        return "that it belongs to"


def _torch() -> str:
    """In torch's own words, which are those of the driver."""
    try:
        torch.cuda.init()
    except _ERRORS as error:
        return f"torch finds none: {_first_line(error)} (CUDA_VISIBLE_DEVICES may hide it)"
    return "torch finds none; CUDA_VISIBLE_DEVICES may hide it"


def of_card(device: torch.device) -> str | None:
    """Why a card that torch finds can't be used; None where a kernel of torch and one of Triton run on it.

    The latter is compiled the first time, in a second or two, and found in Triton's cache after that.
    """
    name = str(device)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # Of a card that torch isn't built for it warns in several lines.
            major, minor = torch.cuda.get_device_capability(device)
            name = f"{torch.cuda.get_device_name(device)} (sm_{major}{minor})"
            torch.ones(1, device=device).add_(1).cpu()
    except _ERRORS as error:
        built = " ".join(torch.cuda.get_arch_list())
        return f"torch {torch.__version__}, built for {built}, fails on {name}: {_first_line(error)}"
    try:
        torch.cuda.set_device(device)  # Triton launches on the thread's own.
        first = trial.launch(device)
    except Exception as error:  # Whatever it is, the card can't be used, and a person is told.
        return _no_launch(error)
    return None if first.holds else f"{name} computes wrong numbers: {first.describe()}"


def _no_launch(error: Exception) -> str:
    if isinstance(error, ModuleNotFoundError) and (error.name or "").partition(".")[0] == "triton":
        return f"Triton is not installed: pip install {toolchain.triton_of_torch()}"
    if (missing := toolchain.missing()) is not None:  # Of no account where the cache has all that is to be compiled.
        return f"Triton can't launch a kernel: {missing}"
    unkept = None if isinstance(error, ImportError) else dispatch.why_not_kept(error)
    return f"Triton can't launch a kernel: {unkept or _first_line(error)}"


def _first_line(error: BaseException) -> str:
    return str(error).strip().partition("\n")[0] or type(error).__name__
