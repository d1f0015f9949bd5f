"""What a quantized format is to the loader: tensors by their names, checked, turned into a matrix that kernels read."""

from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar, Self

import torch
from torch import Tensor

from tightrope.backends.errors import BackendError
from tightrope.backends.files.safetensors import Checkpoint, TensorEntry
from tightrope.kernels.forms.quantized import Nf4Matrix, QuantizedMatrix, Take
from tightrope.kernels.packing import new_tiles

Settings = Mapping[str, Any]  # They are a model's own words on its quantization, as JSON has them.
FLOATS = ("F16", "BF16", "F32")
CPU = torch.device("cpu")


@dataclass(frozen=True, slots=True)
class Packed:
    """The tensors of one quantized linear, `module` in the files' words; they are read onto `device`.

    take: memory for its codes on a CPU, beside those of linears that may become one matrix with it.
    """

    checkpoint: Checkpoint
    module: str
    device: torch.device = CPU
    take: Take = new_tiles

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

    def raw(self, part: str) -> Tensor:
        """The tensor, on a CPU of the file's pages; for the meta device nothing is read but the file's header."""
        name = self.entry(part).name
        return (
            self.checkpoint.outline(name) if self.device.type == "meta" else self.checkpoint.read(name).to(self.device)
        )

    def read(self, part: str) -> Tensor:
        """The same; raises BackendError when what is read isn't finite."""
        return self.raw(part) if self.device.type == "meta" else self.contents(part).to(self.device)

    def contents(self, part: str) -> Tensor:
        """The same on a CPU always, and read always: numbers that decide what a matrix is made of."""
        tensor = self.checkpoint.read(self.entry(part).name)
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
        """Bytes of each tensor that the matrix has in memory, by headers."""

    @abstractmethod
    def check(self, packed: Packed, num_inputs: int, num_outputs: int) -> None:
        """Raise BackendError for what headers tell is wrong with a linear of that size."""

    @abstractmethod
    def build(self, packed: Packed, num_inputs: int, num_outputs: int) -> QuantizedMatrix | Nf4Matrix | Tensor:
        """The matrix, made on the device of `packed`; a tensor [N, K] where there is no other form for it.

        Raises BackendError for contents that can't be right.
        """
