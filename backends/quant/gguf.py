"""GGUF's blocks: along a row, 32 or 256 weights at a time as integers of 2 to 8 bits, with scales and perhaps mins.

The K- and IQ-types have blocks of 256 with a float for all, and codes of scales for 16 or 32 weights each. A block's
bytes are taken apart here, and become the layout of QuantizedMatrix, which takes as much memory but for a few bytes a
block. Source: the block_* structures of ggml/src/ggml-common.h, and the values that the `gguf` package 0.19 gives them.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import lru_cache

import torch
from torch import Tensor

from tightrope.backends.files.gguf.tensor_types import TENSOR_TYPES
from tightrope.backends.files.safetensors import Checkpoint, TensorEntry
from tightrope.backends.quant.format import Format, Packed
from tightrope.kernels import dispatch
from tightrope.kernels.forms.quantized import SLICE, TILE, QuantizedMatrix, Rows, Take, pack, tiled
from tightrope.kernels.packing import new_tiles

# The values of IQ4's codes.
IQ4_VALUES = (-127, -104, -83, -65, -49, -35, -22, -10, 1, 13, 25, 38, 53, 69, 89, 113)


@dataclass(frozen=True, slots=True)
class Blocks:
    """What the bytes of blocks [M, bytes] hold, M of them: `codes` [M, values], and for each group of a block a scale.

    `scales` float16 [M, 1], and `mins` alike, added to codes times scale; where a block has several groups, both are
    multiplied by `scale_codes` int8 or uint8 [M, bytes], as QuantizedMatrix has them.
    """

    codes: Tensor
    scales: Tensor
    scale_codes: Tensor | None = None
    mins: Tensor | None = None


@dataclass(frozen=True, slots=True)
class BlockType:
    """A type of blocks: bits of a code, weights of a group, and how its bytes are taken apart."""

    bits: int
    group: int
    take: Callable[[Tensor], Blocks]
    has_book: bool = False


def _float16(raw: Tensor, at: int) -> Tensor:
    """The number [M, 1] at a byte of each block [M, bytes]."""
    return raw[:, at : at + 2].contiguous().view(torch.float16)


def _fields(raw: Tensor, width: int, count: int) -> Tensor:
    """Of bytes [M, B] the fields of `width` bits, [M, count, B]: all bytes' lowest ones first."""
    shifts = torch.arange(count, dtype=torch.uint8).mul_(width)[:, None]
    return (raw.unsqueeze(1) >> shifts) & ((1 << width) - 1)


