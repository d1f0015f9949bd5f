"""bench/adapters at tiny sizes: every linear is adapted, and steps of two experts and of all are told apart."""

from pathlib import Path

import pytest
import torch

from bench import adapters
from bench.gpu.random_weights import SMALL, gptq_entries, plain_entries, random_model
from tightrope.backends.hf.modules.experts import Experts

pytestmark = pytest.mark.quick

MIXTURE = SMALL | {"num_local_experts": 8, "num_experts_per_tok": 2}


def test_costs_are_told_with_their_bar_for_one_stream_and_for_eight(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(adapters, "LLAMA", SMALL)

    rows = adapters.adapter_costs("bf16", plain_entries(SMALL), 1, None)

    assert [(row["streams"], row["adapters"], row["bar"]) for row in rows] == [(1, 1, 0.15), (8, 4, 0.15)]
    assert all(row["met"] == (row["cost"] <= 0.15) for row in rows)


def test_an_adapter_changes_what_a_step_gives():
    model, _ = random_model(SMALL, plain_entries(SMALL), adapters.CPU, lambda line: None)
    adapters.adapt(model.tree)
    step = adapters.decode_step(model, 1)
    rows = adapters.AdapterRows(torch.zeros(1, dtype=torch.int32), torch.ones(1), (0,))

    assert not torch.equal(step(None), step(rows))


def test_a_step_of_all_experts_picks_all(monkeypatch: pytest.MonkeyPatch, tmp_path: Path):
    monkeypatch.setattr(adapters, "MIXTRAL", MIXTURE)
    picked: list[int] = []
    forward = Experts.forward

    def counted(module: Experts, x: torch.Tensor, index: torch.Tensor, weights: torch.Tensor) -> torch.Tensor:
        picked.append(index.shape[1])
        return forward(module, x, index, weights)

    monkeypatch.setattr(Experts, "forward", counted)
    row = adapters.expert_share("4 bits", gptq_entries(MIXTURE), 1, tmp_path / "lock")

    assert picked == [2, 2, 8, 8] * 2  # two layers, two rounds
    assert row["met"] == (row["share"] <= 0.4)
