"""Looks at every float of a GGUF file's tensors: NaN or infinity is refused, not served.

One NaN in a scale makes rows of a product NaN, and then llama.cpp ends the process or writes nonsense at every request.
The file is read beside the loader, in pieces that a core's cache holds and not as a mapping, which would end the
process if somebody cut the file; whichever of the two comes first brings it in from the disk.
"""

import os
import threading
from collections.abc import Callable, Iterator
from typing import Any, Self

import numpy as np

from tightrope.backends.errors import BackendError
from tightrope.backends.files.opened import open_file
from tightrope.backends.gguf.header import DataFile, Header, TensorInfo
from tightrope.backends.gguf.tensor_types import TENSOR_TYPES, Floats

_PIECE = 1 << 20  # bytes that are read at once
_TYPES = {kind.name: kind for kind in TENSOR_TYPES.values()}
# form -> dtype, and the bits that are all set in NaN and, where the form has it, in infinity
_BITS: dict[str, tuple[str, int]] = {
    "f16": ("<u2", 0x7C00),
    "bf16": ("<u2", 0x7F80),
    "f32": ("<u4", 0x7F80_0000),
    "f64": ("<u8", 0x7FF0_0000_0000_0000),
    "e8m0": ("u1", 0xFF),
    "ue4m3": ("u1", 0x7F),
    "nibbles": ("<u2", 0x7C00),
}

Array = np.ndarray[Any, np.dtype[Any]]


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
    buffer = np.empty(_PIECE, np.uint8)
    for part in header.files:
        with open_file(part.path) as file:
            for tensor in part.tensors:
                for first, blocks in _pieces(file.fileno(), part, tensor, buffer):
                    if is_stopped():
                        return
                    _check_blocks(part, tensor, first, blocks)


def _pieces(file: int, part: DataFile, tensor: TensorInfo, buffer: Array) -> Iterator[tuple[int, Array]]:
    """Blocks of a tensor, uint8 [n, bytes of a block], each time with the number of the first; all in `buffer`."""
    kind = _TYPES[tensor.type_name]
    if not kind.floats:
        return
    num_blocks = tensor.num_bytes // kind.num_bytes
    step = len(buffer) // kind.num_bytes
    for first in range(0, num_blocks, step):
        blocks = buffer[: min(step, num_blocks - first) * kind.num_bytes]
        start = part.data_start + tensor.offset + first * kind.num_bytes
        if os.preadv(file, [blocks.data], start) != len(blocks):
            raise BackendError(f"{part.path}: became shorter while it was read, in tensor {tensor.name!r}")
        yield first, blocks.reshape(-1, kind.num_bytes)


def _check_blocks(part: DataFile, tensor: TensorInfo, first: int, blocks: Array) -> None:
    kind = _TYPES[tensor.type_name]
    for floats in kind.floats:
        exponents, all_set = _exponents(blocks, floats)
        if exponents.max() == all_set:
            block = first + int(np.unravel_index(exponents.argmax(), exponents.shape)[0])
            place = f"field {floats.field} of block {block}" if floats.field else f"value {block}"
            raise BackendError(
                f"{part.path}: tensor {tensor.name!r} holds NaN or infinity: {place} ({kind.name}); the file, or what "
                "it was made of, is damaged"
            )


def _exponents(blocks: Array, floats: Floats) -> tuple[Array, int]:
    """The bits of each float that tell, [n, count], and what they are when it isn't finite."""
    dtype, all_set = _BITS[floats.form]
    size = np.dtype(dtype).itemsize
    shape, strides = (len(blocks), floats.count), (blocks.shape[1], size)
    bits = np.ndarray(shape, dtype, blocks, floats.start, strides)
    if floats.form == "nibbles":  # bits 15 to 12 of the f16 are the fourth's highest, 11 to 8 the third's
        return (bits[:, 3:] & 0x7000) | (bits[:, 2:3] >> 4 & 0x0C00), all_set
    return bits & np.array(all_set, dtype), all_set
