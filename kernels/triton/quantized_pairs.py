"""Two weights at once: codes of a word become pairs of float16 or bfloat16 numbers in one register.

A card works on both halves of a register in one instruction. Rows of a word that are half a word apart stand 16 bits
apart in it, so that one mask takes a pair, and under the exponent of 1024, or of 128 in bfloat16, codes are whole
numbers to which only that has been added.
Source of the idea: Kim et al. 2022, "Who Says Elephants Can't Run", arXiv 2211.10017.
"""

import triton
import triton.language as tl
from triton.language import constexpr

from tightrope.kernels.forms.columns import BLOCK
from tightrope.kernels.forms.quantized import PLANES
from tightrope.kernels.triton.quantized_tile import book_number, code_number
from tightrope.kernels.triton.target import IS_COMPILED

# Pairs of an exponent under which the last bit stands for one, and of one; and the type's name in PTX.
_HALF = (0x64006400, 0x3C003C00, "f16x2")
_BRAIN = (0x43004300, 0x3F803F80, "bf16x2")


_UNSET = 0x3C003C00  # Bits that no bfloat16 has from 128 to 255.

_BLOCK = constexpr(BLOCK)
# Rows that a thread has side by side in a product's operand: Triton before 3.8 takes joined numbers for smaller ones.
_NEIGHBOURS = constexpr(4 if tuple(map(int, triton.__version__.split(".")[:2])) < (3, 8) else 2)


@triton.constexpr_function
def pair_asm(bits: int, is_bfloat16: bool) -> str:
    """PTX for all pairs of a low word: outputs are code - zero of rows i and i + half, i from zero on.

    Inputs: the word; the word of the second plane, if there is one, moved so that this word's rows stand where those of
    a block's first low word do; -(zero + what the exponent adds), twice, but -zero for bfloat16 of 8 bits.
    """
    low = PLANES[bits][0]
    high = bits - low
    magic, one, name = _BRAIN if is_bfloat16 else _HALF
    count = 16 // low
    word, top, minus = count, count + 1, count + 2
    if is_bfloat16 and bits == 8:
        return str(_wide_brain_asm())
    lines = [f".reg .b32 t, one; mov.b32 one, {one:#x};"]
    for i in range(count):
        lines.append(f"shr.u32 t, ${word}, {low * i}; lop3.b32 ${i}, t, {_twice((1 << low) - 1):#x}, {magic:#x}, 0xEA;")
        if high:
            shift = high * i - low
            move = f"shr.u32 t, ${top}, {shift}" if shift >= 0 else f"shl.b32 t, ${top}, {-shift}"
            lines.append(f"{move}; lop3.b32 ${i}, t, {_twice(((1 << high) - 1) << low):#x}, ${i}, 0xEA;")
        if is_bfloat16 and i == 0:
            # The assembler makes a constant anew for each use. Of what it can't tell to be one it keeps a register.
            lines.append(f"lop3.b32 one, $0, {_UNSET:#x}, {one:#x}, 0xEA;")
        lines.append(f"fma.rn.{name} ${i}, ${i}, one, ${minus};")
    return "{" + " ".join(lines) + "}"


@triton.constexpr_function
def _wide_brain_asm() -> str:
    """Codes of 8 bits are one too wide for a mantissa: sixteen times the upper half and the lower half are not."""
    magic, one, name = _BRAIN
    lines = [
        ".reg .b32 t, u, one, sixteen, low, high;",
        f"mov.b32 one, {one:#x}; mov.b32 sixteen, 0x41804180;",
        "mov.b32 low, 0xC300C300; mov.b32 high, 0xC500C500;",  # -128 and -16 * 128
    ]
    for i in range(2):
        lines.append(f"shr.u32 t, $2, {8 * i}; shr.u32 u, $2, {8 * i + 4};")
        lines.append(f"lop3.b32 t, t, 0xF000F, {magic:#x}, 0xEA; lop3.b32 u, u, 0xF000F, {magic:#x}, 0xEA;")
        lines.append(f"fma.rn.{name} t, t, one, low; fma.rn.{name} u, u, sixteen, high;")
        lines.append(f"fma.rn.{name} t, t, one, u; fma.rn.{name} ${i}, t, one, $4;")
    return "{" + " ".join(lines) + "}"


@triton.constexpr_function
def book_asm() -> str:
    """PTX for the numbers of a word's eight codes, a pair of neighbours to an output.

    Inputs: the word, and what book_bits gives.
    """
    lines = [".reg .b32 a, b;"]
    for pair in range(4):
        for name, shift in (("a", 8 * pair), ("b", 8 * pair + 4)):
            lines.append(f"shr.u32 {name}, $4, {shift}; shfl.sync.idx.b32 {name}, $5, {name}, 31, 0xffffffff;")
        lines.append(f"prmt.b32 ${pair}, a, b, 0x5410;")
    return "{" + " ".join(lines) + "}"


