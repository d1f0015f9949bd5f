"""A row's numbers are the same bits whatever runs beside it, for every instruction set that this machine runs."""

import math
from collections.abc import Callable, Iterator, Sequence
from itertools import accumulate, pairwise

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from test_kernels_layer import FORMS, adapter
from torch import Tensor

from tightrope.kernels import reference
from tightrope.kernels.cpu import native
from tightrope.kernels.forms.layer import GatedExperts, Projection
from tightrope.kernels.forms.layout import (
    PAGE,
    AttentionSpec,
    CacheFormat,
    LayerCache,
    RopeTable,
    StepLayout,
)
from tightrope.kernels.forms.low_rank import AdapterRows
from tightrope.kernels.forms.quantized import Nf4Matrix

pytestmark = pytest.mark.quick

SOME = settings(max_examples=8)
SEEDS = st.integers(0, 2**32 - 1)
BATCHES = (2, 3, 4, 5, 7, 8, 9, 13, 16, 24, 25, 33, 64, 65, 100, 150)


@pytest.fixture(scope="module", params=native.usable() or ["none"])
def kernels(request: pytest.FixtureRequest) -> Iterator[native.NativeKernels]:
    built = native.NativeKernels(request.param)
    built.set_batch_invariant(True)
    yield built
    built.set_batch_invariant(False)


def assert_alike_in_batches(kernels: native.NativeKernels, x: Tensor, run: Callable[[int, int], Tensor]) -> None:
    """Fail unless `run` gives the rows begin .. end of x the same bits alone and in batches, for 1 to 4 threads."""
    kernels.set_threads(1)
    alone = torch.cat([run(row, row + 1) for row in range(len(x))])
    for count, size in enumerate(BATCHES):
        kernels.set_threads(1 + count % 4)
        together = torch.cat([run(row, min(row + size, len(x))) for row in range(0, len(x), size)])
        assert torch.equal(together, alone), f"{size} rows"


@given(
    seed=SEEDS,
    form=st.sampled_from(FORMS),
    inputs=st.sampled_from((32, 96, 576, 800, 1568)),
    outputs=st.integers(2, 70),
    has_bias=st.booleans(),
)
@settings(SOME, max_examples=20)
def test_a_row_of_a_product_is_the_same_bits_in_every_batch(
    kernels: native.NativeKernels,
    seed: int,
    form: Callable[[int, int], object],
    inputs: int,
    outputs: int,
    has_bias: bool,
):
    torch.manual_seed(seed)
    weight, bias, x = form(outputs, inputs), torch.randn(outputs) if has_bias else None, torch.randn(150, inputs)

    def run(begin: int, end: int) -> Tensor:
        rows = x[begin:end]
        if isinstance(weight, Tensor):
            return kernels.linear(rows, weight, bias)
        assert isinstance(weight, tuple)
        times = kernels.nf4_linear if isinstance(weight[0], Nf4Matrix) else kernels.quantized_linear
        return times(rows, weight, bias)

    assert_alike_in_batches(kernels, x, run)


@given(seed=SEEDS, width=st.sampled_from((33, 576, 1000)))
@SOME
def test_norms_gates_and_adapters_give_a_row_the_same_bits_in_every_batch(
    kernels: native.NativeKernels, seed: int, width: int
):
    torch.manual_seed(seed)
    x, weight, before = torch.randn(150, width), torch.rand(width), torch.randn(150, 48)
    adapters = {slot: adapter(48, width) for slot in range(2)}
    slots, scales = torch.randint(-1, 3, (150,), dtype=torch.int32), torch.rand(150)

    def run(begin: int, end: int) -> Tensor:
        rows = x[begin:end]
        out = before[begin:end].clone()
        uses = AdapterRows(slots[begin:end].clone(), scales[begin:end].clone(), (0, 1, 2))
        kernels.add_low_rank(out, rows, adapters, uses)
        gates = [kernels.gated(torch.cat((rows, rows.roll(1, -1)), -1), name) for name in ("silu", "gelu", "gelu_tanh")]
        return torch.cat((kernels.rms_norm(rows, weight, 1e-5), out, *gates), -1)

    assert_alike_in_batches(kernels, x, run)


@given(seed=SEEDS, form=st.sampled_from(FORMS))
@SOME
def test_a_token_of_a_mixture_of_experts_is_the_same_bits_in_every_batch(
    kernels: native.NativeKernels, seed: int, form: Callable[[int, int], object]
):
    torch.manual_seed(seed)
    hidden, middle, num_experts = 64, 96, 5

    def projections(outputs: int, inputs: int) -> tuple[Projection, ...]:
        return tuple(Projection(form(outputs, inputs), None) for _ in range(num_experts))  # type: ignore[arg-type]

    layer = GatedExperts(projections(2 * middle, hidden), projections(hidden, middle), "silu")
    x, shares = torch.randn(150, hidden), torch.rand(150, 2)
    picked = torch.stack([torch.randperm(num_experts)[:2] for _ in range(150)])

    def run(begin: int, end: int) -> Tensor:
        return kernels.experts(x[begin:end], layer, picked[begin:end], shares[begin:end], None)

    assert_alike_in_batches(kernels, x, run)


