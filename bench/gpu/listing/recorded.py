"""What the launchers of kernels/triton ask for, without a card: each launch, whose tensors may be meta tensors."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any  # a kernel of Triton has no types
from unittest import mock

from triton.runtime.jit import JITFunction

OPTIONS = ("num_warps", "num_stages", "enable_fp_fusion", "maxnreg")


@dataclass(frozen=True)
class Launch:
    """A kernel, its arguments by name, its options and its grid."""

    kernel: Any
    args: dict[str, Any]
    options: dict[str, Any]
    grid: tuple[int, ...]

    @property
    def name(self) -> str:
        return str(self.kernel.fn.__name__).lstrip("_")

    @property
    def num_programs(self) -> int:
        total = 1
        for size in self.grid:
            total *= size
        return total


@contextmanager
def recorded() -> Iterator[list[Launch]]:
    """The launches of what runs in this context, none of which is made."""
    launches: list[Launch] = []

    def at(kernel: Any, grid: tuple[int, ...]) -> Callable[..., None]:  # noqa: ANN401
        def launch(*args: object, **kwargs: object) -> None:
            options = {name: kwargs.pop(name) for name in OPTIONS if name in kwargs}
            named = dict(zip(kernel.arg_names, args, strict=False)) | kwargs
            launches.append(Launch(kernel, named, options, tuple(grid)))

        return launch

    with mock.patch.object(JITFunction, "__getitem__", at):
        yield launches
