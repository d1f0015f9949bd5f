"""What a model wants of its checkpoint: tensors, each filled from one or more tensors of the files."""

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from math import prod

import torch
from torch import Tensor

from tightrope.backends.files.read_ahead import Range
from tightrope.backends.files.safetensors import Checkpoint
from tightrope.backends.hf.modules.matrices import Matrix
from tightrope.backends.tensor_parallel import Span, Spans, size_of, within

Index = tuple[int | slice, ...]


@dataclass(frozen=True, slots=True)
class Part:
    """A tensor of the checkpoint, and its place in one of the model's: all of it, or of dimension `dim` the `span`."""

    name: str
    shape: tuple[int, ...]
    at: Index = ()
    span: Span | None = None
    dim: int = 0

    def read(self, checkpoint: Checkpoint) -> Tensor:
        """It, in the file's dtype, without a copy."""
        if self.dim == 0 or self.span is None:
            return checkpoint.read(self.name, self.span)
        begin, end = self.span
        return checkpoint.read(self.name).narrow(self.dim, begin, end - begin)

    def ranges(self, checkpoint: Checkpoint) -> list[Range]:
        """Where it lies in the files."""
        entry = checkpoint.tensors[self.name]
        if self.span is None:
            return [(entry.file, entry.begin, entry.end)]
        return entry.ranges([self.span], self.shape[self.dim], prod(self.shape[: self.dim]))


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
    """A linear, or several on the same input, by their names and numbers of outputs; `width` is that of the input.

    `own` are the outputs of each that this rank has.
    """

    rows: tuple[tuple[str, int], ...]
    width: int
    has_bias: bool
    deliver: Callable[[Matrix], None]
    deliver_bias: Callable[[Tensor], None]
    own: tuple[Spans, ...]

    def plain(self) -> list[Weight]:
        """As tensors NAME.weight [N, width] in the file's dtype, and NAME.bias in float32, one below the other."""
        weights = [self._plain("weight", (self.width,), self.deliver, None)]
        return [*weights, self._plain("bias", (), self.deliver_bias, torch.float32)] if self.has_bias else weights

    def _plain(
        self, kind: str, rest: tuple[int, ...], deliver: Callable[[Tensor], None], dtype: torch.dtype | None
    ) -> Weight:
        parts, end = [], 0
        for (name, count), spans in zip(self.rows, self.own, strict=True):
            for span, at in _placed(spans, end):
                parts.append(Part(f"{name}.{kind}", (count, *rest), (at,), span))
            end += size_of(spans)
        return Weight((end, *rest), (tuple(parts),), deliver, dtype)


@dataclass(frozen=True, slots=True)
class ExpertWeights:
    """One projection of all experts, of `shape` [E, N, K].

    In the files it is one tensor `prefix.fused`, or for each expert linears `prefix.0.NAME` that share its rows evenly,
    with any of the sequences of names in `split`. It is delivered as one tensor, or as one matrix for each expert, of
    the rows `own` alone.
    """

    prefix: str
    fused: str
    split: tuple[tuple[str, ...], ...]
    shape: tuple[int, int, int]
    deliver: Callable[[Tensor | Sequence[Matrix]], None]
    own: Spans

    def module(self, expert: int, name: str) -> str:
        return f"{self.prefix}.{expert}.{name}"

    def named(self, expert: int, names: Sequence[str]) -> list[tuple[str, int, Spans]]:
        """An expert's linears by names, with their numbers of outputs and the own ones of each."""
        size = self.shape[1] // len(names)
        return [
            (self.module(expert, name), size, within(self.own, i * size, (i + 1) * size))
            for i, name in enumerate(names)
        ]

    def plain(self) -> Weight:
        """[E, N, K] in the file's dtype."""
        count, _, width = self.shape
        whole = slice(None)
        fused = [
            Part(f"{self.prefix}.{self.fused}", self.shape, (whole, at), span, 1) for span, at in _placed(self.own)
        ]
        sources = [tuple(fused)]
        for names in self.split:
            parts = []
            for expert in range(count):
                end = 0
                for name, size, spans in self.named(expert, names):
                    for span, at in _placed(spans, end):
                        parts.append(Part(f"{name}.weight", (size, width), (expert, at), span))
                    end += size_of(spans)
            sources.append(tuple(parts))
        return Weight((count, size_of(self.own), width), tuple(sources), self.deliver)


@dataclass(slots=True)
class WantedWeights:
    """Everything that the modules of a model ask for.

    `tables` have a row for each token; where these are quantized, they are matrices of which single outputs are read.
    """

    weights: list[Weight] = field(default_factory=list)
    linears: list[LinearWeights] = field(default_factory=list)
    tables: list[LinearWeights] = field(default_factory=list)
    experts: list[ExpertWeights] = field(default_factory=list)

    def vector(self, rows: Iterable[tuple[str, int]], deliver: Callable[[Tensor], None], offset: float = 0.0) -> None:
        """A norm or a bias [N] in float32: tensors of these names and lengths, one after the other."""
        parts, end = [], 0
        for name, count in rows:
            parts.append(Part(name, (count,), (slice(end, end := end + count),)))
        self.weights.append(Weight((end,), (tuple(parts),), deliver, torch.float32, offset))

    def as_it_is(self, name: str, tensor: Tensor, deliver: Callable[[Tensor], None], dtype: torch.dtype) -> None:
        """A weight or buffer of an untouched module; `dtype` is what the module computes in."""
        shape = tuple(tensor.shape)
        own = dtype if tensor.is_floating_point() else tensor.dtype
        self.weights.append(Weight(shape, ((Part(name, shape),),), deliver, own))


def _placed(spans: Spans, end: int = 0) -> Iterator[tuple[Span, slice]]:
    """Each span, and where it comes to lie: one after the other from `end` on."""
    for begin, last in spans:
        yield (begin, last), slice(end, end := end + last - begin)
