"""A GGUF file's tensors under the names of transformers' modules, in transformers' order of rows."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from math import prod
from types import MappingProxyType

import numpy as np
import torch
from torch import Tensor

from tightrope.backends.errors import BackendError
from tightrope.backends.files.gguf.header import DataFile, Header, TensorInfo
from tightrope.backends.files.safetensors import DTYPES, Checkpoint, Shard, TensorEntry
from tightrope.backends.own_gguf.names import STACKED, experts_name, layer_part, module_name
from tightrope.backends.quant.gguf import BLOCK_TYPES

PERMUTED = ("llama", "granite")  # Their files have the rows of queries and keys in pairs, as llama.cpp rotates them.
SHIFTED = ("gemma", "gemma2", "gemma3")  # Their norms' weights are one more in files than in transformers' modules.
_ROTATED = {"attn_q": "attention.head_count", "attn_k": "attention.head_count_kv"}
_MOST_FACTORS = 1 << 12  # A head has half as many pairs.

Fix = Callable[[Tensor, slice], Tensor]  # It is given a tensor of the file, and which rows of the result to make.


@dataclass(frozen=True, slots=True)
class GgufCheckpoint(Checkpoint):
    """See Checkpoint. A tensor of blocks is read as [N, bytes of a row] uint8; `fixes` are made to what is read."""

    fixes: Mapping[str, Fix] = field(default_factory=dict)

    def read(self, name: str, rows: tuple[int, int] | None = None) -> Tensor:
        """See Checkpoint."""
        entry, wanted = self.tensors[name], slice(None) if rows is None else slice(*rows)
        if entry.dtype in BLOCK_TYPES:
            raw = torch.frombuffer(self._map(entry.file), dtype=torch.uint8, count=entry.num_bytes, offset=entry.begin)
            tensor = raw.view(prod(entry.shape[:-1]), -1)
        else:
            tensor = Checkpoint.read(self, name)
        fix = self.fixes.get(name)
        return tensor[wanted] if fix is None else fix(tensor, wanted)

    def missing(self, name: str, reason: str) -> BackendError:
        """See Checkpoint."""
        return BackendError(f"{self.shards()[0].path}: tensor {name!r} is missing, {reason}")


def checkpoint_of(header: Header) -> GgufCheckpoint:
    """All tensors of a file and its other parts. Raises BackendError for types that the torch engine doesn't know."""
    architecture = str(header.metadata["general.architecture"])
    tensors: dict[str, TensorEntry] = {}
    fixes: dict[str, Fix] = {}
    shards = []
    for file in header.files:
        names = []
        for tensor in file.tensors:
            for entry in _entries(architecture, file, tensor):
                tensors[entry.name] = entry
                names.append(entry.name)
                if (fix := _fix(header, architecture, tensor)) is not None:
                    fixes[entry.name] = fix
        shards.append(Shard(file.path, tuple(names)))
    return GgufCheckpoint(header.path.parent, MappingProxyType(tensors), tuple(shards), fixes=fixes)


def small_numbers(header: Header, tensor: TensorInfo) -> list[float]:
    """The numbers of a small float32 tensor. Raises BackendError for any other."""
    file = next(file for file in header.files if tensor in file.tensors)
    if tensor.type_name != "F32" or len(tensor.dims) != 1 or tensor.dims[0] > _MOST_FACTORS:
        raise BackendError(f"{file.path}: tensor {tensor.name!r} must be a row of at most {_MOST_FACTORS} float32")
    begin = file.data_start + tensor.offset
    with file.path.open("rb") as opened:
        opened.seek(begin)
        numbers = np.frombuffer(opened.read(tensor.num_bytes), "<f4")
    if len(numbers) != tensor.dims[0] or not np.isfinite(numbers).all():
        raise BackendError(f"{file.path}: tensor {tensor.name!r} must hold finite numbers")
    return [float(number) for number in numbers]


def _entries(architecture: str, file: DataFile, tensor: TensorInfo) -> list[TensorEntry]:
    """One entry, or one for each expert of a stacked tensor; a tensor without a module keeps its name."""
    if tensor.type_name not in (*BLOCK_TYPES, *DTYPES):
        raise BackendError(f"{file.path}: tensor {tensor.name!r} is {tensor.type_name}, which is not known")
    if tensor.name.startswith("rope_f"):
        return []  # The configuration has its numbers.
    begin, shape = file.data_start + tensor.offset, tuple(reversed(tensor.dims))
    part = layer_part(tensor.name)
    if part is not None and part[1] in STACKED and len(shape) == 3:
        size = tensor.num_bytes // shape[0]
        return [
            TensorEntry(
                experts_name(part[0], part[1], expert), tensor.type_name, shape[1:], file.path,
                begin + expert * size, begin + (expert + 1) * size,
            )
            for expert in range(shape[0])
        ]  # fmt: skip
    name = module_name(architecture, tensor.name) or tensor.name
    return [TensorEntry(name, tensor.type_name, shape, file.path, begin, begin + tensor.num_bytes)]


def order_of_rows(header: Header, architecture: str, name: str, rows: int) -> Tensor | None:
    """The file's row of each of transformers' [rows] in a tensor of that name; None where they are the same.

    Raises BackendError for rows that the model's heads don't share.
    """
    part = layer_part(name)
    if architecture not in PERMUTED or part is None or part[1] not in _ROTATED:
        return None
    heads = header.metadata.get(f"{architecture}.{_ROTATED[part[1]]}")
    if heads is None:
        heads = header.metadata.get(f"{architecture}.attention.head_count")
    heads = heads[part[0]] if isinstance(heads, tuple) and part[0] < len(heads) else heads
    if not isinstance(heads, int) or heads < 1 or rows % (2 * heads):
        raise BackendError(f"{header.path}: tensor {name!r} has {rows} rows, which {heads!r} heads don't share")
    return torch.arange(rows).view(heads, -1, 2).transpose(1, 2).flatten()


def _fix(header: Header, architecture: str, tensor: TensorInfo) -> Fix | None:
    """What makes of a tensor of the file transformers' own."""
    if architecture in SHIFTED and tensor.name.endswith("norm.weight"):
        return lambda weight, rows: weight[rows].float() - 1
    order = order_of_rows(header, architecture, tensor.name, tensor.dims[-1])
    return None if order is None else lambda weight, rows: weight[order[rows]]
