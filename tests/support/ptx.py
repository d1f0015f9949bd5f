"""The few instructions of PTX that kernels/triton writes itself, by their description, in numpy.

Source: NVIDIA, "Parallel Thread Execution ISA", sections lop3, prmt, shl, shr, shfl and fma of halves.
"""

import re
from collections.abc import Callable, Sequence
from functools import partial

import numpy as np
import torch
from numpy.typing import NDArray

Registers = NDArray[np.uint32]


def run(asm: str, inputs: Sequence[Registers], num_outputs: int) -> list[Registers]:
    """The outputs $0 .. of an asm, whose operands after those are the inputs. Raises KeyError for what isn't known."""
    values = {f"${num_outputs + i}": value for i, value in enumerate(inputs)}
    for line in filter(None, (part.strip(" \n{}") for part in asm.split(";"))):
        if line.startswith(".reg"):
            continue
        name, _, rest = line.partition(" ")
        target, *operands = re.split(r",\s*", rest)
        values[target] = INSTRUCTIONS[name](*(_value(values, operand, inputs[0]) for operand in operands))
    return [values[f"${i}"] for i in range(num_outputs)]


def _value(values: dict[str, Registers], operand: str, like: Registers) -> Registers:
    return values[operand] if operand in values else np.full_like(like, int(operand, 0))


def _lop3(a: Registers, b: Registers, c: Registers, table: Registers) -> Registers:
    result = np.zeros_like(a)
    for case in range(8):
        if table.flat[0] >> case & 1:
            picked = [x if case >> place & 1 else ~x for x, place in ((a, 2), (b, 1), (c, 0))]
            result |= picked[0] & picked[1] & picked[2]
    return result


def _prmt(a: Registers, b: Registers, selector: Registers) -> Registers:
    both = a.astype(np.uint64) | b.astype(np.uint64) << np.uint64(32)
    result = np.zeros_like(a)
    for byte in range(4):
        code = selector >> np.uint32(4 * byte) & np.uint32(15)
        picked = (both >> ((code & 7) * 8).astype(np.uint64)).astype(np.uint32) & np.uint32(255)
        sign = np.where(picked & 128, np.uint32(255), np.uint32(0))
        result |= np.where(code & 8, sign, picked).astype(np.uint32) << np.uint32(8 * byte)
    return result


def _fma(dtype: torch.dtype, *operands: Registers) -> Registers:
    a, b, c = (torch.from_numpy(x.view(np.int16).copy()).view(dtype).double() for x in operands)
    return (a * b + c).to(dtype).view(torch.int16).numpy().view(np.uint32)


INSTRUCTIONS: dict[str, Callable[..., Registers]] = {
    "mov.b32": lambda a: a,
    "and.b32": np.bitwise_and,
    "shr.u32": np.right_shift,
    "shl.b32": np.left_shift,
    "lop3.b32": _lop3,
    "prmt.b32": _prmt,
    "shfl.sync.idx.b32": lambda a, lane, clamp, mask: a.reshape(-1, 32)[np.arange(len(a)) // 32, lane & np.uint32(31)],
    "add.f16x2": lambda a, b: _fma(torch.float16, a, np.full_like(a, 0x3C003C00), b),
    "fma.rn.f16x2": partial(_fma, torch.float16),
    "fma.rn.bf16x2": partial(_fma, torch.bfloat16),
}
