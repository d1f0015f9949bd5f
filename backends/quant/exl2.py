"""EXL2: 2 to 8 bits in groups of rows of one matrix, rows permuted, scales as squares of four bits.

Source: the layout that exllamav2 0.3.2 reads (conversion/adaptivegptq.py, module.py, ext.py).
"""

from math import gcd

import torch
from torch import Tensor

from tightrope.backends.files.safetensors import Checkpoint
from tightrope.backends.quant.format import Format, Packed
from tightrope.kernels.forms.quantized import PLANES, QuantizedMatrix, Rows, arrange
from tightrope.kernels.packing import pack_columns, unpack_rows


class Exl2(Format):
    """See Format."""

    name = "EXL2"
    methods = ("exl2",)
    codes = "q_weight"
    parts = ("q_weight", "q_scale", "q_scale_max", "q_groups", "q_invperm")
    by_column = ("q_weight", "q_scale")
    optional = ("q_perm", "q_group_map")  # Both follow from the others.

    @classmethod
    def tells(cls, checkpoint: Checkpoint, tensor: str) -> bool:
        return tensor.endswith(".q_weight")

    def size(self, packed: Packed) -> tuple[int, int]:
        return packed.shape("q_invperm", 1)[0], packed.shape("q_weight", 2)[-1]

    def tensor_bytes(self, packed: Packed) -> tuple[int, ...]:
        inputs, outputs = self.size(packed)
        groups = packed.shape("q_scale_max", 1)[0]
        codes, scales = packed.entry("q_weight").num_bytes, groups * outputs
        return packed.share_of(codes, outputs), packed.share_of(scales, outputs), 9 * groups, 4 * inputs

    def check(self, packed: Packed, num_inputs: int, num_outputs: int) -> None:
        stored = -(-num_outputs // 32) * 32
        words, groups = packed.shape("q_weight", 2)[:1], packed.shape("q_scale_max", 1)
        packed.expect("q_weight", (*words, stored), "I32")
        packed.expect("q_scale_max", groups, "F16")
        packed.expect("q_scale", (*groups, stored // 8), "I32")
        packed.expect("q_groups", (2 * sum(groups),), "I16")
        packed.expect("q_invperm", (num_inputs,), "I32")

    def build(self, packed: Packed, num_inputs: int, num_outputs: int) -> QuantizedMatrix:
        words = packed.columns("q_weight")
        bits, starts = _groups(packed, len(words))
        counts = [(end - begin) * 32 // width for width, begin, end in zip(bits, starts, starts[1:], strict=False)]
        if sum(counts) != num_inputs:
            raise packed.wrong("q_groups", f"describes {sum(counts)} rows; the linear has {num_inputs} inputs")
        rows = arrange(_permutation(packed), counts, bits)
        nibbles = 4 * packed.outputs(num_outputs)
        return QuantizedMatrix(
            num_inputs,
            num_outputs,
            rows.source,
            rows.group_starts,
            rows.group_bits,
            pack_columns(words, _starts(rows, starts, counts), rows, num_outputs, packed.take),
            scale_codes=unpack_rows(packed.read("q_scale"), nibbles, 4, 1, torch.uint8),
            group_max=packed.read("q_scale_max").float(),
        )


def _groups(packed: Packed, num_words: int) -> tuple[list[int], list[int]]:
    """Bits [G], and first rows of words [G + 1]."""
    pairs = (packed.contents("q_groups").int() & 0xFFFF).view(-1, 2)  # Offsets are unsigned.
    bits, starts = pairs[:, 0].tolist(), [*pairs[:, 1].tolist(), num_words]
    for g, width in enumerate(bits):
        if width not in PLANES:
            raise packed.wrong("q_groups", f"has {width} bits in group {g}; {', '.join(map(str, PLANES))} are known")
        size, period = starts[g + 1] - starts[g], width // gcd(width, 32)  # words
        if starts[0] != 0 or size <= 0 or size % period:
            raise packed.wrong(
                "q_groups", f"has words {starts[g]} to {starts[g + 1]} of {num_words} in group {g} at {width} bits"
            )
    return bits, starts


def _starts(rows: Rows, first_words: list[int], counts: list[int]) -> Tensor:
    """The bit of a column at which each stored row begins [R] int64, -1 for rows that fill up a group."""
    group = torch.arange(len(counts)).repeat_interleave(rows.group_starts.diff().long())
    place = torch.arange(len(group)) - rows.group_starts[group]
    starts = 32 * torch.tensor(first_words)[group] + place * rows.group_bits[group]
    return torch.where(place < torch.tensor(counts)[group], starts, -1)


def _permutation(packed: Packed) -> Tensor:
    """The input of each stored row [K]."""
    inverse = packed.contents("q_invperm").long()
    order = inverse.argsort()
    if not torch.equal(inverse[order], torch.arange(len(inverse))):
        raise packed.wrong("q_invperm", f"is no permutation of 0 to {len(inverse) - 1}")
    return order
