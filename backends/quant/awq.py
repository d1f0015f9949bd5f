"""AWQ: 4 bits packed along the rows in an order of their own, a scale and a zero point for each group of inputs.

Source: AutoAWQ 0.2.9, the GEMM layout (modules/linear/gemm.py, utils/packing_utils.py).
"""

from pathlib import Path

import torch

from tightrope.backends.errors import BackendError
from tightrope.backends.files.safetensors import Checkpoint
from tightrope.backends.quant.format import FLOATS, Format, Packed, Settings
from tightrope.backends.quant.stated import check_meaning, layout_of, whole_number
from tightrope.kernels.forms.quantized import QuantizedMatrix, are_all, arrange, tiled
from tightrope.kernels.packing import pack_nibbles, unpack_rows

WORD = 8  # Outputs.
NIBBLE_OF_OUTPUT = (0, 4, 1, 5, 2, 6, 3, 7)  # They are the eight in a word.


class Awq(Format):
    """See Format."""

    name = "AWQ"
    methods = ("awq",)
    codes = "qweight"
    parts = ("qweight", "qzeros", "scales")
    by_column = parts

    @classmethod
    def tells(cls, checkpoint: Checkpoint, tensor: str) -> bool:
        """Words are packed along the rows, so that they are narrower than the scales."""
        if not tensor.endswith((".qweight", ".qzeros")):
            return False
        packed = Packed(checkpoint, tensor.rpartition(".")[0])
        return packed.shape("scales", 2)[1] == 8 * packed.shape("qweight", 2)[1]

    @classmethod
    def of(cls, path: Path, settings: Settings) -> "Awq":
        """The format as `settings`, a block of the file `path`, describe it; raises BackendError for its relatives.

        `version` is not asked: it names the kernel that the file was made for, and the tensors are those of GEMM.
        """
        bits = whole_number(path, settings, "w_bit" if settings.get("bits") is None else "bits", 4)
        if bits != 4:
            raise BackendError(f"{path}: bits {bits!r} are not known in AWQ; 4 are")
        if settings.get("packing_format") is not None:
            layout_of(path, settings)
        check_meaning(path, settings)
        return cls()

    def size(self, packed: Packed) -> tuple[int, int]:
        return packed.shape("qweight", 2)[0], packed.shape("scales", 2)[-1]

    def tensor_bytes(self, packed: Packed) -> tuple[int, ...]:
        scales = packed.entry("scales")
        groups, outputs = packed.shape("scales", 2)
        sizes = packed.entry("qweight").num_bytes, scales.num_bytes, 2 * groups * outputs
        return tuple(packed.share_of(size, outputs) for size in sizes)

    def check(self, packed: Packed, num_inputs: int, num_outputs: int) -> None:
        packed.expect("qweight", (num_inputs, num_outputs // 8), "I32")
        groups = packed.shape("scales", 2)[:1]
        if num_outputs % 8:
            raise packed.wrong("scales", f"has {num_outputs} outputs; words of eight make a multiple of 8")
        packed.expect("scales", (*groups, num_outputs), *FLOATS)
        packed.expect("qzeros", (*groups, num_outputs // 8), "I32")
        if not groups[0] or num_inputs % groups[0]:
            raise packed.wrong("scales", f"has {groups[0]} groups, which don't divide {num_inputs} inputs")

    def build(self, packed: Packed, num_inputs: int, num_outputs: int) -> QuantizedMatrix:
        scales = packed.columns("scales")
        groups = len(scales)
        rows = arrange(torch.arange(num_inputs), [num_inputs // groups] * groups, [4] * groups)
        nibble_of = torch.tensor(NIBBLE_OF_OUTPUT, dtype=torch.int32)
        own = packed.outputs(num_outputs)
        starts = 32 * (own // WORD) + 4 * nibble_of[own % WORD]
        zeros = unpack_rows(packed.contents("qzeros"), starts, 4, 0, torch.int16)
        return QuantizedMatrix(
            num_inputs,
            num_outputs,
            rows.source,
            rows.group_starts,
            rows.group_bits,
            pack_nibbles(packed.columns("qweight", WORD), nibble_of, rows, num_outputs, packed.take),
            scales=tiled(scales if scales.dtype == torch.float16 else scales.float()),
            zeros=None if are_all(zeros, 8, num_outputs) else zeros.to(packed.device),
        )
