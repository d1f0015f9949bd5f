"""GGUF adapters as the torch engine knows adapters: halves of linears under the names of transformers' modules."""

from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from types import MappingProxyType

import torch
from torch import Tensor

from tightrope.backends.files.gguf.header import Header, TensorInfo
from tightrope.backends.files.peft import Delta, PeftAdapter, read_adapter
from tightrope.backends.files.peft_config import PeftConfig
from tightrope.backends.files.safetensors import Checkpoint, Shard, TensorEntry
from tightrope.backends.gguf.adapter_file import ALPHA, read_adapter_file
from tightrope.backends.own_gguf.checkpoint import Fix, order_of_rows
from tightrope.backends.own_gguf.names import STACKED, experts_name, layer_part, module_name
from tightrope.backends.quant.gguf import BLOCK_TYPES, to_matrix
from tightrope.kernels.forms.quantized import dequantize


@dataclass(frozen=True, slots=True)
class AdapterCheckpoint(Checkpoint):
    """See Checkpoint. Blocks are read as the numbers that they stand for, and `fixes` are made to what is read."""

    fixes: dict[str, Fix] = field(default_factory=dict)
    blocks: dict[str, str] = field(default_factory=dict)  # The types of those that `tensors` call F32.

    def read(self, name: str, rows: tuple[int, int] | None = None) -> Tensor:
        """See Checkpoint."""
        entry, fix = self.tensors[name], self.fixes.get(name)
        wanted = slice(None) if rows is None else slice(*rows)
        if (kind := self.blocks.get(name)) is None:
            tensor = Checkpoint.read(self, name)
        else:
            raw = torch.frombuffer(self._map(entry.file), dtype=torch.uint8, count=entry.num_bytes, offset=entry.begin)
            tensor = dequantize(to_matrix(kind, raw.view(entry.shape[0], -1), entry.shape[1])).t().contiguous()
        return tensor[wanted] if fix is None else fix(tensor, wanted)


def read_any_adapter(base: Header, path: Path) -> PeftAdapter:
    """A PEFT folder, or a GGUF adapter for the model `base`. Raises BackendError, naming file and tensor."""
    if path.is_dir():
        return read_adapter(path)
    header = read_adapter_file(path, base)
    architecture = str(base.metadata["general.architecture"])
    alpha = header.metadata.get(ALPHA, 0.0)
    assert isinstance(alpha, float)
    (file,) = header.files
    reading = _Reading(header, file.data_start)
    halves: dict[str, dict[str, TensorInfo]] = {}
    for tensor in file.tensors:
        name, _, part = tensor.name.rpartition(".")
        halves.setdefault(name, {})[part] = tensor
    deltas: dict[str, Delta] = {}
    for name, parts in halves.items():
        scaling = alpha / parts["lora_b"].dims[0] if alpha else 1.0
        order = order_of_rows(base, architecture, name, parts["lora_b"].dims[1])
        for expert, module in _modules(architecture, name, parts["lora_a"]).items():
            down, up = (reading.entry(f"{module}.{part}", parts[part], expert) for part in ("lora_a", "lora_b"))
            deltas[module] = Delta(down, up, scaling)
            if order is not None:
                reading.fixes[up.name] = partial(_in_order, order)
    config = PeftConfig(path, 0.0, alpha, {}, {}, False, False, (), {})
    return PeftAdapter(path, reading.checkpoint(), config, deltas, {}, {}, {}, {}, ())


def _modules(architecture: str, name: str, down: TensorInfo) -> dict[int, str]:
    """The linears that a tensor of the model stands for, by the number of the expert; 0 where there is but one."""
    part = layer_part(name)
    if part is not None and part[1] in STACKED and len(down.dims) == 3:
        return {e: experts_name(part[0], part[1], e).removesuffix(".weight") for e in range(down.dims[2])}
    return {0: (module_name(architecture, name) or name).removesuffix(".weight")}


def _in_order(order: Tensor, tensor: Tensor, rows: slice) -> Tensor:
    return tensor[order[rows]]


class _Reading:
    """The entries of one adapter's tensors."""

    def __init__(self, header: Header, data_start: int) -> None:
        self._header, self._start = header, data_start
        self._entries: dict[str, TensorEntry] = {}
        self._blocks: dict[str, str] = {}
        self.fixes: dict[str, Fix] = {}

    def entry(self, name: str, tensor: TensorInfo, expert: int) -> TensorEntry:
        """That of a matrix, one of several where there are experts."""
        size = tensor.num_bytes // (tensor.dims[2] if len(tensor.dims) == 3 else 1)
        begin = self._start + tensor.offset + expert * size
        dtype = tensor.type_name
        if dtype in BLOCK_TYPES:
            self._blocks[name], dtype = dtype, "F32"
        shape = tensor.dims[1], tensor.dims[0]
        self._entries[name] = TensorEntry(name, dtype, shape, self._header.path, begin, begin + size)
        return self._entries[name]

    def checkpoint(self) -> AdapterCheckpoint:
        path, entries = self._header.path, MappingProxyType(self._entries)
        shards = (Shard(path, tuple(entries)),)
        return AdapterCheckpoint(path.parent, entries, shards, fixes=self.fixes, blocks=self._blocks)
