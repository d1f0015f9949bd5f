"""What a model wants of its checkpoint: tensors, each filled from one or more tensors of the files."""

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

Index = tuple[int | slice, ...]


@dataclass(frozen=True, slots=True)
class Part:
    """A tensor of the checkpoint, and its place in one of the model's."""

    name: str
    shape: tuple[int, ...]
    at: Index = ()


@dataclass(frozen=True, slots=True)
class Weight:
    """One tensor of the model. `deliver` hands it to the modules that use it, before it is filled.

    `sources` are the ways in which files hold it; the first one whose names are all there is taken. `dtype` None keeps
    the dtype of the file, the widest where parts differ. `offset` is added once it is filled.
    """

    shape: tuple[int, ...]
    sources: tuple[tuple[Part, ...], ...]
    deliver: Callable[[Tensor], None]
    dtype: torch.dtype | None = None
    offset: float = 0.0


@dataclass(slots=True)
class Wants:
    """Everything that the modules of a model ask for. `activation_dtype` is that of weights in untouched modules."""

    activation_dtype: torch.dtype
    weights: list[Weight] = field(default_factory=list)

    def matrix(self, rows: Iterable[tuple[str, int]], width: int, deliver: Callable[[Tensor], None]) -> None:
        """[N, width] in the file's dtype: tensors of these names and numbers of rows, one below the other."""
        parts, end = _stack(rows, (width,))
        self.weights.append(Weight((end, width), (parts,), deliver))

    def vector(self, rows: Iterable[tuple[str, int]], deliver: Callable[[Tensor], None], offset: float = 0.0) -> None:
        """A norm or a bias [N] in float32: tensors of these names and lengths, one after the other."""
        parts, end = _stack(rows, ())
        self.weights.append(Weight((end,), (parts,), deliver, torch.float32, offset))

    def as_it_is(self, name: str, tensor: Tensor, deliver: Callable[[Tensor], None]) -> None:
        """A weight or buffer of an untouched module, in the dtype that the module computes in."""
        dtype = self.activation_dtype if tensor.is_floating_point() else tensor.dtype
        shape = tuple(tensor.shape)
        self.weights.append(Weight(shape, ((Part(name, shape),),), deliver, dtype))

    def experts(
        self, prefix: str, fused: str, split: Sequence[Sequence[str]], shape: tuple[int, int, int],
        deliver: Callable[[Tensor], None],
    ) -> None:  # fmt: skip
        """[E, N, K] in the file's dtype: one tensor `prefix.fused`, or for each expert tensors `prefix.0.NAME.weight`
        that share its rows evenly, with any of the sequences of names in `split`."""
        count, rows, width = shape
        sources: list[tuple[Part, ...]] = [(Part(f"{prefix}.{fused}", shape),)]
        for names in split:
            size = rows // len(names)
            sources.append(
                tuple(
                    Part(f"{prefix}.{e}.{name}.weight", (size, width), (e, slice(i * size, (i + 1) * size)))
                    for e in range(count)
                    for i, name in enumerate(names)
                )
            )
        self.weights.append(Weight(shape, tuple(sources), deliver))


def _stack(rows: Iterable[tuple[str, int]], rest: tuple[int, ...]) -> tuple[tuple[Part, ...], int]:
    parts, end = [], 0
    for name, count in rows:
        parts.append(Part(name, (count, *rest), (slice(end, end + count),)))
        end += count
    return tuple(parts), end
