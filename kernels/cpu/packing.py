"""One build's functions that lay packed weights out anew, called through ctypes; meanings are in kernels.packing."""

import ctypes
from typing import Any  # ctypes keeps the type of its types to itself.

import torch
from torch import Tensor

from tightrope.kernels.cpu.addresses import WEIGHTS
from tightrope.kernels.cpu.native import open_build, typed_function
from tightrope.kernels.forms.quantized import TILE, Nf4Matrix, Rows, Take, runs_of, tile_bytes


class NativePacking:
    """They run on the threads of the build's other kernels."""

    def __init__(self, instruction_set: str) -> None:
        """Raises UnusableBuild."""
        library = open_build(instruction_set)

        def function(name: str, types: str) -> Any:  # noqa: ANN401 - see above
            return typed_function(library, name, types)

        self._columns, self._nibbles = function("pack_columns", "plpippip"), function("pack_nibbles", "plppiip")
        self._rows, self._nf4 = function("unpack_rows", "plpiiiipi"), function("pack_nf4", "pplliipp")
        self._copy_finite = function("copy_finite", "plip")
        for answering in (self._columns, self._copy_finite):
            answering.restype = ctypes.c_int

    def pack_columns(self, words: Tensor, starts: Tensor, rows: Rows, num_outputs: int, take: Take) -> Tensor:
        bits, begins, ends, _ = zip(*runs_of(rows), strict=True)
        run_starts, widths = (torch.tensor(numbers, dtype=torch.int32) for numbers in ((*begins, ends[-1]), bits))
        packed = take(-(-num_outputs // TILE), tile_bytes(rows))
        where = words.data_ptr(), words.stride(0), starts.data_ptr(), num_outputs
        runs = run_starts.data_ptr(), widths.data_ptr(), len(bits)
        is_known = self._columns(*where, *runs, packed.data_ptr())
        assert is_known, f"bits are among {bits}"
        return packed

    def pack_nibbles(self, words: Tensor, nibble_of: Tensor, rows: Rows, num_outputs: int, take: Take) -> Tensor:
        source = None if rows.source is None else rows.source.data_ptr()
        packed = take(-(-num_outputs // TILE), tile_bytes(rows))
        where = words.data_ptr(), words.stride(0), source, nibble_of.data_ptr()
        self._nibbles(*where, int(rows.group_starts[-1]), num_outputs, packed.data_ptr())
        return packed

    def unpack_rows(self, words: Tensor, starts: Tensor, bits: int, more: int, dtype: torch.dtype) -> Tensor:
        groups, outputs = len(words), len(starts)
        out = torch.empty(-(-outputs // TILE), groups, TILE, dtype=dtype)
        where = words.data_ptr(), words.stride(0), starts.data_ptr(), bits, more
        self._rows(*where, groups, outputs, out.data_ptr(), dtype == torch.int16)
        return out

    def pack_nf4(
        self, raw: Tensor, block_scales: Tensor, shape: tuple[int, int], blocksize: int, run: int, book: Tensor
    ) -> Nf4Matrix:
        outputs, inputs = shape
        tiles = -(-outputs // TILE)
        codes = torch.empty(tiles, inputs // 8, TILE, dtype=torch.int32)
        scales = torch.empty(tiles, inputs // run, TILE)
        sizes = blocksize, run, inputs, outputs
        self._nf4(raw.data_ptr(), block_scales.data_ptr(), *sizes, codes.data_ptr(), scales.data_ptr())
        return Nf4Matrix(inputs, outputs, run, book, codes, scales)

    def copy_finite(self, target: Tensor, source: Tensor) -> bool:
        start, to = source.data_ptr(), target.data_ptr()
        return bool(self._copy_finite(start, source.numel(), WEIGHTS[source.dtype], to))
