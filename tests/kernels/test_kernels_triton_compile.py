"""The CUDA kernels through Triton's compiler, which needs no card: the interpreter accepts more than it does."""

from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from bench.gpu.cases import Case, Shape, make_case
from bench.gpu.listing.compiled import compile_launch
from bench.gpu.listing.recorded import Launch, recorded
from tightrope.kernels.forms.layout import AttentionSpec, CacheDtype
from tightrope.kernels.forms.low_rank import AdapterRows, LowRankSlots, LowRankTable, make_low_rank
from tightrope.kernels.triton import expanded, ops

pytestmark = pytest.mark.slow

SHARED_BYTES = 99 * 1024  # that a program can have on an RTX 3090 or 4090


@pytest.fixture
def launches(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[list[Launch]]:
    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path))
    with recorded() as found:
        yield found


def case_of(
    dtype: CacheDtype, head_dim: int, rotated: int, lengths: tuple[tuple[int, int], ...], activations: torch.dtype
) -> tuple[Case, AttentionSpec]:
    spec = AttentionSpec(0.1, window=20, softcap=5.0)
    shape = Shape(lengths, 1, 2, head_dim, dtype, rotated, spec)
    return make_case(shape, torch.device("cpu"), activations), spec


@pytest.mark.parametrize(
    ("dtype", "head_dim", "rotated", "activations", "capability"),
    [
        ("q8", 128, 128, torch.bfloat16, 90),
        ("q4", 128, 32, torch.bfloat16, 86),
        ("q8", 80, 80, torch.float16, 86),
        ("q4", 64, 0, torch.float16, 90),
        ("q8", 256, 256, torch.bfloat16, 86),
    ],
)
def test_attention_compiles_and_fits_the_cards(
    launches: list[Launch], dtype: CacheDtype, head_dim: int, rotated: int, activations: torch.dtype, capability: int
):
    case, spec = case_of(dtype, head_dim, rotated, ((1, 600), (3, 40)), activations)

    ops.attention(case.queries, case.cache, case.step, case.table, spec)

    assert len(launches) == 3  # prompt, decode, merge
    limit = SHARED_BYTES if capability == 86 else 227 * 1024
    assert max(compile_launch(launch, capability).shared for launch in launches) <= limit


@pytest.mark.parametrize("capability", [86, 89, 90])
@pytest.mark.parametrize(("dtype", "head_dim", "rotated"), [("q8", 128, 128), ("q4", 80, 80), ("f16", 256, 64)])
def test_expanding_a_cache_compiles(
    launches: list[Launch], dtype: CacheDtype, head_dim: int, rotated: int, capability: int
):
    case, _ = case_of(dtype, head_dim, rotated, ((30, 600), (3, 40)), torch.bfloat16)

    expanded.expand(case.cache, 0, 600, case.step, case.table, torch.float16)

    assert [compile_launch(launch, capability).shared <= SHARED_BYTES for launch in launches] == [True]


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_low_rank_additions_compile(launches: list[Launch], dtype: torch.dtype):
    slots = LowRankSlots({3: make_low_rank([(0, torch.ones(8, 256), torch.ones(512, 8), 1.0)], dtype)})
    slots.table = LowRankTable.of(slots)
    rows = AdapterRows(torch.full((2,), 3, dtype=torch.int32), torch.ones(2), (3,))

    ops.add_low_rank(torch.zeros(2, 512, dtype=dtype), torch.ones(2, 256, dtype=dtype), slots, rows)

    assert [compile_launch(launch, 86).shared <= SHARED_BYTES for launch in launches] == [True, True]


def test_the_other_kernels_compile(launches: list[Launch]):
    for dtype in ("q8", "q4", "f16"):
        case, _ = case_of(dtype, 80, 40, ((1, 30),), torch.bfloat16)
        ops.store_kv(case.cache, case.keys, case.values, case.step.slots)
    assert case.table is not None
    ops.rotate(case.queries, case.step, case.table)
    ops.rms_norm(case.queries, torch.ones(80), 1e-6)
    for activation in ("silu", "gelu", "gelu_tanh"):
        ops.gated(case.queries.flatten(1), activation)

    assert len(launches) == 8
    assert all(compile_launch(launch, 86).shared <= SHARED_BYTES for launch in launches)
