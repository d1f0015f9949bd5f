"""Ranks of one machine, processes that have a part of a model each, as the kernels of a CPU know them."""

from collections.abc import Sequence
from dataclasses import dataclass

from torch import Tensor

ARRIVAL_BYTES = 128  # Of each rank, as in cpu/meet.h.
BUFFER_BYTES = 8 << 20  # Of each of two buffers: a row of logits of any vocabulary fits.


@dataclass(frozen=True, slots=True, eq=False, weakref_slot=True)
class SharedRanks:
    """One rank, and the memory by which it meets the others; it is used by one thread at a time.

    memory: uint8 of shared_bytes(count), shared by all ranks and zero at first. spins: how often a rank looks for
    another before it sleeps, some 20 nanoseconds each.
    """

    memory: Tensor
    rank: int
    count: int
    spins: int


def shared_bytes(count: int) -> int:
    """Bytes of the memory that `count` ranks share."""
    return ARRIVAL_BYTES * count + 2 * BUFFER_BYTES


@dataclass(frozen=True, slots=True)
class LayerSplit:
    """The columns that each rank has of what a decoder layer makes, [count] each, and the ranks that gather them.

    In the order of the layer: attended heads, outputs of attention, gated columns within the MLP, its outputs. None:
    each rank has all of them, and nothing is gathered.
    """

    ranks: SharedRanks
    attended: Sequence[int] | None
    out: Sequence[int] | None
    middle: Sequence[int] | None
    down: Sequence[int] | None
