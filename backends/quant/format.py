"""What a quantized format is to the loader: tensors by their names, checked, turned into a matrix that kernels read."""

from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar, Self

import torch
from torch import Tensor

from tightrope.backends.errors import BackendError
from tightrope.backends.files.read_ahead import Range
from tightrope.backends.files.safetensors import Checkpoint, TensorEntry
from tightrope.backends.tensor_parallel import Span
from tightrope.kernels.forms.quantized import Nf4Matrix, QuantizedMatrix, Take
from tightrope.kernels.packing import new_tiles

Settings = Mapping[str, Any]  # They are a model's own words on its quantization, as JSON has them.
FLOATS = ("F16", "BF16", "F32")
CPU = torch.device("cpu")
LEAST_ROW = 16 << 10  # Bytes: of shorter rows a part is no fewer pages of the file.


@dataclass(frozen=True, slots=True)
class Packed:
    """The tensors of one quantized linear, `module` in the files' words; they are read onto `device`.

    take: memory for its codes on a CPU, beside those of linears that may become one matrix with it. own: the outputs
    that a rank has, of which alone a matrix is built; None: all.
    """

    checkpoint: Checkpoint
    module: str
    device: torch.device = CPU
    take: Take = new_tiles
    own: Span | None = None

    def name(self, part: str) -> str:
        return f"{self.module}.{part}"

    def has(self, part: str) -> bool:
        return self.name(part) in self.checkpoint.tensors

    def entry(self, part: str) -> TensorEntry:
        """Raises BackendError when there is none."""
        if not self.has(part):
            raise self.checkpoint.missing(self.name(part), f"which the linear {self.module!r} needs")
        return self.checkpoint.tensors[self.name(part)]

    def shape(self, part: str, num_dims: int) -> tuple[int, ...]:
        """The shape of a tensor that must have so many dimensions."""
        shape = self.entry(part).shape
        if len(shape) != num_dims:
            raise self.wrong(part, f"has shape {list(shape)}; it must have {num_dims} dimensions")
        return shape

    def read(self, part: str) -> Tensor:
        """The tensor, on a CPU of the file's pages; for the meta device nothing is read but the file's header.

        Raises BackendError when what is read isn't finite.
        """
        return self._finite(part, self._raw(part)).to(self.device)

    def columns(self, part: str, each: int = 1) -> Tensor:
        """The same of the columns of own outputs alone, of which a column has `each`."""
        tensor = self._raw(part)
        if self.own is not None:
            begin, end = self.own
            if begin % each or end % each:
                raise self.wrong(part, f"has words of {each} outputs, which ranks can't share: take fewer ranks")
            tensor = tensor[:, begin // each : end // each]
        return self._finite(part, tensor).to(self.device)

    def rows(self, part: str) -> Tensor:
        """The same of the rows of own outputs alone."""
        return self._finite(part, self._raw(part, self.own)).to(self.device)

    def numbers(self, part: str, begin: int, end: int) -> Tensor:
        """Numbers begin .. end of the tensor, counted row after row; else as `read`."""
        return self._finite(part, self._raw(part).flatten()[begin:end]).to(self.device)

    def outputs(self, num_outputs: int) -> Tensor:
        """Which outputs of the files the matrix has, [num_outputs] int32."""
        return torch.arange(*(self.own or (0, num_outputs)), dtype=torch.int32)

    def contents(self, part: str) -> Tensor:
        """All of it on a CPU always, and read always: numbers that decide what a matrix is made of."""
        return self._finite(part, self.checkpoint.read(self.entry(part).name))

    def share_of(self, num_bytes: int, num_outputs: int) -> int:
        """Bytes for own outputs, where all `num_outputs` take so many."""
        if self.own is None:
            return num_bytes
        begin, end = self.own
        return num_bytes * (end - begin) // max(1, num_outputs)

    def _raw(self, part: str, rows: Span | None = None) -> Tensor:
        name = self.entry(part).name
        if self.device.type != "meta":
            return self.checkpoint.read(name, rows)
        tensor = self.checkpoint.outline(name)
        return tensor if rows is None else tensor[slice(*rows)]

    def _finite(self, part: str, tensor: Tensor) -> Tensor:
        if not tensor.is_meta:
            self.checkpoint.check_finite(self.name(part), tensor)
        return tensor

    def expect(self, part: str, shape: tuple[int, ...], *dtypes: str) -> None:
        """Raise BackendError unless a tensor has this shape and one of these dtypes."""
        entry = self.entry(part)
        if entry.dtype not in dtypes:
            raise self.wrong(part, f"is {entry.dtype}; it must be {' or '.join(dtypes)}")
        if entry.shape != shape:
            raise self.wrong(part, f"has shape {list(entry.shape)}; it must be {list(shape)}")

    def wrong(self, part: str, reason: str) -> BackendError:
        return BackendError(f"{self.entry(part).file}: tensor {self.name(part)!r} {reason}")


class Format(ABC):
    """A format, with what a model's settings say of it."""

    name: ClassVar[str]
    parts: ClassVar[tuple[str, ...]]  # These tensors tell that a linear is quantized; each must be there.
    optional: ClassVar[tuple[str, ...]] = ()  # A linear may have these, too.
    codes: ClassVar[str] = ""  # This tensor's rows are those of the matrix, where linears may be joined to one.
    inputs_dim: ClassVar[int] = 0  # That dimension of it is of the inputs.
    by_row: ClassVar[tuple[str, ...]] = ()  # In these tensors an output's bytes lie together, output after output.
    by_column: ClassVar[tuple[str, ...]] = ()  # Rows of these are of all outputs.
    methods: ClassVar[tuple[str, ...]] = ()  # By a quant_method of these nothing but the storing of weights changes.

    @classmethod
    @abstractmethod
    def tells(cls, checkpoint: Checkpoint, tensor: str) -> bool:
        """Whether a tensor of this name is one of a linear in this format, or in one that is listed before it."""

    @classmethod
    def of(cls, path: Path, settings: Settings) -> Self:
        """The format as `settings`, a block of the file `path`, describe it; raises BackendError for its relatives."""
        return cls()

    def holds(self, entry: TensorEntry) -> bool:
        """Whether a tensor that has the name of one of `parts` tells so by itself, too."""
        return True

    @abstractmethod
    def size(self, packed: Packed) -> tuple[int, int]:
        """Inputs and outputs of a linear, by the shapes of its tensors; outputs may be filled up."""

    @abstractmethod
    def tensor_bytes(self, packed: Packed) -> tuple[int, ...]:
        """Bytes of each tensor that the matrix of own outputs has in memory, by headers."""

    def reads(self, packed: Packed) -> list[Range]:
        """Where in the files lies what `build` reads, but for a bias."""
        found: list[Range] = []
        for part in (part for part in (*self.parts, *self.optional) if packed.has(part)):
            entry, spans, outer = packed.entry(part), [(0, 1)], 1
            count = 1
            if packed.own is not None and part in self.by_row:
                spans, count = [packed.own], self.size(packed)[1]
            elif packed.own is not None and part in self.by_column and entry.num_bytes >= LEAST_ROW * entry.shape[0]:
                spans, count, outer = [packed.own], self.size(packed)[1], entry.shape[0]
            found += entry.ranges(spans, count, outer)
        return found

    @abstractmethod
    def check(self, packed: Packed, num_inputs: int, num_outputs: int) -> None:
        """Raise BackendError for what headers tell is wrong with a linear of that size, own outputs or not."""

    @abstractmethod
    def build(self, packed: Packed, num_inputs: int, num_outputs: int) -> QuantizedMatrix | Nf4Matrix | Tensor:
        """The matrix of N own outputs, made on the device of `packed`; a tensor [N, K] where no other form has it.

        Raises BackendError for contents that can't be right.
        """
