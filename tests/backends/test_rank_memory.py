"""What ranks take of the machine's memory: what they are planned with, and all of it is told."""

import json
import os
import subprocess
import sys
from collections.abc import Callable
from contextlib import closing
from pathlib import Path

import pytest
from checkout import ADAPTERS
from hf_models import smollm2_bf16
from test_hf_families import FAMILIES, write

from tightrope.backends.hf.backend import HFBackend
from tightrope.backends.hf.load.inspection import inspect
from tightrope.backends.hf.ranks.team import Team
from tightrope.backends.hf.workspace import token_bytes
from tightrope.backends.locate import bundled_model
from tightrope.backends.memory import private_memory, tree_memory
from tightrope.backends.settings import CacheSettings, ModelSettings
from tightrope.backends.tensor_parallel import Share

FOLDER = ADAPTERS / "llama-bf16"
APART = 0.03  # of the plan, at most


@pytest.mark.parametrize("path", [bundled_model, smollm2_bf16], ids=["GGUF file", "bf16 folder"])
def test_each_of_two_ranks_takes_what_it_is_planned_with(path: Callable[[], Path]):
    """In a process of its own, as freed memory of others would be used anew."""
    worker = [sys.executable, "-m", "bench.ranks", "--worker", "memory", str(path()), "2", "2"]
    done = subprocess.run(worker, capture_output=True, text=True, check=True)

    of_plan = {rank["rank"]: rank["of_plan"] for rank in json.loads(done.stdout.splitlines()[-1])}

    assert of_plan.keys() == {"rank 0 on the CPU", "rank 1 on the CPU"}
    assert all(abs(share - 1) <= APART for share in of_plan.values()), of_plan


def test_what_all_ranks_take_is_told_with_each_of_them_and_counted_with_the_engines_process():
    settings = ModelSettings(
        max_model_len=256, device="cpu", threads=2, tensor_parallel=2, cache=CacheSettings(tokens=512)
    )
    with closing(HFBackend(FOLDER, settings, lambda _: None)) as backend:
        assert isinstance(backend._part, Team)
        memory = backend.card.memory
        rank, other = backend._part.ranks.processes[0].pid, memory.shares[1]

        assert [share.device for share in memory.shares] == ["rank 0 on the CPU", "rank 1 on the CPU"]
        assert memory.cache_bytes == sum(share.cache_bytes for share in memory.shares)
        assert memory.weight_bytes == sum(share.weight_bytes for share in memory.shares)
        assert 0 < other.cache_bytes < memory.cache_bytes
        alone, together = private_memory(os.getpid()), tree_memory(os.getpid())
        assert together - alone > 0.95 * private_memory(rank)  # Servers of other tests may be there as well.


def test_a_process_that_ends_while_it_is_looked_at_has_no_others(monkeypatch: pytest.MonkeyPatch):
    listed = os.listdir
    with subprocess.Popen(["sleep", "60"]) as process:

        def ended(path: str) -> list[str]:
            process.kill()
            process.wait()
            return listed(path)

        monkeypatch.setattr(os, "listdir", ended)
        assert tree_memory(process.pid) < 1 << 20


def test_attention_of_transformers_own_class_caches_all_heads_on_every_rank_and_is_planned_so(tmp_path: Path):
    settings = ModelSettings(device="cpu")
    write(FAMILIES["olmo2, norms after the blocks"], tmp_path)
    alone = inspect(tmp_path, settings).blueprint
    parts = [inspect(tmp_path, settings, "cpu", Share(rank, 2)).blueprint for rank in range(2)]

    assert not any(part.attends_by_heads for part in parts)
    for part in parts:
        assert part.weight_bytes < 0.8 * alone.weight_bytes
        assert token_bytes(part.local, "q8") == token_bytes(alone.local, "q8")
        assert [layer.num_kv_heads for layer in part.layers] == [layer.num_kv_heads for layer in alone.layers]
