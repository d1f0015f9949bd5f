"""The weights of a model folder: safetensors headers, checked before anything is loaded, and tensors from disk.

A shard is an 8-byte little-endian length, a JSON header of that length, and the tensors' bytes without gap or overlap.
Source: the format's description, huggingface/safetensors README. Pickled weights (.bin, .pt) are never opened.
"""

import json
import mmap
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from math import prod
from pathlib import Path
from types import MappingProxyType
from typing import TYPE_CHECKING, Any

from tightrope.backends.errors import BackendError
from tightrope.backends.hf.jsonfile import read_object
from tightrope.backends.opened import open_file

if TYPE_CHECKING:
    from torch import Tensor

MAX_HEADER = 100_000_000  # bytes; the format's own limit
MAX_INDEX = 200_000_000  # bytes
MAX_DIMS = 8

DTYPE_BYTES: Mapping[str, int] = {
    "BOOL": 1,
    "U8": 1,
    "I8": 1,
    "F8_E4M3": 1,
    "F8_E5M2": 1,
    "F8_E8M0": 1,
    "I16": 2,
    "U16": 2,
    "F16": 2,
    "BF16": 2,
    "I32": 4,
    "U32": 4,
    "F32": 4,
    "I64": 8,
    "U64": 8,
    "F64": 8,
}

_PART = re.compile(r"(?P<stem>.+)-(?P<number>\d{5})-of-(?P<count>\d{5})\.safetensors")
_PICKLES = ("*.bin", "*.pt", "*.pth", "*.ckpt", "*.pkl")


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
    _maps: dict[Path, mmap.mmap] = field(default_factory=dict)

    @classmethod
    def open(cls, folder: Path) -> "Checkpoint":
        """Read and check the headers of all shards.

        Raises BackendError, naming the file and what in it is wrong, when a shard is missing, lies outside the folder,
        is truncated or malformed, when a tensor is in two shards, or when index and shards disagree.
        """
        paths, weight_map = _find_shards(folder)
        tensors: dict[str, TensorEntry] = {}
        shards = []
        for path in paths:
            entries = read_header(path)
            for entry in entries:
                if entry.name in tensors:
                    other = tensors[entry.name].file.name
                    raise BackendError(
                        f"{path}: tensor {entry.name!r} is in {other} as well; keep one of the two files"
                    )
                tensors[entry.name] = entry
            shards.append(Shard(path, tuple(entry.name for entry in entries)))
        if not tensors:
            raise BackendError(f"{folder}: its safetensors files hold no tensors; copy the model again")
        if weight_map is not None:
            _compare(folder, weight_map, tensors)
        return cls(folder, MappingProxyType(tensors), tuple(shards))

    @classmethod
    def of_file(cls, path: Path) -> "Checkpoint":
        """A single file's. Raises BackendError when it is truncated or malformed."""
        entries = read_header(path)
        names = tuple(entry.name for entry in entries)
        return cls(path.parent, MappingProxyType({entry.name: entry for entry in entries}), (Shard(path, names),))

    @property
    def weight_bytes(self) -> int:
        return sum(entry.num_bytes for entry in self.tensors.values())

    def shards(self) -> Sequence[Shard]:
        """The files in the order of their names. Loading one after the other and releasing each maps one at a time."""
        return self._shards

    def read(self, name: str) -> "Tensor":
        """The tensor, in the file's dtype, without a copy: its memory is the file's pages, read as they are touched.

        Writing to it changes neither the file nor what the next `read` gives. Raises KeyError for an unknown name.
        """
        import torch

        entry = self.tensors[name]
        dtype = _torch_dtype(entry.dtype)
        if entry.num_bytes == 0:
            return torch.empty(entry.shape, dtype=dtype)
        mapped = self._map(entry.file)
        if entry.begin % DTYPE_BYTES[entry.dtype]:  # the format does not promise alignment, kernels expect it
            return torch.frombuffer(bytearray(mapped[entry.begin : entry.end]), dtype=dtype).view(entry.shape)
        return torch.frombuffer(mapped, dtype=dtype, count=prod(entry.shape), offset=entry.begin).view(entry.shape)

    def release(self, shard: Shard) -> None:
        """Give the shard's mapped memory back. Tensors still held stay readable, from the file once more."""
        mapped = self._maps.pop(shard.path, None)
        if mapped is not None:
            mapped.madvise(mmap.MADV_DONTNEED)

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


def read_header(path: Path) -> tuple[TensorEntry, ...]:
    """The tensors of one safetensors file in the order of their bytes.

    Raises BackendError unless every byte of the file belongs to exactly one tensor of known dtype and matching shape.
    """
    with open_file(path) as file:
        size = file.seek(0, 2)
        file.seek(0)
        prefix = file.read(8)
        length = int.from_bytes(prefix, "little")
        if len(prefix) < 8:
            raise BackendError(f"{path}: truncated: {size} bytes are no safetensors file; copy it again")
        if length > MAX_HEADER:
            raise BackendError(f"{path}: not a safetensors file: its header would have {length} bytes")
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
    if not isinstance(dtype, str) or dtype not in DTYPE_BYTES:
        raise wrong(f"dtype {dtype!r} is not known; {', '.join(DTYPE_BYTES)} are")
    if not _are_counts(shape) or len(shape) > MAX_DIMS:
        raise wrong(f"shape {_short(shape)} is not a list of at most {MAX_DIMS} sizes")
    if not _are_counts(offsets) or len(offsets) != 2 or offsets[0] > offsets[1]:
        raise wrong(f"data_offsets {_short(offsets)} are not [begin, end]")
    begin, end = offsets
    if (need := prod(shape) * DTYPE_BYTES[dtype]) != end - begin:
        raise wrong(f"{dtype} of shape {shape} takes {need} bytes, its data_offsets hold {end - begin}")
    if start + end > size:
        raise wrong(f"truncated: it ends at byte {start + end}, the file has {size}; copy it again")
    return TensorEntry(name, dtype, tuple(shape), path, start + begin, start + end)


