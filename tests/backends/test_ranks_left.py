"""A step that one of several ranks can't end fails as with one rank, and the next one has the bits of one rank."""

from collections.abc import Iterator
from contextlib import closing, contextmanager

import psutil
import pytest
import torch
from torch import Tensor

from tightrope.backends.detect import open_backend
from tightrope.backends.errors import BackendError, OutOfMemory
from tightrope.backends.hf.backend import HFBackend
from tightrope.backends.hf.ranks.runner import RankedRunner
from tightrope.backends.hf.ranks.team import Team
from tightrope.backends.hf.run.steps import StepInputs
from tightrope.backends.hf.runner import ModelRunner
from tightrope.backends.protocol import Chunk, WantLogits
from tightrope.backends.settings import CacheSettings, ModelSettings

LENGTH = 500  # Logits of so many tokens are larger than all else that a step allocates.
MIB = 1 << 20
SETTINGS = ModelSettings(
    device="cpu", gguf_engine="own", max_model_len=512, max_num_seqs=2, threads=2, cache=CacheSettings(tokens=1024)
)


def opened(count: int) -> HFBackend:
    """The bundled model in so many ranks."""
    backend = open_backend(SETTINGS.model_copy(update={"tensor_parallel": count}), lambda _: None)
    assert isinstance(backend, HFBackend)
    return backend


@pytest.fixture(scope="module")
def expected() -> Tensor:
    with closing(opened(1)) as one:
        return logits(one, "all")


@pytest.fixture
def ranked() -> Iterator[HFBackend]:
    with closing(opened(2)) as backend:
        yield backend


def logits(backend: HFBackend, want: WantLogits) -> Tensor:
    prompt = [5 + 7 * i % 200 for i in range(LENGTH)]
    backend.kv.open(0, prompt, "", reuse="nothing")
    try:
        assert backend.kv.reserve(0, LENGTH)
        return backend.forward([Chunk(0, prompt, 0, want)]).clone()
    finally:
        backend.kv.close(0, keep=False)


@contextmanager
def no_more_than(pid: int, num_bytes: int) -> Iterator[None]:
    """Meanwhile a process can't have so many bytes beyond what it has."""
    process = psutil.Process(pid)
    before = process.rlimit(psutil.RLIMIT_AS)
    process.rlimit(psutil.RLIMIT_AS, (process.memory_info().vms + num_bytes, before[1]))
    try:
        yield
    finally:
        process.rlimit(psutil.RLIMIT_AS, before)


def test_a_step_for_which_another_rank_has_no_memory_is_refused_and_the_next_one_runs(
    ranked: HFBackend, expected: Tensor
):
    assert isinstance(ranked._part, Team)
    pid = ranked._part.ranks.processes[0].pid
    logits(ranked, "last")  # What kernels keep is there then.
    line = rf"^rank 1 of 2: out of memory in a step of {LENGTH} tokens: "
    with no_more_than(pid, 4 * MIB), pytest.raises(OutOfMemory, match=line) as raised:
        logits(ranked, "all")

    assert "\n" not in str(raised.value)
    for _ in range(2):
        assert torch.equal(logits(ranked, "all"), expected)


@pytest.mark.parametrize("error", [OutOfMemory("out of memory in a step"), BackendError("the model failed")])
def test_a_step_that_the_first_rank_can_not_end_leaves_the_others_ready_for_the_next(
    error: BackendError, ranked: HFBackend, expected: Tensor, monkeypatch: pytest.MonkeyPatch
):
    def failing(self: ModelRunner, inputs: StepInputs) -> Tensor:
        raise error

    assert isinstance(ranked.runner, RankedRunner)
    for _ in range(3):
        with monkeypatch.context() as patched:
            patched.setattr(ModelRunner, "run", failing)
            with pytest.raises(type(error)) as raised:
                logits(ranked, "last")
        assert raised.value is error
        assert torch.equal(logits(ranked, "all"), expected)
