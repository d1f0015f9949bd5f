"""The CUDA kernels in Triton's interpreter, on a CPU, held to the torch reference."""

from collections.abc import Iterator
from dataclasses import replace
from types import ModuleType

import pytest
import rounded
import torch
from attention_cases import Case, check_negative_slots_store_nothing, make_case
from error_bounds import attend_exactly, check_stored_alike, within
from hypothesis import given, settings
from hypothesis import strategies as st
from interpreted import interpreted
from rounded import Rounded

from tightrope.kernels import reference
from tightrope.kernels.forms.layout import AttentionSpec, CacheDtype, LayerCache

# numpy, which interprets, warns where a card yields the infinity that is meant
pytestmark = pytest.mark.filterwarnings("ignore:overflow encountered in exp:RuntimeWarning")


@pytest.fixture(scope="module")
def ops() -> Iterator[ModuleType]:
    with interpreted("ops") as module:
        yield module


def check_attended(ops: ModuleType, case: Case) -> None:
    found = ops.attention(case.queries, case.cache, case.step, case.table, case.spec)
    assert found.dtype == case.queries.dtype
    exact = attend_exactly(case.queries, case.cache, case.step, case.table, case.spec)
    within(found, exact.output, exact.bound)


@pytest.mark.parametrize("dtype", ["q8", "q4", "f16"])
@pytest.mark.parametrize(("head_dim", "group"), [(64, 3), (80, 1), (128, 8), (256, 2)])
def test_decode_reads_the_cache_as_the_reference_does(ops: ModuleType, head_dim: int, group: int, dtype: CacheDtype):
    case = make_case([(1, 150), (1, 17), (1, 1)], head_dim, 2, group, dtype)

    check_attended(ops, case)


@pytest.mark.parametrize("dtype", ["q8", "q4", "f16"])
@pytest.mark.parametrize(("head_dim", "group"), [(64, 1), (80, 7), (128, 4), (256, 1)])
def test_a_prompts_chunk_sees_its_history_and_itself_as_in_the_reference(
    ops: ModuleType, head_dim: int, group: int, dtype: CacheDtype
):
    case = make_case([(20, 70), (5, 5)], head_dim, 2, group, dtype)

    check_attended(ops, case)


@pytest.mark.parametrize("new", [1, 9])
@pytest.mark.parametrize("rotated", [0, 16, 32, 48, 128])
def test_heads_that_are_rotated_in_part_or_not_at_all_attend_as_in_the_reference(
    ops: ModuleType, rotated: int, new: int
):
    case = make_case([(new, 83), (new, 40)], 128, 1, 2, "q8", rotated)

    check_attended(ops, case)


def test_a_step_may_mix_prompts_and_decoding_sequences(ops: ModuleType):
    case = make_case([(1, 140), (30, 90), (1, 1), (2, 64), (1, 33)], group=2, num_sets=3)

    check_attended(ops, case)


@pytest.mark.parametrize("lengths", [[(1, 200), (1, 5)], [(40, 130), (1, 90)]])
@pytest.mark.parametrize("window", [1, 16, 50])
def test_a_window_hides_what_lies_before_it(ops: ModuleType, window: int, lengths: list[tuple[int, int]]):
    case = make_case(lengths, spec=AttentionSpec(scale=0.2, window=window))

    check_attended(ops, case)


@pytest.mark.parametrize("new", [1, 6])
def test_a_softcap_bends_the_scores(ops: ModuleType, new: int):
    case = make_case([(new, 80)], spec=AttentionSpec(scale=1.0, softcap=3.0))

    check_attended(ops, case)