def _are_counts(value: object) -> bool:
    return isinstance(value, list) and all(type(item) is int and 0 <= item < 1 << 62 for item in value)


def _short(value: object) -> str:
    return repr(value)[:100]


def _find_shards(folder: Path) -> tuple[list[Path], Mapping[str, str] | None]:
    """The shards of a folder, in order, and the index's map from tensor to file where there is an index that counts."""
    found = sorted(path for path in folder.glob("*.safetensors") if not path.name.startswith("adapter_"))
    single = folder / "model.safetensors"
    if single in found:
        return [_inside(folder, single.name, folder)], None
    indices = sorted(folder.glob("*.safetensors.index.json"))
    if len(indices) > 1:
        raise BackendError(
            f"{folder}: holds {len(indices)} index files ({', '.join(i.name for i in indices)}); keep one"
        )
    if indices:
        weight_map = _read_index(indices[0])
        names = sorted(set(weight_map.values()))
        # a quantiser may have copied the index of the model that it read: then none of the index's files is here
        if not found or any((folder / name).is_file() for name in names):
            return [_inside(folder, name, indices[0]) for name in names], weight_map
    if not found:
        raise _no_weights(folder)
    _check_parts(folder, found)
    return [_inside(folder, path.name, folder) for path in found], None


def _read_index(path: Path) -> Mapping[str, str]:
    weight_map = read_object(path, MAX_INDEX).get("weight_map")
    if not isinstance(weight_map, dict) or not weight_map:
        raise BackendError(f"{path}: weight_map is missing or empty; it must map tensor names to file names")
    for name, file in weight_map.items():
        if not isinstance(file, str) or not file.endswith(".safetensors"):
            raise BackendError(
                f"{path}: weight_map of {name!r} is {_short(file)}; it must be a .safetensors file's name"
            )
        if re.search(r"[/\\:\0]", file):
            raise BackendError(
                f"{path}: weight_map of {name!r} is {_short(file)}, outside the folder; a plain name is right"
            )
    return weight_map


def _inside(folder: Path, name: str, said_by: Path) -> Path:
    """The shard's path, if its file is in the folder, or in the blobs of the hub's cache that the folder belongs to."""
    path = folder / name
    if not path.is_file():
        raise BackendError(f"{said_by}: shard {name} is missing; download or copy the model again")
    home, real = folder.resolve(), path.resolve()
    blobs = home.parent.parent / "blobs"  # of models--org--name/snapshots/COMMIT, whose files are links
    is_blob = home.parent.name == "snapshots" and real.is_relative_to(blobs)
    if not real.is_relative_to(home) and not is_blob:
        raise BackendError(f"{path}: a link to {real}, outside the model's folder; put the file itself there")
    return path


def _check_parts(folder: Path, found: Sequence[Path]) -> None:
    """Files named like part 1 of 3 must be all there, also when no index names them."""
    names = {path.name for path in found}
    for match in filter(None, map(_PART.fullmatch, sorted(names))):
        for number in range(1, min(int(match["count"]), 10_000) + 1):
            part = f"{match['stem']}-{number:05d}-of-{match['count']}.safetensors"
            if part not in names:
                raise BackendError(f"{folder}: shard {part} is missing; download or copy the model again")


def _no_weights(folder: Path) -> BackendError:
    pickles = sorted(path.name for pattern in _PICKLES for path in folder.glob(pattern))
    if pickles:
        return BackendError(
            f"{folder / pickles[0]}: pickled weights can run code when they are read, so they are not; "
            "convert the model to safetensors"
        )
    return BackendError(f"{folder}: holds no .safetensors file")


def _compare(folder: Path, weight_map: Mapping[str, str], tensors: Mapping[str, TensorEntry]) -> None:
    for name, file in weight_map.items():
        if name not in tensors or tensors[name].file.name != file:
            raise BackendError(f"{folder / file}: tensor {name!r} is missing, which the index says is there")
    for name, entry in tensors.items():
        if name not in weight_map:
            raise BackendError(f"{entry.file}: tensor {name!r} is not in the index; both must be of the same model")


def _torch_dtype(name: str) -> Any:  # noqa: ANN401 - a torch.dtype, whose module is not imported for headers alone
    import torch

    return {
        "BOOL": torch.bool,
        "U8": torch.uint8,
        "I8": torch.int8,
        "F8_E4M3": torch.float8_e4m3fn,
        "F8_E5M2": torch.float8_e5m2,
        "F8_E8M0": torch.float8_e8m0fnu,
        "I16": torch.int16,
        "U16": torch.uint16,
        "F16": torch.float16,
        "BF16": torch.bfloat16,
        "I32": torch.int32,
        "U32": torch.uint32,
        "F32": torch.float32,
        "I64": torch.int64,
        "U64": torch.uint64,
        "F64": torch.float64,
    }[name]
