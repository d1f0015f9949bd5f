"""The structs of cpu/structs.h, which says what their fields are: the same names in the same order."""

import ctypes
from typing import Any  # ctypes keeps the type of its types to itself.

_ADDRESS, _INT, _LONG, _FLOAT = ctypes.c_void_p, ctypes.c_int32, ctypes.c_int64, ctypes.c_float


class Struct(ctypes.Structure):
    """What is handed over by address."""


def _each(kind: type, names: str) -> tuple[tuple[str, Any], ...]:
    return tuple((name, kind) for name in names.split())


class Cache(Struct):
    _fields_ = (
        *_each(_ADDRESS, "key_codes value_codes key_scales value_scales key_factor"),
        *_each(_INT, "format kv_heads dims"),
    )


class Rope(Struct):
    _fields_ = (*_each(_ADDRESS, "pages places query_scale set_of"), *_each(_INT, "num_pages half"))


class Step(Struct):
    _fields_ = (
        *_each(_ADDRESS, "query_starts context_lens block_tables positions sequence_of slots"),
        *_each(_INT, "sequences block_table_width"),
    )


class LowRankPart(Struct):
    _fields_ = (*_each(_ADDRESS, "down up"), *_each(_INT, "dtype first rank outputs"))


class LowRankAdapter(Struct):
    _fields_ = (*_each(_ADDRESS, "parts"), *_each(_INT, "count"))


class LowRankRows(Struct):
    _fields_ = (*_each(_ADDRESS, "slots present scales"), *_each(_INT, "count"))


class Matrix(Struct):
    _fields_ = (
        *_each(_ADDRESS, "codes scales group_max zeros mins scale_codes codebook"),
        *_each(_ADDRESS, "source group_starts group_bits"),
        *_each(_LONG, "tile_bytes"),
        *_each(_INT, "inputs outputs groups scale_kind unit_shift are_six_bits group_rows"),
    )


class Nf4Matrix(Struct):
    _fields_ = (*_each(_ADDRESS, "codebook codes scales"), *_each(_INT, "inputs outputs blocksize"))


class Projection(Struct):
    _fields_ = (*_each(_ADDRESS, "weight bias"), *_each(_INT, "kind count inputs outputs"))


class Norm(Struct):
    _fields_ = (*_each(_ADDRESS, "weight"), *_each(_FLOAT, "eps"))


class Ranks(Struct):
    _fields_ = (
        *_each(_ADDRESS, "memory"),
        *_each(_LONG, "buffer_bytes"),
        *_each(_INT, "rank count spins"),
        ("turn", ctypes.c_uint32),
    )


class Split(Struct):
    _fields_ = _each(_ADDRESS, "ranks attended out middle down")


class DecoderLayer(Struct):
    _fields_ = (
        *_each(_ADDRESS, "split"),
        *_each(Projection, "qkv out gate_up down"),
        *_each(Norm, "before_attention after_attention before_mlp after_mlp of_queries of_keys"),
        *_each(_INT, "heads window activation"),
        *_each(_FLOAT, "scale softcap"),
    )


class Experts(Struct):
    _fields_ = (*_each(_ADDRESS, "gate_up down"), *_each(_INT, "count activation"))


class Masks(Struct):
    _fields_ = (*_each(_ADDRESS, "masks"), *_each(_LONG, "bytes"), *_each(_INT, "width"), ("all_set", ctypes.c_uint32))


class SearchResult(Struct):
    _fields_ = _each(_LONG, "read found error")


class Samples(Struct):
    _fields_ = (
        *_each(_ADDRESS * 4, "sources data"),
        *_each(_ADDRESS, "attention custom work what"),
    )


# A library is asked for the sizes of all of them when it is loaded.
STRUCTS: tuple[type[ctypes.Structure], ...] = tuple(Struct.__subclasses__())
