"""What attention over llama.cpp's cells has to know of the ggml that calls it."""

from collections.abc import Sequence
from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class GgmlSamples:
    """Tensors that a library has made, by their addresses, to show how it lays them out.

    Queries [5, 6, 64] in float32, keys [32, 3, 64], values [32, 3, 96] and a mask [5, 32] in float16, the innermost
    dimension last; their attention, with a scale of 0.5, a bias of 0.25 and a softcap of 0.125; and a node [2, 3, 4, 5]
    of a function of ours, over the same sources, for all threads.
    """

    sources: Sequence[int]
    data: Sequence[int]  # Where the sources' numbers lie.
    attention: int
    custom: int
    what: int  # The node's function is given this address.
