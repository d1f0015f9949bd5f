"""What is left of a text after removals: a chat that loses its oldest messages, an entry that goes out again."""

from collections.abc import Iterator
from typing import Any

import numpy as np

from tightrope.backends.reuse import Run

Ints = np.ndarray[Any, np.dtype[np.int32]]

MIN_MATCH = 16  # Fewer equal tokens may be chance: the marks between two messages and a name are about ten.
MOST_MATCHES = 16  # Where a text repeats itself, so many places are tried.
MOST_REMOVALS = 32  # Texts that are made to have more can't make looking for them slow.


def kept_runs(source: Ints, wanted: Ints) -> list[Run]:
    """The beginning of `wanted` [n] int32 that removals alone make of `source` [m] int32, as runs of the latter.

    They rise in both, without a gap in `wanted`, and end where something was inserted or changed. The first is the
    common beginning, if there is one; only that is exact.
    """
    at = start = num_common(source, wanted)
    runs = [Run(0, 0, start)] if start else []
    for _ in range(MOST_REMOVALS):
        at, length = _longest(source, at, wanted[start:])
        if not length:
            break
        runs.append(Run(at, start, length, is_exact=False))
        at, start = at + length, start + length
    return runs


def num_left(source: Ints, wanted: Ints) -> int:
    """How many of the first tokens of `wanted` removals leave of `source`; 0 where nothing need be removed."""
    runs = kept_runs(source, wanted)
    return runs[-1].stop if len(runs) > 1 else 0


def num_common(a: Ints, b: Ints) -> int:
    """How many leading tokens are equal."""
    length = min(len(a), len(b))
    different = np.flatnonzero(a[:length] != b[:length])
    return int(different[0]) if len(different) else length


def _longest(source: Ints, after: int, wanted: Ints) -> tuple[int, int]:
    """Where behind `after` the longest beginning of `wanted` stands in `source`, and its length; 0 if too short."""
    if len(wanted) < MIN_MATCH:
        return after, 0
    found = [(num_common(source[at:], wanted), at) for at in _places(source, after, wanted[:MIN_MATCH])]
    length, at = max(found, key=lambda pair: (pair[0], -pair[1]), default=(0, after))
    return at, length


def _places(source: Ints, after: int, part: Ints) -> Iterator[int]:
    """The first places behind `after` where all of `part` stands."""
    text, needle, width = source.tobytes(), part.tobytes(), source.itemsize
    at, num_found = text.find(needle, after * width), 0
    while at >= 0 and num_found < MOST_MATCHES:
        if at % width == 0:
            num_found += 1
            yield at // width
        at = text.find(needle, at + 1)
