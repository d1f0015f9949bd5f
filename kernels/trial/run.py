"""Whether a device's kernels work: each kind of them once, beside the reference."""

import time
from collections.abc import Iterator
from dataclasses import dataclass

import torch

from tightrope.kernels.trial.cases import Case, cases, gated
from tightrope.kernels.trial.samples import Samples

# Of the largest number. A kernel that is compiled or run wrongly is off by as much as that; one in float16, which is
# what a card computes with here, by some thousandths.
BOUND = 1e-2


@dataclass(frozen=True, slots=True)
class Trial:
    """error: the largest difference, as a share of the largest number. seconds: of the first call, compiling included.

    failure: in one line, why the kernel did not run.
    """

    kernel: str
    error: float
    seconds: float
    failure: str | None = None

    @property
    def holds(self) -> bool:
        return self.failure is None and self.error <= BOUND  # NaN is no error that holds.

    def describe(self) -> str:
        return f"{self.kernel}: {self.failure or f'off by {self.error:.2g}, at most {BOUND:g}'}"


def run_all(device: torch.device) -> Iterator[Trial]:
    """Each as soon as it has run; kinds that the device has no kernel for are left out."""
    for name, case in cases(on_card=device.type == "cuda"):
        began = time.perf_counter()
        try:
            found = run_one(name, case, device)
        except Exception as error:  # The others may work, and a person wants to know which.
            reason = str(error).strip().partition("\n")[0]
            found = Trial(name, float("nan"), time.perf_counter() - began, f"{type(error).__name__}: {reason}")
        if found is not None:
            yield found


def launch(device: torch.device) -> Trial:
    """The smallest kernel: compiled where that is still to be done, and launched. Raises whatever that raises."""
    found = run_one("gated activation", gated, device)
    assert found is not None
    return found


def run_one(name: str, case: Case, device: torch.device) -> Trial | None:
    """None where the device has no such kernel."""
    began = time.perf_counter()
    pair = case(Samples(device, torch.float16 if device.type == "cuda" else torch.float32))
    if pair is None:
        return None
    found, wanted = (tensor.cpu().double() for tensor in pair)  # This waits for the card.
    seconds = time.perf_counter() - began
    return Trial(name, ((found - wanted).abs().max() / wanted.abs().max()).item(), seconds)
