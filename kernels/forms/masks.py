"""Words to be found by bits that are all set, as those of the exponent are in a float that isn't finite."""

import math
from dataclasses import dataclass
from typing import Any  # It is one of three unsigned types.

import numpy as np
from numpy.typing import NDArray

_STEP = 256  # Bytes that the C++ looks at together, STEP in cpu/search.h.
ROOM = 1 << 18  # Bytes of a buffer: a core's cache holds it beside what is copied into it.


@dataclass(frozen=True, slots=True)
class Masks:
    """`all_set` for the words of a block that are looked at, and 0 for the others; again for each block after it."""

    block: NDArray[np.uint8] | NDArray[np.uint16] | NDArray[np.uint32]  # [words of a block], little-endian
    all_set: int
    repeated: NDArray[np.uint8]  # Whole blocks, as many as fill whole steps.

    @classmethod
    def of(cls, block: NDArray[Any], all_set: int) -> "Masks":
        return cls(block, all_set, np.tile(block.view(np.uint8), _STEP // math.gcd(_STEP, block.nbytes)))
