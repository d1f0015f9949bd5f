"""Looks at every float of a GGUF file's tensors: NaN or infinity is refused, not served.

One NaN in a scale makes rows of a product NaN, and then llama.cpp ends the process or writes nonsense at every request.
The file is read beside the loader, in pieces that a core's cache holds and not as a mapping, which would end the
process if somebody cut the file; whichever of the two comes first brings it in from the disk.
"""

import threading
from collections.abc import Callable
from functools import cache
from typing import NamedTuple, Self

import numpy as np

from tightrope.backends.errors import BackendError
from tightrope.backends.files.gguf.header import DataFile, Header, TensorInfo
from tightrope.backends.files.gguf.tensor_types import TENSOR_TYPES, TensorType
from tightrope.backends.files.opened import open_file
from tightrope.kernels.dispatch import search_file
from tightrope.kernels.forms.masks import ROOM, Masks

# So many bytes, which take milliseconds, are looked at before the scan asks whether anyone waits for it.
_MOST = 1 << 25
_TYPES = {kind.name: kind for kind in TENSOR_TYPES.values()}


class _Bits(NamedTuple):
    """The bits of a float that are all set in NaN and, where the form has it, in infinity."""

    dtype: str  # The word that has them is of this type.
    all_set: int
    start: int = 0  # That word begins there in the float.
    size: int = 0  # It is the float's size in bytes, where that isn't the word's.


_BITS: dict[str, _Bits] = {
    "f16": _Bits("<u2", 0x7C00),
    "bf16": _Bits("<u2", 0x7F80),
    "f32": _Bits("<u4", 0x7F80_0000),
    "f64": _Bits("<u4", 0x7FF0_0000, 4, 8),
    "e8m0": _Bits("u1", 0xFF),
    "ue4m3": _Bits("u1", 0x7F),
    # bits 15 to 12 of the f16 are the fourth word's highest, 11 to 8 the third's
    "nibbles": _Bits("<u4", 0x7000_C000, 4, 8),
}


class ValueScan:
    """A look at all values in a thread of its own while a `with` block runs; leaving it early ends the look."""

    def __init__(self, header: Header) -> None:
        self._header = header
        self._stop = threading.Event()
        self._error: BackendError | None = None
        self._thread = threading.Thread(target=self._run, name="values", daemon=True)

    def __enter__(self) -> Self:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._stop.set()
        self._thread.join()

    def finish(self) -> None:
        """Wait until every value has been looked at. Raises BackendError as `check_values` does."""
        self._thread.join()
        if self._error is not None:
            raise self._error

    def _run(self) -> None:
        try:
            check_values(self._header, self._stop.is_set)
        except BackendError as error:
            self._error = error


def check_values(header: Header, is_stopped: Callable[[], bool] = lambda: False) -> None:
    """Read the tensors once. Raises BackendError, with tensor, field and place, when a float isn't finite.

    Ends early and without a verdict once `is_stopped` says so.
    """
    buffer = np.empty(ROOM, np.uint8)
    for part in header.files:
        with open_file(part.path) as file:
            for tensor in part.tensors:
                kind = _TYPES[tensor.type_name]
                if not kind.floats:
                    continue
                masks = _masks(kind)
                step = _MOST // kind.num_bytes * kind.num_bytes
                for begin in range(0, tensor.num_bytes, step):
                    if is_stopped():
                        return
                    num_bytes, start = min(step, tensor.num_bytes - begin), part.data_start + tensor.offset + begin
                    try:
                        found = search_file(file.fileno(), start, num_bytes, masks, buffer)
                    except EOFError:
                        raise BackendError(
                            f"{part.path}: became shorter while it was read, in tensor {tensor.name!r}"
                        ) from None
                    if found is not None:
                        raise _not_finite(part, tensor, kind, begin + found)


@cache
def _masks(kind: TensorType) -> Masks:
    bits = _BITS[kind.floats[0].form]  # All of a block have one form.
    block = np.zeros(kind.num_bytes, np.uint8)
    word = np.array([bits.all_set], bits.dtype).view(np.uint8)
    for floats in kind.floats:
        size = bits.size or len(word)
        num_bytes = floats.count * (2 if floats.form == "nibbles" else size)
        for start in range(floats.start + bits.start, floats.start + num_bytes, size):
            block[start : start + len(word)] = word
    return Masks.of(block.view(bits.dtype), bits.all_set)


def _not_finite(part: DataFile, tensor: TensorInfo, kind: TensorType, place: int) -> BackendError:
    """place: of the float in the tensor, in bytes."""
    block, byte = divmod(place, kind.num_bytes)
    field = [floats.field for floats in kind.floats if floats.start <= byte][-1]
    where = f"field {field} of block {block}" if field else f"value {block}"
    return BackendError(
        f"{part.path}: tensor {tensor.name!r} holds NaN or infinity: {where} ({kind.name}); the file, or what "
        "it was made of, is damaged"
    )
