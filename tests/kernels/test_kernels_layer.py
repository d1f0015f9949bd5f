"""A decoder layer, or all its experts, in one call against their operations one by one in the reference, for every
instruction set that this machine runs."""

import math
from collections.abc import Callable
from copy import deepcopy

import pytest
import rounded
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from rounded import Rounded
from step_builder import rope_tables, step_of
from torch import Tensor

from tightrope.backends.rope.scaling import RopeSpec
from tightrope.kernels.cpu import native
from tightrope.kernels.forms.layer import DecoderLayer, GatedExperts, LayerStack, LayerStep, Norm, Projection
from tightrope.kernels.forms.layout import AttentionSpec, CacheFormat, LayerCache, RopeTable, StepLayout
from tightrope.kernels.forms.low_rank import NONE, AdapterRows, LowRank, make_low_rank
from tightrope.kernels.forms.quantized import Nf4Matrix, QuantizedMatrix, arrange, pack, pack_nf4, tiled

pytestmark = pytest.mark.quick

HIDDEN, HEADS, KV_HEADS, DIMS, MIDDLE, PAGES = 64, 4, 2, 32, 96, 8
ROPE = {"default": RopeSpec("yarn", 2.0, 10000.0, DIMS // 2, DIMS, 64, 128, attention_factor=1.1)}


@pytest.fixture(scope="module", params=native.usable() or ["none"])
def kernels(request: pytest.FixtureRequest) -> native.NativeKernels:
    built = native.NativeKernels(request.param)
    built.set_threads(2)
    return built


def plain(dtype: torch.dtype) -> Callable[[int, int], Tensor]:
    return lambda outputs, inputs: (torch.randn(outputs, inputs) / math.sqrt(inputs)).to(dtype)


def quantized(outputs: int, inputs: int) -> tuple[QuantizedMatrix, ...]:
    """Four bits in groups of 32, as two matrices side by side."""
    groups = inputs // 32
    rows = arrange(torch.arange(inputs), [32] * groups, [4] * groups)

    def matrix(width: int) -> QuantizedMatrix:
        codes = torch.randint(16, (inputs, width), dtype=torch.uint8)
        scales = (torch.rand(groups, width) + 0.5) / (5 * math.sqrt(inputs))
        packed = pack(codes, rows)
        return QuantizedMatrix(inputs, width, None, rows.group_starts, rows.group_bits, packed, scales=tiled(scales))

    return matrix(outputs // 2), matrix(outputs - outputs // 2)


def nf4(outputs: int, inputs: int) -> tuple[Nf4Matrix, ...]:
    codes = torch.randint(16, (outputs, inputs), dtype=torch.uint8)
    return (pack_nf4(codes, torch.rand(outputs, inputs // 32) / math.sqrt(inputs), torch.rand(16) * 4 - 2, 32),)


FORMS = (plain(torch.float32), plain(torch.bfloat16), plain(torch.float16), quantized, nf4)


def adapter(outputs: int, inputs: int) -> LowRank:
    """An addition to the upper part of the outputs."""
    rank, first = 5, outputs // 3
    a, b = torch.randn(rank, inputs) / math.sqrt(inputs), torch.randn(outputs - first, rank) / math.sqrt(rank)
    return make_low_rank([(first, a, b, 0.5)], torch.float16)


@st.composite
def projections(draw: st.DrawFn, outputs: int, inputs: int, *, has_bias: bool = True) -> Projection:
    weight = draw(st.sampled_from(FORMS))(outputs, inputs)
    bias = torch.randn(outputs) if has_bias and draw(st.booleans()) else None
    return Projection(weight, bias, {slot: adapter(outputs, inputs) for slot in draw(st.sets(st.integers(0, 2)))})


@st.composite
def adapter_rows(draw: st.DrawFn, count: int) -> AdapterRows | None:
    """Slots that hold an adapter everywhere, here and there, and nowhere; None when no row uses any."""
    slots = draw(st.lists(st.integers(NONE, 3), min_size=count, max_size=count))
    if set(slots) == {NONE}:
        return None
    present = tuple(sorted(set(slots) - {NONE}))
    return AdapterRows(torch.tensor(slots, dtype=torch.int32), torch.rand(count) + 0.5, present)


@st.composite
def layers(draw: st.DrawFn) -> DecoderLayer:
    torch.manual_seed(draw(st.integers(0, 2**32 - 1)))

    def projection(outputs: int, inputs: int) -> Projection:
        return draw(projections(outputs, inputs))

    def norm(width: int) -> Norm | None:
        return Norm(torch.rand(width) + 0.5, 1e-5) if draw(st.booleans()) else None

    return DecoderLayer(
        projection((HEADS + 2 * KV_HEADS) * DIMS, HIDDEN),
        projection(HIDDEN, HEADS * DIMS),
        projection(2 * MIDDLE, HIDDEN),
        projection(HIDDEN, MIDDLE),
        (norm(HIDDEN), norm(HIDDEN), norm(HIDDEN), norm(HIDDEN)),
        (norm(DIMS), norm(DIMS)),
        HEADS,
        draw(st.sampled_from(("silu", "gelu", "gelu_tanh"))),
        AttentionSpec(DIMS**-0.5, draw(st.sampled_from((None, 20))), draw(st.sampled_from((None, 30.0)))),
    )


def one_by_one(
    x: Tensor,
    layer: DecoderLayer,
    cache: LayerCache,
    step: StepLayout,
    table: RopeTable | None,
    rows: AdapterRows | None,
) -> Rounded:
    """The layer in float64, over the cache that it has written: whichever way a key was rounded to float16 is right."""
    before_attention, after_attention, before_mlp, after_mlp = layer.norms
    given_x = Rounded.exact(x)
    qkv = rounded.project(layer.qkv, rounded.norm(given_x, before_attention), rows)
    heads = Rounded(*(t.view(len(x), HEADS + 2 * KV_HEADS, DIMS) for t in (qkv.value, qkv.off)))
    q, k = rounded.norm(heads[:, :HEADS], layer.head_norms[0]), heads[:, HEADS : HEADS + KV_HEADS]
    rounded.check_stored(cache.key_codes, step.slots, rounded.norm(k, layer.head_norms[1]))
    rounded.check_stored(cache.value_codes, step.slots, heads[:, HEADS + KV_HEADS :])
    if table is not None:
        q = rounded.rotate(q, step, table)
    attended = rounded.attend(q, cache, step, table, layer.attention)
    flat = Rounded(attended.value.flatten(1), attended.off.flatten(1))
    middle = given_x + rounded.norm(rounded.project(layer.out, flat, rows), after_attention)
    gates = rounded.gated(rounded.project(layer.gate_up, rounded.norm(middle, before_mlp), rows), layer.activation)
    return middle + rounded.norm(rounded.project(layer.down, gates, rows), after_mlp)


def noise() -> LayerCache:
    cache = LayerCache.allocate(CacheFormat("f16", KV_HEADS, DIMS), 3 * PAGES)
    cache.key_codes.normal_()
    cache.value_codes.normal_()
    return cache


@given(
    layer=layers(),
    chunks=st.lists(st.tuples(st.integers(0, 100), st.sampled_from((1, 1, 5, 18))), min_size=1, max_size=3),
    is_rotated=st.booleans(),
    data=st.data(),
)
@settings(max_examples=20)
def test_a_layer_at_once_equals_its_operations_one_by_one(
    kernels: native.NativeKernels,
    layer: DecoderLayer,
    chunks: list[tuple[int, int]],
    is_rotated: bool,
    data: st.DataObject,
):
    step = step_of(chunks, PAGES)
    rows = data.draw(adapter_rows(len(step.slots)))
    table = rope_tables(ROPE, [before + now for before, now in chunks], PAGES)["default"] if is_rotated else None
    x, cache = torch.randn(len(step.slots), HIDDEN), noise()
    given_x = x.clone()

    ours = kernels.decoder_layers(x, LayerStack((layer,), (cache,), (0,)), [LayerStep(step, table)], rows)

    assert ours is not None
    one_by_one(x, layer, cache, step, table, rows).check(ours)
    assert torch.equal(x, given_x)


@given(
    parts=st.lists(layers(), min_size=2, max_size=3),
    chunks=st.lists(st.tuples(st.integers(0, 40), st.sampled_from((1, 1, 5))), min_size=1, max_size=3),
    are_rotated=st.lists(st.booleans(), min_size=3, max_size=3),
    data=st.data(),
)
@settings(max_examples=10)
def test_layers_in_one_call_give_the_bits_of_one_after_the_other(
    kernels: native.NativeKernels,
    parts: list[DecoderLayer],
    chunks: list[tuple[int, int]],
    are_rotated: list[bool],
    data: st.DataObject,
):
    step = step_of(chunks, PAGES)
    rows = data.draw(adapter_rows(len(step.slots)))
    table = rope_tables(ROPE, [before + now for before, now in chunks], PAGES)["default"]
    x, cache = torch.randn(len(step.slots), HIDDEN), noise()
    steps = [LayerStep(step, table), LayerStep(step, None)]
    kinds = [0 if is_rotated else 1 for is_rotated in are_rotated[: len(parts)]]
    caches, twins = ([deepcopy(cache) for _ in parts] for _ in range(2))

    together = kernels.decoder_layers(x, LayerStack(tuple(parts), tuple(caches), tuple(kinds)), steps, rows)

    y: Tensor | None = x
    for layer, twin, kind in zip(parts, twins, kinds, strict=True):
        assert y is not None
        y = kernels.decoder_layers(y, LayerStack((layer,), (twin,), (0,)), [steps[kind]], rows)
    assert together is not None
    assert y is not None
    assert torch.equal(together, y)
    assert all(torch.equal(one.key_codes, two.key_codes) for one, two in zip(caches, twins, strict=True))


def test_a_long_prompt_is_left_to_the_operations_one_by_one(kernels: native.NativeKernels):
    tokens = native.MOST_LAYER_TOKENS + 1
    step, cache = step_of([(0, tokens)], PAGES), noise()
    projection = Projection(torch.zeros(HIDDEN, HIDDEN), None)
    layer = DecoderLayer(
        projection, projection, projection, projection, (None,) * 4, (None,) * 2, HEADS, "silu", AttentionSpec(1.0)
    )
    before = cache.key_codes.clone()

    stack, x = LayerStack((layer,), (cache,), (0,)), torch.randn(tokens, HIDDEN)

    assert kernels.decoder_layers(x, stack, [LayerStep(step, None)], None) is None
    assert torch.equal(cache.key_codes, before)


EXPERTS = 5


@st.composite
def mixtures(draw: st.DrawFn) -> GatedExperts:
    torch.manual_seed(draw(st.integers(0, 2**32 - 1)))
    return GatedExperts(
        tuple(draw(projections(2 * MIDDLE, HIDDEN, has_bias=False)) for _ in range(EXPERTS)),
        tuple(draw(projections(HIDDEN, MIDDLE, has_bias=False)) for _ in range(EXPERTS)),
        draw(st.sampled_from(("silu", "gelu", "gelu_tanh"))),
    )


def one_expert_at_a_time(
    x: Tensor, layer: GatedExperts, picked: Tensor, shares: Tensor, rows: AdapterRows | None, *, in_words: bool
) -> Rounded:
    out = Rounded.exact(torch.zeros_like(x))
    for expert in range(EXPERTS):
        tokens, places = (picked == expert).nonzero(as_tuple=True)
        mine, given_x = None if rows is None else rows.at(tokens), Rounded.exact(x[tokens])
        gate_up = rounded.project(layer.gate_up[expert], given_x, mine, in_words=in_words)
        gates = rounded.gated(gate_up, layer.activation)
        made, share = rounded.project(layer.down[expert], gates, mine, in_words=in_words), shares[tokens, places]
        added = Rounded(made.value * share.unsqueeze(1), made.off * share.unsqueeze(1))
        summed = out[tokens] + added.again(added.value.abs(), 1)
        out.value[tokens], out.off[tokens] = summed.value, summed.off
    return out


@given(layer=mixtures(), count=st.sampled_from((1, 1, 2, 9, 70)), each=st.integers(1, EXPERTS), data=st.data())
@settings(max_examples=10)
def test_experts_at_once_equal_each_token_by_itself(
    kernels: native.NativeKernels, layer: GatedExperts, count: int, each: int, data: st.DataObject
):
    rows = data.draw(adapter_rows(count))
    x, shares = torch.randn(count, HIDDEN), torch.rand(count, each)
    picked = torch.rand(count, EXPERTS).topk(each).indices

    ours = kernels.experts(x, layer, picked, shares, rows)

    in_words = kernels.instruction_set == "avx512vnni"
    one_expert_at_a_time(x, layer, picked, shares, rows, in_words=in_words).check(ours)
