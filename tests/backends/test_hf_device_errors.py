"""A card's errors, raised inside the real model's steps and load: what becomes of the requests, and of the backend."""

from collections.abc import Callable, Iterator
from contextlib import closing
from types import ModuleType

import pytest
import torch
from checkout import ADAPTERS
from engine_runs import make_core, request
from torch import Tensor

from tightrope.backends.errors import DeviceLost, OutOfMemory
from tightrope.backends.hf import backend as hf
from tightrope.backends.hf import part
from tightrope.backends.hf.backend import HFBackend
from tightrope.backends.hf.run import device_errors
from tightrope.backends.settings import CacheSettings, ModelSettings
from tightrope.engine.core import EngineCore
from tightrope.engine.types import TokenPrompt

pytestmark = pytest.mark.quick

SETTINGS = ModelSettings(max_model_len=128, max_num_seqs=4, threads=1, cache=CacheSettings(tokens=512, dtype="q8"))
PROMPTS = {name: TokenPrompt(tuple(range(5 + i, 45 + i))) for i, name in enumerate(("old", "older", "newest"))}
NO_MEMORY = torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 64.00 MiB.\nGPU 0 has a total capacity")


@pytest.fixture
def backend() -> Iterator[HFBackend]:
    with closing(HFBackend(ADAPTERS / "llama-bf16", SETTINGS, lambda share: None)) as loaded:
        yield loaded
        loaded.kv.check_integrity()


def written(core: EngineCore, *names: str) -> dict[str, list[int]]:
    """The tokens that are written for each of these prompts, all queued at once; none for those that fail."""
    for name in names:
        core.add(core.prepare(request(name, PROMPTS[name], max_tokens=12)))
    found: dict[str, list[int]] = {}
    while core.has_work:
        for delta in core.step().deltas:
            found.setdefault(delta.request_id, []).extend(token.token_id for token in delta.tokens)
    return found


def failing_for(num_seqs: int, error: Exception, backend: HFBackend, monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Has steps of so many sequences fail behind the last layer, where all keys are stored; gives the failed ones."""
    forward: Callable[..., Tensor] = backend.runner._forward
    failed: list[int] = []

    def failing(*given: object) -> Tensor:
        logits = forward(*given)
        if len(logits) >= num_seqs:
            failed.append(len(logits))
            raise error
        return logits

    monkeypatch.setattr(backend.runner, "_forward", failing)
    return failed


def test_a_step_without_memory_costs_the_newest_request_and_no_token_of_the_others(
    backend: HFBackend, monkeypatch: pytest.MonkeyPatch
):
    alone = written(make_core(backend), "old", "older")
    failed = failing_for(3, NO_MEMORY, backend, monkeypatch)

    found = written(make_core(backend), "old", "older", "newest")

    assert failed == [3]
    assert found == alone
    assert len(found["old"]) == 12


def test_a_device_that_is_lost_in_a_step_ends_the_loop(backend: HFBackend, monkeypatch: pytest.MonkeyPatch):
    """The model computes on the CPU, and its device is taken for a card where its errors are named."""
    illegal = torch.AcceleratorError("CUDA error: an illegal memory access was encountered\nCUDA kernel errors")

    def synchronize(device: torch.device) -> None:
        raise illegal

    monkeypatch.setattr(torch.cuda, "synchronize", synchronize)
    named = device_errors._named
    monkeypatch.setattr(
        device_errors, "_named", lambda error, work, devices: named(error, work, [torch.device("cuda:0")])
    )
    failing_for(1, illegal, backend, monkeypatch)

    with pytest.raises(DeviceLost, match=r"^cuda:0 is lost after a step of \d+ tokens: CUDA error: an illegal memory"):
        written(make_core(backend), "old")


@pytest.mark.parametrize(
    ("module", "name", "work"),
    [(part, "build", "loading the model"), (hf, "key_factors", "setting up the cache")],
    ids=["weights", "cache"],
)
def test_a_load_that_finds_no_memory_is_refused_in_one_line(
    module: ModuleType, name: str, work: str, monkeypatch: pytest.MonkeyPatch
):
    def fails(*given: object) -> None:
        raise NO_MEMORY

    monkeypatch.setattr(module, name, fails)

    with pytest.raises(OutOfMemory) as caught:
        HFBackend(ADAPTERS / "llama-bf16", SETTINGS, lambda share: None)
    assert str(caught.value) == f"out of memory in {work}: CUDA out of memory. Tried to allocate 64.00 MiB."
