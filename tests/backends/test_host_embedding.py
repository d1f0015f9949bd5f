"""The embedding's table beside a card, in the machine's own memory: each step brings the rows of its tokens along."""

from contextlib import closing
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from checkout import ADAPTERS
from test_adapter_tables import adapted, pytestmark
from test_adapters import open_model

from tightrope.backends.files.hf_config import read_config
from tightrope.backends.files.safetensors import Checkpoint
from tightrope.backends.hf.backend import HFBackend
from tightrope.backends.hf.load.blueprint import Blueprint, draw, embedding_of, table_on_host
from tightrope.backends.hf.load.model import LoadedModel, build
from tightrope.backends.hf.modules.embedding import Embedding
from tightrope.backends.protocol import Chunk

__all__ = ["pytestmark"]

UNTIED, TIED = ADAPTERS / "llama-untied-bf16", ADAPTERS / "llama-bf16"
TABLE = "model.embed_tokens"
STEPS = [
    [Chunk(1, [5, 33, 101, 7], 0, "all")],
    [Chunk(1, [9], 4, "last"), Chunk(2, [3, 3], 0, "last")],
]


def drawn(folder: Path, device: str) -> Blueprint:
    return draw(folder, read_config(folder), Checkpoint.open(folder), device=device)


def put_on_host(model: LoadedModel) -> None:
    """As a model on a card is built."""
    table = next(module for module in model.tree.modules() if isinstance(module, Embedding))
    table.is_on_host = True
    model._host_table = table


def logits(backend: HFBackend, steps: list[list[Chunk]]) -> list[torch.Tensor]:
    found = []
    for chunks in steps:
        for chunk in chunks:
            if chunk.start == 0:
                backend.kv.open(chunk.seq_id, chunk.token_ids, "", reuse="nothing")
            assert backend.kv.reserve(chunk.seq_id, len(chunk.token_ids))
        found.append(backend.forward(chunks).clone())
        for chunk in chunks:
            backend.kv.commit(chunk.seq_id, chunk.start, chunk.token_ids)
    for chunk in {chunk.seq_id: chunk for chunks in steps for chunk in chunks}.values():
        backend.kv.close(chunk.seq_id, keep=False)
    return found


def test_a_table_that_the_head_does_not_share_stays_on_the_host_beside_a_card_and_is_no_part_of_what_the_card_takes():
    on_card, on_cpu = drawn(UNTIED, "cuda"), drawn(UNTIED, "cpu")
    entry = on_card.checkpoint.tensors[f"{TABLE}.weight"]

    assert on_card.host_bytes == entry.num_bytes
    assert (on_cpu.host_bytes, sum(on_cpu.block_sizes)) == (0, sum(on_card.block_sizes) + entry.num_bytes)


def test_a_table_that_is_the_head_as_well_is_needed_on_the_card_and_counted_once():
    tied = drawn(TIED, "cuda")

    assert tied.host_bytes == 0
    assert sum(tied.block_sizes) >= tied.weight_bytes
    assert sum(tied.block_sizes) - tied.weight_bytes < tied.checkpoint.tensors[f"{TABLE}.weight"].num_bytes


def test_the_loader_leaves_it_there():
    blueprint = drawn(UNTIED, "cpu")
    weights = table_on_host(list(blueprint.weights), embedding_of(blueprint.tree, TABLE))

    model = build(replace(blueprint, parts=(replace(blueprint.parts[0], weights=tuple(weights)),)))

    token_ids = torch.tensor([3, 511, 3])
    rows = model.embedded(token_ids)
    assert rows is not None
    assert torch.equal(rows, Checkpoint.open(UNTIED).read(f"{TABLE}.weight")[token_ids])
    assert build(drawn(UNTIED, "cpu")).embedded(token_ids) is None


def test_steps_give_the_same_logits():
    with closing(open_model(UNTIED)) as backend:
        expected = logits(backend, STEPS)

        put_on_host(backend.runner.model)

        found = logits(backend, STEPS)
        assert all(map(torch.equal, found, expected))


@pytest.mark.parametrize("adapter", ["grown", None])
def test_adapters_with_tokens_of_their_own_find_their_rows(adapter: str | None, tmp_path: Path):
    adapted(UNTIED, target_modules=["q_proj"], modules_to_save=["embed_tokens", "lm_head"], resize=2).save_pretrained(
        str(tmp_path)
    )
    prompt = [5, 512, 33, 513] if adapter is not None else [5, 33]
    steps = [[Chunk(1, prompt, 0, "all", adapter), Chunk(2, [7, 8], 0, "last")]]
    with closing(open_model(UNTIED, grown=tmp_path)) as backend:
        expected = logits(backend, steps)

        put_on_host(backend.runner.model)

        assert all(map(torch.equal, logits(backend, steps), expected))
