"""Quantized matrices as the kernels of a card read them: words down each column, in blocks of 32 rows.

Fixed letters: K inputs, N outputs (filled up to tiles of 16, so that each row of words begins at a whole 64 bytes), R
stored rows, G groups of stored rows.
"""

from dataclasses import dataclass, replace
from itertools import pairwise

import torch
import torch.nn.functional as F
from torch import Tensor

from tightrope.kernels.forms.quantized import (
    PLANES,
    TILE,
    Nf4Matrix,
    QuantizedMatrix,
    are_six_bits,
    unpack,
    unpack_nf4,
    untiled,
)

BLOCK = 32  # Rows; a block of w bits is w words a column.
SLICE_TILES = 256  # Tiles of a matrix that are laid out anew at a time.
TILE_OUTPUTS = 256  # A program that multiplies one row takes so many.

MEMBER_FIELDS = 6  # Of a row of ColumnMatrix.members.

# What scales and mins of groups are: numbers, or units times codes, see QuantizedMatrix. Units are of 256 rows: eight
# groups of a block each, or sixteen, two of which are the halves of a block.
NUMBERS, OF_EIGHT, OF_SIXTEEN, BOTH_OF_SIXTEEN, SIX_BITS_OF_SIXTEEN, SIX_BITS_OF_EIGHT = range(6)
HALVED = (OF_SIXTEEN, BOTH_OF_SIXTEEN, SIX_BITS_OF_SIXTEEN)

PROGRAMS = 1024  # A matrix is shared out to so many: several for each multiprocessor of the largest cards.
FEWEST_BLOCKS = 4  # A program takes one for each of its warps, at least.
MOST_ROWS = 64  # More are multiplied by a matrix that is expanded, in slices.


