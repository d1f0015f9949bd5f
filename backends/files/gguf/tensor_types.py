"""How each tensor type of GGUF lays out a block, and where in it floats are kept.

Codes are whole numbers and can't be wrong by themselves; a float can be NaN or infinity, and then everything that it
scales is. Source: the block_* structures of ggml/src/ggml-common.h.
"""

from dataclasses import dataclass, field
from typing import Literal

Form = Literal["f16", "bf16", "f32", "f64", "e8m0", "ue4m3", "nibbles"]


@dataclass(frozen=True, slots=True)
class Floats:
    """`count` floats of one form in a block, one after another from byte `start` on.

    e8m0: an exponent in a byte, 0xFF is NaN (OCP MX formats, version 1.0). ue4m3: a float without a sign in a byte,
    NaN where its seven bits are all set. nibbles: one f16, of which each of four uint16 holds four bits in its highest.
    """

    field: str  # ggml calls it so; it is "" where the block is the value.
    form: Form
    start: int = 0
    count: int = 1


@dataclass(frozen=True, slots=True)
class TensorType:
    """A row is made of blocks of `values` values in `num_bytes` bytes."""

    name: str
    values: int
    num_bytes: int
    floats: tuple[Floats, ...] = field(default=())


_D = Floats("d", "f16")


def _d_at(start: int) -> tuple[Floats, ...]:
    return (Floats("d", "f16", start),)


TENSOR_TYPES: dict[int, TensorType] = {
    0: TensorType("F32", 1, 4, (Floats("", "f32"),)),
    1: TensorType("F16", 1, 2, (Floats("", "f16"),)),
    2: TensorType("Q4_0", 32, 18, (_D,)),
    3: TensorType("Q4_1", 32, 20, (_D, Floats("m", "f16", 2))),
    6: TensorType("Q5_0", 32, 22, (_D,)),
    7: TensorType("Q5_1", 32, 24, (_D, Floats("m", "f16", 2))),
    8: TensorType("Q8_0", 32, 34, (_D,)),
    9: TensorType("Q8_1", 32, 36, (_D, Floats("s", "f16", 2))),
    10: TensorType("Q2_K", 256, 84, (Floats("d", "f16", 80), Floats("dmin", "f16", 82))),
    11: TensorType("Q3_K", 256, 110, _d_at(108)),
    12: TensorType("Q4_K", 256, 144, (_D, Floats("dmin", "f16", 2))),
    13: TensorType("Q5_K", 256, 176, (_D, Floats("dmin", "f16", 2))),
    14: TensorType("Q6_K", 256, 210, _d_at(208)),
    15: TensorType("Q8_K", 256, 292, (Floats("d", "f32"),)),
    16: TensorType("IQ2_XXS", 256, 66, (_D,)),
    17: TensorType("IQ2_XS", 256, 74, (_D,)),
    18: TensorType("IQ3_XXS", 256, 98, (_D,)),
    19: TensorType("IQ1_S", 256, 50, (_D,)),
    20: TensorType("IQ4_NL", 32, 18, (_D,)),
    21: TensorType("IQ3_S", 256, 110, (_D,)),
    22: TensorType("IQ2_S", 256, 82, (_D,)),
    23: TensorType("IQ4_XS", 256, 136, (_D,)),
    24: TensorType("I8", 1, 1),
    25: TensorType("I16", 1, 2),
    26: TensorType("I32", 1, 4),
    27: TensorType("I64", 1, 8),
    28: TensorType("F64", 1, 8, (Floats("", "f64"),)),
    29: TensorType("IQ1_M", 256, 56, (Floats("scales", "nibbles", 48, count=4),)),
    30: TensorType("BF16", 1, 2, (Floats("", "bf16"),)),
    34: TensorType("TQ1_0", 256, 54, _d_at(52)),
    35: TensorType("TQ2_0", 256, 66, _d_at(64)),
    39: TensorType("MXFP4", 32, 17, (Floats("e", "e8m0"),)),
    40: TensorType("NVFP4", 64, 36, (Floats("d", "ue4m3", count=4),)),
    41: TensorType("Q1_0", 128, 18, (_D,)),
    42: TensorType("Q2_0", 64, 18, (_D,)),
}
