"""Quantized matrices as the kernels of a CPU read them: the one form in memory of EXL2, GPTQ, AWQ and GGUF, and that of
nf4.

Fixed letters: K inputs, N outputs, R stored rows, G groups of stored rows, C tiles of 16 outputs (N / 16 rounded up).
"""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from threading import Lock
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

Take = Callable[[int, int], Tensor]  # Memory for so many tiles of so many bytes.

TILE = 16  # Outputs of a tile.
LINE = 64  # Bytes: 4 codes, or parts of codes, side by side for each of a tile's outputs.
SLICE, SLICE_ON_CARD = 256, 4096  # Outputs packed at a time: in a processor's caches, or in few launches.

# a code is cut into planes, from its low bits up; there are whole lines of each in a block of so many rows
PLANES = {2: (2,), 3: (2, 1), 4: (4,), 5: (4, 1), 6: (4, 2), 8: (8,)}
BLOCK_ROWS = {2: 16, 3: 32, 4: 8, 5: 32, 6: 16, 8: 8}


@dataclass(frozen=True, slots=True, eq=False, weakref_slot=True)
class QuantizedMatrix:
    """Integers with a scale, and perhaps a zero point or a least value, for each output and group of rows.

        y[n] = sum over r of x[source[r]] * ((code[r, n] - zero[g, n]) * scale[g, n] + min[g, n]),  g the group of row r

    `source` int32 [R]: the input of each stored row, -1 where a row only fills up its group; None: row r is input r.
    `group_starts` int32 [G + 1] in stored rows: each group has whole blocks of BLOCK_ROWS[bits] rows, but that two
    groups of 16 rows may share one of 3 bits. `group_bits` uint8 [G], of PLANES. Outputs after the last have scales, or
    codes of scales, of zero.

    `codes` uint8 [C, bytes]: a tile's bytes are those of its groups, one after the other; a group's are its blocks.
    A block has for each plane of w bits, in the order of PLANES, lines of 64 bytes with 32 / w rows each: byte 4n + j
    of a line holds, from the lowest bits up, those of its rows j, j + 4, j + 8, ... of the tile's output n. So a
    block of 8 rows at 4 bits is one line, where byte 4n + j has row j in its low and row j + 4 in its high half.

    scale: `scales` float16 or float32 [C, G, 16]; or, as in EXL2, `scale_codes` uint8 [C, G, 16] of 1 .. 16 and
    `group_max` float32 [G]: (code / 16)^2 * group_max. zero: `zeros` int16 [C, G, 16]; None: 2^(bits - 1), or 0 where
    there are mins or a codebook. min: `mins` float16 [C, G, 16]; None: 0.

    As in GGUF's K-types, `scales` and `mins`, both float16, may be units [C, S, 16] of 256 rows, of groups of 16 or 32,
    which `scale_codes` multiply: int8 [C, G, 16], with a codebook -32 .. 31; or, with mins, uint8 of both, the min's in
    the high four bits.
    Or they are uint8 [C, 12 S, 16] of six bits. Of 16 groups, without mins, they are less 32: of a unit's code i the
    low four bits are in byte i % 8, from bit i / 8 * 4 on, and the high two in byte 8 + i % 4, from bit i / 4 * 2 on.
    Of 8 groups' scales and mins the first four are the low bits of bytes i and 4 + i; of the last four the low four
    bits are the halves of byte 8 + i % 4, the scale's below, and the high two those of bytes i % 4 and 4 + i % 4.

    With `codebook` int8 [16], a code of 4 bits stands for codebook[code].
    """

    num_inputs: int
    num_outputs: int
    source: Tensor | None
    group_starts: Tensor
    group_bits: Tensor
    codes: Tensor
    scales: Tensor | None = None
    scale_codes: Tensor | None = None
    group_max: Tensor | None = None
    zeros: Tensor | None = None
    mins: Tensor | None = None
    codebook: Tensor | None = None

    @property
    def by_tile(self) -> dict[str, Tensor]:
        """The tensors whose first dimension is tiles, by the names of their fields."""
        names = ("codes", "scales", "scale_codes", "zeros", "mins")
        return {name: tensor for name in names if (tensor := getattr(self, name)) is not None}

    def tiles(self, begin: int, end: int) -> "QuantizedMatrix":
        """The outputs of tiles begin .. end alone, without a copy."""
        num_outputs = min(end * TILE, self.num_outputs) - begin * TILE
        parts: dict[str, Any] = {name: tensor[begin:end] for name, tensor in self.by_tile.items()}
        return replace(self, num_outputs=num_outputs, **parts)

    def outputs(self, numbers: Tensor) -> "QuantizedMatrix":
        """The outputs `numbers` [M] int64 alone, in that order, copied."""
        tile, lane = numbers // TILE, numbers % TILE

        def gathered(tensor: Tensor, size: int) -> Tensor:
            """Of [C, ..., 16 * size], where an output has `size` neighbours."""
            lanes = tensor.view(len(tensor), -1, TILE, size)[tile, :, lane]  # [M, ..., size]
            lanes = F.pad(lanes, (0, 0, 0, 0, 0, -len(numbers) % TILE)).unflatten(0, (-1, TILE))
            taken: Tensor = lanes.transpose(1, 2).reshape(-1, *tensor.shape[1:])
            return taken

        parts: dict[str, Any] = {
            name: gathered(tensor, LINE // TILE if name == "codes" else 1) for name, tensor in self.by_tile.items()
        }
        return replace(self, num_outputs=len(numbers), **parts)

    @property
    def num_rows(self) -> int:
        return int(self.group_starts[-1])

    @property
    def num_bytes(self) -> int:
        """Bytes of all its tensors."""
        others = (self.source, self.group_starts, self.group_bits, self.group_max, self.codebook)
        return sum(t.nbytes for t in (*self.by_tile.values(), *others) if t is not None)


@dataclass(frozen=True, slots=True, eq=False, weakref_slot=True)
class Nf4Matrix:
    """Four-bit codes of a book of sixteen numbers, with a scale for each output and block of inputs.

        y[n] = sum over k of x[k] * codebook[code[k, n]] * scale[k // blocksize, n]

    `codes` int32 [C, K / 8, 16]: row j of eight is in bits 4j .. 4j + 3 of its output's lane. `scales` float32
    [C, K / blocksize, 16], zero after the last output. `codebook` float32 [16]. blocksize is a multiple of 8 that
    divides K.
    """

    num_inputs: int
    num_outputs: int
    blocksize: int
    codebook: Tensor
    codes: Tensor
    scales: Tensor

    def tiles(self, begin: int, end: int) -> "Nf4Matrix":
        """The outputs of tiles begin .. end alone, without a copy."""
        outputs = min(end * TILE, self.num_outputs) - begin * TILE
        return replace(self, num_outputs=outputs, codes=self.codes[begin:end], scales=self.scales[begin:end])

    @property
    def num_bytes(self) -> int:
        """Bytes of all its tensors."""
        return self.codebook.nbytes + self.codes.nbytes + self.scales.nbytes


@dataclass(frozen=True, slots=True)
class Rows:
    """How inputs are stored: see QuantizedMatrix."""

    source: Tensor | None
    group_starts: Tensor
    group_bits: Tensor

    def gather(self, by_input: Tensor) -> Tensor:
        """[R, ...] of [K, ...]: each stored row's, zero where there is none."""
        if self.source is None:
            return by_input
        rows = by_input[self.source.clamp(min=0).long().to(by_input.device)]
        filling = (self.source < 0).nonzero()[:, 0]
        if len(filling):
            rows[filling.to(by_input.device)] = 0
        return rows


class Room:
    """Memory for the codes of matrices that belong together, each in its place, so that they can be one matrix."""

    def __init__(self, num_tiles: int) -> None:
        """It is taken when the first of them is packed, in any thread."""
        self._num_tiles, self._whole, self._lock = num_tiles, torch.empty(0, 0, dtype=torch.uint8), Lock()

    def take(self, first_tile: int, num_tiles: int, tile_bytes: int) -> Tensor:
        """[num_tiles, tile_bytes] uint8, not filled; elsewhere for tiles of another size than the first ones."""
        with self._lock:
            if not self._whole.numel():
                self._whole = torch.empty(self._num_tiles, tile_bytes, dtype=torch.uint8)
        if self._whole.shape[1] != tile_bytes:
            return torch.empty(num_tiles, tile_bytes, dtype=torch.uint8)
        return self._whole[first_tile : first_tile + num_tiles]


def joined(parts: Sequence[Tensor]) -> Tensor:
    """Tensors one below the other: without a copy where they lie so in memory already."""
    first, end = parts[0], parts[0].data_ptr()
    for part in parts:
        is_next = part.data_ptr() == end and part.is_contiguous() and not part.is_meta
        if not is_next or part.untyped_storage().data_ptr() != first.untyped_storage().data_ptr():
            return torch.cat(list(parts))
        end += part.nbytes
    return first.as_strided((sum(map(len, parts)), *first.shape[1:]), first.stride())


def arrange(inputs: Tensor, group_rows: Sequence[int], group_bits: Sequence[int]) -> Rows:
    """Stored rows for `inputs` [K], listed group after group; each group is filled up to whole blocks.

    The tensors of the result are on the CPU: they are read here and there, to see how rows are stored.
    """
    counts = torch.tensor(group_rows)
    assert int(counts.sum()) == len(inputs)
    blocks = torch.tensor([BLOCK_ROWS[bits] for bits in group_bits])
    filled = (counts + blocks - 1) // blocks * blocks
    starts, ends = (F.pad(sizes.cumsum(0), (1, 0)) for sizes in (filled, counts))
    stored = torch.arange(len(inputs)) + (starts - ends)[:-1].repeat_interleave(counts)
    joined = torch.full((int(starts[-1]),), -1, dtype=torch.int32)
    joined[stored] = inputs.cpu().to(torch.int32)
    is_plain = torch.equal(joined, torch.arange(len(inputs), dtype=torch.int32))
    return Rows(None if is_plain else joined, starts.int(), torch.tensor(group_bits, dtype=torch.uint8))


def pack(codes: Tensor, rows: Rows) -> Tensor:
    """The bytes [C, bytes] of codes [R, N] uint8, each less than 2^bits of its group."""
    codes = F.pad(codes, (0, -codes.shape[1] % TILE))
    tiles = codes.shape[1] // TILE
    packed = codes.new_empty(tiles, tile_bytes(rows))
    for bits, begin, end, at in runs_of(rows):
        blocks = codes[begin:end].view(-1, BLOCK_ROWS[bits], tiles * TILE)
        lines, shift = [], 0
        for width in PLANES[bits]:
            plane = blocks if width == 8 else (blocks >> shift) & ((1 << width) - 1)
            fields = plane.view(len(blocks), -1, 8 // width, 4, tiles * TILE)  # [blocks, lines, fields, 4, N]
            line = fields[:, :, 0].clone()
            for i in range(1, 8 // width):
                line |= fields[:, :, i] << (i * width)
            lines.append(line)
            shift += width
        joined = torch.cat(lines, 1).view(len(blocks), -1, 4, tiles, TILE)
        size = joined.shape[0] * joined.shape[1] * LINE
        packed[:, at : at + size].view(tiles, *joined.shape[:2], TILE, 4).copy_(joined.permute(3, 0, 1, 4, 2))
    return packed


def pack_slices(
    codes: Callable[[int, int], Tensor], num_outputs: int, rows: Rows, device: torch.device | None = None
) -> Tensor:
    """As `pack`, of codes that are made when they are needed: `codes` gives [R, end - begin] of outputs begin .. end.

    What is made on the way then stays in a processor's cache, and takes little room beside a large matrix.
    """
    packed = torch.empty(-(-num_outputs // TILE), tile_bytes(rows), dtype=torch.uint8, device=device)
    width = SLICE if packed.is_cpu else SLICE_ON_CARD
    for begin in range(0, num_outputs, width):
        end = min(begin + width, num_outputs)
        packed[begin // TILE : -(-end // TILE)] = pack(codes(begin, end), rows)
    return packed


def unpack(matrix: QuantizedMatrix) -> Tensor:
    """The codes [R, N] uint8 of a matrix: what `pack` was given."""
    rows = Rows(matrix.source, matrix.group_starts, matrix.group_bits)
    tiles = len(matrix.codes)
    codes = matrix.codes.new_zeros(matrix.num_rows, tiles * TILE)
    for bits, begin, end, at in runs_of(rows):
        blocks = codes[begin:end].view(-1, BLOCK_ROWS[bits], tiles * TILE)
        num_lines = BLOCK_ROWS[bits] * TILE * bits // (8 * LINE)
        stored = matrix.codes[:, at : at + len(blocks) * num_lines * LINE].view(tiles, len(blocks), num_lines, TILE, 4)
        lines = stored.permute(1, 2, 4, 0, 3).reshape(len(blocks), num_lines, 4, tiles * TILE)
        line, shift = 0, 0
        for width in PLANES[bits]:
            count = BLOCK_ROWS[bits] * width // 32
            plane = lines[:, line : line + count]
            fields = blocks.view(len(blocks), count, 8 // width, 4, tiles * TILE)
            for i in range(8 // width):
                fields[:, :, i] |= ((plane >> (i * width)) & ((1 << width) - 1)) << shift
            line, shift = line + count, shift + width
    return codes[:, : matrix.num_outputs]


def tiled(values: Tensor) -> Tensor:
    """[C, G, 16] of values [G, N], zero after the last output."""
    tiles = F.pad(values, (0, -values.shape[1] % TILE)).view(len(values), -1, TILE)
    return tiles.transpose(0, 1).contiguous()


def untiled(values: Tensor, num_outputs: int) -> Tensor:
    """[G, N] of values [C, G, 16]."""
    return values.transpose(0, 1).flatten(1)[:, :num_outputs]


def are_all(tile_values: Tensor, value: int, num_outputs: int) -> bool:
    """Whether values [C, G, 16] of so many outputs are all this one."""
    rest = num_outputs % TILE or TILE
    return bool((tile_values[:-1] == value).all()) and bool((tile_values[-1:, :, :rest] == value).all())


def pack_nf4(codes: Tensor, scales: Tensor, codebook: Tensor, blocksize: int) -> Nf4Matrix:
    """The matrix of codes [N, K] uint8 and scales [N, K / blocksize] float32."""
    outputs, inputs = codes.shape
    lanes = codes.new_zeros(-(-outputs // TILE), inputs // 8, TILE, dtype=torch.int32)
    width = SLICE if codes.is_cpu else SLICE_ON_CARD
    for begin in range(0, outputs, width):
        eights = tiled(codes[begin : begin + width].t()).view(-1, inputs // 8, 8, TILE)  # [., K / 8, 8, 16]
        for j in range(8):
            lanes[begin // TILE :][: len(eights)] |= eights[:, :, j].to(torch.int32) << (4 * j)
    return Nf4Matrix(inputs, outputs, blocksize, codebook.float(), lanes, tiled(scales.t().float()))


def unpack_nf4(matrix: Nf4Matrix) -> Tensor:
    """The codes [K, N] uint8 of a matrix."""
    eights = torch.stack([(matrix.codes >> (4 * j)) & 15 for j in range(8)], 2)  # [C, K / 8, 8, 16]
    return untiled(eights.to(torch.uint8).flatten(1, 2), matrix.num_outputs)


def dequantize(matrix: QuantizedMatrix | Nf4Matrix) -> Tensor:
    """The weight [K, N] float32 that a matrix stands for, each value rounded once."""
    if isinstance(matrix, Nf4Matrix):
        values = matrix.codebook[unpack_nf4(matrix).long()]
        return values * untiled(matrix.scales, matrix.num_outputs).repeat_interleave(matrix.blocksize, 0)
    counts = matrix.group_starts.diff().long()
    if matrix.codebook is not None:
        stored = matrix.codebook[unpack(matrix).int()].float()
    else:
        stored = (unpack(matrix).int() - _zeros_of(matrix).repeat_interleave(counts, 0)).float()
    stored *= scales_of(matrix).repeat_interleave(counts, 0)
    if (mins := mins_of(matrix)) is not None:
        stored += mins.repeat_interleave(counts, 0)
    if matrix.source is None:
        return stored
    weight = stored.new_zeros(matrix.num_inputs, matrix.num_outputs)
    is_input = matrix.source >= 0
    weight[matrix.source[is_input].long()] = stored[is_input]
    return weight


def _zeros_of(matrix: QuantizedMatrix) -> Tensor:
    """The zero point of each group, and of each output or of all: [G, N] or [G, 1] int32."""
    if matrix.zeros is not None:
        return untiled(matrix.zeros, matrix.num_outputs).int()
    halves = (1 << (matrix.group_bits.int() - 1)).unsqueeze(1)
    return halves if matrix.mins is None else torch.zeros_like(halves)


def scales_of(matrix: QuantizedMatrix) -> Tensor:
    """The scale [G, N] float32 of each group and output; exact."""
    codes, _ = _codes_of(matrix)
    if matrix.scales is not None:
        return _scaled(matrix, matrix.scales, codes)
    assert codes is not None
    assert matrix.group_max is not None
    return (codes.float() / 16).square() * matrix.group_max.unsqueeze(1)


def mins_of(matrix: QuantizedMatrix) -> Tensor | None:
    """The least value [G, N] float32 of each group and output; exact. None where all are zero."""
    return None if matrix.mins is None else _scaled(matrix, matrix.mins, _codes_of(matrix)[1])


def _codes_of(matrix: QuantizedMatrix) -> tuple[Tensor | None, Tensor | None]:
    """The codes [G, N] of scales and of mins, where there are such."""
    if matrix.scale_codes is None:
        return None, None
    codes = untiled(matrix.scale_codes, matrix.num_outputs)
    if are_six_bits(matrix):
        return (_six_bits(codes), None) if matrix.mins is None else _pairs_of_six_bits(codes)
    return (codes, None) if matrix.mins is None else (codes & 15, codes >> 4)


def are_six_bits(matrix: QuantizedMatrix) -> bool:
    """Whether codes of scales have six bits."""
    units, codes = matrix.scales, matrix.scale_codes
    return units is not None and codes is not None and codes.shape[1] == 12 * units.shape[1]


def _scaled(matrix: QuantizedMatrix, units: Tensor, codes: Tensor | None) -> Tensor:
    """Units [C, S, 16], each for the same number of groups, times codes [G, N] if there are any: [G, N] float32."""
    own = untiled(units, matrix.num_outputs).float().repeat_interleave(len(matrix.group_bits) // units.shape[1], 0)
    return own if codes is None else own * codes.float()


def _six_bits(packed: Tensor) -> Tensor:
    """Codes [16 S, N] int8 of twelve bytes [12 S, N] uint8 for each sixteen."""
    units = packed.unflatten(0, (-1, 12))
    low = torch.cat((units[:, :8] & 15, units[:, :8] >> 4), 1)
    high = torch.cat([(units[:, 8:] >> shift) & 3 for shift in (0, 2, 4, 6)], 1)
    return (low | (high << 4)).view(torch.int8).flatten(0, 1) - 32


def _pairs_of_six_bits(packed: Tensor) -> tuple[Tensor, Tensor]:
    """Codes of scales and of mins, [8 S, N] uint8 each, of twelve bytes [12 S, N] uint8 for each eight groups."""
    scales, mins, rest = packed.unflatten(0, (-1, 12)).split(4, 1)
    of_scales = torch.cat((scales & 63, (rest & 15) | (scales >> 6 << 4)), 1)
    return of_scales.flatten(0, 1), torch.cat((mins & 63, (rest >> 4) | (mins >> 6 << 4)), 1).flatten(0, 1)


def tile_bytes(rows: Rows) -> int:
    """Bytes of a tile's codes."""
    return int((rows.group_starts.diff() * rows.group_bits).sum()) * TILE // 8


def runs_of(rows: Rows) -> Iterator[tuple[int, int, int, int]]:
    """(bits, first row, end row, first byte of a tile) of neighbouring groups of the same width."""
    starts, widths = rows.group_starts.tolist(), rows.group_bits.tolist()
    begin = at = 0
    for g, bits in enumerate(widths):
        if g + 1 == len(widths) or widths[g + 1] != bits:
            yield bits, begin, starts[g + 1], at
            at += (starts[g + 1] - begin) * bits * TILE // 8
            begin = starts[g + 1]
