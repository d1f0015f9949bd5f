"""The C++ kernels against the torch reference, for every instruction set that this machine runs, and the reference
against plain float64."""

import math
from dataclasses import dataclass
from itertools import accumulate

import numpy as np
import pytest
import rounded
import torch
from attention_cases import check_negative_slots_store_nothing
from error_bounds import UNIT, attend_exactly, check_stored_alike, rotate_exactly, roundings, within
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray
from rounded import Rounded
from torch import Tensor

from tightrope.kernels import reference
from tightrope.kernels.cpu import native
from tightrope.kernels.forms.layer import Projection
from tightrope.kernels.forms.layout import (
    PAGE,
    AttentionSpec,
    CacheDtype,
    CacheFormat,
    LayerCache,
    RopeTable,
    StepLayout,
)
from tightrope.kernels.forms.rows import CUT, DIVIDE, MAX_TRANSFORMS, PARABOLA, SUMS

pytestmark = pytest.mark.quick

SOME = settings(max_examples=12)
DTYPES = st.sampled_from(("q8", "q4", "f16"))
SEEDS = st.integers(0, 2**32 - 1)


@pytest.fixture(scope="module", params=native.usable() or ["none"])
def kernels(request: pytest.FixtureRequest) -> native.NativeKernels:
    built = native.NativeKernels(request.param)
    built.set_threads(2)
    return built


def logit_rows(seed: int, num: int, vocab_size: int) -> Tensor:
    """Of every kind: noise, few levels and so many equals, tokens that are banned, and a row of NaN."""
    generator = torch.Generator().manual_seed(seed)
    rows = torch.randn(num, vocab_size, generator=generator) * 4
    rows[1::4] = rows[1::4].round()
    rows[2::4] = torch.where(torch.rand(rows[2::4].shape, generator=generator) < 0.7, -torch.inf, rows[2::4])
    rows[3::4, 0] = torch.nan
    return rows


@SOME
@given(SEEDS, st.sampled_from((1, 5, 64, 1000, 9000)), st.lists(st.integers(1, 9000), min_size=1, max_size=5))
def test_the_largest_logits_are_listed_in_order_and_equals_by_id(
    kernels: native.NativeKernels, seed: int, vocab_size: int, wanted: list[int]
):
    logits = logit_rows(seed, 2 * len(wanted), vocab_size)
    rows = np.arange(len(wanted)) * 2 % 7 % len(logits)
    found = kernels.rank(logits, rows, np.array(wanted))
    plain = reference.rank(logits, rows, np.array(wanted))
    np.testing.assert_array_equal(found.top, plain.top)
    for line, (row, num) in enumerate(zip(rows, wanted, strict=True)):
        values = logits[row].numpy()
        if np.isnan(values).any():
            continue
        order = np.lexsort((np.arange(vocab_size), -values))
        expected = [int(i) for i in order if values[i] > -np.inf]
        listed = found.token_ids[line][found.logits[line] > -np.inf].tolist()
        assert listed == expected[:num]
        np.testing.assert_array_equal(found.logits[line][: len(listed)], values[listed])
        assert len(listed) == len(expected) or found.border[line, 0] == values[listed[-1]]
        shorter = plain.token_ids[line][plain.logits[line] > -np.inf].tolist()  # here equals at the border are left out
        assert shorter == [i for i in expected if values[i] > plain.border[line, 0]]


TRANSFORMS = st.lists(
    st.one_of(
        st.tuples(st.just(DIVIDE), st.floats(0.2, 3), st.just(0.0), st.just(0.0)),
        st.tuples(st.just(PARABOLA), st.floats(0.05, 2), st.floats(1, 3), st.just(0.0)),
        st.tuples(st.just(CUT), st.floats(-9, 0), st.just(0.0), st.just(0.0)),
    ),
    max_size=2,  # two parabolas make logits of 1e12; more would leave float32
)


