"""EXL2 and GPTQ matrices run by exllamav2's own CUDA extension, where that is installed.

It rounds scales to float16, and sums of a split product in no fixed order. Source of the calls: exllamav2 0.3.2,
ext.py, exllamav2_ext/ext_qmatrix.cpp, exllamav2_ext/cuda/q_matrix.cu and exllamav2_ext/cuda/q_gemm.cu.
"""

import importlib
import importlib.util
import logging
import threading
import weakref
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache
from itertools import pairwise
from typing import Any  # The extension has no types.

import torch
import torch.nn.functional as F
from torch import Tensor

from tightrope.kernels.forms.quantized import QuantizedMatrix, unpack, untiled

MOST_ROWS = 32  # More rows are multiplied by the expanded matrix.
MOST_EXPANDED = 1 << 28  # Matrices of more weights, as heads are, are never expanded at once.
ALIGN = 32  # Matrices are filled up to multiples of so many outputs.
MOST_INPUTS = 1 << 16  # The extension counts inputs in 16 bits.
ROWS_AT_ONCE = 256  # So many rows are packed at once, in 8 bytes a code.

# The first calls with a size, and so many rows or fewer, are timed to choose a kernel. They wait for the card, which
# the recording of a CUDA graph forbids, so they are made at load.
TIMED_ROWS, TIMED_CALLS = 4, 201
PATIENCE_S = 3.0  # An import that takes longer compiles.
COMPILING = "exllamav2: nvcc compiles its kernels, once, which takes some minutes; without the package Triton's run"
_timed: set[tuple[torch.device, int, int]] = set()
log = logging.getLogger(__name__)

_NONE = torch.empty(0, device="meta")  # It stands for a tensor that there is not.


@cache
def extension() -> Any | None:  # noqa: ANN401
    """The extension's module; None where it is not installed or can't be used, which is logged.

    A wheel for one torch and one CUDA has it compiled. Another has its sources, which `exllamav2.ext` has compiled when
    it is imported for the first time.
    """
    if importlib.util.find_spec("exllamav2_ext") is not None:
        return _imported("exllamav2_ext")
    if importlib.util.find_spec("exllamav2") is None:
        return None
    compiling = threading.Timer(PATIENCE_S, log.warning, [COMPILING])
    compiling.daemon = True
    compiling.start()
    try:
        return _imported("exllamav2.ext", "ext_c")
    finally:
        compiling.cancel()


def _imported(name: str, attribute: str | None = None) -> Any | None:  # noqa: ANN401
    """The module, or what is in it, whatever happens then; torch computes with as many threads as before."""
    threads = torch.get_num_threads()
    try:
        module = importlib.import_module(name)
        return module if attribute is None else getattr(module, attribute)
    except (Exception, SystemExit) as error:  # The model can be served without it.
        reason = str(error).strip().partition("\n")[0] or type(error).__name__
        log.warning("kernels=Triton for EXL2: exllamav2 is installed, but %s can't be used: %s", name, reason)
        return None
    finally:
        torch.set_num_threads(threads)


def has_exllama() -> bool:
    """Whether the extension is there."""
    return extension() is not None


@dataclass(frozen=True, slots=True, eq=False, weakref_slot=True)
class ExllamaMatrix:
    """A matrix that the extension has taken over; `tensors` are its memory, whose codes it has shuffled."""

    num_inputs: int
    num_outputs: int
    stored_outputs: int
    handle: int
    tensors: tuple[Tensor, ...]


def is_exllama(matrix: QuantizedMatrix) -> bool:
    """Whether the extension is there and can run a matrix: one of whole words, as EXL2 or GPTQ of 4 bits has them."""
    if matrix.num_rows != matrix.num_inputs or matrix.num_inputs > MOST_INPUTS or matrix.codes.is_meta:
        return False
    if matrix.codebook is not None or matrix.mins is not None:
        return False
    if matrix.scale_codes is None:
        return _is_gptq(matrix) and extension() is not None
    if matrix.scales is not None:  # Units that their codes multiply.
        return False
    is_sorted = not bool((matrix.group_bits.int().diff() > 0).any())  # The extension wants the widest groups first.
    return is_sorted and not bool((matrix.group_starts % 32).any()) and extension() is not None


