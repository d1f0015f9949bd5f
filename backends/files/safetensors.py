"""The weights of a model folder: safetensors headers, checked before anything is loaded, and tensors from disk.

A shard is an 8-byte little-endian length, a JSON header of that length, and the tensors' bytes without gap or overlap.
Source: the format's description, huggingface/safetensors README. Pickled weights (.bin, .pt) are never opened.
"""

import json
import mmap
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from math import prod
from pathlib import Path
from threading import Lock
from types import MappingProxyType
from typing import TYPE_CHECKING, Any

from tightrope.backends.errors import BackendError
from tightrope.backends.files.foreign import SNIFFED, told_by_start
from tightrope.backends.files.opened import open_file
from tightrope.backends.files.shards import Shards, find_shards

if TYPE_CHECKING:
    from torch import Tensor

MAX_HEADER = 100_000_000  # It is the format's own limit, in bytes.
MAX_DIMS = 8

# By safetensors' word, the bytes of a number, and torch's name: torch is not imported for headers alone.
DTYPES: Mapping[str, tuple[int, str]] = {
    "BOOL": (1, "bool"),
    "U8": (1, "uint8"),
    "I8": (1, "int8"),
    "F8_E4M3": (1, "float8_e4m3fn"),
    "F8_E5M2": (1, "float8_e5m2"),
    "F8_E8M0": (1, "float8_e8m0fnu"),
    "I16": (2, "int16"),
    "U16": (2, "uint16"),
    "F16": (2, "float16"),
    "BF16": (2, "bfloat16"),
    "I32": (4, "int32"),
    "U32": (4, "uint32"),
    "F32": (4, "float32"),
    "I64": (8, "int64"),
    "U64": (8, "uint64"),
    "F64": (8, "float64"),
}


