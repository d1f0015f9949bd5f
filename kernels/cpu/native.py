"""The C++ kernels of a CPU, called through ctypes; meanings and shapes are those of kernels.reference.

A call costs some two microseconds beside its work: addresses and numbers are handed over as they are, without checks.
So tensors must be what kernels.reference and kernels.layout say: float32 activations, indices of the widths stated.
"""

import ctypes
import os
import sys
import sysconfig
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from shutil import which
from typing import Any  # ctypes keeps the type of its types to itself.

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from tightrope.kernels import reference
from tightrope.kernels.cpu import structs
from tightrope.kernels.cpu.addresses import (
    ACTIVATIONS,
    MOST_MATRICES,
    WEIGHTS,
    address,
    pointers,
    row_bytes,
    stack_addresses,
)
from tightrope.kernels.forms.layer import GatedExperts, LayerStack, LayerStep, Projection
from tightrope.kernels.forms.layout import AttentionSpec, LayerCache, RopeTable, StepLayout
from tightrope.kernels.forms.low_rank import AdapterRows, LowRank
from tightrope.kernels.forms.masks import Masks
from tightrope.kernels.forms.quantized import Nf4Matrix, QuantizedMatrix
from tightrope.kernels.forms.ranks import BUFFER_BYTES, SharedRanks
from tightrope.kernels.forms.rows import SUMS, Ranked

# numbered by the library; a machine that runs one runs those before
INSTRUCTION_SETS = ("portable", "avx2", "avx512", "avx512vnni")
INTERFACE = 10  # The number in cpu/kernels.cpp; a build that gives none is of the first.
MOST_DIMS = 256  # Heads with more are left to the reference's attention.
MOST_LAYER_TOKENS = 64  # More go operation by operation: memory is kept, and they hide the time between calls.

_ADDRESSES: list[Any] = [ctypes.c_void_p * count for count in range(MOST_MATRICES + 1)]
_TYPES: dict[str, Any] = {"p": ctypes.c_void_p, "i": ctypes.c_int, "l": ctypes.c_int64, "f": ctypes.c_float}


class UnusableBuild(Exception):
    """One line: a library that lies where a build is looked for, but isn't one of these sources."""


def build_path(instruction_set: str) -> Path:
    """Where the build for an instruction set lies, if it was built."""
    return Path(__file__).parent.parent / f"cpu_{instruction_set}{sysconfig.get_config_var('EXT_SUFFIX')}"


def usable() -> Sequence[str]:
    """The instruction sets that are built and that this machine runs, the fastest first; none without a build.

    Raises UnusableBuild.
    """
    if not build_path("portable").exists():
        return ()
    widest: int = open_build("portable").tightrope_instruction_set()
    return [name for name in reversed(INSTRUCTION_SETS[: widest + 1]) if build_path(name).exists()]


def open_build(instruction_set: str) -> ctypes.CDLL:
    """The build for an instruction set. Raises UnusableBuild where it isn't one of this version."""
    path = build_path(instruction_set)
    try:
        library = ctypes.CDLL(str(path))
    except OSError as error:
        raise UnusableBuild(f"{path} can't be loaded: {' '.join(str(error).split())}") from None
    if not hasattr(library, "tightrope_instruction_set"):
        raise UnusableBuild(f"{path} is no build of these kernels")
    interface = library.tightrope_interface() if hasattr(library, "tightrope_interface") else 1
    if interface != INTERFACE:
        raise UnusableBuild(f"{path} is of another version: its interface is {interface}, not {INTERFACE}")
    size_of = library.tightrope_sizeof
    size_of.argtypes, size_of.restype = [ctypes.c_char_p], ctypes.c_int64
    for struct in structs.STRUCTS:
        size, expected = size_of(struct.__name__.encode()), ctypes.sizeof(struct)
        if size != expected:
            raise UnusableBuild(f"{path} is of another version: its {struct.__name__} has {size} bytes, not {expected}")
    return library


def remedy() -> str:
    """The command that builds what this machine lacks, for the Python that runs."""
    home, python = Path(__file__).resolve().parents[2], Path(sys.executable)
    if not (home / "kernels" / "cpu" / "build.mk").exists():
        return "pip install --force-reinstall --no-deps, and the folder that tightrope was installed from"
    command = "make kernels" if python.parents[1] == home / ".venv" else f"make -f kernels/cpu/build.mk PYTHON={python}"
    return f"{command} in {home}" + ("" if which("c++") or which("g++") else ", once g++ is installed")