def _is_gptq(matrix: QuantizedMatrix) -> bool:
    """Whether it has what a GPTQ file of 4 bits can say: groups of one power of two, zero points of 1 to 16."""
    if matrix.scales is None or matrix.scales.dtype != torch.float16 or bool((matrix.group_bits != 4).any()):
        return False
    sizes = matrix.group_starts.diff()
    size = 1 << (-(-matrix.num_inputs // len(sizes)) - 1).bit_length()  # The extension takes the least that suffices.
    if matrix.num_inputs % 32 or size % 32 or bool((sizes[:-1] != size).any()):
        return False
    zeros = None if matrix.zeros is None else untiled(matrix.zeros, matrix.num_outputs)
    return zeros is None or (int(zeros.min()) >= 1 and int(zeros.max()) <= 16)


def to_exllama(matrix: QuantizedMatrix, device: torch.device | str) -> ExllamaMatrix:
    """The same matrix on `device`, as the extension has it."""
    ext = extension()
    assert ext is not None
    codes = _filled(unpack(matrix))
    order = (_NONE, _NONE)
    if matrix.source is not None:
        order = (matrix.source.short(), matrix.source.argsort().short())
    tensors = [
        tensor if tensor is _NONE else tensor.to(device)
        for tensor in (_gptq if matrix.scale_codes is None else _exl2)(matrix, codes, order)
    ]
    handle: int = ext.make_q_matrix(*tensors, _NONE, _NONE, _NONE, 0)
    result = ExllamaMatrix(matrix.num_inputs, matrix.num_outputs, codes.shape[1], handle, tuple(tensors))
    weakref.finalize(result, ext.free_q_matrix, handle)
    _have_timed(result, torch.device(device))
    return result


def _exl2(matrix: QuantizedMatrix, codes: Tensor, order: tuple[Tensor, Tensor]) -> list[Tensor]:
    """The extension's q_weight, q_perm, q_invperm, q_scale, q_scale_max, q_groups and q_group_map; none of GPTQ's."""
    assert matrix.scale_codes is not None
    assert matrix.group_max is not None
    starts, bits = matrix.group_starts.tolist(), matrix.group_bits.tolist()
    counts = [end - begin for begin, end in pairwise(starts)]
    words = [_stream(part, width) for part, width in zip(codes.split(counts), bits, strict=True)]
    scales = _filled(untiled(matrix.scale_codes, matrix.num_outputs) - 1, 1)
    first_words = torch.tensor([0, *(len(part) for part in words)]).cumsum(0)[:-1]
    group_map = [(g, count - row) for g, count in enumerate(counts) for row in range(count)]
    return [
        torch.cat(words),
        *order,
        _stream(scales.t(), 4).t().contiguous(),
        matrix.group_max.half() * (1 / 256),
        torch.stack((torch.tensor(bits), first_words), 1).flatten().short(),
        torch.tensor(group_map).flatten().short(),
        _NONE,
        _NONE,
    ]


def _gptq(matrix: QuantizedMatrix, codes: Tensor, order: tuple[Tensor, Tensor]) -> list[Tensor]:
    """Its q_weight, q_perm and q_invperm, none of EXL2's, gptq_qzeros and gptq_scales.

    Rows are in the order of their groups already, so that it needs no g_idx to bring them there.
    """
    assert matrix.scales is not None
    scales = untiled(matrix.scales, matrix.num_outputs)
    zeros = torch.full(scales.shape, 8) if matrix.zeros is None else untiled(matrix.zeros, matrix.num_outputs)
    stored_zeros = _stream(_filled(zeros - 1).t(), 4).t().contiguous()
    words = torch.cat([_stream(part, 4) for part in codes.split(ROWS_AT_ONCE)])
    return [words, *order, _NONE, _NONE, _NONE, _NONE, stored_zeros, _filled(scales).contiguous()]


def _have_timed(matrix: ExllamaMatrix, device: torch.device) -> None:
    """Let the extension choose its kernels for matrices of this size."""
    size = (device, matrix.num_inputs, matrix.stored_outputs)
    if size in _timed:
        return
    _timed.add(size)
    for rows in range(1, TIMED_ROWS + 1):
        x = torch.zeros(rows, matrix.num_inputs, dtype=torch.float16, device=device)
        for _ in range(TIMED_CALLS):
            exllama_linear(x, [matrix], None)


def exllama_linear(x: Tensor, matrices: Sequence[ExllamaMatrix], bias: Tensor | None) -> Tensor:
    """x [T, K] times each of the matrices, side by side, in float16: [T, sum of their N] of x's dtype."""
    ext = extension()
    assert ext is not None
    half, parts = x.half().contiguous(), []
    for matrix in matrices:
        if len(x) <= MOST_ROWS or matrix.num_inputs * matrix.stored_outputs > MOST_EXPANDED:
            out = half.new_empty(len(x), matrix.stored_outputs)
            if len(x):
                ext.gemm_half_q_half(half, matrix.handle, out, False)
        else:
            weight = half.new_empty(matrix.num_inputs, matrix.stored_outputs)
            ext.reconstruct(matrix.handle, weight)
            out = half @ weight
        parts.append(out[:, : matrix.num_outputs])
    joined = torch.cat(parts, 1).to(x.dtype)
    return joined if bias is None else joined.add_(bias)


def _filled(values: Tensor, number: int = 0) -> Tensor:
    """values [., N] filled up to whole ALIGNs of outputs."""
    return F.pad(values, (0, -values.shape[1] % ALIGN), value=number)


def _stream(codes: Tensor, bits: int) -> Tensor:
    """Words [R * bits / 32, N] int32 of codes [R, N]: one after the other, from the lowest bit up, across words."""
    cycles = codes.long().reshape(-1, 32, codes.shape[1])
    words = cycles.new_zeros(len(cycles), bits, codes.shape[1])
    for i in range(32):
        word, bit = divmod(i * bits, 32)
        words[:, word] |= (cycles[:, i] << bit) & 0xFFFFFFFF
        if bit + bits > 32:
            words[:, word + 1] |= cycles[:, i] >> (32 - bit)
    return words.flatten(0, 1).to(torch.int32)  # The highest bit becomes the sign.
