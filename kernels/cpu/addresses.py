"""Addresses of what the C++ kernels read: each thing is described once, and its struct kept as long as it is."""

import ctypes
from collections.abc import Sequence
from functools import singledispatch
from weakref import WeakKeyDictionary, ref

import torch
from torch import Tensor

from tightrope.kernels.cpu import structs
from tightrope.kernels.forms.layer import DecoderLayer, GatedExperts, LayerStack, Norm, Projection
from tightrope.kernels.forms.layout import LayerCache, RopeTable, StepLayout
from tightrope.kernels.forms.low_rank import AdapterRows, LowRank
from tightrope.kernels.forms.quantized import Nf4Matrix, QuantizedMatrix, are_six_bits
from tightrope.kernels.forms.ranks import BUFFER_BYTES, LayerSplit, SharedRanks

MOST_MATRICES = 8  # No more share a call, as in cpu/quantized.h.
WEIGHTS = {torch.float32: 0, torch.bfloat16: 1, torch.float16: 2}
ACTIVATIONS = {"silu": 0, "gelu": 1, "gelu_tanh": 2}
_FORMATS = {"f16": 0, "q8": 1, "q4": 2}
_QUANTIZED, _NF4 = 3, 4  # The kinds of weights after those of WEIGHTS.
_SCALES = {torch.float16: 0, torch.float32: 1}
_SCALE_CODES = 2

Described = (
    AdapterRows
    | DecoderLayer
    | GatedExperts
    | LayerCache
    | LowRank
    | Nf4Matrix
    | QuantizedMatrix
    | RopeTable
    | SharedRanks
    | StepLayout
)
_kept: dict[int, tuple[int, *tuple[object, ...]]] = {}  # By the id of what is described, as long as it lives.
_stacks: WeakKeyDictionary[LayerStack, tuple[object, object, int]] = WeakKeyDictionary()  # Those of stacks, likewise.


def address(thing: Described) -> int:
    """Of the struct that the library reads of it. Its tensors must stay where they are."""
    known = _kept.get(id(thing))
    return _keep(thing) if known is None else known[0]


def _keep(thing: Described) -> int:
    place, described = id(thing), _describe(thing)

    def forget(_: object) -> None:
        _kept.pop(place, None)

    # Of two threads that describe it at once, both take the first one's.
    return _kept.setdefault(place, (ctypes.addressof(described[0]), ref(thing, forget), *described))[0]


def stack_addresses(stack: LayerStack) -> tuple[object, object, int]:
    """Of its layers, of their caches, and how many dimensions the widest heads of these have."""
    known = _stacks.get(stack)
    if known is None:
        of_layers, of_caches = (pointers([*map(address, things)]) for things in (stack.layers, stack.caches))
        known = _stacks[stack] = of_layers, of_caches, max(cache.format.head_dim for cache in stack.caches)
    return known


def pointers(addresses: Sequence[int | None]) -> object:
    """An array of them, as the library reads it."""
    return (ctypes.c_void_p * len(addresses))(*addresses)


@singledispatch
def _describe(thing: Described) -> tuple[structs.Struct, *tuple[object, ...]]:
    """Its struct, and what that points to beside the thing's own tensors."""
    raise TypeError(type(thing))


@_describe.register
def _(rows: AdapterRows) -> tuple[structs.Struct, *tuple[object, ...]]:
    present = (ctypes.c_int32 * len(rows.present))(*rows.present)
    starts = _start(rows.slots), ctypes.addressof(present), _start(rows.scales)
    return structs.LowRankRows(*starts, len(present)), present


@_describe.register
def _(adapter: LowRank) -> tuple[structs.Struct, *tuple[object, ...]]:
    parts = (structs.LowRankPart * len(adapter.parts))(
        *(
            structs.LowRankPart(_start(p.down), _start(p.up), WEIGHTS[p.down.dtype], p.first, *p.up.shape)
            for p in adapter.parts
        )
    )
    return structs.LowRankAdapter(ctypes.addressof(parts), len(parts)), parts


@_describe.register
def _(cache: LayerCache) -> tuple[structs.Cache]:
    form = cache.format
    tensors = (cache.key_codes, cache.value_codes, cache.key_scales, cache.value_scales, cache.key_factor)
    return (structs.Cache(*map(_start, tensors), _FORMATS[form.dtype], form.num_kv_heads, form.head_dim),)


@_describe.register
def _(table: RopeTable) -> tuple[structs.Rope]:
    _, num_pages, _, half = table.pages.shape
    tensors = (table.pages, table.places, table.query_scale, table.set_of)
    return (structs.Rope(*map(_start, tensors), num_pages, half),)


@_describe.register
def _(step: StepLayout) -> tuple[structs.Step]:
    tables = step.block_tables
    tensors = (step.query_starts, step.context_lens, tables, step.positions, step.sequence_of, step.slots)
    return (structs.Step(*(tensor.data_ptr() for tensor in tensors), len(tables), tables.stride(0)),)


