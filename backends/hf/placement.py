"""Which layers go to which device: a pure function of sizes, for layers that lie on several devices in a row."""

from collections.abc import Sequence


def place(costs: Sequence[Sequence[int]], rooms: Sequence[int], most: Sequence[int] | None = None) -> tuple[int, ...]:
    """How many layers each device takes, of all, in order; () where some are left over.

    costs: [devices, layers] bytes that a layer takes on a device. rooms: [devices] bytes that there are for layers.
    most: [devices] so many layers a device takes at most. Each device in its turn takes as many as it holds, so that
    no other cut of the row into pieces leaves fewer over.
    """
    counts, start = [], 0
    for number, (mine, room) in enumerate(zip(costs, rooms, strict=True)):
        end, left = start, room
        last = len(mine) if most is None else min(len(mine), start + most[number])
        while end < last and mine[end] <= left:
            left -= mine[end]
            end += 1
        counts.append(end - start)
        start = end
    return tuple(counts) if start == len(costs[0]) else ()


def left_over(costs: Sequence[Sequence[int]], rooms: Sequence[int]) -> int:
    """Bytes of the layers for which no device has room, as the last device counts them; 0 where all have."""
    start = 0
    for mine, room in zip(costs, rooms, strict=True):
        left = room
        while start < len(mine) and mine[start] <= left:
            left -= mine[start]
            start += 1
    return sum(costs[-1][start:])
