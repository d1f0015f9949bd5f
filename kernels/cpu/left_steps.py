"""A rank that can't end a step lets the others end theirs, in the memory by which ranks meet (cpu/meet.h).

It says there that it has left, and that it has come to all meetings of the step: who waits for it goes on, with numbers
that mean nothing. Behind the step the first rank sees who has left, and all count their meetings from one number again.
"""

import numpy as np
from numpy.typing import NDArray

from tightrope.kernels.cpu import structs
from tightrope.kernels.cpu.addresses import address
from tightrope.kernels.forms.ranks import ARRIVAL_BYTES, SharedRanks

_TURN, _LEFT = 0, 2  # Of an arrival's numbers: the meetings that its rank has come to, and whether it has left.
_AHEAD = 1 << 30  # More meetings than a step has; counted turns wrap around, and half of them are ahead.


def leave_step(ranks: SharedRanks) -> None:
    """See kernels.dispatch.leave_step, and so below."""
    mine = _arrivals(ranks)[ranks.rank]
    mine[_LEFT] = 1  # First: who goes on then sees it.
    mine[_TURN] = (_struct(ranks).turn + _AHEAD) % (1 << 32)


def has_any_left(ranks: SharedRanks) -> bool:
    return bool(_arrivals(ranks)[:, _LEFT].any())


def num_meetings(ranks: SharedRanks) -> int:
    turn: int = _struct(ranks).turn
    return turn


def meet_again(ranks: SharedRanks, num_meetings: int) -> None:
    mine = _arrivals(ranks)[ranks.rank]
    _struct(ranks).turn = mine[_TURN] = num_meetings
    mine[_LEFT] = 0


def _arrivals(ranks: SharedRanks) -> NDArray[np.uint32]:
    """Numbers [count, ...] in the shared memory."""
    memory: NDArray[np.uint32] = ranks.memory[: ranks.count * ARRIVAL_BYTES].numpy().view(np.uint32)
    return memory.reshape(ranks.count, -1)


def _struct(ranks: SharedRanks) -> structs.Ranks:
    """What the kernels have of this rank."""
    return structs.Ranks.from_address(address(ranks))