@_describe.register
def _(matrix: QuantizedMatrix) -> tuple[structs.Matrix]:
    scales = matrix.scale_codes if matrix.scales is None else matrix.scales
    assert scales is not None
    codes = None if matrix.scales is None else matrix.scale_codes
    of_groups = (matrix.group_max, matrix.zeros, matrix.mins, codes, matrix.codebook)
    of_rows = (matrix.source, matrix.group_starts, matrix.group_bits)
    num_groups = len(matrix.group_bits)
    return (
        structs.Matrix(
            *(None if t is None else _start(t) for t in (matrix.codes, scales, *of_groups, *of_rows)),
            matrix.codes.shape[1],
            matrix.num_inputs,
            matrix.num_outputs,
            num_groups,
            _SCALES.get(scales.dtype, _SCALE_CODES),
            (num_groups // scales.shape[1]).bit_length() - 1,
            are_six_bits(matrix),
            _group_rows(matrix),
        ),
    )


def _group_rows(matrix: QuantizedMatrix) -> int:
    """Rows of each group, where all have as many, and codes of as many bits; else 0."""
    sizes, bits = matrix.group_starts.diff(), matrix.group_bits
    are_alike = bool((sizes == sizes[:1]).all()) and bool((bits == bits[:1]).all())
    return int(sizes[0]) if are_alike else 0


@_describe.register
def _(matrix: Nf4Matrix) -> tuple[structs.Nf4Matrix]:
    starts = map(_start, (matrix.codebook, matrix.codes, matrix.scales))
    return (structs.Nf4Matrix(*starts, matrix.num_inputs, matrix.num_outputs, matrix.blocksize),)


@_describe.register
def _(layer: DecoderLayer) -> tuple[structs.Struct, *tuple[object, ...]]:
    kept: list[object] = []
    split = None if layer.split is None else _split(layer.split, kept)
    struct = structs.DecoderLayer(
        split,
        *(_projection(part, kept) for part in layer.projections),
        *map(_norm, (*layer.norms, *layer.head_norms)),
        layer.num_heads,
        layer.attention.window or 0,
        ACTIVATIONS[layer.activation],
        layer.attention.scale,
        layer.attention.softcap or 0.0,
    )
    return struct, *kept


@_describe.register
def _(layer: GatedExperts) -> tuple[structs.Struct, *tuple[object, ...]]:
    kept: list[object] = []

    def described(projections: Sequence[Projection]) -> int:
        parts = (structs.Projection * len(projections))(*(_projection(part, kept) for part in projections))
        kept.append(parts)
        return ctypes.addressof(parts)

    starts = described(layer.gate_up), described(layer.down)
    return structs.Experts(*starts, len(layer.down), ACTIVATIONS[layer.activation]), *kept


@_describe.register
def _(ranks: SharedRanks) -> tuple[structs.Ranks]:
    return (structs.Ranks(_start(ranks.memory), BUFFER_BYTES, ranks.rank, ranks.count, ranks.spins, 0),)


def _split(split: LayerSplit, kept: list[object]) -> int:
    parts = (split.attended, split.out, split.middle, split.down)
    sizes = [None if part is None else row_bytes(part, 4) for part in parts]
    starts = (None if part is None else ctypes.addressof(part) for part in sizes)
    struct = structs.Split(address(split.ranks), *starts)
    kept += [*sizes, struct]
    return ctypes.addressof(struct)


def row_bytes(sizes: Sequence[int], itemsize: int) -> ctypes.Array[ctypes.c_int32]:
    """The bytes that each rank has of a row, whose columns they have so many of."""
    return (ctypes.c_int32 * len(sizes))(*(size * itemsize for size in sizes))


def _projection(projection: Projection, kept: list[object]) -> structs.Projection:
    weight, bias = projection.weight, projection.bias
    assert bias is None or bias.dtype == torch.float32
    bias_start = None if bias is None else _start(bias)
    if isinstance(weight, Tensor):
        outputs, inputs = weight.shape
        return structs.Projection(_start(weight), bias_start, WEIGHTS[weight.dtype], 1, inputs, outputs)
    assert len(weight) <= MOST_MATRICES
    addresses = (ctypes.c_void_p * len(weight))(*map(address, weight))
    kept.append(addresses)
    kind = _QUANTIZED if isinstance(weight[0], QuantizedMatrix) else _NF4
    outputs = sum(matrix.num_outputs for matrix in weight)
    start = ctypes.addressof(addresses)
    return structs.Projection(start, bias_start, kind, len(weight), weight[0].num_inputs, outputs)


def _norm(norm: Norm | None) -> structs.Norm:
    if norm is None:
        return structs.Norm(None, 0.0)
    assert norm.weight.dtype == torch.float32
    return structs.Norm(_start(norm.weight), norm.eps)


def _start(tensor: Tensor) -> int:
    assert tensor.is_contiguous()
    return tensor.data_ptr()
