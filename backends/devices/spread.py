"""Several cards, and a model that one of them doesn't hold: whether each gets the same share of it."""

from collections.abc import Sequence

ALIKE = 0.9  # The smallest card has at least this share of what the largest has free.


def are_alike(free_bytes: Sequence[int]) -> bool:
    """Whether ranks of one size waste little of any card: every rank has what the smallest card holds."""
    return min(free_bytes) >= ALIKE * max(free_bytes)