def _runs(raw: Tensor, run: int, width: int) -> Tensor:
    """Codes [M, N] of bytes [M, B] of which each `run` hold the lowest bits of as many codes, then the next ones."""
    runs = raw.reshape(-1, run)
    return _fields(runs, width, 8 // width).reshape(len(raw), -1)


def _bits32(raw: Tensor) -> Tensor:
    """The 32 bits [M, 32] of four bytes [M, 4], the lowest of the first byte first."""
    return _fields(raw, 1, 8).transpose(1, 2).reshape(len(raw), 32)


def _q4_0(raw: Tensor) -> Blocks:
    return Blocks(_runs(raw[:, 2:], 16, 4), _float16(raw, 0))


def _q4_1(raw: Tensor) -> Blocks:
    return Blocks(_runs(raw[:, 4:], 16, 4), _float16(raw, 0), mins=_float16(raw, 2))


def _q5_0(raw: Tensor) -> Blocks:
    return Blocks(_runs(raw[:, 6:], 16, 4) | (_bits32(raw[:, 2:6]) << 4), _float16(raw, 0))


def _q5_1(raw: Tensor) -> Blocks:
    codes = _runs(raw[:, 8:], 16, 4) | (_bits32(raw[:, 4:8]) << 4)
    return Blocks(codes, _float16(raw, 0), mins=_float16(raw, 2))


def _q8_0(raw: Tensor) -> Blocks:
    return Blocks(raw[:, 2:] ^ 128, _float16(raw, 0))  # A signed byte, and 128.


def _q2_k(raw: Tensor) -> Blocks:
    scales, mins = _float16(raw, 80), _negative(_float16(raw, 82))
    return Blocks(_runs(raw[:, 16:80], 32, 2), scales, raw[:, :16], mins)


def _q3_k(raw: Tensor) -> Blocks:
    high = _fields(raw[:, :32], 1, 8).reshape(len(raw), 256)
    return Blocks(_runs(raw[:, 32:96], 32, 2) | (high << 2), _float16(raw, 108), raw[:, 96:108])


def _q4_k(raw: Tensor) -> Blocks:
    scales, mins = _float16(raw, 0), _negative(_float16(raw, 2))
    return Blocks(_runs(raw[:, 16:], 32, 4), scales, raw[:, 4:16], mins)


def _q5_k(raw: Tensor) -> Blocks:
    high = _fields(raw[:, 16:48], 1, 8).reshape(len(raw), 256)
    scales, mins = _float16(raw, 0), _negative(_float16(raw, 2))
    return Blocks(_runs(raw[:, 48:], 32, 4) | (high << 4), scales, raw[:, 4:16], mins)


def _q6_k(raw: Tensor) -> Blocks:
    codes = _runs(raw[:, :128], 64, 4) | (_runs(raw[:, 128:192], 32, 2) << 4)
    return Blocks(codes, _float16(raw, 208), raw[:, 192:208].contiguous().view(torch.int8))


def _iq4_nl(raw: Tensor) -> Blocks:
    return Blocks(_runs(raw[:, 2:], 16, 4), _float16(raw, 0))


def _iq4_xs(raw: Tensor) -> Blocks:
    low = _fields(raw[:, 4:8], 4, 2).transpose(1, 2).reshape(len(raw), 8)
    high = _fields(raw[:, 2:4], 2, 4).transpose(1, 2).reshape(len(raw), 8)
    return Blocks(_runs(raw[:, 8:], 16, 4), _float16(raw, 0), (low | (high << 4)).view(torch.int8) - 32)


def _negative(numbers: Tensor) -> Tensor:
    """What these types take away is added here."""
    return -numbers


# By ggml's names, of TENSOR_TYPES.
BLOCK_TYPES: Mapping[str, BlockType] = {
    "Q4_0": BlockType(4, 32, _q4_0),
    "Q4_1": BlockType(4, 32, _q4_1),
    "Q5_0": BlockType(5, 32, _q5_0),
    "Q5_1": BlockType(5, 32, _q5_1),
    "Q8_0": BlockType(8, 32, _q8_0),
    "Q2_K": BlockType(2, 16, _q2_k),
    "Q3_K": BlockType(3, 16, _q3_k),
    "Q4_K": BlockType(4, 32, _q4_k),
    "Q5_K": BlockType(5, 32, _q5_k),
    "Q6_K": BlockType(6, 16, _q6_k),
    "IQ4_NL": BlockType(4, 32, _iq4_nl, has_book=True),
    "IQ4_XS": BlockType(4, 32, _iq4_xs, has_book=True),
}
_LAYOUTS = {kind.name: kind for kind in TENSOR_TYPES.values()}
_NUMBERS = {kind.name: number for number, kind in TENSOR_TYPES.items()}  # In ggml.


class GgufBlocks(Format):
    """See Format. A linear is one tensor of rows of blocks, and the linears of a file are of several types."""

    name = "GGUF"
    parts = ("weight",)
    codes = "weight"
    inputs_dim = 1
    by_row = ("weight",)

    @classmethod
    def tells(cls, checkpoint: Checkpoint, tensor: str) -> bool:
        return checkpoint.tensors[tensor].dtype in BLOCK_TYPES

    def holds(self, entry: TensorEntry) -> bool:
        return entry.dtype in BLOCK_TYPES

    def size(self, packed: Packed) -> tuple[int, int]:
        outputs, inputs = packed.shape("weight", 2)
        return inputs, outputs

    def tensor_bytes(self, packed: Packed) -> tuple[int, ...]:
        inputs, outputs = self.size(packed)
        outputs = packed.share_of(outputs, outputs)
        kind = packed.entry("weight").dtype
        form = BLOCK_TYPES[kind]
        one = form.take(torch.zeros(1, _LAYOUTS[kind].num_bytes, dtype=torch.uint8))
        blocks = -(-outputs // TILE) * TILE * inputs // _LAYOUTS[kind].values
        in_block = (form.bits * _LAYOUTS[kind].values // 8, *(part.nbytes for part in _parts(one).values()))
        return tuple(blocks * size for size in in_block)

    def check(self, packed: Packed, num_inputs: int, num_outputs: int) -> None:
        packed.expect("weight", (num_outputs, num_inputs), *BLOCK_TYPES)

    def build(self, packed: Packed, num_inputs: int, num_outputs: int) -> QuantizedMatrix:
        kind = packed.entry("weight").dtype
        raw = packed.rows("weight")  # [N, K / values * bytes] uint8
        return to_matrix(kind, raw, num_inputs, lambda part: _check_finite(packed, part), packed.take)


def to_matrix(
    kind: str, raw: Tensor, num_inputs: int, check: Callable[[Tensor], None] = lambda numbers: None,
    take: Take = new_tiles,
) -> QuantizedMatrix:  # fmt: skip
    """The matrix of rows of blocks [N, bytes] uint8, its codes where `take` says.

    `check` is called with all floats that there are in the blocks.
    """
    matrix = _empty(kind, len(raw), num_inputs, take)
    if not dispatch.pack_blocks(_NUMBERS[kind], raw, matrix):
        _fill(matrix, kind, raw)
    for numbers in (matrix.scales, matrix.mins):
        if numbers is not None:
            check(numbers)
    return matrix


def _empty(kind: str, outputs: int, num_inputs: int, take: Take) -> QuantizedMatrix:
    """A matrix with tensors of the right sizes, not filled."""
    form, layout = BLOCK_TYPES[kind], _LAYOUTS[kind]
    rows = _rows(num_inputs, form.group, form.bits)
    tiles, blocks = -(-outputs // TILE), num_inputs // layout.values
    parts = {
        name: torch.empty(tiles, blocks * part.shape[1], TILE, dtype=part.dtype)
        for name, part in _parts(form.take(torch.zeros(1, layout.num_bytes, dtype=torch.uint8))).items()
    }
    book = torch.tensor(IQ4_VALUES, dtype=torch.int8) if form.has_book else None
    codes = take(tiles, num_inputs * form.bits * TILE // 8)
    return QuantizedMatrix(
        num_inputs, outputs, rows.source, rows.group_starts, rows.group_bits, codes, codebook=book, **parts
    )


def _fill(matrix: QuantizedMatrix, kind: str, raw: Tensor) -> None:
    """What dispatch.pack_blocks does, slice by slice."""
    rows = Rows(matrix.source, matrix.group_starts, matrix.group_bits)
    for begin in range(0, len(raw), SLICE):
        some = raw[begin : begin + SLICE]
        blocks = BLOCK_TYPES[kind].take(some.reshape(-1, _LAYOUTS[kind].num_bytes))
        tiles = slice(begin // TILE, -(-(begin + len(some)) // TILE))
        matrix.codes[tiles] = pack(blocks.codes.view(len(some), -1).t(), rows)
        for name, part in _parts(blocks).items():
            getattr(matrix, name)[tiles] = tiled(part.reshape(len(some), -1).t())


def _parts(blocks: Blocks) -> dict[str, Tensor]:
    """All but the codes that a type has, by the names of QuantizedMatrix."""
    names = ("scales", "scale_codes", "mins")
    return {name: part for name in names if (part := getattr(blocks, name)) is not None}


@lru_cache(maxsize=256)
def _rows(num_inputs: int, group: int, bits: int) -> Rows:
    """Rows in the order of the inputs. Matrices share them, and kernels see by that that they read inputs alike."""
    starts = torch.arange(0, num_inputs + 1, group, dtype=torch.int32)
    return Rows(None, starts, torch.full((num_inputs // group,), bits, dtype=torch.uint8))


def _check_finite(packed: Packed, numbers: Tensor) -> None:
    packed.checkpoint.check_finite(packed.name("weight"), numbers)
