"""Every Triton kernel against the torch reference, on the device where they run."""

from collections.abc import Callable, Iterator

import torch
from torch import Tensor

from bench.gpu.cases import Case, Shape, make_case
from tightrope.kernels import reference
from tightrope.kernels.forms.layout import AttentionSpec, LayerCache
from tightrope.kernels.triton import ops

# Largest error allowed, relative to the largest value: float16 products, and the rounding of the result itself.
BOUNDS = {torch.bfloat16: 8e-3, torch.float16: 4e-3, torch.float32: 1e-4}
CODES = ("key_codes", "key_scales", "value_codes", "value_scales")

STEPS = (((1, 5000), (1, 333), (1, 1)), ((200, 700), (1, 900), (33, 33)))  # new and all tokens of each sequence

Check = dict[str, object]


def check_kernels(device: torch.device, is_smoke: bool, show: Callable[[str], None]) -> list[Check]:
    """One row a check: kernel, case, error, bound and whether it holds."""
    dtypes = (torch.float32, torch.bfloat16) if is_smoke else tuple(BOUNDS)
    rows = []
    for activations in dtypes:
        for shape in _small() if is_smoke else _shapes():
            for row in _checks(shape, device, activations):
                rows.append(row)
                show(f"{row['kernel']}: {row['case']}")
    return rows


def _shapes() -> Iterator[Shape]:
    plain = AttentionSpec(scale=0.1)
    for dtype in ("q8", "q4", "f16"):
        for head_dim, group in ((64, 3), (80, 1), (128, 7), (128, 8), (256, 2)):
            for lengths in STEPS:
                yield Shape(lengths, 4, group, head_dim, dtype, head_dim, plain)
    for rotated in (0, 32, 64):
        yield Shape(((1, 3000), (64, 500)), 2, 4, 128, "q8", rotated, plain)
    for lengths in STEPS:
        yield Shape(lengths, 2, 4, 128, "q8", 128, AttentionSpec(0.1, window=512))
        yield Shape(lengths, 2, 4, 128, "q8", 128, AttentionSpec(0.1, softcap=5.0))


def _small() -> Iterator[Shape]:
    yield Shape(((1, 140), (1, 17)), 2, 3, 64, "q8", 64, AttentionSpec(0.1))
    yield Shape(((5, 20), (1, 40)), 1, 2, 64, "q4", 32, AttentionSpec(0.1, window=16))


def _checks(shape: Shape, device: torch.device, activations: torch.dtype) -> Iterator[Check]:
    case = make_case(shape, device, activations)
    name = f"{str(activations).removeprefix('torch.')} {shape}"

    def check(kernel: str, found: Tensor, wanted: Tensor) -> Check:
        error = ((found.float() - wanted).abs().max() / wanted.abs().max()).item()
        bound = BOUNDS[activations]
        return {"kernel": kernel, "case": name, "error": error, "bound": bound, "holds": error <= bound}

    yield {
        "kernel": "store_kv",
        "case": name,
        "error": _unequal_codes(case),
        "bound": 0,
        "holds": not _unequal_codes(case),
    }
    queries = case.queries.float()
    if case.table is not None:
        wanted = reference.rotate(queries, case.step, case.table)
        yield check("rotate", ops.rotate(case.queries, case.step, case.table), wanted)
    wanted = reference.attention(queries, case.cache, case.step, case.table, shape.spec)
    yield check("attention", ops.attention(case.queries, case.cache, case.step, case.table, shape.spec), wanted)
    weight = torch.rand(shape.head_dim, device=device)
    yield check("rms_norm", ops.rms_norm(case.queries, weight, 1e-6), reference.rms_norm(queries, weight, 1e-6))
    gate_up = case.queries.flatten(1)
    for activation in ("silu", "gelu", "gelu_tanh"):
        wanted = reference.gated(gate_up.float(), activation)
        yield check(f"gated {activation}", ops.gated(gate_up, activation), wanted)


def _unequal_codes(case: Case) -> int:
    """Codes and scales in which what store_kv leaves differs from the reference's; they must agree to the bit."""
    found, wanted = (_empty_like(case.cache) for _ in range(2))
    ops.store_kv(found, case.keys, case.values, case.step.slots)
    reference.store_kv(wanted, case.keys, case.values, case.step.slots)
    return sum(int((getattr(found, name) != getattr(wanted, name)).sum()) for name in CODES)


def _empty_like(cache: LayerCache) -> LayerCache:
    key_codes, key_scales, value_codes, value_scales = (torch.zeros_like(getattr(cache, name)) for name in CODES)
    return LayerCache(cache.format, key_codes, key_scales, value_codes, value_scales, cache.key_factor)