def transformed_sums(row: NDArray[np.float64], transforms: list[tuple[float, ...]]) -> tuple[list[float], list[float]]:
    """The sums of one row in float64, and how far float32 may be from them; NaN where nothing can be drawn."""
    if not np.isfinite(row.max()):
        return [math.nan] * len(SUMS), [0.0] * len(SUMS)
    y = row - row.max()
    y = y[y > -np.inf]
    off = UNIT * np.abs(y)  # what each y may be off by
    for kind, a, b, c in transforms:
        if kind == DIVIDE:
            y, off = y / a, (off + 3 * UNIT * np.abs(y)) / a
        elif kind == PARABOLA:
            cubic, square = (b - 1) / 2 * y**3, (3 - b) / 2 * y**2
            # b - 1 and 3 - b may lose all digits but those of b
            sizes = (b + 1) / 2 * np.abs(y) ** 3 + (b + 3) / 2 * y**2
            off = a * (off * np.abs(3 * (b - 1) / 2 * y**2 - (3 - b) * y) + 8 * UNIT * sizes)
            y = a * (cubic - square) - c
        else:
            assume((np.abs(y - a) > off).all())  # rounding decides about other tokens
            y, off = y[y >= a], off[y >= a]
    weights = np.exp(y)
    # exp is off by 2e-7 and by its argument's error, ends at 1e-38, and up to 64 weights are summed in float32
    highest = np.exp(np.minimum(y + off + 4 * UNIT * np.abs(y), 0))
    off_weights = highest - weights + weights * (2e-7 + roundings(66)) + 1e-37
    return (
        [len(y), weights.sum(), (y * weights).sum(), y.sum(), (y**2).sum()],
        [
            0.0,
            off_weights.sum(),
            (np.abs(y) * off_weights + off * weights).sum(),
            (off + 1e-12 * np.abs(y)).sum(),
            (2 * np.abs(y) * off + off**2 + 2 * UNIT * y**2).sum(),
        ],
    )


@SOME
@given(SEEDS, st.sampled_from((1, 5, 64, 1000, 3000)), st.lists(TRANSFORMS, min_size=1, max_size=5))
def test_sums_of_bent_rows_are_those_of_plain_float64(
    kernels: native.NativeKernels, seed: int, vocab_size: int, transforms: list[list[tuple[float, ...]]]
):
    logits = logit_rows(seed, len(transforms), vocab_size)
    rows = np.arange(len(transforms))
    table = np.zeros((len(transforms), MAX_TRANSFORMS, 4))
    for line, members in enumerate(transforms):
        for place, transform in enumerate(members):
            table[line, place] = transform
    sums = [transformed_sums(logits[row].double().numpy(), transforms[row]) for row in rows]
    exact, bound = np.array(sums).transpose(1, 0, 2)
    for found in (kernels.row_sums(logits, rows, table), reference.row_sums(logits, rows, table)):
        assert_within(found, exact, bound)
    assert_within(kernels.row_mass(logits, rows, table)[:, 0], exact[:, 1], bound[:, 1])


def assert_within(found: NDArray[np.float64], exact: NDArray[np.float64], bound: NDArray[np.float64]) -> None:
    """NaN where the exact one is."""
    np.testing.assert_array_equal(np.isnan(found), np.isnan(exact))
    within(torch.from_numpy(found).nan_to_num(), torch.from_numpy(exact).nan_to_num(), torch.from_numpy(bound))


@dataclass
class Case:
    """A layer's cache, filled with noise in pages in any order, and a step over it."""

    cache: LayerCache
    step: StepLayout
    table: RopeTable | None
    num_heads: int

    def noise(self, num_heads: int) -> Tensor:
        return torch.randn(len(self.step.slots), num_heads, self.cache.format.head_dim)


