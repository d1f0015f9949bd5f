"""Knowing a chat again by its text, where no client gives it a name: the end of its last prompt stands in the next one.

A window that loses its oldest messages has another beginning at each turn, and nothing else to be known by.
"""

import secrets
from collections.abc import Sequence

import numpy as np

WINDOW = 48  # Tokens: of a chat's last message and the answer before it, as a rule.
MOST_SEARCHED = 4096  # An answer and a new message stand behind the end of the last prompt.
# Drawn at the start, so that nobody can make two texts for one of whose ends the other's is taken.
_FACTORS = np.array([secrets.randbits(64) | 1 for _ in range(WINDOW)], np.uint64)


def ends_of(token_ids: Sequence[int]) -> list[int]:
    """A number for each run of WINDOW tokens that ends among the last of a prompt; the last one's is the last."""
    last = np.array(token_ids[-(MOST_SEARCHED + WINDOW - 1) :], np.uint64)
    if len(last) < WINDOW:
        return []
    numbers: list[int] = np.convolve(last, _FACTORS, "valid").tolist()
    return numbers