@dataclass(frozen=True, slots=True)
class ColumnMatrix:
    """Codes with a scale, and perhaps a zero point, for each output and group of rows; see QuantizedMatrix.

    Stored rows are in blocks of 32 of one group: `source` int32 [R] is the input of each row, -1 where a row only fills
    up its group, None where row r is input r; `group_of` int32 [R / 32] the group of each block, or of its first half.

    `words` int32 [W, N]: the words of a column, block after block. A block has for each plane of w bits, in the order
    of PLANES, w words. Those of the first plane: bits w * f .. w * f + w of word j are those of the block's row
    32 / w * j + f. In a second plane the rows of each word of the first are together, so that those half a word apart
    there are 16 bits apart here, too: row 32 / w * j + 16 / w * b + i, with i < 16 / w, is at bit 16 b + v * p of word
    j * v // w, v the second plane's width and p = j % (w / v) * 16 / w + i.

    scale: `scales` float16 or float32 [G, N], or `scale_codes` uint8 [G, N] and `group_max` float32 [G]:
    (code / 16)^2 * group_max. zero: `zeros` int16 [G, N], None: 2^(bits - 1), or 0 where there are mins. min: `mins`
    float16 [G, N], None: 0. With `codebook` float32 [16], a code of 4 bits stands for codebook[code] * scale.

    `scaling` is not NUMBERS where `scales` and `mins` are units [S, N], which `scale_codes` [., N] multiply as those of
    QuantizedMatrix do. Matrices that have such are not joined.

    `shares` int32 [S, 4]: what is shared out to programs: width in bits, first block, end block and first word row of
    blocks of one width. `widths` has bit w set when there are blocks of w bits, and where other matrices of the model,
    which the same kernel reads, have such.

    Matrices may be joined side by side, one launch for all: then words, scales, scale codes and zeros are flat, one
    matrix's after the other's, as are the rows of the other tensors. Each has as many shares, some of no blocks; shares
    and `group_of` count within their own matrix. `parts` are the matrices themselves, in the same memory. `members`
    int32 [M, 6] tells of each of them what lies before it: tiles of 16 outputs, words and scales in sixteens, blocks,
    and groups; and how many tiles it has. Of a single matrix that is one row.
    """

    num_inputs: int
    num_outputs: int
    widths: int
    words: Tensor
    source: Tensor | None
    group_of: Tensor
    shares: Tensor
    members: Tensor
    scales: Tensor | None = None
    scale_codes: Tensor | None = None
    group_max: Tensor | None = None
    zeros: Tensor | None = None
    mins: Tensor | None = None
    codebook: Tensor | None = None
    scaling: int = NUMBERS
    parts: tuple["ColumnMatrix", ...] = ()

    @property
    def num_tiles(self) -> int:
        """Tiles of outputs; the last may be partly empty."""
        return sum(part.num_tiles for part in self.parts) if self.parts else self.words.shape[1] // TILE

    def num_programs(self, num_outputs: int) -> int:
        """How many take so many outputs each, of one matrix."""
        return sum(-(-part.num_tiles * TILE // num_outputs) for part in self.parts or (self,))

    @property
    def num_shares(self) -> int:
        """Programs that share the rows of an output."""
        return len(self.shares) // max(1, len(self.parts))

    @property
    def num_bytes(self) -> int:
        """Bytes of all its tensors."""
        parts = (self.words, self.source, self.group_of, self.shares, self.members, self.scales, self.scale_codes)
        others = (self.group_max, self.zeros, self.mins, self.codebook)
        return sum(t.nbytes for t in (*parts, *others) if t is not None)


def to_columns(
    matrix: QuantizedMatrix | Nf4Matrix, device: torch.device | str | None = None, beside: int = 0
) -> ColumnMatrix:
    """The same numbers in the layout of a card, on `device`; by default on the matrix's own.

    beside: outputs of other matrices that it is to be joined with, so that fewer programs share its rows. Codes are
    laid out anew SLICE_TILES tiles at a time, so that little more than the two matrices is in memory.
    """
    target = matrix.codes.device if device is None else torch.device(device)

    def across(values: Tensor | None) -> Tensor | None:  # [C, G, 16] to [G, N]
        return None if values is None else _aligned(untiled(values, matrix.num_outputs)).contiguous().to(target)

    if isinstance(matrix, Nf4Matrix):
        groups = matrix.num_inputs // matrix.blocksize
        plain = _columns(matrix, None, [matrix.blocksize] * groups, [4] * groups, target, beside)
        return replace(plain, scales=across(matrix.scales), codebook=matrix.codebook.to(target))
    counts, bits = matrix.group_starts.diff().tolist(), matrix.group_bits.tolist()
    scaling = _scaling_of(matrix)
    groups = 2 if scaling in HALVED else 1  # So many are in a block.
    plain = _columns(
        matrix, matrix.source, [groups * count for count in counts[::groups]], bits[::groups], target, beside
    )
    return replace(
        plain,
        group_of=plain.group_of * groups,
        scales=across(matrix.scales),
        scale_codes=across(matrix.scale_codes),
        group_max=None if matrix.group_max is None else matrix.group_max.to(target),
        zeros=across(matrix.zeros),
        mins=across(matrix.mins),
        codebook=None if matrix.codebook is None else matrix.codebook.float().to(target),
        scaling=scaling,
    )


def _scaling_of(matrix: QuantizedMatrix) -> int:
    """ColumnMatrix.scaling."""
    if matrix.scales is None or matrix.scale_codes is None:
        return NUMBERS
    are_eight = len(matrix.group_bits) == 8 * matrix.scales.shape[1]
    if are_six_bits(matrix):
        return SIX_BITS_OF_EIGHT if are_eight else SIX_BITS_OF_SIXTEEN
    if matrix.mins is not None:
        return BOTH_OF_SIXTEEN
    return OF_EIGHT if are_eight else OF_SIXTEEN


def _columns(
    matrix: QuantizedMatrix | Nf4Matrix, source: Tensor | None, counts: list[int], bits: list[int],
    device: torch.device, beside: int,
) -> ColumnMatrix:  # fmt: skip
    """The matrix without its scales; its stored rows are in groups of `counts` rows."""
    num_blocks = [-(-count // BLOCK) for count in counts]
    num_words = sum(width * count for width, count in zip(bits, num_blocks, strict=True))
    words = torch.empty(num_words, len(matrix.codes) * TILE, dtype=torch.int32, device=device)
    for begin in range(0, len(matrix.codes), SLICE_TILES):
        part = matrix.tiles(begin, min(begin + SLICE_TILES, len(matrix.codes)))
        codes = _unpacked(replace(part, codes=part.codes.to(device)))
        first = begin * TILE
        words[:, first : first + SLICE_TILES * TILE] = pack_columns(_filled_up(codes, counts, 0), bits, num_blocks)
    if any(count % BLOCK for count in counts):
        rows = torch.arange(sum(counts), dtype=torch.int32) if source is None else source.cpu()
        source = _filled_up(rows.unsqueeze(1), counts, -1).squeeze(1)
    widths, shares = share_out(bits, num_blocks, -(-(matrix.num_outputs + beside) // TILE_OUTPUTS))
    return ColumnMatrix(
        matrix.num_inputs,
        matrix.num_outputs,
        widths,
        words,
        None if source is None else source.to(device),
        torch.arange(len(bits), dtype=torch.int32).repeat_interleave(torch.tensor(num_blocks)).to(device),
        shares.to(device),
        torch.tensor([[0] * (MEMBER_FIELDS - 1) + [len(matrix.codes)]], dtype=torch.int32, device=device),
    )


def _unpacked(matrix: QuantizedMatrix | Nf4Matrix) -> Tensor:
    """The codes [R, N] uint8, N filled up to whole tiles with zeros."""
    return _aligned(unpack_nf4(matrix) if isinstance(matrix, Nf4Matrix) else unpack(matrix))


def pack_columns(codes: Tensor, group_bits: list[int], group_blocks: list[int]) -> Tensor:
    """The words [W, N] of codes [R, N] uint8, in groups of so many bits and blocks."""
    words = []
    for bits, first, end in _runs(group_bits, group_blocks):
        blocks = codes[first * BLOCK : end * BLOCK].view(end - first, BLOCK, -1)
        planes, shift = [], 0
        for width in PLANES[bits]:
            plane = (blocks >> shift) & ((1 << width) - 1)
            if shift:
                plane = plane[:, second_plane_rows(shift, width)]
            fields = plane.view(len(blocks), width, 4, 8 // width, -1)  # words, bytes, fields of a byte
            joined = fields[:, :, :, 0]
            for i in range(1, 8 // width):
                joined = joined | (fields[:, :, :, i] << (i * width))
            planes.append(joined)
            shift += width
        joined = torch.cat(planes, 1)  # [blocks, bits, 4, N]
        words.append(joined.transpose(2, 3).contiguous().view(torch.int32).flatten(0, 1).squeeze(-1))
    return torch.cat(words)


def second_plane_rows(first: int, second: int) -> Tensor:
    """Rows [32] in the order of their codes in the words of a second plane, by the widths of both; see ColumnMatrix."""
    return torch.arange(BLOCK).view(second, first // second, 2, 16 // first).transpose(1, 2).flatten()


def _runs(group_bits: list[int], group_blocks: list[int]) -> list[tuple[int, int, int]]:
    """(bits, first block, end block) of neighbouring groups of the same width."""
    runs: list[tuple[int, int, int]] = []
    end = 0
    for bits, count in zip(group_bits, group_blocks, strict=True):
        if runs and runs[-1][0] == bits:
            runs[-1] = (bits, runs[-1][1], end + count)
        else:
            runs.append((bits, end, end + count))
        end += count
    return runs


def share_out(group_bits: list[int], group_blocks: list[int], num_tiles: int) -> tuple[int, Tensor]:
    """ColumnMatrix.widths and .shares for a matrix of so many tiles of outputs."""
    wanted = max(1, PROGRAMS // num_tiles)
    most = max(FEWEST_BLOCKS, -(-sum(group_blocks) // wanted))
    shares, widths, word = [], 0, 0
    for bits, first, end in _runs(group_bits, group_blocks):
        count = -(-(end - first) // most)
        borders = [first + (end - first) * i // count for i in range(count + 1)]
        shares += [(bits, a, b, word + (a - first) * bits) for a, b in pairwise(borders)]
        widths |= 1 << bits
        word += (end - first) * bits
    return widths, torch.tensor(shares, dtype=torch.int32)


def most_shares(num_inputs: int, num_outputs: int, num_runs: int) -> int:
    """A bound on the shares of such a matrix, where groups of one width make so many runs.

    A product of a few rows has a float32 for each share, row and output on the way.
    """
    num_blocks = -(-num_inputs // BLOCK)
    most = max(FEWEST_BLOCKS, -(-num_blocks // max(1, PROGRAMS // -(-num_outputs // TILE_OUTPUTS))))
    return -(-num_blocks // most) + num_runs - 1


def _filled_up(rows: Tensor, counts: list[int], number: int) -> Tensor:
    """rows [R, .] in groups of `counts`, each filled up to whole blocks with a number."""
    if not any(count % BLOCK for count in counts):
        return rows
    return torch.cat([F.pad(part, (0, 0, 0, -len(part) % BLOCK), value=number) for part in rows.split(counts)])


def _aligned(values: Tensor) -> Tensor:
    """values [., N] with zeros after the last output."""
    return F.pad(values, (0, -values.shape[1] % TILE))
