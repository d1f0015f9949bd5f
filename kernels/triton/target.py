"""What kernels run on: a card, whose instructions some of them name, or Triton's interpreter, which knows none."""

import triton
from triton.language import constexpr

IS_COMPILED = constexpr(not triton.knobs.runtime.interpret)
