"""bitsandbytes' four bits: codes of a book of sixteen numbers, and a scale for each run of weights along the rows.

Source: bitsandbytes 0.50.2 (functional.py QuantState.as_dict, nn/modules.py). fp4 differs in its book alone.
"""

import json
from dataclasses import dataclass
from math import gcd
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from tightrope.backends.files.safetensors import Checkpoint
from tightrope.backends.quant.format import Format, Packed
from tightrope.kernels.forms.quantized import Nf4Matrix
from tightrope.kernels.packing import pack_pairs

STATES = ("weight.quant_state.bitsandbytes__nf4", "weight.quant_state.bitsandbytes__fp4")
MAX_STATE = 1 << 16  # It is in bytes of JSON.


@dataclass(frozen=True, slots=True)
class _State:
    """What the JSON beside a weight says of it."""

    shape: tuple[int, int]  # [N, K]
    blocksize: int
    nested_blocksize: int  # It is 0 where scales are as they are.
    nested_offset: float

    @property
    def run(self) -> int:
        """Weights of a row that surely share a scale: blocks go on from one row to the next."""
        return gcd(self.shape[1], self.blocksize)


class Nf4(Format):
    """See Format."""

    name = "bitsandbytes 4-bit"
    parts = ("weight.absmax", "weight.quant_map")
    optional = ("weight", *STATES, "weight.nested_absmax", "weight.nested_quant_map")
    by_row = ("weight", "weight.absmax")

    @classmethod
    def tells(cls, checkpoint: Checkpoint, tensor: str) -> bool:
        return ".quant_state.bitsandbytes__" in tensor

    def size(self, packed: Packed) -> tuple[int, int]:
        outputs, inputs = _read_state(packed).shape
        return inputs, outputs

    def tensor_bytes(self, packed: Packed) -> tuple[int, ...]:
        state = _read_state(packed)
        outputs, inputs = state.shape
        outputs = packed.share_of(outputs, outputs)
        if state.run % 8:
            return (4 * outputs * inputs,)
        return outputs * inputs // 2, 4 * outputs * inputs // state.run

    def check(self, packed: Packed, num_inputs: int, num_outputs: int) -> None:
        state = _read_state(packed)
        if state.shape != (num_outputs, num_inputs):
            raise packed.wrong(
                _state_part(packed), f"has shape {list(state.shape)}; it must be {[num_outputs, num_inputs]}"
            )
        count = num_inputs * num_outputs
        if packed.entry("weight").num_bytes != -(-count // 2):
            size = packed.entry("weight").num_bytes
            raise packed.wrong("weight", f"has {size} bytes; {num_outputs} x {num_inputs} codes take {-(-count // 2)}")
        blocks = -(-count // state.blocksize)
        packed.expect("weight.absmax", (blocks,), "U8" if state.nested_blocksize else "F32")
        packed.expect("weight.quant_map", (16,), "F32")
        if state.nested_blocksize:
            packed.expect("weight.nested_absmax", (-(-blocks // state.nested_blocksize),), "F32")
            packed.expect("weight.nested_quant_map", (256,), "F32")

    def build(self, packed: Packed, num_inputs: int, num_outputs: int) -> Nf4Matrix | Tensor:
        state = _read_state(packed)
        begin, end = packed.own or (0, num_outputs)
        first, last = begin * num_inputs, end * num_inputs  # Weights, counted row after row.
        if first % 2:
            raise packed.wrong("weight", "has a byte in two rows, which ranks can't share: take fewer ranks")
        raw = packed.numbers("weight", first // 2, -(-last // 2)).view(torch.uint8)
        book, size = packed.read("weight.quant_map"), state.blocksize
        scales = _scales(packed, state, first // size, -(-last // size))
        if before := first % size:  # The first block goes on from the row before: from here on each run has its own.
            starts = before + torch.arange(0, last - first, state.run)
            scales, size = scales[(starts // size).to(scales.device)], state.run
        if state.run % 8:  # No kernel's form has such blocks.
            codes = torch.stack((raw >> 4, raw & 15), 1).flatten()[: last - first]
            spread = scales.repeat_interleave(size)[: len(codes)]
            return (book[codes.long()] * spread).view(num_outputs, num_inputs)
        return pack_pairs(raw, scales, (num_outputs, num_inputs), size, state.run, book)


def _scales(packed: Packed, state: _State, begin: int, end: int) -> Tensor:
    """The scales of blocks begin .. end of weights, float32."""
    absmax = packed.numbers("weight.absmax", begin, end)
    if not state.nested_blocksize:
        return absmax
    size = min(state.nested_blocksize, max(packed.shape("weight.absmax", 1)[0], 1))
    before = begin % size  # So many blocks before the first have its scale.
    codes = F.pad(absmax, (before, -(before + len(absmax)) % size)).int()
    nested = packed.numbers("weight.nested_absmax", begin // size, -(-end // size))
    scales = packed.read("weight.nested_quant_map").index_select(0, codes).view(-1, size)
    return scales.mul_(nested.unsqueeze(1)).add_(state.nested_offset).flatten()[before : before + end - begin]


def _state_part(packed: Packed) -> str:
    return next((part for part in STATES if packed.has(part)), STATES[0])


def _read_state(packed: Packed) -> _State:
    part = _state_part(packed)
    entry = packed.entry(part)
    if entry.dtype != "U8" or entry.num_bytes > MAX_STATE:
        raise packed.wrong(part, "is no JSON text")
    try:
        fields: dict[str, Any] = json.loads(packed.checkpoint.read(entry.name).numpy().tobytes())
        outputs, inputs = (int(size) for size in fields["shape"])
        state = _State(
            (outputs, inputs),
            int(fields["blocksize"]),
            int(fields.get("nested_blocksize") or 0),
            float(fields.get("nested_offset") or 0.0),
        )
    except (ValueError, KeyError, TypeError, AttributeError):
        raise packed.wrong(part, "is no JSON object with shape [N, K] and blocksize") from None
    if state.blocksize < 1 or state.nested_blocksize < 0 or not -1e30 < state.nested_offset < 1e30:
        raise packed.wrong(part, "has a blocksize or a nested_offset that can't be")
    return state