class NativeSearch:
    """One build's search through files, which needs no threads."""

    def __init__(self, instruction_set: str) -> None:
        """Raises UnusableBuild."""
        self._search = typed_function(open_build(instruction_set), "search_file", "illplpp")

    def search_file(self, file: int, start: int, num_bytes: int, masks: Masks, buffer: NDArray[np.uint8]) -> int | None:
        """See kernels.reference.search_file."""
        repeated, result = masks.repeated, structs.SearchResult()
        read = structs.Masks(repeated.ctypes.data, repeated.nbytes, masks.block.itemsize, masks.all_set)
        room = buffer.ctypes.data, buffer.nbytes
        self._search(file, start, num_bytes, *room, ctypes.byref(read), ctypes.byref(result))
        if result.error:
            raise OSError(result.error, os.strerror(result.error))
        if result.found >= 0:
            return int(result.found)
        if result.read < num_bytes:
            raise EOFError
        return None


def typed_function(library: ctypes.CDLL, name: str, types: str) -> Callable[..., None]:
    try:
        found = library[f"tightrope_{name}"]
    except AttributeError:
        raise UnusableBuild(f"{library._name} is of another version: it has no tightrope_{name}") from None
    found.argtypes, found.restype = [_TYPES[kind] for kind in types], None
    return found


