"""What a model wants of its checkpoint: tensors, each filled from one or more tensors of the files."""

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from tightrope.backends.hf.modules.matrices import Matrix

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
    the dtype of the file, the widest where parts differ. `offset` is added once it is filled. `stays_on_host`: it lies
    in the machine's own memory, whatever the device.
    """

    shape: tuple[int, ...]
    sources: tuple[tuple[Part, ...], ...]
    deliver: Callable[[Tensor], None]
    dtype: torch.dtype | None = None
    offset: float = 0.0
    stays_on_host: bool = False


@dataclass(frozen=True, slots=True)
class LinearWeights:
    """A linear, or several on the same input, by their names and numbers of outputs; `width` is that of the input."""

    rows: tuple[tuple[str, int], ...]
    width: int
    has_bias: bool
    deliver: Callable[[Matrix], None]
    deliver_bias: Callable[[Tensor], None]

    def plain(self) -> list[Weight]:
        """As tensors NAME.weight [N, width] in the file's dtype, and NAME.bias in float32, one below the other."""
        parts, end = _stack(((f"{name}.weight", count) for name, count in self.rows), (self.width,))
        weights = [Weight((end, self.width), (parts,), self.deliver)]
        if self.has_bias:
            parts, end = _stack(((f"{name}.bias", count) for name, count in self.rows), ())
            weights.append(Weight((end,), (parts,), self.deliver_bias, torch.float32))
        return weights


@dataclass(frozen=True, slots=True)
class ExpertWeights:
    """One projection of all experts, of `shape` [E, N, K].

    In the files it is one tensor `prefix.fused`, or for each expert linears `prefix.0.NAME` that share its rows evenly,
    with any of the sequences of names in `split`. It is delivered as one tensor, or as one matrix for each expert.
    """

    prefix: str
    fused: str
    split: tuple[tuple[str, ...], ...]
    shape: tuple[int, int, int]
    deliver: Callable[[Tensor | Sequence[Matrix]], None]

    def module(self, expert: int, name: str) -> str:
        return f"{self.prefix}.{expert}.{name}"

    def plain(self) -> Weight:
        """[E, N, K] in the file's dtype."""
        count, rows, width = self.shape
        sources: list[tuple[Part, ...]] = [(Part(f"{self.prefix}.{self.fused}", self.shape),)]
        for names in self.split:
            size = rows // len(names)
            sources.append(
                tuple(
                    Part(f"{self.module(e, name)}.weight", (size, width), (e, slice(i * size, (i + 1) * size)))
                    for e in range(count)
                    for i, name in enumerate(names)
                )
            )
        return Weight(self.shape, tuple(sources), self.deliver)


@dataclass(slots=True)
class WantedWeights:
    """Everything that the modules of a model ask for. `activation_dtype` is that of weights in untouched modules.

    `tables` have a row for each token; where these are quantized, they are matrices of which single outputs are read.
    """

    activation_dtype: torch.dtype
    weights: list[Weight] = field(default_factory=list)
    linears: list[LinearWeights] = field(default_factory=list)
    tables: list[LinearWeights] = field(default_factory=list)
    experts: list[ExpertWeights] = field(default_factory=list)

    def vector(self, rows: Iterable[tuple[str, int]], deliver: Callable[[Tensor], None], offset: float = 0.0) -> None:
        """A norm or a bias [N] in float32: tensors of these names and lengths, one after the other."""
        parts, end = _stack(rows, ())
        self.weights.append(Weight((end,), (parts,), deliver, torch.float32, offset))

    def as_it_is(self, name: str, tensor: Tensor, deliver: Callable[[Tensor], None]) -> None:
        """A weight or buffer of an untouched module, in the dtype that the module computes in."""
        dtype = self.activation_dtype if tensor.is_floating_point() else tensor.dtype
        shape = tuple(tensor.shape)
        self.weights.append(Weight(shape, ((Part(name, shape),),), deliver, dtype))


def _stack(rows: Iterable[tuple[str, int]], rest: tuple[int, ...]) -> tuple[tuple[Part, ...], int]:
    parts, end = [], 0
    for name, count in rows:
        parts.append(Part(name, (count, *rest), (slice(end, end + count),)))
        end += count
    return tuple(parts), end
