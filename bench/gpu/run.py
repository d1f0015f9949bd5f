"""What every slice is given, and the rows that it gives."""

import os
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass
from functools import cached_property

import torch

from bench.gpu.listing.cards import CARDS
from bench.gpu.timing import memory_bandwidth, processor_cycles
from tightrope.kernels import dispatch

RTX_3090 = next(card for card in CARDS if card.name == "RTX 3090")
BYTES_A_CYCLE = RTX_3090.bandwidth / (RTX_3090.num_processors * RTX_3090.clock)  # that each multiprocessor is delivered

Row = dict[str, object]  # `holds` says whether what it tells is right, and as fast as its bar


@dataclass(frozen=True)
class Run:
    """Where a slice runs. A smoke run goes through all of it at tiny sizes, and holds nothing to a bar of speed."""

    device: torch.device
    is_smoke: bool

    @cached_property
    def bandwidth(self) -> float:
        """Bytes a second that a copy moves in the device's memory."""
        return memory_bandwidth(self.device, 1 << (20 if self.is_smoke else 31))

    @property
    def repeats(self) -> int:
        """How often work is timed."""
        return 1 if self.is_smoke else 20

    def judged(self, num_bytes: int, seconds: float, bar: float | None) -> Row:
        """Work in which `num_bytes` are read, held to `bar`, a share of the memory's bandwidth.

        Multiprocessors of cards with faster memory have fewer cycles for each byte, which may be too few for any
        kernel. There the bar is met in cycles: `share_3090` of its bandwidth an RTX 3090 would reach in as many.
        """
        reached = num_bytes / seconds / self.bandwidth
        row: Row = {"share": reached, "bar": bar}
        if self.device.type == "cuda":
            of_3090 = num_bytes / seconds / processor_cycles(self.device) / BYTES_A_CYCLE
            row["share_3090"] = of_3090
            reached = max(reached, of_3090)
        return row | {"holds": self.is_smoke or bar is None or reached >= bar}

    def describe(self) -> Row:
        if self.device.type != "cuda":
            return {"name": "cpu"}
        card = torch.cuda.get_device_properties(self.device)
        return {
            "name": card.name,
            "multiprocessors": card.multi_processor_count,
            "memory_gib": round(card.total_memory / 2**30, 1),
            "cuda": torch.version.cuda,
        }


def tried(row: Row, work: Callable[[], Row]) -> Row:
    """`row` with what the work adds to it, or with the reason why it failed: other rows are measured all the same."""
    try:
        return row | work()
    except Exception as error:  # whatever a kernel raises when it is compiled or launched
        return row | {"failed": reason(error), "holds": False}


def compile_ahead(works: Sequence[Callable[[], object]]) -> int:
    """Compile on all cores what the works launch; one after the other would take minutes. Returns how many were new.

    A kernel that can't be compiled is told where it is used.
    """
    with dispatch.gathered() as launches:
        for work in works:
            with suppress(Exception):  # what is noted doesn't run, and may leave numbers that nobody expects
                work()
    with suppress(RuntimeError):
        return dispatch.compile_all(launches, len(os.sched_getaffinity(0)), lambda done: None)
    return 0


def reason(error: BaseException) -> str:
    """One line of an error."""
    return f"{type(error).__name__}: {str(error).strip().partition(os.linesep)[0][:300]}"


def compared(found: torch.Tensor, wanted: torch.Tensor, bound: float) -> Row:
    """The largest difference as a share of the largest number wanted."""
    error = ((found.double() - wanted.double()).abs().max() / wanted.double().abs().max()).item()
    return {"error": error, "bound": bound, "holds": error <= bound}
