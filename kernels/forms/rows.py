"""What kernels over whole rows of logits take and give."""

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

MAX_TRANSFORMS = 6  # A row has no more; cpu/logits.h knows the number, too.
DIVIDE, PARABOLA, CUT = 1.0, 2.0, 3.0  # Kinds of transforms, see reference.row_sums.
SUMS = ("count", "mass", "moment", "first", "second")  # What is summed over a row.


@dataclass(frozen=True, slots=True)
class Ranked:
    """The largest logits of some rows: descending, equals by id."""

    logits: NDArray[np.float32]  # [B, N]; -inf where nothing is listed
    token_ids: NDArray[np.int64]  # [B, N]
    border: NDArray[np.float32]  # [B, 1]: no token that isn't listed has a larger logit; -inf: all possible are listed
    top: NDArray[np.float32]  # [B, 1]: the largest; not finite in a row from which nothing can be drawn
