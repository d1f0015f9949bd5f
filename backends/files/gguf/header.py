"""Reads the header of a GGUF file and trusts nothing in it.

llama.cpp ends the whole process on some malformed files; this reader finds what is wrong first, in plain Python, and
says it in one line. It also yields what planning needs: sizes, tensor types, the window the model was trained for.

Layout (little endian): magic, version u32, tensor count u64, key count u64; keys, each a string, a type u32 and a
value; tensor infos, each a name, dimension count u32, dimensions u64 (fastest first), type u32, offset u64; padding to
the alignment; the tensors' bytes. Source: the GGUF specification, ggml/docs/gguf.md.
"""

import os
import re
import struct
from dataclasses import dataclass
from math import isfinite, prod
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np

from tightrope.backends.errors import BackendError
from tightrope.backends.files.foreign import SNIFFED, check_is_no_ggml
from tightrope.backends.files.gguf.not_gguf import describe
from tightrope.backends.files.gguf.tensor_types import TENSOR_TYPES
from tightrope.backends.files.gguf.vocabulary import PER_TOKEN, TOKENS, BadVocabulary, check_vocabulary
from tightrope.backends.files.opened import open_file

MAGIC = b"GGUF"
MAX_KEYS = 1 << 16
MAX_TENSORS = 1 << 20
MAX_STRING = 64 << 20  # In bytes. The longest real ones are chat templates.
MAX_HEADER = 1 << 30  # So many bytes may come before the tensors; the largest vocabularies take about 30 MiB.
MAX_KEPT_ARRAY = 4096  # Longer arrays, which vocabularies are, are checked and counted, not kept.
MAX_NAME = 64  # It is llama.cpp's own limit of a tensor's name, in bytes with the end.
MAX_DIMS = 4

# value type id -> struct format; 8 is a string, 9 an array
_SCALARS = {0: "<B", 1: "<b", 2: "<H", 3: "<h", 4: "<I", 5: "<i", 6: "<f", 7: "<?", 10: "<Q", 11: "<q", 12: "<d"}
_STRING, _ARRAY, _UINT32, _FLOAT32 = 8, 9, 4, 6
_FLOATS = (6, 12)


@dataclass(frozen=True, slots=True)
class LongArray:
    """An array that was checked and counted but not kept."""

    count: int


Scalar = int | float | bool | str
Value = Scalar | tuple[Scalar, ...] | LongArray
Array = np.ndarray[Any, np.dtype[Any]]


@dataclass(frozen=True, slots=True)
class TensorInfo:
    """One tensor: dimensions fastest first, `offset` from the start of the tensor data, `num_bytes` without padding."""

    name: str
    dims: tuple[int, ...]
    type_name: str
    offset: int
    num_bytes: int


@dataclass(frozen=True, slots=True)
class DataFile:
    """One file of a model, with the tensors in it; their offsets count from byte `data_start`."""

    path: Path
    data_start: int
    tensors: tuple[TensorInfo, ...]


@dataclass(frozen=True, slots=True)
class Header:
    """What a GGUF file (all its parts, when split) says before its tensors' bytes."""

    path: Path
    metadata: dict[str, Value]
    files: tuple[DataFile, ...]
    notes: tuple[str, ...] = ()  # They say what is odd about the vocabulary, one line each.

    @property
    def tensors(self) -> tuple[TensorInfo, ...]:
        return tuple(tensor for file in self.files for tensor in file.tensors)

    @property
    def chat_templates(self) -> tuple[tuple[str, str], ...]:
        """Names and Jinja sources of the chat templates that stand beside the default one."""
        start = "tokenizer.chat_template."
        named = {key.removeprefix(start): value for key, value in self.metadata.items() if key.startswith(start)}
        return tuple((name, value) for name, value in named.items() if isinstance(value, str))

    @property
    def weight_bytes(self) -> int:
        return sum(t.num_bytes for t in self.tensors)

    @property
    def num_params(self) -> int:
        return sum(prod(t.dims) for t in self.tensors)

    @property
    def bits_per_weight(self) -> float:
        return 8 * self.weight_bytes / max(1, self.num_params)


def read_header(path: Path) -> Header:
    """Read and check a GGUF file and, when it is the first of several parts, the other parts too.

    Raises BackendError with one line that names the file and the reason.
    """
    header = _read_one(path)
    count = header.metadata.get("split.count", 1)
    if not isinstance(count, int) or count <= 1:
        return header
    parts = _parts(path, count)
    if header.metadata.get("split.no", 0) != 0:
        raise BackendError(f"{path}: this is a later part of a split model; name its first part, {parts[0].name}")
    files = header.files + tuple(file for part in parts[1:] for file in _read_one(part).files)
    return Header(path, header.metadata, files, header.notes)


