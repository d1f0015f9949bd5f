"""Low-rank additions to linears, a different one for each row of a step: their form in memory.

Source: Hu et al. 2021, "LoRA: Low-Rank Adaptation of Large Language Models", arXiv 2106.09685.
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass, replace

import torch
from torch import Tensor

NONE = -1  # The slot of rows without an adapter.
FEWEST_SLOTS, FEWEST_RANKS = 4, 16  # A table has room for so many, so that it seldom has to be made anew.


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


@dataclass(frozen=True, slots=True, eq=False)
class LowRankTable:
    """Where a card's low-rank matrices lie, so that a kernel finds those of each row's slot by itself.

    `where` [S, P, 5] int64: of P parts of slots 0 .. S the addresses of down and up, rank, first output and number of
    outputs; the rank is zero where there is none. No part has more than `most_rank` and `most_outputs`; all are of one
    dtype. A slot's row may be written anew at any time, also while a recorded step that reads the table is kept.
    """

    where: Tensor
    most_rank: int
    most_outputs: int
    dtype: torch.dtype

    @classmethod
    def of(cls, adapters: Mapping[int, LowRank]) -> "LowRankTable":
        """A table of these, with room for more; there is at least one."""
        parts = [part for low_rank in adapters.values() for part in low_rank.parts]
        num_slots = max(FEWEST_SLOTS, 1 << max(adapters).bit_length())
        num_parts = max(len(low_rank.parts) for low_rank in adapters.values())
        most_rank = max(FEWEST_RANKS, 1 << max(part.up.shape[0] - 1 for part in parts).bit_length())
        where = torch.zeros(num_slots, num_parts, 5, dtype=torch.int64, device=parts[0].up.device)
        table = cls(where, most_rank, max(part.up.shape[1] for part in parts), parts[0].up.dtype)
        for slot, low_rank in adapters.items():
            assert table.has_room(slot, low_rank)
            table.write(slot, low_rank)
        return table

    def has_room(self, slot: int, low_rank: LowRank) -> bool:
        """Whether a slot can be written without another table."""
        num_slots, num_parts, _ = self.where.shape
        are_small = all(
            part.up.shape[0] <= self.most_rank and part.up.shape[1] <= self.most_outputs and part.up.dtype == self.dtype
            for part in low_rank.parts
        )
        return slot < num_slots and len(low_rank.parts) <= num_parts and are_small

    def write(self, slot: int, low_rank: LowRank | None) -> None:
        """Have a slot's row tell of `low_rank`, which must stay where it is; None: of nothing."""
        rows = torch.zeros(self.where.shape[1:], dtype=torch.int64)
        for i, part in enumerate(() if low_rank is None else low_rank.parts):
            rank, num_outputs = part.up.shape
            entries = (part.down.data_ptr(), part.up.data_ptr(), rank, part.first, num_outputs)
            rows[i] = torch.tensor(entries, dtype=torch.int64)
        self.where[slot].copy_(rows)


class LowRankSlots(dict[int, LowRank]):
    """What adapters add to one linear, by slot. `table` tells a card's kernels; change it by `put` and `drop` alone."""

    table: LowRankTable | None = None

    def put(self, slot: int, low_rank: LowRank) -> bool:
        """Fill a slot. True: kernels are launched otherwise from now on, so that recorded steps must be made anew."""
        was_empty = not self
        self[slot] = low_rank
        if low_rank.parts[0].up.is_cpu:
            return False
        if self.table is not None and self.table.has_room(slot, low_rank):
            self.table.write(slot, low_rank)
            return was_empty  # Nothing is launched for an empty one.
        self.table = LowRankTable.of(self)
        return True

    def drop(self, slot: int) -> None:
        """Empty a slot, if it is filled."""
        if self.pop(slot, None) is not None and self.table is not None:
            self.table.write(slot, None)


@dataclass(frozen=True, slots=True, weakref_slot=True)
class AdapterRows:
    """Which adapter each of T rows uses, and how much of it: slots [T] int32, NONE without; scales [T] float32.

    `launches` is the same for steps with adapters that launch the same kernels, whichever rows use which; None where
    what is launched depends on `present`.
    """

    slots: Tensor
    scales: Tensor
    present: tuple[int, ...]  # The slots in use, ascending.
    launches: int | None = None

    def at(self, rows: Tensor) -> "AdapterRows":
        """Those of rows [n] int64 alone."""
        return replace(self, slots=self.slots[rows], scales=self.scales[rows])

    def to(self, device: torch.device) -> "AdapterRows":
        """The same in the memory of `device`."""
        if self.slots.device == device:
            return self
        return replace(self, slots=self.slots.to(device), scales=self.scales.to(device))

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