@pytest.mark.parametrize("activations", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("new", [1, 12])
def test_half_precision_queries_attend_within_their_rounding(ops: ModuleType, new: int, activations: torch.dtype):
    case = make_case([(new, 130), (new, 20)], 128, activations=activations)

    found = ops.attention(case.queries, case.cache, case.step, case.table, case.spec)

    assert found.dtype == activations
    wanted = reference.attention(case.queries.float(), case.cache, case.step, case.table, case.spec)
    # products of float16 numbers: 2**-11 relative each, of values around 1, and the result in the activations' dtype
    torch.testing.assert_close(found.float(), wanted, rtol=1e-2, atol=4e-3)


@settings(max_examples=12)
@given(data=st.data())
def test_any_step_attends_as_in_float64(ops: ModuleType, data: st.DataObject):
    seqs = st.tuples(st.integers(1, 20), st.integers(0, 120)).map(lambda s: (s[0], s[0] + s[1]))
    head_dim = data.draw(st.sampled_from([32, 64, 80, 96]))
    case = make_case(
        data.draw(st.lists(seqs, min_size=1, max_size=3)),
        head_dim,
        data.draw(st.integers(1, 2)),
        data.draw(st.integers(1, 8)),
        data.draw(st.sampled_from(["q8", "q4", "f16"])),
        data.draw(st.sampled_from([0, 16, head_dim // 2 // 4 * 4, head_dim])),
        data.draw(st.integers(1, 2)),
        AttentionSpec(
            0.15, data.draw(st.none() | st.integers(1, 90)), data.draw(st.none() | st.sampled_from([2.0, 30.0]))
        ),
        seed=data.draw(st.integers(0, 2**31)),
    )

    check_attended(ops, case)


def test_a_sequence_without_tokens_comes_out_as_zeros(ops: ModuleType):
    case = make_case([(1, 140), (1, 30)])
    padded = replace(case.step, context_lens=torch.tensor([140, 0], dtype=torch.int32))

    found = ops.attention(case.queries, case.cache, padded, case.table, case.spec)

    assert found[1].eq(0).all()
    assert found[0].ne(0).any()


@settings(max_examples=30)
@given(
    head_dim=st.sampled_from([32, 64, 80, 128]),
    dtype=st.sampled_from(["q8", "q4", "f16"]),
    activations=st.sampled_from([torch.float32, torch.bfloat16, torch.float16]),
    size=st.sampled_from([1e-6, 1e-3, 1.0, 300.0]),
    seed=st.integers(0, 2**31),
)
def test_stored_codes_and_scales_equal_the_references_to_the_bit(
    ops: ModuleType, head_dim: int, dtype: CacheDtype, activations: torch.dtype, size: float, seed: int
):
    case = make_case([(3, 40), (1, 7)], head_dim, dtype=dtype, activations=activations, seed=seed)
    keys, values = case.keys * size, case.values * size
    keys[0, 0], values[1] = 0, values[1].round()  # a group of zeros; ties
    check_stored_alike(reference.store_kv, ops.store_kv, case.cache, keys, values, case.step.slots)


def test_a_negative_slot_stores_nothing(ops: ModuleType):
    check_negative_slots_store_nothing(ops.store_kv)


def test_slices_of_a_fused_projection_are_stored_and_turned_in_place(ops: ModuleType):
    case = make_case([(2, 20), (1, 9)], group=2)
    fused = torch.cat((case.queries, case.keys, case.values), 1)  # [T, H + 2 * Hkv, D]
    queries, keys, values = fused.split([4, 2, 2], 1)
    assert case.table is not None
    found = LayerCache.allocate(case.cache.format, len(case.cache.key_codes))
    wanted = LayerCache.allocate(case.cache.format, len(case.cache.key_codes))

    ops.store_kv(found, keys, values, case.step.slots)
    reference.store_kv(wanted, keys, values, case.step.slots)

    assert torch.equal(found.value_codes, wanted.value_codes)
    rounded.rotate(Rounded.exact(queries), case.step, case.table).check(ops.rotate(queries, case.step, case.table))


@pytest.mark.parametrize("rotated", [16, 40, 80])
@pytest.mark.parametrize("activations", [torch.float32, torch.bfloat16])
def test_queries_are_turned_to_their_positions(ops: ModuleType, rotated: int, activations: torch.dtype):
    case = make_case([(3, 40), (1, 100)], 80, rotated=rotated, num_sets=2, activations=activations)
    assert case.table is not None

    found = ops.rotate(case.queries, case.step, case.table)

    wanted = reference.rotate(case.queries.float(), case.step, case.table)
    assert found.dtype == activations
    torch.testing.assert_close(
        found, wanted.to(activations), rtol=1e-2 if activations == torch.bfloat16 else 1e-5, atol=1e-6
    )


@pytest.mark.parametrize("shape", [(5, 576), (3, 4, 64), (2, 8192), (0, 64)])
@pytest.mark.parametrize("activations", [torch.float32, torch.bfloat16])
def test_rows_are_divided_by_their_root_mean_square(ops: ModuleType, shape: tuple[int, ...], activations: torch.dtype):
    x, weight = torch.randn(shape).to(activations), torch.randn(shape[-1])

    found = ops.rms_norm(x, weight, 1e-5)

    assert (found.shape, found.dtype) == (x.shape, activations)
    wanted = reference.rms_norm(x.float(), weight, 1e-5).to(activations)
    torch.testing.assert_close(found, wanted, rtol=1e-2 if activations == torch.bfloat16 else 1e-5, atol=1e-6)


@pytest.mark.parametrize("activation", ["silu", "gelu", "gelu_tanh"])
def test_the_gate_opens_the_upper_half(ops: ModuleType, activation: str):
    gate_up = torch.randn(3, 2 * 1500) * 3

    found = ops.gated(gate_up, activation)

    # 1 + erf(x) loses its last digits where erf(x) is nearly -1
    torch.testing.assert_close(found, reference.gated(gate_up, activation), rtol=1e-5, atol=5e-6)


@pytest.mark.parametrize("stored", [torch.bfloat16, torch.float16, torch.float32])
def test_linear_gives_the_dtype_of_its_rows_whatever_the_weights(ops: ModuleType, stored: torch.dtype):
    x, weight, bias = torch.randn(2, 64).bfloat16(), torch.randn(8, 64).bfloat16().to(stored), torch.randn(8)

    found = ops.linear(x, weight, bias)

    assert found.dtype == torch.bfloat16
    torch.testing.assert_close(found.float(), reference.linear(x.float(), weight, bias), rtol=2e-2, atol=5e-2)