@st.composite
def cases(draw: st.DrawFn) -> Case:
    torch.manual_seed(draw(SEEDS))
    head_dim = draw(st.sampled_from((8, 33, 64, 80, 128, 256)))
    num_kv_heads = draw(st.integers(1, 3))
    half = draw(st.sampled_from((0, head_dim // 4, head_dim // 2)))
    rows = draw(st.lists(st.one_of(st.just(1), st.integers(0, 150)), min_size=1, max_size=4))
    lengths = [n + draw(st.integers(0, 300)) * min(n, 1) for n in rows]
    step = step_of(rows, lengths)
    table = rope_table(half, step, num_sets=2) if half else None
    cache = LayerCache.allocate(CacheFormat(draw(DTYPES), num_kv_heads, head_dim), int(step.block_tables.max()) + 1)
    if cache.format.dtype != "f16":
        cache.key_factor.uniform_(0.1, 3)
    every_slot = torch.arange(len(cache.key_codes) * PAGE)
    keys, values = torch.randn(2, len(every_slot), num_kv_heads, head_dim)
    reference.store_kv(cache, keys, values, every_slot)
    return Case(cache, step, table, num_kv_heads * draw(st.sampled_from((1, 2, 3, 8, 13))))


def step_of(rows: list[int], lengths: list[int]) -> StepLayout:
    counts = [-(-length // PAGE) for length in lengths]
    pages = torch.randperm(sum(counts) + 1).int()
    tables = torch.zeros(len(rows), max(*counts, 1), dtype=torch.int32)
    for b, (count, end) in enumerate(zip(counts, accumulate(counts), strict=True)):
        tables[b, :count] = pages[end - count : end]
    sequence_of = torch.tensor([b for b, n in enumerate(rows) for _ in range(n)], dtype=torch.int32)
    positions = torch.tensor(
        [p for n, end in zip(rows, lengths, strict=True) for p in range(end - n, end)], dtype=torch.int32
    )
    slots = tables[sequence_of.long(), (positions // PAGE).long()].long() * PAGE + positions % PAGE
    starts = torch.tensor([0, *accumulate(rows)], dtype=torch.int32)
    context_lens = torch.tensor(lengths, dtype=torch.int32)
    return StepLayout(starts, context_lens, tables, slots, positions, sequence_of, max(rows), max(lengths))


def rope_table(half: int, step: StepLayout, num_sets: int) -> RopeTable:
    inv_freq = torch.rand(num_sets, 1, half)

    def turned(positions: Tensor) -> Tensor:
        angle = positions.unsqueeze(1) * inv_freq
        return torch.stack((angle.cos(), angle.sin()), 2)  # [S, positions, 2, half]

    num_sequences, num_pages = step.block_tables.shape
    set_of = torch.randint(num_sets, (num_sequences,), dtype=torch.int32)
    pages, places = turned(torch.arange(num_pages) * PAGE), turned(torch.arange(PAGE))
    return RopeTable(pages, places, set_of, torch.rand(num_sets) + 0.5)


specs = st.builds(
    AttentionSpec,
    scale=st.floats(0.05, 0.3),
    window=st.one_of(st.none(), st.integers(1, 200)),
    softcap=st.one_of(st.none(), st.floats(1, 50)),
)


@given(case=cases(), spec=specs)
@settings(SOME, max_examples=6)
def test_attention_equals_float64(kernels: native.NativeKernels, case: Case, spec: AttentionSpec):
    queries = case.noise(case.num_heads)

    ours = kernels.attention(queries, case.cache, case.step, case.table, spec)

    in_words = case.cache.format.dtype != "f16"
    exact = attend_exactly(queries, case.cache, case.step, case.table, spec, in_words=in_words)
    within(ours, exact.output, exact.bound)


@pytest.mark.parametrize("dtype", ["q8", "q4"])
def test_a_prompt_over_a_cache_of_codes_is_attended_finer_than_the_codes_are(
    kernels: native.NativeKernels, dtype: CacheDtype
):
    torch.manual_seed(3)
    step, spec = step_of([150, 40], [400, 40]), AttentionSpec(0.125)
    cache = LayerCache.allocate(CacheFormat(dtype, 2, 64), int(step.block_tables.max()) + 1)
    slots = torch.arange(len(cache.key_codes) * PAGE)
    keys, values = torch.randn(2, len(slots), 2, 64)
    values[:, :, :32] *= 100  # each group of values has steps of its own
    reference.store_kv(cache, keys, values, slots)
    queries, table = torch.randn(len(step.slots), 6, 64) * 3, rope_table(32, step, num_sets=1)

    ours = kernels.attention(queries, cache, step, table, spec)

    expected = reference.attention(queries, cache, step, table, spec)
    for part in (slice(32), slice(32, 64)):
        assert (ours - expected)[..., part].norm() <= 1e-3 * expected[..., part].norm()


@pytest.mark.parametrize("dtype", ["q8", "q4"])
def test_a_cached_number_that_is_not_finite_spoils_what_sees_it_alone(kernels: native.NativeKernels, dtype: CacheDtype):
    step, spec = step_of([150, 40], [400, 40]), AttentionSpec(0.125)
    for name in ("key_scales", "value_scales"):
        cache = LayerCache.allocate(CacheFormat(dtype, 2, 64), int(step.block_tables.max()) + 1)
        slots = torch.arange(len(cache.key_codes) * PAGE)
        reference.store_kv(cache, *torch.randn(2, len(slots), 2, 64), slots)
        getattr(cache, name)[step.block_tables[0, 3], 1, 5] = torch.nan

        ours = kernels.attention(torch.randn(len(step.slots), 6, 64), cache, step, None, spec)

        assert ours[:150, 3:].isnan().all()
        assert ours[:150, :3].isfinite().all()
        assert ours[150:].isfinite().all()


@pytest.mark.parametrize("dtype", ["q8", "q4", "f16"])
def test_a_long_context_is_cut_and_merged(kernels: native.NativeKernels, dtype: CacheDtype):
    step = step_of([1], [3000])
    cache = LayerCache.allocate(CacheFormat(dtype, 2, 64), int(step.block_tables.max()) + 1)
    slots = torch.arange(len(cache.key_codes) * PAGE)
    reference.store_kv(cache, *torch.randn(2, len(slots), 2, 64), slots)
    queries, spec = torch.randn(1, 6, 64), AttentionSpec(0.125)

    ours = kernels.attention(queries, cache, step, None, spec)

    exact = attend_exactly(queries, cache, step, None, spec, in_words=dtype != "f16")
    within(ours, exact.output, exact.bound)


@pytest.mark.parametrize("dtype", ["q8", "q4", "f16"])
@pytest.mark.parametrize("head_dim", [64, 80])
@pytest.mark.parametrize("count", [0, 1, 150])
def test_copied_slots_are_those_of_the_layout_to_the_bit(
    kernels: native.NativeKernels, dtype: CacheDtype, head_dim: int, count: int
):
    caches = [LayerCache.allocate(CacheFormat(dtype, 3, head_dim), 30) for _ in range(2)]
    every_slot = torch.arange(30 * PAGE)
    keys, values = torch.randn(2, len(every_slot), 3, head_dim)
    for cache in caches:
        reference.store_kv(cache, keys, values, every_slot)
    sources, targets = torch.randperm(len(every_slot))[: 2 * count].view(2, count)

    kernels.copy_slots(caches[0], sources, targets)
    caches[1].copy_slots(sources, targets)

    assert all(torch.equal(ours, theirs) for ours, theirs in zip(*(cache.stored for cache in caches), strict=True))


@given(case=cases(), scale=st.sampled_from((1e-9, 1.0, 1e4)))
@SOME
def test_stored_codes_equal_the_reference_to_the_bit(kernels: native.NativeKernels, case: Case, scale: float):
    kv_heads = case.cache.format.num_kv_heads
    fused = case.noise(2 * kv_heads) * scale  # keys and values as slices of one projection
    keys, values = fused[:, :kv_heads], fused[:, kv_heads:]
    check_stored_alike(reference.store_kv, kernels.store_kv, case.cache, keys, values, case.step.slots)


def test_a_negative_slot_stores_nothing(kernels: native.NativeKernels):
    check_negative_slots_store_nothing(kernels.store_kv)


def test_the_reference_stores_nothing_for_a_negative_slot():
    check_negative_slots_store_nothing(reference.store_kv)


@given(case=cases().filter(lambda case: case.table is not None))
@SOME
def test_queries_are_rotated_as_by_float64(kernels: native.NativeKernels, case: Case):
    assert case.table is not None
    queries = case.noise(5)[:, 1:4]

    half = case.table.places.shape[-1]
    for found in (kernels.rotate(queries, case.step, case.table), reference.rotate(queries, case.step, case.table)):
        for b, number in enumerate(case.table.set_of.tolist()):
            rows = slice(int(case.step.query_starts[b]), int(case.step.query_starts[b + 1]))
            exact = rotate_exactly(queries[rows].double(), case.table, number, case.step.positions[rows].long())
            pairs = exact[..., :half].hypot(exact[..., half : 2 * half]).repeat(1, 1, 2)
            bound = torch.cat((pairs, torch.zeros_like(exact[..., 2 * half :])), -1)
            scale = torch.ones(exact.shape[-1], dtype=torch.float64)
            scale[: 2 * half] = case.table.query_scale[number]
            # two products and a sum for the page and for the place, and the scale: each is off by less than 2 of a pair
            within(found[rows], exact * scale, 8 * UNIT * bound * scale)


@given(
    seed=SEEDS,
    dtype=st.sampled_from((torch.float32, torch.bfloat16, torch.float16)),
    rows=st.one_of(st.integers(0, 30), st.integers(31, 200)),
    inputs=st.one_of(st.integers(1, 200), st.sampled_from((2048, 2050, 4128))),
    outputs=st.integers(1, 150),
    has_bias=st.booleans(),
)
@settings(SOME, max_examples=40)
def test_linear_equals_float64(
    kernels: native.NativeKernels,
    seed: int,
    dtype: torch.dtype,
    rows: int,
    inputs: int,
    outputs: int,
    has_bias: bool,
):
    torch.manual_seed(seed)
    x, weight = torch.randn(rows, inputs), (torch.randn(outputs, inputs) / math.sqrt(inputs)).to(dtype)
    bias = torch.randn(outputs) if has_bias else None

    ours = kernels.linear(x, weight, bias)

    product(kernels, x, weight, bias).check(ours)


def product(kernels: native.NativeKernels, x: Tensor, weight: Tensor, bias: Tensor | None) -> Rounded:
    in_words = kernels.instruction_set == "avx512vnni"
    return rounded.project(Projection(weight, bias), Rounded.exact(x), None, in_words=in_words)


def test_each_row_of_a_product_has_its_own_range(kernels: native.NativeKernels):
    x, weight = torch.randn(80, 200), torch.randn(40, 200).bfloat16()
    x[0, 5], x[1, 70], x[2] = torch.inf, torch.nan, 0
    x[3] *= 1e-12
    x[4] *= 1e12
    x[5, 0] = 1e5

    ours = kernels.linear(x, weight, None).double()

    assert not ours[:2].isfinite().any()
    assert ours[2].eq(0).all()
    product(kernels, x.nan_to_num(posinf=0), weight, None)[3:].check(ours[3:])


@given(seed=SEEDS, rows=st.integers(0, 60), width=st.integers(1, 700))
@SOME
def test_norms_and_gates_equal_float64(kernels: native.NativeKernels, seed: int, rows: int, width: int):
    torch.manual_seed(seed)
    x, weight, gate_up = torch.randn(rows, 2, width) * 3, torch.randn(width), torch.randn(rows, 2 * width) * 4

    normed = reference.rms_norm(x.double(), weight.double(), 1e-6)
    for found in (kernels.rms_norm(x, weight, 1e-6), reference.rms_norm(x, weight, 1e-6)):
        within(found, normed, normed.abs() * roundings(width + 8))
    gate, up = gate_up.double().chunk(2, -1)
    for name in ("silu", "gelu", "gelu_tanh"):
        exact = reference.gated(gate_up.double(), name)
        for found in (kernels.gated(gate_up, name), reference.gated(gate_up, name)):
            # each is the gate times what lies between 0 and 1: an exponential, off by 2e-7, and a dozen roundings
            within(found, exact, (gate * up).abs() * (2e-7 + 12 * UNIT))


@given(case=cases(), spec=specs)
@settings(SOME, max_examples=6)
def test_the_reference_attends_as_plain_float64_does(case: Case, spec: AttentionSpec):
    queries = case.noise(case.num_heads)

    ours = reference.attention(queries, case.cache, case.step, case.table, spec)

    exact = attend_exactly(queries, case.cache, case.step, case.table, spec)
    within(ours, exact.output, exact.bound)


@given(seed=SEEDS, head_dim=st.integers(1, 100), dtype=st.sampled_from(("q8", "q4")), scale=st.floats(1e-3, 1e3))
@SOME
def test_a_stored_value_is_no_further_off_than_its_step(seed: int, head_dim: int, dtype: CacheDtype, scale: float):
    torch.manual_seed(seed)
    x = torch.randn(3, head_dim) * scale

    codes, scales = reference.quantize(x, dtype)

    step = scales.abs().double().repeat_interleave(32, -1)[..., :head_dim]
    error = (reference.dequantize(codes, scales, dtype, head_dim).double() - x.double()).abs()
    # half a step by rounding, a whole one at the far side of q4, whose codes end at 7 of 8; the largest code times what
    # the scale's 11 bits are off by, and below its smallest normal number half of float16's smallest step; and the
    # roundings of float32
    most_code, share = (127, 0.5) if dtype == "q8" else (8, 1.0)
    assert (error <= step * (share + most_code * (2.0**-11 + 4 * UNIT)) + most_code * 2.0**-25).all()