@triton.constexpr_function
def _twice(half: int) -> int:
    return half << 16 | half


@triton.constexpr_function
def is_brain(dtype: tl.dtype) -> bool:
    return bool(dtype == tl.bfloat16)


@triton.constexpr_function
def is_sixteen(dtype: tl.dtype) -> bool:
    return dtype in (tl.float16, tl.bfloat16)


@triton.constexpr_function
def pair_constraints(outputs: int, inputs: int) -> str:
    return ",".join(["=&r"] * outputs + ["r"] * inputs)


@triton.jit
def pair_rows(LOW: constexpr, HAS_BOOK: constexpr) -> tl.tensor:
    """Rows [32] int32 of a block in the order of pair_weights: pair by pair, or two by two, those of each word."""
    FIELDS: constexpr = 32 // LOW
    place = tl.arange(0, _BLOCK)
    pair, word, which = place // (2 * LOW), place // 2 % LOW, place % 2
    if _NEIGHBOURS == 4:
        pair, word = place // (4 * LOW) * 2 + place // 2 % 2, place // 4 % LOW
    return word * FIELDS + (2 * pair + which if HAS_BOOK else pair + FIELDS // 2 * which)


@triton.jit
def pair_weights(
    low: tl.tensor,
    high: tl.tensor,
    zero: tl.tensor,
    book: tl.tensor,
    book_pairs: tl.tensor,
    BITS: constexpr,
    LOW: constexpr,
    HAS_BOOK: constexpr,
    DTYPE: constexpr,
) -> tl.tensor:
    """code - zero, or numbers of a book, [OUTPUTS, 32] of DTYPE, of a block's words [OUTPUTS / 4, LOW, 4].

    low, high: of both planes, as load_words gives them; zero: float32; book, book_pairs: of book_lanes and book_bits.
    Rows are in the order of pair_rows, outputs in that of tiled_outputs.
    """
    HALF: constexpr = 16 // LOW
    IS_PAIRED: constexpr = IS_COMPILED and is_sixteen(DTYPE)
    if HALF == 2:
        if IS_PAIRED:
            a, b = tl.inline_asm_elementwise(
                pair_asm(BITS, is_brain(DTYPE)), pair_constraints(2, 3), [low, high, _minus(zero, BITS, DTYPE)],
                dtype=(tl.int32, tl.int32), is_pure=True, pack=1,
            )  # fmt: skip
            a, b = _halves(a, DTYPE), _halves(b, DTYPE)
        else:
            a, b = _apart(low, high, zero, 0, BITS, LOW, DTYPE), _apart(low, high, zero, 1, BITS, LOW, DTYPE)
        weights = tl.join(a, b)
    elif HALF == 4:
        if IS_PAIRED and HAS_BOOK:
            a, b, c, d = tl.inline_asm_elementwise(
                book_asm(), pair_constraints(4, 2), [low, book_pairs],
                dtype=(tl.int32, tl.int32, tl.int32, tl.int32), is_pure=True, pack=1,
            )  # fmt: skip
        elif IS_PAIRED:
            a, b, c, d = tl.inline_asm_elementwise(
                pair_asm(BITS, is_brain(DTYPE)), pair_constraints(4, 3), [low, high, _minus(zero, BITS, DTYPE)],
                dtype=(tl.int32, tl.int32, tl.int32, tl.int32), is_pure=True, pack=1,
            )  # fmt: skip
        if IS_PAIRED:
            a, b, c, d = _halves(a, DTYPE), _halves(b, DTYPE), _halves(c, DTYPE), _halves(d, DTYPE)
        elif HAS_BOOK:
            a, b = _neighbours(low, book, 0, DTYPE), _neighbours(low, book, 1, DTYPE)
            c, d = _neighbours(low, book, 2, DTYPE), _neighbours(low, book, 3, DTYPE)
        else:
            a, b = _apart(low, high, zero, 0, BITS, LOW, DTYPE), _apart(low, high, zero, 1, BITS, LOW, DTYPE)
            c, d = _apart(low, high, zero, 2, BITS, LOW, DTYPE), _apart(low, high, zero, 3, BITS, LOW, DTYPE)
        weights = tl.join(tl.join(a, c), tl.join(b, d))
    else:
        if IS_PAIRED:
            a, b, c, d, e, f, g, h = tl.inline_asm_elementwise(
                pair_asm(BITS, is_brain(DTYPE)), pair_constraints(8, 3), [low, high, _minus(zero, BITS, DTYPE)],
                dtype=(tl.int32, tl.int32, tl.int32, tl.int32, tl.int32, tl.int32, tl.int32, tl.int32),
                is_pure=True, pack=1,
            )  # fmt: skip
            a, b, c, d = _halves(a, DTYPE), _halves(b, DTYPE), _halves(c, DTYPE), _halves(d, DTYPE)
            e, f, g, h = _halves(e, DTYPE), _halves(f, DTYPE), _halves(g, DTYPE), _halves(h, DTYPE)
        else:
            a, b = _apart(low, high, zero, 0, BITS, LOW, DTYPE), _apart(low, high, zero, 1, BITS, LOW, DTYPE)
            c, d = _apart(low, high, zero, 2, BITS, LOW, DTYPE), _apart(low, high, zero, 3, BITS, LOW, DTYPE)
            e, f = _apart(low, high, zero, 4, BITS, LOW, DTYPE), _apart(low, high, zero, 5, BITS, LOW, DTYPE)
            g, h = _apart(low, high, zero, 6, BITS, LOW, DTYPE), _apart(low, high, zero, 7, BITS, LOW, DTYPE)
        weights = tl.join(tl.join(tl.join(a, e), tl.join(c, g)), tl.join(tl.join(b, f), tl.join(d, h)))
    OUTPUTS: constexpr = 4 * low.shape[0]
    weights = tl.reshape(weights, (OUTPUTS // 128, 4, 8, LOW, 2, 2, 2, HALF // 2, 2))
    if _NEIGHBOURS == 4:
        weights = tl.permute(weights, (0, 4, 1, 5, 2, 7, 3, 8, 6))
    else:
        weights = tl.permute(weights, (0, 4, 1, 5, 2, 7, 8, 3, 6))
    return tl.reshape(weights, (OUTPUTS, _BLOCK))


@triton.jit
def tiled_outputs(values: tl.tensor) -> tl.tensor:
    """values [OUTPUTS / 4, ., 4] as [OUTPUTS, .]: in the order in which pair_weights has outputs.

    Then a thread has of a product's sixteen outputs and sixteen rows just those weights whose words it loaded, four
    neighbouring outputs of one word, and nothing is exchanged between threads.
    """
    GROUPS: constexpr = values.shape[0] // 32
    tiled = tl.reshape(values, (GROUPS, 4, 8, values.shape[1], 2, 2))  # 4 warps, 8 lanes
    return tl.reshape(tl.permute(tiled, (0, 4, 1, 5, 2, 3)), (128 * GROUPS, values.shape[1]))


@triton.jit
def untiled_outputs(product: tl.tensor) -> tl.tensor:
    """A product [OUTPUTS, .] whose outputs are in pair_weights' order with them in their own."""
    ROWS: constexpr = product.shape[1]
    tiled = tl.reshape(product, (product.shape[0] // 128, 2, 4, 2, 8, ROWS))
    return tl.reshape(tl.permute(tiled, (0, 2, 4, 1, 3, 5)), (product.shape[0], ROWS))


@triton.jit
def _minus(zero: tl.tensor, BITS: constexpr, DTYPE: constexpr) -> tl.tensor:
    """The last input of pair_asm, int32."""
    ADDED: constexpr = 1024 if not is_brain(DTYPE) else 0 if BITS == 8 else 128
    bits = (-(zero + ADDED)).to(DTYPE).to(tl.int16, bitcast=True).to(tl.int32) & 0xFFFF
    return bits * 0x10001


@triton.jit
def _halves(pair: tl.tensor, DTYPE: constexpr) -> tl.tensor:
    """Both numbers of registers, side by side."""
    low = pair.to(tl.int16).to(DTYPE, bitcast=True)
    return tl.join(low, (pair >> 16).to(tl.int16).to(DTYPE, bitcast=True))


@triton.jit
def _apart(
    low: tl.tensor,
    high: tl.tensor,
    zero: tl.tensor,
    PAIR: constexpr,
    BITS: constexpr,
    LOW: constexpr,
    DTYPE: constexpr,
) -> tl.tensor:
    """The same of pair PAIR of a word, whose rows are half a word apart."""
    first = code_number(low, high, zero, PAIR, BITS, LOW)
    return tl.join(first, code_number(low, high, zero, PAIR + 16 // LOW, BITS, LOW)).to(DTYPE)


@triton.jit
def _neighbours(low: tl.tensor, book: tl.tensor, PAIR: constexpr, DTYPE: constexpr) -> tl.tensor:
    """The same of a book's numbers, whose rows are neighbours."""
    return tl.join(book_number(low, book, 2 * PAIR), book_number(low, book, 2 * PAIR + 1)).to(DTYPE)


@triton.jit
def book_bits(book: tl.tensor, HAS_BOOK: constexpr, DTYPE: constexpr) -> tl.tensor:
    """What book_asm looks up: the numbers of book_lanes, rounded to DTYPE, in the lower half of each register."""
    IS_PAIRED: constexpr = IS_COMPILED and is_sixteen(DTYPE)
    bits = 0
    if HAS_BOOK and IS_PAIRED:
        bits = book.to(DTYPE).to(tl.int16, bitcast=True).to(tl.int32)
    return bits
