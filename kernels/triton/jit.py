"""triton.jit for kernels whose numbers differ from launch to launch: one compile serves them all.

Triton compiles a kernel anew where an integer is 1, a multiple of 16, or neither. Nothing here may depend on that, so
what must be known of a number is said in the kernel: rows of words are counted in tiles of 16, those of heads in heads.
"""

import inspect
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import triton
import triton.language as tl
from triton import knobs
from triton.language import constexpr

from tightrope.kernels.forms.compiling import compiling

Launches = dict[str, Any]  # A kernel of Triton, which has no types, by what a launch of it is compiled for.

ALIGNED = 16  # Numbers; what begins at a multiple of so many is loaded several at a time.
_ALIGNED = constexpr(ALIGNED)


_gathering: list[Launches] = []  # The innermost of those that are being gathered is the last.


def _begin(**launch: Any) -> bool:  # noqa: ANN401  Triton has no types
    if _gathering:
        _gathering[-1][launch["compile"]["specialization_data"]] = launch["fn"].jit_function
        return True  # Triton leaves it at that.
    compiling.begin()
    return False


def _end(**launch: object) -> None:
    compiling.end()


knobs.runtime.jit_cache_hook, knobs.runtime.jit_post_compile_hook = _begin, _end


@contextmanager
def gathered() -> Iterator[Launches]:
    """Gives what is launched meanwhile and was never compiled in this process: it is noted, and doesn't run."""
    _gathering.append({})
    try:
        yield _gathering[-1]
    finally:
        _gathering.pop()


def kernel(function: Callable[..., None]) -> Any:  # noqa: ANN401  Triton has no types
    """A kernel to be launched; arguments that it takes as `int` or `float` are never specialised."""
    numbers = [
        name
        for name, parameter in inspect.signature(function).parameters.items()
        if parameter.annotation in (int, float)
    ]
    return triton.jit(function, do_not_specialize=numbers)


@triton.jit
def multiple(number: tl.tensor, IS_ALIGNED: constexpr) -> tl.tensor:
    """The number, which the compiler then knows to be a multiple of ALIGNED where IS_ALIGNED."""
    if IS_ALIGNED:
        number = number // _ALIGNED * _ALIGNED
    return number


def are_aligned(*numbers: int) -> bool:
    """Whether all are multiples of ALIGNED."""
    return all(number % ALIGNED == 0 for number in numbers)