def _parts(path: Path, count: int) -> list[Path]:
    match = re.fullmatch(r"(.*)-(\d{5})-of-(\d{5})\.gguf", path.name)
    if match is None or int(match[3]) != count:
        raise BackendError(
            f"{path}: split into {count} parts, but not named like model-00001-of-{count:05d}.gguf; restore its name"
        )
    parts = [path.with_name(f"{match[1]}-{i:05d}-of-{count:05d}.gguf") for i in range(1, count + 1)]
    for part in parts:
        if not part.is_file():
            raise BackendError(f"{path}: split into {count} parts, and {part.name} is missing beside it")
    return parts


def _read_one(path: Path) -> Header:
    with open_file(path) as file:
        return _Parser(path, file, os.fstat(file.fileno()).st_size).header()


class _Parser:
    """Walks one file from its start; every length is checked against what is left of the file before it is used."""

    def __init__(self, path: Path, file: BinaryIO, size: int) -> None:
        self._path = path
        self._file = file
        self._size = size
        self._pos = 0
        self._what = "the header"
        self._last_type = self._element_type = -1
        self._strings: list[bytes] = []  # They are those of the last array of strings.
        self._numbers: Array = np.empty(0)  # They are those of the last array of numbers.
        self._texts: list[bytes] | None = None  # They are those of the vocabulary.
        self._per_token: dict[str, Array] = {}

    def header(self) -> Header:
        start = self._file.read(SNIFFED)
        if not start.startswith(MAGIC):
            check_is_no_ggml(self._path)
            raise self._error(f"not a GGUF file: {describe(start, self._size)}")
        self._file.seek(0)
        self._take(len(MAGIC))
        self._version()
        num_tensors = self._count("<Q", MAX_TENSORS, "tensors")
        num_keys = self._count("<Q", MAX_KEYS, "metadata keys")
        metadata: dict[str, Value] = {}
        for i in range(num_keys):
            self._what = f"metadata key {i + 1} of {num_keys}"
            key = self._string()
            if not key or key in metadata:
                raise self._error(f"{self._what} is {'empty' if not key else f'a second {key!r}'}")
            self._what = f"the value of {key!r}"
            metadata[key] = self._value()
            if key == "general.alignment":
                self._check_alignment(metadata[key])
            if key == "adapter.lora.alpha" and self._last_type != _FLOAT32:
                raise self._error(f"{key} is {metadata[key]!r}; it must be a number, as float32")
            if key in PER_TOKEN:
                self._check_per_token(key)
        notes = self._check_vocabulary(metadata)
        alignment = metadata.get("general.alignment", 32)
        assert isinstance(alignment, int)
        tensors = self._tensors(num_tensors, alignment)
        return Header(
            self._path, metadata, (DataFile(self._path, -(-self._pos // alignment) * alignment, tensors),), notes
        )

    def _version(self) -> None:
        version = self._number("<I")
        if version in (2, 3):
            return
        if version & 0xFFFF == 0:
            raise self._error(f"GGUF version {version:#x}: a big-endian file; convert it for little-endian machines")
        raise self._error(f"GGUF version {version} is not known; versions 2 and 3 are")

    def _check_alignment(self, value: Value) -> None:
        is_power = isinstance(value, int) and value >= 8 and value & (value - 1) == 0
        if self._last_type != _UINT32 or not is_power or value > 1 << 20:  # type: ignore[operator]
            raise self._error(f"general.alignment is {value!r}; it must be a power of two of at least 8, as uint32")

    def _check_per_token(self, key: str) -> None:
        """Arrays with an element for each token: llama.cpp reads them as of one type."""
        wanted = PER_TOKEN[key]
        if self._last_type != _ARRAY or self._element_type not in wanted.values():
            raise self._error(f"{key} must be an array of {' or '.join(wanted)}")
        if key == TOKENS:
            self._texts = self._strings
        else:
            self._per_token[key] = self._numbers

    def _check_vocabulary(self, metadata: dict[str, Value]) -> tuple[str, ...]:
        if self._texts is None:
            return ()
        try:
            return check_vocabulary(self._texts, self._per_token, metadata)
        except BadVocabulary as error:
            raise self._error(str(error)) from None

    def _value(self) -> Value:
        self._last_type = kind = self._number("<I")
        if kind == _STRING:
            return self._string()
        if kind != _ARRAY:
            value = self._number(self._format(kind))
            if not isfinite(value):
                raise self._error(f"{self._what} is {value}; it must be a finite number")
            return value
        self._element_type = self._number("<I")
        return self._array(self._element_type, self._number("<Q"))

    def _array(self, kind: int, count: int) -> Value:
        if kind == _ARRAY:
            raise self._error(f"{self._what} is an array of arrays, which GGUF readers don't accept")
        if kind == _STRING:
            texts = self._strings = self._string_array(count)
            return LongArray(count) if count > MAX_KEPT_ARRAY else tuple(self._decode(text) for text in texts)
        form = self._format(kind)
        raw = self._take(count * struct.calcsize(form))
        values = self._numbers = np.frombuffer(raw, form)
        if kind in _FLOATS and not (is_finite := np.isfinite(values)).all():
            place = int(is_finite.argmin())
            raise self._error(f"{self._what} has {values[place]} as number {place}; all must be finite")
        return LongArray(count) if count > MAX_KEPT_ARRAY else tuple(values.tolist())

    def _format(self, kind: int) -> str:
        if kind not in _SCALARS:
            raise self._error(f"{self._what} has type id {kind}; ids go from 0 to 12")
        return _SCALARS[kind]

    def _string_array(self, count: int) -> list[bytes]:
        if count * 8 > self._size - self._pos:
            raise self._error(f"truncated: {self._what} claims {count} strings, more than the rest of the file holds")
        # The loop runs 10^5 times and more.
        read, end, from_bytes = self._file.read, min(self._size, MAX_HEADER), int.from_bytes
        texts: list[bytes] = []
        for _ in range(count):
            length = from_bytes(read(8), "little")
            if length > MAX_STRING or self._pos + 8 + length > end:
                self._file.seek(self._pos)
                self._take(self._length())  # This says what is wrong.
            texts.append(read(length))
            self._pos += 8 + length
        return texts

    def _tensors(self, count: int, alignment: int) -> tuple[TensorInfo, ...]:
        tensors: list[TensorInfo] = []
        names: set[str] = set()
        end = 0  # The next tensor has to start there.
        for i in range(count):
            self._what = f"tensor {i + 1} of {count}"
            tensor = self._tensor()
            if tensor.name in names:
                raise self._error(f"{self._what} is a second {tensor.name!r}")
            if tensor.offset != end:
                raise self._error(f"tensor {tensor.name!r} starts at offset {tensor.offset}; {end} is where it belongs")
            names.add(tensor.name)
            tensors.append(tensor)
            end += -(-tensor.num_bytes // alignment) * alignment
        start = -(-self._pos // alignment) * alignment
        if tensors and (need := start + tensors[-1].offset + tensors[-1].num_bytes) > self._size:
            raise self._error(f"truncated: its tensors need {need} bytes, the file has {self._size}; copy it again")
        return tuple(tensors)

    def _tensor(self) -> TensorInfo:
        length = self._number("<Q")
        if length >= MAX_NAME:
            raise self._error(f"{self._what} has a name of {length} bytes; {MAX_NAME - 1} is the most")
        name = self._decode(self._take(length))
        num_dims = self._number("<I")
        if num_dims > MAX_DIMS:
            raise self._error(f"tensor {name!r} has {num_dims} dimensions; {MAX_DIMS} is the most")
        dims = tuple(self._number("<Q") for _ in range(num_dims))
        kind = self._number("<I")
        offset = self._number("<Q")
        if kind not in TENSOR_TYPES:
            raise self._error(f"tensor {name!r} has type id {kind}, which is not known")
        form = TENSOR_TYPES[kind]
        if any(dim == 0 or dim >= 1 << 40 for dim in dims) or (dims and dims[0] % form.values):
            reason = f"{form.name} needs rows of a multiple of {form.values}"
            raise self._error(f"tensor {name!r} has dimensions {dims}; {reason}")
        num_bytes = prod(dims) // form.values * form.num_bytes
        if num_bytes > self._size:
            raise self._error(f"truncated: tensor {name!r} needs {num_bytes} bytes, the file has {self._size}")
        return TensorInfo(name, dims, form.name, offset, num_bytes)

    def _count(self, form: str, most: int, what: str) -> int:
        count = self._number(form)
        if count > most:
            raise self._error(f"claims {count} {what}; {most} is the most")
        return count

    def _length(self) -> int:
        length = int.from_bytes(self._take(8), "little")
        if length > MAX_STRING:
            raise self._error(f"{self._what} holds a string of {length} bytes; {MAX_STRING} is the most")
        return length

    def _string(self) -> str:
        return self._decode(self._take(self._length()))

    def _decode(self, raw: bytes) -> str:
        return raw.decode("utf-8", errors="replace")

    def _number(self, form: str) -> int:
        """One number of struct format `form`; floats and booleans come out as such, whatever the annotation says."""
        (value,) = struct.unpack(form, self._take(struct.calcsize(form)))
        return value  # type: ignore[no-any-return]

    def _take(self, num_bytes: int) -> bytes:
        if num_bytes > self._size - self._pos:
            raise self._error(f"truncated in {self._what}: {self._size} bytes are not the whole file; copy it again")
        if self._pos + num_bytes > MAX_HEADER:
            raise self._error(f"its header is larger than {MAX_HEADER} bytes, in {self._what}")
        raw = self._file.read(num_bytes)
        if len(raw) != num_bytes:
            raise self._error(f"became shorter while it was read, in {self._what}")
        self._pos += num_bytes
        return raw

    def _error(self, reason: str) -> BackendError:
        return BackendError(f"{self._path}: {reason}")
