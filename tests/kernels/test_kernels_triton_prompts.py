"""Prompts on CUDA: a cache expanded in Triton's interpreter and read by torch's own attention, held to float64."""

from collections.abc import Iterator
from dataclasses import replace
from types import ModuleType
from typing import get_args

import pytest
import torch
from attention_cases import Case, make_case
from error_bounds import attend_exactly, within
from hypothesis import given, settings
from hypothesis import strategies as st
from interpreted import interpreted

from tightrope.backends.hf.run.rotary import RotarySets
from tightrope.backends.rope.scaling import RopeSpec
from tightrope.backends.settings import RopeKind
from tightrope.kernels import reference
from tightrope.kernels.forms.expanded import expanded_cache_bytes
from tightrope.kernels.forms.layout import AttentionSpec, CacheDtype

# numpy, which interprets, warns where a card yields the infinity that is meant
pytestmark = pytest.mark.filterwarnings("ignore:overflow encountered in exp:RuntimeWarning")

# tokens in the step, and in all: a prompt's later chunk, one who decodes, a short chunk, and whole prompts
MIXED = [(20, 70), (1, 40), (5, 9), (16, 16), (33, 33)]


@pytest.fixture(scope="module")
def attention() -> Iterator[ModuleType]:
    with interpreted("attention") as module:
        yield module


def known(case: Case, lengths: list[tuple[int, int]]) -> Case:
    """The same with lengths that the host knows, which prompts are expanded by."""
    return replace(case, step=replace(case.step, lengths=tuple(lengths)))


def check(attention: ModuleType, case: Case, expanded: list[int]) -> None:
    """Held to float64; `expanded` are the sequences that are read so."""
    prompts = attention.prompts_of(case.queries, case.step, case.spec)
    assert [prompt.sequence for prompt in prompts] == expanded

    found = attention.attention(case.queries, case.cache, case.step, case.table, case.spec)

    exact = attend_exactly(case.queries, case.cache, case.step, case.table, case.spec)
    within(found, exact.output, exact.bound)


@pytest.mark.parametrize("dtype", get_args(CacheDtype))
@pytest.mark.parametrize(("head_dim", "group"), [(64, 3), (80, 1), (128, 7), (256, 2)])
def test_prompts_beside_short_chunks_and_decoding_rows_attend_as_in_float64(
    attention: ModuleType, head_dim: int, group: int, dtype: CacheDtype
):
    case = make_case(MIXED, head_dim, 2, group, dtype, num_sets=2)

    check(attention, known(case, MIXED), [0, 3, 4])


@pytest.mark.parametrize("rotated", [0, 16, 48, 128])
@pytest.mark.parametrize("dtype", get_args(CacheDtype))
def test_heads_that_are_rotated_in_part_or_not_at_all_attend_as_in_float64(
    attention: ModuleType, dtype: CacheDtype, rotated: int
):
    lengths = [(30, 83), (17, 40)]

    check(attention, known(make_case(lengths, 128, 1, 2, dtype, rotated), lengths), [0, 1])


@pytest.mark.parametrize("kind", get_args(RopeKind))
def test_keys_are_rotated_by_the_frequencies_of_their_own_sequence(attention: ModuleType, kind: RopeKind):
    spec = RopeSpec(
        kind, 4.0, 10_000.0, 64, 64, trained_len=64, window=512, attention_factor=1.2,
        short_factor=tuple(1 + 0.1 * i for i in range(32)), long_factor=tuple(2 + 0.5 * i for i in range(32)),
    )  # fmt: skip
    lengths = [(20, 300), (40, 60), (1, 200)]
    table = RotarySets(spec, 512).table([length for _, length in lengths])
    case = replace(known(make_case(lengths), lengths), table=table)

    check(attention, case, [0, 1])


@settings(max_examples=12)
@given(data=st.data())
def test_any_step_attends_as_in_float64(attention: ModuleType, data: st.DataObject):
    seqs = st.tuples(st.integers(1, 50), st.integers(0, 120)).map(lambda s: (s[0], s[0] + s[1]))
    lengths = data.draw(st.lists(seqs, min_size=1, max_size=4))
    head_dim = data.draw(st.sampled_from([32, 64, 80, 96]))
    case = make_case(
        lengths,
        head_dim,
        data.draw(st.integers(1, 2)),
        data.draw(st.integers(1, 8)),
        data.draw(st.sampled_from(get_args(CacheDtype))),
        data.draw(st.sampled_from([0, 16, head_dim // 2 // 4 * 4, head_dim])),
        data.draw(st.integers(1, 2)),
        AttentionSpec(data.draw(st.sampled_from([0.05, 0.15, 1.0]))),
        seed=data.draw(st.integers(0, 2**31)),
    )

    check(attention, known(case, lengths), [b for b, (new, _) in enumerate(lengths) if new >= 16])


@pytest.mark.parametrize("activations", [torch.bfloat16, torch.float16])
def test_half_precision_prompts_attend_within_their_rounding(attention: ModuleType, activations: torch.dtype):
    lengths = [(20, 130), (1, 20)]
    case = known(make_case(lengths, 128, activations=activations), lengths)

    found = attention.attention(case.queries, case.cache, case.step, case.table, case.spec)

    assert found.dtype == activations
    wanted = reference.attention(case.queries.float(), case.cache, case.step, case.table, case.spec)
    # keys, values and weights of float16: 2**-11 relative each, of values around 1, and the result in this dtype
    torch.testing.assert_close(found.float(), wanted, rtol=1e-2, atol=4e-3)


def test_the_scratch_of_the_longest_sequence_is_room_for_all_of_them(attention: ModuleType):
    case = known(make_case(MIXED, 64, activations=torch.bfloat16), MIXED)
    wanted = attention.attention(case.queries, case.cache, case.step, case.table, case.spec)
    scratch = torch.zeros(expanded_cache_bytes(70, 2, 64), dtype=torch.uint8)
    step = replace(case.step, scratch=scratch)

    found = attention.attention(case.queries, case.cache, step, case.table, case.spec)

    assert torch.equal(found, wanted)
    assert scratch.view(torch.float16).isfinite().all()
    assert scratch.view(torch.float16).ne(0).float().mean() > 0.9


@pytest.mark.parametrize(
    ("head_dim", "spec"),
    [(64, AttentionSpec(0.1, window=50)), (64, AttentionSpec(0.1, softcap=5.0)), (320, AttentionSpec(0.1))],
    ids=["a window", "a soft cap", "a large head"],
)
def test_layers_that_flash_attention_does_not_know_are_read_page_by_page(
    attention: ModuleType, head_dim: int, spec: AttentionSpec
):
    lengths = [(20, 70)]

    check(attention, known(make_case(lengths, head_dim, 1, 1, spec=spec), lengths), [])


def test_a_step_whose_lengths_the_host_does_not_know_is_read_page_by_page(attention: ModuleType):
    check(attention, make_case(MIXED), [])
