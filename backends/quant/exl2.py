"""EXL2: 2 to 8 bits in groups of rows of one matrix, rows permuted, scales as squares of four bits.

Source: the layout that exllamav2 0.3.2 reads (conversion/adaptivegptq.py, module.py, ext.py).
"""

from math import gcd

import torch
from torch import Tensor

from tightrope.backends.files.safetensors import Checkpoint
from tightrope.backends.quant.format import Format, Packed
from tightrope.backends.quant.streams import unstream
from tightrope.kernels.forms.quantized import PLANES, QuantizedMatrix, arrange, pack_slices, tiled


class Exl2(Format):
    """See Format."""

    name = "EXL2"
    methods = ("exl2",)
    parts = ("q_weight", "q_scale", "q_scale_max", "q_groups", "q_invperm")
    optional = ("q_perm", "q_group_map")  # Both follow from the others.

    @classmethod
    def tells(cls, checkpoint: Checkpoint, tensor: str) -> bool:
        return tensor.endswith(".q_weight")

    def size(self, packed: Packed) -> tuple[int, int]:
        return packed.shape("q_invperm", 1)[0], packed.shape("q_weight", 2)[-1]

    def tensor_bytes(self, packed: Packed) -> tuple[int, ...]:
        inputs, outputs = self.size(packed)
        groups = packed.shape("q_scale_max", 1)[0]
        return packed.entry("q_weight").num_bytes, groups * outputs, 9 * groups, 4 * inputs

    def check(self, packed: Packed, num_inputs: int, num_outputs: int) -> None:
        stored = -(-num_outputs // 32) * 32
        words, groups = packed.shape("q_weight", 2)[:1], packed.shape("q_scale_max", 1)
        packed.expect("q_weight", (*words, stored), "I32")
        packed.expect("q_scale_max", groups, "F16")
        packed.expect("q_scale", (*groups, stored // 8), "I32")
        packed.expect("q_groups", (2 * sum(groups),), "I16")
        packed.expect("q_invperm", (num_inputs,), "I32")

    def build(self, packed: Packed, num_inputs: int, num_outputs: int) -> QuantizedMatrix:
        words = packed.read("q_weight")
        bits, starts = _groups(packed, len(words))
        counts = [(end - begin) * 32 // width for width, begin, end in zip(bits, starts, starts[1:], strict=False)]
        if sum(counts) != num_inputs:
            raise packed.wrong("q_groups", f"describes {sum(counts)} rows; the linear has {num_inputs} inputs")
        rows = arrange(_permutation(packed), counts, bits)
        borders = rows.group_starts.tolist()

        runs = _runs(bits, starts, counts, borders)

        def codes(begin: int, end: int) -> Tensor:
            made = words.new_zeros(borders[-1], end - begin, dtype=torch.uint8)
            for width, first, last, row in runs:
                group = unstream(words[first:last, begin:end], width)
                made[row : row + len(group)] = group
            return made

        return QuantizedMatrix(
            num_inputs,
            num_outputs,
            rows.source,
            rows.group_starts,
            rows.group_bits,
            pack_slices(codes, num_outputs, rows, packed.device),
            scale_codes=tiled(unstream(packed.read("q_scale").t().contiguous(), 4).t()[:, :num_outputs] + 1),
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


def _runs(bits: list[int], starts: list[int], counts: list[int], borders: list[int]) -> list[tuple[int, int, int, int]]:
    """(bits, first word, end word, first stored row) of neighbouring groups of one width, but for those filled up."""
    runs: list[tuple[int, int, int, int]] = []
    for g, width in enumerate(bits):
        if runs and runs[-1][0] == width and borders[g] - borders[g - 1] == counts[g - 1]:
            runs[-1] = (width, runs[-1][1], starts[g + 1], runs[-1][3])
        else:
            runs.append((width, starts[g], starts[g + 1], borders[g]))
    return runs


def _permutation(packed: Packed) -> Tensor:
    """The input of each stored row [K]."""
    inverse = packed.contents("q_invperm").long()
    order = inverse.argsort()
    if not torch.equal(inverse[order], torch.arange(len(inverse))):
        raise packed.wrong("q_invperm", f"is no permutation of 0 to {len(inverse) - 1}")
    return order
