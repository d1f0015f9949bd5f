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

    @classmethod
    def tells(cls, checkpoint: Checkpoint, tensor: str) -> bool:
        return ".quant_state.bitsandbytes__" in tensor

    def size(self, packed: Packed) -> tuple[int, int]:
        outputs, inputs = _read_state(packed).shape
        return inputs, outputs

    def tensor_bytes(self, packed: Packed) -> tuple[int, ...]:
        state = _read_state(packed)
        outputs, inputs = state.shape
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
        raw = packed.raw("weight").flatten().view(torch.uint8)
        book, scales = packed.read("weight.quant_map"), _scales(packed, state)
        if state.run % 8:  # No kernel's form has such blocks.
            codes = torch.stack((raw >> 4, raw & 15), 1).flatten()[: num_inputs * num_outputs].view(state.shape)
            spread = scales.repeat_interleave(state.blocksize)[: codes.numel()]
            return book[codes.long()] * spread.view(state.shape)
        return pack_pairs(raw, scales, state.shape, state.blocksize, state.run, book)


def _scales(packed: Packed, state: _State) -> Tensor:
    """The scale of each block of weights, float32."""
    absmax = packed.read("weight.absmax")
    if not state.nested_blocksize:
        return absmax
    count = len(absmax)
    size = min(state.nested_blocksize, max(count, 1))
    codes = F.pad(absmax, (0, -count % size)).int()
    scales = packed.read("weight.nested_quant_map").index_select(0, codes).view(-1, size)
    return scales.mul_(packed.read("weight.nested_absmax").unsqueeze(1)).add_(state.nested_offset).flatten()[:count]


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
