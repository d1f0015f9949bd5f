"""The small arrays that steps work with: the largest logits of each row, listed on the host.

Whole rows are read by kernels.dispatch, where the logits are; a step over a list costs numpy some microseconds.
"""

import numpy as np
from numpy.typing import NDArray

Doubles = NDArray[np.float64]
Ids = NDArray[np.int64]
Mask = NDArray[np.bool_]
