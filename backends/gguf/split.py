"""How slots in a row, or the rows of their matrices, are shared out among cards.

Source of what llama.cpp does: llama-model.cpp (load_tensors, make_gpu_buft_list), ggml-cuda.cu (the split buffers).
"""

from collections.abc import Sequence
from itertools import accumulate

ROUNDED_ROWS = 128  # ggml cuts a matrix at multiples of so many rows, or of 64.
_SHARES = 12  # Halvings of the share of each card that is filled.


def by_proportion(proportions: Sequence[float], num_slots: int, num_cards: int) -> tuple[int, ...]:
    """How many of the slots each card takes: slot i the first whose share, with all before it, is more than i / n.

    Cards that no proportion is given for take none.
    """
    given = [*proportions, *[0.0] * num_cards][:num_cards]
    whole = sum(given)
    ends = [end / whole for end in accumulate(given)]
    places = [next(n for n, end in enumerate(ends) if end > slot / num_slots) for slot in range(num_slots)]
    return tuple(places.count(card) for card in range(num_cards))


def spread(costs: Sequence[int], rooms: Sequence[int]) -> tuple[int, ...]:
    """How many slots in a row, taking `costs` bytes each, go to each card with `rooms` bytes; () where some don't fit.

    As few cards as hold them are used, in order, and each is filled to about the same share.
    """
    used = next((n for n in range(1, len(rooms) + 1) if filled(costs, rooms[:n])), 0)
    if not used:
        return ()
    counts = filled(costs, rooms[:used])
    low, high = 0.0, 1.0
    for _ in range(_SHARES):
        share = (low + high) / 2
        if fewer := filled(costs, [share * room for room in rooms[:used]]):
            counts, high = fewer, share
        else:
            low = share
    return (*counts, *[0] * (len(rooms) - used))


def filled(costs: Sequence[int], rooms: Sequence[float]) -> tuple[int, ...]:
    """Slots on each card, when each in its turn takes as many as it holds; () where some are left over.

    No other cut of the row into pieces leaves fewer over.
    """
    counts: list[int] = []
    start = 0
    for room in rooms:
        end, left = start, room
        while end < len(costs) and costs[end] <= left:
            left -= costs[end]
            end += 1
        counts.append(end - start)
        start = end
    return tuple(counts) if start == len(costs) else ()


def pieces(costs: Sequence[int], counts: Sequence[int]) -> list[int]:
    """What each card takes of a row when it gets so many of its slots."""
    ends = accumulate(counts)
    return [sum(costs[end - count : end]) for count, end in zip(counts, ends, strict=True)]
