"""Mixtures of experts by the kernels of a card, in Triton's interpreter, against each token by itself."""

from collections.abc import Iterator
from dataclasses import fields, replace
from types import ModuleType

import pytest
import rounded
import torch
from card_experts import EXPERTS, HIDDEN, MIDDLE, layer_of, matrices
from hypothesis import given, settings
from hypothesis import strategies as st
from interpreted import interpreted
from rounded import Rounded
from torch import Tensor

from bench.gpu.matrices import random_nf4
from tightrope.kernels import dispatch
from tightrope.kernels.forms.column_stack import stack_columns
from tightrope.kernels.forms.columns import ColumnMatrix, to_columns


@pytest.fixture(scope="module")
def card() -> Iterator[ModuleType]:
    with interpreted("experts") as module:
        yield module


@given(
    kind=st.sampled_from(("plain", "gptq", "exl2", "nf4")),
    count=st.sampled_from((1, 2, 7, 50)),
    each=st.integers(1, EXPERTS),
    seed=st.integers(0, 2**32 - 1),
)
@settings(max_examples=8)
def test_experts_of_a_card_equal_each_token_by_itself(card: ModuleType, kind: str, count: int, each: int, seed: int):
    torch.manual_seed(seed)
    layer, gate_up, down = layer_of(kind)
    x, shares = torch.randn(count, HIDDEN), torch.rand(count, each)
    picked = (torch.rand(count, EXPERTS) * torch.rand(EXPERTS)).topk(each).indices

    found = card.experts(x, layer, picked, shares)

    weights = [(up.double().T, out.double().T) for up, out in zip(gate_up, down, strict=True)]
    one_expert_at_a_time(x, picked, shares, weights).check(found)


@pytest.mark.parametrize("kind", ["gptq", "nf4"])
def test_more_tokens_than_run_together_take_turns(card: ModuleType, kind: str, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(dispatch, "MOST_STACKED", 4)
    layer = layer_of(kind)[0]
    x, shares = torch.randn(10, HIDDEN), torch.rand(10, 2)
    picked = torch.rand(10, EXPERTS).topk(2).indices

    found = dispatch.experts(x, layer, picked, shares, None)

    assert found is not None
    torch.testing.assert_close(found, card.experts(x, layer, picked, shares))


def test_plain_experts_of_many_tokens_are_left_to_run_one_by_one(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(dispatch, "MOST_STACKED", 4)
    layer = layer_of("plain")[0]

    assert dispatch.experts(torch.randn(5, HIDDEN), layer, torch.zeros(5, 1).long(), torch.ones(5, 1), None) is None


def one_expert_at_a_time(x: Tensor, picked: Tensor, shares: Tensor, weights: list[tuple[Tensor, Tensor]]) -> Rounded:
    """`weights` [K, N] float64 of each expert's two linears."""
    out = Rounded.exact(torch.zeros_like(x))
    for expert, (gate_up, down) in enumerate(weights):
        tokens, places = (picked == expert).nonzero(as_tuple=True)
        gates = rounded.gated(rounded.times(Rounded.exact(x[tokens]), gate_up), "silu")
        made, share = rounded.times(gates, down), shares[tokens, places].unsqueeze(1)
        summed = out[tokens] + Rounded(made.value * share, made.off * share).again(made.value.abs() * share, 1)
        out.value[tokens], out.off[tokens] = summed.value, summed.off
    return out


@given(st.lists(st.integers(0, EXPERTS - 1), min_size=1, max_size=200))
@settings(max_examples=25)
def test_every_place_is_in_one_tile_of_its_expert(card: ModuleType, picks: list[int]):
    tiles = card.share_out(torch.tensor(picks).unsqueeze(1), EXPERTS).tolist()

    placed = [(expert, place) for expert, *places in tiles for place in places if place >= 0]
    assert sorted(placed, key=lambda pair: pair[1]) == [(expert, place) for place, expert in enumerate(picks)]
    assert all(expert >= 0 or set(places) == {-1} for expert, *places in tiles)


def test_the_parts_of_a_stack_are_the_matrices_and_share_its_memory():
    found = [to_columns(matrix) for matrix in matrices("exl2", HIDDEN, MIDDLE)]
    made = stack_columns(found)
    assert made is not None

    for part, matrix in zip(made[1], found, strict=True):
        for field in fields(ColumnMatrix):
            ours, theirs = getattr(part, field.name), getattr(matrix, field.name)
            assert torch.equal(ours, theirs) if isinstance(theirs, Tensor) else ours == theirs
        assert part.words.untyped_storage().data_ptr() == made[0].matrix.words.untyped_storage().data_ptr()


def test_matrices_of_different_kinds_are_not_stacked():
    first, second = (to_columns(matrices(kind, HIDDEN, MIDDLE)[0]) for kind in ("gptq", "exl2"))
    book, other = (to_columns(random_nf4(HIDDEN, MIDDLE, 32)) for _ in range(2))

    assert stack_columns([first, second]) is None
    assert stack_columns([book, other]) is not None
    assert stack_columns([book, replace(other, codebook=torch.ones(16))]) is None
