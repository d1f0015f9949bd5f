"""How torch's allocator takes a card's memory: in segments, larger than the tensors that are put into them.

Source of the sizes: PyTorch 2.11 to 2.13, c10/cuda/CUDACachingAllocator.cpp.
"""

from bisect import bisect_left, insort
from collections.abc import Iterable

ROUND = 512  # Bytes; every block has a multiple of them.
SMALL = 1 << 20  # Up to so many bytes a block is small: such blocks share segments of SMALL_SEGMENT.
SMALL_SEGMENT = 2 << 20
MIDDLE = 10 << 20  # Below it blocks share segments of MIDDLE_SEGMENT; from it on each has one, of whole LARGE_ROUND.
MIDDLE_SEGMENT = 20 << 20
LARGE_ROUND = 2 << 20


def held_bytes(sizes: Iterable[int]) -> int:
    """What tensors of these sizes take from the card, in bytes: allocated in this order from nothing, none freed."""
    held = 0
    free: dict[bool, list[int]] = {True: [], False: []}  # Sizes that are left over in segments, rising; small or not.
    for size in filter(None, sizes):
        block = -(-size // ROUND) * ROUND
        is_small = block <= SMALL
        left = free[is_small]
        place = bisect_left(left, block)
        if place < len(left):
            room = left.pop(place)
        else:
            room = _segment(block)
            held += room
        if room - block >= (ROUND if is_small else SMALL + 1):  # Less stays with the block.
            insort(left, room - block)
    return held


def _segment(block: int) -> int:
    """Bytes of the segment that is taken from the card for a block."""
    if block <= SMALL:
        return SMALL_SEGMENT
    return MIDDLE_SEGMENT if block < MIDDLE else -(-block // LARGE_ROUND) * LARGE_ROUND
