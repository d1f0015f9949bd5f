"""The device that a model runs on: as asked, and else the card where there is one that works."""

import logging

import torch

from tightrope.backends.devices import faults
from tightrope.backends.devices.host import Host, look
from tightrope.backends.devices.toolchain import version
from tightrope.backends.errors import BackendError
from tightrope.backends.memory import GIB

log = logging.getLogger("tightrope.devices")


def choose_device(asked: str, host: Host | None = None) -> torch.device:
    """The device that auto, cpu, cuda or cuda:N means; a card has its number, and is this thread's from now on.

    A kernel has been compiled and run on it. Where auto finds a card that can't be used, a line says why, and what
    would help. Raises BackendError with the same where the card was asked for.
    """
    host = look() if host is None else host
    device, fault = find_device(asked, host)
    if fault is not None and asked != "auto":
        raise BackendError(f"--device {asked}: {fault}")
    if fault is not None:
        if host.has_card:
            log.warning("device=cpu: there is an NVIDIA card, but %s; tightrope doctor tells more", fault)
        return torch.device("cpu")
    return device


def find_device(asked: str, host: Host) -> tuple[torch.device, str | None]:
    """The device that is meant, and why it can't be used, if it can't."""
    if asked == "cpu":
        return torch.device("cpu"), None
    device = torch.device("cuda", int(asked.partition(":")[2] or 0))
    count = faults.num_cards()
    if not count:
        return device, faults.no_cards(host)
    if device.index >= count:
        there = "1 card, cuda:0" if count == 1 else f"{count} cards, cuda:0 to cuda:{count - 1}"
        return device, f"torch finds {there}"
    return device, faults.of_card(device)


def has_bfloat16(device: torch.device) -> bool:
    """Whether a device computes in bfloat16, as cards since sm_80 do; one that isn't here counts as such."""
    if device.type != "cuda" or not torch.cuda.is_available():
        return True
    return torch.cuda.get_device_capability(device) >= (8, 0)


def describe_card(device: torch.device, host: Host) -> str:
    """A card in one line: what it is, and by what it is reached."""
    free, total = (size / GIB for size in torch.cuda.mem_get_info(device))
    major, minor = torch.cuda.get_device_capability(device)
    return (
        f"{device}, {torch.cuda.get_device_name(device)} (sm_{major}{minor}), {free:.1f} of {total:.1f} GiB free; "
        f"driver {host.driver or 'of Windows'}, CUDA {torch.version.cuda}, Triton {version('triton')}"
    )
