"""Every kernel by its name, run by the fastest implementation for where its tensors are.

On a CUDA device these are the Triton kernels, on a CPU the C++ kernels, or the torch reference where those were not
built. The meta device stands for a card that isn't there. Meanings, shapes and dtypes are those of kernels.reference.
"""

import importlib.util
import logging
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager
from functools import cache
from typing import Any, Protocol

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from tightrope.kernels import reference
from tightrope.kernels.cpu import left_steps, native
from tightrope.kernels.cpu.cells import CellAttention as CellAttention
from tightrope.kernels.cpu.native import MOST_DIMS as MOST_DIMS
from tightrope.kernels.cpu.native import MOST_LAYER_TOKENS as MOST_LAYER_TOKENS
from tightrope.kernels.exllama import ExllamaMatrix as ExllamaMatrix
from tightrope.kernels.exllama import exllama_linear as exllama_linear
from tightrope.kernels.exllama import has_exllama as has_exllama
from tightrope.kernels.exllama import is_exllama as is_exllama
from tightrope.kernels.exllama import to_exllama as to_exllama
from tightrope.kernels.forms.columns import ColumnMatrix
from tightrope.kernels.forms.compiling import compiling as compiling
from tightrope.kernels.forms.layer import GatedExperts, LayerStack, LayerStep, StackedExperts
from tightrope.kernels.forms.layout import AttentionSpec, LayerCache, RopeTable, StepLayout
from tightrope.kernels.forms.low_rank import AdapterRows, LowRank
from tightrope.kernels.forms.masks import Masks
from tightrope.kernels.forms.quantized import Nf4Matrix, QuantizedMatrix
from tightrope.kernels.forms.ranks import SharedRanks
from tightrope.kernels.forms.rows import Ranked

log = logging.getLogger(__name__)