class Chat:
    """One sequence of random numbers over a cache, which other sequences use as well; each run stores it anew."""

    def __init__(self, format: CacheFormat, group: int, half: int, length: int) -> None:
        self.length, self.format, self.group = length, format, group
        self.num_pages = -(-length // PAGE)
        self.keys, self.values = torch.randn(2, length, format.num_kv_heads, format.head_dim)
        self.queries = torch.randn(length, format.num_kv_heads * group, format.head_dim) * 2
        self.cache = LayerCache.allocate(format, 2 * self.num_pages)
        if format.dtype != "f16":
            self.cache.key_factor.uniform_(0.2, 3)
        self.tables = torch.randperm(2 * self.num_pages, dtype=torch.int32).view(2, -1)
        self.angles = [torch.rand(1, count, 1, half) * 6 for count in (self.num_pages, PAGE)] if half else None

    def run(
        self, kernels: native.NativeKernels, spec: AttentionSpec, borders: Sequence[int], *, has_company: bool
    ) -> Tensor:
        """Attention [length, H, D] of chunks from border to border, perhaps in steps with others before and behind."""
        self._fill_with_others()
        return torch.cat([self._step(kernels, spec, *chunk, has_company=has_company) for chunk in pairwise(borders)])

    def _fill_with_others(self) -> None:
        slots = torch.arange(len(self.cache.key_codes) * PAGE)
        noise = torch.randn(2, len(slots), self.format.num_kv_heads, self.format.head_dim) * 100
        reference.store_kv(self.cache, *noise, slots)

    def _step(
        self, kernels: native.NativeKernels, spec: AttentionSpec, begin: int, end: int, *, has_company: bool
    ) -> Tensor:
        chunks = [(1, 5, 6), (0, begin, end), (1, 17, 20)] if has_company else [(0, begin, end)]
        step = self._layout(chunks)
        mine = slice(1, 1 + end - begin) if has_company else slice(end - begin)
        reference.store_kv(self.cache, self.keys[begin:end], self.values[begin:end], step.slots[mine])
        queries = torch.randn(len(step.slots), *self.queries.shape[1:])
        queries[mine] = self.queries[begin:end]
        return kernels.attention(queries, self.cache, step, self._table(len(chunks)), spec)[mine]

    def _layout(self, chunks: Sequence[tuple[int, int, int]]) -> StepLayout:
        positions = torch.cat([torch.arange(begin, end) for _, begin, end in chunks])
        owner = torch.cat([torch.full((end - begin,), b) for b, (_, begin, end) in enumerate(chunks)])
        tables = self.tables[[table for table, _, _ in chunks]].contiguous()
        return StepLayout(
            torch.tensor([0, *accumulate(end - begin for _, begin, end in chunks)], dtype=torch.int32),
            torch.tensor([end for _, _, end in chunks], dtype=torch.int32),
            tables,
            tables[owner, positions // PAGE].long() * PAGE + positions % PAGE,
            positions.int(),
            owner.int(),
            max(end - begin for _, begin, end in chunks),
            max(end for _, _, end in chunks),
        )

    def _table(self, num_seqs: int) -> RopeTable | None:
        if self.angles is None:
            return None
        pages, places = (torch.cat((angle.cos(), angle.sin()), 2) for angle in self.angles)
        return RopeTable(pages, places, torch.zeros(num_seqs, dtype=torch.int32), torch.ones(1))


@st.composite
def chats(draw: st.DrawFn) -> Chat:
    torch.manual_seed(draw(SEEDS))
    head_dim, half = draw(st.sampled_from(((8, 4), (33, 8), (64, 32), (64, 0), (80, 20), (128, 64), (256, 128))))
    format = CacheFormat(draw(st.sampled_from(("q8", "q4", "f16"))), draw(st.integers(1, 2)), head_dim)
    return Chat(format, draw(st.sampled_from((1, 2, 3, 8, 13))), half, draw(st.integers(21, 300)))


@given(
    chat=chats(),
    window=st.one_of(st.none(), st.integers(1, 200)),
    softcap=st.one_of(st.none(), st.floats(1, 50)),
    cuts=st.lists(st.floats(0, 1), max_size=12),
)
@settings(SOME, max_examples=20)
def test_a_token_is_attended_by_the_same_bits_wherever_chunks_end_and_whoever_runs_beside(
    kernels: native.NativeKernels, chat: Chat, window: int | None, softcap: float | None, cuts: list[float]
):
    spec = AttentionSpec(1 / math.sqrt(chat.format.head_dim), window, softcap)
    kernels.set_threads(1)
    whole = chat.run(kernels, spec, (0, chat.length), has_company=False)

    borders = sorted({0, chat.length, *(round(cut * chat.length) for cut in cuts)})
    for threads, chunks, has_company in (
        (2, range(chat.length + 1), False),
        (1, borders, True),
        (4, (0, chat.length), True),
    ):
        kernels.set_threads(threads)
        assert torch.equal(chat.run(kernels, spec, chunks, has_company=has_company), whole), chunks


@pytest.mark.parametrize("dtype", ["q8", "q4", "f16"])
def test_a_context_of_several_parts_is_attended_by_the_same_bits(kernels: native.NativeKernels, dtype: str):
    torch.manual_seed(5)
    chat, spec = Chat(CacheFormat(dtype, 2, 64), 3, 32, 2200), AttentionSpec(0.125)  # type: ignore[arg-type]
    kernels.set_threads(2)
    whole = chat.run(kernels, spec, (0, chat.length), has_company=False)
    one_by_one = (0, 1000, *range(1010, 1040), 2040, *range(2045, 2060), 2150, *range(2160, 2201))
    assert torch.equal(chat.run(kernels, spec, one_by_one, has_company=True), whole)
