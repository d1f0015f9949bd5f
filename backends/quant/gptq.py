"""GPTQ: 2, 3, 4 or 8 bits packed down the columns, a scale and a zero point for each group of inputs.

Groups are runs of inputs or, in files of act-order, sets named by `g_idx`. Zero points are stored less one, but for
files that say gptq_v2, and some of auto-round's. Source: the layouts of AutoGPTQ 0.7.1 (qlinear_cuda.py), GPTQModel 7.7
(qlinear/torch.py) and auto-round 0.16 (torch/qlinear_torch.py, qlinear_torch_zp.py).
"""

from collections.abc import Mapping
from dataclasses import dataclass, field
from math import prod
from pathlib import Path

import torch
from torch import Tensor

from tightrope.backends.errors import BackendError
from tightrope.backends.files.safetensors import Checkpoint
from tightrope.backends.quant.format import FLOATS, Format, Packed, Settings
from tightrope.backends.quant.stated import check_meaning, group_sizes, is_awq, is_symmetric, layout_of, whole_number
from tightrope.kernels.forms.quantized import QuantizedMatrix, are_all, arrange, tiled
from tightrope.kernels.packing import pack_columns, unpack_rows

BITS = (2, 3, 4, 8)


@dataclass(frozen=True, slots=True)
class Gptq(Format):
    """See Format. `group_size` is the model's word, for files without g_idx; -1 and 0 mean one group.

    `is_symmetric` and `is_reordered` (act-order) are its words, too: memory is planned by them, and nothing is read.
    `group_sizes` are those of single linears, by the names or patterns that the model's settings have for them.
    """

    group_size: int
    is_v2: bool
    is_symmetric: bool
    is_reordered: bool = True
    group_sizes: Mapping[str, int] = field(default_factory=dict)

    name = "GPTQ"
    methods = ("gptq", "auto-round")
    codes = "qweight"
    parts = ("qweight", "qzeros", "scales")
    by_column = parts
    optional = ("g_idx",)

    @classmethod
    def tells(cls, checkpoint: Checkpoint, tensor: str) -> bool:
        """Words are packed down the columns; AWQ, whose tensors have the same names, is told before."""
        return tensor.endswith((".qweight", ".qzeros"))

    @classmethod
    def of(cls, path: Path, settings: Settings) -> "Gptq":
        """The format as `settings`, a block of the file `path`, describe it; raises BackendError for its relatives."""
        if is_awq(settings) or (layout := layout_of(path, settings)) == "awq":
            raise BackendError(
                f"{path}: weights are said to be in AWQ, of version {settings.get('version')!r:.40}, and no tensor is "
                "in the layout of version 'gemm', the one that can be read"
            )
        words = settings.get("pack_dtype") or "int32"
        if words != "int32":
            raise BackendError(f"{path}: pack_dtype {words!r:.40} is not known; int32 is")
        if (bits := whole_number(path, settings, "bits", BITS[0])) not in BITS:
            raise BackendError(f"{path}: bits {bits!r} are not known in GPTQ; {', '.join(map(str, BITS))} are")
        check_meaning(path, settings)
        return cls(
            whole_number(path, settings, "group_size", -1),
            layout == "gptq_v2",
            is_symmetric(path, settings),
            settings.get("desc_act") is not False,
            group_sizes(path, settings),
        )

    def size(self, packed: Packed) -> tuple[int, int]:
        outputs = packed.shape("scales", 2)[-1]
        if packed.has("g_idx"):
            return packed.shape("g_idx", 1)[0], outputs
        bits = packed.shape("qzeros", 2)[-1] * 32 / max(1, outputs)
        return round(packed.shape("qweight", 2)[0] * 32 / max(1, bits)), outputs

    def tensor_bytes(self, packed: Packed) -> tuple[int, ...]:
        inputs, outputs = self.size(packed)
        zeros = 0 if self.is_symmetric else 2 * prod(packed.shape("scales", 2))
        order = 4 * inputs if packed.has("g_idx") and self.is_reordered else 0
        sizes = packed.entry("qweight").num_bytes, packed.entry("scales").num_bytes, zeros
        return *(packed.share_of(size, outputs) for size in sizes), order

    def check(self, packed: Packed, num_inputs: int, num_outputs: int) -> None:
        bits = _bits(packed, num_inputs)
        packed.expect("qweight", (num_inputs * bits // 32, num_outputs), "I32")
        groups = packed.shape("scales", 2)[:1]
        packed.expect("scales", (*groups, num_outputs), *FLOATS)
        packed.expect("qzeros", (*groups, -(-num_outputs * bits // 32)), "I32")
        if not groups[0]:
            raise packed.wrong("scales", "has no group")
        if packed.has("g_idx"):
            packed.expect("g_idx", (num_inputs,), "I32")
        else:
            self._group_size(packed, num_inputs, groups[0])

    def build(self, packed: Packed, num_inputs: int, num_outputs: int) -> QuantizedMatrix:
        bits = _bits(packed, num_inputs)
        scales = packed.columns("scales")
        group_of = self._group_of(packed, num_inputs, len(scales))
        counts = torch.bincount(group_of, minlength=len(scales))
        used = counts.nonzero()[:, 0]
        inputs = group_of.argsort(stable=True)
        rows = arrange(inputs, counts[used].tolist(), [bits] * len(used))
        more = 0 if self.is_v2 else 1  # There is no carry: 2^bits is a zero point, too.
        zero_starts = bits * packed.outputs(num_outputs)
        zeros = unpack_rows(packed.contents("qzeros"), zero_starts, bits, more, torch.int16)
        if len(used) < len(scales):
            scales, zeros = scales[used.to(scales.device)], zeros[:, used]
        source = torch.arange(num_inputs) if rows.source is None else rows.source.long()
        starts = torch.where(source < 0, -1, bits * source)
        return QuantizedMatrix(
            num_inputs,
            num_outputs,
            rows.source,
            rows.group_starts,
            rows.group_bits,
            pack_columns(packed.columns("qweight"), starts, rows, num_outputs, packed.take),
            scales=tiled(scales if scales.dtype == torch.float16 else scales.float()),
            zeros=None if are_all(zeros, 1 << (bits - 1), num_outputs) else zeros.to(packed.device),
        )

    def _group_of(self, packed: Packed, num_inputs: int, num_groups: int) -> Tensor:
        """The group of each input [K]."""
        if packed.has("g_idx"):
            group_of = packed.contents("g_idx").long()
            low, high = (int(value) for value in group_of.aminmax())
            if low < 0 or high >= num_groups:
                raise packed.wrong("g_idx", f"names group {low if low < 0 else high}; there are {num_groups} groups")
            if high > 0 or num_groups == 1:  # All zero is as if it weren't there.
                return group_of
        return torch.arange(num_inputs) // self._group_size(packed, num_inputs, num_groups)

    def _group_size(self, packed: Packed, num_inputs: int, num_groups: int) -> int:
        """Inputs of a group, of this linear alone: as stated where that makes so many groups, else as they divide.

        A pattern of names is not looked up, as files are not trusted with one: the number of groups tells.
        """
        stated = self.group_sizes.get(packed.module)
        sizes = (self.group_size, *self.group_sizes.values()) if stated is None else (stated,)
        wholes = [min(size, num_inputs) if size > 0 else num_inputs for size in sizes]
        fitting = sorted({size for size in wholes if -(-num_inputs // size) == num_groups})
        if len(fitting) > 1:
            made_by = " and ".join(map(str, fitting))
            raise packed.wrong("scales", f"has {num_groups} groups, which group_size {made_by} of the settings make")
        if fitting:
            return fitting[0]
        if num_inputs % num_groups:
            raise packed.wrong(
                "scales", f"has {num_groups} groups; {num_inputs} inputs in groups of {wholes[0]} make "
                f"{-(-num_inputs // wholes[0])}"
            )  # fmt: skip
        return num_inputs // num_groups


def _bits(packed: Packed, num_inputs: int) -> int:
    """By the shape, as linears of one model may differ."""
    shape = packed.shape("qweight", 2)
    bits = next((bits for bits in BITS if shape[0] * 32 == num_inputs * bits), None)
    if bits is None:
        rows = ", ".join(str(num_inputs * bits // 32) for bits in BITS)
        raise packed.wrong("qweight", f"has shape {list(shape)}; {num_inputs} inputs take {rows} rows of words")
    return bits