class Kernels(Protocol):
    """The operations; docstrings are in kernels.reference."""

    def store_kv(self, cache: LayerCache, keys: Tensor, values: Tensor, slots: Tensor) -> None: ...

    def attention(
        self, queries: Tensor, cache: LayerCache, step: StepLayout, table: RopeTable | None, spec: AttentionSpec
    ) -> Tensor: ...

    def rotate(self, x: Tensor, step: StepLayout, table: RopeTable) -> Tensor: ...

    def linear(self, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor: ...

    def add_low_rank(self, out: Tensor, x: Tensor, adapters: Mapping[int, LowRank], rows: AdapterRows) -> None: ...

    def rms_norm(self, x: Tensor, weight: Tensor, eps: float) -> Tensor: ...

    def gated(self, gate_up: Tensor, activation: str) -> Tensor: ...


class CpuKernels(Kernels, Protocol):
    """And those for matrices as a CPU has them."""

    def quantized_linear(self, x: Tensor, matrices: Sequence[QuantizedMatrix], bias: Tensor | None) -> Tensor: ...

    def nf4_linear(self, x: Tensor, matrices: Sequence[Nf4Matrix], bias: Tensor | None) -> Tensor: ...

    def quantized_rows(self, matrix: QuantizedMatrix, numbers: Tensor) -> Tensor: ...


def store_kv(cache: LayerCache, keys: Tensor, values: Tensor, slots: Tensor) -> None:
    _kernels_for(keys).store_kv(cache, keys, values, slots)


def copy_slots(cache: LayerCache, sources: Tensor, targets: Tensor) -> None:
    """Copy tokens of a layer from slots [n] int64 to slots [n], bit for bit; none is both, or a target twice."""
    kernels = _kernels_for(cache.key_codes)
    if isinstance(kernels, native.NativeKernels):
        kernels.copy_slots(cache, sources.contiguous(), targets.contiguous())
    else:
        cache.copy_slots(sources, targets)


def attention(
    queries: Tensor, cache: LayerCache, step: StepLayout, table: RopeTable | None, spec: AttentionSpec
) -> Tensor:
    return _kernels_for(queries).attention(queries, cache, step, table, spec)


def rotate(x: Tensor, step: StepLayout, table: RopeTable) -> Tensor:
    return _kernels_for(x).rotate(x, step, table)


def linear(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    return _kernels_for(x).linear(x, weight, bias)


def quantized_linear(x: Tensor, matrices: Sequence[QuantizedMatrix], bias: Tensor | None) -> Tensor:
    return _cpu().quantized_linear(x, matrices, bias)


def nf4_linear(x: Tensor, matrices: Sequence[Nf4Matrix], bias: Tensor | None) -> Tensor:
    return _cpu().nf4_linear(x, matrices, bias)


def quantized_rows(matrix: QuantizedMatrix, numbers: Tensor) -> Tensor:
    return _cpu().quantized_rows(matrix, numbers)


def pack_blocks(kind: int, raw: Tensor, into: QuantizedMatrix) -> bool:
    """Fill a matrix's tensors from rows of blocks [N, bytes] uint8 of a type of GGUF, by its number in ggml.

    False, and nothing written, where there is no kernel for it.
    """
    kernels = _native()
    if kernels is not None:
        kernels.pack_blocks(kind, raw, into)
    return kernels is not None


def reads_columns(device: torch.device) -> bool:
    """Whether kernels on a device read quantized matrices as ColumnMatrix."""
    return device.type != "cpu"


def column_linear(x: Tensor, matrices: Sequence[ColumnMatrix], bias: Tensor | None) -> Tensor:
    """x [T, K] on a card times each of the matrices there, side by side: [T, sum of their N]."""
    from tightrope.kernels.triton.quantized import quantized_linear  # Triton is there only where CUDA is.

    return quantized_linear(x, matrices, bias)


def sum_in_float16() -> None:
    """From now on sum products of many float16 numbers on a card in float16, for which bfloat16 ones become float16.

    Cards for games add so twice as fast; a sum beyond 65504 becomes infinite.
    """
    torch.backends.cuda.matmul.allow_fp16_accumulation = True


def add_low_rank(out: Tensor, x: Tensor, adapters: Mapping[int, LowRank], rows: AdapterRows) -> None:
    _kernels_for(x).add_low_rank(out, x, adapters, rows)


def rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    return _kernels_for(x).rms_norm(x, weight, eps)


def gated(gate_up: Tensor, activation: str) -> Tensor:
    return _kernels_for(gate_up).gated(gate_up, activation)


def decoder_layers(
    x: Tensor, stack: LayerStack, steps: Sequence[LayerStep], adapters: AdapterRows | None
) -> Tensor | None:
    """The last of these layers' output for x [T, hidden] float32; each has the output of the one before.

    Stores the step's keys and values, as the layers' operations do one by one. None, and nothing stored, where no
    kernel runs layers of so many tokens at once.
    """
    kernels = _kernels_for(x)
    if isinstance(kernels, native.NativeKernels):
        return kernels.decoder_layers(x, stack, steps, adapters)
    return None


def has_native() -> bool:
    """Whether the C++ kernels run on this CPU."""
    return _native() is not None


def can_gather() -> bool:
    """Whether ranks of this machine's CPU can gather by shared memory: see `gather`."""
    return has_native()


def gather(local: Tensor, sizes: Sequence[int], ranks: SharedRanks) -> Tensor:
    """The columns of all ranks, local [T, sizes[rank]] each, side by side in their order: [T, sum of sizes].

    On a CPU, where can_gather says so. It waits for all ranks, which must call it in the same order with the same T,
    sizes and dtype.
    """
    kernels = _native()
    assert kernels is not None
    return kernels.gather(local, sizes, ranks)


def leave_step(ranks: SharedRanks) -> None:
    """Have the other ranks end a step that this one can't, though with numbers that mean nothing.

    Until it meets them again nobody waits for it.
    """
    left_steps.leave_step(ranks)


def has_any_left(ranks: SharedRanks) -> bool:
    """Whether a rank has left a step since all last met again, so that what others computed since means nothing."""
    return left_steps.has_any_left(ranks)


def num_meetings(ranks: SharedRanks) -> int:
    """How many meetings this rank has come to."""
    return left_steps.num_meetings(ranks)


def meet_again(ranks: SharedRanks, num_meetings: int) -> None:
    """Count meetings from there on, as all ranks do before one of them begins another step; none is in one."""
    left_steps.meet_again(ranks, num_meetings)


def can_compile() -> bool:
    """Whether the compiler of the kernels for cards is installed; without it no function below can be called."""
    return importlib.util.find_spec("triton") is not None


def standing_in(architecture: int) -> AbstractContextManager[None]:
    """Meanwhile kernels are compiled for cards of this architecture, 86 for sm_86, of which none need be there."""
    from tightrope.kernels.triton import warming

    return warming.standing_in(architecture)


def gathered() -> AbstractContextManager[dict[str, Any]]:  # Any: kernels of Triton, which has no types
    """Gives the launches made meanwhile that this process has not compiled, none of which runs; see compile_all."""
    from tightrope.kernels.triton import jit

    return jit.gathered()


def compile_all(launches: dict[str, Any], num_threads: int, progress: Callable[[float], None]) -> int:
    """Compile what `gathered` gave; returns how many were not on disk, where they are now.

    `progress` is called with the share done. Raises RuntimeError, naming the kernel, for one that can't be compiled.
    """
    from tightrope.kernels.triton import warming

    return warming.compile_all(launches, num_threads, progress)


def compiled_folder() -> str:
    """Where compiled kernels are kept."""
    from tightrope.kernels.triton import warming

    return warming.cache_folder()


def why_not_kept(error: BaseException) -> str | None:
    """Why what is compiled can't be kept there, and what would help, where that is what an error says."""
    from tightrope.kernels.triton import warming

    return warming.why_not_kept(error)


def fewest_rows() -> tuple[int, ...]:
    """The fewest rows of a step for each way in which a card's kernels multiply them, ascending."""
    from tightrope.kernels.triton.quantized import FEWEST_ROWS

    return FEWEST_ROWS


MOST_STACKED = 256  # The experts of so many tokens run together on a card; those of more take turns.


def experts(
    x: Tensor, layer: GatedExperts | StackedExperts, picked: Tensor, shares: Tensor, adapters: AdapterRows | None,
    gather: Callable[[Tensor], Tensor] | None = None,
) -> Tensor | None:  # fmt: skip
    """What the experts `picked` [T, k] int64 make of x [T, K], by their shares [T, k] float32: [T, outputs of down].

    gather: makes, of the columns that an expert's first product gives here for each pick [T * k, own], those that its
    second one takes. None where no kernel runs them at once. On a card nothing is read from it.
    """
    if isinstance(layer, StackedExperts):
        if adapters is not None or (len(x) > MOST_STACKED and isinstance(layer.gate_up, Tensor)):
            return None
        from tightrope.kernels.triton.experts import experts as stacked  # Triton is there only where CUDA is.

        turns = zip(*(rows.split(MOST_STACKED) for rows in (x, picked, shares)), strict=True)
        done = [stacked(some, layer, theirs, parts, gather) for some, theirs, parts in turns]
        return done[0] if len(done) == 1 else torch.cat(done)
    kernels = _kernels_for(x)
    if not isinstance(kernels, native.NativeKernels):
        return None
    return kernels.experts(x, layer, picked, shares, adapters, gather)


def draw(logits: Tensor, rows: NDArray[np.int64], params: NDArray[np.float64]) -> NDArray[np.int64] | None:
    """A token drawn from each of these rows, -1 where nothing can be drawn.

    logits [any, V] float32; rows [B]; params [B, 5 + 4 * MAX_TRANSFORMS]: a number in [0, 1), top_k, top_p, min_p and
    typical_p (neutral: 0, 1, 0, 1), and transforms as `row_sums` takes them. None where there is no native kernel for
    these logits.
    """
    built = _native_for(logits)
    return None if built is None else built.draw(logits, rows, params)


def rank(logits: Tensor, rows: NDArray[np.int64], wanted: NDArray[np.int64]) -> Ranked:
    built = _native_for(logits)
    return reference.rank(logits, rows, wanted) if built is None else built.rank(logits, rows, wanted)


def row_sums(logits: Tensor, rows: NDArray[np.int64], transforms: NDArray[np.float64]) -> NDArray[np.float64]:
    built = _native_for(logits)
    return reference.row_sums(logits, rows, transforms) if built is None else built.row_sums(logits, rows, transforms)


def row_mass(logits: Tensor, rows: NDArray[np.int64], transforms: NDArray[np.float64]) -> NDArray[np.float64]:
    built = _native_for(logits)
    return reference.row_mass(logits, rows, transforms) if built is None else built.row_mass(logits, rows, transforms)


def search_file(file: int, start: int, num_bytes: int, masks: Masks, buffer: NDArray[np.uint8]) -> int | None:
    built = _search()
    return (reference if built is None else built).search_file(file, start, num_bytes, masks, buffer)


@cache
def _search() -> native.NativeSearch | None:
    """The fastest build's; None where there is none, which slows the start of a model a little."""
    try:
        usable = native.usable()
        return native.NativeSearch(usable[0]) if usable else None
    except native.UnusableBuild:
        return None


def _native_for(logits: Tensor) -> native.NativeKernels | None:
    return _native() if logits.is_cpu and logits.is_contiguous() else None


def cell_attention() -> CellAttention | None:
    """That over llama.cpp's cells, for one of its contexts; None where ggml's has wider vectors than ours would."""
    built = _native()
    return None if built is None or built.instruction_set == "portable" else CellAttention(built.instruction_set)


def set_threads(num_threads: int) -> None:
    """Compute with `num_threads` threads on a CPU, the caller's included; until then, with as many as torch."""
    built = _native()
    if built is None:
        torch.set_num_threads(num_threads)
    else:
        built.set_threads(num_threads)


def set_batch_invariant(*, is_wanted: bool) -> None:
    """From now on give rows of products by plain weights on a CPU the same bits however many there are.

    Products by quantized weights, and attention, are so in any case.
    """
    if (built := _native()) is not None:
        built.set_batch_invariant(is_wanted)


def describe(device: torch.device | str = "cpu", *, is_exllama: bool = False) -> str:
    """What runs the kernels on a device, for the start-up lines; with matrices among them that exllamav2 has."""
    if torch.device(device).type != "cpu":
        return "exllamav2" if is_exllama else "Triton"
    built = _native()
    return "torch reference" if built is None else built.describe()


def fault(device: torch.device | str = "cpu") -> str | None:
    """Why the C++ kernels don't run on a CPU, and what mends it, in one line; None where they do."""
    if torch.device(device).type != "cpu":
        return None
    built = _fastest()
    return built if isinstance(built, str) else None


def _kernels_for(x: Tensor) -> Kernels:
    return _cpu() if x.is_cpu else _triton()


@cache
def _triton() -> Kernels:
    from tightrope.kernels.triton import ops  # Triton is there only where CUDA is.

    return ops


@cache
def _cpu() -> CpuKernels:
    return _native() or reference


@cache
def _native() -> native.NativeKernels | None:
    built = _fastest()
    return None if isinstance(built, str) else built


@cache
def _fastest() -> native.NativeKernels | str:
    """The fastest build that this machine runs, or the line on why there is none, which is logged once."""
    try:
        usable = native.usable()
        if usable:
            built = native.NativeKernels(usable[0])
            built.set_threads(torch.get_num_threads())
            return built
        why = "the C++ kernels are not built"
    except native.UnusableBuild as error:
        why = str(error)
    line = f"{why}; to mend it: {native.remedy()}"
    log.warning("kernels=reference: %s", line)
    return line
