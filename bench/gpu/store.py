"""What store_kv leaves in the cache, against the reference: codes and scales must agree to the bit."""

from collections.abc import Iterator
from functools import partial

import torch

from bench.gpu.cases import Shape, make_case
from bench.gpu.run import Row, Run, tried
from tightrope.kernels import reference
from tightrope.kernels.forms.layout import AttentionSpec, CacheDtype, LayerCache
from tightrope.kernels.triton import ops

CODES = ("key_codes", "key_scales", "value_codes", "value_scales")
LENGTHS = ((200, 700), (1, 900), (33, 33))  # new and all tokens of each sequence


def rows(run: Run) -> Iterator[Row]:
    lengths = ((5, 20), (1, 40)) if run.is_smoke else LENGTHS
    dtypes: tuple[CacheDtype, ...] = ("q8", "q4", "f16")
    for dtype in dtypes:
        for heads, head_dim in ((2, 64),) if run.is_smoke else ((8, 128), (4, 80)):
            shape = Shape(lengths, heads, 1, head_dim, dtype, 0, AttentionSpec(1.0))
            for activations in (torch.float16, torch.bfloat16):
                title: Row = {"kernel": "store_kv", "case": f"{str(activations).removeprefix('torch.')} {shape}"}
                yield tried(title, partial(_stored, run, shape, activations))


def _stored(run: Run, shape: Shape, activations: torch.dtype) -> Row:
    """How many codes and scales differ."""
    case = make_case(shape, run.device, activations)
    found, wanted = (_empty_like(case.cache) for _ in range(2))
    ops.store_kv(found, case.keys, case.values, case.step.slots)
    reference.store_kv(wanted, case.keys, case.values, case.step.slots)
    different = sum(int((getattr(found, name) != getattr(wanted, name)).sum()) for name in CODES)
    return {"error": different, "bound": 0, "holds": different == 0}


def _empty_like(cache: LayerCache) -> LayerCache:
    key_codes, key_scales, value_codes, value_scales = (torch.zeros_like(getattr(cache, name)) for name in CODES)
    return LayerCache(cache.format, key_codes, key_scales, value_codes, value_scales, cache.key_factor)