class NativeKernels:
    """One build's operations, and its threads: the caller's, until `set_threads` adds more."""

    def __init__(self, instruction_set: str) -> None:
        """Raises UnusableBuild."""
        self.instruction_set = instruction_set
        library = open_build(instruction_set)

        def function(name: str, types: str) -> Callable[..., None]:
            return typed_function(library, name, types)

        self.set_threads = function("set_threads", "i")
        self.set_batch_invariant = function("set_batch_invariant", "i")
        self._linear = function("linear", "ppippiii")
        self._quantized_linear = function("quantized_linear", "ppippi")
        self._nf4_linear = function("nf4_linear", "ppippi")
        self._quantized_rows = function("quantized_rows", "ppip")
        self._add_low_rank = function("add_low_rank", "ppppiii")
        self._store_kv = function("store_kv", "pplplpi")
        self._copy_slots = function("copy_slots", "pppi")
        self._attention = function("attention", "ppipppfif")
        self._rotate = function("rotate", "plpppiii")
        self._rms_norm = function("rms_norm", "plppiif")
        self._gated = function("gated", "ppiii")
        self._pack_blocks = function("pack_blocks", "ipiipppp")
        self._draw = function("draw", "plplpp")
        self._rank = function("rank", "plplplpppp")
        self._row_sums = function("row_sums", "plplpip")
        self._decoder_layers = function("decoder_layers", "pipippppp")
        self._gather = function("gather", "pppip")
        self._experts = function("experts", "ppppppiipp")

    def describe(self) -> str:
        return f"C++ ({self.instruction_set})"

    def store_kv(self, cache: LayerCache, keys: Tensor, values: Tensor, slots: Tensor) -> None:
        keys, key_stride = _tokens(keys)
        values, value_stride = _tokens(values)
        starts = keys.data_ptr(), key_stride, values.data_ptr(), value_stride
        self._store_kv(address(cache), *starts, slots.data_ptr(), slots.shape[0])

    def copy_slots(self, cache: LayerCache, sources: Tensor, targets: Tensor) -> None:
        """See kernels.dispatch.copy_slots; slots are int64."""
        self._copy_slots(address(cache), sources.data_ptr(), targets.data_ptr(), len(sources))

    def attention(
        self, queries: Tensor, cache: LayerCache, step: StepLayout, table: RopeTable | None, spec: AttentionSpec
    ) -> Tensor:
        if cache.format.head_dim > MOST_DIMS:
            return reference.attention(queries, cache, step, table, spec)
        queries = queries.contiguous()
        out = torch.empty_like(queries)
        cached = address(cache), None if table is None else address(table), address(step)
        limits = spec.window or 0, spec.softcap or 0.0
        self._attention(queries.data_ptr(), out.data_ptr(), queries.shape[1], *cached, spec.scale, *limits)
        return out

    def rotate(self, x: Tensor, step: StepLayout, table: RopeTable) -> Tensor:
        x, stride = _tokens(x)
        out = x.new_empty(*x.shape)
        self._rotate(x.data_ptr(), stride, out.data_ptr(), address(table), address(step), *x.shape)
        return out

    def linear(self, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        x, weight = x.contiguous(), weight.contiguous()
        bias = None if bias is None else bias.float()
        rows, inputs = x.shape
        outputs = weight.shape[0]
        out = x.new_empty(rows, outputs)
        bias_start = None if bias is None else bias.data_ptr()
        what = x.data_ptr(), weight.data_ptr(), WEIGHTS[weight.dtype], bias_start, out.data_ptr()
        self._linear(*what, rows, inputs, outputs)
        return out

    def quantized_linear(self, x: Tensor, matrices: Sequence[QuantizedMatrix], bias: Tensor | None) -> Tensor:
        return _times(self._quantized_linear, x, matrices, bias)

    def nf4_linear(self, x: Tensor, matrices: Sequence[Nf4Matrix], bias: Tensor | None) -> Tensor:
        return _times(self._nf4_linear, x, matrices, bias)

    def quantized_rows(self, matrix: QuantizedMatrix, numbers: Tensor) -> Tensor:
        numbers = numbers.contiguous()
        out = torch.empty(len(numbers), matrix.num_inputs)
        self._quantized_rows(address(matrix), numbers.data_ptr(), len(numbers), out.data_ptr())
        return out

    def pack_blocks(self, kind: int, raw: Tensor, into: QuantizedMatrix) -> None:
        """See kernels.dispatch.pack_blocks."""
        assert raw.is_contiguous()
        tensors = (into.codes, into.scales, into.scale_codes, into.mins)
        assert all(tensor is None or tensor.is_contiguous() for tensor in tensors)
        starts = (None if tensor is None else tensor.data_ptr() for tensor in tensors)
        self._pack_blocks(kind, raw.data_ptr(), len(raw), into.num_inputs, *starts)

    def add_low_rank(self, out: Tensor, x: Tensor, adapters: Mapping[int, LowRank], rows: AdapterRows) -> None:
        assert out.is_contiguous()
        x = x.contiguous()
        sizes = len(x), x.shape[1], out.shape[1]
        self._add_low_rank(x.data_ptr(), out.data_ptr(), _adapters_of([adapters], rows), address(rows), *sizes)

    def rms_norm(self, x: Tensor, weight: Tensor, eps: float) -> Tensor:
        width = x.shape[-1]
        rows = x.reshape(-1, width)
        out = torch.empty(x.shape)
        self._rms_norm(rows.data_ptr(), rows.stride(0), weight.data_ptr(), out.data_ptr(), rows.shape[0], width, eps)
        return out

    def gated(self, gate_up: Tensor, activation: str) -> Tensor:
        gate_up = gate_up.contiguous()
        rows, both = gate_up.shape
        out = gate_up.new_empty(rows, both // 2)
        self._gated(gate_up.data_ptr(), out.data_ptr(), rows, both // 2, ACTIVATIONS[activation])
        return out

    def gather(self, local: Tensor, sizes: Sequence[int], ranks: SharedRanks) -> Tensor:
        """See kernels.dispatch.gather."""
        local = local.contiguous()
        assert local.shape[1] == sizes[ranks.rank]
        out = local.new_empty(len(local), sum(sizes))
        assert out.shape[1] * out.element_size() <= BUFFER_BYTES
        if out.numel():
            held = row_bytes(sizes, out.element_size())
            self._gather(address(ranks), local.data_ptr(), held, len(local), out.data_ptr())
        return out

    def experts(
        self, x: Tensor, layer: GatedExperts, picked: Tensor, shares: Tensor, adapters: AdapterRows | None,
        gather: Callable[[Tensor], Tensor] | None = None,
    ) -> Tensor:  # fmt: skip
        """See kernels.dispatch.experts."""
        x, picked, shares = x.contiguous(), picked.contiguous(), shares.contiguous()
        assert (picked.dtype, shares.dtype) == (torch.int64, torch.float32)
        out = x.new_empty(len(x), layer.down[0].num_outputs)
        more = *picked.shape, *_adapted(layer.projections, adapters)
        picks = picked.data_ptr(), shares.data_ptr()
        if gather is None:
            self._experts(address(layer), x.data_ptr(), *picks, None, out.data_ptr(), *more)
            return out
        between = x.new_empty(picked.numel(), layer.gate_up[0].num_outputs // 2)
        self._experts(address(layer), x.data_ptr(), *picks, between.data_ptr(), None, *more)
        between = gather(between).contiguous()
        self._experts(address(layer), None, *picks, between.data_ptr(), out.data_ptr(), *more)
        return out

    def decoder_layers(
        self, x: Tensor, stack: LayerStack, steps: Sequence[LayerStep], adapters: AdapterRows | None
    ) -> Tensor | None:
        """See kernels.dispatch.decoder_layers."""
        layers, caches, most_dims = stack_addresses(stack)
        if len(x) > MOST_LAYER_TOKENS or most_dims > MOST_DIMS:
            return None
        out, count = x.clone(), len(stack.layers)
        layouts = [address(step.layout) for step in steps]
        tables = [None if step.table is None else address(step.table) for step in steps]
        of_layers = [pointers([kind[number] for number in stack.kinds]) for kind in (tables, layouts)]
        adapted: tuple[object, int | None] = (None, None)
        if adapters is not None:
            adapted = _adapted([part for layer in stack.layers for part in layer.projections], adapters)
        self._decoder_layers(layers, count, out.data_ptr(), len(x), caches, *of_layers, *adapted)
        return out

    def draw(self, logits: Tensor, rows: NDArray[np.int64], params: NDArray[np.float64]) -> NDArray[np.int64]:
        """See kernels.dispatch.draw; logits are contiguous, here and below."""
        token_ids = np.empty(len(rows), np.int64)
        self._draw(*_rows(logits, rows), params.ctypes.data, token_ids.ctypes.data)
        return token_ids

    def rank(self, logits: Tensor, rows: NDArray[np.int64], wanted: NDArray[np.int64]) -> Ranked:
        wanted = np.minimum(wanted, logits.shape[1])
        width = int(wanted.max())
        values, token_ids = np.empty((len(rows), width), np.float32), np.empty((len(rows), width), np.int64)
        border, top = np.empty((len(rows), 1), np.float32), np.empty((len(rows), 1), np.float32)
        results = (array.ctypes.data for array in (values, token_ids, border, top))
        self._rank(*_rows(logits, rows), wanted.ctypes.data, width, *results)
        return Ranked(values, token_ids, border, top)

    def row_sums(self, logits: Tensor, rows: NDArray[np.int64], transforms: NDArray[np.float64]) -> NDArray[np.float64]:
        sums = np.empty((len(rows), len(SUMS)))
        self._row_sums(*_rows(logits, rows), transforms.ctypes.data, 0, sums.ctypes.data)
        return sums

    def row_mass(self, logits: Tensor, rows: NDArray[np.int64], transforms: NDArray[np.float64]) -> NDArray[np.float64]:
        mass = np.empty((len(rows), 1))
        self._row_sums(*_rows(logits, rows), transforms.ctypes.data, 1, mass.ctypes.data)
        return mass


def _adapted(projections: Sequence[Projection], rows: AdapterRows | None) -> tuple[object, int | None]:
    """What adapters add to these projections and to which rows; None twice where they add nothing."""
    adapters = [projection.adapters for projection in projections]
    return (None, None) if rows is None or not any(adapters) else (_adapters_of(adapters, rows), address(rows))


def _adapters_of(adapters: Sequence[Mapping[int, LowRank]], rows: AdapterRows) -> object:
    """For each linear the addresses of the adapters in use."""
    return pointers([address(of[slot]) if slot in of else None for of in adapters for slot in rows.present])


def _times(
    run: Callable[..., None], x: Tensor, matrices: Sequence[QuantizedMatrix | Nf4Matrix], bias: Tensor | None
) -> Tensor:
    """x times matrices side by side, as many in a call as may be."""
    if len(matrices) > MOST_MATRICES:
        parts, end = [], 0
        for i in range(0, len(matrices), MOST_MATRICES):
            begin, some = end, matrices[i : i + MOST_MATRICES]
            end += sum(matrix.num_outputs for matrix in some)
            parts.append(_times(run, x, some, None if bias is None else bias[begin:end]))
        return torch.cat(parts, 1)
    x = x.contiguous()
    bias = None if bias is None else bias.float().contiguous()
    outputs, addresses = 0, []
    for matrix in matrices:
        outputs += matrix.num_outputs
        addresses.append(address(matrix))
    out = x.new_empty(len(x), outputs)
    count, bias_start = len(addresses), None if bias is None else bias.data_ptr()
    run(x.data_ptr(), _ADDRESSES[count](*addresses), count, bias_start, out.data_ptr(), len(x))
    return out


def _rows(logits: Tensor, rows: NDArray[np.int64]) -> tuple[int, int, int, int]:
    return logits.data_ptr(), logits.shape[1], rows.ctypes.data, len(rows)


def _tokens(x: Tensor) -> tuple[Tensor, int]:
    """x [T, heads, D] with each token's heads side by side, as a fused projection's slices have; and its stride."""
    if x.stride(2) != 1 or x.stride(1) != x.shape[2]:
        x = x.contiguous()
    return x, x.stride(0)
