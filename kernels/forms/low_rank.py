"""Low-rank additions to linears, a different one for each row of a step: their form in memory.

Source: Hu et al. 2021, "LoRA: Low-Rank Adaptation of Large Language Models", arXiv 2106.09685.
"""

import math
from dataclasses import dataclass

import torch
from torch import Tensor

NONE = -1  # The slot of rows without an adapter.


@dataclass(frozen=True, slots=True)
class LowRankPart:
    """An addition to outputs first .. first + N of a linear: (x @ down.T) @ up, scaled.

    down [r, K]; up [r, N], with the adapter's own scaling in it; both of one dtype, float32, bfloat16 or float16.
    """

    first: int
    down: Tensor
    up: Tensor


@dataclass(frozen=True, slots=True, eq=False, weakref_slot=True)
class LowRank:
    """What one adapter adds to one linear, which may be several on the same input, side by side."""

    parts: tuple[LowRankPart, ...]

    @property
    def num_bytes(self) -> int:
        return sum(part.down.nbytes + part.up.nbytes for part in self.parts)

    def to(self, device: torch.device) -> "LowRank":
        """The same in the memory of `device`."""
        return LowRank(tuple(LowRankPart(p.first, p.down.to(device), p.up.to(device)) for p in self.parts))


@dataclass(frozen=True, slots=True, weakref_slot=True)
class AdapterRows:
    """Which adapter each of T rows uses, and how much of it: slots [T] int32, NONE without; scales [T] float32."""

    slots: Tensor
    scales: Tensor
    present: tuple[int, ...]  # The slots in use, ascending.

    def at(self, rows: Tensor) -> "AdapterRows":
        """Those of rows [n] int64 alone."""
        return AdapterRows(self.slots[rows], self.scales[rows], self.present)

    def to(self, device: torch.device) -> "AdapterRows":
        """The same in the memory of `device`."""
        return AdapterRows(self.slots.to(device), self.scales.to(device), self.present)

    def check(self, num_rows: int, name: str) -> None:
        """Raises RuntimeError where a module is given other rows than these are."""
        if num_rows != len(self.slots):
            raise RuntimeError(f"{name} runs on a part of the step, where it can't be adapted")


def make_low_rank(pieces: "list[tuple[int, Tensor, Tensor, float]]", dtype: torch.dtype) -> LowRank:
    """Of (first output, A [r, K], B [N, r], scaling) each, as files have them."""
    return LowRank(
        tuple(
            LowRankPart(first, a.to(dtype).contiguous(), (b.float().T * scaling).to(dtype).contiguous())
            for first, a, b, scaling in pieces
        )
    )


def balanced(down: Tensor, up: Tensor, scaling: float) -> tuple[Tensor, Tensor]:
    """The same product with numbers of about the same size in both, so that sixteen bits hold them well.

    down [r, K], up [N, r], both float32; `scaling` will be multiplied into `up` later.
    """
    sizes = down.abs().max().item(), up.abs().max().item() * abs(scaling)
    if not all(sizes):
        return down, up
    shift = 2.0 ** round(math.log2(sizes[1] / sizes[0]) / 2)
    return down * shift, up / shift
