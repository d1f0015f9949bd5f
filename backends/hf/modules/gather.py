"""How the modules of a rank get the whole of what all ranks compute."""

from collections.abc import Sequence
from typing import Protocol

from torch import Tensor

from tightrope.backends.tensor_parallel import Share
from tightrope.kernels.forms.ranks import SharedRanks


class Gather(Protocol):
    """All ranks' columns, side by side in the order of the ranks: what one rank would have computed, to the bit."""

    share: Share
    shared: SharedRanks | None  # By it a kernel gathers within a whole layer; None where ranks meet in another way.

    def __call__(self, local: Tensor, sizes: Sequence[int]) -> Tensor:
        """local [T, sizes[rank]] of this rank to [T, sum(sizes)] of all.

        Every rank calls it in the same order, with as many rows, the same sizes and dtype. No rows need no meeting.
        """

    def close(self) -> None:
        """Leave the others, who have perhaps gone."""
