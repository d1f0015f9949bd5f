"""What the C++ kernels read by address: matrices and whole layers, described once and kept as long as they are."""

import ctypes
from collections.abc import Sequence
from weakref import WeakKeyDictionary

import torch

from tightrope.kernels.forms.layer import DecoderLayer, GatedExperts, Norm, Projection
from tightrope.kernels.forms.low_rank import LowRank
from tightrope.kernels.forms.quantized import Nf4Matrix, QuantizedMatrix

MOST_MATRICES = 8  # that share a call
WEIGHTS = {torch.float32: 0, torch.bfloat16: 1, torch.float16: 2}
ACTIVATIONS = {"silu": 0, "gelu": 1, "gelu_tanh": 2}
_QUANTIZED, _NF4 = 3, 4  # the other kinds of weights
_SCALES = {torch.float16: 0, torch.float32: 1}
_SCALE_CODES = 2


class _Quantized(ctypes.Structure):
    """`Matrix` in cpu/quantized_input.h."""

    _fields_ = (
        ("codes", ctypes.c_void_p),
        ("scales", ctypes.c_void_p),
        ("group_max", ctypes.c_void_p),
        ("zeros", ctypes.c_void_p),
        ("source", ctypes.c_void_p),
        ("group_starts", ctypes.c_void_p),
        ("group_bits", ctypes.c_void_p),
        ("tile_bytes", ctypes.c_int64),
        ("inputs", ctypes.c_int32),
        ("outputs", ctypes.c_int32),
        ("groups", ctypes.c_int32),
        ("scale_kind", ctypes.c_int32),
    )


class _Nf4(ctypes.Structure):
    """`Nf4Matrix` in cpu/nf4.h."""

    _fields_ = (
        ("codebook", ctypes.c_void_p),
        ("codes", ctypes.c_void_p),
        ("scales", ctypes.c_void_p),
        ("inputs", ctypes.c_int32),
        ("outputs", ctypes.c_int32),
        ("blocksize", ctypes.c_int32),
    )


class _Projection(ctypes.Structure):
    """`Projection` in cpu/layer.h."""

    _fields_ = (
        ("weight", ctypes.c_void_p),
        ("bias", ctypes.c_void_p),
        ("kind", ctypes.c_int32),
        ("count", ctypes.c_int32),
        ("inputs", ctypes.c_int32),
        ("outputs", ctypes.c_int32),
    )


class _Norm(ctypes.Structure):
    """`Norm` in cpu/layer.h."""

    _fields_ = (("weight", ctypes.c_void_p), ("eps", ctypes.c_float))


class _DecoderLayer(ctypes.Structure):
    """`DecoderLayer` in cpu/layer.h."""

    _fields_ = (
        *((name, _Projection) for name in ("qkv", "out", "gate_up", "down")),
        *((name, _Norm) for name in ("before_attention", "after_attention", "before_mlp", "after_mlp")),
        *((name, _Norm) for name in ("of_queries", "of_keys")),
        ("heads", ctypes.c_int32),
        ("window", ctypes.c_int32),
        ("activation", ctypes.c_int32),
        ("scale", ctypes.c_float),
        ("softcap", ctypes.c_float),
    )


class _Experts(ctypes.Structure):
    """`Experts` in cpu/experts.h."""

    _fields_ = (
        ("gate_up", ctypes.c_void_p),
        ("down", ctypes.c_void_p),
        ("count", ctypes.c_int32),
        ("activation", ctypes.c_int32),
    )


class _LowRankPart(ctypes.Structure):
    """`low_rank::Part` in cpu/low_rank.h."""

    _fields_ = (
        ("down", ctypes.c_void_p),
        ("up", ctypes.c_void_p),
        ("dtype", ctypes.c_int32),
        ("first", ctypes.c_int32),
        ("rank", ctypes.c_int32),
        ("outputs", ctypes.c_int32),
    )


class _LowRank(ctypes.Structure):
    """`low_rank::Adapter` there."""

    _fields_ = (("parts", ctypes.c_void_p), ("count", ctypes.c_int32), ("slot", ctypes.c_int32))


_matrices: WeakKeyDictionary[QuantizedMatrix | Nf4Matrix, tuple[ctypes.Structure, int]] = WeakKeyDictionary()
_layers: WeakKeyDictionary[DecoderLayer | GatedExperts, tuple[tuple[object, ...], int]] = WeakKeyDictionary()
_low_rank: WeakKeyDictionary[LowRank, dict[int, tuple[_LowRank, object, int]]] = WeakKeyDictionary()


def matrix_address(matrix: QuantizedMatrix | Nf4Matrix) -> int:
    """Of what the library reads of a matrix."""
    return (_matrices.get(matrix) or _describe_matrix(matrix))[1]