@dataclass(frozen=True, slots=True)
class TensorEntry:
    """Where a tensor is: bytes begin .. end of `file`, row-major. `dtype` is safetensors' word, such as BF16."""

    name: str
    dtype: str
    shape: tuple[int, ...]
    file: Path
    begin: int
    end: int

    @property
    def num_bytes(self) -> int:
        return self.end - self.begin

    def ranges(self, rows: Sequence[tuple[int, int]], count: int, outer: int = 1) -> list[tuple[Path, int, int]]:
        """Bytes begin .. end of the file with these rows, of `count` that share each of `outer` equal parts."""
        size = self.num_bytes // outer
        starts = [self.begin + i * size for i in range(outer)]
        return [(self.file, at + size * a // count, at - -size * b // count) for at in starts for a, b in rows]


@dataclass(frozen=True, slots=True)
class Shard:
    """One file of a checkpoint and the names of its tensors, in the order of their bytes."""

    path: Path
    names: tuple[str, ...]


@dataclass(frozen=True, slots=True)
class Checkpoint:
    """All tensors of a model folder. Only headers have been read; a shard is mapped when its first tensor is."""

    folder: Path
    tensors: Mapping[str, TensorEntry]
    _shards: tuple[Shard, ...]
    index: Path | None = None
    absent: Mapping[str, str] = field(default_factory=dict)  # tensors that only the index knows, and its file for each
    _maps: dict[Path, mmap.mmap] = field(default_factory=dict)
    _lock: Lock = field(default_factory=Lock)  # Several threads read.

    @classmethod
    def open(cls, folder: Path) -> "Checkpoint":
        """Read and check the headers of all shards.

        Whether all that a model needs is there is not asked here: `missing` says why a tensor isn't. Raises
        BackendError, naming the file and what in it is wrong, when there are no weights, when a shard is truncated or
        malformed, and when a tensor is in two shards and no index says in which it counts.
        """
        shards = find_shards(folder)
        tensors: dict[str, TensorEntry] = {}
        for path in shards.paths:
            for entry in read_header(path):
                if entry.name in tensors:
                    entry = _the_one(entry, tensors[entry.name], shards)
                tensors[entry.name] = entry
        if not tensors:
            raise BackendError(f"{folder}: its safetensors files hold no tensors; copy the model again")
        names: dict[Path, list[str]] = {path: [] for path in shards.paths}
        for entry in sorted(tensors.values(), key=lambda entry: (entry.begin, entry.end)):
            names[entry.file].append(entry.name)
        files = tuple(Shard(path, tuple(found)) for path, found in names.items())
        absent = {name: file for name, file in shards.weight_map.items() if name not in tensors}
        return cls(folder, MappingProxyType(tensors), files, shards.index, MappingProxyType(absent))

    @classmethod
    def of_file(cls, path: Path) -> "Checkpoint":
        """A single file's. Raises BackendError when it is truncated or malformed."""
        entries = read_header(path)
        names = tuple(entry.name for entry in entries)
        return cls(path.parent, MappingProxyType({entry.name: entry for entry in entries}), (Shard(path, names),))

    @property
    def weight_bytes(self) -> int:
        return sum(entry.num_bytes for entry in self.tensors.values())

    def missing(self, name: str, reason: str) -> BackendError:
        """That a tensor isn't there; reason: who needs it, "which ..."."""
        files = sorted(set(self.absent.values()) - {shard.path.name for shard in self._shards})
        if files:
            shard = self.absent.get(name, files[0])
            return BackendError(
                f"{self.index}: shard {shard} is missing, and tensor {name!r}, {reason}, is in no other file; download "
                "or copy the model again"
            )
        file = self.absent.get(name)
        place = self.folder if file is None else self.folder / file
        said = "" if file is None else ", and its index says that it is there"
        return BackendError(f"{place}: tensor {name!r} is missing, {reason}{said}")

    def shards(self) -> Sequence[Shard]:
        """The files in the order of their names. Loading one after the other and releasing each maps one at a time."""
        return self._shards

    def read(self, name: str, rows: tuple[int, int] | None = None) -> "Tensor":
        """The tensor, in the file's dtype, without a copy: its memory is the file's pages, read as they are touched.

        rows: begin .. end of its first dimension alone. Writing to it changes neither the file nor what the next `read`
        gives. Raises KeyError for an unknown name.
        """
        whole = self.whole(name)
        return whole if rows is None else whole[slice(*rows)]

    def whole(self, name: str) -> "Tensor":
        """All of a tensor: what `read` gives rows of."""
        import torch

        entry = self.tensors[name]
        num_bytes, name_in_torch = DTYPES[entry.dtype]
        dtype: torch.dtype = getattr(torch, name_in_torch)
        if entry.num_bytes == 0:
            return torch.empty(entry.shape, dtype=dtype)
        mapped = self._map(entry.file)
        if entry.begin % num_bytes:  # the format does not promise alignment, kernels expect it
            return torch.frombuffer(bytearray(mapped[entry.begin : entry.end]), dtype=dtype).view(entry.shape)
        return torch.frombuffer(mapped, dtype=dtype, count=prod(entry.shape), offset=entry.begin).view(entry.shape)

    def outline(self, name: str) -> "Tensor":
        """A tensor of that shape and dtype on the meta device, for which nothing is read."""
        import torch

        entry = self.tensors[name]
        dtype: torch.dtype = getattr(torch, DTYPES[entry.dtype][1])
        return torch.empty(entry.shape, dtype=dtype, device="meta")

    def release(self, shard: Shard) -> None:
        """Give the shard's mapped memory back. Tensors still held stay readable, from the file once more."""
        mapped = self._maps.pop(shard.path, None)
        if mapped is not None:
            mapped.madvise(mmap.MADV_DONTNEED)

    def release_part(self, path: Path, begin: int, end: int) -> None:
        """The same for the whole pages of bytes begin .. end of a file, which stays mapped."""
        begin, end = -(-begin // mmap.PAGESIZE) * mmap.PAGESIZE, end // mmap.PAGESIZE * mmap.PAGESIZE
        if path in self._maps and begin < end:
            self._maps[path].madvise(mmap.MADV_DONTNEED, begin, end - begin)

    def check_finite(self, name: str, tensor: "Tensor") -> None:
        """Raise BackendError if a floating-point tensor, read by that name, has a NaN or an infinity.

        One pass over the tensor without a temporary, at about the speed of memory.
        """
        import torch

        if not tensor.is_floating_point() or not tensor.numel():
            return
        low, high = torch.aminmax(tensor)  # a NaN anywhere makes both NaN
        if not bool(torch.isfinite(low) & torch.isfinite(high)):
            what = "NaN" if bool(torch.isnan(low)) else "an infinite value"
            raise BackendError(f"{self.tensors[name].file}: tensor {name!r} holds {what}; weights must be finite")

    def _map(self, path: Path) -> mmap.mmap:
        with self._lock:
            if path not in self._maps:
                try:
                    with open_file(path) as file:
                        # private and copied on write: torch wants writable memory, and the file must never change
                        self._maps[path] = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_COPY)
                except ValueError:
                    raise BackendError(f"{path}: became empty since its header was read") from None
                if (need := max(t.end for t in self.tensors.values() if t.file == path)) > len(self._maps[path]):
                    raise BackendError(f"{path}: became shorter than its {need} bytes since its header was read")
            return self._maps[path]


def _the_one(entry: TensorEntry, other: TensorEntry, shards: Shards) -> TensorEntry:
    """Of two tensors of one name the one that the index names. Raises BackendError when it names neither."""
    named = shards.weight_map.get(entry.name)
    for one in (entry, other):
        if one.file.name == named:
            return one
    raise BackendError(
        f"{entry.file}: tensor {entry.name!r} is in {other.file.name} as well; keep one of the two files"
    )


def read_header(path: Path) -> tuple[TensorEntry, ...]:
    """The tensors of one safetensors file in the order of their bytes.

    Raises BackendError unless every byte of the file belongs to exactly one tensor of known dtype and matching shape.
    """
    with open_file(path) as file:
        size = file.seek(0, 2)
        file.seek(0)
        start = file.read(SNIFFED)
        length = int.from_bytes(start[:8], "little")
        if 0 < len(start) < 8:
            raise BackendError(f"{path}: truncated: {size} bytes are no safetensors file; copy it again")
        if not 0 < length <= MAX_HEADER:
            raise BackendError(f"{path}: not a safetensors file: {_what_it_is(start, size, length)}")
        file.seek(8)
        if length > size - 8:
            raise BackendError(f"{path}: truncated: its header needs {length + 8} bytes, the file has {size}")
        raw = file.read(length)
    entries = [_entry(path, name, value, 8 + length, size) for name, value in _parse(path, raw).items()]
    entries.sort(key=lambda entry: (entry.begin, entry.end))
    end = 8 + length
    for entry in entries:
        if entry.begin != end:
            what = "overlaps the one before it" if entry.begin < end else "leaves a gap before it"
            at = entry.begin - length - 8
            raise BackendError(
                f"{path}: tensor {entry.name!r} {what}: data_offsets begin at {at}, not {end - length - 8}"
            )
        end = entry.end
    if end != size:
        raise BackendError(f"{path}: {size - end} bytes at its end belong to no tensor; copy it again")
    return tuple(entries)


def _what_it_is(start: bytes, size: int, length: int) -> str:
    if start.startswith(b"GGUF"):
        return "it is a GGUF file; give it a name that ends in .gguf, and name the file itself"
    return told_by_start(start, size) or f"its header would have {length} bytes; download or copy it again"


def _parse(path: Path, raw: bytes) -> dict[str, Any]:
    def no_duplicates(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        result = dict(pairs)
        if len(result) != len(pairs):
            names = [name for name, _ in pairs]
            raise BackendError(f"{path}: header names {next(n for n in names if names.count(n) > 1)!r} twice")
        return result

    try:
        header = json.loads(raw, object_pairs_hook=no_duplicates)
    except (ValueError, RecursionError):
        raise BackendError(f"{path}: not a safetensors file: its header is not JSON") from None
    if not isinstance(header, dict):
        raise BackendError(f"{path}: not a safetensors file: its header is not an object")
    header.pop("__metadata__", None)  # free text
    return header


def _entry(path: Path, name: str, value: object, start: int, size: int) -> TensorEntry:
    """One entry of the header, its offsets made absolute by `start`; `size` is the file's."""

    def wrong(reason: str) -> BackendError:
        return BackendError(f"{path}: tensor {name!r}: {reason}")

    if not isinstance(value, dict) or value.keys() != {"dtype", "shape", "data_offsets"}:
        raise wrong("its entry must have dtype, shape and data_offsets, and nothing else")
    dtype, shape, offsets = value["dtype"], value["shape"], value["data_offsets"]
    if not isinstance(dtype, str) or dtype not in DTYPES:
        raise wrong(f"dtype {dtype!r} is not known; {', '.join(DTYPES)} are")
    if not _are_counts(shape) or len(shape) > MAX_DIMS:
        raise wrong(f"shape {_short(shape)} is not a list of at most {MAX_DIMS} sizes")
    if not _are_counts(offsets) or len(offsets) != 2 or offsets[0] > offsets[1]:
        raise wrong(f"data_offsets {_short(offsets)} are not [begin, end]")
    begin, end = offsets
    if (need := prod(shape) * DTYPES[dtype][0]) != end - begin:
        raise wrong(f"{dtype} of shape {shape} takes {need} bytes, its data_offsets hold {end - begin}")
    if start + end > size:
        raise wrong(f"truncated: it ends at byte {start + end}, the file has {size}; copy it again")
    return TensorEntry(name, dtype, tuple(shape), path, start + begin, start + end)


def _are_counts(value: object) -> bool:
    return isinstance(value, list) and all(type(item) is int and 0 <= item < 1 << 62 for item in value)


def _short(value: object) -> str:
    return repr(value)[:100]
