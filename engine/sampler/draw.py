"""The draw: a number that depends on the seed and the place alone, and the token it falls on."""

import math

import numpy as np

from tightrope.engine.sampler.arrays import Doubles, Ids, Mask
from tightrope.engine.sampler.candidates import Candidates

_MASK = 2**64 - 1
_DICE = 0xD1CE5EED0DD5A11D  # This sets the second stream of a seed apart from the first.
_GAMMA = 0x9E3779B97F4A7C15  # It is 2**64 divided by the golden ratio, made odd.


def uniform(seed: int, place: int) -> float:
    """A number in [0, 1), a multiple of 2**-53: draw number `place` of the stream that `seed` names.

    The seed is scrambled first: seeds that lie a multiple of the generator's step apart would otherwise walk the same
    stream at an offset.
    """
    return (splitmix64(splitmix64(seed, 0), place) >> 11) * 2.0**-53


def skewed(u: float, skew: float) -> float:
    """u ** exp(-skew): a number in [0, 1) that lies further up, among less likely tokens, the larger the skew is.

    Source: exllamav2's sampling parameter `skew` (exllamav2_ext/ext_sampling.cpp).
    """
    return min(u ** math.exp(-skew), 1 - 2.0**-53) if skew else u


def dice(seed: int, place: int) -> float:
    """A second number in [0, 1) for the same place, of a stream of its own."""
    return uniform(seed ^ _DICE, place)


def splitmix64(seed: int, place: int) -> int:
    """Output number `place` of SplitMix64, in [0, 2**64). Its state is a counter, so any place is reached at once.

    Source: Steele, Lea and Flood 2014, "Fast Splittable Pseudorandom Number Generators".
    """
    z = (seed + (place + 1) * _GAMMA) & _MASK
    z = ((z ^ (z >> 30)) * 0xBF58476D1CE4E5B9) & _MASK
    z = ((z ^ (z >> 27)) * 0x94D049BB133111EB) & _MASK
    return z ^ (z >> 31)


def draw(candidates: Candidates, u: Doubles) -> tuple[Ids, Mask]:
    """The column of each row's token, and whether it is settled: both [B, 1]. u [B, 1] in [0, 1).

    The kept tokens stand in the order of their columns; u falls on one of them by its share.
    """
    reached = candidates.weights.cumsum(1)
    target = u * candidates.total
    end = reached[:, -1:]
    column = (reached <= target).sum(1, keepdims=True)
    # Rounding can leave the sum a little short of the total; the last kept token takes that share.
    last = (reached < end).sum(1, keepdims=True)
    return np.minimum(column, last), candidates.settled & (candidates.is_complete | (target < end))