def layer_address(layer: DecoderLayer | GatedExperts) -> int:
    """Of what the library reads of a layer, or of its experts."""
    return (_layers.get(layer) or _keep_layer(layer))[1]


def low_rank_address(slot: int, adapter: LowRank) -> int:
    """Of what the library reads of an adapter in this slot."""
    known = _low_rank.setdefault(adapter, {})
    if slot not in known:
        parts = (_LowRankPart * len(adapter.parts))(
            *(
                _LowRankPart(
                    part.down.data_ptr(), part.up.data_ptr(), WEIGHTS[part.down.dtype], part.first, *part.up.shape
                )
                for part in adapter.parts
            )
        )
        described = _LowRank(ctypes.addressof(parts), len(parts), slot)
        known[slot] = described, parts, ctypes.addressof(described)
    return known[slot][2]


def _describe_matrix(matrix: QuantizedMatrix | Nf4Matrix) -> tuple[ctypes.Structure, int]:
    if isinstance(matrix, QuantizedMatrix):
        scales = matrix.scale_codes if matrix.scales is None else matrix.scales
        assert scales is not None
        tensors = (scales, matrix.group_max, matrix.zeros, matrix.source, matrix.group_starts, matrix.group_bits)
        assert all(tensor is None or tensor.is_contiguous() for tensor in (matrix.codes, *tensors))
        described: ctypes.Structure = _Quantized(
            matrix.codes.data_ptr(),
            *(None if tensor is None else tensor.data_ptr() for tensor in tensors),
            matrix.codes.shape[1],
            matrix.num_inputs,
            matrix.num_outputs,
            len(matrix.group_bits),
            _SCALES.get(scales.dtype, _SCALE_CODES),
        )
    else:
        assert matrix.codes.is_contiguous()
        assert matrix.scales.is_contiguous()
        described = _Nf4(
            matrix.codebook.data_ptr(),
            matrix.codes.data_ptr(),
            matrix.scales.data_ptr(),
            matrix.num_inputs,
            matrix.num_outputs,
            matrix.blocksize,
        )
    _matrices[matrix] = described, ctypes.addressof(described)
    return _matrices[matrix]


def _keep_layer(layer: DecoderLayer | GatedExperts) -> tuple[tuple[object, ...], int]:
    kept: list[object] = []  # what the description points to, beside the layer's own tensors
    described = _describe_layer(layer, kept) if isinstance(layer, DecoderLayer) else _describe_experts(layer, kept)
    _layers[layer] = (described, *kept), ctypes.addressof(described)
    return _layers[layer]


def _describe_layer(layer: DecoderLayer, kept: list[object]) -> _DecoderLayer:
    return _DecoderLayer(
        *(_describe_projection(part, kept) for part in layer.projections),
        *(_describe_norm(norm) for norm in (*layer.norms, *layer.head_norms)),
        layer.num_heads,
        layer.attention.window or 0,
        ACTIVATIONS[layer.activation],
        layer.attention.scale,
        layer.attention.softcap or 0.0,
    )


def _describe_experts(layer: GatedExperts, kept: list[object]) -> _Experts:
    def described(projections: Sequence[Projection]) -> int:
        parts = (_Projection * len(projections))(*(_describe_projection(part, kept) for part in projections))
        kept.append(parts)
        return ctypes.addressof(parts)

    return _Experts(described(layer.gate_up), described(layer.down), len(layer.down), ACTIVATIONS[layer.activation])


def _describe_projection(projection: Projection, kept: list[object]) -> _Projection:
    weight, bias = projection.weight, projection.bias
    assert bias is None or (bias.dtype == torch.float32 and bias.is_contiguous())
    bias_address = None if bias is None else bias.data_ptr()
    if isinstance(weight, torch.Tensor):
        assert weight.is_contiguous()
        outputs, inputs = weight.shape
        return _Projection(weight.data_ptr(), bias_address, WEIGHTS[weight.dtype], 1, inputs, outputs)
    assert len(weight) <= MOST_MATRICES
    addresses = (ctypes.c_void_p * len(weight))(*(matrix_address(matrix) for matrix in weight))
    kept.append(addresses)
    kind = _QUANTIZED if isinstance(weight[0], QuantizedMatrix) else _NF4
    outputs = sum(matrix.num_outputs for matrix in weight)
    return _Projection(ctypes.addressof(addresses), bias_address, kind, len(weight), weight[0].num_inputs, outputs)


def _describe_norm(norm: Norm | None) -> _Norm:
    if norm is None:
        return _Norm(None, 0.0)
    assert norm.weight.dtype == torch.float32
    assert norm.weight.is_contiguous()
    return _Norm(norm.weight.data_ptr(), norm.eps)
